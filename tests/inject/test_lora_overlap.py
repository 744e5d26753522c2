"""LoRA with overlap=True: Δ̃ is computed beside backward, from the factors that the step sees.

Owns: that a step's result is what it is without overlap, bit for bit, and when Δ̃ is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import drift_fast
from drift_fast.inject.compute.cuda_graphs import CudaGraphs, Launch
from drift_fast.inject.lora.exchange import Run
from support.injection_models import (
    ARITHMETIC,
    ATTENTION,
    MLP,
    Backbone,
    arithmetic,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
    with_experts,
)

peft = pytest.importorskip("peft")

WIDTH, INNER = 64, 600
ALL = [*ATTENTION, *MLP]
Build = Callable[[], nn.Module]


def adapted(model: nn.Module, **options: Any) -> Any:
    options = {"r": 3, "target_modules": ALL, "init_lora_weights": False} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return peft.get_peft_model(model, peft.LoraConfig(**options))


def plain() -> nn.Module:
    return Backbone(width=WIDTH, inner=INNER)


MODELS: dict[str, Build] = {
    "LoRA": lambda: adapted(plain()),
    "DoRA": lambda: adapted(plain(), use_dora=True),
    "beside copies": lambda: adapted(plain(), target_modules=ATTENTION, modules_to_save=["mlp"]),
    "experts": lambda: adapted(
        with_experts(Backbone()),
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    ),
}


@pytest.fixture
def delta(tmp_path: Path) -> drift_fast.Delta:
    streamed = delta_towards(tmp_path, plain(), dtype="bfloat16", modules=("attn", "mlp"))
    return streamed.save(tmp_path / "delta")


@pytest.fixture
def pulls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many targets each run of the tests pulled back ahead of a step."""
    found: list[int] = []
    real = Run.pull_back

    def counted(self: Run, *args: Any) -> None:
        found.append(len(self.targets))
        real(self, *args)

    monkeypatch.setattr(Run, "pull_back", counted)
    return found


def backward(model: nn.Module, seed: int) -> None:
    width = next(m for m in model.modules() if hasattr(m, "in_features")).in_features
    regression_loss(model, regression_batch(width=width, seed=seed)).backward()


def trained(
    build: Build,
    delta: drift_fast.Delta,
    *,
    between: Callable[[nn.Module], None] = lambda model: None,
    **options: Any,
) -> list[dict[str, torch.Tensor]]:
    """Return the injected gradients of three steps; `between` runs after each backward."""
    model, found = build(), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    with drift_fast.Injection(model, delta, **options) as injection:
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            between(model)
            injection.step()
            found.append(gradients_of(model))
            optimizer.step()
    return found


def test_what_has_one_shape_lies_in_one_matrix(delta: drift_fast.Delta) -> None:
    """Hundreds of launches otherwise, of which each takes a GPU less time than the host."""
    model = adapted(plain())
    with drift_fast.Injection(model, delta, overlap=True) as injection:
        backward(model, 0)
        (group,) = injection._groups
        (run,) = group._runs  # type: ignore[attr-defined]
        pulled = [part for parts in run.pulled.values() for part in parts]
    shapes = {p.shape for p in model.parameters() if p.requires_grad}
    assert len(pulled) > 2 * len(shapes)
    assert len({part.untyped_storage().data_ptr() for part in pulled}) == len(shapes)


def assert_same(
    found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]
) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in other.items():
            assert gradient.isfinite().all()
            assert torch.equal(one[name], gradient), name


@pytest.mark.parametrize("scale", ["absolute", "adaptive"])
@pytest.mark.parametrize("of", MODELS)
@ARITHMETIC
def test_gradients_are_those_without_overlap(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pulls: list[int],
    of: str,
    scale: str,
    kind: str,
) -> None:
    """In several runs, so that none writes over what another has computed."""
    monkeypatch.setattr("drift_fast.inject.lora.group._ROOM", 400)
    source = with_experts(Backbone()) if of == "experts" else plain()
    modules: Any = "re:experts" if of == "experts" else ("attn", "mlp")
    delta = delta_towards(tmp_path, source, dtype="bfloat16", modules=modules)
    with arithmetic(kind):
        overlapped = trained(MODELS[of], delta, scale=scale, overlap=True)
        assert len(pulls) >= 3 * 2
        pulls.clear()
        after = trained(MODELS[of], delta, scale=scale)
        assert not pulls
    assert_same(overlapped, after)


@pytest.mark.parametrize("residency", ["device", "device-int8", "host", "host-int8", "disk"])
@ARITHMETIC
def test_every_residency_streams_beside_backward(
    delta: drift_fast.Delta, pulls: list[int], residency: str, kind: str
) -> None:
    options = {"residency": residency, "prefetch": 4 * WIDTH * INNER}
    with arithmetic(kind):
        overlapped = trained(MODELS["LoRA"], delta, overlap=True, **options)
        assert pulls == [14] * 3
        after = trained(MODELS["LoRA"], delta, **options)
    # Norms of other runs of targets are taken together.
    for one, other in zip(overlapped, after, strict=True):
        for name, gradient in other.items():
            assert (one[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("pauses", [False, True])
def test_it_is_computed_once_for_each_step(
    delta: drift_fast.Delta, pulls: list[int], pauses: bool
) -> None:
    found, counts = [], []
    for overlap in (True, False):
        model = MODELS["LoRA"]()
        with drift_fast.Injection(model, delta, overlap=overlap) as injection:
            for seed in range(3):
                with injection.accumulating() if pauses else contextlib.nullcontext():
                    backward(model, seed)
                counts.append(len(pulls))
            backward(model, 3)
            injection.step()
        found.append([gradients_of(model)])
    assert pulls == [14]
    # A pass in `accumulating()` is left alone, so the last one begins it.
    assert counts[:3] == ([0, 0, 0] if pauses else [1, 1, 1])
    assert_same(*found)


def write(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(1.5)


def replace(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data * 1.5


def rescale(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = 0.3  # type: ignore[operator]


@pytest.mark.parametrize("change", [write, replace, rescale])
def test_a_factor_that_changes_before_the_step_is_pulled_back_anew(
    delta: drift_fast.Delta, change: Callable[[nn.Module], None]
) -> None:
    overlapped = trained(MODELS["LoRA"], delta, between=change, overlap=True)
    assert_same(overlapped, trained(MODELS["LoRA"], delta, between=change))
    untouched = trained(MODELS["LoRA"], delta, overlap=True)
    assert any(not torch.equal(one, untouched[0][name]) for name, one in overlapped[0].items())


def write_unseen(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.mul_(1.5)


@pytest.mark.parametrize("change", [write, write_unseen, replace])
def test_a_step_that_is_given_up_leaves_nothing_behind(
    delta: drift_fast.Delta, change: Callable[[nn.Module], None]
) -> None:
    found = []
    for overlap in (True, False):
        model = MODELS["LoRA"]()
        with drift_fast.Injection(model, delta, overlap=overlap) as injection:
            backward(model, 1)
            model.zero_grad()
            change(model)
            backward(model, 2)
            injection.step()
        found.append([gradients_of(model)])
    assert_same(*found)


def test_nothing_is_computed_while_alpha_is_zero(delta: drift_fast.Delta, pulls: list[int]) -> None:
    trained(MODELS["LoRA"], delta, overlap=True, alpha=0.0)
    assert not pulls


def test_a_factor_without_a_gradient_leaves_it_to_the_step(
    delta: drift_fast.Delta, pulls: list[int]
) -> None:
    found = []
    for overlap in (True, False):
        model = MODELS["LoRA"]()
        with drift_fast.Injection(
            model, delta, overlap=overlap, missing_gradients="skip"
        ) as injection:
            # The target whose gradient would begin it.
            (first, *_) = injection._groups[0].targets[0].trained
            first.requires_grad_(False)
            backward(model, 1)
            injection.step()
        found.append([gradients_of(model)])
    assert not pulls
    assert_same(*found)


def test_an_error_beside_backward_reaches_the_caller(
    delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS["LoRA"]()
    with drift_fast.Injection(model, delta, overlap=True) as injection:
        monkeypatch.setattr(Run, "pull_back", mock.Mock(side_effect=OSError("no such disk")))

        def step() -> None:
            backward(model, 1)
            injection.step()

        with pytest.raises(OSError, match="no such disk"):
            step()


def test_what_is_computed_beside_backward_is_replayed(
    delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drift_fast.inject.target_group.may_capture", lambda device: True)
    monkeypatch.setattr("drift_fast.inject.lora.group._ROOM", 4000)

    def captured(self: CudaGraphs, launch: Launch) -> Any:
        return mock.Mock(replay=launch.capture)

    monkeypatch.setattr(CudaGraphs, "_captured", captured)
    found, counts = [], []
    for overlap in (True, False):
        model = MODELS["LoRA"]()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        with drift_fast.Injection(model, delta, overlap=overlap) as injection:
            (group,) = injection._groups
            group._graphs = CudaGraphs(torch.device("cpu"))
            some = []
            for step in range(9):
                if step == 6:
                    replace(model)
                optimizer.zero_grad(set_to_none=False)
                backward(model, step)
                injection.step()
                some.append(gradients_of(model))
                optimizer.step()
                counts.append(group._graphs.replayed)
        found.append(some)
    assert_same(*found)
    # Beside backward each run takes two graphs, and the step one.
    assert counts[5] > counts[4] > 0
    assert (counts[5] - counts[4]) % 3 == 0
    # What reads the factors is launched anew where they have moved, and replayed from there.
    assert counts[6] - counts[5] < counts[5] - counts[4] == counts[8] - counts[7]


def test_processes_that_share_nothing_may_overlap(
    delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Δ̃ does not depend on what the processes reduce; the gradient of a copy does."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    drift_fast.Injection(MODELS["LoRA"](), delta, overlap=True).remove()
    with pytest.raises(drift_fast.DriftError, match="overlap=False"):
        drift_fast.Injection(MODELS["beside copies"](), delta, overlap=True)
