"""How long a run takes at least: operations at a measured utilisation, and a measured injection.

Owns the formulas: 6·N·tokens for forward and backward, 8·N·tokens where activations are computed
anew, and 2 for each parameter of a frozen tower and each patch. Not counted: communication, the
optimizer's step, loading and saving, attention's own products, which grow with the square of the
length.
"""

from __future__ import annotations

from collections.abc import Iterator

from drift_fast.errors import CheckpointError
from drift_fast.planner import rates
from drift_fast.planner.counts import VISION, Model
from drift_fast.planner.report import Figure, Origin, sized
from drift_fast.planner.training import Training

# Patches along one side of a token; models have 2, and a config.json is not trusted.
_MOST_MERGED = 64


def figures(
    run: Training,
    model: Model,
    selected: int,
    residency: str,
    speed: tuple[float, float, str],
) -> Iterator[Figure]:
    """Yield steps, operations, seconds of a step and of the run.

    speed: of one GPU, operations a second at most, the share of it that is reached, and where that
        share comes from.
    """
    section = "Time"
    peak, share, why = speed
    steps = run.optimizer_steps
    told = "given" if run.steps is not None else (
        f"{run.samples:,} samples × {run.epochs:g} epochs in batches of "
        f"{run.batch * run.accumulation * run.gpus}"
    )  # fmt: skip
    yield Figure(section, "optimizer steps", steps, "steps", "given", told)
    factor = 8 if run.gradient_checkpointing else 6
    active, vision = model.active_numel(), model.by_kind()[VISION]
    merged = _patches_per_token(model)
    samples = run.batch * run.accumulation
    towers = 2 if run.trained == "language" else factor
    done = factor * active * run.step_tokens + towers * vision * merged * run.image_tokens * samples
    formula = f"{factor}·N·tokens, N {active / 1e9:.2f} billion"
    if run.image_tokens:
        formula += f", and {towers}·(vision tower)·patches"
    yield Figure(section, "operations of a step", done, "operations", "estimated", formula)
    measured: Origin = "measured" if why != "given" else "given"
    yield Figure(section, "utilisation", share, "share", measured, why)
    compute = done / (peak * share)
    note = "operations/(peak·utilisation); no communication, optimizer, data, attention scores"
    yield Figure(section, "compute of a step", compute, "seconds", "estimated", note)
    added, origin, source = _injection(run, residency, selected)
    yield Figure(section, "injection of a step", added, "seconds", origin, source)
    if added is not None:
        source = "injection/compute of a step"
        yield Figure(section, "injection's share", added / compute, "share", "estimated", source)
    if run.gpus > 1:
        moved, formula = _communication(run, model)
        source = f"{formula}; not in the hours"
        yield Figure(section, "moved between GPUs in a step", moved, "bytes", "estimated", source)
    total = steps * (compute + (added or 0.0))
    source = "steps·(compute + injection): a lower bound"
    yield Figure(section, "training", total, "seconds", "estimated", source)


def _communication(run: Training, model: Model) -> tuple[int, str]:
    """Return what a process sends in an optimizer step, by ring algorithms without the (n−1)/n."""
    total = model.numel()
    trained = total - (model.by_kind()[VISION] if run.trained == "language" else 0)
    wide = 4 if run.precision == "fp32" else 2
    if run.sharding == "ddp":
        itemsize = 2 if run.precision == "bf16" else 4
        return 2 * itemsize * trained, f"2·{itemsize}·T, gradients reduced"
    if run.sharding == "zero1":
        return 2 * wide * trained, f"{wide}·T reduced and {wide}·T gathered"
    if run.sharding == "zero2":
        # Gradients that are not kept whole cannot wait for the last micro-batch.
        moved = (run.accumulation + 1) * wide * trained
        return moved, f"micro-batches·{wide}·T reduced, and {wide}·T gathered"
    # Weights are gathered for each forward and each backward pass.
    reduced = 4 if run.sharding == "fsdp2" and run.precision != "bf16" else wide
    of_pass = 2 * wide * total + reduced * trained
    return run.accumulation * of_pass, f"micro-batches·(2·{wide}·P gathered + {reduced}·T reduced)"


def _injection(run: Training, residency: str, selected: int) -> tuple[float | None, Origin, str]:
    share = selected / (run.gpus if run.sharded else 1)
    told = "Δ of one process" if run.sharded else "Δ"
    kinds = {run.modules} if isinstance(run.modules, str) else set(run.modules)
    row = rates.injecting(residency, attention_only=kinds == {"attn"})
    if row is not None:
        scaled = f"{row.seconds * 1e3:.1f} ms for {row.numel / 1e9:.2f} billion elements"
        source = f"{scaled}, scaled to {told}; {row.source}"
        return row.seconds_per_numel * share, "measured", source
    nbytes = 2 * share
    source = f"not measured on a GPU; {sized(nbytes)} read at the rate of {rates.READ.source}"
    return nbytes / rates.READ.nbytes_per_second, "estimated", source


def _patches_per_token(model: Model) -> int:
    """Return how many patches of an image become one token of it."""
    outer = model.configuration.around[-1]
    vision = outer.section("vision_config")
    merge = None if vision is None else vision.size("spatial_merge_size")
    if not isinstance(merge, int):
        return 1
    if not 1 <= merge <= _MOST_MERGED:
        raise CheckpointError(
            f"{model.given}: vision_config.spatial_merge_size must be from 1 to {_MOST_MERGED}, "
            f"found {merge}; correct the entry or download config.json again"
        )
    return merge**2
