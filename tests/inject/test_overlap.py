"""Injecting inside backward gives what injecting after it does, and is refused where it would not.

On a CPU everything runs where its hook is called; what a stream would reorder is not seen here.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import drift_fast
from drift_fast import DriftError, Injection
from drift_fast.inject.compute.base import SMALL
from drift_fast.inject.compute.host import HostArithmetic
from drift_fast.inject.overlap import Overlap
from support.injection_models import (
    Backbone,
    arithmetic,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
)

WIDTH, INNER = 192, 200
SCALES = ("absolute", "gradnorm", "adaptive", "project")
UP = "model.layers.1.mlp.up_proj.weight"
EARLIEST, LATEST = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


class Gated(Backbone):
    """A backbone of which single layers may be left out, or computed twice."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"layers": 3, "width": WIDTH, "inner": INNER} | options)
        self.left_out: set[int] = set()
        self.reentrant: bool | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs
        for at, layer in enumerate(self.model.layers):
            if at in self.left_out:
                continue
            if self.reentrant is None:
                hidden = layer(hidden)
            else:
                hidden = checkpoint(layer, hidden, use_reentrant=self.reentrant)
        predicted: torch.Tensor = self.head(hidden)
        return predicted


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> drift_fast.Delta:
    folder = tmp_path_factory.mktemp("overlap")
    streamed = delta_towards(folder, Gated(), dtype="bfloat16", modules=("attn", "mlp"))
    return streamed.save(folder / "delta")


def backward(model: nn.Module, *, seed: int = 1, zero: bool = True) -> None:
    if zero:
        model.zero_grad()
    inputs, targets = regression_batch(width=WIDTH, seed=seed)
    # Reentrant checkpoints want inputs that take part.
    regression_loss(model, (inputs.requires_grad_(), targets)).backward()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def pair(
    delta: drift_fast.Delta, steps: int = 2, **options: Any
) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Train with and without overlap; return the gradients of both."""
    results = []
    for overlap in (True, False):
        model, gradients = Gated(), []
        with Injection(model, delta, overlap=overlap, **options) as injection:
            for step in range(steps):
                backward(model, seed=step)
                injection.step()
                gradients.append(gradients_of(model))
                sgd(model).step()
            gradients.append({k: torch.tensor(v) for k, v in injection.metrics().items()})
        results.append(gradients)
    return results[0], results[1]


def injected_once(delta: drift_fast.Delta, *, seed: int = 1, **options: Any) -> Any:
    """Return what a step without overlap makes of a new model's gradients."""
    model = Gated()
    model.left_out = options.pop("left_out", set())
    with Injection(model, delta, **options) as injection:
        backward(model, seed=seed)
        injection.step()
        return gradients_of(model)


# --- parity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["host", "device"])
def test_gradients_are_equal_bit_for_bit(delta: drift_fast.Delta, scale: str, kind: str) -> None:
    with arithmetic(kind):
        overlapped, after = pair(delta, scale=scale)
    for one, other in zip(overlapped[:-1], after[:-1], strict=True):
        assert_same(one, other)
    assert overlapped[-1].keys() == after[-1].keys()
    for name, value in after[-1].items():
        assert overlapped[-1][name].item() == pytest.approx(value.item(), rel=1e-6), name


@pytest.mark.parametrize("where", ["device-int8", "host-int8", "disk"])
def test_rings_are_followed_inside_backward(delta: drift_fast.Delta, where: str) -> None:
    overlapped, after = pair(delta, 3, residency=where, prefetch=1)
    for one, other in zip(overlapped[:-1], after[:-1], strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "linear", "total_steps": 3},
        {"progress_cap": 1e-3, "look_ahead": 0.0},
        {"max_push": 1e-3},
        {"rescale": "weight", "scale": "absolute"},
        {"alpha": {"attn": 0.0, "mlp": 2.0}},
    ],
)
def test_alpha_follows_the_same_rules(delta: drift_fast.Delta, options: dict[str, Any]) -> None:
    overlapped, after = pair(delta, 3, **options)
    for one, other in zip(overlapped[:-1], after[:-1], strict=True):
        assert_same(one, other)


def test_large_tensors_are_injected_before_backward_ends(
    delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Gated()
    seen: list[int] = []
    subtract = HostArithmetic.subtract

    def counted(self: Any, tensors: Any, deltas: Any, c: torch.Tensor) -> None:
        seen.extend(tensor.numel() for tensor in tensors)
        subtract(self, tensors, deltas, c)

    monkeypatch.setattr(HostArithmetic, "subtract", counted)
    with Injection(model, delta, overlap=True) as injection:
        backward(model)
        assert len(seen) == 7 * 3
        assert min(seen) > SMALL
        injection.step()
        assert len(seen) == len(injection.targets) == 10 * 3
        assert max(seen[21:]) <= SMALL
    # The last layer was first.
    assert seen[0] != seen[6]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_injected_once(delta: drift_fast.Delta, reentrant: bool) -> None:
    expected = injected_once(delta)
    model = Gated()
    model.reentrant = reentrant
    with Injection(model, delta, overlap=True) as injection:
        for _ in range(2):
            backward(model)
            injection.step()
            assert_same(gradients_of(model), expected)
            sgd(model, lr=0.0).step()


def test_several_groups_are_each_followed(
    delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one for each device and way of sharding, as if layer 1 were elsewhere."""
    original = drift_fast.inject.placement.load.load_groups

    def split(members: Any, *rest: Any) -> Any:
        parts: tuple[list[Any], list[Any]] = [], []
        for member in members:
            parts[".layers.1." in member[0].name].append(member)
        (first, where), (second, _) = (original(part, *rest) for part in parts)
        return first + second, where

    model = Gated()
    expected = injected_once(delta)
    monkeypatch.setattr("drift_fast.inject.injection.load_groups", split)
    with Injection(model, delta, overlap=True) as injection:
        assert len(injection._groups) == 2
        for _ in range(2):
            backward(model)
            injection.step()
            assert_same(gradients_of(model), expected)
            assert injection.injected == len(injection.targets)
            sgd(model, lr=0.0).step()


def test_a_scaler_s_factor_is_followed(delta: drift_fast.Delta) -> None:
    results = []
    for overlap in (True, False):
        model = Gated()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
        options = {"scale": "absolute", "optimizer": optimizer, "scaler": scaler}
        with Injection(model, delta, overlap=overlap, **options) as injection:
            scaler.scale(regression_loss(model, regression_batch(width=WIDTH))).backward()
            injection.step()
            scaler.unscale_(optimizer)
            results.append(gradients_of(model))
    assert_same(results[0], results[1])


# --- accumulation ----------------------------------------------------------------------------


def test_accumulating_waits_for_the_last_backward(delta: drift_fast.Delta) -> None:
    results = []
    for overlap in (True, False):
        model = Gated()
        with Injection(model, delta, overlap=overlap) as injection:
            for step in range(2):
                with injection.accumulating():
                    backward(model, seed=step)
                    backward(model, seed=step + 10, zero=False)
                backward(model, seed=step + 20, zero=False)
                injection.step()
                results.append(gradients_of(model))
                sgd(model).step()
    assert_same(results[0], results[2])
    assert_same(results[1], results[3])


def test_backward_after_an_injection_is_refused_with_the_remedy(delta: drift_fast.Delta) -> None:
    model = Gated()
    with Injection(model, delta, overlap=True) as injection:
        backward(model)
        with pytest.raises(DriftError, match=r"down_proj.*accumulating\(\).*set_to_none=True"):
            backward(model, zero=False)
        # And the next step is as any other.
        backward(model)
        injection.step()
        assert_same(gradients_of(model), injected_once(delta))


def test_gradients_that_zero_grad_keeps_are_refused_with_the_remedy(
    delta: drift_fast.Delta,
) -> None:
    model = Gated()
    with Injection(model, delta, overlap=True) as injection:
        backward(model)
        injection.step()
        sgd(model, lr=0.0).step()
        # After a step that came to its end these are fine.
        model.zero_grad(set_to_none=False)
        backward(model, zero=False)
        injection.step()
        assert_same(gradients_of(model), injected_once(delta))
        sgd(model, lr=0.0).step()
        model.zero_grad(set_to_none=False)
        backward(model, zero=False)
        # This one did not, and its gradients cannot be told from those of another.
        model.zero_grad(set_to_none=False)
        with pytest.raises(DriftError, match="set_to_none=True"):
            backward(model, zero=False)


def test_an_error_inside_accumulating_ends_it(delta: drift_fast.Delta) -> None:
    model = Gated()
    with Injection(model, delta, overlap=True) as injection:
        with pytest.raises(KeyError), injection.accumulating():
            raise KeyError
        backward(model)
        # Within backward already.
        plain = Gated()
        backward(plain)
        assert not torch.equal(model.get_parameter(UP).grad, plain.get_parameter(UP).grad)
        injection.step()
        assert_same(gradients_of(model), injected_once(delta))


def test_last_backward_inside_accumulating_is_still_injected_by_the_step(
    delta: drift_fast.Delta,
) -> None:
    model = Gated()
    with Injection(model, delta, overlap=True) as injection:
        with injection.accumulating():
            backward(model)
        injection.step()
        assert_same(gradients_of(model), injected_once(delta))
        assert injection.injected == len(injection.targets)


# --- steps that are given up ------------------------------------------------------------------


@pytest.mark.parametrize("where", ["device", "disk"])
def test_a_step_that_was_given_up_leaves_the_next_one_right(
    delta: drift_fast.Delta, where: str
) -> None:
    model = Gated()
    expected = injected_once(delta, alpha=3.0)
    with Injection(model, delta, overlap=True, residency=where, prefetch=1) as injection:
        for _ in range(2):
            backward(model, seed=7)
            # The loss was no good: no step; and α changes.
            model.zero_grad()
            injection.alpha = 3.0
            backward(model)
            injection.step()
            assert_same(gradients_of(model), expected)
            assert injection.steps
            sgd(model, lr=0.0).step()
        assert injection.steps == 2


class Broken(Exception):
    pass


def test_backward_that_broke_off_leaves_the_next_step_right(delta: drift_fast.Delta) -> None:
    model = Gated()
    expected = injected_once(delta, alpha=3.0)
    with Injection(model, delta, overlap=True, residency="disk", prefetch=1) as injection:
        for name in (LATEST, UP, EARLIEST):
            parameter = model.get_parameter(name)

            def fail(parameter: nn.Parameter) -> None:
                raise Broken

            handle = parameter.register_post_accumulate_grad_hook(fail)
            with pytest.raises(Broken):
                backward(model, seed=7)
            handle.remove()
            injection.alpha = 3.0
            backward(model)
            injection.step()
            assert_same(gradients_of(model), expected)
            sgd(model, lr=0.0).step()


def test_what_a_given_up_step_made_ready_does_not_count_in_the_next(
    delta: drift_fast.Delta,
) -> None:
    """Gradients may be finished in another order than in the step before."""
    found = []
    for overlap in (True, False):
        model = Gated(layers=1)
        options: dict[str, Any] = {"missing_gradients": "skip", "modules": r"re:layers\.0\."}
        with Injection(model, delta, overlap=overlap, **options) as injection:
            (group,) = injection._groups
            start, stop = group.store.buckets[0]
            hooks = {}
            for at in range(start, stop):
                target = group.targets[at]
                overlapping = injection._scope.overlap
                hook = overlapping._hook(0, 0, at) if overlap else lambda parameter: None
                hooks[target.name] = hook

            def finish(names: list[str], model: nn.Module = model, hooks: Any = hooks) -> None:
                for name in names:
                    parameter = model.get_parameter(name)
                    parameter.grad = torch.ones_like(parameter)
                    hooks[name](parameter)

            names = list(hooks)
            finish(names[:-1])
            model.zero_grad()
            # The one that was still awaited comes first now.
            finish(names[::-1])
            injection.step()
            found.append(gradients_of(model))
    assert len(found[0]) == 7
    assert_same(*found)


def test_another_branch_after_a_step_that_was_given_up_is_injected(
    delta: drift_fast.Delta,
) -> None:
    model = Gated()
    with Injection(model, delta, overlap=True, missing_gradients="skip") as injection:
        model.left_out = {0}
        backward(model, seed=7)
        model.left_out = {2}
        injection.alpha = 3.0
        backward(model)
        injection.step()
        expected = injected_once(delta, left_out={2}, alpha=3.0, missing_gradients="skip")
        assert_same(gradients_of(model), expected)
        assert injection.skipped == 10


def test_a_step_given_up_and_one_all_inside_accumulating_is_refused_once(
    delta: drift_fast.Delta,
) -> None:
    model = Gated()
    with Injection(model, delta, overlap=True) as injection:
        backward(model, seed=7)
        with injection.accumulating():
            backward(model)
        with pytest.raises(DriftError, match=r"outside injection\.accumulating\(\)"):
            injection.step()
        backward(model)
        injection.step()
        assert_same(gradients_of(model), injected_once(delta))


@pytest.mark.parametrize("call", [1, 3])
def test_an_error_inside_backward_leaves_the_next_step_right(
    delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    model = Gated()
    expected = injected_once(delta)
    subtract = HostArithmetic.subtract
    calls = 0

    def sometimes(self: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise MemoryError("full")
        subtract(self, *arguments)

    with Injection(model, delta, overlap=True, residency="disk", prefetch=1) as injection:
        monkeypatch.setattr(HostArithmetic, "subtract", sometimes)
        with pytest.raises(MemoryError, match="full"):
            backward(model, seed=7)
        backward(model)
        injection.step()
        assert_same(gradients_of(model), expected)


# --- no push, no gradient ---------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
def test_alpha_zero_changes_nothing_and_counts(delta: drift_fast.Delta, overlap: bool) -> None:
    model, plain = Gated(), Gated()
    with Injection(model, delta, overlap=overlap, alpha=0.0) as injection:
        for step in range(2):
            backward(model, seed=step)
            backward(plain, seed=step)
            injection.step()
            assert_same(gradients_of(model), gradients_of(plain))
            sgd(model).step()
            sgd(plain).step()
        assert injection.steps == 2
        injection.alpha = 1.0
        backward(model, seed=3)
        backward(plain, seed=3)
        injection.step()
        assert not torch.equal(model.get_parameter(UP).grad, plain.get_parameter(UP).grad)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_gradients_are_not_held_beyond_their_step(
    delta: drift_fast.Delta, overlap: bool, alpha: float
) -> None:
    model = Gated()
    with Injection(model, delta, overlap=overlap, alpha=alpha) as injection:
        backward(model)
        gradients = [weakref.ref(p.grad) for p in model.parameters()]
        injection.step()
        sgd(model).step()
        model.zero_grad()
        gc.collect()
        assert not any(gradient() is not None for gradient in gradients)
        # Nor when the step was refused.
        backward(model)
        gradients = [weakref.ref(p.grad) for p in model.parameters()]
        model.get_parameter(UP).grad = None
        with pytest.raises(DriftError, match="no gradient"):
            injection.step()
        model.zero_grad()
        gc.collect()
        assert not any(gradient() is not None for gradient in gradients)


def test_missing_gradients_are_refused_by_default(delta: drift_fast.Delta) -> None:
    model = Gated()
    with Injection(model, delta, overlap=True) as injection:
        model.left_out = {1}
        backward(model)
        with pytest.raises(
            DriftError, match=r"10 of 30 targets have no gradient, model\.layers\.1"
        ):
            injection.step()
        model.left_out = set()
        backward(model)
        injection.step()
        assert_same(gradients_of(model), injected_once(delta))


@pytest.mark.parametrize("left_out", [{0}, {1}, {2}, {0, 1}, {0, 2}])
def test_missing_gradients_are_skipped_and_counted_otherwise(
    delta: drift_fast.Delta, left_out: set[int]
) -> None:
    model = Gated()
    expected = injected_once(delta, left_out=left_out, missing_gradients="skip")
    with Injection(model, delta, overlap=True, missing_gradients="skip") as injection:
        model.left_out = left_out
        for _ in range(2):
            backward(model)
            injection.step()
            assert_same(gradients_of(model), expected)
            assert injection.skipped == 10 * len(left_out)
            assert injection.injected == 30 - 10 * len(left_out)
            sgd(model, lr=0.0).step()


def test_gradients_that_are_not_finite_are_left_alone_and_counted(delta: drift_fast.Delta) -> None:
    model = Gated()

    def spoil(parameter: nn.Parameter) -> None:
        parameter.grad[0, 0] = torch.nan

    model.get_parameter(UP).register_post_accumulate_grad_hook(spoil)
    with Injection(model, delta, overlap=True) as injection:
        backward(model)
        before = gradients_of(model)[UP]
        injection.step()
        after = gradients_of(model)
        assert torch.equal(after[UP].nan_to_num(), before.nan_to_num())
        assert injection.skipped == 1
        del after[UP]
        assert_same(after, {n: g for n, g in injected_once(delta).items() if n != UP})


# --- where it is refused, and its end ------------------------------------------------------------


def test_the_microbatch_scope_refuses_it(delta: drift_fast.Delta) -> None:
    with pytest.raises(ValueError, match='overlap is for scope="step"'):
        Injection(Gated(), delta, overlap=True, scope="microbatch")


def test_several_processes_refuse_it(
    delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    with pytest.raises(DriftError, match=r"several processes.*overlap=False"):
        Injection(Gated(), delta, overlap=True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 1)
    Injection(Gated(), delta, overlap=True).remove()


def test_no_hook_is_left_after_removal(delta: drift_fast.Delta) -> None:
    model = Gated()
    injection = Injection(model, delta, overlap=True)
    # The watchdog has one on each of 10 targets in 3 layers, and 7 of these are large.
    hooks = [p._post_accumulate_grad_hooks or {} for p in model.parameters()]
    assert sum(len(each) for each in hooks) == (10 + 7) * 3
    overlap = weakref.ref(injection._scope.overlap)
    backward(model)
    injection.remove()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    gc.collect()
    assert overlap() is None
    plain = Gated()
    backward(plain)
    backward(model)
    assert_same(gradients_of(model), gradients_of(plain))
    # Another may follow.
    with Injection(model, delta, overlap=True) as injection:
        backward(model)
        injection.step()
        assert_same(gradients_of(model), injected_once(delta))


def test_only_large_tensors_have_hooks(delta: drift_fast.Delta) -> None:
    model = Gated()
    with Injection(model, delta, overlap=True, modules=r"re:\.bias$") as injection:
        assert isinstance(injection._scope.overlap, Overlap)
        assert not injection._scope.overlap.handles
        backward(model)
        injection.step()
        assert injection.injected == len(injection.targets) == 9
