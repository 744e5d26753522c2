"""The Hugging Face Trainer: inject after the last micro-batch, before clipping, and log progress.

Trainer clips right after `training_step` and gives callbacks no sight of the trainer, so the
method itself is wrapped, on the instance. Subclasses (TRL's SFTTrainer) are served alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.injection import Injection
from drift_fast.inject.targets import DeltaLike
from drift_fast.select import kind_of


class TrainerInjection(Injection):
    """An injection that a Trainer's own loop drives."""

    def __init__(self, trainer: Any, delta: DeltaLike, options: dict[str, Any]) -> None:
        self._trainer = trainer
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and options.get("scope") == "microbatch":
            raise DriftError(
                "scope='microbatch' under float16 would inject into scaled gradients; train in "
                "bfloat16, or use scope='step'"
            )
        super().__init__(trainer.model, delta, **options)
        self._trainer_scaler = scaler
        self._checked = False
        self._original_step = trainer.training_step
        self._original_log = trainer.log
        trainer.training_step = self._training_step
        trainer.log = self._log

    def remove(self) -> None:
        """Detach, and give the trainer its own methods back."""
        super().remove()
        for name in ("training_step", "log"):
            self._trainer.__dict__.pop(name, None)

    def _training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._checked:
            self._check_model(model)
        loss: torch.Tensor = self._original_step(model, *args, **kwargs)
        if self._trainer.accelerator.sync_gradients and self._scope == "step":
            self.step()
        return loss

    def _check_model(self, model: nn.Module) -> None:
        """Refuse a model whose parameters are no longer those that were attached to."""
        held = {id(parameter) for parameter in model.parameters()}
        lost = [target.name for target in self._targets if id(target.parameter) not in held]
        if lost:
            raise DriftError(
                f"{len(lost)} of {len(self._targets)} targets are no longer parameters of the "
                f"model that trains, {lost[0]} first: it was wrapped or replaced after attaching. "
                "Sharded training (FSDP, ZeRO-3) is not supported by this version"
            )
        if self._trainer.is_deepspeed_enabled:
            raise DriftError(
                "the trainer runs DeepSpeed, which keeps gradients in buffers of its own; this "
                "version injects into parameters' gradients: train with DDP or on one device"
            )
        self._checked = True

    def _loss_scale(self, device: torch.device) -> torch.Tensor | None:
        # Trainer unscales only when it clips, which is after training_step.
        if self._trainer_scaler is None or self._scale != "absolute":
            return None
        scale: torch.Tensor = self._trainer_scaler.scale(torch.ones((), device=device))
        return scale

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Evaluation and the closing summary are logged through the same method.
        if "loss" in logs and self._groups:
            logs = logs | self._summary()
        self._original_log(logs, *args, **kwargs)

    def _summary(self) -> dict[str, float]:
        metrics = self.metrics()
        summary = {
            f"drift/{key}": metrics[key]
            for key in ("progress", "alpha", "relative_push", "skipped")
            if key in metrics
        }
        moved: dict[str, list[float]] = {}
        for group in self._groups:
            for target, square in zip(group.targets, group.squares(), strict=True):
                sums = moved.setdefault(kind_of(target.delta_name), [0.0, 0.0])
                sums[0] += metrics[f"progress/{target.name}"] * square
                sums[1] += square
        return summary | {f"drift/progress/{kind}": a / b for kind, (a, b) in moved.items()}


def attach_trainer(trainer: Any, delta: DeltaLike, options: dict[str, Any]) -> Injection:
    """Attach to a Trainer before `train()` is called."""
    if "training_step" in trainer.__dict__:
        raise DriftError(
            "this trainer's training_step is wrapped already; remove() the injection there first"
        )
    return TrainerInjection(trainer, delta, options)
