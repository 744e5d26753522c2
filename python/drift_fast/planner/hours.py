"""How long a run takes at least: operations at a measured utilization, and a measured injection.

Owns the formulas: 6·N·tokens for forward and backward, 8·N·tokens if activations are computed
again, and 2 for each parameter of a frozen tower and each patch; what clipping and the optimizer
move at the rate at which an injection moves memory. Not counted: communication, loading and saving,
an optimizer on the host, and attention scores, which grow with the length squared.
"""

from __future__ import annotations

from collections.abc import Iterator

from drift_fast.errors import CheckpointError
from drift_fast.planner import rates
from drift_fast.planner.counts import VISION, Model
from drift_fast.planner.memory import Sizes
from drift_fast.planner.report import Figure, Origin, sized
from drift_fast.planner.scenario import Scenario
from drift_fast.planner.training import Training

# Patches along one side of a token; models have 2, but a config.json is untrusted.
_MOST_MERGED = 64
# Below so many parameters, launching kernels takes longer than what they compute.
_LARGE = 10**9


def figures(planned: Scenario, residency: str) -> Iterator[Figure]:
    """Yield steps and operations, and the seconds of a step and of the run."""
    section, run, speed = "Time", planned.run, planned.run.speed
    steps = run.optimizer_steps
    source = "given" if run.steps is not None else (
        f"{run.samples:,} samples × {run.epochs:g} epochs in batches of "
        f"{run.batch * run.accumulation * run.gpus}"
    )  # fmt: skip
    yield Figure(section, "optimizer steps", steps, "steps", "given", source)
    origin: Origin = "assumed" if run.tokens == Training.tokens else "given"
    source = "the mean of a run's samples, by which its hours grow: --tokens"
    yield Figure(section, "tokens of a sample", run.tokens, "tokens", origin, source)
    done, formula = _operations(planned)
    yield Figure(section, "operations of a step", done, "operations", "estimated", formula)
    origin = "measured" if speed.source != "given" else "given"
    yield Figure(section, "utilization", speed.share, "share", origin, speed.source)
    compute = done / (speed.peak * speed.share)
    source = "operations/(peak·utilization); no communication, data, attention scores"
    yield Figure(section, "compute of a step", compute, "seconds", "estimated", source)
    stepping, source = _optimizer(planned)
    yield Figure(section, "optimizer of a step", stepping, "seconds", "estimated", source)
    added, origin, source = _injection(planned, residency)
    yield Figure(section, "injection of a step", added, "seconds", origin, source)
    plain = compute + stepping
    source = "injection/(compute + optimizer) of a step"
    yield Figure(section, "injection's share", added / plain, "share", "estimated", source)
    if run.gpus > 1:
        moved, formula = _communication(planned)
        source = f"{formula}; not in the hours"
        yield Figure(section, "moved between GPUs in a step", moved, "bytes", "estimated", source)
    total = steps * (plain + added)
    source = "steps·(compute + optimizer + injection): a lower bound"
    if planned.multimodal.active_numel() < _LARGE:
        source += ", and far too low here: below a billion parameters a GPU waits for launches"
    elif run.lora_rank:
        source += "; with adapters a host may launch more slowly than a GPU computes"
    yield Figure(section, "training", total, "seconds", "estimated", source)


def _operations(planned: Scenario) -> tuple[int, str]:
    """Return a process's operations in an optimizer step, with the formula."""
    run, model = planned.run, planned.multimodal
    factor = 8 if run.gradient_checkpointing else 6
    if run.lora_rank:
        return _operations_of_lora(planned, factor)
    towers = 2 if run.trained == "language" else factor
    active, vision = model.active_numel(), model.by_kind()[VISION]
    patches = _patches_per_token(model) * run.image_tokens * run.batch * run.accumulation
    formula = f"{factor}·N·tokens, N {active / 1e9:.2f} billion"
    if run.image_tokens:
        formula += f", and {towers}·(vision tower)·patches"
    return factor * active * run.step_tokens + towers * vision * patches, formula


def _operations_of_lora(planned: Scenario, factor: int) -> tuple[int, str]:
    """Return the same where frozen weights take no gradients: 2 operations fewer of each."""
    run, active = planned.run, planned.multimodal.active_numel()
    trained = planned.multimodal.factors_numel(run.lora_rank, active=True)
    vision = planned.multimodal.by_kind()[VISION]
    patches = _patches_per_token(planned.multimodal) * run.image_tokens
    formula = f"({factor - 2}·N + {factor}·T)·tokens, N {active / 1e9:.2f} billion, T as N in use"
    if run.image_tokens:
        formula += ", and 2·(vision tower)·patches"
    done = ((factor - 2) * active + factor * trained) * run.step_tokens
    return done + 2 * vision * patches * run.batch * run.accumulation, formula


def _communication(planned: Scenario) -> tuple[int, str]:
    """Return the bytes a process sends in an optimizer step, by ring algorithms without (n−1)/n."""
    moved, formula = _of_training(planned)
    if planned.run.lora_rank and planned.run.sharded:
        # Whole factors, and Δ pulled back to them, are added up in float32.
        return moved + 16 * planned.trained_numel, f"{formula}, and 16·T by the injection"
    return moved, formula


def _of_training(planned: Scenario) -> tuple[int, str]:
    run, total, trained = planned.run, planned.multimodal.numel(), planned.trained_numel
    wide = 4 if run.precision == "fp32" else 2
    if run.sharding == "ddp":
        itemsize = 2 if run.precision == "bf16" else 4
        return 2 * itemsize * trained, f"2·{itemsize}·T, gradients reduced"
    if run.sharding == "zero1":
        return 2 * wide * trained, f"{wide}·T reduced and {wide}·T gathered"
    if run.sharding == "zero2":
        # Gradients that no process keeps whole cannot wait for the last micro-batch.
        moved = (run.accumulation + 1) * wide * trained
        return moved, f"micro-batches·{wide}·T reduced, and {wide}·T gathered"
    # Weights are gathered for each forward and each backward pass.
    reduced = 4 if run.sharding == "fsdp2" and run.precision != "bf16" else wide
    of_pass = 2 * wide * total + reduced * trained
    return run.accumulation * of_pass, f"micro-batches·(2·{wide}·P gathered + {reduced}·T reduced)"


def _optimizer(planned: Scenario) -> tuple[float, str]:
    """Return the seconds of clipping and the optimizer's step of one process."""
    run = planned.run
    if run.offload != "none":
        return 0.0, "on the host with offload, not counted"
    sizes = Sizes.of(run, planned.multimodal)
    nbytes = sizes.step_nbytes / (1 if run.sharding in ("none", "ddp") else run.gpus)
    source = f"{sized(nbytes)} at the rate of an injection, 6 passes over Δ: {rates.BOTH.source}"
    return nbytes / rates.BOTH.nbytes_per_second, source


def _injection(planned: Scenario, residency: str) -> tuple[float, Origin, str]:
    run = planned.run
    share = planned.delta_numel / (run.gpus if run.sharded else 1)
    what = "Δ of one process" if run.sharded else "Δ"
    kinds = {run.modules} if isinstance(run.modules, str) else set(run.modules)
    row = rates.injecting(residency, attention_only=kinds == {"attn"})
    if run.lora_rank and residency == "device":
        row = rates.LORA
    if row is not None:
        scaled = f"{row.seconds * 1e3:.1f} ms for {row.numel / 1e9:.2f} billion elements"
        source = f"{scaled}, scaled to {what}; {row.source}"
        of_lora = run.lora_rank > 0 and row is not rates.LORA
        source += ", of whole weights" if of_lora else ", at rank 64" if run.lora_rank else ""
        return row.seconds_per_numel * share, "estimated" if of_lora else "measured", source
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
