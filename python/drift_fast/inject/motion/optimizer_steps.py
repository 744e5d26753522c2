"""When the targets were stepped: by torch's optimizers, or by DeepSpeed's.

Owns the hooks that a planned motion runs on, and the guard that fails a run in which an optimizer
steps twice with no motion between. A step that was left out for an overflow does not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from drift_fast.errors import DriftError
from drift_fast.inject.shards import zero


def parameters_of_optimizer(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class OptimizerSteps:
    """Steps of every torch optimizer that holds a target; `given` is the one that was named.

    `stepped` is called after each. What moves the weights calls `moved`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        given: torch.optim.Optimizer | None,
        stepped: Callable[[torch.optim.Optimizer], None],
    ) -> None:
        self.given = given
        self._ids = {id(parameter) for parameter in parameters}
        self._call = stepped
        self._done = False
        # How often the weights were moved: so far, and when an optimizer began its current and its
        # last step. An optimizer that wraps another steps around it, and may end after a move.
        self._moves = 0
        self._beginning: Any = weakref.WeakKeyDictionary()
        self._begun: Any = weakref.WeakKeyDictionary()
        self._fresh = False

    @property
    def fresh(self) -> bool:
        """Whether an optimizer has stepped since the weights were moved."""
        return self._fresh

    def start(self) -> None:
        """Start following steps, as long as this lives: hooks are global, and keep nothing."""
        found = weakref.ref(self)

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            steps = found()
            if steps is not None:
                steps._before(optimizer)

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            steps = found()
            if steps is not None:
                steps._after(optimizer)

        handles = [
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(after),
        ]
        self._finalizer = weakref.finalize(self, _remove, handles)
        self._finalizer.atexit = False

    def moved(self, *, done: bool) -> None:
        """Note that the weights were moved, for the last time if `done`."""
        self._moves += 1
        self._fresh, self._done = False, done

    def restart(self, *, done: bool) -> None:
        """Forget all steps, as before the first."""
        self._fresh, self._done = False, done
        self._beginning.clear()
        self._begun.clear()

    def release(self) -> None:
        """Stop following steps. May be called twice."""
        self._finalizer()

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        """Fail an optimizer's second step if nothing was moved since its first."""
        if self._done or self._ids.isdisjoint(parameters_of_optimizer(optimizer)):
            return
        if self._begun.get(optimizer) != self._moves:
            self._beginning[optimizer] = self._moves
            return
        if self.given is None:
            remedy = "call motion.step() after each optimizer.step(), or attach with optimizer=…"
        else:
            remedy = (
                f"it is not the {type(self.given).__name__} that was given as optimizer=…; give "
                "the one that trains"
            )
        raise DriftError(
            f"{type(optimizer).__name__} steps again, and the weights were not moved after its "
            f"last step: {remedy}; or call motion.remove() to train without it"
        )

    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        if self._done or self._ids.isdisjoint(parameters_of_optimizer(optimizer)):
            return
        if _was_left_out(optimizer):
            return
        self._begun[optimizer] = self._beginning.pop(optimizer, self._moves)
        self._fresh = True
        self._call(optimizer)


class EngineSteps:
    """Steps of a DeepSpeed engine's optimizer, which holds parts of all targets.

    `advance` is called after each, and moves the weights that each rank owns.
    """

    fresh = True

    def __init__(self, optimizer: Any, advance: Callable[[], None]) -> None:
        self.given = optimizer
        self._advance = advance
        self._following = False
        self._replaced: Any = None
        self._wrapper: Any = None

    def start(self) -> None:
        """Start following steps."""
        original = self.given.step

        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            # Other code may have wrapped this step, and call it after it was released.
            if self._following and not bool(getattr(self.given, "overflow", False)):
                self._advance()
            return result

        self._following = True
        self._replaced = self.given.__dict__.get("step")
        self._wrapper = self.given.step = step

    def moved(self, *, done: bool) -> None:
        """Give every rank the weights that their owners moved."""
        zero.publish(self.given)

    def restart(self, *, done: bool) -> None:
        """Nothing is kept from step to step."""

    def release(self) -> None:
        """Stop following steps, and restore the optimizer's own step if nobody has wrapped it."""
        self._following = False
        if self._wrapper is None or self.given.__dict__.get("step") is not self._wrapper:
            return
        if self._replaced is None:
            del self.given.step
        else:
            self.given.step = self._replaced


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()


def _was_left_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer has left its step out, as a scaler says on the device.

    Other optimizers are not called by a scaler that finds infinity. Only with a scaler does this
    wait for the device, as the scaler itself does for other optimizers.
    """
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.item())
