"""Whose a parameter is: second attachments, copies of an attached model, moves and lifetimes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import drift_fast
from drift_fast import DriftError, Injection
from support.injection_models import (
    Backbone,
    delta_towards,
    regression_batch,
    regression_loss,
    train,
)

SCOPES = pytest.mark.parametrize("scope", ["step", "microbatch"])


def step(model: nn.Module, injection: Injection | None = None, seed: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    regression_loss(model, regression_batch(seed=seed)).backward()
    if injection is not None:
        injection.step()
    optimizer.step()
    optimizer.zero_grad()


# --- copies --------------------------------------------------------------------------------------


def unpickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copied_twice(model: nn.Module) -> Any:
    return copy.deepcopy(copy.deepcopy(model))


def copied_in_part(model: Any) -> Any:
    twin = Backbone()
    twin.model = copy.deepcopy(model.model)
    return twin


COPIES = pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copied_twice, copied_in_part, unpickled, saved_whole]
)


@COPIES
@SCOPES
def test_a_copy_of_an_attached_model_does_not_train_unnoticed(
    model: Backbone, delta: drift_fast.Delta, scope: str, duplicate: Callable[[nn.Module], Any]
) -> None:
    injection = Injection(model, delta, scope=scope)
    twin = duplicate(model)
    with pytest.raises(DriftError, match=r"20 parameters of this SGD are copies of targets"):
        step(twin)
    step(model, injection if scope == "step" else None)


@COPIES
def test_a_copy_trains_once_it_is_attached_to_or_the_first_is_removed(
    model: Backbone, delta: drift_fast.Delta, duplicate: Callable[[nn.Module], Any]
) -> None:
    injection = Injection(model, delta)
    twin, plain = duplicate(model), duplicate(model)
    own = Injection(twin, delta)
    step(twin, own)
    step(model, injection)
    own.remove()
    injection.remove()
    step(plain)
    step(twin)


def test_a_pickled_model_loads_where_this_library_is_not(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    with Injection(model, delta):
        regression_loss(model, regression_batch()).backward()
        whole = pickle.dumps(model)
        state = io.BytesIO()
        torch.save(model.state_dict(), state)
        parameters = io.BytesIO()
        gradients = [p.grad for p in model.parameters()]
        torch.save([dict(model.named_parameters()), gradients], parameters)
    assert b"drift_fast.inject" not in whole
    for file in (state, parameters):
        file.seek(0)
        assert torch.load(file, weights_only=True)
    state.seek(0)
    assert b"drift_fast" not in state.getvalue()


def test_nothing_is_left_on_a_model_after_removal(model: Backbone, delta: drift_fast.Delta) -> None:
    before = [set(vars(each)) for each in (*model.modules(), *model.parameters())]
    injection = Injection(model, delta)
    step(model, injection)
    injection.remove()
    assert [set(vars(each)) for each in (*model.modules(), *model.parameters())] == before


# --- moves ---------------------------------------------------------------------------------------


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_attached_model_may_be_moved_by_swapping(
    model: Backbone, delta: drift_fast.Delta, swapping: None, overlap: bool
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    injection = Injection(model, delta, overlap=overlap, optimizer=optimizer)
    for at in range(3):
        regression_loss(model, regression_batch(seed=at)).backward()
        injection.step()
        # Offloaded to be saved, with gradients and without.
        model.to(torch.float64).to(torch.float32)
        optimizer.step()
        optimizer.zero_grad()
        model.to(torch.float64).to(torch.float32)
    assert injection.injected == len(delta)


def test_hooks_that_a_swap_has_lost_stop_the_microbatch_scope(
    model: Backbone, delta: drift_fast.Delta, swapping: None
) -> None:
    Injection(model, delta, scope="microbatch")
    step(model)
    model.to(torch.float64).to(torch.float32)
    with pytest.raises(DriftError, match="moved"):
        step(model)


def test_no_tensor_is_referred_to_weakly(model: Backbone, delta: drift_fast.Delta) -> None:
    for options in ({}, {"overlap": True}, {"scope": "microbatch"}):
        with Injection(model, delta, **options) as injection:
            regression_loss(model, regression_batch()).backward()
            if options.get("scope") is None:
                injection.step()
            tensors = [t for p in model.parameters() for t in (p, p.grad)]
            assert not any(weakref.getweakrefs(tensor) for tensor in tensors)
            model.zero_grad()


# --- lifetimes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"scope": "microbatch"}])
@pytest.mark.parametrize("holds", [True, False])
def test_a_model_that_was_dropped_is_freed_with_its_attachment(
    tmp_path: Path, options: dict[str, Any], holds: bool
) -> None:
    # What earlier tests have left.
    gc.collect()
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    injection: Injection | None = Injection(model, delta, **options)
    assert injection is not None
    step(model, None if "scope" in options else injection)
    gone = weakref.ref(model)
    scope = weakref.ref(injection._scope)
    hooks = len(_global_optimizer_pre_hooks)
    if not holds:
        injection = None
    del model
    gc.collect()
    assert gone() is None
    if holds:
        injection = None
        gc.collect()
    assert scope() is None
    assert len(_global_optimizer_pre_hooks) == hooks - 1


@SCOPES
def test_an_attachment_that_was_dropped_goes_on_with_its_model(
    model: Backbone, delta: drift_fast.Delta, scope: str
) -> None:
    Injection(model, delta, scope=scope)
    gc.collect()
    if scope == "microbatch":
        step(model)
    else:
        with pytest.raises(DriftError, match="nothing was injected"):
            step(model)


@SCOPES
def test_a_new_attachment_takes_the_place_of_one_that_was_dropped(
    model: Backbone, delta: drift_fast.Delta, scope: str
) -> None:
    Injection(model, delta, scope="microbatch")
    Injection(model, delta)
    gc.collect()
    twin = Backbone()
    injection = Injection(model, delta, scope=scope)
    other = Injection(twin, delta, scope=scope)
    for one, own in ((model, injection), (twin, other)):
        step(one, own if scope == "step" else None)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)


@SCOPES
def test_a_second_attachment_to_some_parameters_is_refused_while_the_first_is_held(
    model: Backbone, delta: drift_fast.Delta, scope: str
) -> None:
    first = Injection(model, delta, layers=[0])
    with pytest.raises(DriftError, match=r"layers\.0.* has an injection attached already"):
        Injection(model, delta, scope=scope)
    second = Injection(model, delta, layers=[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    regression_loss(model, regression_batch()).backward()
    first.step()
    with pytest.raises(DriftError, match="nothing was injected"):
        optimizer.step()
    second.step()
    optimizer.step()
    first.remove()
    second.remove()
    train(model, 1)


def test_a_model_is_freed_at_once_after_removal(delta: drift_fast.Delta) -> None:
    gc.collect()
    gc.disable()
    try:
        model = Backbone()
        injection = Injection(model, delta)
        step(model, injection)
        injection.remove()
        gone = weakref.ref(model)
        del model, injection
        assert gone() is None
    finally:
        gc.enable()


def replace_weights(model: nn.Module) -> None:
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("holds", [True, False], ids=["held", "dropped"])
def test_who_attaches_anew_as_advised_is_done_with_the_first_attachment(
    model: Backbone, delta: drift_fast.Delta, holds: bool
) -> None:
    injection: Injection | None = Injection(model, delta)
    step(model, injection)
    replace_weights(model)
    with pytest.raises(DriftError, match="attach after the model"):
        step(model)
    if not holds:
        injection = None
    # In a notebook the variable still has the first one while the second attaches.
    injection = Injection(model, delta)
    gc.collect()
    step(model, injection)
    assert injection.steps == 1
    injection.remove()
    step(model)


def test_without_a_second_attachment_replaced_weights_stop_training(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    Injection(model, delta)
    replace_weights(model)
    gc.collect()
    with pytest.raises(DriftError, match="no longer parameters"):
        step(model)


def test_an_attachment_to_other_modules_takes_no_ones_place(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    Injection(model, delta, layers=[0])
    replace_weights(model)
    gc.collect()
    injection = Injection(model, delta, layers=[1])
    with pytest.raises(DriftError, match="no longer parameters"):
        step(model, injection)


def test_an_attachment_whose_targets_are_frozen_for_now_stays(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    Injection(model, delta, layers=[0])
    first = [p for n, p in model.named_parameters() if ".layers.0." in n]
    for parameter in first:
        parameter.requires_grad_(False)
    injection = Injection(model, delta, layers=[1])
    gc.collect()
    for parameter in first:
        parameter.requires_grad_(True)
    with pytest.raises(DriftError, match="nothing was injected before this step"):
        step(model, injection)


def test_adapters_that_were_added_after_attaching_are_attached_to_anew(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    peft = pytest.importorskip("peft")
    injection = Injection(model, delta)
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(model, options)
    with pytest.raises(DriftError, match="attach after the model was wrapped"):
        step(adapted)
    injection = Injection(adapted, delta, modules=r"re:(q|down)_proj\.weight$")
    gc.collect()
    step(adapted, injection)
    assert injection.steps == 1
    injection.remove()
    step(adapted)


@pytest.mark.parametrize("given", [True, False], ids=["given", "not given"])
def test_an_optimizer_of_frozen_targets_is_refused_unless_it_was_named(
    model: Backbone, delta: drift_fast.Delta, given: bool
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    Injection(model, delta, optimizer=optimizer if given else None)
    names = delta.keys()
    for name, parameter in model.named_parameters():
        # As a generator is while a discriminator trains; the head goes on.
        parameter.requires_grad_(name not in names)
    regression_loss(model, regression_batch()).backward()
    if given:
        optimizer.step()
    else:
        with pytest.raises(DriftError, match="were frozen after attaching"):
            optimizer.step()
