"""The schedule of a planned motion: its share after each step, and where a saved one had come to.

Owns what the user states, and the checks of a state that comes from a file. Knows no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

from drift_fast.errors import DriftError
from drift_fast.inject.saved_state import (
    MotionState,
    check_targets,
    check_version,
    damaged,
    read_state,
    shown,
)
from drift_fast.inject.schedule import ScheduleLike, parse_schedule
from drift_fast.inject.strength.per_module import PerModule, plain

_STATE_VERSION = 1


class MotionSchedule:
    """λ by module, the number of steps, and the share of the motion that each step completes.

    Raises:
        ValueError: a number of steps, a schedule or a seed without meaning.
    """

    def __init__(self, progress: PerModule, steps: int, schedule: ScheduleLike, seed: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a number of optimizer steps from 1, got {steps!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**53:
            raise ValueError(f"seed must be an integer from 0 below 2**53, got {seed!r}")
        self.progress = progress
        self.steps = steps
        self._seed = seed
        parsed = parse_schedule(schedule)
        self._schedule = str(parsed)
        factors = [parsed(step, steps) for step in range(steps)]
        total = math.fsum(factors)
        if min(factors) < 0 or total <= 0:
            raise ValueError(
                "a motion needs a schedule that is never negative and not always zero over its "
                f"{steps} steps, got {self._schedule}"
            )
        self._shares = [0.0]
        for factor in factors:
            self._shares.append(self._shares[-1] + factor / total)
        self._shares[-1] = 1.0

    def share(self, taken: int) -> float:
        """Return the share of the motion that is made after so many steps, exactly 1 at the end."""
        return self._shares[taken]

    def state_dict(self, taken: int, origin: Mapping[str, float]) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON has it; `origin` is ⟨θ_0, Δ⟩ by target."""
        return {
            "version": _STATE_VERSION,
            "taken": taken,
            "share": [self.share(taken)],
            "plan": self._described(),
            "origin": dict(origin),
        }

    def resumed(self, state: Any, names: Set[str]) -> tuple[int, dict[str, float]]:
        """Return the steps taken and ⟨θ_0, Δ⟩ by target from a state of this plan and targets.

        Raises:
            DriftError: not such a state, or one of another plan or other targets.
        """
        saved = read_state(state, MotionState, "a motion")
        check_version("a motion", saved.version, _STATE_VERSION)
        check_targets("motion", saved.origin, names)
        if saved.taken > self.steps:
            raise damaged("a motion", f"taken must be at most {self.steps}, found {saved.taken}")
        plan, described = saved.plan, self._described()
        changed = [key for key in described if plan.get(key) != described[key]]
        if changed:
            key = changed[0]
            raise DriftError(
                f"the saved motion had {key} = {shown(plan.get(key))}, this one has "
                f"{shown(described[key])}: a part of each would end at neither; attach with what "
                "the saved run had, or start a motion for the rest of the way without a saved state"
            )
        # A schedule that is a function is known by its name only.
        if saved.share != [self.share(saved.taken)]:
            raise DriftError(
                f"the saved motion had made another share of its way after {saved.taken} steps "
                "than this one would have: attach with the schedule that the saved run had"
            )
        return saved.taken, saved.origin

    def _described(self) -> dict[str, Any]:
        return {
            "progress": plain(self.progress),
            "steps": self.steps,
            "schedule": self._schedule,
            "seed": self._seed,
        }
