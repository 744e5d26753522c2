"""The Hugging Face Trainer: inject after the last micro-batch, before clipping; log, save, resume.

Trainer clips right after `training_step` and gives callbacks no sight of the trainer, so the
method itself is wrapped, on the instance. Subclasses (TRL's SFTTrainer) are served alike. FSDP and
DeepSpeed wrap the model when training starts, so there the injection attaches itself then.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from drift_fast.errors import DriftError, DriftWarning
from drift_fast.inject.config import TargetOptions
from drift_fast.inject.injection import Injection
from drift_fast.inject.predict import Forecast
from drift_fast.inject.targets import DeltaLike, find_targets, opened
from drift_fast.inject.telemetry import append_rows
from drift_fast.integrations.deepspeed_engine import EngineInjection

logger = logging.getLogger(__name__)

# Where the trainer's state, which every checkpoint holds, keeps that of the injection.
_KEY = "drift_fast.Injection"
# Weights that were not loaded lie at λ = 0 but for rounding; no step takes back nine tenths of λ.
_NOTICEABLE = 1e-4
_KEPT = 0.1


class _Driven(Injection):
    """What is the same however the gradients are reached; `_start` attaches to the model."""

    def __init__(self, trainer: Any, delta: DeltaLike, options: dict[str, Any]) -> None:
        self._trainer = trainer
        self._csv = options.pop("csv", None)
        self._trainer_scaler = getattr(trainer.accelerator, "scaler", None)
        if self._trainer_scaler is not None and options.get("scope") == "microbatch":
            raise DriftError(
                "scope='microbatch' under float16 would inject into scaled gradients; train in "
                "bfloat16, or use scope='step'"
            )
        if options.get("total_steps") is None and trainer.args.max_steps > 0:
            options["total_steps"] = trainer.args.max_steps
        self._delta = opened(delta)
        self._options = options
        self._forecast: Forecast | None = None
        self._drive: list[float] = []
        self._checked = self._removed = False
        self._groups, self._targets, self._handles = [], [], []
        self._overlap = None
        if self._must_wait():
            self._look_ahead()
        else:
            self._start(trainer.model)
        self._original_step = trainer.training_step
        self._original_log = trainer.log
        self._wrappers = {"training_step": self._training_step, "log": self._log}
        self._before = {name: trainer.__dict__.get(name) for name in self._wrappers}
        for name, wrapper in self._wrappers.items():
            setattr(trainer, name, wrapper)
        self._callback = _Callback(self)
        trainer.add_callback(self._callback)

    def remove(self) -> None:
        """Detach, and give the trainer its own methods back."""
        super().remove()
        self._removed = True
        for name, wrapper in self._wrappers.items():
            # Somebody may have wrapped it once more, and then calls this one, which passes it on.
            if self._trainer.__dict__.get(name) is wrapper:
                if self._before[name] is None:
                    delattr(self._trainer, name)
                else:
                    setattr(self._trainer, name, self._before[name])
        if self._callback in self._trainer.callback_handler.callbacks:
            self._trainer.remove_callback(self._callback)

    def __repr__(self) -> str:
        if not self._groups and not self._removed:
            return f"{type(self).__name__}(attaches when training starts)"
        return super().__repr__()

    # When it attaches.

    def _must_wait(self) -> bool:
        """Whether the parameters that train, or the length of the run, are not known yet."""
        sharded = self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled
        open_ended = self._options.get("total_steps") is None and any(
            self._options.get(name) is not None for name in ("schedule", "progress_target")
        )
        return bool(sharded or open_ended)

    def _look_ahead(self) -> None:
        """Refuse now what names and shapes already show."""
        names = ("modules", "layers", "mapping", "strict", "min_coverage")
        given = {name: self._options[name] for name in names if name in self._options}
        options = TargetOptions(**given)
        _, self.coverage = find_targets(self._trainer.model, self._delta, options)

    def _start(self, model: Any) -> None:
        Injection.__init__(self, model, self._delta, **self._options)

    def _begin_training(self, state: Any) -> None:
        """Attach, if not done yet, go on from a checkpoint, and start to forecast."""
        if not self._groups:
            self._options["total_steps"] = self._options.get("total_steps") or state.max_steps
            self._start(self._trained_model())
        saved = (state.stateful_callbacks or {}).get(_KEY)
        if state.global_step > 0 and isinstance(saved, Mapping):
            self.load_state_dict(saved)
            self._warn_of_lost_weights(state)
        elif state.global_step > 0:
            warnings.warn(
                f"the run resumes at step {state.global_step} from a checkpoint without the state "
                "of an injection: schedules start anew, and progress counts from here",
                DriftWarning,
                stacklevel=2,
            )
        elif self.steps > 0:
            # A second train(), or a batch size that did not fit and is tried again smaller.
            self._control.restart()
            logger.info("a run from the start: schedules start anew, λ counts from the attachment")
        self._drive = self._planned_drive(state.max_steps)
        if self._drive and self._drive[-1] > 0:
            cap = self._options.get("progress_target") or self._options.get("progress_cap")
            stops_at = float(cap) if isinstance(cap, int | float) and math.isfinite(cap) else None
            self._forecast = Forecast(self._drive[-1], stops_at=stops_at)

    def _warn_of_lost_weights(self, state: Any) -> None:
        """Warn where a resumed run has the weights that the run before it started from.

        The Trainer warns of missing keys and goes on where it does not find a checkpoint's weights
        under the model's own names. The run would then begin anew, late in its schedules.
        """
        logged = [row["drift/progress"] for row in state.log_history if "drift/progress" in row]
        # Every process has read the same log, so that all of them measure, or none.
        if not logged or abs(logged[-1]) < _NOTICEABLE:
            return
        found = self.metrics()["progress"]
        if abs(found) < _KEPT * abs(logged[-1]):
            warnings.warn(
                f"the run resumes at step {state.global_step} at λ = {found:.3g}, where λ = "
                f"{logged[-1]:.3g} was logged before: the checkpoint's weights were not loaded "
                "into the model. Look for the Trainer's warning of missing keys, load the model "
                "from the checkpoint, and resume once more",
                DriftWarning,
                stacklevel=2,
            )

    def _planned_drive(self, total: int) -> list[float]:
        """Return Σ of learning rate times the schedule's factor up to each step, in some unit.

        Progress grows with it. Where the learning rate's schedule is no function of the step, it is
        taken as constant.
        """
        alpha = self.alpha
        if not (any(alpha.values()) if isinstance(alpha, dict) else alpha):
            return []
        scheduler = self._trainer.lr_scheduler
        rates = getattr(getattr(scheduler, "scheduler", scheduler), "lr_lambdas", None)
        rate = rates[0] if rates else lambda step: 1.0
        return list(accumulate(rate(at) * abs(self._control.factor(at)) for at in range(total)))

    def _trained_model(self) -> Any:
        return self._trainer.model_wrapped

    def _save_to(self, state: Any) -> None:
        if self._groups:
            state.stateful_callbacks[_KEY] = self.state_dict()

    # What the trainer calls.

    def _training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._removed:
            plain: torch.Tensor = self._original_step(model, *args, **kwargs)
            return plain
        if not self._groups:
            raise DriftError(
                "this trainer trains without having called on_train_begin, at which the injection "
                "attaches to the wrapped model, so nothing would be injected; use "
                "Injection(model, delta, …) in this loop"
            )
        if not self._checked:
            self._check_model(model)
        final = self._trainer.accelerator.sync_gradients
        if final:
            loss: torch.Tensor = self._original_step(model, *args, **kwargs)
            self._after_backward()
        else:
            with self.accumulating():
                loss = self._original_step(model, *args, **kwargs)
        return loss

    def _after_backward(self) -> None:
        if self._scope == "step":
            self.step()

    def _check_model(self, model: nn.Module) -> None:
        """Refuse a model whose parameters are no longer those that were attached to."""
        held = {id(parameter) for parameter in model.parameters()}
        lost = [target.name for target in self._targets if id(target.parameter) not in held]
        if lost:
            raise DriftError(
                f"{len(lost)} of {len(self._targets)} targets are no longer parameters of the "
                f"model that trains, {lost[0]} first: it was wrapped or replaced after attaching. "
                "Attach to the trainer that trains it, or after it was wrapped"
            )
        self._checked = True

    def _loss_scale(self, device: torch.device) -> torch.Tensor | float | None:
        # Trainer unscales only when it clips, which is after training_step.
        if self._trainer_scaler is None:
            return None
        scale: torch.Tensor = self._trainer_scaler.scale(torch.ones((), device=device))
        return scale

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Evaluation and the closing summary are logged through the same method.
        if "loss" in logs and self._groups:
            logs = logs | self._summary()
        self._original_log(logs, *args, **kwargs)

    def _summary(self) -> dict[str, float]:
        metrics = self.summary()
        step = self._trainer.state.global_step
        if self._forecast is not None and 0 < step <= len(self._drive):
            final = self._forecast.see(metrics["progress"], self._drive[step - 1])
            if final is not None:
                metrics["predicted_progress"] = final
        if self._csv is not None and self._trainer.is_world_process_zero():
            append_rows(self._csv, step, metrics)
        return {f"drift/{key}": value for key, value in metrics.items()}


class TrainerInjection(_Driven):
    """An injection that a Trainer's own loop drives."""


class TrainerEngineInjection(_Driven, EngineInjection):
    """The same under DeepSpeed, which injects inside its engine's step."""

    def _start(self, model: Any) -> None:
        EngineInjection.__init__(self, model, self._delta, self._options)

    def _trained_model(self) -> Any:
        return self._trainer.accelerator.deepspeed_engine_wrapped.engine

    def _loss_scale(self, device: torch.device) -> torch.Tensor | float | None:
        return EngineInjection._loss_scale(self, device)

    def _after_backward(self) -> None:
        # Accelerate steps the engine, and so injects, inside backward.
        pass

    def _check_model(self, model: nn.Module) -> None:
        self._checked = True


class _Callback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Tells the injection when training starts and when a checkpoint is about to be written."""

    def __init__(self, injection: _Driven) -> None:
        self._injection = injection

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._injection._begin_training(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._injection._save_to(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._injection._save_to(state)


def attach_trainer(trainer: Any, delta: DeltaLike, options: dict[str, Any]) -> Injection:
    """Attach to a Trainer before `train()` is called."""
    if "training_step" in trainer.__dict__:
        raise DriftError(
            "this trainer's training_step is wrapped already; remove() the injection there first"
        )
    kind = TrainerEngineInjection if trainer.is_deepspeed_enabled else TrainerInjection
    return kind(trainer, delta, dict(options))
