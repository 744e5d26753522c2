"""How far a run is expected to move along Δ, from the sum of learning rates and rms(Δ).

Owns what is read from a delta, and the figures without one; `inject.predict` has the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from drift_fast.checkpoints.opened import PathLike
from drift_fast.inject.predict import BETAS, USEFUL, Outlook, joint_rms, push_of, rms, way_to
from drift_fast.inject.schedule import parse_schedule
from drift_fast.inject.strength.formula import MOST
from drift_fast.planner.report import Figure, Origin
from drift_fast.planner.training import Training
from drift_fast.selection import Selection

SECTION = "Motion along Δ (λ is 1 when weights have moved by all of Δ)"
_FORMULA = "c(α)·Σlr/rms(Δ) for AdamW, c measured on models of 0.8M and 135M parameters"
_REACHABLE = "λ at any α, below"
_STEERED = "λ of a target, at most"

_MOST_SCHEDULED = 1_000_000


@dataclass(frozen=True)
class Size:
    """rms of Δ's elements: `total` of all selected ones, `joint` as `predict.joint_rms` has it.

    `by_kind` has both of each kind of module.
    """

    total: float
    joint: float
    by_kind: Mapping[str, tuple[float, float]]
    source: str


def size_of(delta: PathLike | None, given: float | None, selection: Selection) -> Size | None:
    """Return rms(Δ), given or from a delta's statistics.

    Raises:
        ValueError: both are given, rms is not positive, or the delta has nothing of the selection.
        As `Delta.open`.
    """
    if delta is not None and given is not None:
        raise ValueError("give delta or rms, not both: rms follows from a delta's statistics")
    if given is not None:
        if not math.isfinite(given) or given <= 0:
            raise ValueError(f"rms must be finite and positive, got {given!r}")
        return Size(given, given, {}, "given")
    if delta is None:
        return None
    from drift_fast.delta.delta import Delta

    rows = [row for row in Delta.open(delta).stats if row.name in selection]
    if not rows:
        raise ValueError(f"{delta}: the delta has nothing of {selection}")
    kinds = dict.fromkeys(row.kind for row in rows)
    grouped = {kind: [row for row in rows if row.kind == kind] for kind in kinds}
    found = {
        kind: (
            rms(math.sqrt(sum(row.delta_sq for row in some)), sum(row.numel for row in some)),
            joint_rms((row.delta_sq, row.numel) for row in some if row.delta_sq > 0),
        )
        for kind, some in {"": rows, **grouped}.items()
    }
    total = found.pop("")
    return Size(*total, found if len(found) > 1 else {}, f"statistics of {delta}")


def figures(training: Training, size: Size | None) -> Iterator[Figure]:
    """Yield Σlr, and λ or what it depends on."""
    total = training.sum_of_rates()
    yield Figure(
        SECTION,
        "Σ learning rates",
        total,
        "",
        "estimated",
        f"{training.scheduler} from {training.learning_rate:g} over "
        f"{training.optimizer_steps:,} steps, warm-up {training.warmup:g}",
    )
    why = _unpredictable(training)
    # Without a schedule the run moves as in one step of all learning rates.
    rates, factors = [total], [1.0]
    if training.schedule is not None and not why:
        factor = parse_schedule(training.schedule)
        steps = training.optimizer_steps
        rates, factors = training.rates(), [factor(at, steps) for at in range(steps)]
        total = math.fsum(rate * by for rate, by in zip(rates, factors, strict=True))
        source = f"of each step: {training.schedule}"
        yield Figure(SECTION, "Σ learning rates × schedule", total, "", "estimated", source)
        if total < 0:
            why = "the sum of the schedule is negative: it pushes away from Δ"
    if why:
        yield Figure(SECTION, "λ", None, "", "unknown", why)
        return
    push = push_of(training.alpha, training.scale)
    outlook = Outlook.of(push, rates, factors, 1.0 if size is None else size.joint, BETAS)
    if size is not None:
        yield from _of_size(training, outlook, size)
        return
    source = "neither a delta nor rms(Δ) was given: `drift-fast delta`, then --delta DIR"
    yield Figure(SECTION, "λ", None, "", "unknown", source)
    if outlook.expected:
        for limit, bound in zip(("at least", "at most"), USEFUL, strict=True):
            yield Figure(
                SECTION,
                f"rms(Δ) for λ of {limit} {bound:g}",
                abs(outlook.expected) / bound,
                "",
                "estimated",
                _FORMULA,
            )


def _of_size(training: Training, outlook: Outlook, size: Size) -> Iterator[Figure]:
    """Yield λ, overall and by module, and what it could come to."""
    yield Figure(SECTION, "rms(Δ)", size.total, "", _origin(size), size.source)
    plain, cap, target = outlook.expected, training.progress_cap, training.progress_target
    assert plain is not None
    assert outlook.steered is not None
    expected, source = plain, _FORMULA
    if isinstance(target, int | float):
        expected = min(outlook.steered, target)
        source = f"progress_target, or as far as {MOST:g}·α comes by {_FORMULA}"
    if isinstance(cap, int | float):
        source += f"; at most {cap:g}, the progress_cap"
        expected = min(expected, cap)
    yield Figure(SECTION, "λ", expected, "", "estimated", source)
    for kind, (of_kind, joint) in size.by_kind.items() if target is None else ():
        value = plain * size.joint / joint
        value = min(value, cap) if isinstance(cap, int | float) else value
        source = f"the same, rms(Δ) {of_kind:.3g}"
        yield Figure(SECTION, f"λ of {kind}", value, "", "estimated", source)
    if target is not None:
        source = f"the same with {MOST:g}·α, which is as far as a target raises it"
        yield Figure(SECTION, _STEERED, outlook.steered, "", "estimated", source)
    source = "the same with c at its limit, 0.8: from there on only Σ learning rates helps"
    yield Figure(SECTION, _REACHABLE, outlook.reachable, "", "estimated", source)


def remarks(training: Training, found: list[Figure]) -> Iterator[str]:
    """Yield a warning if the run would hardly move, would overshoot, or would miss its target."""
    low, high = USEFUL
    pace = training.learning_rate, training.optimizer_steps
    values = {figure.name: figure.value for figure in found}
    value, most, steered = (values.get(name) for name in ("λ", _REACHABLE, _STEERED))
    if not isinstance(value, int | float) or not isinstance(most, int | float):
        return
    if isinstance(steered, int | float) and isinstance(training.progress_target, int | float):
        missed = Outlook([], None, steered, most).misses(training.progress_target, pace)
        if missed:
            yield missed
            return
    if value < low:
        yield (
            f"λ is expected to end at {value:.2g}, less than {low:g}: the run will hardly differ "
            f"from one without injection. {low / value:.3g} times Σlr would reach {low:g}, "
            f"{way_to(low / value, pace)}; a larger alpha reaches {most:.2g} at most. "
            "Or move the weights by a share of Δ that you choose, with attach_motion"
            if value > 0
            else f"λ is expected to end at {value:.2g}: the run does not move towards the "
            "reasoning model, but away from it where alpha is negative"
        )
    elif value > high:
        yield (
            f"λ is expected to end at {value:.2g}, more than {high:g}: weights overshoot the "
            "reasoning model. Lower alpha or the learning rate, or stop with progress_cap=… or a "
            "schedule such as window(0, 0.3)"
        )


def _unpredictable(training: Training) -> str:
    if training.lora_rank:
        return (
            "c was measured for whole weights; a run with adapters logs λ from its first steps on"
        )
    if training.optimizer == "sgd":
        return "c was measured for AdamW; SGD moves in proportion to the gradient"
    if training.scale == "absolute":
        return (
            "`absolute` pushes by α·Δ whatever the gradient is: predict_progress tells λ for a "
            "gradient_rms that was seen"
        )
    if training.scale == "project":
        return "`project` pushes where the task pulls away from Δ, and how often is not known"
    for name in ("progress_target", "progress_cap"):
        given = getattr(training, name)
        if isinstance(given, Mapping):
            return f"{name} differs by module: {dict(given)}"
    if training.schedule is not None and training.optimizer_steps > _MOST_SCHEDULED:
        return f"a schedule is followed for at most {_MOST_SCHEDULED:,} steps"
    return ""


def _origin(size: Size) -> Origin:
    return "given" if size.source == "given" else "measured"
