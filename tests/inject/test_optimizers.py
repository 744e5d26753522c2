"""Optimizers, torch.compile and gradient checkpointing: the injected gradient is what steps.

Owns: that each optimizer moves the weights as the same optimizer does with the float64-restated
gradient put into `.grad` by hand. Paged optimizers of bitsandbytes fall back to unpaged memory on
a CPU, so what is tested of them here is their step.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
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
    moved_text,
    regression_batch,
    regression_loss,
    saved,
    text_batch,
    tiny_qwen2,
    weights_of,
)

Build = Callable[[Any], torch.optim.Optimizer]

BUILDERS: dict[str, Build] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1.0),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
}


def bitsandbytes_builder(name: str) -> Build:
    def build(parameters: Any) -> torch.optim.Optimizer:
        import bitsandbytes

        # By default tensors below 4,096 elements keep 32 bits.
        optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(
            parameters, lr=1e-2, min_8bit_size=1
        )
        return optimizer

    return build


EIGHT_BITS = ("AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedLion8bit")
BUILDERS |= {name: bitsandbytes_builder(name) for name in EIGHT_BITS}


@pytest.fixture
def network() -> torch.nn.Module:
    # Wide enough for blocks of 8-bit states.
    return Backbone(width=16, inner=32)


@pytest.fixture
def delta(tmp_path: Path, network: torch.nn.Module) -> drift_fast.Delta:
    return delta_towards(tmp_path, network)


def backward(network: torch.nn.Module, *, seed: int) -> None:
    network.zero_grad()
    regression_loss(network, regression_batch(width=16, seed=seed)).backward()


def inject_by_hand(network: torch.nn.Module, delta: drift_fast.Delta, **options: Any) -> None:
    for name, parameter in network.named_parameters():
        if name in delta.shapes:
            injected = reference.inject(parameter.grad, delta[name], **options)
            parameter.grad = torch.from_numpy(injected).to(parameter.dtype)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("way", ["step before it", "attached to it"])
@pytest.mark.parametrize("name", BUILDERS)
def test_an_optimizer_moves_weights_as_with_the_restated_gradient(
    network: torch.nn.Module, delta: drift_fast.Delta, name: str, way: str
) -> None:
    if name in EIGHT_BITS and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    options: dict[str, Any] = {"alpha": 0.7, "scale": "adaptive"}
    by_hand = copy.deepcopy(network)
    plain = copy.deepcopy(network)
    optimizer, other, third = (BUILDERS[name](n.parameters()) for n in (network, by_hand, plain))
    if way == "attached to it":
        injection = drift_fast.attach(optimizer, delta, model=network, **options)
    else:
        injection = drift_fast.Injection(network, delta, optimizer=optimizer, **options)
    start = weights_of(network)
    with injection:
        for step in range(3):
            backward(network, seed=step)
            if way != "attached to it":
                injection.step()
            optimizer.step()
            backward(by_hand, seed=step)
            inject_by_hand(by_hand, delta, **options)
            other.step()
            backward(plain, seed=step)
            third.step()
    expected, unmoved = weights_of(by_hand), weights_of(plain)
    # Eight-bit states jump between neighboring codes where a gradient differs in its last bit.
    tolerance = 1e-2 if name in EIGHT_BITS else 1e-5
    differs = 0
    for key, weight in weights_of(network).items():
        moved = reference.exact(expected[key]) - reference.exact(start[key])
        error = reference.norm(reference.exact(weight) - reference.exact(expected[key]))
        assert error <= tolerance * reference.norm(moved) + 1e-7, key
        gap = reference.norm(reference.exact(unmoved[key]) - reference.exact(expected[key]))
        differs += gap > 10 * tolerance * reference.norm(moved)
    # Otherwise the comparison would hold without an injection.
    assert differs > len(delta.shapes) // 2


def test_muon_moves_matrices_as_with_the_restated_gradient(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    # It takes matrices only; another optimizer has the rest.
    def build(of: torch.nn.Module) -> list[torch.optim.Optimizer]:
        matrices = [p for p in of.parameters() if p.ndim == 2]
        rest = [p for p in of.parameters() if p.ndim != 2]
        return [muon(matrices, lr=0.1), torch.optim.AdamW(rest, lr=1e-2)]

    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    options: dict[str, Any] = {"alpha": 0.7, "scale": "adaptive"}
    by_hand, plain = copy.deepcopy(network), copy.deepcopy(network)
    start = weights_of(network)
    optimizers = {of: build(of) for of in (network, by_hand, plain)}
    with drift_fast.Injection(network, delta, **options) as injection:
        for step in range(3):
            for of, both in optimizers.items():
                backward(of, seed=step)
                if of is network:
                    injection.step()
                elif of is by_hand:
                    inject_by_hand(of, delta, **options)
                for optimizer in both:
                    optimizer.step()
    expected, unmoved = weights_of(by_hand), weights_of(plain)
    for key, weight in weights_of(network).items():
        moved = reference.norm(reference.exact(expected[key]) - reference.exact(start[key]))
        error = reference.norm(reference.exact(weight) - reference.exact(expected[key]))
        # Muon orthogonalizes in bfloat16.
        assert error <= 2e-2 * moved, key
        if key in delta.shapes:
            gap = reference.norm(reference.exact(unmoved[key]) - reference.exact(expected[key]))
            assert gap > 0.2 * moved, key


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"scope": "microbatch"}, {"overlap": True}], ids=str)
def test_torchs_optimizer_in_backward_fails(
    network: torch.nn.Module, delta: drift_fast.Delta, options: dict[str, Any], when: str
) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    def apply() -> None:
        _apply_optimizer_in_backward(torch.optim.SGD, network.parameters(), {"lr": 1.0})

    start = weights_of(network)
    if when == "before":
        apply()
    with drift_fast.Injection(network, delta, **options):
        if when == "after":
            apply()
        with pytest.raises(drift_fast.DriftError, match="SGD steps inside backward"):
            backward(network, seed=0)
    reached = [
        name for name in delta.shapes if not torch.equal(start[name], weights_of(network)[name])
    ]
    assert not reached


def test_an_optimizer_that_steps_inside_backward_fails(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in network.parameters()}

    def step_now(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(step_now)
    with (
        drift_fast.Injection(network, delta),
        pytest.raises(drift_fast.DriftError, match="nothing was injected"),
    ):
        backward(network, seed=0)


def test_gradients_that_an_update_inside_backward_consumed_are_missed(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    # Without a torch optimizer there is no step to watch; the empty gradients tell.
    def update_now(parameter: torch.Tensor) -> None:
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(update_now)
    with drift_fast.Injection(network, delta) as injection:
        backward(network, seed=0)
        with pytest.raises(drift_fast.DriftError, match="inside backward cannot be used"):
            injection.step()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, drift_fast.Delta]:
    folder = tmp_path_factory.mktemp("pair")
    model = tiny_qwen2()
    expert = saved(moved_text(model), folder / "expert")
    multimodal = saved(model, folder / "multimodal")
    return model, drift_fast.compute_delta(expert, multimodal, dtype="float32")


def assert_text_gradients(
    found: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
    delta: drift_fast.Delta,
    scale: str,
) -> None:
    assert delta.shapes.keys() <= found.keys() == plain.keys()
    for name, gradient in found.items():
        expected = reference.exact(plain[name])
        if name in delta.shapes:
            expected = reference.inject(plain[name], delta[name], alpha=0.7, scale=scale)
        error = reference.norm(reference.exact(gradient) - expected)
        assert error <= 1e-5 * reference.norm(expected) + 1e-9, name


@pytest.mark.parametrize("attached", ["compiled", "plain"])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_a_compiled_model_is_injected(
    text: tuple[torch.nn.Module, drift_fast.Delta], scale: str, attached: str
) -> None:
    model, delta = copy.deepcopy(text[0]), text[1]
    model(**text_batch()).loss.backward()
    plain = gradients_of(model)
    model.zero_grad()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager")
    with drift_fast.Injection(
        compiled if attached == "compiled" else model, delta, alpha=0.7, scale=scale
    ) as injection:
        compiled(**text_batch()).loss.backward()
        injection.step()
    assert_text_gradients(gradients_of(model), plain, delta, scale)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_a_model_with_gradient_checkpointing_is_injected(
    text: tuple[torch.nn.Module, drift_fast.Delta], scale: str, reentrant: bool
) -> None:
    model: Any = copy.deepcopy(text[0])
    delta = text[1]
    model(**text_batch()).loss.backward()
    plain = gradients_of(model)
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    with drift_fast.Injection(model, delta, alpha=0.7, scale=scale) as injection:
        model(**text_batch(), use_cache=False).loss.backward()
        injection.step()
    assert_text_gradients(gradients_of(model), plain, delta, scale)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_in_the_microbatch_scope_checkpointing_injects_once_in_a_backward_pass(
    text: tuple[torch.nn.Module, drift_fast.Delta], reentrant: bool
) -> None:
    model: Any = copy.deepcopy(text[0])
    delta = text[1]
    model(**text_batch()).loss.backward()
    plain = gradients_of(model)
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with drift_fast.Injection(model, delta, alpha=0.7, scale="gradnorm", scope="microbatch"):
        model(**text_batch(), use_cache=False).loss.backward()
    assert_text_gradients(gradients_of(model), plain, delta, "gradnorm")
