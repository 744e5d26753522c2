"""InjectionConfig: options by keyword, as one object, or from a file, with the same gradients.

Owns: how options reach an injection and how wrong ones are refused. What they do is tested with
each of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from drift_fast.inject.config import InjectionConfig
from support.injection_models import Backbone, delta_towards, regression_batch, regression_loss

OPTIONS: dict[str, Any] = {"alpha": {"attn": 0.5, "mlp": 2.0}, "scale": "gradnorm", "layers": "0"}


@pytest.fixture
def delta(tmp_path: Path) -> drift_fast.Delta:
    return delta_towards(tmp_path, Backbone(), out=tmp_path / "delta")


def injected(delta: drift_fast.Delta, *arguments: Any, **options: Any) -> list[torch.Tensor]:
    """Return the gradients of a step."""
    model = Backbone()
    with drift_fast.Injection(model, delta, *arguments, **options) as injection:
        regression_loss(model, regression_batch()).backward()
        injection.step()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def of_optimizer(delta: drift_fast.Delta, *arguments: Any, **options: Any) -> list[torch.Tensor]:
    """Return the gradients of a step that an optimizer injects."""
    model = Backbone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with drift_fast.attach(optimizer, delta, *arguments, model=model, **options):
        regression_loss(model, regression_batch()).backward()
        optimizer.step()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("call", [injected, of_optimizer])
@pytest.mark.parametrize("how", ["object", "json", "yaml", "directory", "keywords win"])
def test_options_may_be_keywords_an_object_or_a_file(
    delta: drift_fast.Delta, tmp_path: Path, call: Callable[..., list[torch.Tensor]], how: str
) -> None:
    expected = call(delta, **OPTIONS)
    config: Any = InjectionConfig(**OPTIONS)
    keywords: dict[str, Any] = {}
    if how == "json":
        config = tmp_path / "injection.json"
        config.write_text(json.dumps(OPTIONS))
    elif how == "yaml":
        pytest.importorskip("yaml")
        config = str(tmp_path / "drift.yaml")
        Path(config).write_text("alpha: {attn: 0.5, mlp: 2}\nscale: gradnorm\nlayers: 0\n")
    elif how == "directory":
        config = tmp_path / "delta"
        (config / "injection.json").write_text(json.dumps(OPTIONS))
    elif how == "keywords win":
        config, keywords = InjectionConfig(**OPTIONS | {"scale": "project"}), {"scale": "gradnorm"}
    found = call(delta, config, **keywords)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_configuration_in_the_directory_of_a_delta_is_not_used_unless_it_is_named(
    delta: drift_fast.Delta, tmp_path: Path
) -> None:
    plain = injected(delta)
    (tmp_path / "delta" / "injection.json").write_text(json.dumps(OPTIONS))
    found = injected(drift_fast.Delta.open(tmp_path / "delta"))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_a_configuration_survives_a_round_trip_through_plain_values() -> None:
    config = InjectionConfig(**OPTIONS)
    assert config.to_dict() == OPTIONS
    assert InjectionConfig.from_dict(config.to_dict(), origin="file") == config


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alhpa": 1.0}, TypeError, r"Injection\(\) .*'alhpa'; did you mean 'alpha'\?"),
        ({"optimiser": None}, TypeError, r"unexpected keyword argument 'optimiser'"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"scope": "epoch"}, ValueError, "scope must be one of step, microbatch, got 'epoch'"),
        ({"rescale": "weight"}, ValueError, "no effect with scale='adaptive'"),
        ({"cap_by": "overall"}, ValueError, "no effect without progress_cap"),
        ({"scope": "microbatch", "overlap": True}, ValueError, 'overlap is for scope="step"'),
        ({"scope": "microbatch", "residency": "disk"}, ValueError, 'residency="device"'),
        ({"total_steps": 0}, ValueError, "steps from 1, got 0"),
        ({"strict": "no"}, ValueError, "strict must be True or False, got 'no'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_read(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        drift_fast.Injection(Backbone(), "no such delta", **options)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"alhpa": 1}', ValueError, r"'alhpa'; did you mean 'alpha'\?"),
        ('{"strict": "no"}', ValueError, "strict must be true or false"),
        ('{"look_ahead": -1}', ValueError, "look_ahead must be a finite number of at least 0"),
        ('{"optimizer": 1}', ValueError, "unexpected option 'optimizer'"),
        ("[]", TypeError, "must be a mapping of options, got list"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(
    tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    file = tmp_path / "drift.json"
    file.write_text(text)
    with pytest.raises(error, match=f"{re.escape(str(file))}.*{message}"):
        drift_fast.Injection(Backbone(), "no such delta", file)


def test_a_configuration_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"injection\.yaml"):
        drift_fast.Injection(Backbone(), "no such delta", tmp_path)
    with pytest.raises(TypeError, match="config must be an InjectionConfig or the path"):
        drift_fast.Injection(Backbone(), "no such delta", {"alpha": 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["model", "scaler", "csv"])
def test_attach_refuses_what_the_owner_has_itself_or_has_no_use_for(
    delta: drift_fast.Delta, name: str
) -> None:
    model = Backbone()
    owner: Any = type("DeepSpeedEngine", (), {})()
    if name == "csv":
        owner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"leave {name}=… out"):
        drift_fast.attach(
            owner, delta, **{"model": model, name: model} if name == "csv" else {name: model}
        )
