"""How hard each step pushes: α of every target, as the control has it, for each target group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from drift_fast.inject.compute.vectors import beside, plain_arithmetic
from drift_fast.inject.step_records import Push
from drift_fast.inject.strength.control import Control
from drift_fast.inject.strength.formula import Scale
from drift_fast.inject.target_group import TargetGroup

LossScale = Callable[[torch.device], torch.Tensor | float | None]


class Pushes:
    """The pushes of an injection, one for each target group in each step.

    loss_scale: returns the factor that the gradients carry, None where it is one.
    """

    def __init__(
        self,
        groups: Sequence[TargetGroup],
        control: Control,
        scale: Scale,
        loss_scale: LossScale,
    ) -> None:
        self._groups = groups
        self._control = control
        self._scale = scale
        self._loss_scale = loss_scale

    @property
    def rest(self) -> bool:
        """Whether α is zero for all targets in the next step."""
        return self._control.constant_zero

    def begin(self) -> list[Push]:
        """Start the account of a step, and return how each group is pushed; none if α is zero."""
        for group in self._groups:
            group.begin()
        if self.rest:
            for group in self._groups:
                group.rest()
            return []
        parts = torch.split(self._alphas(), [len(group.targets) for group in self._groups])
        return [self._push(group, part) for group, part in zip(self._groups, parts, strict=True)]

    def finish(self) -> None:
        """Count the step as done."""
        self._control.finish()

    def take_back(self) -> None:
        """Uncount the last step, which the optimizer skipped."""
        self._control.undo()

    def _alphas(self) -> torch.Tensor:
        """Return α of every target, on the first group's device."""
        home = self._groups[0]
        if not self._control.needs_progress:
            return self._control.alphas(device=home.device, dtype=home.norms.dtype)
        with plain_arithmetic(home.device):
            parts = [group.progress(wide=False).to(home.norms.dtype) for group in self._groups]
        return self._control.alphas(torch.cat([beside(part, home.device) for part in parts]))

    def _push(self, group: TargetGroup, alphas: torch.Tensor) -> Push:
        return Push(
            self._scale,
            beside(alphas, group.device).to(group.norms.dtype),
            # The other scales do not depend on it.
            self._loss_scale(group.device) if self._scale == "absolute" else None,
            self._control.max_push,
        )
