"""Training a small model with Δ in one residency or another, and the gradients that came of it.

Every large tensor here is above `SMALL`, and so little is allowed on the device that the ring of
buffers turns several times in each step. There is no accelerator: what a stream would reorder is
not seen here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import drift_fast
from drift_fast import Injection
from drift_fast.inject.compute.base import SMALL
from support.injection_models import (
    Backbone,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
)

WIDTH, INNER = 192, 200
LARGE = 14
# One tensor to a buffer.
TIGHT = 1
# torch's float32 norm of a CPU tensor, in which the device's arithmetic is tried, is not exact.
PRECISION = {"host": 1e-6, "device": 1e-4}


def backbone() -> Backbone:
    model = Backbone(layers=2, width=WIDTH, inner=INNER)
    sizes = [p.numel() for p in model.model.parameters()]
    assert sum(size > SMALL for size in sizes) == LARGE
    return model


def deltas_in(folder: Path) -> dict[str, drift_fast.Delta]:
    """One Δ, as a file and as the difference of two checkpoints."""
    streamed = delta_towards(folder, backbone(), dtype="bfloat16", modules=("attn", "mlp"))
    return {"streamed": streamed, "saved": streamed.save(folder / "delta")}


class GivenDelta(dict[str, torch.Tensor]):
    """A delta of tensors in memory."""

    @property
    def dtype(self) -> str:
        return str(next(iter(self.values())).dtype).removeprefix("torch.")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.items()}


def backward(model: torch.nn.Module, *, seed: int) -> None:
    model.zero_grad()
    regression_loss(model, regression_batch(width=WIDTH, seed=seed)).backward()


def injected(
    where: str, delta: Any, steps: int = 3, *, lr: float = 0.1, **options: Any
) -> tuple[list[dict[str, torch.Tensor]], dict[str, float]]:
    """Train, and return the gradients that the optimizer got, and the metrics at the end."""
    model = backbone()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    gradients = []
    with Injection(model, delta, residency=where, prefetch=TIGHT, **options) as injection:
        assert injection.residency == where
        for step in range(steps):
            backward(model, seed=step)
            injection.step()
            gradients.append(gradients_of(model))
            optimizer.step()
        return gradients, injection.metrics()


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, label: str = ""
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), f"{label} {name}"
