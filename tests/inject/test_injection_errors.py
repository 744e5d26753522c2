"""Every way an injection can be wrong says so, at construction or in step().

Owns: the exception types and what their messages name. Optimizer steps without an injection are in
test_injection_watchdog.py.
"""

from __future__ import annotations

import contextlib
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from support.injection_models import (
    Backbone,
    delta_towards,
    gradients_of,
    moved_text,
    regression_batch,
    regression_loss,
    saved,
    tiny_qwen2,
    write_checkpoint,
)

VICTIM = "model.layers.1.mlp.down_proj.weight"


def message_of(caught: pytest.ExceptionInfo[BaseException]) -> str:
    return str(caught.value)


def assert_attaches(model: torch.nn.Module, delta: drift_fast.Delta) -> None:
    """A refused attachment must not stand in the way of a right one."""
    drift_fast.Injection(model, delta).remove()


def test_the_errors_form_one_family() -> None:
    assert issubclass(drift_fast.CoverageError, drift_fast.DriftError)
    assert issubclass(drift_fast.AlignmentError, drift_fast.DriftError)
    assert issubclass(drift_fast.CheckpointError, drift_fast.DriftError)
    assert issubclass(drift_fast.DriftError, Exception)


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_that_is_not_finite_is_refused(
    model: Backbone, delta: drift_fast.Delta, alpha: float
) -> None:
    with pytest.raises(ValueError, match="alpha") as caught:
        drift_fast.Injection(model, delta, alpha=alpha)
    assert str(alpha) in message_of(caught)
    assert_attaches(model, delta)


@pytest.mark.parametrize(
    ("argument", "value", "known"),
    [
        ("scale", "adaptive_cosine", ["adaptive", "gradnorm", "absolute"]),
        ("scope", "epoch", ["step", "microbatch"]),
        ("rescale", "gradient", ["weight"]),
        ("modules", "attention", ["attn", "mlp"]),
        ("layers", "3-1", ["3-1"]),
    ],
)
def test_an_unknown_choice_is_refused_and_the_known_ones_named(
    model: Backbone, delta: drift_fast.Delta, argument: str, value: str, known: list[str]
) -> None:
    with pytest.raises(ValueError, match=re.escape(value)) as caught:
        drift_fast.Injection(model, delta, **{argument: value})
    for choice in known:
        assert choice in message_of(caught)
    assert_attaches(model, delta)


@pytest.mark.parametrize("options", [{"layers": [99]}, {"modules": "embed"}])
def test_a_choice_that_leaves_nothing_to_inject_is_refused(
    model: Backbone, delta: drift_fast.Delta, options: dict[str, Any]
) -> None:
    with pytest.raises((ValueError, drift_fast.DriftError)) as caught:
        drift_fast.Injection(model, delta, **options)
    assert next(iter(options)) in message_of(caught)
    assert_attaches(model, delta)


# --- the model does not fit the delta ---------------------------------------------------------


def test_a_model_with_nothing_in_common_is_refused(delta: drift_fast.Delta) -> None:
    # Silence here is the public code's failure: no hook, a run called active, plain fine-tuning.
    stranger = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 3))
    with pytest.raises(drift_fast.DriftError) as caught:
        drift_fast.Injection(stranger, delta)
    assert re.search(r"model\.layers\.\d\.\w+\.\w+_proj\.\w+", message_of(caught))


def test_a_language_model_under_another_path_is_found_or_refused_but_never_skipped(
    tmp_path: Path,
) -> None:
    text = tiny_qwen2()
    delta = drift_fast.compute_delta(
        saved(moved_text(text), tmp_path / "expert"), saved(text, tmp_path / "base")
    )

    class Moved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.somewhere = torch.nn.Module()
            self.somewhere.backbone = text.model

    moved = Moved()
    for parameter in moved.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        injection = drift_fast.Injection(moved, delta)
    except drift_fast.DriftError:
        return
    injection.step()
    assert injection.injected == len(delta)
    for name in drift_fast.match_parameters(moved, delta):
        gradient = moved.get_parameter(name).grad
        assert gradient is not None
        assert not torch.equal(gradient, torch.ones_like(gradient)), name


def test_a_tensor_without_a_parameter_is_named(delta: drift_fast.Delta) -> None:
    model = Backbone()
    del model.model.layers[1].mlp.down_proj
    with pytest.raises(drift_fast.CoverageError) as caught:
        drift_fast.Injection(model, delta)
    assert VICTIM in message_of(caught)


def test_a_model_with_fewer_layers_is_refused(delta: drift_fast.Delta) -> None:
    with pytest.raises(drift_fast.DriftError, match=r"layers\.1\.|2 layers|layer"):
        drift_fast.Injection(Backbone(layers=1), delta)


def test_a_model_of_another_shape_is_refused_with_both_shapes(delta: drift_fast.Delta) -> None:
    with pytest.raises(drift_fast.CoverageError) as caught:
        drift_fast.Injection(Backbone(inner=11), delta)
    message = message_of(caught)
    assert re.search(r"mlp\.(gate|up|down)_proj\.weight", message)
    pairs = [("[10, 6]", "[11, 6]"), ("[6, 10]", "[6, 11]")]
    assert any(ours in message and theirs in message for ours, theirs in pairs)


def test_one_parameter_of_another_shape_is_named_with_both_shapes(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(10, 7, bias=False)
    with pytest.raises(drift_fast.CoverageError) as caught:
        drift_fast.Injection(model, delta)
    for part in (VICTIM, "[6, 10]", "[7, 10]"):
        assert part in message_of(caught)


def test_a_transposed_parameter_is_not_taken_for_a_match(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(10, 6))
    with pytest.raises(drift_fast.CoverageError) as caught:
        drift_fast.Injection(model, delta)
    for part in (VICTIM, "[6, 10]", "[10, 6]"):
        assert part in message_of(caught)


def test_partial_coverage_is_taken_only_when_asked_for_and_reported(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    del model.model.layers[1].mlp.down_proj
    with pytest.raises(drift_fast.CoverageError, match=re.escape(VICTIM)):
        drift_fast.Injection(model, delta, strict=False, min_coverage=0.99)
    injection = drift_fast.Injection(model, delta, strict=False, min_coverage=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    injection.step()
    assert injection.injected == len(delta) - 1 == 19


# --- targets that cannot be trained -----------------------------------------------------------


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_a_frozen_target_is_refused_by_name(
    model: Backbone, delta: drift_fast.Delta, scope: str
) -> None:
    model.get_parameter(VICTIM).requires_grad_(False)
    with pytest.raises(drift_fast.DriftError, match=r"requires_grad|frozen") as caught:
        drift_fast.Injection(model, delta, scope=scope)
    assert VICTIM in message_of(caught)
    model.get_parameter(VICTIM).requires_grad_(True)
    assert_attaches(model, delta)


def test_a_frozen_parameter_outside_the_selection_does_not_matter(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    model.get_parameter(VICTIM).requires_grad_(False)
    model.head.requires_grad_(False)
    drift_fast.Injection(model, delta, modules="attn")


def test_a_target_the_optimizer_does_not_hold_is_refused_by_name(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    held = [parameter for name, parameter in model.named_parameters() if name != VICTIM]
    with pytest.raises(drift_fast.DriftError, match="optimizer") as caught:
        drift_fast.Injection(model, delta, optimizer=torch.optim.SGD(held, lr=0.1))
    assert VICTIM in message_of(caught)
    assert_attaches(model, delta)


def test_an_optimizer_of_another_model_is_refused(model: Backbone, delta: drift_fast.Delta) -> None:
    with pytest.raises(drift_fast.DriftError, match="optimizer"):
        drift_fast.Injection(
            model, delta, optimizer=torch.optim.SGD(Backbone().parameters(), lr=0.1)
        )


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_a_second_attachment_is_refused_until_the_first_is_removed(
    model: Backbone, delta: drift_fast.Delta, scope: str
) -> None:
    first = drift_fast.Injection(model, delta, scope=scope)
    for wrapped in (model, torch.compile(model)):
        with pytest.raises(drift_fast.DriftError, match="remove") as caught:
            drift_fast.Injection(wrapped, delta)
        assert "already" in message_of(caught)
    first.remove()
    with drift_fast.Injection(model, delta):
        pass
    assert_attaches(model, delta)


def test_an_error_inside_the_with_block_still_detaches(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    with pytest.raises(RuntimeError, match="of the user"), drift_fast.Injection(model, delta):
        raise RuntimeError("of the user")
    assert_attaches(model, delta)


# --- step() -----------------------------------------------------------------------------------


def test_a_step_before_any_backward_is_refused(model: Backbone, delta: drift_fast.Delta) -> None:
    injection = drift_fast.Injection(model, delta)
    with pytest.raises(drift_fast.DriftError, match="backward") as caught:
        injection.step()
    assert "grad" in message_of(caught)


def test_a_step_after_zero_grad_is_refused(model: Backbone, delta: drift_fast.Delta) -> None:
    injection = drift_fast.Injection(model, delta)
    regression_loss(model, regression_batch()).backward()
    injection.step()
    model.zero_grad()
    with pytest.raises(drift_fast.DriftError, match="backward"):
        injection.step()


def test_a_single_target_without_a_gradient_is_named_and_nothing_else_is_changed(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    injection = drift_fast.Injection(model, delta)
    regression_loss(model, regression_batch()).backward()
    model.get_parameter(VICTIM).grad = None
    before = gradients_of(model)
    with pytest.raises(drift_fast.DriftError) as caught:
        injection.step()
    message = message_of(caught)
    assert VICTIM in message
    assert "model.layers.0" not in message
    for name, found in gradients_of(model).items():
        assert torch.equal(found, before[name])


def test_a_target_left_out_of_the_forward_pass_is_named(tmp_path: Path) -> None:
    class Unused(Backbone):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.head(self.model.layers[0](inputs))
            return hidden

    model = Unused()
    injection = drift_fast.Injection(model, delta_towards(tmp_path, model))
    regression_loss(model, regression_batch()).backward()
    with pytest.raises(drift_fast.DriftError, match=r"model\.layers\.1\."):
        injection.step()


def test_skipping_leaves_targets_without_a_gradient_out_and_counts_them(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    injection = drift_fast.Injection(model, delta, missing_gradients="skip")
    regression_loss(model, regression_batch()).backward()
    first, last = injection.targets[0], injection.targets[-1]
    before = gradients_of(model)
    for name in (first, last):
        model.get_parameter(name).grad = None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        injection.step()
        assert (injection.injected, injection.skipped) == (len(delta) - 2, 2)
        assert injection.metrics()["skipped"] == 2
        optimizer.step()
    for name in injection.targets[1:-1]:
        assert not torch.equal(model.get_parameter(name).grad, before[name])
    assert model.get_parameter(first).grad is None


def test_a_push_is_reported_only_where_it_was_measured(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with drift_fast.Injection(model, delta, scale="gradnorm") as injection:
        for alpha, reported in ((1.0, True), (0.0, False)):
            injection.alpha = alpha
            regression_loss(model, regression_batch()).backward()
            injection.step()
            assert ("relative_push" in injection.metrics()) is reported
            optimizer.step()
            optimizer.zero_grad()
    with drift_fast.Injection(model, delta, scope="microbatch") as injection:
        regression_loss(model, regression_batch()).backward()
        assert "relative_push" not in injection.metrics()


def test_removing_an_injection_frees_its_delta_at_once(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    injection = drift_fast.Injection(model, delta)
    regression_loss(model, regression_batch()).backward()
    injection.step()
    held = [weakref.ref(tensor) for group in injection._groups for tensor in group.store.deltas]
    assert held
    assert all(reference() is not None for reference in held)
    injection.remove()
    assert all(reference() is None for reference in held), "kept until the next garbage collection"


def test_a_removed_injection_changes_no_gradient(model: Backbone, delta: drift_fast.Delta) -> None:
    injection = drift_fast.Injection(model, delta)
    injection.remove()
    regression_loss(model, regression_batch()).backward()
    before = gradients_of(model)
    with contextlib.suppress(drift_fast.DriftError):
        injection.step()
    for name, found in gradients_of(model).items():
        assert torch.equal(found, before[name])


def test_a_second_step_on_the_same_gradient_is_refused(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    injection = drift_fast.Injection(model, delta)
    regression_loss(model, regression_batch()).backward()
    injection.step()
    once = gradients_of(model)
    with pytest.raises(drift_fast.DriftError, match="twice"):
        injection.step()
    for name, found in gradients_of(model).items():
        assert torch.equal(found, once[name])


# --- the delta itself -------------------------------------------------------------------------


def test_a_delta_of_the_same_checkpoint_twice_is_refused_and_a_zero_one_not_attached(
    tmp_path: Path, model: Backbone
) -> None:
    state = dict(model.state_dict())
    one = write_checkpoint(tmp_path / "one", state)
    two = write_checkpoint(tmp_path / "two", state)
    with pytest.raises(drift_fast.DriftError, match="same model was given twice"):
        drift_fast.compute_delta(one, two, out=tmp_path / "delta")
    with pytest.warns(drift_fast.DriftWarning, match="zero"):
        lazy = drift_fast.compute_delta(one, two)
    with pytest.raises(drift_fast.DriftError, match="same checkpoint"):
        drift_fast.Injection(model, lazy)


def test_a_delta_with_nan_is_refused_by_name(tmp_path: Path, model: Backbone) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = write_checkpoint(tmp_path / "base", state)
    state = {name: tensor * 1.5 for name, tensor in state.items()}
    state[VICTIM][0, 0] = math.nan
    expert = write_checkpoint(tmp_path / "expert", state)
    delta = drift_fast.compute_delta(expert, base, dtype="float32", allow_nonfinite=True)
    with pytest.raises(drift_fast.NonFiniteError, match=re.escape(VICTIM)):
        drift_fast.Injection(model, delta)
    drift_fast.Injection(model, delta, modules="attn").remove()
