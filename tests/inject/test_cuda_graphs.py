"""What is launched as one is what would have been launched kernel by kernel.

Owns: when a graph is replayed, and that it never writes where a gradient no longer is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from drift_fast.inject.compute.cuda_graphs import CudaGraphs, Launch
from support import reference
from support.injection_models import (
    ATTENTION,
    MLP,
    delta_towards,
    gradients_of,
    text_batch,
    tiny_qwen2,
)

CPU = torch.device("cpu")
on_a_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Tape:
    """In place of a graph: replays what was launched while it was captured."""

    def __init__(self, launch: Any) -> None:
        self.replay = launch


def graphs_of_tapes(monkeypatch: pytest.MonkeyPatch) -> CudaGraphs:
    monkeypatch.setattr(CudaGraphs, "_captured", lambda self, launch: Tape(launch.capture))
    return CudaGraphs(CPU)


def launched(
    graphs: CudaGraphs,
    addresses: Any,
    run: Callable[[], None] = lambda: None,
    *,
    unmoved: bool = True,
) -> None:
    graphs.launch(Launch("place", addresses, run, run, lambda: unmoved))
    graphs.capture()


def take_steps(graphs: CudaGraphs, addresses: list[Any]) -> list[int]:
    """Return how many replays there had been after each step."""
    counts = []
    for one in addresses:
        launched(graphs, one)
        counts.append(graphs.replayed)
    return counts


def test_what_was_twice_in_one_place_is_replayed_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert take_steps(graphs_of_tapes(monkeypatch), [1, 1, 1, 1]) == [0, 0, 1, 2]


def test_what_has_moved_is_launched_and_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_of_tapes(monkeypatch)
    assert take_steps(graphs, [1, 1, 1, 2, 1, 2, 2, 2]) == [0, 0, 1, 1, 2, 2, 3, 4]


def test_what_alternates_between_addresses_is_replayed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert take_steps(graphs_of_tapes(monkeypatch), [1, 2, 1, 2, 1, 2, 1]) == [0, 0, 0, 0, 1, 2, 3]


def test_no_more_graphs_are_kept_than_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_of_tapes(monkeypatch)
    take_steps(graphs, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    assert take_steps(graphs, [2, 3, 4, 5]) == [1, 2, 3, 4]
    assert take_steps(graphs, [1]) == [4]


def test_what_always_moves_is_captured_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_of_tapes(monkeypatch)
    take_steps(graphs, [at for at in range(100) for _ in range(2)])
    assert graphs.replayed == 0
    assert take_steps(graphs, [200, 200, 200]) == [0, 0, 0]


def test_what_has_moved_by_then_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_of_tapes(monkeypatch)
    for still in (True, False, False, True, True):
        launched(graphs, 1, unmoved=still)
    assert graphs.replayed == 1


def test_what_cannot_be_captured_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CudaGraphs, launch: Launch) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(CudaGraphs, "_captured", refuse)
    steps: list[int] = []
    graphs = CudaGraphs(CPU)
    for step in range(4):
        launched(graphs, 1, partial(steps.append, step))
    assert steps == [0, 1, 2, 3]


def world(tmp_path: Path) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    model = tiny_qwen2(hidden_size=256, intermediate_size=640, vocab_size=128)
    delta = delta_towards(tmp_path, model, dtype="float32", size=0.1)
    batch = {key: value.cuda() for key, value in text_batch(4, 32).items()}
    return model.cuda(), delta, batch


def replayed(injection: drift_fast.Injection) -> int:
    return sum(group._graphs.replayed for group in injection._groups)


def before_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the gradients, on the host: copies on the device would move those of later steps."""
    return {name: gradient.cpu() for name, gradient in gradients_of(model).items()}


def take_optimizer_step(model: Any) -> None:
    """Take the step that belongs between two injections; it changes nothing."""
    torch.optim.SGD(model.parameters(), lr=0.0).step()


def backward(model: Any, batch: dict[str, torch.Tensor], *, in_place: bool = True) -> None:
    """Run a pass whose gradients are where the last ones were, if `in_place`."""
    model.zero_grad(set_to_none=not in_place)
    model(**batch).loss.backward()


def check(model: Any, delta: Any, before: dict[str, torch.Tensor], alpha: float) -> None:
    for name, found in gradients_of(model).items():
        if name in delta and name in before:
            expected = reference.inject(before[name], delta[name], alpha=alpha, scale="adaptive")
            error = reference.norm(reference.exact(found) - expected)
            assert error < 1e-5 * reference.norm(expected), name


@on_a_device
def test_every_step_uses_the_strength_of_its_own(tmp_path: Path) -> None:
    model, delta, batch = world(tmp_path)
    with drift_fast.Injection(model, delta, schedule="linear", total_steps=8) as injection:
        for step in range(8):
            backward(model, batch)
            before = before_of(model)
            injection.step()
            check(model, delta, before, injection.metrics()["alpha"])
            take_optimizer_step(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.0 + 0.01 * step)
        assert replayed(injection) == 6


@on_a_device
def test_gradients_that_move_between_steps_are_the_ones_that_change(tmp_path: Path) -> None:
    model, delta, batch = world(tmp_path)
    with drift_fast.Injection(model, delta) as injection:
        for step in range(10):
            backward(model, batch)
            left = []
            if step in (4, 7):
                for parameter in model.parameters():
                    left.append(parameter.grad)
                    parameter.grad = parameter.grad.clone()
            before = before_of(model)
            kept = [gradient.clone() for gradient in left]
            injection.step()
            check(model, delta, before, 1.0)
            assert all(torch.equal(a, b) for a, b in zip(left, kept, strict=True))
            take_optimizer_step(model)
        assert replayed(injection) > 0


@on_a_device
@pytest.mark.parametrize("residency", ["device", "host", "device-int8"])
def test_gradients_at_any_address_are_right_when_overlapped(tmp_path: Path, residency: Any) -> None:
    model, delta, batch = world(tmp_path)
    options = {"residency": residency, "prefetch": "600KB", "overlap": True}
    with drift_fast.Injection(model, delta, **options) as injection:
        for _ in range(12):
            model.zero_grad()
            with injection.accumulating():
                model(**batch).loss.backward()
            before = before_of(model)
            backward(model, batch, in_place=False)
            injection.step()
            if residency != "device-int8":
                check(model, delta, before, 1.0)
            take_optimizer_step(model)


@on_a_device
def test_a_gradient_that_is_missing_now_and_then_is_left_out(tmp_path: Path) -> None:
    model, delta, batch = world(tmp_path)
    name = next(iter(delta))
    with drift_fast.Injection(model, delta, missing_gradients="skip") as injection:
        for step in range(9):
            backward(model, batch)
            gradient = model.get_parameter(name).grad
            if step % 3 == 2:
                model.get_parameter(name).grad = None
            before = before_of(model)
            injection.step()
            assert injection.skipped == (1 if step % 3 == 2 else 0)
            check(model, delta, before, 1.0)
            take_optimizer_step(model)
            model.get_parameter(name).grad = gradient
        assert replayed(injection) == 5


@on_a_device
def test_infinity_in_one_gradient_is_skipped_in_a_replayed_step(tmp_path: Path) -> None:
    model, delta, batch = world(tmp_path)
    name = next(iter(delta))
    with drift_fast.Injection(model, delta) as injection:
        for step in range(6):
            backward(model, batch)
            if step == 4:
                model.get_parameter(name).grad.view(-1)[0] = float("inf")
            injection.step()
            assert injection.skipped == (1 if step == 4 else 0)
            # Infinity stays out of the weights, which later steps need.
            model.get_parameter(name).grad.nan_to_num_(0.0, 0.0, 0.0)
            take_optimizer_step(model)
        assert replayed(injection) == 4


@on_a_device
def test_memory_of_graphs_is_given_back(tmp_path: Path) -> None:
    model, delta, batch = world(tmp_path)
    allocated = []
    for _ in range(3):
        with drift_fast.Injection(model, delta) as injection:
            for _ in range(5):
                backward(model, batch)
                injection.step()
                take_optimizer_step(model)
            assert replayed(injection) == 3
        model.zero_grad()
        del injection
        gc.collect()
        allocated.append(torch.cuda.memory_allocated())
    # The first one leaves torch the workspaces of its streams, which later ones use again.
    assert allocated[2] <= allocated[1] + (1 << 20)


@on_a_device
@pytest.mark.parametrize("rank", [0, 8])
def test_shards_change_as_they_would_launch_by_launch(
    tmp_path: Path, one_of_two: None, rank: int
) -> None:
    """Sums over processes add nothing here, so that steps can be compared to the bit."""
    from torch.distributed.fsdp import fully_shard

    model: Any = tiny_qwen2(hidden_size=256, intermediate_size=640, vocab_size=128)
    delta = delta_towards(tmp_path, model, modules=("attn", "mlp"), size=0.1)
    if rank:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=rank, target_modules=[*ATTENTION, *MLP], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    model = fully_shard(model.cuda())
    batch = {key: value.cuda() for key, value in text_batch(4, 32).items()}
    found: dict[bool, list[torch.Tensor]] = {}
    for captures in (False, True):
        with drift_fast.Injection(model, delta) as injection:
            for group in injection._groups:
                group._graphs = group._graphs if captures else None
            for _ in range(5):
                backward(model, batch)
                injection.step()
                take_optimizer_step(model)
            if captures:
                assert replayed(injection) >= 3 * 2
        weights = [p for n, p in model.named_parameters() if "proj" in n and p.grad is not None]
        found[captures] = [parameter.grad.to_local().cpu() for parameter in weights]
        model.zero_grad()
    assert found[True]
    assert all(torch.equal(*pair) for pair in zip(found[False], found[True], strict=True))


@pytest.fixture
def one_of_two() -> Iterator[None]:
    """Be the first of two processes, of which the other does not exist."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_factors_are_replayed_until_their_scaling_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("drift_fast.inject.target_group.may_capture", lambda device: True)
    base = tiny_qwen2()
    delta = delta_towards(tmp_path, base, modules=("attn", "mlp"), size=0.1)
    config = peft.LoraConfig(target_modules=[*ATTENTION, *MLP], init_lora_weights=False)
    model: Any = peft.get_peft_model(base, config)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    batch = text_batch(2, 8)

    def stepped(injection: drift_fast.Injection, scaling: float) -> dict[str, torch.Tensor]:
        for layer in layers:
            layer.scaling["default"] = scaling
        backward(model, batch)
        injection.step()
        take_optimizer_step(model)
        return gradients_of(model)

    expected = {}
    for scaling in (1.0, 0.7):
        with drift_fast.Injection(model, delta) as injection:
            expected[scaling] = stepped(injection, scaling)
    counts = []
    with drift_fast.Injection(model, delta) as injection:
        injection._groups[0]._graphs = graphs_of_tapes(monkeypatch)
        for scaling in (1.0, 1.0, 1.0, 1.0, 0.7, 0.7, 0.7):
            found = stepped(injection, scaling)
            assert all(torch.equal(found[n], one) for n, one in expected[scaling].items())
            counts.append(replayed(injection))
    assert counts == [0, 0, 1, 2, 2, 2, 3]
