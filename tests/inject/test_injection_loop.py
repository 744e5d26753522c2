"""Injection in a training loop: accumulation, clipping, alpha = 0, mixed precision, optimizers.

Owns: what a user's own loop sees in step scope. The formula is in test_injection.py, the Trainer
in test_trainer.py, progress in test_injection_progress.py.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
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
    train,
    weights_of,
)
from support.reference import assert_follows_reference


def relative_difference(found: torch.Tensor, expected: Any) -> float:
    difference = reference.exact(found) - reference.exact(expected)
    return reference.norm(difference) / reference.norm(reference.exact(expected))


# --- accumulation -----------------------------------------------------------------------------


def accumulated(model: Backbone, micro_batches: int) -> None:
    """Accumulate the mean gradient of eight samples over equal micro-batches."""
    inputs, targets = regression_batch(8)
    for part in zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
        (regression_loss(model, part) / micro_batches).backward()


@pytest.mark.parametrize("scale", reference.SCALES)
def test_one_batch_of_eight_and_eight_of_one_give_the_same_injected_gradient(
    tmp_path: Path, scale: str
) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    injected = []
    for micro_batches in (1, 8):
        model.zero_grad()
        with drift_fast.Injection(model, delta, alpha=0.7, scale=scale) as injection:
            accumulated(model, micro_batches)
            plain = gradients_of(model)
            injection.step()
        injected.append(gradients_of(model))
        for name in delta:
            expected = reference.inject(plain[name], delta[name], alpha=0.7, scale=scale)
            assert relative_difference(injected[-1][name], expected) < 1e-6
    for name, whole in injected[0].items():
        assert relative_difference(injected[1][name], whole) < 1e-5, name


def test_backward_alone_injects_nothing_in_step_scope(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    accumulated(model, 2)
    plain = gradients_of(model)
    model.zero_grad()
    drift_fast.Injection(model, delta)
    accumulated(model, 2)
    for name, found in gradients_of(model).items():
        assert torch.equal(found, plain[name])


# --- clipping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", reference.SCALES)
def test_clipping_after_the_step_clips_the_injected_gradient(tmp_path: Path, scale: str) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    accumulated(model, 1)
    plain = gradients_of(model)
    drift_fast.Injection(model, delta, alpha=2.0, scale=scale).step()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    expected: dict[str, Any] = {
        name: reference.inject(gradient, delta[name], alpha=2.0, scale=scale)
        if name in delta
        else gradient
        for name, gradient in plain.items()
    }
    expected_total, clipped = reference.clip(expected, 0.1)
    plain_total, _ = reference.clip(plain, 0.1)
    assert expected_total > 0.1
    assert expected_total != pytest.approx(plain_total, rel=1e-2)
    assert float(total) == pytest.approx(expected_total, rel=1e-5)
    for name, found in gradients_of(model).items():
        assert relative_difference(found, clipped[name]) < 1e-5, name


# --- alpha = 0 --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the weights are bfloat16:drift_fast.DriftWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_ten_steps_with_alpha_zero_are_bit_identical_to_no_injection(
    tmp_path: Path, scale: str, scope: str, dtype: torch.dtype
) -> None:
    plain = Backbone().to(dtype)
    train(plain, 10)
    model = Backbone().to(dtype)
    start = weights_of(model)
    delta = delta_towards(tmp_path, model, dtype=str(dtype).removeprefix("torch."))
    with drift_fast.Injection(model, delta, alpha=0.0, scale=scale, scope=scope) as injection:
        train(model, 10, injection=injection if scope == "step" else None)
    for name, expected in weights_of(plain).items():
        found = model.get_parameter(name)
        assert torch.equal(found, expected), name
        assert not torch.equal(found, start[name]), name


def test_ten_steps_with_alpha_one_differ_from_no_injection(tmp_path: Path) -> None:
    plain, model = Backbone(), Backbone()
    train(plain, 10)
    with drift_fast.Injection(model, delta_towards(tmp_path, model)) as injection:
        train(model, 10, injection=injection)
    for name, expected in weights_of(plain).items():
        assert not torch.equal(model.get_parameter(name), expected), name


# --- mixed precision --------------------------------------------------------------------------


@pytest.mark.parametrize("scale", reference.SCALES)
def test_gradients_of_an_autocast_pass_are_injected(tmp_path: Path, scale: str) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs, targets = regression_batch()
        loss = torch.nn.functional.mse_loss(model(inputs).float(), targets)
    loss.backward()
    before = gradients_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drift_fast.Injection(model, delta, alpha=0.6, scale=scale).step()
    for name, found in gradients_of(model).items():
        if name in delta:
            assert found.dtype is torch.float32
            assert_follows_reference(found, before[name], delta[name], alpha=0.6, scale=scale)


@pytest.mark.parametrize("scale", reference.SCALES)
def test_a_bfloat16_delta_is_injected_into_float32_gradients(tmp_path: Path, scale: str) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model, dtype="bfloat16")
    accumulated(model, 1)
    before = gradients_of(model)
    drift_fast.Injection(model, delta, alpha=0.6, scale=scale).step()
    for name, found in gradients_of(model).items():
        if name in delta:
            assert found.dtype is torch.float32
            # The norm in the statistics is that of the delta before it was rounded to be stored:
            # for the six values of a bias here the two differ by up to 2**-8.
            expected = reference.inject(before[name], delta[name], alpha=0.6, scale=scale)
            pushed = reference.norm(expected - reference.exact(before[name]))
            error = reference.norm(reference.exact(found) - expected)
            assert error < 2.0**-8 * pushed + 1e-6 * reference.norm(expected), name


def test_autocast_around_a_step_does_not_lower_its_precision(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    accumulated(model, 1)
    before = gradients_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drift_fast.Injection(model, delta, scale="adaptive").step()
    for name, found in gradients_of(model).items():
        if name in delta:
            assert_follows_reference(found, before[name], delta[name], alpha=1, scale="adaptive")


SCALE = 4096.0


@pytest.mark.parametrize("unscale_first", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_a_gradient_scaler_does_not_change_what_is_injected(
    tmp_path: Path, scale: str, unscale_first: bool
) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    accumulated(model, 1)
    plain = gradients_of(model)
    model.zero_grad()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    injection = drift_fast.Injection(
        model, delta, alpha=0.6, scale=scale, optimizer=optimizer, scaler=scaler
    )
    scaler.scale(regression_loss(model, regression_batch())).backward()
    for name, gradient in gradients_of(model).items():
        assert relative_difference(gradient, SCALE * plain[name]) < 1e-5
    if unscale_first:
        scaler.unscale_(optimizer)
        injection.step()
    else:
        injection.step()
        scaler.unscale_(optimizer)
    for name, found in gradients_of(model).items():
        expected: Any = plain[name]
        if name in delta:
            expected = reference.inject(plain[name], delta[name], alpha=0.6, scale=scale)
        assert relative_difference(found, expected) < 1e-5, name
    scaler.step(optimizer)
    scaler.update()


def scaled_loop(
    injection: drift_fast.Injection,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    model: torch.nn.Module,
    *,
    unscale: bool,
) -> None:
    for seed in range(3):
        optimizer.zero_grad()
        scaler.scale(regression_loss(model, regression_batch(seed=seed))).backward()
        if unscale:
            scaler.unscale_(optimizer)
        injection.step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("case", ["scaled", "unscaled", "disabled", "given"])
def test_a_scaler_that_is_not_given_stops_an_absolute_push_into_scaled_gradients(
    tmp_path: Path, scale: str, case: str
) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=case != "disabled")
    given: Any = {"optimizer": optimizer, "scaler": scaler} if case == "given" else {}
    with drift_fast.Injection(model, delta, scale=scale, **given) as injection:
        loop = functools.partial(
            scaled_loop, injection, optimizer, scaler, model, unscale=case == "unscaled"
        )
        if (scale, case) == ("absolute", "scaled"):
            with pytest.raises(drift_fast.DriftError, match=r"loss scale.*pass scaler=.*unscale_"):
                loop()
        else:
            loop()
            assert injection.steps == 3


@pytest.mark.parametrize("scale", reference.SCALES)
def test_the_scale_of_the_moment_counts_when_the_scaler_backs_off(
    tmp_path: Path, scale: str
) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    injection = drift_fast.Injection(
        model, delta, alpha=0.6, scale=scale, optimizer=optimizer, scaler=scaler
    )
    victim = "model.layers.0.self_attn.k_proj.weight"

    # First step: one gradient overflows. The scaler skips the optimizer and halves its scale.
    start = weights_of(model)
    scaler.scale(regression_loss(model, regression_batch())).backward()
    spoilt = model.get_parameter(victim).grad
    assert spoilt is not None
    spoilt[0, 0] = math.inf
    injection.step()
    assert (injection.injected, injection.skipped) == (19, 1)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name])

    # Second step: everything is finite again, under the smaller scale.
    optimizer.zero_grad()
    regression_loss(model, regression_batch()).backward()
    plain = gradients_of(model)
    optimizer.zero_grad()
    scaler.scale(regression_loss(model, regression_batch())).backward()
    injection.step()
    assert (injection.injected, injection.skipped) == (20, 0)
    scaler.unscale_(optimizer)
    for name, found in gradients_of(model).items():
        if name in delta:
            expected = reference.inject(plain[name], delta[name], alpha=0.6, scale=scale)
            assert relative_difference(found, expected) < 1e-5, name
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model.get_parameter(victim), start[victim])


def test_a_disabled_scaler_leaves_the_absolute_push_as_it_is(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=False)
    injection = drift_fast.Injection(
        model, delta, alpha=0.6, scale="absolute", optimizer=optimizer, scaler=scaler
    )
    scaler.scale(regression_loss(model, regression_batch())).backward()
    plain = gradients_of(model)
    injection.step()
    for name, found in gradients_of(model).items():
        if name in delta:
            assert_follows_reference(found, plain[name], delta[name], alpha=0.6, scale="absolute")


# --- attached to an optimizer -----------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True], ids=["torch", "accelerate"])
def test_an_injection_attached_to_an_optimizer_runs_when_it_steps(
    tmp_path: Path, prepared: bool
) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if prepared:
        accelerate = pytest.importorskip("accelerate")
        optimizer = accelerate.Accelerator(cpu=True).prepare(optimizer)
    injection = drift_fast.attach(optimizer, delta, model=model, alpha=0.7, scale="gradnorm")
    for step in range(2):
        start = weights_of(model)
        optimizer.zero_grad()
        regression_loss(model, regression_batch(seed=step)).backward()
        plain = gradients_of(model)
        optimizer.step()
        for name in delta:
            pushed = reference.inject(plain[name], delta[name], alpha=0.7, scale="gradnorm")
            expected = reference.exact(start[name]) - 0.1 * pushed
            moved = reference.exact(model.get_parameter(name))
            np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
    assert injection.injected == 20
    injection.remove()


def test_accelerate_injects_between_backward_and_clipping(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    injection = drift_fast.Injection(model, delta, scale="gradnorm", optimizer=optimizer)
    inputs, targets = regression_batch(8)
    expected: dict[str, Any] = {}
    for part in zip(inputs.chunk(4), targets.chunk(4), strict=True):
        with accelerator.accumulate(model):
            accelerator.backward(regression_loss(model, part))
            if accelerator.sync_gradients:
                expected = {
                    name: reference.inject(gradient, delta[name], alpha=1.0, scale="gradnorm")
                    if name in delta
                    else gradient
                    for name, gradient in gradients_of(model).items()
                }
                injection.step()
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                found = gradients_of(model)
            optimizer.step()
            optimizer.zero_grad()
    _, clipped = reference.clip(expected, 0.1)
    for name, gradient in found.items():
        assert relative_difference(gradient, clipped[name]) < 1e-5, name
