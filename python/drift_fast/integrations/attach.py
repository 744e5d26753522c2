"""Attach an injection to what other libraries own: one entry, `attach`, that knows by type."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drift_fast.delta.protocol import DeltaLike
from drift_fast.errors import DriftError
from drift_fast.inject.config import ConfigLike, InjectionConfig
from drift_fast.inject.driver import Driver
from drift_fast.inject.injection import Injection
from drift_fast.inject.scope import Scope
from drift_fast.inject.shards.find import all_processes, processes_of
from drift_fast.inject.shards.reduction import Reduction
from drift_fast.options import takes

if TYPE_CHECKING:
    from typing import Unpack

    from drift_fast._keywords import InjectionKeywords
    from drift_fast.integrations.hf_trainer import TrainerInjection


@takes(InjectionConfig)
def attach(
    trainer_or_optimizer: Any,
    delta: DeltaLike | str | os.PathLike[str],
    config: ConfigLike = None,
    *,
    model: nn.Module | None = None,
    scaler: torch.amp.GradScaler | None = None,
    csv: str | os.PathLike[str] | None = None,
    **options: Unpack[InjectionKeywords],
) -> Injection | TrainerInjection:
    """Attach an injection to a Hugging Face `Trainer`, a DeepSpeed engine, or a torch optimizer.

    With a `Trainer` (or a subclass) the injection runs in `training_step` whenever gradients are
    complete: after the last micro-batch, before clipping. Under FSDP and DeepSpeed it attaches
    itself when training starts, to the model as it was wrapped; what names and shapes show is
    refused at once. Progress along Δ joins the training logs under `drift/…`, eight metrics unless
    `log="all"`, and all of them go to a file with `csv="metrics.csv"`. Each start of training says
    how long the run is, unless `total_steps` does, and which model trains, as with `model_init`;
    checkpoints hold the injection's state, so that a resumed run goes on with its schedule. One
    whose weights the trainer did not load is refused. `remove()` restores the trainer.

    With the engine that `deepspeed.initialize` returned the injection runs inside `engine.step()`.

    With an optimizer, and the `model` it trains, the injection runs at the start of
    `optimizer.step()`, or after each call of the closure that it is given. That is after any
    clipping, which a loop of one's own does better: call
    `Injection(model, delta, …).step()` before clipping instead where that is possible.

    Args:
        trainer_or_optimizer: what steps the model.
        delta: an open `Delta`, one that streams, or the directory, Hub id or URL of one.
        config: an `InjectionConfig`, or the path of a YAML or JSON file of its options; options
            given as keywords win over it.
        model: the model that an optimizer trains; trainers and engines have their own.
        scaler: the gradient scaler used with an optimizer; trainers and engines have their own.
        csv: a file for a Trainer's logged metrics. One of an earlier run is renamed, unless this
            run resumes it.
        options: those of `InjectionConfig`, listed below.

    Raises:
        TypeError: none of these.
        Exception: as `Injection`.
    """
    owner = trainer_or_optimizer
    is_optimizer = isinstance(owner, torch.optim.Optimizer)
    everyone = Reduction(processes_of(model) if is_optimizer else all_processes())
    undo = contextlib.ExitStack()
    with everyone.together(undo.close):
        config = InjectionConfig.resolve(config, options, function="attach")
        attached = _attached(owner, delta, config, model, scaler, csv)
        undo.callback(attached.remove)
    return attached


def _attached(
    owner: Any,
    delta: DeltaLike | str | os.PathLike[str],
    config: InjectionConfig,
    model: nn.Module | None,
    scaler: torch.amp.GradScaler | None,
    csv: str | os.PathLike[str] | None,
) -> Injection | TrainerInjection:
    """Attach to what owns the steps, by its type."""
    if isinstance(owner, torch.optim.Optimizer):
        if model is None:
            raise ValueError("attach(optimizer, delta) needs the model it trains: pass model=…")
        _refuse("an optimizer logs nothing; call Injection.write_csv, and", csv=csv)
        return Injection(model, delta, config, driver=OptimizerDriver(owner, scaler))
    if type(owner).__name__ == "DeepSpeedEngine" or hasattr(owner, "zero_optimization_stage"):
        from drift_fast.integrations.deepspeed_engine import attach_engine

        _refuse("an engine has its own model and scaler;", model=model, scaler=scaler)
        _refuse("an engine logs nothing; call Injection.write_csv, and", csv=csv)
        return attach_engine(owner, delta, config)
    if hasattr(owner, "training_step") and hasattr(owner, "accelerator"):
        from drift_fast.integrations.hf_trainer import attach_trainer

        _refuse("a trainer has its own model and scaler;", model=model, scaler=scaler)
        return attach_trainer(owner, delta, config, csv=csv)
    remedy = "in a loop of one's own, use drift_fast.Injection"
    if type(owner).__module__.split(".")[0] in ("lightning", "pytorch_lightning"):
        remedy = (
            "with Lightning pass callbacks=[DriftCallback(delta, …)] of "
            "drift_fast.integrations.lightning to its Trainer"
        )
    kind = f"{type(owner).__module__}.{type(owner).__qualname__}"
    raise TypeError(
        f"expected a transformers Trainer, a DeepSpeed engine or a torch optimizer, got {kind}; "
        f"{remedy}"
    )


class OptimizerDriver(Driver):
    """An optimizer whose step injects first."""

    def check(self, config: InjectionConfig) -> None:
        self._injects = config.scope == "step"
        if self.scaler is not None and config.scale == "absolute":
            raise DriftError(
                "scale='absolute' cannot follow a scaler from inside optimizer.step(): use "
                "Injection(model, delta, …).step() in the loop"
            )

    def before_use(self, scope: Scope, optimizer: torch.optim.Optimizer) -> None:
        # Any optimizer of the targets: the one that was attached to may be in another, or hold one.
        if self._injects and scope.would_use_plain(optimizer):
            scope.step()
        scope.before_use(optimizer)


def _refuse(why: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{why} leave {name}=… out")
