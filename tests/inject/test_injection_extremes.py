"""Sizes and values at the edge: millions of entries, half precision, overflow, infinities, zeros.

Owns: what step() does where a naive sum of squares fails. Ordinary sizes are in test_injection.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import drift_fast
from support import reference
from support.injection_models import (
    Backbone,
    arithmetic,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
    single_target,
)
from support.reference import assert_follows_reference


@pytest.fixture(autouse=True, params=["host", "device"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here runs with the arithmetic of a CPU and with that of accelerators."""
    chosen: str = request.param
    with arithmetic(chosen):
        yield chosen


@pytest.fixture
def world(tmp_path: Path) -> tuple[Backbone, drift_fast.Delta]:
    """A float32 network with gradients of one batch, and a delta for its ten targets a layer."""
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    regression_loss(model, regression_batch()).backward()
    return model, delta


@pytest.mark.parametrize("scale", ["gradnorm", "adaptive"])
def test_norms_stay_exact_on_millions_of_values(tmp_path: Path, scale: str, kind: str) -> None:
    # All entries positive: a plain float32 accumulator loses 1e-4 and more at this size.
    if kind == "device":
        pytest.skip("torch's own float32 norm on a CPU says nothing of an accelerator's")
    model, parameter, delta = single_target(tmp_path, (2048, 2048))
    (stored,) = delta.values()
    generator = torch.Generator().manual_seed(9)
    gradient = torch.rand(parameter.shape, generator=generator)
    parameter.grad = gradient.clone()
    drift_fast.Injection(model, delta, alpha=0.5, scale=scale).step()
    assert_follows_reference(parameter.grad, gradient, stored, alpha=0.5, scale=scale)
    # Rounding of single entries averages out, so the coefficient itself can be read back.
    g, d = reference.exact(gradient), reference.exact(stored)
    push = g - reference.exact(parameter.grad)
    found = float(np.sum(push * d) / np.sum(d * d))
    expected = reference.coefficient(g, d, alpha=0.5, scale=scale)
    assert found == pytest.approx(expected, rel=reference.FLOAT32_RELATIVE)


@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_gradients_are_rounded_once(
    tmp_path: Path, scale: str, dtype: torch.dtype
) -> None:
    # 1.0035 rounds to 1.0 in bfloat16: a coefficient that is rounded too pushes .35 % less, always.
    model, parameter, delta = single_target(tmp_path, (256, 256), dtype=dtype)
    (stored,) = delta.values()
    generator = torch.Generator().manual_seed(9)
    gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
    parameter.grad = gradient.clone()
    drift_fast.Injection(model, delta, alpha=1.0035, scale=scale).step()
    expected = reference.inject(gradient, stored, alpha=1.0035, scale=scale)
    rounded = torch.from_numpy(expected).to(dtype)
    # Sums in float32 put a value in a hundred on the other side of a tie; a rounded coefficient,
    # or a rounded product, one in three to one in twenty.
    agreeing = int((parameter.grad == rounded).sum())
    assert agreeing > 0.98 * gradient.numel()


@pytest.mark.parametrize("scale", reference.SCALES)
def test_float16_gradients_whose_squares_overflow_float16_are_injected(
    tmp_path: Path, scale: str
) -> None:
    model, parameter, delta = single_target(tmp_path, (64, 48), dtype=torch.float16)
    (stored,) = delta.values()
    generator = torch.Generator().manual_seed(9)
    gradient = (torch.randn(parameter.shape, generator=generator) * 500).to(torch.float16)
    assert torch.isinf((gradient * gradient).sum())
    parameter.grad = gradient.clone()
    injection = drift_fast.Injection(model, delta, alpha=0.5, scale=scale)
    injection.step()
    assert injection.injected == 1
    expected = reference.inject(gradient, stored, alpha=0.5, scale=scale)
    c = abs(reference.coefficient(gradient, stored, alpha=0.5, scale=scale))
    allowed = 2.0**-10 * (np.abs(expected) + 2 * c * np.abs(reference.exact(stored)))
    assert np.all(np.abs(reference.exact(parameter.grad) - expected) <= allowed + 1e-7)


def test_a_coefficient_beyond_float16_is_applied_to_float16_gradients(tmp_path: Path) -> None:
    # A delta of 1e-3 under a gradient of 500 gives c of some 2e5; float16 ends at 65504.
    model, parameter, delta = single_target(tmp_path, (64, 48), dtype=torch.float16, size=2e-3)
    (stored,) = delta.values()
    generator = torch.Generator().manual_seed(9)
    gradient = (torch.randn(parameter.shape, generator=generator) * 500).to(torch.float16)
    c = reference.coefficient(gradient, stored, alpha=0.5, scale="gradnorm")
    assert c > 65504
    parameter.grad = gradient.clone()
    drift_fast.Injection(model, delta, alpha=0.5, scale="gradnorm").step()
    expected = reference.inject(gradient, stored, alpha=0.5, scale="gradnorm")
    allowed = 2.0**-10 * (np.abs(expected) + 2 * c * np.abs(reference.exact(stored)))
    assert np.all(np.abs(reference.exact(parameter.grad) - expected) <= allowed)


@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("size", [1e-18, 1e-25, 1e-36])
def test_a_delta_whose_square_vanishes_in_float32_never_spoils_a_gradient(
    tmp_path: Path, scale: str, size: float
) -> None:
    model, parameter, delta = single_target(tmp_path, (8, 6), size=size)
    (stored,) = delta.values()
    generator = torch.Generator().manual_seed(9)
    gradient = torch.randn(parameter.shape, generator=generator)
    parameter.grad = gradient.clone()
    injection = drift_fast.Injection(model, delta, alpha=0.5, scale=scale)
    injection.step()
    if injection.skipped:
        assert torch.equal(parameter.grad, gradient)
    else:
        assert_follows_reference(parameter.grad, gradient, stored, alpha=0.5, scale=scale)


@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("exponent", [-30, -24, 22, 30])
def test_gradients_whose_squares_leave_float32_are_injected_or_counted(
    tmp_path: Path, scale: str, exponent: int, kind: str
) -> None:
    if kind == "device" and exponent < 0:
        pytest.skip("float32 sums on a device: a gradient below 1e-19 counts as zero")
    model, parameter, delta = single_target(tmp_path, (8, 6))
    (stored,) = delta.values()
    generator = torch.Generator().manual_seed(9)
    gradient = torch.randn(parameter.shape, generator=generator) * 10.0**exponent
    parameter.grad = gradient.clone()
    injection = drift_fast.Injection(model, delta, alpha=0.5, scale=scale)
    injection.step()
    if injection.skipped == 1:
        # Too large to square: left alone and said so.
        assert exponent > 0
        assert injection.injected == 0
        assert torch.equal(parameter.grad, gradient)
    else:
        assert_follows_reference(parameter.grad, gradient, stored, alpha=0.5, scale=scale)


@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_parameter_with_a_gradient_that_is_not_finite_is_left_alone_and_counted(
    world: tuple[Backbone, drift_fast.Delta], scale: str, bad: float
) -> None:
    model, delta = world
    victim = "model.layers.0.mlp.up_proj.weight"
    spoilt = model.get_parameter(victim).grad
    assert spoilt is not None
    spoilt[1, 2] = bad
    before = gradients_of(model)
    injection = drift_fast.Injection(model, delta, scale=scale)
    injection.step()
    after = gradients_of(model)
    assert (injection.injected, injection.skipped) == (19, 1)
    assert torch.equal(after[victim].isfinite(), before[victim].isfinite())
    finite = before[victim].isfinite()
    assert torch.equal(after[victim][finite], before[victim][finite])
    for name in delta:
        if name != victim:
            assert_follows_reference(after[name], before[name], delta[name], alpha=1, scale=scale)


def test_the_count_of_skipped_parameters_is_that_of_the_last_step(
    world: tuple[Backbone, drift_fast.Delta],
) -> None:
    model, delta = world
    injection = drift_fast.Injection(model, delta)
    spoilt = model.get_parameter("model.layers.1.mlp.up_proj.weight").grad
    assert spoilt is not None
    spoilt.fill_(math.inf)
    injection.step()
    assert (injection.injected, injection.skipped) == (19, 1)
    model.zero_grad()
    regression_loss(model, regression_batch()).backward()
    injection.step()
    assert (injection.injected, injection.skipped) == (20, 0)


@pytest.mark.parametrize("scale", ["gradnorm", "adaptive"])
def test_a_gradient_of_zeros_stays_zero(
    world: tuple[Backbone, drift_fast.Delta], scale: str
) -> None:
    model, delta = world
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.zero_()
    injection = drift_fast.Injection(model, delta, scale=scale)
    injection.step()
    assert injection.skipped == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("scale", reference.SCALES)
def test_gradients_with_other_strides_are_injected(tmp_path: Path, scale: str) -> None:
    model, parameter, delta = single_target(tmp_path, (8, 6))
    (stored,) = delta.values()
    generator = torch.Generator().manual_seed(9)
    gradient = torch.randn(parameter.shape, generator=generator)
    transposed = gradient.t().contiguous().t()
    assert not transposed.is_contiguous()
    parameter.grad = transposed
    drift_fast.Injection(model, delta, alpha=0.5, scale=scale).step()
    assert_follows_reference(parameter.grad, gradient, stored, alpha=0.5, scale=scale)
