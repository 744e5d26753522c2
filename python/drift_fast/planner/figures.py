"""The sizes in a plan: parameters, Δ, memory and disk."""

from __future__ import annotations

import math
from collections.abc import Iterator

from drift_fast.planner import rates
from drift_fast.planner.counts import Model
from drift_fast.planner.memory import Memory
from drift_fast.planner.report import Figure, Origin, sized
from drift_fast.planner.scenario import Scenario
from drift_fast.preflight.cost import ITEMSIZE
from drift_fast.sizes import MEMORY, parse_size


def parameters(planned: Scenario) -> Iterator[Figure]:
    """Yield the elements of both models by kind, and those that Δ covers."""
    for role, model in (("reasoning", planned.reasoning), ("multimodal", planned.multimodal)):
        section, origin = f"Parameters, {role}", _origin(model)
        kinds = model.by_kind()
        yield Figure(section, f"{role}: all", sum(kinds.values()), "elements", origin, model.source)
        for kind, numel in kinds.items():
            if numel:
                yield Figure(section, f"{role}: {kind}", numel, "elements", origin, "the same")
    yield Figure(
        "Parameters, multimodal",
        "selected for Δ",
        planned.delta_numel,
        "elements",
        _origin(planned.multimodal),
        f"{planned.selection}, {len(planned.names):,} tensors",
    )


def delta(planned: Scenario) -> Iterator[Figure]:
    """Yield what computing Δ reads and writes, and how long it takes."""
    section, dtype = "Δ", planned.run.dtype
    origin = _origin(planned.multimodal)
    source = f"{ITEMSIZE[dtype][0]:.4g} bytes an element, {dtype}"
    yield Figure(section, "Δ on disk", _delta_nbytes(planned), "bytes", origin, source)
    nbytes = _reasoning_nbytes(planned) + planned.multimodal.nbytes(planned.names)
    yield Figure(section, "to read", nbytes, "bytes", origin, "what is selected in both models")
    for name, rate in (("time, cold", rates.COLD), ("time, in page cache", rates.WARM)):
        seconds = nbytes / rate.nbytes_per_second
        yield Figure(section, name, seconds, "seconds", "measured", rate.source)
    source = "compute_delta's memory=, whatever the size of the models"
    yield Figure(section, "buffers", parse_size(MEMORY), "bytes", "given", source)


def memory(planned: Scenario, found: Memory) -> Iterator[Figure]:
    """Yield the memory of one process, item by item."""
    run, gpu_nbytes = planned.run, planned.run.gpu_nbytes
    section = f"Memory of one of {run.gpus} GPU{'s' if run.gpus > 1 else ''}, {run.sharding}"
    yield Figure(section, "residency of Δ", found.residency, "", "given", found.why)
    for item in found.device:
        origin: Origin = "assumed" if item.assumed else "estimated"
        yield Figure(section, item.name, round(item.nbytes), "bytes", origin, item.formula)
    source = "the sum" if gpu_nbytes is None else f"the sum, of {sized(gpu_nbytes)}"
    yield Figure(section, "GPU memory", found.device_nbytes, "bytes", "estimated", source)
    section = "Host memory of one process, beside its own"
    for item in found.host:
        name, nbytes = f"host: {item.name}", round(item.nbytes)
        yield Figure(section, name, nbytes, "bytes", "estimated", item.formula)
    yield Figure(section, "host memory", found.host_nbytes, "bytes", "estimated", "the sum")


def disk(planned: Scenario) -> Iterator[Figure]:
    """Yield what both checkpoints, Δ and the output of training take on disk."""
    section, run = "Disk", planned.run
    multimodal, reasoning = planned.multimodal.nbytes(), _reasoning_nbytes(planned)
    source = "all of it, for training"
    origin = _origin(planned.multimodal)
    yield Figure(section, "multimodal checkpoint", multimodal, "bytes", origin, source)
    source = f"what is selected, from a Hub id; {sized(planned.reasoning.nbytes())} whole"
    origin = _origin(planned.reasoning)
    yield Figure(section, "reasoning checkpoint", reasoning, "bytes", origin, source)
    one, formula = _training_checkpoint(planned)
    yield Figure(section, "one training checkpoint", one, "bytes", "estimated", formula)
    kept = run.checkpoints
    more = "and one more while it is written" if run.save_total_limit else "which keeps all"
    source = f"{kept:,}: save_total_limit {run.save_total_limit}, {more}"
    yield Figure(section, "training checkpoints", kept * one, "bytes", "estimated", source)
    low = _stored_itemsize(planned)
    trained, formula = low * planned.multimodal.numel(), f"{low}·P"
    if run.lora_rank:
        trained, formula = low * planned.trained_numel, f"{low}·T, adapters alone"
    yield Figure(section, "trained model", trained, "bytes", "estimated", formula)
    whole = multimodal + reasoning + _delta_nbytes(planned) + kept * one + trained
    yield Figure(section, "disk", whole, "bytes", "estimated", "the sum, with Δ")


def _training_checkpoint(planned: Scenario) -> tuple[int, str]:
    """Return the bytes of one training checkpoint, with the formula."""
    run, total, trained = planned.run, planned.multimodal.numel(), planned.trained_numel
    itemsize = 4 if run.precision != "bf16" else 2
    if run.lora_rank:
        # Frozen weights are left out.
        total = trained
    state = {"adamw": 2 * itemsize, "adamw8bit": 2, "sgd": 0}[run.optimizer]
    if not run.sharding.startswith("zero"):
        nbytes, whole = itemsize * total + state * trained, "T" if run.lora_rank else "P"
        return nbytes, f"{itemsize}·{whole} and {state}·T of states"
    # ZeRO writes its float32 copies with the states. Below stage 3 each process has all weights,
    # which are written a second time in the model's own file.
    low = _stored_itemsize(planned) * (1 if run.sharding == "zero3" else 2)
    nbytes, whole = low * total + 4 * trained + state * trained, "T" if run.lora_rank else "P"
    return nbytes, f"{low}·{whole} + 4·T and {state}·T of states"


def _stored_itemsize(planned: Scenario) -> int:
    """Return the bytes of an element in the trained model's file."""
    run = planned.run
    zero = run.sharding.startswith("zero")
    return 2 if run.precision == "bf16" or (zero and run.precision != "fp32") else 4


def _delta_nbytes(planned: Scenario) -> int:
    return math.ceil(ITEMSIZE[planned.run.dtype][0] * planned.delta_numel)


def _reasoning_nbytes(planned: Scenario) -> int:
    """Return the bytes of the selected tensors of the reasoning model."""
    return planned.reasoning.nbytes(planned.reasoning.selected(planned.selection))


def _origin(model: Model) -> Origin:
    return "headers" if model.origin == "headers" else "configuration"
