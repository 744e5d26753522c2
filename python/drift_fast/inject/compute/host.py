"""Measure and subtract on the CPU, through the Rust kernels that measured the delta."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from drift_fast._core import dots, measure, subtract_scaled
from drift_fast.inject.compute.base import CHUNK, Sums, flat

_KERNEL_DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}


class HostArithmetic:
    """Tensors in host memory, through the kernel that measured the delta."""

    device = torch.device("cpu")
    dtype = torch.float64
    priority = 0
    generation = 0

    def on_capture_streams(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: no graph is captured on the CPU."""
        return contextlib.nullcontext()

    def measure(
        self,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor] | None,
    ) -> Sums:
        """Return the sums of each tensor with its Δ; NaN where either holds NaN or infinity."""
        squares, _, dot = _sums(tensors, tensors if deltas is None else deltas)
        return Sums(squares.sqrt(), torch.full_like(dot, math.nan) if deltas is None else dot)

    def dots(
        self,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        *,
        room: int = CHUNK,
    ) -> torch.Tensor:
        """Return ⟨x, Δ⟩ of each tensor in float64; NaN where either holds NaN or infinity."""
        sides = ([_window(tensor) for tensor in side] for side in (tensors, deltas))
        return torch.tensor(dots(*sides, threads=torch.get_num_threads()), dtype=torch.float64)

    def subtract(
        self, tensors: Sequence[torch.Tensor], deltas: Sequence[torch.Tensor], c: torch.Tensor
    ) -> None:
        """Subtract c·Δ from each tensor in place, computed in float64 and rounded to its dtype."""
        values: list[float] = c.tolist()
        # Exactly no injection: not even the sign of a zero changes.
        moved = [at for at, value in enumerate(values) if value != 0.0]
        # torch rounds the coefficient to a 16-bit tensor's dtype; the kernel does not.
        subtract_scaled(
            [_window(tensors[at]) for at in moved],
            [_window(deltas[at]) for at in moved],
            [values[at] for at in moved],
            threads=torch.get_num_threads(),
        )


def norm_of(tensor: torch.Tensor) -> float:
    """Return ‖tensor‖ of a CPU tensor to a millionth, NaN where it holds NaN or infinity."""
    squares, _, _ = _sums([tensor], [tensor])
    return float(squares.item() ** 0.5)


def _sums(
    first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return ‖x‖², ‖y‖² and ⟨x, y⟩ of each pair, vectors in float64."""
    sides = ([_window(tensor) for tensor in side] for side in (first, second))
    rows = measure(*sides, threads=torch.get_num_threads())
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).unbind(1)


def _window(tensor: torch.Tensor) -> tuple[Any, str]:
    """Return a view of a CPU tensor's bytes and the kernel's name of its dtype."""
    return flat(tensor).view(torch.uint8).numpy(), _KERNEL_DTYPES[tensor.dtype]
