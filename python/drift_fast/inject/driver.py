"""What differs between training stacks: a driver says it, and an injection asks its driver.

Owns how gradients and weights are reached, by what factor the loss is scaled, and how the injection
learns of an optimizer's step. The class here is for a user's own loop; each training library has a
subclass in `drift_fast.integrations`.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.config import InjectionConfig
from drift_fast.inject.lora.shard import shards_of_targets
from drift_fast.inject.optimizer_watch import OptimizerWatch
from drift_fast.inject.scope import Scope
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.shards.find import processes_of, shards_of
from drift_fast.inject.target import Target


class Handle(Protocol):
    """Something that is undone by `remove()`."""

    def remove(self) -> None: ...


class Driver:
    """A user's own loop, which calls `Injection.step()` before it clips and steps."""

    # Why a user must not call `Injection.step()`; None where a user must.
    runs_by_itself: str | None = None
    # What to do where an optimizer stepped and nothing was injected before.
    missed = (
        "call injection.step() between backward and optimizer.step(), where a closure runs "
        "backward in the closure"
    )
    # How to train float32 weights, where neither a loop's way nor that of the shards is right.
    wider = ""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.optimizer = None if optimizer is None else unwrap_optimizer(optimizer)
        self.scaler = scaler
        self._unknown: _Scaled | None = None

    def check(self, config: InjectionConfig) -> None:
        """Refuse options that this way of training does not have.

        Raises:
            ValueError, DriftError: such an option.
        """
        if self.scaler is not None and config.scale == "absolute" and self.optimizer is None:
            raise ValueError(
                "scale='absolute' with a scaler needs the optimizer too, to know whether its "
                "gradients are still scaled: pass optimizer=…"
            )

    def processes(self, model: nn.Module) -> tuple[Any, ...]:
        """Return the groups of all processes that train the model together and attach to it."""
        return processes_of(model)

    def shards(self, model: nn.Module, targets: Sequence[Target]) -> list[Shard]:
        """Return how the local gradient and weights of each target are reached."""
        return shards_of_targets(targets, functools.partial(shards_of, model=model))

    @property
    def stepping(self) -> torch.optim.Optimizer | None:
        """The optimizer that steps the targets or their copies, where it is known."""
        return self.optimizer

    def loss_scale(self, device: torch.device) -> torch.Tensor | float | None:
        """Return the factor that the gradients carry at the moment of a step, None for one.

        Raises:
            DriftError: they carry that of a scaler which is not known here.
        """
        if self._unknown is not None and self._unknown.is_scaled():
            raise DriftError(
                "the gradients still carry the loss scale of a GradScaler, so that "
                "scale='absolute' would inject far too little, as it did in the first step: pass "
                "scaler=… and optimizer=… to the injection, or call scaler.unscale_(optimizer) "
                "before injection.step()"
            )
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        if self.optimizer is not None and _is_unscaled(self.scaler, self.optimizer):
            return None
        return scale_of(self.scaler, device)

    def start(self, scope: Scope) -> list[Handle]:
        """Report to the scope what optimizers use from now on, until the handles are removed."""
        return [OptimizerWatch(lambda optimizer: self.before_use(scope, optimizer))]

    def before_use(self, scope: Scope, optimizer: torch.optim.Optimizer) -> None:
        """React to an optimizer that is about to use gradients, in its step or after its closure.

        Raises:
            DriftError: it would use gradients without the injection.
        """
        if self.scaler is None and self._unknown is None:
            self._unknown = _Scaled.seen_by(optimizer)
        scope.before_use(optimizer)


class _Scaled:
    """A gradient scaler that was not given, and an optimizer that it steps."""

    def __init__(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        self._scaler, self._optimizer = weakref.ref(scaler), weakref.ref(optimizer)

    @classmethod
    def seen_by(cls, optimizer: torch.optim.Optimizer) -> _Scaled | None:
        """Look for a scaler inside whose `step` an optimizer steps now."""
        frame: Any = sys._getframe()
        # Hooks, and wrappers of the optimizer's step, are between.
        for _ in range(16):
            if frame is not None and frame.f_code is torch.amp.GradScaler.step.__code__:
                scaler = frame.f_locals["self"]
                return cls(scaler, optimizer) if scaler.is_enabled() else None
            frame = frame and frame.f_back
        return None

    def is_scaled(self) -> bool:
        """Whether the optimizer's gradients carry the scaler's factor."""
        scaler, optimizer = self._scaler(), self._optimizer()
        return None not in (scaler, optimizer) and not _is_unscaled(scaler, optimizer)


def scale_of(scaler: torch.amp.GradScaler, device: torch.device) -> torch.Tensor:
    """Return the factor by which a scaler multiplies the loss, on a device."""
    scale: torch.Tensor = scaler.scale(torch.ones((), device=device))
    return scale


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside Accelerate's wrapper, which is the one that steps.

    Raises:
        ValueError: not a torch optimizer.
    """
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"expected a torch optimizer, got {type(optimizer).__name__}")
    return optimizer


def _is_unscaled(scaler: Any, optimizer: Any) -> bool:
    """Tell whether `scaler.unscale_(optimizer)` has run since the last update.

    torch keeps this in a private table. Without it an absolute push could be wrong by the loss
    scale, so a torch that has renamed it is an error rather than a guess.
    """
    states = getattr(scaler, "_per_optimizer_states", None)
    if states is None:
        raise DriftError(
            "this version of torch does not show whether gradients were unscaled; use "
            "scale='gradnorm' or 'adaptive', which do not depend on it"
        )
    stage = states[id(optimizer)]["stage"]
    return bool(stage.name == "UNSCALED")
