"""`plan`: two models and a training run as figures with their origins.

Owns the order of the figures and the warnings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from drift_fast.alignment.model_pair import SAME, is_same_source
from drift_fast.checkpoints.opened import PathLike
from drift_fast.names import is_other_modality
from drift_fast.options import takes
from drift_fast.paths import local_path
from drift_fast.planner import figures, hours, motion, rates
from drift_fast.planner.counts import read_model
from drift_fast.planner.memory import Memory, estimate
from drift_fast.planner.options import PlanOptions
from drift_fast.planner.remedies import NONE, Remedies
from drift_fast.planner.report import TrainingPlan, sized
from drift_fast.planner.scenario import Scenario

if TYPE_CHECKING:
    from typing import Unpack

    from drift_fast._keywords import PlanKeywords

# Half a unit in the last place of a bfloat16, relative to its value: adding less changes nothing.
_BF16_HALF = 2**-9
_TYPICAL_WEIGHT = 0.02


@takes(PlanOptions)
def plan(
    reasoning: PathLike,
    multimodal: PathLike,
    *,
    config: PathLike | None = None,
    **options: Unpack[PlanKeywords],
) -> TrainingPlan:
    """Estimate what Δ and a training run with it will take, and how far the run will move.

    Reads configurations and headers, no weights. If transformers is installed, a directory with
    nothing but a config.json is enough. Every figure says where it comes from.

    Args:
        reasoning: as in `compute_delta`, or a directory with a config.json.
        multimodal: the same.
        config: a training configuration in YAML or JSON, with the names of the options, the
            Trainer or LLaMA-Factory; options override it. Without `delta` and `rms`, λ is predicted
            from the delta that its section drift_fast names, if that exists.

    Raises:
        FileNotFoundError, CheckpointError: a model, configuration or delta that is missing or
            invalid.
        DriftError: a config.json from which transformers cannot build the model.
        TypeError: an unknown option.
        ValueError: an invalid option, or a progress_cap that is not above the progress_target.
    """
    run, unused = _read(config, options)
    planned = Scenario.of(run, read_model(reasoning), read_model(multimodal))
    _refuse_low_cap(planned)
    size = motion.size_of(run.delta, run.rms, planned.selection)
    memory = estimate(run, planned.multimodal, planned.delta_numel, run.gpu_nbytes)
    of_motion = list(motion.figures(run, size))
    found = [
        *figures.parameters(planned),
        *figures.delta(planned),
        *figures.memory(planned, memory),
        *hours.figures(planned, memory.residency),
        *figures.disk(planned),
        *of_motion,
    ]
    warnings = [*_remarks(planned, memory), *_speed_remarks(run), *motion.remarks(run, of_motion)]
    gpu_nbytes = run.gpu_nbytes
    fits = None if gpu_nbytes is None else memory.device_nbytes <= gpu_nbytes
    remedies: list[str] = []
    if gpu_nbytes is not None and not fits:
        warnings.append(f"each GPU needs {sized(memory.device_nbytes)} and has {sized(gpu_nbytes)}")
        remedies = Remedies(planned, gpu_nbytes).found()
        warnings += [] if remedies else [NONE]
    return TrainingPlan(found, warnings, fits, remedies, unused, run)


def _read(config: PathLike | None, options: Mapping[str, Any]) -> tuple[PlanOptions, list[str]]:
    """Return a configuration's numbers, overridden by options, and its unused keys."""
    if config is None:
        return PlanOptions.from_keywords(options, function="plan"), []
    # Imported here, since most plans need no file.
    from drift_fast.planner.configuration import Configuration

    given = Configuration.read(local_path(config))
    numbers = given.numbers
    if "steps" in options:
        numbers.pop("samples", None)
    elif "samples" in options:
        numbers.pop("steps", None)
    merged = {**numbers, **options}
    # A run may be planned before its delta is computed.
    if given.delta is not None and merged.get("delta") is None and merged.get("rms") is None:
        merged["delta"] = given.delta if (given.delta / "drift.json").is_file() else None
    return PlanOptions.from_keywords(merged, function="plan"), given.unused


def _refuse_low_cap(planned: Scenario) -> None:
    """Refuse a cap that a target does not come to, as an injection does.

    Raises:
        ValueError: as `Control`, of these two.
    """
    run, names = planned.run, planned.names
    if run.progress_cap is None or run.progress_target is None:
        return
    # Imported here, since it needs torch.
    from drift_fast.inject.config import StrengthOptions
    from drift_fast.inject.strength.control import Control

    stated = StrengthOptions(
        alpha=run.alpha,
        progress_cap=run.progress_cap,
        progress_target=run.progress_target,
        total_steps=1,
    )
    Control(names, stated, squares=[1.0] * len(names))


def _remarks(planned: Scenario, memory: Memory) -> Iterator[str]:
    run, selection = planned.run, planned.selection
    if is_same_source(planned.reasoning.given, planned.multimodal.given):
        yield SAME
    towers = [name for name in planned.reasoning.shapes if is_other_modality(name)]
    # As `check` has it: a stray buffer is not a tower.
    if len(towers) > 3 and not any(map(is_other_modality, planned.multimodal.shapes)):
        yield (
            f"the reasoning model has {len(towers)} tensors of another modality, {towers[0]} "
            "first, and the multimodal one has none: the two seem to be exchanged. Exchange them; "
            "`drift-fast check` says whether they fit each other"
        )
    if run.steps is not None and run.samples is not None:
        follows = run.changed(steps=None).optimizer_steps
        if follows != run.steps:
            yield (
                f"steps={run.steps} wins over samples={run.samples} and epochs={run.epochs:g}, "
                f"which come to {follows:,} steps: leave steps out to plan those"
            )
    reasoning = planned.reasoning.numel(planned.reasoning.selected(selection))
    if reasoning != planned.delta_numel:
        yield (
            f"{selection} selects {reasoning:,} elements of the reasoning and "
            f"{planned.delta_numel:,} of the multimodal model; `drift-fast check` says whether "
            "they fit each other"
        )
    whole = not run.lora_rank
    if whole and run.precision == "bf16" and run.learning_rate < _BF16_HALF * _TYPICAL_WEIGHT:
        yield (
            f"bfloat16 weights without float32 copies: a step of {run.learning_rate:g} does not "
            f"change weights above {run.learning_rate / _BF16_HALF:.1g} in size, so that most of "
            "what the optimizer does, the injection included, is rounded away, and λ ends far "
            "below what is estimated here. Plan bf16-mixed: float32 weights under autocast "
            "(from_pretrained(…, dtype=torch.float32) and bf16=True), ZeRO or FSDP2 with mixed "
            "precision, or an optimizer that rounds stochastically or with compensation"
        )
    if run.optimizer == "adamw8bit" and run.sharded:
        yield f"8-bit AdamW under {run.sharding} was not tested with an injection"
    if memory.residency == "disk":
        yield "residency disk was not measured on a GPU"
    if not run.gradient_checkpointing and not any(
        item.name == "activations" for item in memory.device
    ):
        yield "config.json lacks the sizes that activations follow from, so they are not included"


def _speed_remarks(run: PlanOptions) -> Iterator[str]:
    if run.precision == "fp32" and (run.peak == rates.H100_FLOPS or run.utilization is None):
        yield (
            "hours follow from peak and utilization in bfloat16, but fp32 takes several times as "
            "long: give peak (--peak-tflops) and utilization of float32"
        )
