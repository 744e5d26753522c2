"""Planned motion: after each of the first n optimizer steps, W += (λ/n)·Δ.

Owns: where the weights end, against float64; that it is a sum of increments beside the optimizer's
own motion; 16-bit weights; resuming; and that a motion which does not happen fails the run.
"""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import drift_fast
from drift_fast.inject.motion.motion import PlannedMotion
from support import reference
from support.injection_models import (
    ARITHMETIC,
    Backbone,
    arithmetic,
    delta_towards,
    regression_batch,
    regression_loss,
    weights_of,
)
from support.motion_workers import Fixed

LAMBDAS = {"attn": 0.8, "mlp": 1.25}
STEPS = 40


def run(
    model: nn.Module,
    steps: int,
    *,
    motion: PlannedMotion | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    first: int = 0,
) -> None:
    """Train; without an optimizer, with one that does nothing."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        width = model.head.in_features  # type: ignore[union-attr]
        regression_loss(model, regression_batch(width=width, seed=step)).backward()
        optimizer.step()
        if motion is not None:
            motion.step()


def idle(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


def progress_of(
    model: nn.Module, start: dict[str, torch.Tensor], delta: drift_fast.Delta
) -> dict[str, float]:
    _, each = reference.progress(weights_of(model), start, dict(delta))
    return each


def planned(name: str, lambdas: dict[str, float] = LAMBDAS) -> float:
    return lambdas["attn" if "self_attn" in name else "mlp"]


# --- where the weights end ------------------------------------------------------------------------


@ARITHMETIC
@pytest.mark.parametrize("schedule", [None, "linear", "cosine * warmup(5)"])
def test_float32_weights_end_at_the_plan(
    model: Backbone, delta: drift_fast.Delta, kind: str, schedule: str | None
) -> None:
    start = weights_of(model)
    with arithmetic(kind):
        motion = PlannedMotion(
            model, delta, progress=LAMBDAS, steps=STEPS, schedule=schedule, residency="device"
        )
    run(model, STEPS + 5, motion=motion)
    assert motion.finished
    for name, found in progress_of(model, start, delta).items():
        assert found == pytest.approx(planned(name), abs=1e-5), name
    for name, tensor in weights_of(model).items():
        # All of the way is made, and nothing across it.
        moved = planned(name) * delta[name] if name in delta else 0.0
        torch.testing.assert_close(tensor, start[name] + moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize("residency", ["host", "disk", "device-int8", "host-int8"])
def test_every_residency_ends_at_the_plan(tmp_path: Path, residency: str) -> None:
    # Wide enough that Δ is not kept beside the weights for being small.
    model = Backbone(layers=1, width=192, inner=256)
    delta = delta_towards(tmp_path, model)
    start = weights_of(model)
    motion = PlannedMotion(model, delta, progress=0.5, steps=4, residency=residency)
    run(model, 4, motion=motion)
    if residency == "disk":
        assert motion.residency == "disk"
    tolerance = 1e-3 if "int8" in residency else 1e-5
    for name, found in progress_of(model, start, delta).items():
        assert found == pytest.approx(0.5, abs=tolerance), name


def test_each_step_moves_by_its_share(model: Backbone, delta: drift_fast.Delta) -> None:
    motion = PlannedMotion(model, delta, progress=0.6, steps=3, schedule="linear")
    # Factors 1, 2/3, 1/3.
    for expected in (0.3, 0.5, 0.6, 0.6):
        run(model, 1, motion=motion)
        found = motion.metrics()
        assert found["progress"] == pytest.approx(expected, abs=1e-5)
        assert found["planned"] == pytest.approx(expected, abs=1e-9)


def test_metrics_tell_module_kinds_apart(model: Backbone, delta: drift_fast.Delta) -> None:
    motion = PlannedMotion(model, delta, progress=LAMBDAS, steps=4)
    run(model, 2, motion=motion)
    found = motion.metrics()
    for kind, value in LAMBDAS.items():
        assert found[f"planned/{kind}"] == pytest.approx(value / 2, abs=1e-9)
        assert found[f"progress/{kind}"] == pytest.approx(value / 2, abs=1e-5)
    assert {f"progress/{name}" for name in motion.targets} <= found.keys()
    assert found["steps"] == 2
    assert all(isinstance(value, float) for value in found.values())


def test_what_is_not_selected_stays(model: Backbone, delta: drift_fast.Delta) -> None:
    start = weights_of(model)
    motion = PlannedMotion(model, delta, progress=1.0, steps=2, modules="attn", layers=1)
    run(model, 2, motion=motion)
    for name, tensor in weights_of(model).items():
        chosen = "layers.1.self_attn" in name
        assert torch.equal(tensor, start[name]) != chosen, name
    assert len(motion.targets) == 7


def test_a_negative_plan_moves_away_and_a_plan_of_zero_changes_no_bit(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    start = weights_of(model)
    motion = PlannedMotion(model, delta, progress={"attn": -0.5, "mlp": 0.0}, steps=3)
    run(model, 3, motion=motion)
    for name, found in progress_of(model, start, delta).items():
        assert found == pytest.approx(-0.5 if "self_attn" in name else 0.0, abs=1e-5), name
        if "mlp" in name:
            assert torch.equal(model.get_parameter(name), start[name])


def test_the_motion_adds_to_what_the_optimizer_does(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    # With a gradient that does not depend on the weights, what the optimizer does is known.
    def trained(motion: bool) -> tuple[nn.Module, Any]:
        own = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2, weight_decay=0.0)
        if motion:
            PlannedMotion(own, delta, progress=LAMBDAS, steps=10, optimizer=optimizer)
        for _ in range(15):
            optimizer.zero_grad()
            torch.stack([(p * p.detach().sign()).sum() for p in own.parameters()]).sum()
            for at, parameter in enumerate(own.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (at - 10))
            nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
        return own, optimizer

    (plain, plain_optimizer), (moved, optimizer) = trained(False), trained(True)
    for name, tensor in weights_of(moved).items():
        expected = weights_of(plain)[name]
        if name in delta:
            expected = expected + planned(name) * delta[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    for left, right in zip(
        optimizer.state_dict()["state"].values(),
        plain_optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_weights_that_are_not_contiguous_are_moved(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach().t().contiguous().t())
    assert not projection.weight.is_contiguous()
    start = weights_of(model)
    run(model, 4, motion=PlannedMotion(model, delta, progress=0.5, steps=4))
    for name, found in progress_of(model, start, delta).items():
        assert found == pytest.approx(0.5, abs=1e-5), name


# --- 16-bit weights -------------------------------------------------------------------------------


def narrow_pair(
    folder: Path, dtype: torch.dtype, *, size: float = 0.007
) -> tuple[Backbone, drift_fast.Delta]:
    """A 16-bit model without weights near zero, and a delta of about a unit in its last place."""
    model = Backbone(width=96, inner=160)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.sign())
    model = model.to(dtype)
    return model, delta_towards(folder, model, size=size)


@ARITHMETIC
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_end_at_the_plan_where_plain_addition_does_nothing(
    tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    size = 0.007 if dtype is torch.bfloat16 else 0.0009
    model, delta = narrow_pair(tmp_path, dtype, size=size)
    naive = copy.deepcopy(model)
    start = weights_of(model)
    # One rounding of each of a bias's 96 elements does not average out to the second digit.
    matrices = r"re:proj\.weight$"
    with arithmetic(kind):
        motion = PlannedMotion(model, delta, progress=LAMBDAS, steps=STEPS, modules=matrices)
    run(model, STEPS, motion=motion)
    found = progress_of(model, start, delta)
    errors = [abs(found[name] - planned(name)) for name in motion.targets]
    assert sum(errors) / len(errors) < 0.011
    assert motion.metrics()["progress"] == pytest.approx(motion.metrics()["planned"], abs=0.005)

    with torch.no_grad():
        for _ in range(STEPS):
            for name, tensor in delta.items():
                naive.get_parameter(name).add_(tensor, alpha=planned(name) / STEPS)
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights_of(naive).items())


def test_a_16_bit_motion_ends_as_near_as_one_rounding_of_all_of_it(tmp_path: Path) -> None:
    model, delta = narrow_pair(tmp_path, torch.bfloat16)
    start = weights_of(model)
    run(model, STEPS, motion=PlannedMotion(model, delta, progress=1.0, steps=STEPS))
    errors, units = [], []
    for name, tensor in delta.items():
        exact = start[name].double() + tensor.double()
        _, exponent = torch.frexp(torch.maximum(start[name].double().abs(), exact.abs()))
        unit = torch.ldexp(torch.ones_like(exact), exponent - 8)
        errors.append((model.get_parameter(name).double() - exact).flatten())
        units.append(unit.flatten())
    relative = (torch.cat(errors).abs() / torch.cat(units)).detach()
    # A weight that crosses a power of two on its way is rounded to two units, most do not.
    assert float(relative.quantile(0.98)) <= 1.0
    assert float(relative.max()) <= 3.0
    # Random rounding of each of forty increments would leave 0.8 of a unit.
    assert float(relative.square().mean().sqrt()) < 0.5


def test_a_weight_that_is_not_finite_stays_and_zeros_move(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = Backbone().to(dtype)
        name = "model.layers.0.mlp.up_proj.weight"
        parameter = model.get_parameter(name)
        generator = torch.Generator().manual_seed(4)
        delta = Fixed({name: torch.randn(parameter.shape, generator=generator)})
        # The biases of some models are as large.
        delta[name][1:3] *= 300
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf])
        with torch.no_grad():
            parameter.zero_()
            parameter[0, :3] = odd.to(dtype)
        motion = PlannedMotion(model, delta, progress=1.0, steps=4)
        optimizer = idle(model)
        for _ in range(4):
            if motion.taken == 3:
                # What the last step compares progress with is no number here.
                motion._check_kept = lambda: None  # type: ignore[method-assign]
            optimizer.step()
            motion.step()
        torch.testing.assert_close(
            parameter[0, :3].detach(), odd.to(dtype), equal_nan=True, rtol=0, atol=0
        )
        torch.testing.assert_close(
            parameter[1:].detach().float(), delta[name][1:], rtol=2.0**-6, atol=1e-4
        )


def test_rounding_follows_the_seed_alone(tmp_path: Path) -> None:
    model, delta = narrow_pair(tmp_path, torch.bfloat16)

    def moved(seed: int) -> dict[str, torch.Tensor]:
        own = copy.deepcopy(model)
        torch.manual_seed(seed + 100)
        run(own, 3, motion=PlannedMotion(own, delta, progress=1.0, steps=3, seed=seed))
        return weights_of(own)

    first, again, other = moved(0), moved(0), moved(1)
    assert all(torch.equal(first[name], again[name]) for name in delta)
    assert not any(torch.equal(first[name], other[name]) for name in delta if "weight" in name)


def test_weights_of_two_dtypes_are_each_moved_in_their_own_way(tmp_path: Path) -> None:
    model, delta = narrow_pair(tmp_path, torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.float()
    start = weights_of(model)
    motion = PlannedMotion(model, delta, progress=LAMBDAS, steps=STEPS)
    optimizer = idle(model)
    for _ in range(STEPS):
        optimizer.step()
        motion.step()
    for name, found in progress_of(model, start, delta).items():
        exact = "mlp" in name
        assert found == pytest.approx(planned(name), abs=1e-4 if exact else 0.1), name


class WithCopies(torch.optim.Optimizer):
    """Plain descent on float32 copies, from which the parameters are written at every step."""

    def __init__(self, parameters: Any, *, lr: float = 0.0, hidden: bool = False) -> None:
        super().__init__(parameters, {"lr": lr})
        self._hidden: dict[Any, torch.Tensor] | None = {} if hidden else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "average" not in state:
                    state["average"] = torch.zeros_like(parameter, dtype=torch.float32)
                    kept = state if self._hidden is None else self._hidden.setdefault(parameter, {})
                    kept["copy"] = parameter.float().clone()
                kept = state if self._hidden is None else self._hidden[parameter]
                kept["copy"].sub_(parameter.grad.float(), alpha=group["lr"])
                parameter.copy_(kept["copy"])


@pytest.mark.parametrize("driven", [False, True], ids=["called", "by itself"])
def test_float32_copies_in_an_optimizers_state_are_moved(tmp_path: Path, driven: bool) -> None:
    model, delta = narrow_pair(tmp_path, torch.bfloat16)
    start = weights_of(model)
    optimizer = WithCopies(model.parameters())
    motion = PlannedMotion(
        model, delta, progress=0.5, steps=STEPS, optimizer=optimizer if driven else None
    )
    run(model, STEPS, motion=None if driven else motion, optimizer=optimizer)
    for name, tensor in delta.items():
        copied = optimizer.state[model.get_parameter(name)]["copy"]
        # The sum of increments in float32, and the parameter its rounding.
        torch.testing.assert_close(copied, start[name].float() + 0.5 * tensor, rtol=0, atol=1e-6)
        assert torch.equal(model.get_parameter(name).detach(), copied.bfloat16())
    assert motion.metrics()["progress"] == pytest.approx(0.5, abs=1e-4)


def test_moments_of_zeros_are_not_taken_for_copies_of_zeros(tmp_path: Path) -> None:
    model, delta = narrow_pair(tmp_path, torch.bfloat16)
    with torch.no_grad():
        for name in delta:
            model.get_parameter(name).zero_()
    start = weights_of(model)
    optimizer = idle(model)
    for parameter in model.parameters():
        optimizer.state[parameter]["average"] = torch.zeros_like(parameter, dtype=torch.float32)
    motion = PlannedMotion(model, delta, progress=0.5, steps=3, optimizer=optimizer)
    for _ in range(3):
        optimizer.step()
    assert not any(state["average"].any() for state in optimizer.state.values())
    assert motion.finished
    found, _ = reference.progress(weights_of(model), start, dict(delta))
    assert found == pytest.approx(0.5, abs=1e-2)


def test_an_optimizer_that_undoes_the_motion_is_noticed(tmp_path: Path) -> None:
    model, delta = narrow_pair(tmp_path, torch.bfloat16)
    optimizer = WithCopies(model.parameters(), hidden=True)
    motion = PlannedMotion(model, delta, progress=0.5, steps=5, optimizer=optimizer)
    run(model, 4, optimizer=optimizer)
    with pytest.warns(drift_fast.DriftWarning, match="after 4 of 5 steps .* copy of its own"):
        run(model, 1, optimizer=optimizer)
    assert motion.finished


# --- saving and resuming --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    whole, delta = narrow_pair(tmp_path, dtype)
    options: dict[str, Any] = {"progress": LAMBDAS, "steps": 10, "schedule": "cosine", "seed": 3}
    parts = copy.deepcopy(whole)
    motion = PlannedMotion(whole, delta, **options)
    run(whole, 12, motion=motion, optimizer=torch.optim.SGD(whole.parameters(), lr=1e-2))

    first = PlannedMotion(parts, delta, **options)
    run(parts, 4, motion=first, optimizer=torch.optim.SGD(parts.parameters(), lr=1e-2))
    state = json.loads(json.dumps(first.state_dict()))
    first.remove()
    resumed = copy.deepcopy(parts)
    second = PlannedMotion(resumed, delta, **options)
    second.load_state_dict(state)
    assert second.taken == 4
    optimizer = torch.optim.SGD(resumed.parameters(), lr=1e-2)
    run(resumed, 8, motion=second, optimizer=optimizer, first=4)
    assert second.finished
    for name, tensor in weights_of(resumed).items():
        assert torch.equal(tensor, whole.get_parameter(name)), name
    # θ_0 is that of the first run.
    assert second.metrics() == pytest.approx(motion.metrics(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(version=2), "version"),
        (lambda state: state.pop("taken"), "taken"),
        (lambda state: state.update(taken=True), "taken"),
        (lambda state: state.update(taken=11), "at most 10"),
        (lambda state: state.update(taken=3), "another share"),
        (lambda state: state["plan"].update(steps=12), "steps = 12"),
        (lambda state: state["plan"].update(progress=0.5), "progress = 0.5"),
        (lambda state: state["plan"].update(seed=5), "seed = 5"),
        (lambda state: state["plan"].update(schedule="cosine(0.0)"), "schedule"),
        (lambda state: state["origin"].popitem(), "differ in 1 targets"),
        (lambda state: state["origin"].update({"other": 1.0}), "differ in 1 targets"),
        (lambda state: state.update(origin=[1.0]), "origin"),
        (
            lambda state: state["origin"].update(dict.fromkeys(state["origin"], float("nan"))),
            "origin",
        ),
        (lambda state: state.clear(), "version"),
    ],
)
def test_a_state_that_is_damaged_or_of_another_plan_is_refused_and_changes_nothing(
    model: Backbone, delta: drift_fast.Delta, change: Callable[[Any], Any], message: str
) -> None:
    motion = PlannedMotion(model, delta, progress=0.7, steps=10)
    run(model, 2, motion=motion)
    state = json.loads(json.dumps(motion.state_dict()))
    change(state)
    before = motion.metrics()
    with pytest.raises(drift_fast.DriftError, match=message):
        motion.load_state_dict(state)
    assert motion.metrics() == before


def test_what_is_no_state_is_refused(model: Backbone, delta: drift_fast.Delta) -> None:
    motion = PlannedMotion(model, delta, progress=0.7, steps=10)
    with pytest.raises(drift_fast.DriftError, match="expected a motion's state"):
        motion.load_state_dict([1])  # type: ignore[arg-type]


# --- when a step is due ---------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_leaves_out_does_not_count(
    model: Backbone, delta: drift_fast.Delta, fused: bool
) -> None:
    start = weights_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    motion = PlannedMotion(model, delta, progress=0.5, steps=3, optimizer=optimizer)
    taken = []
    for step in range(6):
        optimizer.zero_grad()
        loss = regression_loss(model, regression_batch(seed=step))
        scaler.scale(loss).backward()
        if step in (0, 2):
            model.head.weight.grad.fill_(torch.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        taken.append(motion.taken)
    assert taken == [0, 1, 1, 2, 3, 3]
    for name, found in progress_of(model, start, delta).items():
        assert found == pytest.approx(0.5, abs=1e-5), name


@pytest.mark.parametrize("driven", [False, True], ids=["called", "by itself"])
def test_accumulated_micro_batches_count_once(
    model: Backbone, delta: drift_fast.Delta, driven: bool
) -> None:
    accelerate = pytest.importorskip("accelerate")
    # What an earlier run in this process set holds for all later ones otherwise.
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, optimizer = accelerator.prepare(model, idle(model))
    motion = PlannedMotion(
        wrapped, delta, progress=0.5, steps=3, optimizer=optimizer if driven else None
    )
    for step in range(6):
        with accelerator.accumulate(wrapped):
            accelerator.backward(regression_loss(wrapped, regression_batch(seed=step)))
            optimizer.step()
            optimizer.zero_grad()
            if not driven and accelerator.sync_gradients:
                motion.step()
        assert motion.taken == (step + 1) // 2


def test_a_motion_that_is_never_called_fails_the_second_step(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    PlannedMotion(model, delta, progress=0.5, steps=3)
    run(model, 1)
    optimizer = idle(model)
    run(model, 1, optimizer=optimizer)
    with pytest.raises(drift_fast.DriftError, match=r"not moved after its last step.*motion\.step"):
        run(model, 1, optimizer=optimizer)


def test_a_motion_that_follows_another_optimizer_fails_the_run(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    PlannedMotion(model, delta, progress=0.5, steps=3, optimizer=idle(model))
    optimizer = torch.optim.AdamW(model.parameters())
    run(model, 1, optimizer=optimizer)
    with pytest.raises(drift_fast.DriftError, match="not the SGD that was given"):
        run(model, 1, optimizer=optimizer)


def test_a_second_call_without_an_optimizer_step_between_is_refused(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    motion = PlannedMotion(model, delta, progress=0.5, steps=3)
    with pytest.raises(drift_fast.DriftError, match="no optimizer that holds the targets"):
        motion.step()
    run(model, 1, motion=motion)
    with pytest.raises(drift_fast.DriftError, match="since the last call"):
        motion.step()
    assert motion.taken == 1


def test_an_optimizer_of_other_parameters_is_no_step(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    motion = PlannedMotion(model, delta, progress=0.5, steps=3)
    other = torch.optim.SGD(model.head.parameters(), lr=0.0)
    for _ in range(3):
        run(model, 1, optimizer=other)
    with pytest.raises(drift_fast.DriftError, match="no optimizer that holds the targets"):
        motion.step()


def test_two_optimizers_that_share_the_targets_need_one_call(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    motion = PlannedMotion(model, delta, progress=0.5, steps=3)
    halves = [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in model.model.layers]
    for _ in range(4):
        regression_loss(model, regression_batch()).backward()
        for optimizer in halves:
            optimizer.step()
        motion.step()
    assert motion.finished


class Around(torch.optim.Optimizer):
    """An optimizer that steps another, and is one itself."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self._inner = inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._inner.step()


@pytest.mark.parametrize("which", ["inner", "outer", "neither"])
def test_an_optimizer_around_another_is_one_step(
    model: Backbone, delta: drift_fast.Delta, which: str
) -> None:
    inner = idle(model)
    outer = Around(inner)
    given = {"inner": inner, "outer": outer, "neither": None}[which]
    motion = PlannedMotion(model, delta, progress=0.5, steps=4, optimizer=given)
    for step in range(6):
        run(model, 1, motion=None if given else motion, optimizer=outer)
        assert motion.taken == min(4, step + 1)


def test_a_motion_that_moves_by_itself_refuses_calls(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    motion = PlannedMotion(model, delta, progress=0.5, steps=3, optimizer=idle(model))
    with pytest.raises(drift_fast.DriftError, match=r"leave step\(\) out"):
        motion.step()


def test_after_its_end_and_after_removal_training_is_plain(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    optimizer = idle(model)
    motion = PlannedMotion(model, delta, progress=0.5, steps=1, optimizer=optimizer)
    run(model, 1, optimizer=optimizer)
    moved = weights_of(model)
    run(model, 3, optimizer=optimizer)
    motion.remove()
    motion.remove()
    with PlannedMotion(model, delta, progress=0.5, steps=5):
        pass
    run(model, 3, optimizer=optimizer)
    assert all(torch.equal(tensor, moved[name]) for name, tensor in weights_of(model).items())
    for call in (motion.step, motion.metrics, motion.state_dict):
        with pytest.raises(drift_fast.DriftError, match="removed"):
            call()


# --- refusals -------------------------------------------------------------------------------------


def test_a_second_attachment_is_refused(model: Backbone, delta: drift_fast.Delta) -> None:
    with PlannedMotion(model, delta, progress=0.5, steps=3):
        with pytest.raises(drift_fast.DriftError, match="already"):
            PlannedMotion(model, delta, progress=0.5, steps=3, modules="attn")
        with pytest.raises(drift_fast.DriftError, match="already"):
            drift_fast.Injection(model, delta)
    with (
        drift_fast.Injection(model, delta, modules="mlp"),
        PlannedMotion(model, delta, progress=0.5, steps=3, modules="attn"),
        pytest.raises(drift_fast.DriftError, match="already"),
    ):
        PlannedMotion(model, delta, progress=0.5, steps=3, modules="mlp")


def test_a_motion_lives_as_long_as_its_model_until_it_is_finished(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    before, optimizer = weights_of(model), idle(model)
    gc.collect()
    hooks = len(_global_optimizer_post_hooks)
    PlannedMotion(model, delta, progress=0.5, steps=3, optimizer=optimizer)
    gc.collect()
    run(model, 2, optimizer=optimizer)
    with pytest.raises(drift_fast.DriftError, match="has a planned motion attached already"):
        drift_fast.Injection(model, delta)
    run(model, 1, optimizer=optimizer)
    moved = progress_of(model, before, delta)
    assert moved == pytest.approx(dict.fromkeys(moved, 0.5), rel=1e-4)
    gc.collect()
    assert len(_global_optimizer_post_hooks) == hooks
    with drift_fast.Injection(model, delta):
        pass


def test_a_motion_that_was_dropped_is_freed_with_its_model(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    PlannedMotion(model, delta, progress=0.5, steps=3, optimizer=idle(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"steps": 1.5}, "steps must be"),
        ({"steps": True}, "steps must be"),
        ({"progress": float("nan")}, "progress must be a finite number"),
        ({"progress": "much"}, "progress must be a finite number"),
        ({"progress": {"attn": 0.5}}, "progress has no entry for"),
        ({"progress": {"all": 0.5, "embed": 1.0}}, "decides no target"),
        ({"progress": {"attention": 0.5}}, "unknown module preset"),
        ({"schedule": "window(3, 7)"}, "never negative and not always zero"),
        ({"schedule": "linear(-2.0)"}, "never negative and not always zero"),
        ({"schedule": "sine"}, "is not a schedule"),
        ({"seed": -1}, "seed must be"),
        ({"residency": "moon"}, "residency must be"),
        ({"min_coverage": 2.0}, "min_coverage"),
        ({"modules": "atn"}, "unknown module preset"),
        ({"optimizer": "sgd"}, "expected a torch optimizer"),
    ],
)
def test_arguments_without_meaning_are_refused(
    model: Backbone, delta: drift_fast.Delta, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PlannedMotion(model, delta, **{"progress": 0.5, "steps": 3, **options})
    # A refusal leaves nothing attached.
    PlannedMotion(model, delta, progress=0.5, steps=3).remove()


def test_what_cannot_be_moved_is_refused(
    tmp_path: Path, model: Backbone, delta: drift_fast.Delta
) -> None:
    with pytest.raises(TypeError, match="Delta, or the directory"):
        PlannedMotion(model, 3, progress=0.5, steps=3)  # type: ignore[arg-type]
    with pytest.raises(drift_fast.CoverageError):
        PlannedMotion(Backbone(width=7), delta, progress=0.5, steps=3)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(drift_fast.DriftError, match="not in the optimizer"):
        PlannedMotion(model, delta, progress=0.5, steps=3, optimizer=optimizer)
    victim = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(victim).requires_grad_(False)
    with pytest.raises(drift_fast.DriftError, match=f"(?s){victim}.*unfreeze"):
        PlannedMotion(model, delta, progress=0.5, steps=3)
    model.get_parameter(victim).requires_grad_(True)
    PlannedMotion(model, delta, progress=0.5, steps=3).remove()


def test_a_delta_that_is_not_finite_is_refused(model: Backbone) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    delta = Fixed({name: torch.full_like(model.get_parameter(name), torch.nan)})
    with pytest.raises(drift_fast.NonFiniteError, match=name):
        PlannedMotion(model, delta, progress=0.5, steps=3)


def test_a_model_with_adapters_is_refused_with_a_remedy(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from support.injection_models import tiny_qwen2

    model: Any = tiny_qwen2()
    delta = delta_towards(tmp_path, model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(drift_fast.DriftError, match=r"through an adapter .* merge"):
        PlannedMotion(adapted, delta, progress=0.5, steps=3)


# --- sharded --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from support.joined import Joined, launch
    from support.motion_workers import backbone, fsdp2

    folder = tmp_path_factory.mktemp("sharded")
    delta = folder / "delta"
    # Values of bfloat16, so that the delta fits both of the models.
    delta_towards(folder / "pair", backbone(torch.bfloat16), size=0.02, out=delta)
    jobs: dict[str, Any] = {"fsdp2": (fsdp2, (str(delta), str(folder)))}
    return folder, [report["fsdp2"] for report in launch(folder / "work", jobs, Joined(2))]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(("dtype", "lr"), [(torch.float32, 0.05), (torch.bfloat16, 0.0)])
def test_two_processes_end_where_one_does(
    sharded: tuple[Path, Any], dtype: torch.dtype, lr: float
) -> None:
    from support.motion_workers import PLAN, backbone, train

    folder, reports = sharded
    label = str(dtype).removeprefix("torch.")
    model = backbone(dtype)
    plain = backbone(dtype)
    motion = PlannedMotion(model, folder / "delta", **PLAN)
    train(model, motion, lr=lr)
    train(plain, None, lr=lr)
    found = torch.load(folder / f"{label}.pt")
    for name, tensor in weights_of(model).items():
        if dtype is torch.bfloat16:
            # The same elements round the same way, wherever they lie.
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)
        if name in motion.targets:
            assert not torch.equal(tensor, plain.get_parameter(name)), name
    for report in reports:
        assert report[label] == pytest.approx(motion.metrics(), rel=1e-4, abs=1e-6)


ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-1 float32": {"zero": {"stage": 1}},
    "ZeRO-2 bf16": {
        "zero": {"stage": 2},
        "bf16": {"enabled": True},
        "gradient_accumulation_steps": 2,
    },
    "ZeRO-2 fp16": {
        "zero": {"stage": 2},
        "fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1},
    },
    "ZeRO-3 bf16": {"zero": {"stage": 3}, "bf16": {"enabled": True}},
    "stage 0 bf16": {"zero": {"stage": 0}, "bf16": {"enabled": True}},
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("deepspeed")
    from support.joined import Joined, launch
    from support.motion_workers import deepspeed

    jobs: dict[str, Any] = {name: (deepspeed, (options,)) for name, options in ENGINES.items()}
    return launch(tmp_path_factory.mktemp("engines"), jobs, Joined(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_a_deepspeed_engine_moves_its_master_weights(engines: Any, name: str) -> None:
    for report in (reports[name] for reports in engines):
        assert report["counted"]
        # A loss scale too large for float16 makes the first steps overflow.
        assert (report["left out"] > 0) == ("fp16" in name)
        assert report["steps"] == 20
        assert not report["wrapped"]
        assert report["others"]
        assert report["progress"] == pytest.approx(0.7, abs=1e-4)
        assert report["computing"] == pytest.approx(0.7, abs=0.02)
