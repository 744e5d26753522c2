"""scope="microbatch": the public code's injection into the gradient of each backward pass.

Owns: parity with the public per-micro-batch formulae, what follows from them, and where the scope
is refused. Step scope is in test_injection.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import drift_fast
from support import reference
from support.injection_models import (
    Backbone,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
    train,
    weights_of,
)

# The four things the public code can do: its absolute scale is stretched unless told otherwise.
PUBLIC_MODES = [
    pytest.param("absolute", None, id="absolute"),
    pytest.param("absolute", "weight", id="absolute stretched to the weight"),
    pytest.param("gradnorm", None, id="gradnorm"),
    pytest.param("adaptive", None, id="adaptive"),
]


def micro_batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, targets = regression_batch(8)
    return list(zip(inputs.chunk(count), targets.chunk(count), strict=True))


def plain_gradients(
    model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], share: float = 1.0
) -> dict[str, torch.Tensor]:
    """Take the gradient of one micro-batch without touching any parameter's grad or hooks."""
    twin = Backbone().to(next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict())
    (regression_loss(twin, batch) * share).backward()
    return gradients_of(twin)


def assert_close(found: torch.Tensor, expected: Any, tolerance: float, label: str) -> None:
    error = reference.norm(reference.exact(found) - reference.exact(expected))
    size = reference.norm(reference.exact(expected))
    assert error <= tolerance * size, f"{label}: {error / size:.2e} of its norm"


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("scale", "rescale"), PUBLIC_MODES)
def test_each_backward_pass_gets_the_public_formula(
    tmp_path: Path, scale: str, rescale: str | None, count: int, alpha: float
) -> None:
    model = Backbone()
    start = weights_of(model)
    delta = delta_towards(tmp_path, model)
    injection = drift_fast.Injection(
        model, delta, alpha=alpha, scale=scale, scope="microbatch", rescale=rescale
    )
    expected: dict[str, Any] = dict.fromkeys(start, 0.0)
    for batch in micro_batches(count):
        own = plain_gradients(model, batch, 1 / count)
        for name, gradient in own.items():
            pushed: Any = reference.exact(gradient)
            if name in delta:
                weight = start[name] if rescale else None
                pushed = reference.public_inject(
                    gradient, delta[name], alpha=alpha, scale=scale, weight=weight
                )
            expected[name] = expected[name] + pushed
        (regression_loss(model, batch) / count).backward()
        # After every pass, not only the last: each micro-batch was pushed by its own numbers.
        for name, found in gradients_of(model).items():
            assert_close(found, expected[name], 2e-6, name)
    injection.remove()


@pytest.mark.parametrize(("scale", "rescale"), PUBLIC_MODES)
def test_bfloat16_gradients_get_the_public_formula_within_their_rounding(
    tmp_path: Path, scale: str, rescale: str | None
) -> None:
    model = Backbone().to(torch.bfloat16)
    start = weights_of(model)
    delta = delta_towards(tmp_path, model, dtype="bfloat16")
    (batch,) = micro_batches(1)
    plain = plain_gradients(model, batch)
    drift_fast.Injection(model, delta, alpha=0.8, scale=scale, scope="microbatch", rescale=rescale)
    regression_loss(model, batch).backward()
    for name, found in gradients_of(model).items():
        if name not in delta:
            assert torch.equal(found, plain[name])
            continue
        weight = start[name] if rescale else None
        expected = reference.public_inject(
            plain[name], delta[name], alpha=0.8, scale=scale, weight=weight
        )
        pushed = np.abs(expected - reference.exact(plain[name]))
        allowed = 1.01 * 2.0**-8 * (np.abs(expected) + pushed) + 1e-5 * pushed
        assert np.all(np.abs(reference.exact(found) - expected) <= allowed), name


@pytest.mark.parametrize("scale", ["gradnorm", "adaptive"])
def test_the_push_depends_on_the_number_of_micro_batches_as_in_the_public_code(
    tmp_path: Path, scale: str
) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    injected = []
    for count in (1, 8):
        model.zero_grad()
        with drift_fast.Injection(model, delta, scale=scale, scope="microbatch"):
            for batch in micro_batches(count):
                (regression_loss(model, batch) / count).backward()
        injected.append(gradients_of(model))
    for name in delta:
        difference = (injected[0][name] - injected[1][name]).norm()
        assert difference > 0.05 * injected[0][name].norm(), name


def test_one_micro_batch_equals_step_scope(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    regression_loss(model, regression_batch()).backward()
    with drift_fast.Injection(model, delta) as injection:
        injection.step()
    by_step = gradients_of(model)
    model.zero_grad()
    with drift_fast.Injection(model, delta, scope="microbatch"):
        regression_loss(model, regression_batch()).backward()
    for name, found in gradients_of(model).items():
        assert_close(found, by_step[name], 2e-6, name)


def test_a_parameter_used_twice_in_a_pass_is_injected_once(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)

    def backward() -> None:
        inputs, targets = regression_batch()
        torch.nn.functional.mse_loss(model(model.model.layers[0](inputs)), targets).backward()

    backward()
    plain = gradients_of(model)
    model.zero_grad()
    with drift_fast.Injection(model, delta, scale="gradnorm", scope="microbatch"):
        backward()
    for name in delta:
        found = model.get_parameter(name).grad
        assert found is not None
        expected = reference.public_inject(plain[name], delta[name], alpha=1, scale="gradnorm")
        assert_close(found, expected, 5e-6, name)


def test_calling_step_does_not_inject_a_second_time(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    injection = drift_fast.Injection(model, delta, scope="microbatch")
    regression_loss(model, regression_batch()).backward()
    once = gradients_of(model)
    with contextlib.suppress(drift_fast.DriftError):
        injection.step()
    for name, found in gradients_of(model).items():
        assert torch.equal(found, once[name])


def test_the_watchdog_is_quiet_when_backward_injected(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with drift_fast.Injection(model, delta, scope="microbatch", optimizer=optimizer) as injection:
        train(model, 3, optimizer=optimizer)
        assert (injection.injected, injection.skipped) == (len(delta), 0)


def test_a_gradient_that_is_not_finite_is_left_alone_and_counted(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    victim = "model.layers.0.mlp.up_proj.weight"
    # Registered first, so it runs first: the injection sees a gradient that overflowed.
    model.get_parameter(victim).register_hook(lambda gradient: gradient * math.inf)
    injection = drift_fast.Injection(model, delta, scope="microbatch")
    regression_loss(model, regression_batch()).backward()
    assert not gradients_of(model)[victim].isfinite().any()
    assert all(g.isfinite().all() for n, g in gradients_of(model).items() if n != victim)
    assert (injection.injected, injection.skipped) == (19, 1)


def test_the_count_is_of_parameters_however_many_passes_and_outlives_the_step(
    tmp_path: Path,
) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    injection = drift_fast.Injection(model, delta, scope="microbatch")
    for _ in range(2):
        for batch in micro_batches(4):
            regression_loss(model, batch).backward()
        assert injection.injected == len(delta)
        optimizer.step()
        assert injection.injected == len(delta)


@pytest.mark.parametrize("scale", reference.SCALES)
def test_scaled_gradients_get_the_scaled_push(tmp_path: Path, scale: str) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    (batch,) = micro_batches(1)
    plain = plain_gradients(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    drift_fast.Injection(
        model, delta, scale=scale, scope="microbatch", optimizer=optimizer, scaler=scaler
    )
    scaler.scale(regression_loss(model, batch)).backward()
    scaler.unscale_(optimizer)
    for name, found in gradients_of(model).items():
        if name in delta:
            expected = reference.public_inject(plain[name], delta[name], alpha=1, scale=scale)
            assert_close(found, expected, 1e-5, name)


def test_a_state_counts_the_step_that_was_just_made(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    # Two optimizers that step after one backward pass are one step.
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.ndim == ndim], lr=1e-3)
        for ndim in (1, 2)
    ]
    options: dict[str, Any] = {"scope": "microbatch", "schedule": "linear", "total_steps": 4}
    injection = drift_fast.Injection(model, delta, **options)
    for taken in (1, 2):
        model.zero_grad()
        for batch in micro_batches(2):
            regression_loss(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert injection.steps == taken
    state = injection.state_dict()
    assert state["control"]["step"] == 2
    in_force = []
    for again in (False, True):
        if again:
            injection.remove()
            injection = drift_fast.Injection(model, delta, **options)
            injection.load_state_dict(state)
        model.zero_grad()
        regression_loss(model, regression_batch()).backward()
        in_force.append(injection.metrics()["alpha"])
    assert in_force[0] == in_force[1] < 1.0


def test_training_moves_towards_the_expert(tmp_path: Path) -> None:
    moved = []
    for alpha in (1.0, -1.0):
        model = Backbone()
        delta = delta_towards(tmp_path / f"{alpha}", model)
        start = weights_of(model)
        with drift_fast.Injection(
            model, delta, alpha=alpha, scale="gradnorm", scope="microbatch"
        ) as injection:
            train(model, 10, clip=None)
            reported = injection.metrics()["progress"]
        moved.append(reference.progress(weights_of(model), start, delta)[0])
        assert reported == pytest.approx(moved[-1], rel=1e-3)
    assert moved[0] > 0.05
    assert moved[1] < -0.05


def test_removal_takes_the_hooks_off(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    regression_loss(model, regression_batch()).backward()
    plain = gradients_of(model)
    injection = drift_fast.Injection(model, delta, scope="microbatch")
    model.zero_grad()
    regression_loss(model, regression_batch()).backward()
    assert all(not torch.equal(gradients_of(model)[name], plain[name]) for name in delta)
    injection.remove()
    model.zero_grad()
    regression_loss(model, regression_batch()).backward()
    for name, found in gradients_of(model).items():
        assert torch.equal(found, plain[name])


# --- where a hook on backward cannot work -----------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this one process, over gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def assert_refused(model: torch.nn.Module, delta: drift_fast.Delta, kind: str) -> None:
    with pytest.raises(drift_fast.DriftError, match=kind) as caught:
        drift_fast.Injection(model, delta, scope="microbatch")
    # The remedy.
    assert "one device" in str(caught.value)


def test_parameters_that_are_dtensors_are_refused_by_name(tmp_path: Path, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = Backbone()
    delta = delta_towards(tmp_path, model)
    projection = model.model.layers[0].mlp.up_proj
    sharded = distribute_tensor(projection.weight.detach(), mesh, [Shard(0)])
    projection.weight = torch.nn.Parameter(sharded)
    assert_refused(model, delta, r"model\.layers\.0\.mlp\.up_proj\.weight is sharded \(a DTensor")


def test_a_fully_sharded_model_is_refused(tmp_path: Path, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Backbone()
    delta = delta_towards(tmp_path, model)
    fully_shard(model, mesh=mesh)
    assert_refused(model, delta, "DTensor")


@pytest.mark.usefixtures("mesh")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_model_under_the_first_fsdp_is_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = Backbone()
    delta = delta_towards(tmp_path, model)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert_refused(wrapped, delta, "FSDP1")


class Tiled(torch.autograd.Function):
    """A layer that runs tile by tile, forward and backward, as Liger's and DeepSpeed's do."""

    @staticmethod
    def forward(ctx: Any, layer: Any, hidden: torch.Tensor, tiles: int) -> torch.Tensor:
        ctx.layer, ctx.tiles = layer, tiles
        ctx.save_for_backward(hidden)
        with torch.no_grad():
            return torch.cat([layer(part) for part in hidden.chunk(tiles)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        parts = [part.detach().requires_grad_() for part in hidden.chunk(ctx.tiles)]
        for part, gradient in zip(parts, gradients[0].chunk(ctx.tiles), strict=True):
            with torch.enable_grad():
                found = ctx.layer(part)
            torch.autograd.backward(found, gradient)
        return None, torch.cat([part.grad for part in parts]), None


def tiled(model: Backbone, tiles: int) -> Backbone:
    for layer in model.model.layers:
        plain = layer.mlp.forward
        layer.mlp.forward = lambda hidden, plain=plain: Tiled.apply(plain, hidden, tiles)  # type: ignore[no-untyped-call]
    return model


def test_a_gradient_that_comes_in_tiles_is_refused(tmp_path: Path) -> None:
    delta = delta_towards(tmp_path, Backbone())
    model = tiled(Backbone(), 2)
    injection = drift_fast.Injection(model, delta, scope="microbatch")
    with pytest.raises(drift_fast.DriftError, match="comes in parts within one backward pass"):
        regression_loss(model, regression_batch()).backward()
    injection.remove()
    # The remedy, followed.
    model.zero_grad()
    injection = drift_fast.Injection(model, delta, scale="gradnorm")
    regression_loss(model, regression_batch()).backward()
    injection.step()
    plain = plain_gradients(model, regression_batch())
    for name in delta:
        expected = reference.inject(plain[name], delta[name], alpha=1.0, scale="gradnorm")
        assert_close(gradients_of(model)[name], expected, 1e-5, name)


def test_a_layer_that_runs_as_one_tile_is_injected_once_in_each_micro_batch(tmp_path: Path) -> None:
    delta = delta_towards(tmp_path, Backbone())
    model = tiled(Backbone(), 1)
    drift_fast.Injection(model, delta, scale="gradnorm", scope="microbatch")
    plain = [plain_gradients(model, batch) for batch in micro_batches(3)]
    for batch in micro_batches(3):
        regression_loss(model, batch).backward()
    for name, change in delta.items():
        options: dict[str, Any] = {"alpha": 1.0, "scale": "gradnorm"}
        expected = sum(reference.public_inject(each[name], change, **options) for each in plain)
        assert_close(gradients_of(model)[name], expected, 1e-5, name)
