"""When an optimizer is about to use gradients: at its step, or after each call of its closure.

Owns the hooks on all torch optimizers of the process. They keep nothing alive: a watch that was
dropped is removed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

Use = Callable[[torch.optim.Optimizer], None]


class OptimizerWatch:
    """Calls `use` with every optimizer that is about to use its gradients, until removed.

    A closure computes gradients inside `step(closure)`, so there `use` runs after the closure,
    each time that the optimizer calls it.
    """

    def __init__(self, use: Use) -> None:
        self._use = use
        # Hooks are global. Through this reference they do not keep the model alive.
        found = weakref.ref(self)

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
            watch = found()
            return None if watch is None else watch._before(optimizer, args, kwargs)

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            watch = found()
            if watch is not None:
                watch._after(optimizer, args, kwargs)

        handles = (
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(after),
        )
        self._finalizer = weakref.finalize(self, _remove, handles)
        self._finalizer.atexit = False

    def remove(self) -> None:
        """Stop watching. May be called twice."""
        self._finalizer()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        closure = _closure(args, kwargs)
        if closure is None:
            self._use(optimizer)
            return None
        watched = _Watched(closure, self, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # An optimizer may leave its closure alone, and has then used what was there.
        closure = _closure(args, kwargs)
        while isinstance(closure, _Watched):
            if closure.watch is self and not closure.called:
                self._use(optimizer)
            closure = closure.closure


class _Watched:
    """A closure after which gradients are about to be used."""

    def __init__(
        self,
        closure: Callable[..., Any],
        watch: OptimizerWatch,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        functools.update_wrapper(self, closure)
        self.closure = closure
        self.watch = watch
        self.called = False
        self._optimizer = optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.closure(*args, **kwargs)
        self.called = True
        self.watch._use(self._optimizer)
        return result


def _closure(args: Any, kwargs: Any) -> Callable[..., Any] | None:
    """Return the closure among the arguments of `step`, of which the first is the optimizer."""
    found = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return found if callable(found) else None


def _remove(handles: tuple[Any, ...]) -> None:
    for handle in handles:
        handle.remove()
