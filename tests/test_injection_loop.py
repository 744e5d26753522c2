"""Injection in a training loop: accumulation, clipping, mixed precision, motion along the delta.

Owns: what a user's own loop sees in step scope. The formula is in test_injection.py, the Trainer
in test_trainer.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
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
    train,
    weights_of,
)
from reference import assert_follows_reference


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
    delta = delta_towards(tmp_path, model, dtype="bfloat16")
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
            # The stored delta is rounded to bfloat16, and its norm may be that of either form.
            expected = reference.inject(before[name], delta[name], alpha=0.6, scale=scale)
            assert relative_difference(found, expected) < 1e-3


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


# --- motion along the delta -------------------------------------------------------------------


def final_progress(tmp_path: Path, alpha: float, scale: str, optimizer_name: str) -> float:
    model = Backbone()
    delta = delta_towards(tmp_path / f"{alpha}", model)
    start = weights_of(model)
    kinds = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
    optimizer = kinds[optimizer_name](model.parameters(), lr=2e-3)
    with drift_fast.Injection(model, delta, alpha=alpha, scale=scale) as injection:
        train(model, 20, injection=injection, optimizer=optimizer, clip=None)
    return reference.progress(weights_of(model), start, delta)[0]


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_positive_alpha_moves_towards_the_expert_and_negative_alpha_away(
    tmp_path: Path, scale: str, optimizer: str
) -> None:
    # Adaptive answers a push away with the same law: it is weaker, never reversed.
    towards, plain, away = (
        final_progress(tmp_path, alpha, scale, optimizer) for alpha in (1.0, 0.0, -1.0)
    )
    assert towards > plain + 1e-3
    assert away < plain - 1e-3


@pytest.mark.parametrize("learning_rate", [1e-2, 1e-7])
def test_reported_progress_equals_a_float64_computation(
    tmp_path: Path, learning_rate: float
) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    start = weights_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    with drift_fast.Injection(model, delta) as injection:
        train(model, 5, injection=injection, optimizer=optimizer)
        found = injection.metrics()
    overall, each = reference.progress(weights_of(model), start, delta)
    assert found["progress"] == pytest.approx(overall, rel=1e-3, abs=1e-9)
    assert {key for key in found if key.startswith("progress/")} >= {
        f"progress/{name}" for name in each
    }
    for name, expected in each.items():
        # Single tensors move along the delta by differences of a few float32 steps.
        assert found[f"progress/{name}"] == pytest.approx(expected, rel=1e-2, abs=1e-6), name


def test_progress_is_zero_at_attachment_and_one_at_the_expert(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    injection = drift_fast.Injection(model, delta)
    assert injection.metrics()["progress"] == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for name, values in delta.items():
            model.get_parameter(name).add_(values)
    found = injection.metrics()
    assert found["progress"] == pytest.approx(1.0, abs=1e-5)
    for name in delta:
        assert found[f"progress/{name}"] == pytest.approx(1.0, abs=1e-5)


def test_progress_is_zero_at_attachment_away_from_the_multimodal_checkpoint(
    tmp_path: Path,
) -> None:
    # Here the weights at the start are not those the delta was subtracted from.
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1)
    start = weights_of(model)
    injection = drift_fast.Injection(model, delta)
    assert injection.metrics()["progress"] == pytest.approx(0.0, abs=1e-6)
    train(model, 3, injection=injection)
    expected, _ = reference.progress(weights_of(model), start, delta)
    assert injection.metrics()["progress"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_metrics_are_plain_finite_numbers(tmp_path: Path) -> None:
    model = Backbone()
    with drift_fast.Injection(model, delta_towards(tmp_path, model)) as injection:
        train(model, 1, injection=injection)
        found = injection.metrics()
    assert all(isinstance(key, str) for key in found)
    assert all(isinstance(value, int | float) for value in found.values())
    assert np.isfinite(list(found.values())).all()


def test_progress_counts_only_the_chosen_parameters(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    start = weights_of(model)
    with drift_fast.Injection(model, delta, modules="attn") as injection:
        train(model, 5, injection=injection)
        found = injection.metrics()
    chosen = {name: delta[name] for name in delta if "self_attn" in name}
    expected, _ = reference.progress(weights_of(model), start, chosen)
    assert found["progress"] == pytest.approx(expected, rel=1e-3)
    assert not any("mlp" in key for key in found if key.startswith("progress/"))
