"""How step() writes: in place, into the gradients alone, and without the host waiting for anything.

Owns: identity and layout of the gradient tensors, and the absence of host reads. The values
written are in test_injection.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import drift_fast
from support import reference
from support.injection_models import (
    Backbone,
    arithmetic,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_the_gradient_is_changed_in_place(tmp_path: Path, scale: str, dtype: torch.dtype) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model, dtype="bfloat16")
    model.to(dtype)
    regression_loss(model, regression_batch()).backward()
    held = {name: parameter.grad for name, parameter in model.named_parameters()}
    layout = {n: (g.data_ptr(), g.dtype, g.shape, g.stride()) for n, g in held.items()}
    before = gradients_of(model)
    drift_fast.Injection(model, delta, scale=scale).step()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is held[name]
        found = (gradient.data_ptr(), gradient.dtype, gradient.shape, gradient.stride())
        assert found == layout[name]
        assert torch.equal(gradient, before[name]) == (name not in delta)


def test_weights_and_the_delta_are_left_alone(world: tuple[Backbone, drift_fast.Delta]) -> None:
    model, delta = world
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    deltas = dict(delta.items())
    injection = drift_fast.Injection(model, delta, scale="absolute")
    injection.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
    for name, values in delta.items():
        assert torch.equal(values, deltas[name])


class HostReads(TorchDispatchMode):
    """Records what the host would have to wait for on an accelerator.

    Operators are seen by dispatch. Reads that go to the memory of a CPU tensor without dispatching
    one are seen by standing in for the method.
    """

    OPERATORS = frozenset(
        {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"}
    )
    METHODS = ("tolist", "numpy", "cpu")

    def __init__(self, methods: Sequence[str] = METHODS) -> None:
        super().__init__()
        self.methods = methods
        self.seen: list[str] = []
        self.operators = 0
        self.patches = pytest.MonkeyPatch()

    def __enter__(self) -> Any:
        for name in self.methods:
            self.patches.setattr(torch.Tensor, name, self.recording(name))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.undo()

    def recording(self, name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(name)
            return original(tensor, *args, **kwargs)

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype is torch.bool for index in args[1]
        )
        if name in self.OPERATORS or masked:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool(tensor[0] > 0),
        lambda tensor: float(tensor.norm()),
        lambda tensor: tensor.norm().tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: torch.equal(tensor, tensor + 1),
    ],
    ids=["item", "bool", "float", "tolist", "cpu", "numpy", "mask", "equal"],
)
def test_the_detector_of_host_reads_sees_each_kind(read: Any) -> None:
    with HostReads() as reads:
        read(torch.ones(2))
    assert reads.seen
    assert torch.ones(2).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("scale", "rescale"),
    [("absolute", None), ("absolute", "weight"), ("gradnorm", None), ("adaptive", None)],
)
def test_a_step_reads_nothing_back_to_the_host(
    world: tuple[Backbone, drift_fast.Delta], scale: str, rescale: str | None, kind: str
) -> None:
    model, delta = world
    injection = drift_fast.Injection(model, delta, scale=scale, rescale=rescale)
    # On a CPU the kernel reads the memory in place, and coefficients are in host memory already.
    methods = HostReads.METHODS if kind == "device" else ("cpu",)
    for _ in range(2):
        model.zero_grad()
        regression_loss(model, regression_batch()).backward()
        with HostReads(methods) as reads:
            injection.step()
        assert reads.seen == []
        assert reads.operators > 0


def test_a_step_under_a_gradient_scaler_reads_nothing_back_from_a_device(
    world: tuple[Backbone, drift_fast.Delta], kind: str
) -> None:
    if kind == "host":
        pytest.skip("the scale of a CPU's scaler is in host memory")
    model, delta = world
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    injection = drift_fast.Injection(
        model, delta, scale="absolute", optimizer=optimizer, scaler=scaler
    )
    with HostReads() as reads:
        injection.step()
    assert reads.seen == []
