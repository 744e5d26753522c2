"""`plan`: two models and a training run, as figures with their origins.

Owns the order of the figures, hours and disk, the warnings, and the search for what would fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drift_fast.checkpoints.opened import PathLike
from drift_fast.planner import hours, motion, rates
from drift_fast.planner.counts import VISION, Model, read_model
from drift_fast.planner.memory import Memory, estimate
from drift_fast.planner.report import Figure, Origin, TrainingPlan, sized
from drift_fast.planner.training import Training, read_configuration
from drift_fast.preflight.cost import ITEMSIZE
from drift_fast.selection import Selection
from drift_fast.sizes import MEMORY, parse_size

# A change of the run, in the words of a user, and what it changes.
_REMEDIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("with residency host", {"residency": "host"}),
    ("under ZeRO-2", {"sharding": "zero2"}),
    ("under ZeRO-3", {"sharding": "zero3"}),
    ("under FSDP2", {"sharding": "fsdp2"}),
    ("under ZeRO-2 with the optimizer offloaded", {"sharding": "zero2", "offload": "optimizer"}),
    ("under ZeRO-3, offloaded", {"sharding": "zero3", "offload": "all"}),
    ("with 8-bit AdamW", {"optimizer": "adamw8bit"}),
)
_MOST_GPUS = 64
# Half a unit in the last place of a bfloat16, relative to the value: less does not change it.
_BF16_HALF = 2**-9
_TYPICAL_WEIGHT = 0.02


def plan(
    reasoning: PathLike,
    multimodal: PathLike,
    *,
    config: PathLike | None = None,
    delta: PathLike | None = None,
    rms: float | None = None,
    gpu_memory: int | str | None = None,
    utilisation: float | None = None,
    peak: float = rates.H100_FLOPS,
    **training: Any,
) -> TrainingPlan:
    """Say what Δ and a training run with it will take, and how far the run will move.

    Reads configurations and headers, no weight; a directory with nothing but a config.json is
    enough, where transformers is installed. Every figure says where it comes from.

    Args:
        reasoning, multimodal: as in `compute_delta`, or a directory with a config.json.
        config: a training configuration in YAML or JSON, whose names are `Training`'s, the
            Trainer's or LLaMA-Factory's; `training` takes precedence.
        delta: directory of a delta, whose statistics λ is predicted from; or `rms`, √(mean of Δ's
            squared elements).
        gpu_memory: of one GPU, in bytes or as text such as "80GB".
        utilisation: share of `peak` that the run reaches; default what an H100 was measured at.
        peak: operations a second of one GPU; default an H100's in bfloat16.
        training: fields of `Training`.

    Raises:
        FileNotFoundError, CheckpointError: a model, configuration or delta that is not there or not
            valid.
        DriftError: a config.json from which transformers cannot build the model.
        ValueError: an argument without meaning, or an unknown name.
    """
    given, section, unused = ({}, {}, []) if config is None else read_configuration(Path(config))
    # The section's delta is used where it is there: planning comes before it is made, too.
    named = section.get("delta")
    if delta is None and rms is None and config is not None and isinstance(named, str):
        beside = Path(config).parent / named
        delta = beside if (beside / "drift.json").is_file() else None
    unknown = sorted(training.keys() - set(Training.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"plan has no {', '.join(unknown)}; a run has "
            f"{', '.join(Training.__dataclass_fields__)}"
        )
    if "steps" in training:
        given.pop("samples", None)
    elif "samples" in training:
        given.pop("steps", None)
    run = Training(**(given | training))
    peak_share, why = rates.utilisation() if utilisation is None else (utilisation, "given")
    if not 0 < peak_share <= 1 or not math.isfinite(peak) or peak <= 0:
        raise ValueError(
            f"utilisation must be in (0, 1] and peak positive, got {peak_share}, {peak}"
        )
    gpu_nbytes = None if gpu_memory is None else parse_size(gpu_memory)
    models = read_model(reasoning), read_model(multimodal)
    selection = Selection.parse(run.modules, run.layers)
    size = motion.size_of(None if delta is None else Path(delta), rms, selection)
    names = models[1].selected(selection)
    if not names:
        raise ValueError(f"{multimodal}: nothing of it is selected by {selection}")
    selected = models[1].numel(names)
    memory = estimate(run, models[1], selected, gpu_nbytes)
    of_time = list(
        hours.figures(run, models[1], selected, memory.residency, (peak, peak_share, why))
    )
    of_motion = list(motion.figures(run, size))
    figures = [
        *_parameters(models, names, selection),
        *_delta(models, names, selection, run),
        *_memory(run, memory, gpu_nbytes),
        *of_time,
        *_disk(run, models, names),
        *of_motion,
    ]
    fits = None if gpu_nbytes is None else memory.device_nbytes <= gpu_nbytes
    warnings = [
        *_remarks(run, models, selection, memory),
        *_speed_remarks(run, peak, utilisation),
        *motion.remarks(of_motion),
    ]
    remedies: list[str] = []
    if gpu_nbytes is not None and not fits:
        warnings.append(
            f"{sized(memory.device_nbytes)} are needed on each GPU, which has {sized(gpu_nbytes)}"
        )
        remedies = list(_remedies(run, models[1], selected, gpu_nbytes)) or [
            f"in none of the ways tried, up to {_MOST_GPUS} GPUs; train adapters (LoRA), or choose "
            "a smaller model"
        ]
    return TrainingPlan(figures, warnings, fits, remedies, unused)


def _origin(model: Model) -> Origin:
    return "headers" if model.origin == "headers" else "configuration"


def _parameters(
    models: tuple[Model, Model], names: list[str], selection: Selection
) -> Iterator[Figure]:
    for role, model in zip(("reasoning", "multimodal"), models, strict=True):
        section, origin = f"Parameters, {role}", _origin(model)
        kinds = model.by_kind()
        yield Figure(section, f"{role}: all", sum(kinds.values()), "elements", origin, model.source)
        for kind, numel in kinds.items():
            if numel:
                yield Figure(section, f"{role}: {kind}", numel, "elements", origin, "the same")
    model = models[1]
    yield Figure(
        "Parameters, multimodal",
        "selected for Δ",
        model.numel(names),
        "elements",
        _origin(model),
        f"{selection}, {len(names):,} tensors",
    )


def _delta(
    models: tuple[Model, Model], names: list[str], selection: Selection, run: Training
) -> Iterator[Figure]:
    section = "Δ"
    on_disk = math.ceil(ITEMSIZE[run.dtype][0] * models[1].numel(names))
    origin = _origin(models[1])
    per = f"{ITEMSIZE[run.dtype][0]:.4g} bytes an element"
    yield Figure(section, "Δ on disk", on_disk, "bytes", origin, f"{per}, {run.dtype}")
    left = models[0].nbytes(models[0].selected(selection))
    right = models[1].nbytes(names)
    yield Figure(section, "to read", left + right, "bytes", origin, "what is selected of both")
    for name, rate in (("time, cold", rates.COLD), ("time, in page cache", rates.WARM)):
        seconds = (left + right) / rate.nbytes_per_second
        yield Figure(section, name, seconds, "seconds", "measured", rate.source)
    source = "compute_delta's memory=, whatever the size of the models"
    yield Figure(section, "buffers", parse_size(MEMORY), "bytes", "given", source)


def _memory(run: Training, memory: Memory, gpu_nbytes: int | None) -> Iterator[Figure]:
    section = f"Memory of one of {run.gpus} GPU{'s' if run.gpus > 1 else ''}, {run.sharding}"
    yield Figure(section, "residency of Δ", memory.residency, "", "given", memory.why)
    for part in memory.device:
        origin: Origin = "assumed" if part.assumed else "estimated"
        yield Figure(section, part.name, round(part.nbytes), "bytes", origin, part.formula)
    source = "the sum" if gpu_nbytes is None else f"the sum, of {sized(gpu_nbytes)}"
    yield Figure(section, "GPU memory", memory.device_nbytes, "bytes", "estimated", source)
    section = "Host memory of one process, beside its own"
    for part in memory.host:
        yield Figure(
            section, f"host: {part.name}", round(part.nbytes), "bytes", "estimated", part.formula
        )
    yield Figure(section, "host memory", memory.host_nbytes, "bytes", "estimated", "the sum")


def _disk(run: Training, models: tuple[Model, Model], names: list[str]) -> Iterator[Figure]:
    section = "Disk"
    multimodal = models[1]
    yield Figure(
        section,
        "multimodal checkpoint",
        multimodal.nbytes(),
        "bytes",
        _origin(multimodal),
        "all of it, for training",
    )
    selected = models[0].selected(Selection.parse(run.modules, run.layers))
    yield Figure(
        section,
        "reasoning checkpoint",
        models[0].nbytes(selected),
        "bytes",
        _origin(models[0]),
        f"what is selected, from a Hub id; {sized(models[0].nbytes())} whole",
    )
    total = multimodal.numel()
    trained = total - (multimodal.by_kind()[VISION] if run.trained == "language" else 0)
    itemsize = 4 if run.precision != "bf16" else 2
    state = {"adamw": 2 * itemsize, "adamw8bit": 2, "sgd": 0}[run.optimizer]
    zero = run.sharding.startswith("zero")
    low = 2 if run.precision == "bf16" or (zero and run.precision != "fp32") else 4
    # With the states ZeRO writes its float32 copies, and below stage 3, where each process has all
    # weights, these a second time beside the model's own file.
    times = 2 if run.sharding in ("zero1", "zero2") else 1
    weights = times * low * total + 4 * trained if zero else itemsize * total
    one = weights + state * trained
    formula = f"{times * low}·P + 4·T" if zero else f"{itemsize}·P"
    yield Figure(
        section,
        "one training checkpoint",
        one,
        "bytes",
        "estimated",
        f"{formula} and {state}·T of states",
    )
    kept = run.checkpoints
    told = "and one more while it is written" if run.save_total_limit else "which keeps all"
    yield Figure(
        section,
        "training checkpoints",
        kept * one,
        "bytes",
        "estimated",
        f"{kept:,}: save_total_limit {run.save_total_limit}, {told}",
    )
    yield Figure(section, "trained model", low * total, "bytes", "estimated", f"{low}·P")
    on_disk = math.ceil(ITEMSIZE[run.dtype][0] * multimodal.numel(names))
    whole = multimodal.nbytes() + models[0].nbytes(selected) + on_disk + kept * one + low * total
    yield Figure(section, "disk", whole, "bytes", "estimated", "the sum, with Δ")


def _remarks(
    run: Training, models: tuple[Model, Model], selection: Selection, memory: Memory
) -> Iterator[str]:
    left, right = (model.numel(model.selected(selection)) for model in models)
    if left != right:
        yield (
            f"{selection} selects {left:,} elements of the reasoning and {right:,} of the "
            "multimodal model; `drift-fast check` says whether they fit each other"
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
    if not run.gradient_checkpointing and not any(p.name == "activations" for p in memory.device):
        yield "config.json does not state the sizes that activations follow from: they are left out"


def _speed_remarks(run: Training, peak: float, utilisation: float | None) -> Iterator[str]:
    if run.precision == "fp32" and (peak == rates.H100_FLOPS or utilisation is None):
        yield (
            "hours are reckoned at a peak and a utilisation in bfloat16, and fp32 takes several "
            "times as long: give peak (--peak-tflops) and utilisation of float32"
        )


def _remedies(run: Training, model: Model, selected: int, gpu_nbytes: int) -> Iterator[str]:
    """Yield changes that make the run fit: one alone, or one with gradient checkpointing."""

    def told(label: str, **changes: Any) -> str | None:
        if all(getattr(run, name) == value for name, value in changes.items()):
            return None
        try:
            changed = run.changed(**changes)
        except ValueError:
            return None
        nbytes = estimate(changed, model, selected, gpu_nbytes).device_nbytes
        return None if nbytes > gpu_nbytes else f"{label}: {sized(nbytes)} on each GPU"

    saving = told("with gradient checkpointing", gradient_checkpointing=True)
    if saving is not None:
        yield saving
    for label, changes in _REMEDIES:
        fits = told(label, **changes)
        if fits is None and saving is None:
            both = {**changes, "gradient_checkpointing": True}
            fits = told(f"{label} and gradient checkpointing", **both)
        if fits is not None:
            yield fits
    shorter = _tokens_that_fit(run, model, selected, gpu_nbytes)
    if shorter is not None:
        yield f"with samples of at most {shorter:,} tokens (max_tokens)"
    sharding, gpus = run.sharding if run.sharded else "zero2", 2 * run.gpus
    while gpus <= _MOST_GPUS:
        label = f"on {gpus} GPUs under {sharding}"
        more: dict[str, Any] = {"sharding": sharding, "gpus": gpus}
        fits = told(label, **more) or told(
            f"{label} and gradient checkpointing", **more, gradient_checkpointing=True
        )
        if fits is not None:
            yield fits
            return
        gpus *= 2


def _tokens_that_fit(run: Training, model: Model, selected: int, gpu_nbytes: int) -> int | None:
    """Return the longest sample that fits, in steps of 256 tokens; None if even that does not."""

    def nbytes(tokens: int) -> int:
        changed = run.changed(tokens=tokens, max_tokens=None, image_tokens=0)
        return estimate(changed, model, selected, gpu_nbytes).device_nbytes

    most = (run.max_tokens or run.tokens) // 256
    fitting = [
        steps for steps in range(1, min(most, 4096) + 1) if nbytes(256 * steps) <= gpu_nbytes
    ]
    return 256 * fitting[-1] if fitting else None
