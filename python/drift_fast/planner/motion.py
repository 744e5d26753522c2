"""How far a run is expected to move along Δ, from the sum of learning rates and rms(Δ).

Owns what is read from a delta, and the figures without one; `inject.predict` has the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from drift_fast.inject.predict import USEFUL, predict_progress, rms
from drift_fast.inject.schedule import parse_schedule
from drift_fast.planner.report import Figure, Origin
from drift_fast.planner.training import Training
from drift_fast.selection import Selection

SECTION = "Motion along Δ (λ is 1 when weights have moved by all of Δ)"
_FORMULA = "c(α)·Σlr/rms(Δ), c measured in a miniature of 0.8M parameters with AdamW and `adaptive`"

_MOST_SCHEDULED = 1_000_000


@dataclass(frozen=True)
class Size:
    """rms of Δ's elements: of all selected ones, and by module."""

    total: float
    by_kind: Mapping[str, float]
    source: str


def size_of(delta: str | Path | None, given: float | None, selection: Selection) -> Size | None:
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
        return Size(given, {}, "given")
    if delta is None:
        return None
    from drift_fast.delta.delta import Delta

    rows = [row for row in Delta.open(delta).stats if row.name in selection]
    if not rows:
        raise ValueError(f"{delta}: the delta has nothing of {selection}")
    kinds = dict.fromkeys(row.kind for row in rows)
    grouped = {kind: [row for row in rows if row.kind == kind] for kind in kinds}
    found = {
        kind: rms(math.sqrt(sum(row.delta_sq for row in some)), sum(row.numel for row in some))
        for kind, some in {"": rows, **grouped}.items()
    }
    total = found.pop("")
    return Size(total, found if len(found) > 1 else {}, f"statistics of {delta}")


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
    if training.schedule is not None and not why:
        factor = parse_schedule(training.schedule)
        steps = training.optimizer_steps
        total = math.fsum(rate * factor(at, steps) for at, rate in enumerate(training.rates()))
        source = f"of each step: {training.schedule}"
        yield Figure(SECTION, "Σ learning rates × schedule", total, "", "estimated", source)
        if total < 0:
            why = "the sum of the schedule is negative: it pushes away from Δ"
    if why:
        yield Figure(SECTION, "λ", None, "", "unknown", why)
        return
    if size is not None:
        yield Figure(SECTION, "rms(Δ)", size.total, "", _origin(size), size.source)
        value = _progress(training, total, size.total)
        capped = "" if training.progress_cap is None else f"; at most {training.progress_cap:g}"
        capped += ", the progress_cap" if capped else ""
        yield Figure(SECTION, "λ", value, "", "estimated", _FORMULA + capped)
        for kind, of_kind in size.by_kind.items():
            value = _progress(training, total, of_kind)
            source = f"the same, rms(Δ) {of_kind:.3g}"
            yield Figure(SECTION, f"λ of {kind}", value, "", "estimated", source)
        return
    source = "neither a delta nor rms(Δ) was given: `drift-fast delta`, then --delta DIR"
    yield Figure(SECTION, "λ", None, "", "unknown", source)
    if total > 0 and training.alpha:
        at_one = abs(predict_progress(training.alpha, total, 1.0))
        for limit, bound in zip(("at least", "at most"), USEFUL, strict=True):
            yield Figure(
                SECTION,
                f"rms(Δ) for λ of {limit} {bound:g}",
                at_one / bound,
                "",
                "estimated",
                _FORMULA,
            )


def remarks(found: list[Figure]) -> Iterator[str]:
    """Yield a warning if the run would hardly move, or would overshoot."""
    low, high = USEFUL
    value = next((figure.value for figure in found if figure.name == "λ"), None)
    if not isinstance(value, int | float):
        return
    if value < low:
        yield (
            f"λ is expected to end at {value:.2g}, less than {low:g}: the run will hardly differ "
            f"from one without injection. {low / value:.3g} times Σlr would reach {low:g}: train "
            "longer or at a higher learning rate, or move the weights with attach_motion"
            if value > 0
            else f"λ is expected to end at {value:.2g}: the run does not move along Δ"
        )
    elif value > high:
        yield (
            f"λ is expected to end at {value:.2g}, more than {high:g}: weights overshoot the "
            "reasoning model. Lower alpha, or stop with progress_cap=… or a schedule such as "
            "window(0, 0.3)"
        )


def _unpredictable(training: Training) -> str:
    if training.optimizer == "sgd":
        return "c was measured for AdamW; SGD moves in proportion to the gradient"
    if training.scale != "adaptive":
        return f"c was measured for the scale `adaptive`, not for {training.scale!r}"
    if training.progress_target is not None:
        return f"α follows progress_target ({training.progress_target}), as far as it can"
    if isinstance(training.progress_cap, Mapping):
        return f"progress_cap differs by module: {dict(training.progress_cap)}"
    if training.schedule is not None and training.optimizer_steps > _MOST_SCHEDULED:
        return f"a schedule is followed for at most {_MOST_SCHEDULED:,} steps"
    return ""


def _progress(training: Training, total: float, of: float) -> float:
    found = predict_progress(training.alpha, total, of)
    cap = training.progress_cap
    return found if cap is None or isinstance(cap, Mapping) else min(found, cap)


def _origin(size: Size) -> Origin:
    return "given" if size.source == "given" else "measured"
