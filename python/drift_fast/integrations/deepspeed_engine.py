"""DeepSpeed: inject inside `engine.step()`, after gradients are reduced, before they are clipped.

Under ZeRO a parameter's `grad` is gone after backward, and DeepSpeed clips inside its optimizer's
own step, which the engine calls at accumulation boundaries only. So that method is wrapped, on the
instance: nothing else of DeepSpeed's control flow is touched. At stage 0 in float32 the engine
clips before that, in `clip_fp32_gradients`, which is wrapped instead where clipping is on.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from drift_fast.delta.protocol import DeltaLike
from drift_fast.errors import DriftError
from drift_fast.inject.config import ConfigLike, InjectionConfig
from drift_fast.inject.driver import Driver, Handle
from drift_fast.inject.injection import Injection
from drift_fast.inject.lora.shard import shards_of_targets
from drift_fast.inject.optimizer_watch import OptimizerWatch
from drift_fast.inject.scope import Scope
from drift_fast.inject.shards import zero
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.shards.find import all_processes
from drift_fast.inject.shards.zero_support import WIDER, optimizer_of
from drift_fast.inject.step_scope import StepScope
from drift_fast.inject.target import Target
from drift_fast.integrations.wrapped_method import WrappedMethod


class EngineDriver(Driver):
    """A DeepSpeed engine, which injects by itself."""

    runs_by_itself = (
        "under DeepSpeed the injection runs by itself inside engine.step(); do not call step()"
    )

    wider = WIDER

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self._engine = engine
        self._engine_optimizer = optimizer_of(engine)

    @property
    def stepping(self) -> torch.optim.Optimizer | None:
        inner = getattr(self._engine_optimizer, "optimizer", self._engine_optimizer)
        return inner if isinstance(inner, torch.optim.Optimizer) else None

    def check(self, config: InjectionConfig) -> None:
        check_step_scope(config)

    def processes(self, model: nn.Module) -> tuple[Any, ...]:
        return all_processes()

    def shards(self, model: nn.Module, targets: Sequence[Target]) -> list[Shard]:
        find = functools.partial(zero.shards, optimizer=self._engine_optimizer)
        return shards_of_targets(targets, find)

    def loss_scale(self, device: torch.device) -> torch.Tensor | float | None:
        factor = zero.gradient_factor(self._engine_optimizer)
        return None if factor == 1.0 else factor

    def start(self, scope: Scope) -> list[Handle]:
        assert isinstance(scope, StepScope)
        running = False

        def inject(*arguments: Any, **keywords: Any) -> Any:
            nonlocal running
            if not scope.groups:
                return method.original(*arguments, **keywords)
            zero.settle(self._engine_optimizer)
            scope.step()
            running = True
            try:
                result = method.original(*arguments, **keywords)
            finally:
                running = False
            # What stepped may have been copies of the targets.
            scope.watchdog.use_all()
            if getattr(self._engine_optimizer, "overflow", False):
                # DeepSpeed found infinity, threw the gradients away and lowers its loss scale.
                scope.take_back()
            return result

        def before_step(optimizer: torch.optim.Optimizer) -> None:
            # What DeepSpeed's optimizer steps are copies of the targets, which the watchdog does
            # not know.
            if optimizer is getattr(self._engine_optimizer, "optimizer", None) and not running:
                raise DriftError(
                    f"nothing was injected before this step of {type(optimizer).__name__}: the "
                    "engine's optimizer stepped past the injection (was its step replaced after "
                    "attaching?); attach last, or call injection.remove() to train without it"
                )
            scope.before_use(optimizer)

        bare = isinstance(self._engine_optimizer, torch.optim.Optimizer)
        if bare and self._engine.gradient_clipping() > 0:
            method = WrappedMethod(self._engine, "clip_fp32_gradients", inject)
        else:
            method = WrappedMethod(self._engine_optimizer, "step", inject)
        return [OptimizerWatch(before_step), method]


def check_step_scope(config: InjectionConfig) -> None:
    """Refuse options that need gradients inside backward.

    Raises:
        DriftError: such an option.
    """
    if config.scope != "step" or config.overlap:
        raise DriftError(
            'DeepSpeed takes gradients away during backward: use scope="step" and overlap=False'
        )


def attach_engine(
    engine: Any,
    delta: DeltaLike | str | os.PathLike[str],
    config: ConfigLike = None,
    **options: Any,
) -> Injection:
    """Attach to what `deepspeed.initialize` returned; it injects in every `engine.step()`.

    Every rank must attach, with the same options. The injection changes the reduced, accumulated
    gradient before DeepSpeed clips it; a step that DeepSpeed skips, because a float16 gradient
    overflowed, does not count. `remove()` gives DeepSpeed its method back.

    Args:
        config, options: those of `Injection`, except for `optimizer` and `scaler`.

    Raises:
        TypeError: not a DeepSpeed engine.
        DriftError: a kind of training that is not supported, named, with a remedy; or a scope or
            an overlap that DeepSpeed does not allow.
        ValueError: an optimizer or a scaler among the options.
        As `Injection`.
    """
    for name in ("optimizer", "scaler"):
        if options.pop(name, None) is not None:
            raise ValueError(f"a DeepSpeed engine has its own {name}; leave {name}=… out")
    config = InjectionConfig.resolve(config, options, function="attach")
    driver = EngineDriver(engine)
    return Injection(engine.module, delta, config, driver=driver)
