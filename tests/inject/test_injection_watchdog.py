"""The watchdog: no optimizer step uses a target's gradient without the injection.

Owns: which steps are stopped and which are not. Errors before the first step are in
test_injection_errors.py.
"""

from __future__ import annotations

import math

import pytest
import torch

import drift_fast
from support.injection_models import (
    Backbone,
    regression_batch,
    regression_loss,
    train,
)

VICTIM = "model.layers.1.mlp.down_proj.weight"


def test_an_update_without_an_injection_is_stopped_at_the_first_step(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    drift_fast.Injection(model, delta, optimizer=optimizer)
    regression_loss(model, regression_batch()).backward()
    with pytest.raises(drift_fast.DriftError, match="nothing was injected") as caught:
        optimizer.step()
    assert "step()" in str(caught.value)


def test_a_hook_that_never_fires_is_noticed_in_microbatch_scope(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    drift_fast.Injection(model, delta, scope="microbatch", optimizer=optimizer)
    for parameter in model.parameters():
        # Gradients that did not come from a backward pass: no hook has run.
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
        optimizer.step()


def test_the_watchdog_is_quiet_in_a_right_loop_and_after_removal(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    injection = drift_fast.Injection(model, delta, optimizer=optimizer)
    train(model, 3, injection=injection, optimizer=optimizer)
    injection.remove()
    train(model, 3, optimizer=optimizer)

    unused = drift_fast.Injection(model, delta, optimizer=optimizer)
    unused.remove()
    train(model, 1, optimizer=optimizer)


def test_two_optimizers_that_share_the_targets_are_served_by_one_step(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    # Matrices to one optimizer and vectors to another, as with Muon beside AdamW.
    matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=1e-2)
    vectors = torch.optim.AdamW([p for p in model.parameters() if p.ndim == 1], lr=1e-2)
    injection = drift_fast.Injection(model, delta)
    for step in range(3):
        model.zero_grad()
        regression_loss(model, regression_batch(seed=step)).backward()
        injection.step()
        matrices.step()
        vectors.step()
    model.zero_grad()
    regression_loss(model, regression_batch()).backward()
    for optimizer in (matrices, vectors):
        with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
            optimizer.step()


def test_targets_that_join_an_optimizer_later_are_watched(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    optimizer = torch.optim.SGD(model.head.parameters(), lr=1e-2)
    injection = drift_fast.Injection(model, delta)
    regression_loss(model, regression_batch()).backward()
    injection.step()
    optimizer.step()
    model.zero_grad()
    regression_loss(model, regression_batch()).backward()
    with pytest.warns(drift_fast.DriftWarning, match="optimizer holds 0 of 20 targets"):
        injection.step()
    optimizer.step()
    optimizer.add_param_group({"params": list(model.model.parameters())})
    model.zero_grad()
    regression_loss(model, regression_batch()).backward()
    with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
        optimizer.step()


def test_the_optimizer_of_another_model_is_not_watched(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    injection = drift_fast.Injection(model, delta)
    other = Backbone()
    train(other, 2)
    regression_loss(model, regression_batch()).backward()
    injection.step()
    train(other, 2)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("victim", [VICTIM, "head.weight"])
def test_a_step_that_the_scaler_skips_does_not_block_the_next(
    model: Backbone, delta: drift_fast.Delta, victim: str, set_to_none: bool
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    injection = drift_fast.Injection(model, delta, optimizer=optimizer, scaler=scaler)
    for overflow in (True, False):
        optimizer.zero_grad(set_to_none=set_to_none)
        scaler.scale(regression_loss(model, regression_batch())).backward()
        if overflow:
            spoilt = model.get_parameter(victim).grad
            assert spoilt is not None
            spoilt.fill_(math.inf)
        injection.step()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert (injection.injected, injection.skipped) == (20, 0)


def test_the_watchdog_is_quiet_when_the_first_step_is_skipped_by_the_scaler(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    injection = drift_fast.Injection(model, delta, optimizer=optimizer, scaler=scaler)
    for overflow in (True, False):
        optimizer.zero_grad()
        scaler.scale(regression_loss(model, regression_batch())).backward()
        if overflow:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(math.inf)
        injection.step()
        scaler.step(optimizer)
        scaler.update()
        assert injection.skipped == (len(delta) if overflow else 0)
