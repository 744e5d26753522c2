"""How hard a step pushes, on which targets, and what it measured there.

Owns these records alone: `target_group` fills and reads them, one for each group of targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drift_fast.inject.compute.base import Arithmetic
from drift_fast.inject.strength.formula import Scale


@dataclass(frozen=True)
class Push:
    """How hard this step pushes: α of each target on the group's device, and what bounds it."""

    scale: Scale
    alpha: torch.Tensor
    loss_scale: torch.Tensor | float | None = None
    max_push: float | None = None


@dataclass
class Last:
    """What the last injection measured and subtracted, vectors on the device."""

    norm: torch.Tensor
    dot: torch.Tensor
    c: torch.Tensor
    delta: torch.Tensor
    alpha: torch.Tensor | None = None
    angles: bool = False


@dataclass(frozen=True)
class Bucket:
    """Targets [start, stop) of a group with their Δ, and how this step pushes them."""

    start: int
    stop: int
    deltas: Sequence[torch.Tensor]
    push: Push
    arithmetic: Arithmetic

    def delta(self, at: int) -> torch.Tensor:
        """Return the Δ of one target by its number in the group."""
        return self.deltas[at - self.start]

    def part(self, start: int, stop: int) -> Bucket:
        """Return the bucket of some of the targets."""
        deltas = self.deltas[start - self.start : stop - self.start]
        return Bucket(start, stop, deltas, self.push, self.arithmetic)
