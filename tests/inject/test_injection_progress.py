"""Motion along the delta: the weights go where alpha says, and metrics() reports how far.

Owns: progress, lambda = <theta_t - theta_0, delta> / |delta|^2, against a float64 computation.
"""

from __future__ import annotations

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
    single_target,
    train,
    weights_of,
)


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


@pytest.mark.parametrize("learning_rate", [1e-2, 1e-6])
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
    assert found["progress"] == pytest.approx(overall, rel=1e-3, abs=1e-8)
    assert {key for key in found if key.startswith("progress/")} >= {
        f"progress/{name}" for name in each
    }
    for name, expected in each.items():
        # Single tensors move along the delta by differences of a few float32 steps.
        assert found[f"progress/{name}"] == pytest.approx(expected, rel=1e-2, abs=1e-6), name


def test_progress_resolves_a_ten_thousandth_of_the_way_on_a_million_values(
    tmp_path: Path,
) -> None:
    model, parameter, delta = single_target(tmp_path, (1024, 1024))
    injection = drift_fast.Injection(model, delta)
    (stored,) = delta.values()
    start = weights_of(model)
    with torch.no_grad():
        parameter.add_(stored, alpha=1e-4)
    (name,) = start
    expected, _ = reference.progress(weights_of(model), start, {name: stored})
    assert expected == pytest.approx(1e-4, rel=1e-2)
    assert injection.metrics()["progress"] == pytest.approx(expected, rel=1e-3)


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


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_alpha_is_reported_as_zero_once_its_schedule_has_ended(tmp_path: Path, scope: Any) -> None:
    model = Backbone()
    injection = drift_fast.Injection(
        model, delta_towards(tmp_path, model), schedule="window(0, 4)", scope=scope
    )
    assert injection.metrics()["alpha"] == 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = []
    for _ in range(6):
        train(model, 1, injection=injection if scope == "step" else None, optimizer=optimizer)
        found.append(injection.metrics()["alpha"])
    assert found == [1.0] * 4 + [0.0] * 2


@pytest.mark.parametrize("damage", [10**400, True, "1", None, float("nan")])
def test_a_start_along_delta_that_is_no_number_is_refused(tmp_path: Path, damage: Any) -> None:
    model = Backbone()
    injection = drift_fast.Injection(model, delta_towards(tmp_path, model))
    state = injection.state_dict()
    name = injection.targets[0]
    with pytest.raises(drift_fast.DriftError, match="an injection's state is damaged: origin"):
        injection.load_state_dict({**state, "origin": {**state["origin"], name: damage}})
    with pytest.raises(drift_fast.DriftError, match="a key of origin must be a string"):
        injection.load_state_dict({**state, "origin": {**state["origin"], 1: 0.0}})
    with pytest.raises(drift_fast.DriftError, match="differ in 2 targets"):
        injection.load_state_dict({**state, "origin": {**state["origin"], "a": 0.0, "b": 0.0}})
    assert injection.state_dict() == state


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


@pytest.mark.parametrize(
    ("scale", "along", "hints"), [("adaptive", 0.0, 1), ("adaptive", 0.3, 0), ("gradnorm", 0.0, 0)]
)
def test_angles_that_stay_near_zero_are_hinted_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scale: Any, along: float, hints: int
) -> None:
    caplog.set_level("INFO", "drift_fast")
    model, parameter, delta = single_target(tmp_path, (64, 64))
    (stored,) = delta.values()
    injection = drift_fast.Injection(model, delta, scale=scale)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(64, 64, generator=generator)
        noise -= stored * (noise * stored).sum() / stored.square().sum()
        parameter.grad = noise + along * stored * noise.norm() / stored.norm()
        injection.step()
        injection.metrics()
        torch.optim.SGD([parameter], lr=0.0).step()
    said = [text for text in caplog.messages if "gradnorm" in text]
    assert len(said) == hints
    if said:
        assert "after 3 steps" in said[0]
        assert "half of alpha" in said[0]
