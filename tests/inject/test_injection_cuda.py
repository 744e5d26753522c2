"""The injection on a real accelerator: nothing waits for the host, and the values are right.

Owns: what only a CUDA device can show; everything is skipped without one. The same arithmetic on
CPU tensors is in test_injection_extremes.py and test_injection_writing.py.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from support import reference
from support.injection_models import (
    Backbone,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
    single_target,
    text_batch,
    tiny_qwen2,
    weights_of,
)
from support.reference import assert_follows_reference

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
@pytest.mark.parametrize("scale", reference.ALL_SCALES)
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


@pytest.mark.parametrize("scale", reference.ALL_SCALES)
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


WIDE = {"hidden_size": 256, "intermediate_size": 640, "vocab_size": 128}


def wide_world(tmp_path: Path, dtype: torch.dtype) -> tuple[Any, drift_fast.Delta]:
    """A language model on the device whose weights are too large to count as small tensors."""
    model = tiny_qwen2(**WIDE).to(dtype)
    delta = delta_towards(tmp_path, model, dtype="bfloat16", size=0.1)
    return model.cuda(), delta


def injected(
    model: Any, delta: Any, steps: int, **options: Any
) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]], float]:
    """Return gradients before and after injection at each step, and bytes of Δ on the device."""
    batch = {key: value.cuda() for key, value in text_batch(4, 32).items()}
    before, after = [], []
    with drift_fast.Injection(model, delta, **options) as injection:
        held = sum(group.store.nbytes for group in injection._groups)
        for _ in range(steps):
            model.zero_grad()
            with injection.accumulating():
                model(**batch).loss.backward()
            before.append(gradients_of(model))
            model.zero_grad()
            model(**batch).loss.backward()
            injection.step()
            after.append(gradients_of(model))
    return before, after, held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("overlap", [False, True], ids=["after", "overlapped"])
@pytest.mark.parametrize("residency", ["device", "host", "disk", "device-int8", "host-int8"])
def test_wherever_the_delta_lives_the_gradient_is_right(
    tmp_path: Path, residency: str, overlap: bool, dtype: torch.dtype
) -> None:
    model, delta = wide_world(tmp_path, dtype)
    # Less than the delta, so that the ring is filled anew within each step.
    before, after, held = injected(
        model, delta, 6, residency=residency, overlap=overlap, prefetch="400KB"
    )
    whole = sum(2 * tensor.numel() for tensor in delta.values())
    assert held < 0.8 * whole or residency in ("device", "device-int8")
    for plain, found in zip(before, after, strict=True):
        for name, values in delta.items():
            expected = reference.inject(plain[name], values, alpha=1.0, scale="adaptive")
            error = reference.norm(reference.exact(found[name]) - expected)
            bound = 2e-2 if "int8" in residency else 1e-5 if dtype == torch.float32 else 5e-3
            assert error < bound * reference.norm(expected), name
            moved = reference.norm(reference.exact(found[name]) - reference.exact(plain[name]))
            assert moved > 0.1 * reference.norm(expected), name


@pytest.mark.parametrize("residency", ["device", "host", "device-int8", "host-int8"])
def test_no_residency_in_memory_waits_in_a_step(tmp_path: Path, residency: str) -> None:
    model, delta = wide_world(tmp_path, torch.bfloat16)
    batch = {key: value.cuda() for key, value in text_batch(4, 32).items()}
    with drift_fast.Injection(model, delta, residency=residency, prefetch="400KB") as injection:
        for _ in range(5):
            model.zero_grad()
            model(**batch).loss.backward()
            with no_waiting():
                injection.step()
        assert injection.injected == len(delta)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "cosine", "total_steps": 8, "alpha": {"attn": 1.0, "mlp": 0.5}},
        {"progress_cap": 0.5, "layer_alpha": [1.0, 0.5]},
        {"progress_target": 0.3, "total_steps": 8, "max_push": 0.5},
    ],
    ids=["schedule", "cap", "target"],
)
def test_schedules_caps_and_targets_wait_for_nothing(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model, delta = wide_world(tmp_path, torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = {key: value.cuda() for key, value in text_batch(4, 32).items()}
    with drift_fast.Injection(model, delta, residency="device", **options) as injection:
        for _ in range(4):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            with no_waiting():
                injection.step()
            optimizer.step()
        assert injection.metrics()["alpha"] > 0


@pytest.mark.parametrize("residency", ["host", "host-int8"])
def test_page_locked_memory_is_held_and_given_back(tmp_path: Path, residency: str) -> None:
    model, delta = wide_world(tmp_path, torch.bfloat16)
    injection = drift_fast.Injection(model, delta, residency=residency)
    gc.collect()
    held = injection._groups[0].store._held
    kept = [x for one in held for x in vars(one).values() if isinstance(x, torch.Tensor)]
    assert len(kept) >= len(held)
    assert all(tensor.is_pinned() for tensor in kept)
    del held
    injection.remove()
    assert not any(tensor.is_pinned() for tensor in kept)


def test_two_dimensional_sharding_of_one_process_is_injected_on_the_device(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model, delta = wide_world(tmp_path, torch.float32)
        fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
        batch = {key: value.cuda() for key, value in text_batch(4, 32).items()}
        model(**batch).loss.backward()
        plain = {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}
        with drift_fast.Injection(model, delta) as injection, no_waiting():
            injection.step()
        for name, values in delta.items():
            found = model.get_parameter(name).grad.full_tensor()
            expected = reference.inject(plain[name], values, alpha=1.0, scale="adaptive")
            error = reference.norm(reference.exact(found) - expected)
            assert error < 1e-5 * reference.norm(expected), name
    finally:
        torch.distributed.destroy_process_group()


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
