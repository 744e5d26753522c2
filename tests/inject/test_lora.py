"""Injection into LoRA and QLoRA models: Δ pulled back onto the factors.

Owns: parity with the equations restated here, what is injected beside adapters (copies, biases),
and what is refused. The factors and scalings are read off names and stated numbers, not off PEFT.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import drift_fast
from drift_fast.inject.lora.adapters import Adapted, Factors, adapters_of
from drift_fast.inject.lora.dora import Base
from drift_fast.inject.lora.dora import squares as squares_of
from drift_fast.inject.lora.pull_back import along, pull_back, pull_back_all
from support import reference
from support.injection_models import (
    ARITHMETIC,
    ATTENTION,
    MLP,
    Backbone,
    arithmetic,
    delta_towards,
    gradients_of,
    moved_text,
    perturbed,
    regression_batch,
    regression_loss,
    saved,
    text_batch,
    text_loss,
    tiny_qwen2,
    tiny_qwen2_5_vl,
    weights_of,
    with_experts,
)
from support.reference import Array, exact

peft = pytest.importorskip("peft")

ALL = [*ATTENTION, *MLP]
SCALES = (*reference.SCALES, "project")
# By this share Δ̃ of a factor that is multiplied as two bfloat16 parts may be off.
IN_PARTS = 2.0**-17
RANK, LORA_ALPHA = 3, 6
PLAIN = {"default": LORA_ALPHA / RANK}


def adapted(model: nn.Module, *, seed: int = 4, **options: Any) -> Any:
    """Put adapters with factors that are not zero into a model."""
    options = {"r": RANK, "lora_alpha": LORA_ALPHA, "target_modules": ALL} | options
    options = {"init_lora_weights": False} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, peft.LoraConfig(**options))


# --- the equations ----------------------------------------------------------------------------


def factor_names(model: nn.Module, weight: str, adapter: str) -> tuple[str, str]:
    """The names of A and B of the weight that a delta calls `weight`."""
    module = weight.removesuffix(".weight")
    pattern = re.compile(
        rf"(^|\.){re.escape(module)}\.lora_(embedding_)?([AB])\.{adapter}(\.weight)?"
    )
    found = {m.group(3): n for n, _ in model.named_parameters() if (m := pattern.search(n))}
    return found["A"], found["B"]


def pulled_back(
    weights: Mapping[str, Any], names: tuple[str, str], delta: Array, scaling: float
) -> dict[str, Array]:
    """∂W/∂(A, B) applied to Δ, for W = W₀ + s·B·A; Δ of shape [out, in]."""
    a, b = (exact(weights[name]) for name in names)
    return {names[0]: scaling * b.T @ delta, names[1]: scaling * delta @ a.T}


def coefficient(g: Array, d: Array, *, alpha: float, scale: str) -> float:
    if scale == "project":
        return alpha * max(float(g @ d), 0.0) / reference.norm(d) ** 2 if np.any(d) else 0.0
    return reference.coefficient(g, d, alpha=alpha, scale=scale)


def expected_gradients(
    model: nn.Module,
    gradients: Mapping[str, torch.Tensor],
    deltas: Mapping[str, Any],
    scalings: Mapping[str, float] = PLAIN,
    *,
    alpha: float = 1.0,
    scale: str = "adaptive",
    transposed: tuple[str, ...] = (),
) -> dict[str, tuple[Array, float]]:
    """Return g − c·Δ̃ of every factor, and the size of the two terms, by the equations."""
    weights = dict(model.named_parameters())
    expected = {}
    for weight, stored in deltas.items():
        delta = exact(stored)
        delta = delta.T if any(part in weight for part in transposed) else delta
        direction: dict[str, Array] = {}
        for adapter, scaling in scalings.items():
            names = factor_names(model, weight, adapter)
            direction |= pulled_back(weights, names, delta, scaling)
        g = np.concatenate([exact(gradients[name]).ravel() for name in direction])
        d = np.concatenate([part.ravel() for part in direction.values()])
        c = coefficient(g, d, alpha=alpha, scale=scale)
        full = "gradnorm" if scale in ("adaptive", "project") else scale
        largest = abs(coefficient(g, d, alpha=alpha, scale=full))
        for name, part in direction.items():
            size = reference.norm(exact(gradients[name])) + largest * reference.norm(part)
            expected[name] = exact(gradients[name]) - c * part, size
    return expected


def worst_error(model: nn.Module, expected: Mapping[str, tuple[Array, float]]) -> float:
    """The largest error of a factor's gradient, relative to the terms it is the difference of."""
    found = gradients_of(model)
    errors = [
        reference.norm(exact(found[name]) - value) / (size or 1.0)
        for name, (value, size) in expected.items()
    ]
    return max(errors)


def weights_in(delta: drift_fast.Delta) -> dict[str, torch.Tensor]:
    return {name: delta[name] for name in delta if name.endswith(".weight")}


def backward(model: nn.Module, *, seed: int = 1) -> dict[str, torch.Tensor]:
    width = next(m for m in model.modules() if hasattr(m, "in_features")).in_features
    regression_loss(model, regression_batch(width=width, seed=seed)).backward()
    return gradients_of(model)


@pytest.fixture
def delta(tmp_path: Path) -> drift_fast.Delta:
    return delta_towards(tmp_path, Backbone(), modules=("attn", "mlp"))


# --- parity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    # An accelerator takes no float64.
    [("host", torch.float32), ("host", torch.float64), ("device", torch.float32)],
)
def test_the_joint_gradient_of_the_factors_follows_the_equations(
    delta: drift_fast.Delta, scale: str, kind: str, dtype: torch.dtype
) -> None:
    model = adapted(Backbone().to(dtype))
    gradients = backward(model)
    with arithmetic(kind), drift_fast.Injection(model, delta, scale=scale, alpha=0.7) as injection:
        injection.step()
        assert injection.injected == 14
        assert injection.skipped == 0
    expected = expected_gradients(model, gradients, weights_in(delta), alpha=0.7, scale=scale)
    assert len(expected) == 28
    assert worst_error(model, expected) < 2e-6
    # The control: factors pulled back without their scaling are far from that.
    unscaled = expected_gradients(
        model, gradients, weights_in(delta), {"default": 1.0}, alpha=0.7, scale="absolute"
    )
    if scale == "absolute":
        assert worst_error(model, unscaled) > 1e-2
    untouched = gradients.keys() - expected.keys()
    found = gradients_of(model)
    assert all(torch.equal(found[name], gradients[name]) for name in untouched)


@pytest.mark.parametrize("scale", SCALES)
@ARITHMETIC
def test_several_adapters_of_other_ranks_share_one_coefficient(
    delta: drift_fast.Delta, scale: str, kind: str
) -> None:
    model = adapted(Backbone())
    other = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    gradients = backward(model)
    with arithmetic(kind), drift_fast.Injection(model, delta, scale=scale) as injection:
        injection.step()
        assert injection.injected == 14
    both = {n: d for n, d in weights_in(delta).items() if "q_proj" in n or "down_proj" in n}
    rest = {n: d for n, d in weights_in(delta).items() if n not in both}
    two = PLAIN | {"other": 5 / 2}
    expected = expected_gradients(model, gradients, both, two, scale=scale)
    assert len(expected) == 4 * len(both)
    assert worst_error(model, expected) < 2e-6
    assert worst_error(model, expected_gradients(model, gradients, rest, scale=scale)) < 2e-6
    if scale != "absolute":
        # Each adapter by itself would get another coefficient.
        apart = expected_gradients(model, gradients, both, PLAIN, scale=scale)
        assert worst_error(model, apart) > 1e-3


def test_an_adapter_that_is_not_active_is_left_alone(delta: drift_fast.Delta) -> None:
    model = adapted(Backbone())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=ALL, init_lora_weights=False))
    gradients = backward(model)
    with drift_fast.Injection(model, delta) as injection:
        injection.step()
    expected = expected_gradients(model, gradients, weights_in(delta))
    assert worst_error(model, expected) < 2e-6
    assert not any(".other." in name for name in gradients_of(model))


def test_rank_stabilised_scaling_is_followed(delta: drift_fast.Delta) -> None:
    model = adapted(Backbone(), use_rslora=True)
    gradients = backward(model)
    with drift_fast.Injection(model, delta, scale="absolute") as injection:
        injection.step()
    scalings = {"default": LORA_ALPHA / math.sqrt(RANK)}
    expected = expected_gradients(model, gradients, weights_in(delta), scalings, scale="absolute")
    assert worst_error(model, expected) < 2e-6


def test_a_scaling_that_is_set_between_steps_is_followed(delta: drift_fast.Delta) -> None:
    model = adapted(Backbone())
    injection = drift_fast.Injection(model, delta, scale="absolute")
    backward(model)
    injection.step()
    model.zero_grad()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    gradients = backward(model)
    injection.step()
    scalings = {"default": 0.5 * LORA_ALPHA / RANK}
    expected = expected_gradients(model, gradients, weights_in(delta), scalings, scale="absolute")
    assert worst_error(model, expected) < 2e-6


def test_adapters_on_some_projections_are_told_the_modules_that_fit_them(
    delta: drift_fast.Delta,
) -> None:
    model = adapted(Backbone(), target_modules=["q_proj", "v_proj"])
    with pytest.raises(drift_fast.DriftError, match="targets are frozen") as refused:
        drift_fast.Injection(model, delta)
    found = re.search(r'modules="([^"]+)"', str(refused.value))
    assert found is not None
    with drift_fast.Injection(model, delta, modules=found[1]) as injection:
        projections = {name.split(".")[-3] for name in injection.targets}
        assert projections == {"q_proj", "v_proj"}, injection.targets


def test_copies_that_train_are_among_the_modules_that_fit(delta: drift_fast.Delta) -> None:
    plain = Backbone()
    layers = len(plain.model.layers)
    model = adapted(plain, target_modules=["q_proj"], modules_to_save=["o_proj"])
    with pytest.raises(drift_fast.DriftError, match="targets are frozen") as refused:
        drift_fast.Injection(model, delta)
    found = re.search(r'modules="([^"]+)"', str(refused.value))
    assert found is not None
    both: list[dict[str, Any]] = [{"modules": found[1]}, {"strict": False}]
    for options in both:
        with drift_fast.Injection(model, delta, **options) as injection:
            assert {".q_proj" in name for name in injection.targets} == {True, False}
            assert sum(".o_proj" in name for name in injection.targets) == layers


def test_adapters_on_some_layers_are_not_told_modules_that_do_not_fit(
    delta: drift_fast.Delta,
) -> None:
    model = adapted(Backbone(), target_modules=["q_proj"], layers_to_transform=[1])
    with pytest.raises(drift_fast.DriftError, match="targets are frozen") as refused:
        drift_fast.Injection(model, delta)
    assert "modules=" not in str(refused.value)
    assert "strict=False" in str(refused.value)
    with drift_fast.Injection(model, delta, strict=False) as injection:
        assert len(injection.targets) == 1


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_factor_that_is_frozen_takes_no_part(delta: drift_fast.Delta, frozen: str) -> None:
    model = adapted(Backbone())
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    gradients = backward(model)
    with drift_fast.Injection(model, delta, scale="gradnorm") as injection:
        injection.step()
    weights = dict(model.named_parameters())
    for weight, own in weights_in(delta).items():
        names = factor_names(model, weight, "default")
        (name,) = (name for name in names if frozen not in name)
        direction = pulled_back(weights, names, exact(own), PLAIN["default"])[name]
        wanted = reference.inject(gradients[name], direction, alpha=1.0, scale="gradnorm")
        found = exact(gradients_of(model)[name])
        assert reference.norm(found - wanted) < 4e-6 * reference.norm(wanted)


def test_weights_that_are_stored_transposed_are_followed(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    model = Backbone()
    for layer in model.model.layers:
        layer.mlp.up_proj = Conv1D(10, 6)
        nn.init.normal_(layer.mlp.up_proj.weight)
    delta = delta_towards(tmp_path, model, modules="re:up_proj.weight|down_proj.weight")
    model = adapted(model, target_modules=["up_proj", "down_proj"])
    gradients = backward(model)
    with drift_fast.Injection(model, delta) as injection:
        injection.step()
        assert injection.injected == 4
        assert injection.metrics()["progress"] == 0.0
    expected = expected_gradients(model, gradients, weights_in(delta), transposed=("up_proj",))
    assert worst_error(model, expected) < 2e-6


def test_half_precision_factors_get_the_push_in_float32(delta: drift_fast.Delta) -> None:
    model = adapted(Backbone()).to(torch.bfloat16)
    gradients = backward(model)
    with drift_fast.Injection(model, delta, scale="gradnorm") as injection:
        injection.step()
    expected = expected_gradients(model, gradients, weights_in(delta), scale="gradnorm")
    assert worst_error(model, expected) < 2.0**-8


def test_accumulated_micro_batches_are_injected_into_once(delta: drift_fast.Delta) -> None:
    model = adapted(Backbone())
    injection = drift_fast.Injection(model, delta)
    for seed in range(4):
        gradients = backward(model, seed=seed)
    injection.step()
    assert worst_error(model, expected_gradients(model, gradients, weights_in(delta))) < 2e-6


@pytest.mark.parametrize("bound", [None, 200])
@pytest.mark.parametrize("residency", ["device", "device-int8", "host", "host-int8", "disk"])
@ARITHMETIC
def test_every_residency_gives_the_same_gradients(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    residency: str,
    kind: str,
    bound: int | None,
) -> None:
    """Wide enough not to be kept as small tensors; `bound` makes the blocks and runs many."""
    if bound is not None:
        monkeypatch.setattr("drift_fast.inject.lora.pull_back._BLOCK_ON_CPU", 16 * 600)
        monkeypatch.setattr("drift_fast.inject.lora.group._ROOM", bound)
    model = adapted(Backbone(width=64, inner=600), target_modules=list(MLP))
    stored = delta_towards(
        tmp_path,
        Backbone(width=64, inner=600),
        modules="mlp",
        dtype="bfloat16",
        out=tmp_path / "delta",
    )
    gradients = backward(model)
    with (
        arithmetic(kind),
        drift_fast.Injection(
            model, stored, residency=residency, prefetch=4 * 64 * 600
        ) as injection,
    ):
        # On a CPU host memory is where gradients are.
        assert injection.residency == ("device" if residency == "host" else residency)
        for _ in range(2):
            for name, gradient in gradients.items():
                model.get_parameter(name).grad = gradient.clone()
            injection.step()
    error = worst_error(model, expected_gradients(model, gradients, weights_in(stored)))
    assert error < (2e-2 if "int8" in residency else 2e-6)
    if "int8" in residency:
        assert error > 1e-5


# --- parameters of their own, and experts ------------------------------------------------------


def stacked(weights: Mapping[str, Any], name: str, *, turned: bool) -> tuple[Any, list[str]]:
    """Return W − W₀ of a parameter of experts [experts, out, in], in float64, by its factors.

    Of PEFT's factors the experts are the slowest index of A's rows and the fastest of B's columns.
    """
    names = [next(n for n in weights if re.search(rf"{name}\.lora_{side}\.", n)) for side in "AB"]
    a, b = (weights[one].detach().double().requires_grad_() for one in names)
    count = a.shape[0] // RANK
    each = [b[:, at::count] @ a[at * RANK : (at + 1) * RANK] for at in range(count)]
    moved = 2.0 * torch.stack([one.mT if turned else one for one in each])
    return (moved, (a, b)), names


@pytest.mark.parametrize("bound", [None, 1])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_stacked_experts_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str, turned: bool, bound: int | None
) -> None:
    if bound is not None:
        monkeypatch.setattr("drift_fast.inject.lora.experts._BLOCK", bound)
    delta = delta_towards(tmp_path, with_experts(Backbone(), turned=turned), modules="re:experts")
    model = adapted(
        with_experts(Backbone(), turned=turned),
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    gradients = backward(model)
    injection = drift_fast.Injection(model, delta, scale=scale, alpha=0.7)
    start = injection.metrics()["progress"]
    injection.step()
    assert injection.injected == 4
    weights, along, total = dict(model.named_parameters()), 0.0, 0.0
    for weight in delta:
        # PEFT puts the wrapper of one parameter around that of the other.
        wrapper = "experts" if weight.endswith("down_proj") else "experts.base_layer"
        inside = re.escape(f"{weight.partition('experts')[0]}{wrapper}")
        (moved, factors), names = stacked(weights, inside, turned=turned)
        own = delta[weight].double()
        pulled = torch.autograd.grad((moved * own).sum(), factors)
        g = np.concatenate([exact(gradients[name]).ravel() for name in names])
        d = np.concatenate([exact(part).ravel() for part in pulled])
        found = np.concatenate([exact(gradients_of(model)[name]).ravel() for name in names])
        c = coefficient(g, d, alpha=0.7, scale=scale)
        assert reference.norm(found - (g - c * d)) < 2e-6 * (reference.norm(g) + reference.norm(d))
        assert scale == "project" or abs(c) * reference.norm(d) > 1e-2 * reference.norm(g)
        along += float((moved * own).sum().detach())
        total += float(own.square().sum())
    assert start == 0.0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1.5
    assert injection.metrics()["progress"] == pytest.approx(0.5 * along / total, rel=1e-4)


def test_a_matrix_that_is_targeted_as_a_parameter_is_followed(tmp_path: Path) -> None:
    model = adapted(Backbone(), target_modules=[], target_parameters=["up_proj.weight"])
    delta = delta_towards(tmp_path, Backbone(), modules="re:up_proj")
    gradients = backward(model)
    with drift_fast.Injection(model, delta) as injection:
        injection.step()
        assert injection.injected == 2
    assert worst_error(model, expected_gradients(model, gradients, weights_in(delta))) < 2e-6


# --- DoRA ------------------------------------------------------------------------------------


def dora(model: Any, **options: Any) -> Any:
    """Adapters whose factors are not zero and whose magnitudes are not the norms of rows."""
    model = adapted(model, use_dora=True, **options)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data *= 0.5 + noise
    return model


def dora_names(model: nn.Module, weight: str) -> tuple[str, str, str]:
    names = factor_names(model, weight, "default")
    return (*names, names[0].replace("lora_A", "lora_magnitude_vector"))


def dora_parts(model: nn.Module, weight: str) -> tuple[Array, Array, Array, Array, Array]:
    """A, B, m, V = W₀ + s·B·A and the norms of its rows, in float64."""
    weights = dict(model.named_parameters())
    a, b, m = (exact(weights[name]) for name in dora_names(model, weight))
    module = weight.removesuffix(".weight")
    (base,) = (w for n, w in weights.items() if n.endswith(f"{module}.base_layer.weight"))
    v = exact(base) + PLAIN["default"] * b @ a
    return a, b, m, v, np.linalg.norm(v, axis=1)


def dora_weights(model: nn.Module, delta: drift_fast.Delta) -> dict[str, Array]:
    """diag(m/n)·V of every adapted weight."""
    parts = {name: dora_parts(model, name) for name in weights_in(delta)}
    return {name: (m / norms)[:, None] * v for name, (_, _, m, v, norms) in parts.items()}


def dora_direction(model: nn.Module, weight: str, delta: Array) -> dict[str, Array]:
    """∂W/∂(A, B, m) applied to Δ, for W = diag(m/n)·(W₀ + s·B·A) with n held."""
    a, b, m, v, norms = dora_parts(model, weight)
    scaled = PLAIN["default"] * (m / norms)[:, None] * delta
    parts = (b.T @ scaled, scaled @ a.T, (delta * v).sum(1) / norms)
    return dict(zip(dora_names(model, weight), parts, strict=True))


def test_a_dora_is_pulled_back_to_as_peft_itself_differentiates_it(
    delta: drift_fast.Delta,
) -> None:
    model = dora(Backbone()).double()
    for name, own in weights_in(delta).items():
        module = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        model.zero_grad()
        # The rows of the output are the columns of W.
        out = module(torch.eye(own.shape[1], dtype=torch.float64)) - module(
            torch.zeros(1, own.shape[1], dtype=torch.float64)
        )
        (out.mT * own.double()).sum().backward()
        expected = dora_direction(model, name, exact(own))
        for factor, part in expected.items():
            found = exact(model.get_parameter(factor).grad)
            assert reference.norm(found - part) <= 1e-12 * reference.norm(part), factor


@pytest.mark.parametrize("block", [1 << 24, 20])
def test_what_a_dora_gets_from_parts_of_rows_adds_up_to_what_peft_differentiates(
    delta: drift_fast.Delta, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drift_fast.inject.lora.dora._BLOCK", block)
    model = dora(Backbone()).double()
    found = adapters_of(model).weights
    for name, own in weights_in(delta).items():
        adapted_weight = found[f"base_model.model.{name}"]
        assert isinstance(adapted_weight, Adapted)
        (base,) = adapted_weight.beside
        weights = [parameter.detach() for parameter in adapted_weight.parameters]
        flat, change = base.detach().reshape(-1), own.double().reshape(-1)
        # Within the first row, within another one, and a process that holds nothing.
        cuts = [0, 3, 3, own.shape[1] * 2 + 1, own.numel()]
        parts = [Base(flat[a:b], a) for a, b in itertools.pairwise(cuts)]
        squares = torch.stack([squares_of(adapted_weight, weights, part) for part in parts])
        parts = [replace(part, norms=squares.sum(0).sqrt()) for part in parts]
        pulled = [
            pull_back(change[part.start : part.stop], adapted_weight, weights, None, part)
            for part in parts
        ]
        moved = [
            along(change[part.start : part.stop], adapted_weight, weights, None, part)
            for part in parts
        ]
        model.zero_grad()
        module = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        out = module(torch.eye(own.shape[1], dtype=torch.float64)) - module(
            torch.zeros(1, own.shape[1], dtype=torch.float64)
        )
        # ⟨W, Δ⟩, by PEFT's own forward pass.
        product = (out.mT * own.double()).sum()
        product.backward()
        for one, some in zip(adapted_weight.parameters, zip(*pulled, strict=True), strict=True):
            grad = exact(one.grad).ravel()
            assert reference.norm(exact(sum(some)) - grad) <= 1e-12 * reference.norm(grad), name
        total = sum(float(left @ right) for left, right in moved)
        assert total == pytest.approx(product.item(), rel=1e-10)


@pytest.mark.parametrize("block", [1 << 24, 20])
@pytest.mark.parametrize("scale", SCALES)
def test_factors_and_magnitudes_of_a_dora_follow_the_equations(
    delta: drift_fast.Delta, scale: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drift_fast.inject.lora.dora._BLOCK", block)
    model = dora(Backbone())
    gradients = backward(model)
    injection = drift_fast.Injection(model, delta, scale=scale, alpha=0.7)
    injection.step()
    assert (injection.injected, injection.skipped) == (14, 0)
    found, pushed = gradients_of(model), 0
    for name, own in weights_in(delta).items():
        direction = dora_direction(model, name, exact(own))
        g = np.concatenate([exact(gradients[key]).ravel() for key in direction])
        d = np.concatenate([part.ravel() for part in direction.values()])
        c = coefficient(g, d, alpha=0.7, scale=scale)
        pushed += c != 0
        moved = np.concatenate([exact(found[key]).ravel() for key in direction])
        assert reference.norm(moved - (g - c * d)) <= 2e-6 * (
            reference.norm(g) + abs(c) * reference.norm(d)
        ), name
    assert pushed > 0


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_what_is_frozen_of_a_dora_takes_no_part(delta: drift_fast.Delta, frozen: str) -> None:
    model = dora(Backbone())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and frozen not in name)
    gradients = backward(model)
    injection = drift_fast.Injection(model, delta, scale="gradnorm")
    injection.step()
    for name, own in weights_in(delta).items():
        direction = dora_direction(model, name, exact(own))
        direction = {key: part for key, part in direction.items() if frozen not in key}
        assert len(direction) == 2
        g = np.concatenate([exact(gradients[key]).ravel() for key in direction])
        d = np.concatenate([part.ravel() for part in direction.values()])
        expected = g - coefficient(g, d, alpha=1.0, scale="gradnorm") * d
        moved = np.concatenate([exact(gradients_of(model)[key]).ravel() for key in direction])
        assert reference.norm(moved - expected) <= 2e-6 * 2 * reference.norm(g)


def test_progress_of_a_dora_is_that_of_its_whole_weights(delta: drift_fast.Delta) -> None:
    model = dora(Backbone())

    injection = drift_fast.Injection(model, delta)
    start = dora_weights(model, delta)
    backward(model)
    injection.step()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    expected, _ = reference.progress(dora_weights(model, delta), start, weights_in(delta))
    assert abs(expected) > 0.01
    assert injection.metrics()["progress"] == pytest.approx(expected, rel=1e-4)


def test_a_dora_beside_another_adapter_is_refused(delta: drift_fast.Delta) -> None:
    model = dora(Backbone())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=ALL))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(drift_fast.DriftError, match=r"beside another.*use_dora=False"):
        drift_fast.Injection(model, delta)


def test_a_dora_of_a_weight_that_zero_3_holds_as_codes_is_refused(delta: drift_fast.Delta) -> None:
    model = dora(Backbone())
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.weight"):
            # As zero_quantized_nontrainable_weights has it.
            parameter.ds_tensor = torch.zeros(parameter.numel(), dtype=torch.int8)
    with pytest.raises(drift_fast.DriftError, match=r"DoRA of a quantized weight.*use_dora=False"):
        drift_fast.Injection(model, delta)


def test_a_dora_of_an_embedding_is_refused(text_delta: drift_fast.Delta) -> None:
    embedded = dora(tiny_qwen2(), target_modules=["embed_tokens"])
    with pytest.raises(drift_fast.DriftError, match=r"embed_tokens.*DoRA of an embedding"):
        drift_fast.Injection(embedded, text_delta, modules="embed")


# --- what else an adapted model trains --------------------------------------------------------


@pytest.fixture
def text_delta(tmp_path: Path) -> drift_fast.Delta:
    text = tiny_qwen2()
    return drift_fast.compute_delta(
        saved(moved_text(text), tmp_path / "expert"),
        saved(text, tmp_path / "base"),
        modules="all",
        rows="index",
        dtype="float32",
    )


def test_copies_of_modules_to_save_are_injected_into_plainly(
    text_delta: drift_fast.Delta,
) -> None:
    model = adapted(
        tiny_qwen2(),
        target_modules=[*ALL, "embed_tokens"],
        modules_to_save=["lm_head", "input_layernorm", "post_attention_layernorm", "norm"],
    )
    text_loss(model).backward()
    gradients = gradients_of(model)
    injection = drift_fast.Injection(model, text_delta, scale="gradnorm")
    injection.step()
    assert injection.skipped == 0
    copies = {name for name in gradients if "modules_to_save" in name}
    assert len(copies) == 6
    for name in copies:
        own = text_delta[
            name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        ]
        reference.assert_follows_reference(
            gradients_of(model)[name], gradients[name], own, alpha=1.0, scale="gradnorm", label=name
        )
    assert copies <= set(injection.targets)
    aside = dict(injection.coverage.unmatched_multimodal)
    assert "frozen original" in aside["base_model.model.lm_head.original_module.weight"]
    weights = {
        n: d for n, d in weights_in(text_delta).items() if "norm" not in n and "head" not in n
    }
    expected = expected_gradients(
        model, gradients, weights, scale="gradnorm", transposed=("embed_tokens",)
    )
    assert len(expected) == 2 * 15
    assert worst_error(model, expected) < 2e-5


def test_trained_tokens_are_beside_the_injection(text_delta: drift_fast.Delta) -> None:
    model = adapted(tiny_qwen2(), trainable_token_indices=[5, 7])
    text_loss(model).backward()
    gradients = gradients_of(model)
    with drift_fast.Injection(model, text_delta, modules=r"re:_proj\.weight$") as injection:
        injection.step()
        assert injection.injected == 14
    (tokens,) = (name for name in gradients if "trainable_tokens" in name)
    assert torch.equal(gradients_of(model)[tokens], gradients[tokens])
    with pytest.raises(drift_fast.DriftError, match=r"embed_tokens.*modules_to_save"):
        drift_fast.Injection(model, text_delta, modules="embed")
    # What the message says to do.
    copies = adapted(tiny_qwen2(), modules_to_save=["embed_tokens"])
    with drift_fast.Injection(copies, text_delta, modules="embed") as injection:
        assert len(injection.targets) == 1


def test_frozen_biases_beside_adapted_weights_are_left_out_and_listed(
    delta: drift_fast.Delta,
) -> None:
    injection = drift_fast.Injection(adapted(Backbone()), delta)
    reasons = [r for name, r in injection.coverage.unmatched_reasoning if name.endswith("bias")]
    assert len(reasons) == 6
    assert all("LoRA trains no biases" in reason for reason in reasons)
    assert injection.coverage.fraction < 1.0
    assert not any(name.endswith("bias") for name in injection.targets)
    injection.remove()
    with pytest.raises(drift_fast.CoverageError, match="biases"):
        drift_fast.Injection(adapted(Backbone()), delta, min_coverage=1.0)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train_are_injected_into_plainly(delta: drift_fast.Delta, bias: str) -> None:
    model = adapted(Backbone(), bias=bias)
    gradients = backward(model)
    injection = drift_fast.Injection(model, delta)
    injection.step()
    assert injection.injected == 14 + 6
    assert injection.coverage.fraction == 1.0
    for name, own in delta.items():
        if name.endswith("bias"):
            runtime = f"base_model.model.{name.removesuffix('.bias')}.base_layer.bias"
            reference.assert_follows_reference(
                gradients_of(model)[runtime], gradients[runtime], own, alpha=1.0, scale="adaptive"
            )


def test_weights_without_an_adapter_are_refused_or_listed(delta: drift_fast.Delta) -> None:
    model = adapted(Backbone(), target_modules=["q_proj", "v_proj"])
    with pytest.raises(drift_fast.DriftError, match="target_modules") as caught:
        drift_fast.Injection(model, delta)
    assert "k_proj.weight" in str(caught.value)
    injection = drift_fast.Injection(model, delta, strict=False)
    assert len(injection.targets) == 4
    reasons = dict(injection.coverage.unmatched_reasoning)
    assert "no adapter" in reasons["model.layers.0.self_attn.k_proj.weight"]
    listed = dict(injection.coverage.unmatched_multimodal)
    assert "no adapter" in listed["base_model.model.model.layers.1.mlp.up_proj.weight"]
    injection.remove()
    drift_fast.Injection(model, delta, modules="re:(q|v)_proj").remove()


def test_a_vision_language_model_is_matched_in_its_language_backbone_only(
    tmp_path: Path,
) -> None:
    text = tiny_qwen2()
    model = tiny_qwen2_5_vl(text=text)
    delta = drift_fast.compute_delta(
        saved(moved_text(text), tmp_path / "expert"), saved(model, tmp_path / "multimodal")
    )
    wrapped = adapted(model, target_modules=r".*language_model.*_proj")
    found = drift_fast.match_parameters(wrapped, delta)
    assert len(found) == 14
    for name, source in found.items():
        assert "language_model" in name, name
        assert name.endswith(".base_layer.weight"), name
        assert name.split(".layers.")[1].replace("base_layer.", "") == source.split(".layers.")[1]


def test_compiled_and_nested_wrappers_do_not_hide_the_adapters(delta: drift_fast.Delta) -> None:
    model = torch.compile(adapted(Backbone()), backend="eager")
    injection = drift_fast.Injection(model, delta)
    assert len(injection.targets) == 14
    assert all(name.startswith("_orig_mod.base_model.") for name in injection.targets)


# --- progress ---------------------------------------------------------------------------------


def effective(model: nn.Module, delta: drift_fast.Delta) -> dict[str, Array]:
    """W₀ + s·B·A of every weight in the delta, by its name there."""
    weights = dict(model.named_parameters())
    result = {}
    for name in weights_in(delta):
        a, b = (exact(weights[one]) for one in factor_names(model, name, "default"))
        base = next(n for n in weights if n.endswith(name.replace(".weight", ".base_layer.weight")))
        result[name] = exact(weights[base]) + PLAIN["default"] * b @ a
    return result


@pytest.mark.parametrize("init", [True, False, "pissa", "olora"])
@ARITHMETIC
def test_progress_is_that_of_the_whole_weights(
    tmp_path: Path, delta: drift_fast.Delta, init: bool | str, kind: str
) -> None:
    model = adapted(Backbone(), init_lora_weights=init)
    start = effective(model, delta)
    with arithmetic(kind):
        injection = drift_fast.Injection(model, delta, scale="gradnorm", alpha=2.0)
    assert injection.metrics()["progress"] == 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, seed=step)
        injection.step()
        optimizer.step()
    overall, each = reference.progress(effective(model, delta), start, weights_in(delta))
    assert overall > 1e-3
    metrics = injection.metrics()
    assert metrics["progress"] == pytest.approx(overall, rel=1e-3, abs=1e-5)
    for name, value in each.items():
        module = name.removesuffix(".weight")
        found = metrics[f"progress/base_model.model.{module}.base_layer.weight"]
        assert found == pytest.approx(value, rel=1e-3, abs=1e-5)
    assert 0 < metrics["relative_push"] < 10


def test_a_resumed_run_counts_progress_from_where_the_first_began(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    model = adapted(Backbone())
    injection = drift_fast.Injection(model, delta)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    backward(model)
    injection.step()
    optimizer.step()
    before, state = injection.metrics()["progress"], injection.state_dict()
    assert before > 0
    injection.remove()
    again = drift_fast.Injection(model, delta)
    assert again.metrics()["progress"] == 0.0
    again.load_state_dict(state)
    assert again.metrics()["progress"] == pytest.approx(before, rel=1e-5)


def test_a_cap_on_progress_stops_adapted_weights(delta: drift_fast.Delta) -> None:
    model = adapted(Backbone())
    injection = drift_fast.Injection(
        model, delta, scale="gradnorm", progress_cap=0.02, look_ahead=0.0
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-2)
    for step in range(60):
        optimizer.zero_grad()
        backward(model, seed=step)
        injection.step()
        optimizer.step()
    assert injection.metrics()["stopped"] > 0


# --- factors that are zero --------------------------------------------------------------------


def test_a_new_adapter_is_pushed_through_b_alone(delta: drift_fast.Delta) -> None:
    model = adapted(Backbone(), init_lora_weights=True)
    gradients = backward(model)
    with drift_fast.Injection(model, delta) as injection:
        injection.step()
        assert injection.skipped == 0
        metrics = injection.metrics()
    found = gradients_of(model)
    for name, gradient in found.items():
        if "lora_A" in name:
            assert not gradient.any(), name
        elif "lora_B" in name:
            assert not torch.equal(gradient, gradients[name]), name
    assert sum(key.startswith("cosine/") for key in metrics) == 14


@pytest.mark.parametrize("scale", SCALES)
@ARITHMETIC
def test_factors_that_are_all_zero_are_not_pushed_and_not_an_error(
    delta: drift_fast.Delta, scale: str, kind: str
) -> None:
    model = adapted(Backbone())
    zero = [
        parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name and "layers.0.mlp.up_proj" in name
    ]
    assert len(zero) == 2
    for parameter in zero:
        parameter.data.zero_()
    gradients = backward(model)
    with (
        arithmetic(kind),
        drift_fast.Injection(model, delta, scale=scale, max_push=1.0) as injection,
    ):
        injection.step()
        assert injection.skipped == 0
        metrics = injection.metrics()
    found = gradients_of(model)
    assert all(not parameter.grad.any() for parameter in zero)  # type: ignore[union-attr]
    name = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    assert f"cosine/{name}" not in metrics
    assert math.isfinite(metrics["relative_push"])
    moved = [n for n in found if "lora_" in n and not torch.equal(found[n], gradients[n])]
    assert scale == "project" or len(moved) == 26


@ARITHMETIC
def test_a_gradient_that_is_not_finite_is_left_alone_and_counted(
    delta: drift_fast.Delta, kind: str
) -> None:
    model = adapted(Backbone())
    backward(model)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.default.weight"
    model.get_parameter(name).grad[0, 0] = math.inf
    gradients = gradients_of(model)
    with arithmetic(kind), drift_fast.Injection(model, delta) as injection:
        injection.step()
        assert injection.skipped == 1
        assert injection.injected == 13
    other = name.replace("lora_A", "lora_B")
    assert torch.equal(gradients_of(model)[other], gradients[other])


# --- the watchdog and the account -------------------------------------------------------------


def test_an_optimizer_step_without_injection_is_refused(delta: drift_fast.Delta) -> None:
    model = adapted(Backbone())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    injection = drift_fast.Injection(model, delta, optimizer=optimizer)
    backward(model)
    with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
        optimizer.step()
    injection.step()
    optimizer.step()


def test_an_optimizer_without_one_kind_of_factor_is_refused(delta: drift_fast.Delta) -> None:
    model = adapted(Backbone())
    some = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" not in name]
    with pytest.raises(drift_fast.DriftError, match="not in the optimizer"):
        drift_fast.Injection(model, delta, optimizer=torch.optim.AdamW(some))


def test_a_second_attachment_is_refused_until_the_first_is_removed(
    delta: drift_fast.Delta,
) -> None:
    model = adapted(Backbone())
    first = drift_fast.Injection(model, delta)
    with pytest.raises(drift_fast.DriftError, match="already"):
        drift_fast.Injection(model, delta)
    first.remove()
    drift_fast.Injection(model, delta).remove()


def test_a_layer_without_a_gradient_is_refused_or_counted(delta: drift_fast.Delta) -> None:
    model = adapted(Backbone())
    backward(model)
    model.get_parameter(
        factor_names(model, next(iter(weights_in(delta))), "default")[0]
    ).grad = None
    with (
        drift_fast.Injection(model, delta) as injection,
        pytest.raises(drift_fast.DriftError, match="no gradient"),
    ):
        injection.step()
    with drift_fast.Injection(model, delta, missing_gradients="skip") as injection:
        injection.step()
        assert (injection.injected, injection.skipped) == (13, 1)


# --- refusals ---------------------------------------------------------------------------------


def merged(model: Any) -> None:
    model.merge_adapter()


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def inactive(model: Any) -> None:
    model.base_model.set_adapter([])


def frozen(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" not in name and parameter.requires_grad)


def unfrozen(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (merged, "unmerge_adapter"),
        (disabled, "disabled"),
        (inactive, "set_adapter"),
        (frozen, "is_trainable"),
        (unfrozen, "beside its adapters"),
    ],
)
def test_an_adapter_that_does_not_train_by_itself_is_refused(
    delta: drift_fast.Delta, change: Callable[[Any], None], match: str
) -> None:
    model = adapted(Backbone())
    change(model)
    with pytest.raises(drift_fast.DriftError, match=match):
        drift_fast.Injection(model, delta)


def test_variants_of_lora_are_refused_by_name(delta: drift_fast.Delta) -> None:
    with pytest.raises(drift_fast.DriftError, match="MiCA"):
        drift_fast.Injection(adapted(Backbone(), init_lora_weights="mica"), delta)


# Options that a configuration needs beside its modules, for models as small as this one.
OTHERS: dict[str, dict[str, Any]] = {
    "AdaLora": {"total_step": 10},
    "BOFT": {"boft_block_size": 2},
    "C3A": {"block_size": 2},
    "HRA": {},
    "IA3": {"feedforward_modules": []},
    "LoHa": {},
    "LoKr": {},
    "OFT": {"oft_block_size": 2},
    "RandLora": {},
    "VBLoRA": {"vector_length": 2},
    "Vera": {},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_refused_by_name(delta: drift_fast.Delta, kind: str) -> None:
    config = getattr(peft, f"{kind}Config", None)
    if config is None:
        pytest.skip(f"this version of PEFT has no {kind}")
    options = {"target_modules": ["up_proj", "gate_proj"]} | OTHERS[kind]
    model = peft.get_peft_model(Backbone(), config(**options))
    with pytest.raises(drift_fast.DriftError, match=rf"(?i)layers.0.mlp.*_proj.*{kind}.*use LoRA"):
        drift_fast.Injection(model, delta, modules="mlp", strict=False)


def test_layers_with_other_adapters_can_be_left_out(delta: drift_fast.Delta) -> None:
    model = peft.PeftMixedModel(Backbone(), peft.LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("other", peft.LoHaConfig(target_modules=["up_proj"]))
    model.set_adapter(["default", "other"])
    with pytest.raises(drift_fast.DriftError, match=r"up_proj.*of loha.*with modules="):
        drift_fast.Injection(model, delta, strict=False)
    left = drift_fast.Injection(model, delta, strict=False, modules=r"re:(q|k|v|o)_proj\.weight$")
    assert len(left.targets) == 2
    left.remove()


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
def test_prompts_in_place_of_weights_are_refused_by_name(
    text_delta: drift_fast.Delta, kind: str
) -> None:
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny_qwen2(), config)
    with pytest.raises(
        drift_fast.DriftError, match=r"embed_tokens.*_TUNING trains prompts.*LoraConfig"
    ):
        drift_fast.Injection(model, text_delta)


def both_active(model: Any) -> None:
    model.base_model.set_adapter(["default", "other"])


def switched(model: Any) -> None:
    model.set_adapter("other")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (merged, r"up_proj.*unmerge_adapter"),
        (disabled, r"up_proj.*enable_adapter_layers"),
        (switched, r"up_proj.*\['default'\] when .* \['other'\] now.*set_adapter"),
        (both_active, r"up_proj.*\['default', 'other'\] now"),
    ],
)
def test_an_adapter_that_is_changed_after_attaching_is_refused(
    tmp_path: Path, change: Callable[[Any], None], match: str
) -> None:
    options: dict[str, Any] = {"target_modules": ["up_proj"]}
    model = adapted(Backbone(), **options)
    model.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights=False, **options))
    injection = drift_fast.Injection(
        model, delta_towards(tmp_path, Backbone(), modules="re:up_proj")
    )
    change(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with pytest.raises(drift_fast.DriftError, match=match):
        injection.step()


@pytest.mark.parametrize("first", ["LoraConfig", "LoHaConfig"])
def test_adapters_of_two_kinds_on_one_weight_are_refused(tmp_path: Path, first: str) -> None:
    kinds = ["LoraConfig", "LoHaConfig"]
    kinds.remove(first)
    made = [getattr(peft, kind)(target_modules=["up_proj"]) for kind in (first, *kinds)]
    model = peft.PeftMixedModel(Backbone(), made[0])
    model.add_adapter("other", made[1])
    model.set_adapter(["default", "other"])
    delta = delta_towards(tmp_path, Backbone(), modules="re:up_proj")
    with pytest.raises(drift_fast.DriftError, match=r"up_proj.*of loha.*use LoRA"):
        drift_fast.Injection(model, delta)


@pytest.mark.parametrize(
    "options",
    [{"scope": "microbatch"}, {"scale": "absolute", "rescale": "weight"}],
)
def test_options_without_meaning_for_adapters_are_refused(
    delta: drift_fast.Delta, options: dict[str, Any]
) -> None:
    with pytest.raises(drift_fast.DriftError, match="adapted weight"):
        drift_fast.Injection(adapted(Backbone()), delta, **options)


# --- 4 bits -----------------------------------------------------------------------------------


@pytest.fixture
def quantized(tmp_path: Path) -> tuple[Any, drift_fast.Delta]:
    """A model in 4 bits with adapters, and the delta of its unquantized checkpoint."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    text = tiny_qwen2(hidden_size=64, intermediate_size=128)
    base = saved(text, tmp_path / "base")
    moved = tiny_qwen2(hidden_size=64, intermediate_size=128)
    moved.load_state_dict(perturbed(dict(text.state_dict()), seed=11))
    delta = drift_fast.compute_delta(saved(moved, tmp_path / "expert"), base, dtype="float32")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), delta


@pytest.mark.parametrize("scale", SCALES)
def test_a_model_in_four_bits_is_injected_into_along_the_unquantized_delta(
    quantized: tuple[Any, drift_fast.Delta], scale: str
) -> None:
    base, delta = quantized
    model = adapted(base)
    packed = model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    assert packed.dtype == torch.uint8
    text_loss(model).backward()
    gradients = gradients_of(model)
    injection = drift_fast.Injection(model, delta, scale=scale)
    start = weights_of(model)
    injection.step()
    assert (injection.injected, injection.skipped) == (14, 0)
    expected = expected_gradients(model, gradients, weights_in(delta), scale=scale)
    assert worst_error(model, expected) < 2e-6
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    weights = dict(model.named_parameters())
    moved, total = 0.0, 0.0
    for name, own in weights_in(delta).items():
        a, b = factor_names(model, name, "default")
        after = exact(weights[b]) @ exact(weights[a])
        before = exact(start[b]) @ exact(start[a])
        moved += PLAIN["default"] * float(np.sum((after - before) * exact(own)))
        total += float(np.sum(np.square(exact(own))))
    # Both norms of A·B are far larger than their difference.
    assert injection.metrics()["progress"] == pytest.approx(moved / total, rel=1e-3, abs=1e-6)


def test_a_dora_of_a_weight_in_four_bits_is_refused(
    quantized: tuple[Any, drift_fast.Delta],
) -> None:
    base, delta = quantized
    with pytest.raises(
        drift_fast.DriftError, match=r"q_proj.*DoRA of a quantized weight.*use_dora=False"
    ):
        drift_fast.Injection(adapted(base, use_dora=True, init_lora_weights=True), delta)


def test_a_weight_in_four_bits_without_an_adapter_is_known_as_packed(
    quantized: tuple[Any, drift_fast.Delta],
) -> None:
    base, delta = quantized
    model = adapted(base, target_modules=["q_proj"])
    with pytest.raises(drift_fast.DriftError, match=r"Params4bit.*target_modules"):
        drift_fast.Injection(model, delta)
    # Without a single adapter, unfreezing would not help either.
    with pytest.raises(drift_fast.DriftError, match="packed weights do not train: add LoRA") as one:
        drift_fast.Injection(model.unload(), delta)
    assert "unfreeze" not in str(one.value)


# --- the Trainer ------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_trainer_with_adapters_moves_along_the_delta_and_logs_it(
    tmp_path: Path, text_delta: drift_fast.Delta, *, use_dora: bool
) -> None:
    import transformers

    rows = text_batch(8, 8)
    data = [{key: value[at] for key, value in rows.items()} for at in range(8)]

    def run(*, inject: bool) -> tuple[float, list[float]]:
        model = adapted(tiny_qwen2(), init_lora_weights=True, use_dora=use_dora)
        arguments = transformers.TrainingArguments(
            str(tmp_path / "run"),
            max_steps=6,
            learning_rate=5e-3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        delta = _Only(text_delta)
        weights = dora_weights if use_dora else effective
        start = weights(model, delta)
        if inject:
            drift_fast.attach(trainer, delta, alpha=1.0)
        trainer.train()
        logged = [r["drift/progress"] for r in trainer.state.log_history if "drift/progress" in r]
        overall, _ = reference.progress(weights(model, delta), start, weights_in(delta))
        return overall, logged

    without, _ = run(inject=False)
    overall, logged = run(inject=True)
    assert overall > without + 1e-3
    assert len(logged) == 6
    assert logged == sorted(logged)
    assert logged[-1] == pytest.approx(overall, rel=1e-2)


class _Only(dict):  # type: ignore[type-arg]
    """The attention and MLP weights of a delta."""

    def __init__(self, delta: drift_fast.Delta) -> None:
        super().__init__({name: delta[name] for name in delta if "proj.weight" in name})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.items()}


# --- an accelerator ---------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", SCALES)
def test_products_of_bfloat16_parts_are_those_of_the_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str, factors: torch.dtype
) -> None:
    """What a GPU does with a delta in bfloat16, its product of two matrices played on the CPU."""
    delta = delta_towards(tmp_path, Backbone(), modules=("attn", "mlp"), dtype="bfloat16")
    model = adapted(Backbone())
    gradients = backward(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(factors)
            parameter.grad = gradients[name].to(factors)
    gradients = gradients_of(model)
    seen = play_wide_products(monkeypatch)
    with arithmetic("device"), drift_fast.Injection(model, delta, scale=scale) as injection:
        injection.step()
    width = RANK if factors == torch.bfloat16 else 2 * RANK
    assert len(seen) >= 2
    assert all(width in sides for sides in seen)
    expected = expected_gradients(model, gradients, weights_in(delta), scale=scale)
    bound = {torch.float32: IN_PARTS, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
    assert worst_error(model, expected) < bound[factors]


def play_wide_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Let the CPU multiply as a GPU does; return the heights and widths of the products."""
    seen: list[tuple[int, int]] = []

    def play(name: str) -> None:
        plain = getattr(torch, name)

        def product(
            left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype
        ) -> torch.Tensor:
            assert left.dtype == right.dtype == torch.bfloat16
            seen.append((left.shape[-2], right.shape[-1]))
            return plain(left.to(out_dtype), right.to(out_dtype))

        monkeypatch.setattr(torch, name, product)

    play("mm")
    play("bmm")
    monkeypatch.setattr("drift_fast.inject.lora.pull_back.multiplies_parts", lambda device: True)
    return seen


@pytest.mark.parametrize("scale", SCALES)
def test_factors_that_are_not_small_are_measured_and_changed_each_by_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str
) -> None:
    """Factors of several sizes in turn, as the rows of a few matrices."""
    sizes = {"width": 520, "inner": 600}
    delta = delta_towards(tmp_path, Backbone(**sizes), modules=("attn", "mlp"), dtype="bfloat16")
    model = adapted(Backbone(**sizes), r=64, lora_alpha=128)
    gradients = backward(model)
    seen = play_wide_products(monkeypatch)
    stored = delta.save(tmp_path / "delta")
    with arithmetic("device"), drift_fast.Injection(model, stored, scale=scale) as injection:
        seen.clear()
        injection.step()
    # 14 weights of three shapes, onto both sides.
    assert len(seen) == 2 * 3
    expected = expected_gradients(model, gradients, weights_in(delta), scale=scale)
    assert worst_error(model, expected) < IN_PARTS


def test_every_weight_is_pulled_back_from_its_own_delta_alone_or_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alike weights are multiplied together where all Δ are at hand."""
    delta = delta_towards(tmp_path, Backbone(), modules=("attn", "mlp"), dtype="bfloat16")
    with drift_fast.Injection(adapted(Backbone()), delta) as injection:
        (group,) = injection._groups
        shards: Any = group.shards
        deltas = [found for *_, some in group.store.batches() for found in some]
        play_wide_products(monkeypatch)

        def pulled(given: Any) -> list[torch.Tensor]:
            return [
                part
                for parts in pull_back_all(
                    given,
                    [shard.adapted for shard in shards],
                    [shard.weights() for shard in shards],
                    [None] * len(shards),
                    [None] * len(shards),
                )
                for part in parts
            ]

        expected = pulled(iter(deltas))
        for given in (deltas, [delta.clone() for delta in deltas]):
            for one, other in zip(pulled(given), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [None, (0, 5), (3, 7), (4, 4)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", [(3,), (3, 2)])
@pytest.mark.parametrize("frozen", ["", "a", "b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_parts_are_those_of_any_rows_and_adapters(
    monkeypatch: pytest.MonkeyPatch,
    rows: tuple[int, int] | None,
    transposed: bool,
    ranks: tuple[int, ...],
    frozen: str,
    dtype: torch.dtype,
) -> None:
    """A process may hold no row of a weight that has fewer than there are processes."""
    torch.manual_seed(0)
    shape = height, width = 7, 10
    factors = []
    for at, rank in enumerate(ranks):
        a, b = (
            torch.nn.Parameter(torch.randn(one, dtype=dtype))
            for one in ((rank, width), (height, rank))
        )
        if transposed:
            a, b = (
                torch.nn.Parameter(torch.randn(one, dtype=dtype))
                for one in ((rank, height), (width, rank))
            )
        factors.append(Factors(a, b, rank, str(at), {str(at): 0.5 + at}))
    weights = [one for some in factors for one in (some.a, some.b)]
    kinds = [(kind, one) for some in factors for kind, one in (("a", some.a), ("b", some.b))]
    trained = tuple(one for kind, one in kinds if kind != frozen)
    weight = Adapted(tuple(factors), shape, transposed, trained, None)
    start, stop = rows or (0, height)
    delta = torch.randn(stop - start, width).bfloat16().view(-1)
    with torch.no_grad():
        expected = pull_back(delta, weight, weights, rows), along(delta, weight, weights, rows)
        play_wide_products(monkeypatch)
        (found,) = pull_back_all([delta], [weight], [weights], [rows], [None])
        moved = along(delta, weight, weights, rows)
    for one, other in zip(found, expected[0], strict=True):
        assert (one - other).norm() <= IN_PARTS * other.norm()
    product, exact = (left @ right for left, right in (moved, expected[1]))
    assert (product - exact).abs() <= IN_PARTS * moved[0].norm() * moved[1].norm()


# --- and a real one ---------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", SCALES)
def test_a_step_on_a_device_never_waits_and_is_exact_whatever_training_rounds_to(
    tmp_path: Path, scale: str, factors: torch.dtype, stored: str
) -> None:
    width, inner = 64, 600
    delta = delta_towards(tmp_path, Backbone(width=width, inner=inner), dtype=stored)
    model = adapted(Backbone(width=width, inner=inner)).to(factors).cuda()
    batch = [tensor.cuda() for tensor in regression_batch(width=width)]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        injection = drift_fast.Injection(model, delta, scale=scale)
        regression_loss(model, tuple(batch)).backward()
        gradients = gradients_of(model)
        torch.cuda.set_sync_debug_mode("error")
        injection.step()
        torch.cuda.set_sync_debug_mode("default")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cuda.matmul.fp32_precision = before
    expected = expected_gradients(model, gradients, weights_in(delta), scale=scale)
    assert worst_error(model, expected) < (IN_PARTS if factors == torch.float32 else 2.0**-8)
