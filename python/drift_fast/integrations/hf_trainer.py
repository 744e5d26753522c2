"""The Hugging Face Trainer: inject after the last micro-batch, before clipping; log, save, resume.

Trainer clips right after `training_step` and gives callbacks no sight of the trainer, so the
method itself is wrapped, on the instance. Subclasses (TRL's SFTTrainer) are served alike. FSDP and
DeepSpeed wrap the model when training starts, so there the injection attaches then.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from drift_fast.alignment.coverage import Coverage
from drift_fast.delta.delta import open_delta
from drift_fast.delta.protocol import DeltaLike
from drift_fast.errors import DriftError, DriftWarning
from drift_fast.inject.claims import refuse_second
from drift_fast.inject.config import InjectionConfig
from drift_fast.inject.driver import Driver, scale_of
from drift_fast.inject.forecast import Forecast
from drift_fast.inject.injection import Injection
from drift_fast.inject.refusals import check_adapted, check_trainable, check_trained
from drift_fast.inject.shards.find import all_processes
from drift_fast.inject.targets import find_targets
from drift_fast.inject.telemetry import append_rows, as_logged, csv_file, set_aside
from drift_fast.integrations.attached import AttachedInjection
from drift_fast.integrations.deepspeed_engine import EngineDriver
from drift_fast.integrations.trainer_run import (
    CheckpointedState,
    Wait,
    bare_model,
    check_ahead,
    check_doras_ahead,
    engine_of,
)
from drift_fast.integrations.wrapped_method import WrappedMethod

logger = logging.getLogger(__name__)

# Where the trainer's state, which every checkpoint holds, keeps that of the injection.
_KEY = "drift_fast.Injection"
# Weights that were not loaded have λ = 0 except for rounding; no step takes back nine tenths of it.
_NOTICEABLE = 1e-4
_KEPT = 0.1


class TrainerDriver(Driver):
    """A Trainer's own loop, which unscales gradients only when it clips, after `training_step`."""

    missed = (
        "train with trainer.train(), and attach after what replaces its training_step; in a loop "
        "that does not call it, call injection.step() between backward and optimizer.step()"
    )
    wider = (
        "Load the model with from_pretrained(…, dtype=torch.float32), since the default is the "
        "dtype that is stored, and pass bf16=True to the TrainingArguments, which computes in "
        "bfloat16"
    )

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        # The model keeps what drives its injection, and a Trainer keeps the model.
        self._trainer = weakref.ref(trainer)

    def processes(self, model: nn.Module) -> tuple[Any, ...]:
        # What DDP is about to wrap does not show it yet.
        return all_processes()

    def loss_scale(self, device: torch.device) -> torch.Tensor | float | None:
        # A search of hyperparameters builds an accelerator, and so a scaler, for each run.
        trainer = self._trainer()
        scaler = None if trainer is None else _scaler_of(trainer)
        return None if scaler is None else scale_of(scaler, device)


class TrainerInjection(AttachedInjection):
    """An injection that a Trainer's loop drives, under DeepSpeed that of its engine.

    `injection` is None while it waits for the start of training: under FSDP and DeepSpeed, where
    the length of the run must be known and is not, and where `model_init` builds the model. It is
    another one after a start at which another model, or another engine, trains.
    """

    def __init__(
        self,
        trainer: Any,
        delta: DeltaLike | str | os.PathLike[str],
        config: InjectionConfig,
        csv: str | os.PathLike[str] | None,
    ) -> None:
        self._trainer = trainer
        self._csv = None if csv is None else csv_file(csv)
        if _scaler_of(trainer) is not None and config.scope == "microbatch":
            raise DriftError(
                "scope='microbatch' under float16 would inject into scaled gradients; train in "
                "bfloat16, or use scope='step'"
            )
        self._config = config
        self._delta = open_delta(delta)
        self._forecast: Forecast | None = None
        self._drive: list[float] = []
        self._logged_step = 0
        self._checked = self._removed = False
        self._wait: Wait | None = None
        self._model: Any = None
        self._engine: Any = None
        check_ahead(trainer, config)
        # As far as it is known; each start of training has its own.
        length = config.total_steps or (trainer.args.max_steps if trainer.args.max_steps > 0 else 0)
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if (
            sharded
            or getattr(trainer, "model_init", None)
            or (config.needs_total_steps and not length)
        ):
            # What the model shows is refused now.
            targets, self._foreseen = find_targets(trainer.model, self._delta, config)
            check_trainable(targets, trainer.model, loaded=not sharded)
            check_trained(targets, trainer.model)
            check_adapted(targets, config)
            check_doras_ahead(trainer, targets)
            refuse_second(targets, trainer.model)
            self._wait = Wait(trainer, targets)
        else:
            self._start(trainer.model, length or None)
        self._step_method = WrappedMethod(trainer, "training_step", self._training_step)
        self._log_method = WrappedMethod(trainer, "log", self._log)
        self._saves = CheckpointedState(trainer, _KEY, self._state)
        self._callback = _Callback(self)
        trainer.add_callback(self._callback)

    @property
    def coverage(self) -> Coverage:
        """As `Injection.coverage`, and as far as names and shapes show it before that."""
        return self._foreseen if self.injection is None else self.injection.coverage

    def remove(self) -> None:
        """Detach, and give the trainer its own methods back."""
        super().remove()
        self._removed = True
        if self._wait is not None:
            self._wait.remove()
        self._step_method.remove()
        self._log_method.remove()
        self._saves.remove()
        if self._callback in self._trainer.callback_handler.callbacks:
            self._trainer.remove_callback(self._callback)

    def __repr__(self) -> str:
        state = "attaches when training starts" if self.injection is None else repr(self.injection)
        return f"TrainerInjection({state})"

    # When it attaches.

    def _start(self, model: nn.Module, length: int | None) -> None:
        """Attach to a model for a run of so many optimizer steps."""
        if self._wait is not None:
            self._wait.remove()
        driver: Driver = TrainerDriver(self._trainer)
        if self._trainer.is_deepspeed_enabled:
            self._engine = engine_of(self._trainer)
            model, driver = self._engine.module, EngineDriver(self._engine)
        config = replace(self._config, total_steps=length)
        self.injection = Injection(model, self._delta, config, driver=driver)
        self._model = bare_model(self._trainer)

    def _start_run(self, length: int) -> Injection:
        """Return what is attached to the model that trains now, planned over so many steps."""
        held, known = self.injection, None
        if held is not None:
            held.control.total_steps = length
            if not held.lost_from(self._trainer.model_wrapped) and (
                self._engine is engine_of(self._trainer)
            ):
                return held
            if self._model is bare_model(self._trainer):
                # The same weights under another wrapper: λ still counts from the attachment.
                known = held.state_dict()
            held.remove()
            self.injection = None
        self._start(self._trainer.model_wrapped, length)
        injection = self._started()
        if held is not None and held.alpha != injection.alpha:
            # It was set since.
            injection.alpha = held.alpha
        if held is not None and known is not None and held.targets == injection.targets:
            injection.load_state_dict(known)
        return injection

    def begin_training(self, state: Any) -> None:
        """Attach to what trains in this run, go on from a checkpoint, and start to forecast."""
        self._checked = False
        injection = self._start_run(self._config.total_steps or state.max_steps)
        saved = self._saves.found_in(state)
        if state.global_step > 0 and saved is not None:
            injection.load_state_dict(saved)
            self._check_loaded_weights(state)
        elif injection.steps > 0:
            # A second train(), or a batch size that did not fit and is tried again smaller.
            injection.control.restart()
            logger.info("a run from the start: schedules start anew, λ counts from the attachment")
        if state.global_step > 0 and saved is None:
            self._saves.refuse_unloaded(state.global_step)
            warnings.warn(
                f"the run resumes at step {state.global_step} from a checkpoint without the state "
                "of an injection: schedules start anew, and progress counts from the attachment",
                DriftWarning,
                stacklevel=2,
            )
        if state.global_step == 0 and self._csv is not None and state.is_world_process_zero:
            set_aside(self._csv)
        self._forecast, self._drive, self._logged_step = None, [], state.global_step
        self._look_ahead(injection, state.max_steps)

    def _state(self) -> dict[str, Any] | None:
        return self.state_dict() if self._is_active else None

    @property
    def _is_active(self) -> bool:
        return self.injection is not None and not self._removed

    def _check_loaded_weights(self, state: Any) -> None:
        """Refuse, or warn of, a resumed run with the weights that the run before it started from.

        The Trainer warns of missing keys and goes on where it does not find a checkpoint's weights
        under the model's own names. The run would then begin anew, late in its schedules. A warning
        is left for what cannot be compared with the checkpoint.

        Raises:
            DriftError: the model does not hold the checkpoint's weights.
        """
        logged = [row["drift/progress"] for row in state.log_history if "drift/progress" in row]
        # Every process has read the same log, so that all of them measure, or none.
        before = logged[-1] if logged and abs(logged[-1]) >= _NOTICEABLE else None
        found = 0.0 if before is None else self.metrics()["progress"]
        lost = before is not None and abs(found) < _KEPT * abs(before)
        self._saves.refuse_unloaded(state.global_step, lost=lost)
        if lost:
            warnings.warn(
                f"the run resumes at step {state.global_step} at λ = {found:.3g}, where λ = "
                f"{before:.3g} was logged before: the checkpoint's weights were not loaded "
                "into the model. Look for the Trainer's warning of missing keys, load the model "
                "from the checkpoint, and resume once more",
                DriftWarning,
                stacklevel=2,
            )

    def _look_ahead(self, injection: Injection, total: int) -> None:
        """Start a forecast from what is known of the run, and warn of a target out of its reach."""
        alpha = injection.alpha
        # A run that is to move away from Δ has no useful λ to head for.
        if max(alpha.values() if isinstance(alpha, dict) else [alpha]) <= 0:
            return
        rates = self._learning_rates(total)
        pace = (max(rates), total) if rates else None
        optimizer = self._trainer.optimizer
        while hasattr(optimizer, "optimizer"):
            # What Accelerate and DeepSpeed put around it.
            optimizer = optimizer.optimizer
        outlook = injection.look_ahead(optimizer, rates or [1.0] * total, known=bool(rates))
        self._drive = outlook.drive
        if not self._drive or self._drive[-1] <= 0:
            return
        target = self._config.progress_target
        if isinstance(target, int | float):
            missed = outlook.misses(float(target), pace)
            if missed:
                warnings.warn(missed, DriftWarning, stacklevel=2)
        cap = target or self._config.progress_cap
        stops_at = float(cap) if isinstance(cap, int | float) and math.isfinite(cap) else None
        self._forecast = Forecast(
            self._drive[-1],
            pace=pace,
            stops_at=stops_at,
            expected=outlook.expected,
            reachable=outlook.reachable,
        )

    def _learning_rates(self, total: int) -> list[float]:
        """Return the learning rate of every step; none where it is not a function of the step."""
        scheduler = getattr(self._trainer.lr_scheduler, "scheduler", self._trainer.lr_scheduler)
        factors = getattr(scheduler, "lr_lambdas", None)
        base = set(getattr(scheduler, "base_lrs", ()))
        if not factors or len(base) != 1:
            return []
        (largest,) = base
        return [float(largest) * factors[0](at) for at in range(total)]

    # What the trainer calls.

    def _training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        original = self._step_method.original
        if self._removed:
            plain: torch.Tensor = original(model, *args, **kwargs)
            return plain
        if self.injection is None:
            raise DriftError(
                "this trainer trains without having called on_train_begin, at which the injection "
                "attaches to the wrapped model, so nothing would be injected; use "
                "Injection(model, delta, …) in this loop"
            )
        # Accelerate steps DeepSpeed's engine, and so injects, inside backward.
        by_itself = self._trainer.is_deepspeed_enabled
        if not self._checked and not by_itself:
            self._check_model(model)
            self._check_optimizer()
            self._checked = True
        if self._trainer.accelerator.sync_gradients:
            loss: torch.Tensor = original(model, *args, **kwargs)
            if self._config.scope == "step" and not by_itself:
                self.injection.step()
        else:
            with self.injection.accumulating():
                loss = original(model, *args, **kwargs)
        return loss

    def _check_model(self, model: nn.Module) -> None:
        """Refuse a model whose parameters are no longer those that were attached to."""
        lost = self._started().lost_from(model)
        if lost:
            raise DriftError(
                f"{len(lost)} of {len(self.targets)} targets are no longer trained parameters of "
                f"the model, {lost[0]} first: it was wrapped, replaced or frozen after attaching. "
                "Attach to the trainer that trains it, or after it was wrapped"
            )

    def _check_optimizer(self) -> None:
        """Refuse an optimizer that does not step every target."""
        optimizer = getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)
        if isinstance(optimizer, torch.optim.Optimizer):
            self._started().check_optimizer(optimizer)

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Evaluation is logged through the same method, and so is the closing summary, which is all
        # that is logged of a run shorter than `logging_steps`.
        closes = self._logged_step < self._trainer.state.global_step
        loss = logs.get("loss", logs.get("train_loss") if closes else None)
        if loss is not None and self._is_active:
            logs = logs | self._logged_summary(loss)
        self._log_method.original(logs, *args, **kwargs)

    def _logged_summary(self, loss: float) -> dict[str, float]:
        metrics = self.summary()
        step = self._logged_step = self._trainer.state.global_step
        if self._forecast is not None and 0 < step <= len(self._drive):
            lost = self._started().lost_steps.cause
            final = self._forecast.see(metrics["progress"], self._drive[step - 1], lost=lost)
            if final is not None:
                metrics["predicted_progress"] = final
        logged = as_logged(metrics, self._config.log)
        # The file and the picture have it too, since they are looked at without the log.
        metrics["loss"] = loss
        if self._csv is not None and self._trainer.is_world_process_zero():
            append_rows(self._csv, step, metrics)
        return logged


def _scaler_of(trainer: Any) -> torch.amp.GradScaler | None:
    scaler: torch.amp.GradScaler | None = getattr(trainer.accelerator, "scaler", None)
    return scaler


class _Callback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Tells the injection when training starts."""

    def __init__(self, injection: TrainerInjection) -> None:
        self._injection = injection

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._injection.begin_training(state)


def attach_trainer(
    trainer: Any,
    delta: DeltaLike | str | os.PathLike[str],
    config: InjectionConfig,
    *,
    csv: str | os.PathLike[str] | None = None,
) -> TrainerInjection:
    """Attach to a Trainer before `train()` is called.

    Raises:
        DriftError: the trainer has an injection already, or a way of training is not supported.
        As `Injection`, of what can be known before training starts.
    """
    # What another library put there stays inside: it may run several backward passes in one call.
    wrapped = getattr(trainer.__dict__.get("training_step"), "__self__", None)
    if isinstance(wrapped, TrainerInjection):
        raise DriftError(
            "this trainer has an injection attached already: call remove() on what attach() "
            "returned, or build the Trainer anew"
        )
    return TrainerInjection(trainer, delta, config, csv)
