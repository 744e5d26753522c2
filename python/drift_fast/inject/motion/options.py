"""The options of a planned motion, beside its progress and its number of steps."""

from __future__ import annotations

from dataclasses import dataclass

from drift_fast.inject.config import ResidencyOptions, TargetOptions
from drift_fast.inject.schedule import ScheduleLike
from drift_fast.options import option


@dataclass(frozen=True, kw_only=True)
class MotionOptions(TargetOptions, ResidencyOptions):
    """The options of `PlannedMotion` and `attach_motion`."""

    schedule: ScheduleLike = option(
        None,
        "how the steps share the motion, evenly if None; a schedule as `Injection` takes, over "
        "`steps`, whose factors are normalized to a sum of one",
    )
    seed: int = option(0, "seed of the rounding of 16-bit weights")
