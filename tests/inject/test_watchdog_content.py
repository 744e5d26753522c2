"""The watchdog looks at what is in a gradient, not at how often something was called.

Owns: which changes of an injected gradient leave it injected, in loops of every kind, and which do
not. What is stopped in a plain loop is in test_injection_watchdog.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import drift_fast
from support import reference
from support.injection_models import (
    Backbone,
    gradients_of,
    regression_batch,
    regression_loss,
    weights_of,
)

VICTIM = "model.layers.1.mlp.down_proj.weight"
EITHER_ZERO = pytest.mark.parametrize("set_to_none", [True, False])
Clip = Callable[[nn.Module], Any]


def backward(model: nn.Module, seed: int = 1) -> None:
    regression_loss(model, regression_batch(seed=seed)).backward()


def sgd(model: nn.Module, lr: float = 1e-2) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def pushed(
    model: nn.Module, delta: drift_fast.Delta, plain: dict[str, torch.Tensor], **options: Any
) -> Iterator[tuple[torch.Tensor, Any]]:
    """Yield every target's gradient, and the float64 restatement of what it must be."""
    for name in delta:
        found = model.get_parameter(name).grad
        assert found is not None
        yield found, reference.inject(plain[name], delta[name], **options)


def assert_injected_once(
    model: nn.Module, delta: drift_fast.Delta, plain: dict[str, torch.Tensor]
) -> None:
    for found, expected in pushed(model, delta, plain, alpha=1.0, scale="adaptive"):
        error = reference.norm(reference.exact(found) - expected)
        assert error < 1e-5 * reference.norm(expected)


# --- changes that leave a gradient injected ------------------------------------------------------


def by_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def by_norm_one_by_one(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=False)


def by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def out_of_place(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad = parameter.grad * 0.5


def through_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.data = parameter.grad.data.clamp(-1, 1)


def moved(model: nn.Module) -> None:
    model.to(torch.float64).to(torch.float32)


@pytest.mark.parametrize(
    "change", [by_norm, by_norm_one_by_one, by_value, out_of_place, through_data, moved]
)
@pytest.mark.parametrize("scope", ["step", "microbatch"])
@EITHER_ZERO
def test_what_is_done_to_an_injected_gradient_leaves_it_injected(
    model: Backbone, delta: drift_fast.Delta, scope: str, change: Clip, set_to_none: bool
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta, scope=scope, optimizer=optimizer)
    for step in range(3):
        backward(model, step)
        if scope == "step":
            injection.step()
        change(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert injection.injected == len(delta)


def test_gradients_without_a_backward_pass_are_followed_by_identity(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    parameters = list(model.parameters())
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta)

    def assign(seed: int) -> None:
        loss = regression_loss(model, regression_batch(seed=seed))
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient

    for step in range(3):
        assign(step)
        if step != 1:
            # A guard skips the second one.
            injection.step()
            optimizer.step()
    assign(3)
    with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
        optimizer.step()


def test_gradients_copied_by_hand_into_the_same_tensors_are_followed_by_version(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for inject in (True, True, False):
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.copy_(torch.ones_like(parameter))
        if inject:
            injection.step()
            optimizer.step()
    with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
        optimizer.step()


# --- right loops of every kind -------------------------------------------------------------------


@EITHER_ZERO
@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_a_guard_that_skips_steps_is_not_taken_for_a_second_call(
    model: Backbone, delta: drift_fast.Delta, scope: str, set_to_none: bool
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta, scope=scope)
    for step in range(4):
        backward(model, step)
        if scope == "step":
            plain = gradients_of(model)
            injection.step()
            assert_injected_once(model, delta, plain)
        if step % 2:
            optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


@EITHER_ZERO
def test_a_step_that_a_scaler_skips_is_tried_again(
    model: Backbone, delta: drift_fast.Delta, set_to_none: bool
) -> None:
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    injection = drift_fast.Injection(model, delta, optimizer=optimizer, scaler=scaler)
    start = weights_of(model)
    for attempt in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        scaler.scale(regression_loss(model, regression_batch())).backward()
        if attempt == 0:
            gradient = model.get_parameter("head.weight").grad
            assert gradient is not None
            gradient.fill_(math.inf)
        injection.step()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(model.get_parameter(VICTIM), start[VICTIM])


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization as it is published: one optimizer inside another."""

    def __init__(self, parameters: Any, rho: float = 0.05) -> None:
        super().__init__(parameters, {"rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=1e-2)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        held = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in held if p.grad is not None]).norm()
        for parameter in held:
            self.state[parameter]["before"] = parameter.clone()
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=float(0.05 / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["before"])
        self.base.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


@pytest.mark.parametrize("ascends_injected", [True, False])
def test_two_backward_passes_of_sam_need_one_injection_before_the_descent(
    model: Backbone, delta: drift_fast.Delta, ascends_injected: bool
) -> None:
    optimizer = Sam(model.parameters())
    injection = drift_fast.Injection(model, delta)
    for step in range(2):
        backward(model, step)
        if ascends_injected:
            injection.step()
        optimizer.first_step()
        backward(model, step)
        injection.step()
        optimizer.second_step()
    backward(model)
    injection.step()
    optimizer.first_step()
    backward(model)
    with pytest.raises(drift_fast.DriftError, match="a backward pass wrote"):
        optimizer.second_step()


@pytest.mark.parametrize("attached", ["loop", "outer", "inner"])
def test_a_closure_of_sam_injects_before_the_descent(
    model: Backbone, delta: drift_fast.Delta, attached: str
) -> None:
    optimizer = Sam(model.parameters())
    stepper: Any = {"loop": None, "outer": optimizer, "inner": optimizer.base}[attached]
    if stepper is None:
        injection = drift_fast.Injection(model, delta)
    else:
        injection = drift_fast.attach(stepper, delta, model=model)

    def closure() -> None:
        backward(model)
        if stepper is None:
            injection.step()

    for _ in range(2):
        backward(model)
        optimizer.step(closure)
    assert injection.steps == 2


class EagerSam(Sam):
    """Runs its closure at once, as torch's own optimizers do (davda54/sam#91)."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.enable_grad()(closure)()
        super().step(closure)


@pytest.mark.parametrize("closes", [True, False])
def test_an_attached_sam_injects_before_the_descent_however_it_is_called(
    model: Backbone, delta: drift_fast.Delta, closes: bool
) -> None:
    optimizer = EagerSam(model.parameters())
    injection = drift_fast.attach(optimizer, delta, model=model)
    for _ in range(2):
        if closes:
            optimizer.step(lambda: backward(model))
            continue
        # Both passes are clipped (davda54/sam#32).
        for one in (optimizer.first_step, optimizer.second_step):
            backward(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            one()
    assert injection.steps == (4 if closes else 2)


class Lookahead(torch.optim.Optimizer):
    """Hands its step on to another optimizer, and averages weights now and then."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step(closure)


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("closes", [True, False])
def test_an_optimizer_inside_another_is_injected_into_once(
    model: Backbone, delta: drift_fast.Delta, inner: bool, closes: bool
) -> None:
    optimizer = Lookahead(sgd(model, lr=0.0))
    attached = optimizer.inner if inner else optimizer
    injection = drift_fast.attach(attached, delta, model=model)
    for step in range(2):
        optimizer.zero_grad()
        backward(model, step)
        plain = gradients_of(model)
        if closes:
            optimizer.zero_grad()
            optimizer.step(lambda step=step: backward(model, step))  # type: ignore[misc]
        else:
            optimizer.step()
        assert_injected_once(model, delta, plain)
    assert injection.steps == 2


@pytest.mark.parametrize("attached", [True, False])
def test_lbfgs_is_injected_into_in_each_call_of_its_closure(
    model: Backbone, delta: drift_fast.Delta, attached: bool
) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=3)
    if attached:
        injection = drift_fast.attach(optimizer, delta, model=model)
    else:
        injection = drift_fast.Injection(model, delta)
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = regression_loss(model, regression_batch())
        loss.backward()
        if not attached:
            injection.step()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert calls >= 4
    assert injection.steps == calls


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_closure_uses_the_injected_gradient(
    model: Backbone, delta: drift_fast.Delta, kind: Any, keyword: bool
) -> None:
    optimizer = kind(model.parameters(), lr=0.0)
    injection = drift_fast.attach(optimizer, delta, model=model)
    twin = Backbone()
    backward(twin, 7)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = regression_loss(model, regression_batch(seed=7))
        loss.backward()
        return loss

    for _ in range(2):
        # What was there before, say to see whether a batch fits, is not what is injected into.
        backward(model, 1)
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert isinstance(loss, torch.Tensor)
        assert_injected_once(model, delta, gradients_of(twin))
    assert (injection.steps, injection.injected) == (2, len(delta))


def test_a_closure_without_an_injection_is_stopped(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = regression_loss(model, regression_batch())
        loss.backward()
        return loss

    backward(model)
    injection.step()
    start = weights_of(model)
    with pytest.raises(drift_fast.DriftError, match="in a closure before it returns"):
        optimizer.step(closure)
    assert all(torch.equal(found, start[name]) for name, found in weights_of(model).items())


def test_an_optimizer_does_not_inject_by_itself_what_a_cuda_graph_replays(
    model: Backbone, delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.attach(optimizer, delta, model=model)
    # As on a GPU while torch.cuda.graph captures; its replays run no hook.
    monkeypatch.setattr("drift_fast.inject.watchdog._is_captured", lambda tensor: True)
    backward(model)
    with pytest.raises(drift_fast.DriftError, match="captured into a CUDA graph"):
        optimizer.step()
    injection.remove()
    # The remedy, followed: replays write into the same tensors, and nothing hears of it.
    injection = drift_fast.Injection(model, delta)
    backward(model)
    for step in range(2):
        if step:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.data.normal_()
        plain = gradients_of(model)
        injection.step()
        assert_injected_once(model, delta, plain)
        optimizer.step()


def test_a_closure_that_only_returns_the_loss_is_served(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.attach(optimizer, delta, model=model)
    for step in range(2):
        optimizer.zero_grad()
        loss = regression_loss(model, regression_batch(seed=step))
        loss.backward()
        optimizer.step(lambda loss=loss: loss)  # type: ignore[misc]
    assert injection.steps == 2


class Deaf(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()


def test_an_optimizer_that_leaves_its_closure_alone_is_watched(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    drift_fast.Injection(model, delta)
    backward(model)
    with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
        Deaf(model.parameters(), lr=1e-2).step(lambda: None)


@EITHER_ZERO
def test_an_optimizer_that_steps_again_before_the_next_backward_is_left_alone(
    model: Backbone, delta: drift_fast.Delta, set_to_none: bool
) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    injection = drift_fast.attach(optimizer, delta, model=model)
    for step in range(2):
        backward(model, step)
        plain = gradients_of(model)
        # The same gradient, and then nothing or zeros: none of it is plain, none is pushed twice.
        optimizer.step()
        optimizer.step()
        assert_injected_once(model, delta, plain)
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
    assert injection.steps == 2


# --- loops that would use a plain gradient -------------------------------------------------------


@EITHER_ZERO
def test_backward_after_the_injection_is_stopped(
    model: Backbone, delta: drift_fast.Delta, set_to_none: bool
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta)
    for _ in range(2):
        backward(model, 1)
        injection.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        backward(model, 2)
        with pytest.raises(drift_fast.DriftError, match="backward pass wrote to 20 of 20"):
            optimizer.step()
        # The remedy, followed.
        injection.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


@EITHER_ZERO
def test_a_call_after_each_micro_batch_is_refused_before_it_injects_twice(
    model: Backbone, delta: drift_fast.Delta, set_to_none: bool
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta)
    for _ in range(2):
        backward(model, 1)
        injection.step()
        # One more, and several more, that add to what is injected.
        for seeds in [(2,), (3, 4)]:
            for seed in seeds:
                backward(model, seed)
            before = gradients_of(model)
            with pytest.raises(drift_fast.DriftError, match="Δ would be in it twice"):
                injection.step()
            assert all(torch.equal(found, before[n]) for n, found in gradients_of(model).items())
        # The remedy, followed: what is left out is cleared.
        optimizer.zero_grad(set_to_none=set_to_none)
        backward(model, 1)
        backward(model, 2)
        plain = gradients_of(model)
        injection.step()
        assert_injected_once(model, delta, plain)
        optimizer.step()
        # Without clearing: what an optimizer has used is the user's to keep.
        backward(model, 5)
        injection.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


@EITHER_ZERO
def test_a_step_that_is_left_out_after_clipping_is_injected_anew(
    model: Backbone, delta: drift_fast.Delta, set_to_none: bool
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta, optimizer=optimizer)
    for step in range(3):
        backward(model, step)
        plain = gradients_of(model)
        injection.step()
        assert_injected_once(model, delta, plain)
        by_norm(model)
        optimizer.zero_grad(set_to_none=set_to_none)
    assert injection.steps == 3


@EITHER_ZERO
def test_an_injection_before_the_last_micro_batch_is_stopped(
    model: Backbone, delta: drift_fast.Delta, set_to_none: bool
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta)
    for step in range(2):
        backward(model, 1)
        if step == 0:
            backward(model, 2)
        injection.step()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            continue
        backward(model, 2)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(drift_fast.DriftError, match="after the last backward pass"):
            optimizer.step()


def test_backward_through_a_part_after_the_injection_is_stopped(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    injection = drift_fast.Injection(model, delta)
    backward(model)
    injection.step()
    model.get_parameter(VICTIM).square().sum().backward()
    with pytest.raises(drift_fast.DriftError, match=rf"wrote to 1 of 20 .*{VICTIM}"):
        sgd(model).step()


def test_an_injection_before_backward_is_stopped(model: Backbone, delta: drift_fast.Delta) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta)
    backward(model)
    injection.step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    injection.step()
    backward(model)
    with pytest.raises(drift_fast.DriftError, match="after the last backward pass"):
        optimizer.step()


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_second_call_is_refused_with_a_scaler_too(
    model: Backbone, delta: drift_fast.Delta, scaled: bool, clips: bool
) -> None:
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    injection = drift_fast.Injection(model, delta, optimizer=optimizer, scaler=scaler)
    scaler.scale(regression_loss(model, regression_batch())).backward()
    injection.step()
    scaler.unscale_(optimizer)
    if clips:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    once = gradients_of(model)
    with pytest.raises(drift_fast.DriftError, match="called twice"):
        injection.step()
    assert all(torch.equal(found, once[name]) for name, found in gradients_of(model).items())
    assert injection.steps == 1
    scaler.step(optimizer)


@pytest.mark.parametrize(
    ("scope", "set_to_none"), [("step", True), ("step", False), ("microbatch", True)]
)
def test_a_rebuilt_optimizer_does_not_take_an_old_injection_for_its_own(
    model: Backbone, delta: drift_fast.Delta, scope: str, set_to_none: bool
) -> None:
    injection = drift_fast.Injection(model, delta, scope=scope)
    for step in range(2):
        # Rebuilt in each step, which is right.
        optimizer = sgd(model)
        backward(model, step)
        if scope == "step":
            injection.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    if scope == "microbatch":
        # As where hooks are lost, say when parameters are swapped.
        for handle in injection._scope.handles:
            handle.remove()
    backward(model, 2)
    with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
        sgd(model).step()


def test_targets_of_which_some_were_not_injected_are_named(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta)
    backward(model)
    injection.step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    # Only one is written to, so only that one must be injected again.
    model.get_parameter(VICTIM).square().sum().backward()
    with pytest.raises(drift_fast.DriftError, match=f"only 19 of 20 .*{VICTIM}"):
        optimizer.step()


# --- targets that are not what they were ---------------------------------------------------------


def replace_a_layer(model: Backbone) -> None:
    model.model.layers[0] = Backbone().model.layers[0]


def replace_a_weight(model: Backbone) -> None:
    layer: Any = model.get_submodule(VICTIM.rpartition(".")[0])
    layer.weight = nn.Parameter(layer.weight.detach().clone())


@pytest.mark.parametrize("replace", [replace_a_layer, replace_a_weight])
@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize("rebuilt", [True, False])
@EITHER_ZERO
def test_targets_that_were_replaced_stop_the_run(
    model: Backbone,
    delta: drift_fast.Delta,
    replace: Callable[[Backbone], None],
    scope: str,
    rebuilt: bool,
    set_to_none: bool,
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta, scope=scope)

    def step(seed: int) -> None:
        backward(model, seed)
        if scope == "step":
            injection.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)

    step(0)
    replace(model)
    if rebuilt:
        optimizer = sgd(model)
    with pytest.raises(drift_fast.DriftError, match="no longer parameters"):
        step(1)


def test_a_module_that_is_wrapped_in_place_is_still_the_same(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *arguments: Any) -> Any:
            return self.inner(*arguments)

    injection = drift_fast.Injection(model, delta)
    optimizer = sgd(model)
    for step in range(3):
        if step == 1:
            model.model.layers[0] = Wrapper(model.model.layers[0])
        optimizer.zero_grad()
        backward(model, step)
        injection.step()
        optimizer.step()


@pytest.mark.parametrize("scope", ["step", "microbatch"])
@EITHER_ZERO
def test_targets_that_were_frozen_stop_the_run_and_may_be_left_out(
    model: Backbone, delta: drift_fast.Delta, scope: str, set_to_none: bool
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta, scope=scope, scale="absolute", alpha=0.1)

    def step(seed: int) -> None:
        backward(model, seed)
        if scope == "step":
            injection.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)

    step(0)
    model.model.layers[0].requires_grad_(False)
    frozen = weights_of(model.model.layers[0])
    with pytest.raises(drift_fast.DriftError, match="10 of 20 targets were frozen after"):
        step(1)
    # The remedy, followed.
    injection.remove()
    optimizer.zero_grad()
    injection = drift_fast.Injection(
        model, delta, scope=scope, scale="absolute", alpha=0.1, layers=[1]
    )
    step(1)
    for name, weight in frozen.items():
        assert torch.equal(model.model.layers[0].get_parameter(name), weight)


@EITHER_ZERO
def test_frozen_targets_are_left_alone_where_targets_may_be_missing(
    model: Backbone, delta: drift_fast.Delta, set_to_none: bool
) -> None:
    optimizer = sgd(model)
    injection = drift_fast.Injection(
        model, delta, missing_gradients="skip", scale="absolute", alpha=0.1
    )
    for step in range(3):
        if step == 1:
            model.model.layers[0].requires_grad_(False)
            frozen = weights_of(model.model.layers[0])
        backward(model, step)
        injection.step()
        assert (injection.injected, injection.skipped) == ((20, 0) if step == 0 else (10, 10))
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    for name, weight in frozen.items():
        assert torch.equal(model.model.layers[0].get_parameter(name), weight)


def test_layers_that_are_frozen_in_turn_are_injected_into_while_they_train(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    # LISA trains one layer at a time (OptimalScale/LMFlow#726, modelscope/ms-swift#10140).
    optimizer = sgd(model)
    injection = drift_fast.Injection(
        model, delta, missing_gradients="skip", optimizer=optimizer, scale="absolute"
    )
    for step in range(4):
        for at, layer in enumerate(model.model.layers):
            layer.requires_grad_(at == step % 2)
        before = weights_of(model)
        optimizer.zero_grad()
        backward(model, step)
        injection.step()
        assert (injection.injected, injection.skipped) == (10, 10)
        optimizer.step()
        for name, weight in weights_of(model).items():
            frozen = ".layers." in name and f".layers.{step % 2}." not in name
            assert torch.equal(weight, before[name]) == frozen, name


def test_zeros_put_in_place_of_missing_gradients_are_not_taken_for_plain_ones(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    # ByteDance-Seed/VeOmni#1090: so that all processes clip the same gradients.
    optimizer = sgd(model)
    injection = drift_fast.Injection(model, delta, missing_gradients="skip")
    for step in range(2):
        optimizer.zero_grad()
        backward(model, step)
        model.get_parameter(VICTIM).grad = None
        injection.step()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


# --- optimizers without targets ------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize(("layers", "held"), [((), 0), ((1,), 10)])
def test_an_optimizer_without_targets_is_warned_of_after_its_first_step(
    model: Backbone, delta: drift_fast.Delta, scope: str, layers: tuple[int, ...], held: int
) -> None:
    parameters = [p for at in layers for p in model.model.layers[at].parameters()]
    optimizer = torch.optim.SGD([*parameters, *model.head.parameters()], lr=1e-2)
    injection = drift_fast.Injection(model, delta, scope=scope)

    def step(seed: int) -> None:
        model.zero_grad()
        backward(model, seed)
        if scope == "step":
            injection.step()
        optimizer.step()

    step(0)
    with pytest.warns(drift_fast.DriftWarning, match=f"optimizer holds {held} of 20 targets"):
        step(1)
    # Once is enough.
    step(2)


def test_optimizers_of_copies_are_not_warned_of(model: Backbone, delta: drift_fast.Delta) -> None:
    # Mixed precision by hand: an optimizer steps float32 copies, which are written back.
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=1e-2)
    injection = drift_fast.Injection(model, delta)
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        injection.step()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)


def test_an_optimizer_that_was_built_before_an_adapter_is_warned_of(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    peft = pytest.importorskip("peft")
    # adapter-hub/adapters#260: it holds the weights that the adapter then freezes.
    optimizer = sgd(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    injection = drift_fast.Injection(adapted, delta, strict=False)

    def step(seed: int) -> None:
        adapted.zero_grad()
        backward(adapted, seed)
        injection.step()
        optimizer.step()

    step(0)
    with pytest.warns(drift_fast.DriftWarning, match="optimizer holds 0 of 2 targets"):
        step(1)


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_targets_may_be_frozen_while_another_optimizer_steps(
    model: Backbone, delta: drift_fast.Delta, scope: str
) -> None:
    optimizer = torch.optim.SGD(model.model.parameters(), lr=1e-2)
    other = torch.optim.SGD(model.head.parameters(), lr=1e-2)
    injection = drift_fast.Injection(model, delta, scope=scope, optimizer=optimizer)
    for step in range(3):
        model.zero_grad()
        model.model.requires_grad_(False)
        backward(model, step)
        other.step()
        model.model.requires_grad_(True)
        model.zero_grad()
        backward(model, step)
        if scope == "step":
            injection.step()
        optimizer.step()
    assert injection.injected == len(delta)


def test_an_optimizer_inside_backward_is_stopped(model: Backbone, delta: drift_fast.Delta) -> None:
    # jiaweizzhao/GaLore#78: an optimizer for each parameter, which steps as soon as it may.
    def build() -> list[Any]:
        handles = []
        for parameter in model.parameters():
            optimizer = torch.optim.SGD([parameter], lr=1e-2)

            def hook(_: Any, optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            handles.append(parameter.register_post_accumulate_grad_hook(hook))
        return handles

    for first in (True, False):
        handles = build() if first else []
        with drift_fast.Injection(model, delta):
            handles = handles or build()
            with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
                backward(model)
        for handle in handles:
            handle.remove()
        model.zero_grad()
