"""Attach an injection to what other libraries own: one entry, `attach`, that knows by type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.injection import Injection, unwrap_optimizer
from drift_fast.inject.targets import DeltaLike


def attach(
    trainer_or_optimizer: Any,
    delta: DeltaLike,
    *,
    model: nn.Module | None = None,
    **options: Any,
) -> Injection:
    """Attach an injection to a Hugging Face `Trainer`, a DeepSpeed engine, or a torch optimizer.

    With a `Trainer` (or a subclass) the injection runs in `training_step` whenever gradients are
    complete: after the last micro-batch, before clipping. Under FSDP and DeepSpeed it attaches
    itself when training starts, to the model as it was wrapped; what names and shapes show is
    refused at once. Progress along Δ joins the training logs under `drift/…`, and a file too with
    `csv="metrics.csv"`; the length of the run is known, and checkpoints hold the injection's state,
    so that a resumed run goes on with its schedule. `remove()` restores the trainer.

    With the engine that `deepspeed.initialize` returned the injection runs inside `engine.step()`.

    With an optimizer, and the `model` it trains, the injection runs at the start of
    `optimizer.step()`. That is after any clipping, which a loop of one's own does better: call
    `Injection(model, delta, …).step()` before clipping instead where that is possible.

    Args:
        options: those of `Injection`.

    Raises:
        TypeError: none of these.
        As `Injection`.
    """
    if isinstance(trainer_or_optimizer, torch.optim.Optimizer):
        if model is None:
            raise ValueError("attach(optimizer, delta) needs the model it trains: pass model=…")
        return _attach_optimizer(unwrap_optimizer(trainer_or_optimizer), delta, model, options)
    if type(trainer_or_optimizer).__name__ == "DeepSpeedEngine" or hasattr(
        trainer_or_optimizer, "zero_optimization_stage"
    ):
        from drift_fast.integrations.deepspeed_engine import attach_engine

        if model is not None:
            raise ValueError("an engine has its own model; leave model=… out")
        return attach_engine(trainer_or_optimizer, delta, options)
    if hasattr(trainer_or_optimizer, "training_step") and hasattr(
        trainer_or_optimizer, "accelerator"
    ):
        from drift_fast.integrations.hf_trainer import attach_trainer

        if model is not None:
            raise ValueError("a trainer has its own model; leave model=… out")
        return attach_trainer(trainer_or_optimizer, delta, options)
    raise TypeError(
        "expected a transformers Trainer, a DeepSpeed engine or a torch optimizer, got "
        f"{type(trainer_or_optimizer).__name__}; in a loop of one's own, use drift_fast.Injection"
    )


class _OptimizerInjection(Injection):
    """Runs by itself when its optimizer steps."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        delta: DeltaLike,
        model: nn.Module,
        options: dict[str, Any],
    ) -> None:
        super().__init__(model, delta, optimizer=optimizer, **options)

    def _watch(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # torch runs hooks of all optimizers before those of one, so the injection happens here,
        # in the same hook as the check that it did.
        if optimizer is self._optimizer and self._scope == "step" and not self._record.has_fresh():
            self.step()
        super()._watch(optimizer, args, kwargs)


def _attach_optimizer(
    optimizer: torch.optim.Optimizer,
    delta: DeltaLike,
    model: nn.Module,
    options: dict[str, Any],
) -> Injection:
    if "optimizer" in options:
        raise ValueError("the optimizer is given twice")
    if options.get("scaler") is not None and options.get("scale", "adaptive") == "absolute":
        raise DriftError(
            "scale='absolute' cannot follow a scaler from inside optimizer.step(): use "
            "Injection(model, delta, …).step() in the loop"
        )
    return _OptimizerInjection(optimizer, delta, model, options)
