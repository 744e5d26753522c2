"""The injection on a real accelerator: nothing waits for the host, and the values are right.

Owns: what only a CUDA device can show; everything is skipped without one. The same arithmetic on
CPU tensors is in test_injection_extremes.py and test_injection_writing.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
import reference
from injection_models import (
    Backbone,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
    single_target,
    weights_of,
)
from reference import assert_follows_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Make torch raise where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch_on_device() -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = regression_batch()
    return inputs.cuda(), targets.cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_a_step_never_waits_and_matches_the_restatement(
    tmp_path: Path, scale: str, dtype: torch.dtype
) -> None:
    model = Backbone().to(dtype)
    delta = delta_towards(tmp_path, model, dtype=str(dtype).removeprefix("torch."))
    model.cuda()
    injection = drift_fast.Injection(model, delta, scale=scale)
    for _ in range(2):
        model.zero_grad()
        regression_loss(model, batch_on_device()).backward()
        before = gradients_of(model)
        with no_waiting():
            injection.step()
        assert (injection.injected, injection.skipped) == (20, 0)
        for name, found in gradients_of(model).items():
            if name in delta:
                assert_follows_reference(
                    found, before[name], delta[name], alpha=1.0, scale=scale, label=name
                )


def test_the_detector_of_waits_sees_one() -> None:
    value = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        value.item()


@pytest.mark.parametrize("scale", ["gradnorm", "adaptive"])
def test_norms_stay_exact_on_millions_of_values(tmp_path: Path, scale: str) -> None:
    model, parameter, delta = single_target(tmp_path, (4096, 4096))
    (stored,) = delta.values()
    model.cuda()
    generator = torch.Generator().manual_seed(9)
    gradient = torch.rand(parameter.shape, generator=generator)
    parameter.grad = gradient.cuda()
    drift_fast.Injection(model, delta, alpha=0.5, scale=scale).step()
    assert_follows_reference(parameter.grad, gradient, stored, alpha=0.5, scale=scale)


@pytest.mark.parametrize("scale", reference.SCALES)
def test_overflow_under_a_gradient_scaler_is_skipped_and_counted_without_waiting(
    tmp_path: Path, scale: str
) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    injection = drift_fast.Injection(
        model, delta, alpha=0.6, scale=scale, optimizer=optimizer, scaler=scaler
    )
    regression_loss(model, batch_on_device()).backward()
    plain = gradients_of(model)
    for overflow in (True, False):
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(regression_loss(model, batch_on_device())).backward()
        if overflow:
            spoilt: Any = model.get_parameter("model.layers.0.mlp.up_proj.weight").grad
            spoilt.fill_(float("inf"))
        with no_waiting():
            injection.step()
        assert (injection.injected, injection.skipped) == ((19, 1) if overflow else (20, 0))
        scaler.unscale_(optimizer)
        if not overflow:
            for name, found in gradients_of(model).items():
                if name in delta:
                    expected = reference.inject(plain[name], delta[name], alpha=0.6, scale=scale)
                    error = reference.norm(reference.exact(found) - expected)
                    assert error < 1e-4 * reference.norm(expected), name
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_progress_on_a_device_equals_a_float64_computation(tmp_path: Path, scope: Any) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    model.cuda()
    start = weights_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with drift_fast.Injection(model, delta, scope=scope, optimizer=optimizer) as injection:
        for _ in range(5):
            optimizer.zero_grad()
            regression_loss(model, batch_on_device()).backward()
            if scope == "step":
                injection.step()
            optimizer.step()
        found = injection.metrics()["progress"]
    expected, _ = reference.progress(weights_of(model), start, delta)
    assert found == pytest.approx(expected, rel=1e-3)
