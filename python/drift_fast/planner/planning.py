"""`plan`: two models and a training run, as figures with their origins.

Owns the order of the figures, and the warnings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_fast.checkpoints.opened import PathLike
from drift_fast.options import takes
from drift_fast.planner import figures, hours, motion, rates
from drift_fast.planner.counts import read_model
from drift_fast.planner.memory import Memory, estimate
from drift_fast.planner.options import PlanOptions
from drift_fast.planner.remedies import Remedies
from drift_fast.planner.report import TrainingPlan, sized
from drift_fast.planner.scenario import Scenario

if TYPE_CHECKING:
    from typing import Unpack

    from drift_fast._keywords import PlanKeywords

# Half a unit in the last place of a bfloat16, relative to the value: less does not change it.
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
    """Say what Δ and a training run with it will take, and how far the run will move.

    Reads configurations and headers, no weight; a directory with nothing but a config.json is
    enough, where transformers is installed. Every figure says where it comes from.

    Args:
        reasoning, multimodal: as in `compute_delta`, or a directory with a config.json.
        config: a training configuration in YAML or JSON, in the names of the options, the Trainer
            or LLaMA-Factory; options take precedence. Without `delta` and `rms` λ is predicted from
            the delta that its section drift_fast names, where that exists.

    Raises:
        FileNotFoundError, CheckpointError: a model, configuration or delta that is missing or not
            valid.
        DriftError: a config.json from which transformers cannot build the model.
        TypeError: an unknown option.
        ValueError: an option without meaning.
    """
    run, unused = _read(config, options)
    planned = Scenario.of(run, read_model(reasoning), read_model(multimodal))
    size = motion.size_of(
        None if run.delta is None else Path(run.delta), run.rms, planned.selection
    )
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
    warnings = [*_remarks(planned, memory), *_speed_remarks(run), *motion.remarks(of_motion)]
    gpu_nbytes = run.gpu_nbytes
    if gpu_nbytes is None:
        return TrainingPlan(found, warnings, None, [], unused)
    if memory.device_nbytes <= gpu_nbytes:
        return TrainingPlan(found, warnings, True, [], unused)
    warnings.append(
        f"{sized(memory.device_nbytes)} are needed on each GPU, which has {sized(gpu_nbytes)}"
    )
    return TrainingPlan(found, warnings, False, Remedies(planned, gpu_nbytes).found(), unused)


def _read(config: PathLike | None, options: Mapping[str, Any]) -> tuple[PlanOptions, list[str]]:
    """Return the options over the numbers of a training configuration, and its unused keys."""
    if config is None:
        return PlanOptions.from_keywords(options, function="plan"), []
    # Loaded here, since most plans need no file.
    from drift_fast.planner.configuration import Configuration

    given = Configuration.read(Path(config))
    numbers = given.numbers
    if "steps" in options:
        numbers.pop("samples", None)
    elif "samples" in options:
        numbers.pop("steps", None)
    merged = {**numbers, **options}
    # Planning comes before the delta is made, too.
    if given.delta is not None and merged.get("delta") is None and merged.get("rms") is None:
        merged["delta"] = given.delta if (given.delta / "drift.json").is_file() else None
    return PlanOptions.from_keywords(merged, function="plan"), given.unused


def _remarks(planned: Scenario, memory: Memory) -> Iterator[str]:
    run, selection = planned.run, planned.selection
    reasoning = planned.reasoning.numel(planned.reasoning.selected(selection))
    if reasoning != planned.delta_numel:
        yield (
            f"{selection} selects {reasoning:,} elements of the reasoning and "
            f"{planned.delta_numel:,} of the multimodal model; `drift-fast check` says whether "
            "they fit each other"
        )
    if run.precision == "bf16" and run.learning_rate < _BF16_HALF * _TYPICAL_WEIGHT:
        yield (
            f"bfloat16 weights without float32 copies: a step of {run.learning_rate:g} leaves "
            f"weights above {run.learning_rate / _BF16_HALF:.1g} in size unchanged, which rounds "
            "most updates and injections away; use bf16-mixed"
        )
    if run.optimizer == "adamw8bit" and run.sharded:
        yield f"8-bit AdamW under {run.sharding} was not tested with an injection"
    if memory.residency == "disk":
        yield "residency disk was not measured on a GPU"
    if not run.gradient_checkpointing and not any(
        item.name == "activations" for item in memory.device
    ):
        yield "config.json does not have the sizes that activations follow from: they are left out"


def _speed_remarks(run: PlanOptions) -> Iterator[str]:
    if run.precision == "fp32" and (run.peak == rates.H100_FLOPS or run.utilization is None):
        yield (
            "hours follow from a peak and a utilization in bfloat16, and fp32 takes several times "
            "as long: give peak (--peak-tflops) and utilization of float32"
        )
