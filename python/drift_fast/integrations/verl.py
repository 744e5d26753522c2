"""verl: an FSDP engine that injects before it clips, registered by an external module.

    export VERL_USE_EXTERNAL_MODULES=drift_fast.integrations.verl
    export DRIFT_FAST_CONFIG=drift.yaml
    torchrun … -m verl.trainer.sft_trainer …

verl imports the modules that the first variable names in every process, and looks an engine up by
device and vendor before it falls back to the device alone; importing this module selects the vendor
"drift_fast". Language models under the backends `fsdp` and `fsdp2` are served. Every other engine,
`fsdp_turbo`, Megatron and value models among them, would train without Δ and is refused when verl
looks it up. Only engines that have an optimizer are attached to.

Each step adds its summary to verl's log as `drift/…`, at the cost of a pass over weights and Δ;
with `csv:` in the settings it goes to that file too. verl's checkpoints hold the injection's state,
so that a resumed run goes on with its schedule.

Tested with verl 0.9.1: its `sft_trainer` over two processes under FSDP2, on CPUs and on GPUs, with
whole weights and LoRA and a checkpoint in between (`make test-stacks STACK=verl`); refusals against
a stand-in of the engine too. Not run: FSDP1 inside verl, which is tested without it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl.utils.metric import Metric
from verl.utils.tracking import Tracking
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from drift_fast.config_files import JsonFile
from drift_fast.errors import DriftError, DriftWarning
from drift_fast.inject.injection import Injection
from drift_fast.inject.telemetry import append_rows, as_logged, set_aside
from drift_fast.integrations.settings import Settings

VENDOR = "drift_fast"
_MAX_STATE_NBYTES = 100_000_000


class DriftFSDPEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl's FSDP engine with an injection in front of each optimizer step."""

    injection: Injection | None = None
    # That of a checkpoint, until the first step attaches.
    _saved: Mapping[str, Any] | None = None

    def initialize(self) -> None:
        """Read the settings, then build the model and the optimizer.

        Raises:
            DriftError: no settings, or a scope or a way of sharding that this engine does not have.
        """
        self._drift_settings = Settings.from_environment()
        if self._drift_settings.scope != "step":
            raise DriftError('verl shards its models, where only scope="step" works')
        config = self.engine_config
        if config.strategy == "fsdp" and not (config.forward_only or config.use_orig_params):
            raise DriftError(
                "engine.strategy=fsdp flattens parameters together unless engine.use_orig_params="
                "true (verl's default is false), and then no tensor of Δ has a parameter: set "
                "engine.use_orig_params=true, or engine.strategy=fsdp2"
            )
        super().initialize()

    def train_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Train as verl does, and add what the step did to verl's metrics.

        Raises:
            As `optimizer_step`.
        """
        outputs = super().train_batch(*args, **kwargs)
        injection = self.injection
        assert injection is not None
        # Every process takes part, since each holds a part of the model.
        summary = injection.summary()
        if self.is_mp_src_rank_with_outputs():
            outputs["metrics"] |= {
                key: Metric("mean", value)
                for key, value in as_logged(summary, self._drift_settings.log).items()
            }
        file = self._drift_settings.csv
        if file is not None and self.rank == 0:
            append_rows(file, injection.steps, summary)
        return outputs

    def optimizer_step(self) -> Any:
        """Inject, then clip and step as verl does.

        Raises:
            As `Injection`, at the first step; as `Injection.step`.
        """
        # Not attached to in initialize(): verl may move parameters to the host there, and moves
        # them to the device when training starts.
        if self.injection is None:
            self.injection = self._attached()
        self.injection.step()
        return super().optimizer_step()

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Save as verl does, and the injection's state beside each process's shards."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.injection is not None:
            self._state_file(local_path).write_text(json.dumps(self.injection.state_dict()))

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Load as verl does; the injection goes on from its state at the next step.

        Raises:
            DriftError: the state's file is not valid.
        """
        # verl may remove local files that it has loaded.
        file = self._state_file(local_path)
        remedy = "delete the file to start schedules anew"
        try:
            saved = JsonFile(file, _MAX_STATE_NBYTES, remedy, error=DriftError).read(dict)
        except FileNotFoundError:
            saved = None
            warnings.warn(
                f"{local_path} has no state of an injection: schedules start anew, and progress "
                "counts from here",
                DriftWarning,
                stacklevel=2,
            )
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.injection is None:
            self._saved = saved
        elif saved is not None:
            self.injection.load_state_dict(saved)

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"drift_fast_rank_{self.rank}.json"

    def _attached(self) -> Injection:
        settings = self._drift_settings
        if settings.needs_total_steps:
            steps = self.optimizer_config.total_training_steps
            settings = replace(settings, total_steps=steps)
        if settings.csv is not None and self._saved is None and self.rank == 0:
            set_aside(settings.csv)
        injection = settings.inject(
            self.module, optimizer=self.optimizer, scaler=getattr(self, "scaler", None)
        )
        if self._saved is not None:
            injection.load_state_dict(self._saved)
        return injection


def _select() -> None:
    """Register the engine and make verl choose it, or none.

    Raises:
        DriftError: another vendor is selected already.
    """
    selected = os.environ.setdefault("VERL_ENGINE_VENDOR", VENDOR)
    if selected != VENDOR:
        raise DriftError(
            f"VERL_ENGINE_VENDOR is {selected!r}, so verl would not choose the engine that "
            "injects; unset it, or leave drift_fast.integrations.verl out"
        )
    EngineRegistry.register(
        model_type="language_model",
        backend=["fsdp", "fsdp2"],
        device=["cuda", "npu", "cpu"],
        vendor=VENDOR,
    )(DriftFSDPEngine)
    find = EngineRegistry.get_engine_cls

    def find_injecting(model_type: str, backend: str) -> Any:
        engine = find(model_type, backend)
        if not issubclass(engine, DriftFSDPEngine):
            raise DriftError(
                f"verl's {engine.__name__} (a {model_type} under the backend {backend}) would "
                "train without Δ: of verl's engines only language models under fsdp and fsdp2 "
                "inject. Set strategy=fsdp2, and in place of a critic an estimator without one "
                "(algorithm.adv_estimator=grpo); or leave drift_fast.integrations.verl out of "
                "VERL_USE_EXTERNAL_MODULES to train without Δ"
            )
        return engine

    EngineRegistry.get_engine_cls = staticmethod(find_injecting)


def _log_one_number_for_all_processes() -> None:
    """Make verl's SFT trainer log a metric of all processes, which it has as a list."""
    log = Tracking.log

    def log_numbers(tracking: Any, data: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        numbers = {
            key: float(Metric.aggregate_dp(value))
            if isinstance(value, list) and value and isinstance(value[0], Metric)
            else value
            for key, value in data.items()
        }
        log(tracking, numbers, *args, **kwargs)

    Tracking.log = log_numbers


_select()
_log_one_number_for_all_processes()
