"""Which progress λ a run will end at, predicted before it starts.

λ = ⟨θ_t − θ_0, Δ⟩/‖Δ‖² is 0 at the start and 1 where the weights have moved by all of Δ. Everything
here is a Python float; nothing is injected or changed. `forecast` follows a run that trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from drift_fast.inject.schedule import ScheduleLike, parse_schedule
from drift_fast.inject.strength.formula import MOST, Scale

# Useful values of λ: in the miniature fine-tuning alone ended below 0.01, and on a pre-trained
# model nothing changed below 0.05. Answers got worse beyond 1, and perception faster.
USEFUL = (0.05, 1.0)

# mean|Δ|/rms(Δ) of a Gaussian, to which c comes as α grows: every element then moves by the
# learning rate in each step, in the direction of its Δ.
GAUSSIAN = 0.8

# 1/c^p = (h/s)^p + 1/limit^p, where s is ‖c·Δ‖/‖g‖, the push. This is within 6 % of AdamW in
# float64 on gradients of noise whose elements differ in size (log-normal, σ = 0.72) and a Gaussian
# Δ (tests/inject/test_predict.py), and within 9 % of what was measured from α = 0.05 to 8, medians
# of examples/miniature (0.8M parameters) and of a pre-trained model of 135M. In the miniature runs
# at learning rates of 1e-3 and more ended up to a third lower.
_HALF = 0.46
_SHARPNESS = 1.3

# Of torch's AdamW.
BETAS = (0.9, 0.999)
# A push of which c is at its limit.
_SATURATED = 1e9


def rms(norm: float, numel: int) -> float:
    """Return the root mean square of Δ's elements from ‖Δ‖ and their number.

    For several tensors, give √(Σ‖Δ‖²) and the sum of their numbers of elements.
    """
    if numel < 1 or not math.isfinite(norm) or norm < 0:
        raise ValueError(f"expected a finite ‖Δ‖ of at least one element, got {norm!r} of {numel}")
    return norm / math.sqrt(numel)


def joint_rms(tensors: Iterable[tuple[float, int]]) -> float:
    """Return the rms(Δ) with which several tensors move as one does, from ‖Δ‖² and numel of each.

    A push moves the elements of every tensor by the same share of the learning rate, so those of a
    large Δ come less far along it. λ of all together, weighted by ‖Δ‖², follows from this number,
    which is their rms where all have the same, and larger elsewhere.
    """
    pairs = list(tensors)
    return math.fsum(square for square, _ in pairs) / math.fsum(
        math.sqrt(square * numel) for square, numel in pairs
    )


def predict_progress(
    alpha: float,
    learning_rates: float | Iterable[float],
    rms: float,
    *,
    scale: Scale = "adaptive",
    schedule: ScheduleLike = None,
    gradient_rms: float | None = None,
    limit: float = GAUSSIAN,
    betas: tuple[float, float] = BETAS,
) -> float:
    """Return the λ that a run is expected to end at: c(α)·Σlr/rms(Δ).

    For optimizers of Adam's kind on weights that keep every update, so not for 16-bit weights
    without wider copies. c grows with α up to `limit`. Beyond α = 2 a larger α adds little, and
    only a larger Σlr moves the weights further. Under a schedule of α the two moments of Adam are
    followed: after a window its momentum moves the weights on, by up to 9 steps for β1 = 0.9.
    A negative α gives the same λ with the other sign.

    Args:
        alpha: strength, one number.
        learning_rates: of all optimizer steps; without a `schedule` their sum will do.
        rms: √(mean of Δ's squared elements), as `rms(norm, numel)` returns it. Where it differs
            much between tensors, as with biases of a large Δ, predict λ of each.
        scale: "adaptive", which is taken as "gradnorm" at α/2, since cos(g, Δ) is near zero on real
            pairs; "gradnorm"; or "absolute", with `gradient_rms`.
        schedule: that of α, as in `InjectionConfig`; the run has as many steps as learning rates.
        gradient_rms: √(mean of the gradient's squared elements) in a typical step, for "absolute".
        limit: mean|Δ|/rms(Δ), 0.8 for a Gaussian and less where few elements hold most of Δ.
        betas: those of the optimizer.

    Raises:
        ValueError: a number that is not finite or out of its range, a schedule without the learning
            rate of each step, or a scale whose strength cannot be known beforehand.
    """
    if not math.isfinite(rms) or rms <= 0:
        raise ValueError(f"rms(Δ) must be finite and positive, got {rms!r}")
    if not 0 < limit <= 1:
        raise ValueError(f"limit is mean|Δ|/rms(Δ), above 0 and at most 1, got {limit!r}")
    push = push_of(alpha, scale, rms=rms, gradient_rms=gradient_rms)
    if isinstance(learning_rates, int | float):
        if schedule is not None:
            raise ValueError(
                "a schedule needs the learning rate of each step: give all of them, not their sum"
            )
        moved = _check_rate(learning_rates) * coefficient(push, limit)
    else:
        rates = list(learning_rates)
        factor = parse_schedule(schedule)
        factors = [factor(at, len(rates)) for at in range(len(rates))]
        moved = math.fsum(motions(push, rates, factors, limit=limit, betas=betas))
    return moved / rms


def push_of(
    alpha: float, scale: Scale, *, rms: float = 1.0, gradient_rms: float | None = None
) -> float:
    """Return ‖c·Δ‖/‖g‖ with the sign of α, where cos(g, Δ) is near zero.

    Raises:
        ValueError: an α that is not finite, "absolute" without the gradient's rms, or "project".
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha!r}")
    if scale == "project":
        raise ValueError(
            "scale='project' pushes only where the task pulls away from Δ, and how often it does "
            "is not known beforehand"
        )
    if scale == "absolute":
        if gradient_rms is None or not 0 < gradient_rms < math.inf:
            raise ValueError(
                "scale='absolute' adds α·Δ whatever the gradient is, so gradient_rms=… must say "
                f"how large that is, as a positive number, got {gradient_rms!r}"
            )
        return alpha * rms / gradient_rms
    return alpha / 2 if scale == "adaptive" else alpha


def coefficient(push: float, limit: float = GAUSSIAN) -> float:
    """Return c, the share of Σlr/rms(Δ) that weights move by under a push, with its sign."""
    size = abs(push)
    if size == 0.0:
        return 0.0
    ratio = _HALF * limit / size
    # Beyond this 1 + ratio^p is ratio^p, and the power would leave the range of a float.
    c = size / _HALF if ratio > 1e12 else limit / (1 + ratio**_SHARPNESS) ** (1 / _SHARPNESS)
    return math.copysign(c, push)


def motions(
    push: float,
    learning_rates: Sequence[float],
    factors: Sequence[float],
    *,
    limit: float = GAUSSIAN,
    betas: tuple[float, float] = BETAS,
) -> Iterator[float]:
    """Yield the expected motion of each step along Δ, in units of rms(Δ).

    `factors` are those of the schedule of α. Adam divides a running mean of gradients, in which
    a push lasts, by the root of a running mean of squares, which holds pushes of long ago. With μ
    and q² those means of the factor and of its square, with their corrections of the first steps,
    a step moves by lr·(μ/q)·c(q·push).

    Raises:
        ValueError: a rate or a β without meaning.
    """
    first, second = betas
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError(f"betas must be two numbers from 0 to below 1, got {betas!r}")
    mean = square = 0.0
    for step, (rate, factor) in enumerate(zip(learning_rates, factors, strict=True), start=1):
        mean += (1 - first) * (factor - mean)
        square += (1 - second) * (factor * factor - square)
        q = math.sqrt(square / (1 - second**step))
        share = mean / (1 - first**step) / q if q > 0 else 0.0
        yield _check_rate(rate) * share * coefficient(push * q, limit)


# The largest learning rate of a run and its number of steps, None where that is not known.
Pace: TypeAlias = tuple[float, int] | None


def way_to(times: float, pace: Pace) -> str:
    """Say which learning rate or number of steps gives so many times the Σ learning rate."""
    if pace is None:
        return "by more steps or a higher learning rate"
    rate, steps = pace
    return f"with a learning rate of {times * rate:.2g}, or {math.ceil(times * steps):,} steps"


def _check_rate(rate: float) -> float:
    if not math.isfinite(rate) or rate < 0:
        raise ValueError(f"learning rates must be finite and not negative, got {rate!r}")
    return float(rate)


@dataclass(frozen=True)
class Outlook:
    """A run before its first step, by AdamW's motion along Δ.

    `drive` is the motion up to each step, in some unit. λ is `expected` at α as stated, could be
    steered up to `steered` by a target, and is below `reachable` whatever α is; all of them are
    None where λ cannot be known beforehand.
    """

    drive: list[float]
    expected: float | None = None
    steered: float | None = None
    reachable: float | None = None

    @classmethod
    def of(
        cls,
        push: float | None,
        rates: Sequence[float],
        factors: Sequence[float],
        rms: float,
        betas: tuple[float, float],
    ) -> Outlook:
        """Look at a run of these learning rates and factors of α's schedule.

        push: ‖c·Δ‖/‖g‖ as `push_of` returns it, None where that is not known.
        """

        def moves(push: float) -> list[float]:
            return list(accumulate(motions(push, rates, factors, betas=betas)))

        if push is None or not rates:
            return cls(moves(1.0))
        drive = moves(push)
        ends = (drive, moves(MOST * push), moves(math.copysign(_SATURATED, push)))
        return cls(drive, *(each[-1] / rms for each in ends))

    def misses(self, target: float, pace: Pace = None) -> str:
        """Return why a target λ is not reached, and what would reach it; empty where it may be."""
        if self.steered is None or self.reachable is None or not 0 < self.steered < target:
            return ""
        larger = (
            f"no alpha reaches more than {self.reachable:.2g}"
            if target > self.reachable
            else "so would a larger alpha"
        )
        return (
            f"progress_target={target:g} is out of reach: λ is expected to come to "
            f"{self.steered:.2g} with alpha multiplied by {MOST:g}, the most that a target does. "
            f"{target / self.steered:.3g} times Σ learning rate would reach it, "
            f"{way_to(target / self.steered, pace)}; {larger}. attach_motion moves the weights by "
            "a share of Δ that you choose, at any learning rate"
        )
