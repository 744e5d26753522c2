"""What the scopes "step" and "microbatch" share: target groups, their pushes, and the watchdog."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from drift_fast.inject.pushes import Pushes
from drift_fast.inject.target_group import TargetGroup
from drift_fast.inject.watchdog import Watchdog


class Scope(ABC):
    """Runs an injection over its target groups, and keeps the watchdog informed."""

    def __init__(self, groups: Sequence[TargetGroup], pushes: Pushes, watchdog: Watchdog) -> None:
        self.groups = groups
        self.pushes = pushes
        self.watchdog = watchdog
        # Hooks on the parameters, which the injection removes with its own.
        self.handles: list[Any] = []

    @abstractmethod
    def step(self) -> None:
        """Inject into the accumulated gradients.

        Raises:
            DriftError: the injection does not run this way, or a gradient is missing.
        """

    @abstractmethod
    def before_use(self, optimizer: torch.optim.Optimizer) -> None:
        """React to an optimizer that is about to use gradients.

        Raises:
            DriftError: it would use gradients without the injection.
        """

    def would_use_plain(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer holds a target whose gradient was not injected.

        Raises:
            DriftError: that cannot be known.
        """
        return self.watchdog.would_use_plain(optimizer)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Mark backward passes whose gradients are not final yet."""
        yield

    def settle(self) -> None:  # noqa: B027
        """Wait for what reads Δ in the background."""

    @abstractmethod
    def restate(self) -> None:
        """React to a change of the stated α."""

    @abstractmethod
    def close(self) -> None:
        """Stop what runs in the background."""
