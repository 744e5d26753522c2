"""The shard of a parameter that this process holds, and how its gradient and weights are reached.

Owns the protocol, and the shard that is the whole parameter. Knows nothing of Δ or the formula.
A sum over `process_groups` of what every process finds in its shard counts each element once.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn


class Cut(Protocol):
    """A part of one parameter."""

    @property
    def span(self) -> tuple[int, int] | None:
        """Elements [start, stop) in row-major order, None for the whole, or for other parts."""

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this part of a tensor of the parameter's shape; it may share its memory."""


class Shard(Cut, Protocol):
    """The part of one parameter that this process holds; all of it where nothing is sharded.

    Local tensors may have any shape whose row-major order is that of the shard.
    """

    @property
    def sharding(self) -> str:
        """What spread the parameter over processes, for messages."""

    @property
    def process_groups(self) -> tuple[Any, ...]:
        """Process groups over which sums are taken; none where nothing is sharded."""

    @property
    def gathers(self) -> bool:
        """Whether `weight` is a collective, which all processes call in one order."""

    @property
    def accumulated(self) -> tuple[torch.Tensor, ...]:
        """Tensors into which autograd accumulates; none where a hook there is wrong or costs."""

    def gradient(self) -> torch.Tensor | None:
        """Return the local gradient, to be changed in place."""

    def write_gradient(self, gradient: torch.Tensor) -> None:
        """Take back what `gradient` returned, where that was a copy or has a norm elsewhere."""

    def weight(self) -> torch.Tensor:
        """Return the local weights, to be read; the float32 master copy where there is one."""

    def write_weight(self, weight: torch.Tensor) -> None:
        """Write local weights: the master copy and the one that computes."""


class Whole:
    """A parameter that this process holds whole."""

    sharding = "whole"
    gathers = False
    span = None
    process_groups: tuple[Any, ...] = ()

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    @property
    def accumulated(self) -> tuple[torch.Tensor, ...]:
        return (self.parameter,)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole

    def gradient(self) -> torch.Tensor | None:
        return self.parameter.grad

    def write_gradient(self, gradient: torch.Tensor) -> None:
        pass

    def weight(self) -> torch.Tensor:
        return self.parameter.detach()

    def write_weight(self, weight: torch.Tensor) -> None:
        self.parameter.detach().copy_(weight)
