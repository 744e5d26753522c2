"""Which progress λ a run will end at: predicted before it starts, and from its first steps.

λ = ⟨θ_t − θ_0, Δ⟩/‖Δ‖² is 0 at the start and 1 where the weights have moved by all of Δ. Everything
here is a Python float; nothing is injected or changed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from itertools import pairwise

from drift_fast.errors import DriftWarning

# λ ≈ c(α)·Σlr/rms(Δ) with AdamW and the adaptive scale, measured in examples/miniature (0.8M
# parameters, 200 steps, clipping at 1): medians at learning rates below 1e-4, the first and the
# last at 6.5e-4 and 1.1e-3. Every run at a rate below 1e-3 was within 16 % of this, whatever the
# pair; at 1.7e-3 some ended a third lower. Larger models were not measured.
_MEASURED = (
    (0.0, 0.0),
    (0.05, 0.054),
    (0.12, 0.127),
    (0.25, 0.225),
    (0.37, 0.284),
    (0.54, 0.37),
    (0.78, 0.47),
    (1.14, 0.534),
    (1.66, 0.59),
    (3.2, 0.66),
)

# In the miniature, fine-tuning alone ended at λ below 0.01. Answers improved up to λ = 0.8 to 1.3
# and got worse beyond it; perception got worse all the way, faster from 1 on.
USEFUL = (0.05, 1.0)

# Share of a run's drive after which its beginning shows where it will end.
ENOUGH = 0.2


def rms(norm: float, numel: int) -> float:
    """Return the root mean square of Δ's elements from ‖Δ‖ and their number.

    For several tensors, give √(Σ‖Δ‖²) and the sum of their numbers of elements.
    """
    if numel < 1 or not math.isfinite(norm) or norm < 0:
        raise ValueError(f"expected a finite ‖Δ‖ of at least one element, got {norm!r} of {numel}")
    return norm / math.sqrt(numel)


def predict_progress(alpha: float, learning_rates: float | Iterable[float], rms: float) -> float:
    """Return the λ that a run is expected to end at: c(α)·Σlr/rms(Δ).

    This extrapolates from a miniature, for AdamW and the adaptive scale. The order of magnitude is
    right, which distinguishes a run that will not move from one that will overshoot. Under a
    schedule, give Σ of learning rate times the schedule's factor. c is interpolated between values
    measured from α = 0 to 3.2. For a larger α, c(3.2) is used, so λ is at least the returned value.
    A negative α gives the same λ with the other sign.

    Args:
        alpha: strength, one number.
        learning_rates: of all optimizer steps, or their sum.
        rms: √(mean of Δ's squared elements), as `rms(norm, numel)` returns it.

    Raises:
        ValueError: a number that is not finite, a negative Σlr, or an rms that is not positive.
    """
    total = (
        float(learning_rates)
        if isinstance(learning_rates, int | float)
        else math.fsum(learning_rates)
    )
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha!r}")
    if not math.isfinite(total) or total < 0:
        raise ValueError(f"the sum of learning rates must be finite and not negative, got {total}")
    if not math.isfinite(rms) or rms <= 0:
        raise ValueError(f"rms(Δ) must be finite and positive, got {rms!r}")
    return math.copysign(_coefficient(abs(alpha)) * total / rms, alpha)


def _coefficient(alpha: float) -> float:
    """Return c(α), linear between what was measured."""
    for (left, low), (right, high) in pairwise(_MEASURED):
        if alpha <= right:
            return low + (high - low) * (alpha - left) / (right - left)
    return _MEASURED[-1][1]


class Forecast:
    """Follow λ at logging steps, forecast its final value, and warn once if that is not useful.

    λ grows with the drive, Σ of learning rate times the schedule's factor on α; `done` and `total`
    count the drive, in any unit. The forecast continues the latter half of the drive so far in a
    straight line, so a run that a cap has stopped is forecast to stay where it is.

    Args:
        total: the drive of the whole run.
        stops_at: the λ at which a cap or a target stops the run, if there is one. The forecast does
            not exceed it, and ending within a tenth of it is as intended.

    Raises:
        ValueError: a total that is not positive and finite.
    """

    def __init__(self, total: float, *, stops_at: float | None = None) -> None:
        if not math.isfinite(total) or total <= 0:
            raise ValueError(f"the drive of the whole run must be positive, got {total!r}")
        self._total = float(total)
        self._stops_at = math.inf if stops_at is None else stops_at
        low, high = USEFUL
        if stops_at is not None:
            low, high = min(low, 0.9 * stops_at), max(high, 1.1 * stops_at)
        self._useful = low, high
        # (done, λ) over the latter half of the drive so far; a run starts with zero of both.
        self._seen = [(0.0, 0.0)]
        self._warned = False

    @property
    def final(self) -> float | None:
        """The λ that the run is heading for; None until λ was seen after some drive."""
        done, progress = self._seen[-1]
        if done == 0.0:
            return None
        start, value = self._seen[0]
        final = progress + (progress - value) / (done - start) * max(0.0, self._total - done)
        return min(final, max(progress, self._stops_at))

    def see(self, progress: float, done: float) -> float | None:
        """Take in λ after `done` of the drive, and return the λ that the run is heading for.

        Warns once, with a DriftWarning: when a fifth of the drive is done and the run is heading
        for less than 0.05 or more than 1, or as soon as λ is above 1. A λ that is not finite, or
        that comes after less drive than the last one, is ignored.
        """
        if not (math.isfinite(progress) and math.isfinite(done)) or done < self._seen[-1][0]:
            return self.final
        if done == self._seen[-1][0]:
            if done > 0.0:
                self._seen[-1] = (done, progress)
        else:
            self._seen.append((done, progress))
            while len(self._seen) > 2 and self._seen[1][0] <= done / 2:
                del self._seen[0]
        final = self.final
        if final is not None and not self._warned:
            self._warn(progress, done / self._total, final)
        return final

    def _warn(self, progress: float, share: float, final: float) -> None:
        low, high = self._useful
        seen = f"after {share:.0%} of the run's drive (Σ learning rate × schedule)"
        if progress > high or (final > high and share >= ENOUGH):
            message = (
                f"progress along Δ is λ = {progress:.3g} {seen} and is heading for {final:.3g}; "
                f"above {high:g} the weights overshoot. Lower alpha, pass progress_cap=… to stop "
                "there, or a schedule such as window(0, 0.3)"
            )
        elif final < low and share >= ENOUGH:
            message = (
                f"progress along Δ is λ = {progress:.3g} {seen} and is heading for {final:.3g}, "
                f"less than {low:g}: the run will hardly differ from one without injection. Raise "
                "alpha or the learning rate, train longer, or pass progress_target=…"
            )
        else:
            return
        self._warned = True
        warnings.warn(message, DriftWarning, stacklevel=4)
