"""Lightning: a callback that injects after the last backward of a step, before clipping.

    trainer = lightning.pytorch.Trainer(..., callbacks=[DriftCallback("delta", alpha=1.0)])

Lightning runs forward, backward and clipping in a closure inside `optimizer.step`.
`on_before_optimizer_step` comes after backward and after a scaler's unscaling, and before clipping
(in the sources of 2.6, `Precision._after_closure`).

With manual optimization that hook runs inside `optimizer.step()`, after any clipping that
`training_step` does itself; call `callback.injection.step()` there before clipping instead.

Under DeepSpeedStrategy the engine clips and steps, and the injection runs inside `engine.step()`.

Tested with lightning and pytorch-lightning 2.6.6: one device, DDP, FSDPStrategy,
ModelParallelStrategy and DeepSpeedStrategy, accumulation, clipping, bf16-mixed, a loss scaler,
manual optimization.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from drift_fast.errors import DriftError, DriftWarning
from drift_fast.inject.config import ConfigLike, InjectionConfig
from drift_fast.inject.driver import Driver
from drift_fast.inject.injection import Injection
from drift_fast.inject.scope import Scope
from drift_fast.inject.shards.zero_support import is_engine
from drift_fast.inject.telemetry import append_rows, as_logged, csv_file, set_aside
from drift_fast.integrations.deepspeed_engine import EngineDriver
from drift_fast.options import takes

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from typing import Unpack

    from lightning.pytorch import Callback

    from drift_fast._keywords import InjectionKeywords
else:

    def _callback_class() -> type:
        """Return Lightning's Callback, of the package that the caller has imported already.

        The same library is published under two names, whose classes do not know each other.
        """
        names = ("lightning.pytorch", "pytorch_lightning")
        loaded = [name for name in names if name in sys.modules]
        for name in [*loaded, *names]:
            try:
                return importlib.import_module(name).Callback
            except ModuleNotFoundError as error:
                if error.name not in (name, name.split(".")[0]):
                    raise
        raise ImportError(
            "DriftCallback needs Lightning: pip install lightning (or pytorch-lightning)"
        )

    Callback = _callback_class()


@takes(InjectionConfig)
class DriftCallback(Callback):
    """Inject a delta into what a Lightning Trainer trains.

    Attached at the start of training, when parameters are in place, and removed at its end. What
    `Injection.summary` says is logged as `drift/…` every `log_every_n_steps` steps, the eight most
    telling metrics unless `log="all"`.

    Args:
        delta: an open `Delta`, or the directory, Hub id or URL of one.
        config: an `InjectionConfig`, or the path of a YAML or JSON file of its options; options
            given as keywords win over it.
        csv: a file for what is logged. One of an earlier run is renamed, unless this run resumes
            it.
        options: those of `InjectionConfig`, listed below.

    Raises:
        TypeError, ValueError: an unknown option, or a value without meaning.
        As `Injection`, when training starts.
    """

    def __init__(
        self,
        delta: Any,
        config: ConfigLike = None,
        *,
        csv: str | os.PathLike[str] | None = None,
        **options: Unpack[InjectionKeywords],
    ) -> None:
        super().__init__()
        self._config = InjectionConfig.resolve(config, options, function="DriftCallback")
        self._delta = delta
        self._csv = None if csv is None else csv_file(csv)
        self._steps = 0
        self._logged = 0
        self._saved: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}
        # The Trainer and the module that `_last` is of, and the number of steps then.
        self._ended: tuple[Any, Any, int] | None = None
        self.injection: Injection | None = None
        self._driver: ClosureDriver | EngineDriver = ClosureDriver()
        # Steps of the injection that the optimizer's hook has seen.
        self._seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach; parameters are on their device, wrapped, and restored from a checkpoint."""
        self.remove()
        config = self._config
        changing = (type(each).__name__ for each in trainer.callbacks)
        if config.overlap and (
            trainer.accumulate_grad_batches != 1 or "GradientAccumulationScheduler" in changing
        ):
            raise DriftError(
                "overlap=True injects in every backward pass, and with accumulate_grad_batches "
                "only the last of a step has the final gradient: use overlap=False"
            )
        expected = trainer.estimated_stepping_batches
        if expected != float("inf") and config.needs_total_steps:
            config = replace(config, total_steps=int(expected))
        self.injection = self._attach(trainer, config)
        if self._saved is None and self._ended == (trainer, pl_module, trainer.global_step):
            # A second fit(), which goes on where the first has ended.
            self._saved = self._last
        if self._saved is not None:
            self.injection.load_state_dict(self._saved)
            self._saved = None
        elif trainer.global_step > 0:
            warnings.warn(
                f"the run goes on at step {trainer.global_step} without the state of an "
                "injection: schedules start anew, and progress counts from here",
                DriftWarning,
                stacklevel=2,
            )
        if trainer.global_step == 0 and self._csv is not None and trainer.is_global_zero:
            set_aside(self._csv)
        self._steps = self._logged = trainer.global_step
        self._seen = self.injection.steps

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Inject, if this is the optimizer that holds the targets, unless that was done by hand."""
        driver = self._driver
        if self.injection is None or isinstance(driver, EngineDriver):
            return
        if not driver.is_about_to_use(optimizer):
            return
        if self._config.scope == "step":
            if self.injection.steps == self._seen:
                self.injection.step()
            self._seen = self.injection.steps
        self._steps += 1

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, after the steps at which the Trainer logs."""
        if self.injection is None:
            return
        if isinstance(self._driver, EngineDriver):
            self._steps += self.injection.steps - self._seen
            self._seen = self.injection.steps
        if self._steps == self._logged:
            return
        self._logged = self._steps
        every = trainer.log_every_n_steps
        if every and self._steps % every == 0:
            # In every process, since under sharding each holds a part.
            summary = self.injection.summary()
            pl_module.log_dict(as_logged(summary, self._config.log))
            if self._csv is not None and trainer.is_global_zero:
                append_rows(self._csv, self._steps, summary)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach, and keep the state: Lightning may write its last checkpoint after this."""
        self._keep()
        self._ended = (trainer, pl_module, trainer.global_step)
        self.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach, so that the model can be attached to again."""
        try:
            self._keep()
        except RuntimeError as error:
            # A device that has failed answers nothing; what it was is about to be raised.
            logger.warning("the state of the injection is lost: %s", error)
        self.remove()

    def remove(self) -> None:
        """Detach from the model and free Δ; may be called twice."""
        if self.injection is not None:
            self.injection.remove()
            self.injection = None

    def state_dict(self) -> dict[str, Any]:
        """Return the injection's state for a checkpoint, after training that of its end."""
        return self._last if self.injection is None else self.injection.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep a checkpoint's state until training starts."""
        self._saved = dict(state_dict) or None

    def _attach(self, trainer: Any, config: InjectionConfig) -> Injection:
        """Attach to DeepSpeed's engine, or with the optimizer that holds every target."""
        model = trainer.strategy.model
        if is_engine(model):
            self._driver = EngineDriver(model)
            return Injection(model.module, self._delta, config, driver=self._driver)
        if not trainer.optimizers:
            raise DriftError(
                "the module trains without an optimizer, so nothing steps along Δ: return one from "
                "configure_optimizers"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        drivers = [ClosureDriver(_inner(optimizer), scaler) for optimizer in trainer.optimizers]
        for driver in drivers:
            try:
                found = Injection(model, self._delta, config, driver=driver)
            except DriftError:
                # Another of several may hold the targets; what else is wrong, it finds again.
                if driver is drivers[-1]:
                    raise
            else:
                self._driver = driver
                return found
        raise AssertionError("the loop returns or raises")

    def _keep(self) -> None:
        if self.injection is not None:
            self._last = self.injection.state_dict()


class ClosureDriver(Driver):
    """An optimizer that runs forward and backward inside its own step."""

    wider = (
        'Load the model in float32 (dtype=torch.float32) and pass precision="bf16-mixed" to the '
        'Trainer, which "bf16-true" is not'
    )
    _injects = True
    # Whether `training_step` returned None: no backward, and the optimizer has nothing to do.
    _idle = False

    def check(self, config: InjectionConfig) -> None:
        super().check(config)
        self._injects = config.scope == "step"

    def is_about_to_use(self, optimizer: Any) -> bool:
        """Return whether this is the optimizer that holds the targets, and it has gradients."""
        if self.optimizer is None or _inner(optimizer) is not self.optimizer:
            return False
        if self._injects:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self._idle = all(parameter.grad is None for parameter in parameters)
        return not self._idle

    def before_use(self, scope: Scope, optimizer: torch.optim.Optimizer) -> None:
        if not self._idle:
            scope.before_use(optimizer)


def _inner(optimizer: Any) -> Any:
    """Return the torch optimizer inside Lightning's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
