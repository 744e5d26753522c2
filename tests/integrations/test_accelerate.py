"""Injection in a loop that Accelerate prepared, from Accelerator() on.

Owns: that the gradient the optimizer uses is the accumulated, unscaled one, injected, then clipped.
Sharded training under Accelerate is tested with the sharded backends.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from support import processes, reference
from support.injection_models import Backbone, delta_towards, regression_batch, regression_loss

accelerate = pytest.importorskip("accelerate")

RATE = 1e3


@pytest.fixture(autouse=True)
def _fresh_state() -> Any:
    """Accelerate keeps its precision and accumulation in process-wide singletons."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def one_epoch(
    start: torch.nn.Module,
    delta: drift_fast.Delta | None,
    *,
    micro_batches: int = 4,
    clip: float | None = None,
    options: dict[str, Any] | None = None,
    hook: bool = False,
    fused: bool | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Return the gradient that the one step of an epoch used, from how far it moved weights."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=micro_batches, **arguments
    )
    network = copy.deepcopy(start)
    before = {name: reference.exact(p) for name, p in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, fused=fused)
    inputs, targets = regression_batch(8 * micro_batches)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=8 // accelerator.num_processes
    )
    model, optimizer, data = accelerator.prepare(network, optimizer, data)
    injection = None
    if delta is not None and hook:
        injection = drift_fast.attach(optimizer, delta, model=model, **(options or {}))
    elif delta is not None:
        injection = drift_fast.Injection(
            model, delta, optimizer=optimizer, scaler=accelerator.scaler, **(options or {})
        )
    for batch in data:
        with accelerator.accumulate(model), accelerator.autocast():
            accelerator.backward(regression_loss(model, batch))
            if accelerator.sync_gradients:
                if injection is not None and not hook:
                    injection.step()
                if clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    after = {name: reference.exact(p) for name, p in network.named_parameters()}
    return {name: (before[name] - after[name]) / RATE for name in before}


def assert_injected(
    found: dict[str, Any],
    plain: dict[str, Any],
    delta: drift_fast.Delta,
    *,
    alpha: float = 1.0,
    scale: str = "adaptive",
    clip: float | None = None,
) -> None:
    expected = {
        name: reference.inject(gradient, delta[name], alpha=alpha, scale=scale)
        if name in delta.shapes
        else gradient
        for name, gradient in plain.items()
    }
    if clip is not None:
        total, expected = reference.clip(expected, clip)
        assert total > clip
    for name, gradient in found.items():
        error = reference.norm(gradient - expected[name])
        assert error <= 1e-5 * reference.norm(expected[name]), name


@pytest.fixture
def network() -> torch.nn.Module:
    return Backbone()


@pytest.fixture
def delta(tmp_path: Path, network: torch.nn.Module) -> drift_fast.Delta:
    return delta_towards(tmp_path, network)


@pytest.mark.parametrize("clip", [None, 0.01], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_the_optimizer_uses_the_accumulated_gradient_injected_then_clipped(
    network: torch.nn.Module,
    delta: drift_fast.Delta,
    scale: str,
    micro_batches: int,
    clip: float | None,
) -> None:
    plain = one_epoch(network, None, micro_batches=micro_batches)
    options = {"alpha": 0.7, "scale": scale}
    found = one_epoch(network, delta, micro_batches=micro_batches, clip=clip, options=options)
    assert_injected(found, plain, delta, alpha=0.7, scale=scale, clip=clip)


def test_the_gradients_of_mixed_precision_are_injected(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    plain = one_epoch(network, None, mixed_precision="bf16")
    found = one_epoch(network, delta, mixed_precision="bf16")
    assert_injected(found, plain, delta)


def test_the_prepared_optimizer_may_be_attached_to(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    plain = one_epoch(network, None)
    assert_injected(one_epoch(network, delta, hook=True), plain, delta)


def test_without_a_call_the_first_step_fails(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=0.1))
    with drift_fast.Injection(model, delta, optimizer=optimizer):
        accelerator.backward(regression_loss(model, regression_batch()))
        with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
            optimizer.step()


SCRIPT = """
import json, sys
sys.path[:0] = {tests!r}
import test_accelerate as t
import drift_fast
from support.injection_models import Backbone
delta = drift_fast.Delta.open({delta!r}) if {injected} else None
found = t.one_epoch(Backbone(), delta, clip={clip!r})
from accelerate.state import PartialState
if PartialState().is_main_process:
    open({out!r}, "w").write(json.dumps({{n: v.tolist() for n, v in found.items()}}))
"""


@pytest.mark.slow
def test_two_processes_inject_into_the_reduced_gradient(
    tmp_path: Path, network: torch.nn.Module
) -> None:
    delta = delta_towards(tmp_path, network, out=tmp_path / "delta")

    @functools.cache
    def run(injected: bool, clip: float | None) -> dict[str, Any]:
        out, script = tmp_path / "found.json", tmp_path / "run.py"
        script.write_text(
            SCRIPT.format(
                tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])],
                delta=str(tmp_path / "delta"),
                injected=injected,
                clip=clip,
                out=str(out),
            )
        )
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        processes.run(*launch, "--nproc-per-node", "2", script, limit=250)
        return {name: reference.exact(v) for name, v in json.loads(out.read_text()).items()}

    assert_injected(run(True, 0.01), run(False, None), delta, clip=0.01)
    # The same samples in one process, so that the result is that of one.
    assert_injected(run(True, 0.01), one_epoch(network, None), delta, clip=0.01)


def test_a_loop_that_is_tried_again_with_a_smaller_batch_attaches_anew(tmp_path: Path) -> None:
    """The attachment of the try that failed is nobody's, and does not watch the next one."""
    from accelerate.utils import find_executable_batch_size

    model = Backbone()
    delta = delta_towards(tmp_path, model)
    sizes = []

    @find_executable_batch_size(starting_batch_size=8)  # type: ignore[untyped-decorator, unused-ignore]
    def train(batch_size: int) -> int:
        sizes.append(batch_size)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        injection = drift_fast.Injection(model, delta, optimizer=optimizer)
        for step in range(3):
            regression_loss(model, regression_batch(seed=step)).backward()
            if len(sizes) == 1 and step == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            injection.step()
            optimizer.step()
            optimizer.zero_grad()
        return injection.steps

    assert train() == 3
    assert len(sizes) == 2
