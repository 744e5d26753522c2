"""Planned motion on a real accelerator: nothing waits for the host, and the values are right.

Owns: what only a CUDA device can show; everything is skipped without one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drift_fast.inject.motion.motion import PlannedMotion
from support import reference
from support.injection_models import Backbone, delta_towards, weights_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("residency", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_step_but_the_last_waits_and_all_round_as_on_the_host(
    tmp_path: Path, dtype: torch.dtype, residency: str
) -> None:
    model = Backbone(layers=1, width=192, inner=256).to(dtype)
    # bfloat16 deltas are exact in all three dtypes of the weights.
    delta = delta_towards(tmp_path, Backbone(layers=1, width=192, inner=256).bfloat16(), size=0.05)
    host = Backbone(layers=1, width=192, inner=256).to(dtype)
    start = weights_of(model)
    model.cuda()
    options = {"progress": {"attn": 0.8, "mlp": 1.2}, "steps": 5}
    motion = PlannedMotion(model, delta, residency=residency, **options)
    beside = PlannedMotion(host, delta, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    other = torch.optim.SGD(host.parameters(), lr=0.0)
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step != 4 else "default")
        try:
            optimizer.step()
            motion.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        other.step()
        beside.step()
    assert motion.finished
    moved = {name: tensor.cpu() for name, tensor in weights_of(model).items()}
    _, each = reference.progress(moved, start, dict(delta))
    for name, found in each.items():
        planned = 0.8 if "self_attn" in name else 1.2
        assert found == pytest.approx(planned, abs=1e-4 if dtype is torch.float32 else 0.05), name
    for name, tensor in weights_of(host).items():
        if dtype is torch.float32:
            torch.testing.assert_close(moved[name], tensor, rtol=1e-6, atol=1e-7)
        else:
            # A float32 product that differs in its last bit may tip an element over once.
            assert float((moved[name] != tensor).float().mean()) < 1e-3, name


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_leaves_out_does_not_count(tmp_path: Path, fused: bool) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    motion = PlannedMotion(model, delta, progress=0.5, steps=2, optimizer=optimizer)
    taken = []
    for step in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, torch.inf if step in (0, 2) else 1.0)
        scaler.scale(torch.ones((), device="cuda"))
        scaler.step(optimizer)
        scaler.update()
        taken.append(motion.taken)
    assert taken == [0, 1, 1, 2]
