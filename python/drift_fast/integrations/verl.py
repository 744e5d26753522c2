"""verl: an FSDP engine that injects before it clips, registered by an external module.

    export VERL_USE_EXTERNAL_MODULES=drift_fast.integrations.verl
    export DRIFT_FAST_CONFIG=drift.yaml
    torchrun … -m verl.trainer.sft_trainer …

verl imports the modules that the first variable names in every process, and looks an engine up by
device and vendor before it falls back to the device alone; importing this module selects the vendor
"drift_fast". Language models under the backends `fsdp` and `fsdp2` are served; other backends, and
value models, train as they do without it. Only engines that have an optimizer are attached to.

verl's log shows nothing of the injection; with `csv:` in the settings each step appends its rows to
that file, at the cost of a pass over weights and Δ. verl's checkpoints hold nothing of the
injection: in a resumed run schedules start anew and λ counts from there.

Tested with verl 0.9.1 (transformers 5.9) without a GPU, where verl builds and shards no model: the
engine is found by verl's registry, and its own `optimizer_step` on a whole module steps with the
injected, clipped gradient. Everything else is tested against a stand-in of the engine. Not run:
`sft_trainer` on accelerators, sharded. FSDP2 and FSDP1 are tested without verl.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from drift_fast.errors import DriftError
from drift_fast.inject.injection import Injection
from drift_fast.inject.telemetry import append_rows
from drift_fast.integrations.settings import Settings

VENDOR = "drift_fast"


class DriftFSDPEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl's FSDP engine with an injection in front of each optimizer step."""

    injection: Injection | None = None

    def initialize(self) -> None:
        """Read the settings, then build the model and the optimizer.

        Raises:
            DriftError: no settings, or a scope that this engine does not have.
        """
        self._drift_settings = Settings.from_environment()
        if self._drift_settings.scope != "step":
            raise DriftError('verl shards its models, where only scope="step" works')
        super().initialize()

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
        norm = super().optimizer_step()
        self._write_row(self.injection)
        return norm

    def _attached(self) -> Injection:
        settings = self._drift_settings
        if settings.needs_total_steps:
            steps = self.optimizer_config.total_training_steps
            settings = replace(settings, total_steps=steps)
        return settings.inject(
            self.module, optimizer=self.optimizer, scaler=getattr(self, "scaler", None)
        )

    def _write_row(self, injection: Injection) -> None:
        """Append what the step did to the file that `csv` names; verl's own log has no room."""
        file = self._drift_settings.csv
        if file is not None:
            # Every process takes part, since each holds a part of the model.
            summary = injection.summary()
            if self.rank == 0:
                append_rows(file, injection.steps, summary)


def _select() -> None:
    """Register the engine and make verl choose it.

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


_select()
