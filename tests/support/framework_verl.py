"""verl's own FSDP engine without a GPU: chosen by its registry, and one optimizer step of it.

    python framework_verl.py FOLDER

Owns: that verl finds the engine through the environment alone and none that does not inject, that
its `optimizer_step` injects before it clips, and that its log takes the metrics. verl builds and
shards models on accelerators only, so the engine is given a whole module and an optimizer here
instead of `initialize()`. FOLDER holds delta/, and the environment is as docs/stacks.md says.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch
import verl  # noqa: F401
from verl.utils.metric import Metric
from verl.utils.tracking import Tracking
from verl.workers.engine import EngineRegistry

import drift_fast
from support import reference
from support.injection_models import Backbone, regression_batch, regression_loss

RATE, CLIP, ALPHA = 1e3, 0.01, 0.7
folder = Path(sys.argv[1])

chosen = EngineRegistry.get_engine_cls("language_model", "fsdp2")
assert chosen.__module__ == "drift_fast.integrations.verl", chosen
network = Backbone()
before = {name: reference.exact(p) for name, p in network.named_parameters()}
regression_loss(network, regression_batch()).backward()
plain = {name: reference.exact(p.grad) for name, p in network.named_parameters()}
network.zero_grad()
engine = chosen.__new__(chosen)
engine.module = network
engine.optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
engine.optimizer_config = types.SimpleNamespace(clip_grad=CLIP, total_training_steps=1)
engine.scaler, engine._qat_enabled = None, False
engine._drift_settings = sys.modules[chosen.__module__].Settings.from_environment()
regression_loss(network, regression_batch()).backward()
engine.optimizer_step()
delta = drift_fast.Delta.open(folder / "delta")
expected = {
    name: reference.inject(gradient, delta[name], alpha=ALPHA, scale="adaptive")
    if name in delta.shapes
    else gradient
    for name, gradient in plain.items()
}
total, expected = reference.clip(expected, CLIP)
assert total > CLIP
for name, parameter in network.named_parameters():
    found = (before[name] - reference.exact(parameter)) / RATE
    error = reference.norm(found - expected[name])
    assert error <= 1e-5 * reference.norm(expected[name]), (name, error)

logged: dict[str, float] = {}
tracking = Tracking.__new__(Tracking)
tracking.logger = {"test": types.SimpleNamespace(log=lambda data, step: logged.update(data))}
tracking.log(data={"drift/progress": [Metric("mean", 0.5), Metric("mean", 0.5)]}, step=1)
assert logged == {"drift/progress": 0.5}, logged

# Its other engines are registered for accelerators only.
os.environ["VERL_ENGINE_DEVICE"] = "cuda"
for refused in (("language_model", "fsdp_turbo"), ("value_model", "fsdp2")):
    with pytest.raises(drift_fast.DriftError, match="would train without Δ"):
        EngineRegistry.get_engine_cls(*refused)
