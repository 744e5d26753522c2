"""DeepSpeed: inject inside `engine.step()`, after gradients are reduced, before they are clipped.

Under ZeRO a parameter's `grad` is gone after backward, and DeepSpeed clips inside its optimizer's
own step, which the engine calls at accumulation boundaries only. So that method is wrapped, on the
instance: nothing else of DeepSpeed's control flow is touched. At stage 0 in float32 the engine
clips before that, in `clip_fp32_gradients`, which is wrapped instead where clipping is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.injection import Injection
from drift_fast.inject.shards import zero
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.shards.zero_support import optimizer_of
from drift_fast.inject.targets import DeltaLike, Target


class EngineInjection(Injection):
    """An injection that a DeepSpeed engine drives; there is nothing to call."""

    def __init__(self, engine: Any, delta: DeltaLike, options: dict[str, Any]) -> None:
        for name in ("optimizer", "scaler"):
            if options.get(name) is not None:
                raise ValueError(f"a DeepSpeed engine has its own {name}; leave {name}=… out")
        self._engine_optimizer = optimizer_of(engine)
        self._running = False
        if options.get("scope", "step") != "step" or options.get("overlap", False):
            raise DriftError(
                'DeepSpeed takes gradients away during backward: use scope="step" and overlap=False'
            )
        super().__init__(engine.module, delta, **options)
        bare = isinstance(self._engine_optimizer, torch.optim.Optimizer)
        if bare and engine.gradient_clipping() > 0:
            self._wrapped: tuple[Any, str] = (engine, "clip_fp32_gradients")
        else:
            self._wrapped = (self._engine_optimizer, "step")
        owner, name = self._wrapped
        self._original = getattr(owner, name)
        self._replaced = owner.__dict__.get(name)
        self._wrapper = self._inside
        setattr(owner, name, self._wrapper)

    def step(self) -> None:
        """Refuse: the injection runs by itself.

        Raises:
            DriftError: always.
        """
        raise DriftError(
            "under DeepSpeed the injection runs by itself inside engine.step(); do not call step()"
        )

    def remove(self) -> None:
        """Detach, and give DeepSpeed its own method back."""
        super().remove()
        if not hasattr(self, "_wrapped"):
            return
        owner, name = self._wrapped
        # Somebody may have wrapped it once more, and then calls this one, which passes it on.
        if owner.__dict__.get(name) is self._wrapper:
            if self._replaced is None:
                delattr(owner, name)
            else:
                setattr(owner, name, self._replaced)

    def _inside(self, *arguments: Any, **keywords: Any) -> Any:
        if not self._groups:
            return self._original(*arguments, **keywords)
        zero.settle(self._engine_optimizer)
        super().step()
        self._running = True
        try:
            result = self._original(*arguments, **keywords)
        finally:
            self._running = False
        # Some gradients stay in place from step to step, zeroed.
        self._pending = None
        if getattr(self._engine_optimizer, "overflow", False):
            # DeepSpeed found infinity, threw the gradients away and lowers its loss scale.
            self._control.undo()
            self._record.begin(0)
        return result

    def _watch(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # What DeepSpeed's optimizer steps are copies of the targets, which the record cannot know.
        if optimizer is getattr(self._engine_optimizer, "optimizer", None) and not self._running:
            raise DriftError(
                f"nothing was injected before this step of {type(optimizer).__name__}: the "
                "engine's optimizer stepped past the injection (was its step replaced after "
                "attaching?); attach last, or call injection.remove() to train without it"
            )
        super()._watch(optimizer, args, kwargs)

    def _shards(self, model: nn.Module, targets: Sequence[Target]) -> list[Shard]:
        return zero.shards(
            [target.name for target in targets],
            [target.parameter for target in targets],
            self._engine_optimizer,
        )

    def _loss_scale(self, device: torch.device) -> torch.Tensor | float | None:
        factor = zero.gradient_factor(self._engine_optimizer)
        return None if factor == 1.0 else factor


def attach_engine(engine: Any, delta: DeltaLike, options: dict[str, Any]) -> Injection:
    """Attach to what `deepspeed.initialize` returned; it injects in every `engine.step()`.

    Every rank must attach, with the same options. The injection changes the reduced, accumulated
    gradient before DeepSpeed clips it; a step that DeepSpeed skips, because a float16 gradient
    overflowed, does not count. `remove()` gives DeepSpeed its method back.

    Args:
        options: those of `Injection` but `optimizer` and `scaler`.

    Raises:
        TypeError: not a DeepSpeed engine.
        DriftError: a kind of training that is not supported, named, with a remedy; or a scope or
            an overlap that DeepSpeed does not allow.
        ValueError: an optimizer or a scaler among the options.
        As `Injection`.
    """
    return EngineInjection(engine, delta, options)
