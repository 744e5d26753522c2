"""The injected gradient against the float64 restatement.

Owns: parity of the three scales in step scope, and the selection of targets. Beside it:
test_injection_extremes.py, _writing.py (in place, no host reads), _loop.py (training loops),
_names.py (real models) and _errors.py.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings

import drift_fast
from support import reference
from support.injection_models import (
    ARITHMETIC,
    Backbone,
    arithmetic,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
    write_checkpoint,
)
from support.reference import assert_follows_reference

# --- the restatement itself -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "weight", "expected"),
    [
        ("absolute", None, [3 - 2 * 5, 4]),
        ("absolute", [0.0, 10.0], [3 - 2 * 10, 4]),
        ("gradnorm", None, [3 - 2 * 5, 4]),
        ("adaptive", None, [3 - 2 * 0.8 * 5, 4]),
    ],
)
@pytest.mark.parametrize("restated", [reference.inject, reference.public_inject])
def test_reference_gives_the_values_worked_out_by_hand(
    restated: Any, scale: str, weight: Any, expected: list[float]
) -> None:
    found = restated([3.0, 4.0], [5.0, 0.0], alpha=2.0, scale=scale, weight=weight)
    np.testing.assert_allclose(found, expected, rtol=1e-15)


def test_reference_adaptive_goes_from_nothing_to_the_whole_push_with_the_angle() -> None:
    delta = np.array([3.0, -1.0, 2.0])
    across = np.array([1.0, 3.0, 0.0])
    along, against = 0.5 * delta, -0.5 * delta
    for gradient, share in ((along, 1.0), (against, 0.0), (across, 0.5)):
        full = reference.coefficient(gradient, delta, alpha=0.7, scale="gradnorm")
        found = reference.coefficient(gradient, delta, alpha=0.7, scale="adaptive")
        assert found == pytest.approx(share * full, abs=1e-15)


def test_reference_progress_is_one_at_the_expert_and_zero_at_the_start() -> None:
    start = {"a": [1.0, 2.0], "b": [0.0]}
    delta = {"a": [3.0, -4.0], "b": [2.0]}
    arrived = {"a": [4.0, -2.0], "b": [2.0]}
    assert reference.progress(arrived, start, delta) == (1.0, {"a": 1.0, "b": 1.0})
    assert reference.progress(start, start, delta) == (0.0, {"a": 0.0, "b": 0.0})


# --- parity over generated gradients and deltas -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """How the gradient and the delta of one parameter are drawn."""

    seed: int
    gradient_exponent: int
    delta_exponent: int
    angle: str  # any, parallel, opposite or orthogonal
    zero: str  # none, gradient or delta


def cases(*, exponents: tuple[int, int]) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        seed=st.integers(0, 2**31 - 1),
        gradient_exponent=st.integers(*exponents),
        delta_exponent=st.integers(*exponents),
        angle=st.sampled_from(["any", "any", "parallel", "opposite", "orthogonal"]),
        zero=st.sampled_from(["none", "none", "none", "none", "gradient", "delta"]),
    )


def drawn_pair(
    shape: torch.Size, case: Case, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return expert and multimodal weights whose difference has about the drawn norm.

    The expert is twice the multimodal model, so the difference is exact in either dtype.
    """
    generator = torch.Generator().manual_seed(case.seed)
    size = 10.0**case.delta_exponent / math.sqrt(math.prod(shape))
    multimodal = (torch.randn(shape, generator=generator) * size).to(dtype)
    return (multimodal.clone() if case.zero == "delta" else 2 * multimodal), multimodal


def drawn_gradient(delta: torch.Tensor, case: Case, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1)
    if case.zero == "gradient":
        return torch.zeros(delta.shape, dtype=dtype)
    d = delta.double()
    gradient = torch.randn(delta.shape, generator=generator).double()
    if case.angle == "parallel" and d.any():
        gradient = d
    elif case.angle == "opposite" and d.any():
        gradient = -d
    elif case.angle == "orthogonal" and d.any():
        unit = d / d.norm()
        gradient = gradient - (gradient * unit).sum() * unit
    return (gradient / gradient.norm() * 10.0**case.gradient_exponent).to(dtype)


# A parameter of each shape: matrices wide and tall, and biases.
TARGETS = 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", reference.ALL_SCALES)
@ARITHMETIC
@given(
    drawn=st.lists(cases(exponents=(-12, 12)), min_size=TARGETS, max_size=TARGETS),
    alpha=st.sampled_from([1.0, 0.3, -1.0, 2.5, 1e-3]),
)
# Ten cases at once shrink slowly and to no use: the message names the parameter that differs.
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
def test_every_scale_matches_the_float64_restatement(
    scale: str, dtype: torch.dtype, kind: str, drawn: list[Case], alpha: float
) -> None:
    # One delta that is not zero keeps the pair from being the same checkpoint twice.
    drawn = [dataclasses.replace(drawn[0], zero="none"), *drawn[1:]]
    model = Backbone(layers=1).to(dtype)
    targets = {n: p for n, p in model.named_parameters() if n.startswith("model.")}
    assert len(targets) == TARGETS
    pairs = {
        name: drawn_pair(parameter.shape, case, dtype)
        for (name, parameter), case in zip(targets.items(), drawn, strict=True)
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expert = write_checkpoint(folder / "expert", {k: v[0] for k, v in pairs.items()})
        base = write_checkpoint(folder / "base", {k: v[1] for k, v in pairs.items()})
        stored_as = str(dtype).removeprefix("torch.")
        delta = drift_fast.compute_delta(expert, base, dtype=stored_as, out=folder / "delta")
        deltas = {name: delta[name] for name in targets}
        gradients = {}
        for (name, parameter), case in zip(targets.items(), drawn, strict=True):
            gradients[name] = drawn_gradient(deltas[name], case, dtype)
            parameter.grad = gradients[name].clone()
        with (
            arithmetic(kind),
            drift_fast.Injection(model, delta, alpha=alpha, scale=scale) as injection,
        ):
            injection.step()
            assert injection.skipped == 0
    for name, parameter in targets.items():
        assert parameter.grad is not None
        assert_follows_reference(
            parameter.grad, gradients[name], deltas[name], alpha=alpha, scale=scale, label=name
        )


@pytest.fixture
def world(tmp_path: Path) -> tuple[Backbone, drift_fast.Delta]:
    """A float32 network with gradients of one batch, and a delta for its ten targets a layer."""
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    regression_loss(model, regression_batch()).backward()
    return model, delta


@pytest.mark.parametrize("scale", reference.ALL_SCALES)
def test_gradients_of_a_real_backward_pass_match_the_restatement(
    world: tuple[Backbone, drift_fast.Delta], scale: str
) -> None:
    model, delta = world
    before = gradients_of(model)
    injection = drift_fast.Injection(model, delta, alpha=0.8, scale=scale)
    injection.step()
    after = gradients_of(model)
    assert injection.injected == len(delta) == 20
    for name in delta:
        c = reference.coefficient(before[name], delta[name], alpha=0.8, scale=scale)
        assert torch.equal(after[name], before[name]) == (c == 0.0)
        assert c != 0.0 or scale == "project"
        assert_follows_reference(after[name], before[name], delta[name], alpha=0.8, scale=scale)


def test_adaptive_is_the_default_scale_with_alpha_one(
    world: tuple[Backbone, drift_fast.Delta],
) -> None:
    model, delta = world
    before = gradients_of(model)
    drift_fast.Injection(model, delta).step()
    for name, found in gradients_of(model).items():
        if name in delta:
            assert_follows_reference(found, before[name], delta[name], alpha=1.0, scale="adaptive")


def test_absolute_stretched_to_the_weight_matches_the_restatement(
    world: tuple[Backbone, drift_fast.Delta],
) -> None:
    model, delta = world
    before = gradients_of(model)
    injection = drift_fast.Injection(model, delta, alpha=0.4, scale="absolute", rescale="weight")
    injection.step()
    for name, parameter in model.named_parameters():
        if name in delta:
            assert parameter.grad is not None
            assert_follows_reference(
                parameter.grad,
                before[name],
                delta[name],
                alpha=0.4,
                scale="absolute",
                weight=parameter,
            )


def test_stretching_uses_the_norm_of_the_weight_at_attachment(
    world: tuple[Backbone, drift_fast.Delta],
) -> None:
    model, delta = world
    at_attachment = {n: p.detach().clone() for n, p in model.named_parameters()}
    injection = drift_fast.Injection(model, delta, alpha=0.4, scale="absolute", rescale="weight")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    before = gradients_of(model)
    injection.step()
    for name, found in gradients_of(model).items():
        if name in delta:
            assert_follows_reference(
                found,
                before[name],
                delta[name],
                alpha=0.4,
                scale="absolute",
                weight=at_attachment[name],
            )


@pytest.mark.parametrize("scale", reference.ALL_SCALES)
def test_a_delta_read_back_from_disk_injects_as_one_computed_on_demand(
    tmp_path: Path, scale: str
) -> None:
    injected = []
    for out in (None, tmp_path / "delta"):
        model = Backbone()
        folder = tmp_path / ("lazy" if out is None else "stored")
        delta = delta_towards(folder, model, dtype="bfloat16", out=out)
        if out is not None:
            delta = drift_fast.Delta.open(out)
        regression_loss(model, regression_batch()).backward()
        drift_fast.Injection(model, delta, scale=scale).step()
        injected.append(gradients_of(model))
    for name, found in injected[0].items():
        assert torch.equal(found, injected[1][name]), name


# --- which parameters -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"modules": "attn"}, lambda name: ".self_attn." in name),
        ({"modules": ("mlp",)}, lambda name: ".mlp." in name),
        ({"modules": ("attn", "mlp")}, lambda name: True),
        (
            {"modules": r"re:.*\.(q_proj|up_proj)\..*"},
            lambda name: "q_proj" in name or "up_" in name,
        ),
        ({"layers": [1]}, lambda name: ".layers.1." in name),
        ({"layers": range(1)}, lambda name: ".layers.0." in name),
        ({"layers": "0-1", "modules": "mlp"}, lambda name: ".mlp." in name),
    ],
    ids=["attn", "mlp", "both", "pattern", "layer list", "range", "layer text"],
)
def test_only_the_chosen_modules_and_layers_are_injected(
    world: tuple[Backbone, drift_fast.Delta], options: dict[str, Any], expected: Any
) -> None:
    model, delta = world
    chosen = {name for name in delta if expected(name)}
    before = gradients_of(model)
    injection = drift_fast.Injection(model, delta, **options)
    injection.step()
    changed = {n for n, g in gradients_of(model).items() if not torch.equal(g, before[n])}
    assert changed == chosen
    assert injection.injected == len(chosen)


def test_parameters_outside_the_delta_keep_their_gradient(
    world: tuple[Backbone, drift_fast.Delta],
) -> None:
    model, delta = world
    before = gradients_of(model)
    drift_fast.Injection(model, delta).step()
    after = gradients_of(model)
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert torch.equal(after["head.bias"], before["head.bias"])


def test_after_removal_and_after_the_with_block_gradients_are_plain(
    world: tuple[Backbone, drift_fast.Delta],
) -> None:
    model, delta = world
    plain = gradients_of(model)
    with drift_fast.Injection(model, delta) as injection:
        injection.step()
    model.zero_grad()
    regression_loss(model, regression_batch()).backward()
    for name, found in gradients_of(model).items():
        assert torch.equal(found, plain[name])
    again = drift_fast.Injection(model, delta)
    again.remove()
    again.remove()
    model.zero_grad()
    regression_loss(model, regression_batch()).backward()
    for name, found in gradients_of(model).items():
        assert torch.equal(found, plain[name])
