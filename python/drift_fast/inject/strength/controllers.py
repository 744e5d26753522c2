"""Caps on λ and a target λ: how progress along Δ changes α, on the device.

Owns the arithmetic of both, on vectors of shape [targets] or [sets]. No value returns to the host
and no branch depends on one, so a step waits for nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from drift_fast.inject.saved_state import SavedAim, damaged
from drift_fast.inject.strength.formula import LEAST, MOST

# An aim plans to arrive when this share of the schedule's drive is spent. Learning rates fall
# towards the end, where no α could make up for a shortfall; and in the miniature that this method
# was tried in, early motion did better than late motion.
ARRIVAL = 0.5

# Square of the drive below which little is learned from a step, whose motion is mostly noise.
_SMALL = 0.25**2


class Sets:
    """Targets taken together, their λ weighted by ‖Δ‖²; λ of a set is ⟨moved,Δ⟩/‖Δ‖²."""

    def __init__(self, keys: Sequence[Hashable], squares: Sequence[float]) -> None:
        place = {key: at for at, key in enumerate(dict.fromkeys(keys))}
        index = [place[key] for key in keys]
        totals = [0.0] * len(place)
        for at, square in zip(index, squares, strict=True):
            totals[at] += square
        shares = torch.zeros(len(place), len(index), dtype=torch.float64)
        for column, (at, square) in enumerate(zip(index, squares, strict=True)):
            shares[at, column] = square / totals[at]
        self._index = torch.tensor(index)
        self._shares = shares

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the constants to a device."""
        self._index = self._index.to(device)
        self._shares = self._shares.to(device, dtype)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return λ of each set, shape [sets], from λ of each target."""
        # One NaN spoils its own set alone; and a matrix product might round to TF32.
        weighted = torch.where(self._shares > 0, self._shares * values, torch.zeros_like(values))
        return weighted.sum(dim=1)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return the value of each target's set, shape [targets]."""
        return values.index_select(0, self._index)


class Cap:
    """Switch targets off for good where their λ, or their set's, is about to reach a cap.

    A target that falls back below its cap stays off.
    """

    def __init__(self, caps: Sequence[float], sets: Sets | None) -> None:
        self._caps = torch.tensor(caps, dtype=torch.float64)
        self._sets = sets
        self.stopped = torch.zeros(len(caps), dtype=torch.bool)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the state to a device."""
        self._caps = self._caps.to(device, dtype)
        self.stopped = self.stopped.to(device)
        if self._sets is not None:
            self._sets.place(device, dtype)

    def apply(self, alphas: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
        """Return α with zeros where a target is off; `reach` is λ and what momentum will add."""
        if self._sets is not None:
            reach = self._sets.spread(self._sets.mean(reach))
        self.stopped = self.stopped | (reach >= self._caps)
        return torch.where(self.stopped, torch.zeros_like(alphas), alphas)


@dataclass
class AimState:
    """What an aim has learned: per set, motion for each unit of drive, and drive on its way."""

    gain: torch.Tensor
    drive: torch.Tensor
    steps: int = 0
    learned: int = 0


class Aim:
    """Scale α so that λ of each set comes to its target and stays there.

    The model is dλ = gain · drive, where the drive of a step is what α is scaled by, schedule
    included, averaged as Adam's first moment averages gradients, its correction of the first steps
    included. The gain is learned by normalized least mean squares, whose forgetting follows
    learning rates and the saturation of large α, and starts as if α as stated were right. A step
    then takes the share of what is missing that its drive is of the drive left until arrival.
    """

    def __init__(
        self,
        sets: Sets,
        targets: Sequence[float],
        factors: Sequence[float],
        look_ahead: float,
    ) -> None:
        self._sets = sets
        self._look_ahead = look_ahead
        # Momentum β goes on to move the weights by β/(1 − β) times the last change.
        self._momentum = look_ahead / (1.0 + look_ahead)
        # Drive counts steps at the schedule's highest, so that its unit does not matter.
        self._peak = max(factors)
        self._spent = list(accumulate((factor / self._peak for factor in factors), initial=0.0))
        self._planned = ARRIVAL * self._spent[-1]
        self._horizon = min(50.0, max(4.0, self._spent[-1] / 20))
        self._targets = torch.tensor(targets, dtype=torch.float64)
        self._first = self._targets / self._planned
        # A gain that noise drives to zero or below would ask for an endless or a reversed push.
        self._floor = self._first / 100
        self.state = self._fresh()

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move constants and state to a device."""
        self._sets.place(device, dtype)
        self._targets = self._targets.to(device, dtype)
        self._first = self._first.to(device, dtype)
        self._floor = self._floor.to(device, dtype)
        self.state.gain = self.state.gain.to(device, dtype)
        self.state.drive = self.state.drive.to(device, dtype)

    def restart(self) -> None:
        """Forget what was learned."""
        self.state = self._fresh()

    def saved(self) -> dict[str, Any]:
        """Return what was learned, for JSON; waits for the device."""
        return {
            "gain": self.state.gain.tolist(),
            "drive": self.state.drive.tolist(),
            "steps": self.state.steps,
            "learned": self.state.learned,
        }

    def read_state(self, saved: SavedAim) -> AimState:
        """Return what was learned from a state that `saved` returned.

        Raises:
            DriftError: a state of another number of sets, or numbers out of range.
        """
        for key, values in (("gain", saved.gain), ("drive", saved.drive)):
            if len(values) != len(self._targets):
                problem = f"have {len(self._targets)} values, found {len(values)}"
            elif min(values) < 0 or (key == "gain" and min(values) == 0):
                problem = f"be {'positive' if key == 'gain' else 'at least 0'}, found {min(values)}"
            else:
                continue
            raise damaged("a control", f"aim.{key} must {problem}")
        gain, drive = (torch.tensor(one, dtype=torch.float64) for one in (saved.gain, saved.drive))
        return AimState(gain, drive, saved.steps, saved.learned)

    def _fresh(self) -> AimState:
        return AimState(self._first, torch.zeros_like(self._first))

    def apply(
        self,
        alphas: torch.Tensor,
        progress: torch.Tensor,
        rate: torch.Tensor,
        *,
        step: int,
        factor: float,
        gap: int | None,
    ) -> torch.Tensor:
        """Return α scaled for this step; `rate` is the change of λ per step over the last `gap`.

        `factor` is the schedule's, which `alphas` holds already.
        """
        state, factor = self.state, factor / self._peak
        progress, rate = self._sets.mean(progress), self._sets.mean(rate)
        if gap is not None and state.steps:
            self._learn(rate, gap)
            state.drive = state.drive * self._momentum ** (gap - 1)
            state.steps += gap - 1
        spent = self._spent[min(step, len(self._spent) - 1)]
        # Past the planned arrival, what is missing is made up within the horizon.
        left = max(self._planned - spent, self._horizon * factor)
        # Adam's correction of the first steps makes their motion larger than what is on its way.
        coming = self._look_ahead * (1.0 - self._momentum**state.steps)
        missing = self._targets - (progress + coming * rate)
        scale = (missing / (state.gain * left)).clamp(LEAST, MOST)
        scale = torch.where(torch.isfinite(scale), scale, torch.zeros_like(scale))
        state.drive = self._momentum * state.drive + (1.0 - self._momentum) * factor * scale
        state.steps += 1
        return alphas * self._sets.spread(scale)

    def _learn(self, rate: torch.Tensor, gap: int) -> None:
        """Correct the gain by the motion since the last step that was seen."""
        state = self.state
        state.learned += 1
        weight = 1.0 / min(self._horizon, state.learned + 3)
        beta = self._momentum
        # After the first of these steps, only momentum's remainder of the drive was left.
        lasting = (1.0 - beta**gap) / (1.0 - beta) / gap
        drive = state.drive * (lasting / (1.0 - beta**state.steps))
        step = drive * (rate - state.gain * drive) / (drive * drive).clamp(min=_SMALL)
        gain = torch.maximum(state.gain + weight * step, self._floor)
        state.gain = torch.where(torch.isfinite(gain), gain, state.gain)
