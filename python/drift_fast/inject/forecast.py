"""Which progress λ a run is heading for, from its first steps, and a warning if that is not useful.

Owns the warnings and what they advise. `predict` says what to expect beforehand.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

from drift_fast.errors import DriftWarning
from drift_fast.inject.config import InjectionConfig
from drift_fast.inject.lost_steps import is_bounded
from drift_fast.inject.predict import BETAS, USEFUL, Outlook, Pace, joint_rms, push_of, way_to
from drift_fast.inject.strength.control import Control
from drift_fast.inject.target_group import TargetGroup

# Share of a run's drive after which its beginning shows where it will end.
ENOUGH = 0.2
# Of what was expected, what a run reaches at least that does what the prediction assumes.
_AS_EXPECTED = 0.5


class Forecast:
    """Follow λ at logging steps, forecast its final value, and warn once if that is not useful.

    λ grows with the drive, the expected motion up to a step, or Σ of learning rate times the
    schedule's factor on α; `done` and `total` count the drive, in any unit. The forecast continues
    the latter half of the drive so far in a straight line, so a run that a cap has stopped is
    forecast to stay where it is.

    Args:
        total: the drive of the whole run.
        stops_at: the λ at which a cap or a target stops the run, if there is one. The forecast does
            not exceed it, and ending within a tenth of it is as intended.
        expected: λ of the run as `predict_progress` has it, where that is known.
        reachable: λ at the largest α there is, where that is known.

        pace: the run's largest learning rate and its number of steps, where they are known.

    Raises:
        ValueError: a total that is not positive and finite.
    """

    def __init__(
        self,
        total: float,
        *,
        pace: Pace = None,
        stops_at: float | None = None,
        expected: float | None = None,
        reachable: float | None = None,
    ) -> None:
        if not math.isfinite(total) or total <= 0:
            raise ValueError(f"the drive of the whole run must be positive, got {total!r}")
        self._total = float(total)
        self._stops_at = math.inf if stops_at is None else stops_at
        low, high = USEFUL
        if stops_at is not None:
            low, high = min(low, 0.9 * stops_at), max(high, 1.1 * stops_at)
        self._useful = low, high
        self._pace = pace
        self._expected = expected
        self._reachable = reachable
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

    def see(self, progress: float, done: float, *, lost: str = "") -> float | None:
        """Take in λ after `done` of the drive, and return the λ that the run is heading for.

        Warns once, with a DriftWarning: when a fifth of the drive is done and the run is heading
        for less than 0.05 or more than 1, or as soon as λ is above 1. A λ that is not finite, or
        that comes after less drive than the last one, is ignored.

        lost: why weights do not keep the optimizer's steps, which is then named first.
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
            self._warn(progress, done / self._total, final, lost)
        return final

    def _warn(self, progress: float, share: float, final: float, lost: str) -> None:
        low, high = self._useful
        expected = None if self._expected is None else min(self._expected, self._stops_at)
        short = expected is None or final < _AS_EXPECTED * expected
        if progress > high or (final > high and share >= ENOUGH):
            message = (
                f"; above {high:g} the weights overshoot. Lower alpha or the learning rate, pass "
                "progress_cap=… to stop there, or a schedule such as window(0, 0.3)"
            )
        elif share < ENOUGH:
            return
        elif lost and short and (final < low or expected is not None):
            meant = f"less than {low:g}" if expected is None else f"and {expected:.2g} was expected"
            message = f", {meant}. The first cause to look at: {lost}"
        elif final < low:
            message = (
                f", less than {low:g}: the run will hardly differ from one without injection. "
                + self._advice(final, low)
            )
        else:
            return
        self._warned = True
        warnings.warn(
            f"progress along Δ is λ = {progress:.3g} after {share:.0%} of the run's drive (Σ "
            f"learning rate × schedule) and is heading for {final:.3g}{message}",
            DriftWarning,
            stacklevel=4,
        )

    def _advice(self, final: float, low: float) -> str:
        """Return what would bring λ to where it is useful."""
        if self._expected is None or self._reachable is None or final <= 0:
            return (
                "Raise the learning rate or alpha, train longer, or merge a share of Δ into the "
                "model before it trains. Under optimizers such as AdamW, alpha above 2 adds little"
            )
        most = final * self._reachable / self._expected
        larger = f"a larger alpha reaches {most:.2g} at most"
        return (
            f"{low / final:.3g} times Σ learning rate would reach {low:g}, "
            f"{way_to(low / final, self._pace)}; {larger}. Or move the weights by a share of Δ "
            "that you choose (attach_motion)"
        )


def look_ahead(
    groups: Sequence[TargetGroup],
    control: Control,
    config: InjectionConfig,
    optimizer: Any,
    rates: Sequence[float],
    *,
    known: bool,
) -> Outlook:
    """Look at a run of an injection that is attached, without waiting for the device.

    optimizer: what steps the targets.
    rates: the learning rate of every step, in the optimizer's unit if `known`.
    """
    factors = [abs(control.factor(at)) for at in range(len(rates))]
    targets = [target for group in groups for target in group.targets]
    foreseen = (
        known
        and config.scope == "step"
        and config.scale in ("adaptive", "gradnorm")
        and config.layer_alpha is None
        and is_bounded(optimizer)
        and all(target.adapted is None for target in targets)
    )
    alpha = control.alpha
    strength = (
        abs(alpha) if isinstance(alpha, float) else statistics.fmean(map(abs, alpha.values()))
    )
    push = push_of(strength, config.scale) if foreseen and strength else None
    size = joint_rms(
        (square, math.prod(target.shape))
        for group in groups
        for target, square in zip(group.targets, group.squares(), strict=True)
    )
    betas = optimizer.param_groups[0].get("betas", BETAS) if push is not None else BETAS
    return Outlook.of(push, rates, factors, size, tuple(betas)[:2])
