"""Measure, and subtract c·Δ: on a CPU through the Rust kernel, on a device without host syncs.

Owns the arithmetic on tensors, not the formula. A backend holds Δ for its targets, resident and
exact in the delta's dtype. Sums are taken in float32 or better whatever the dtypes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from drift_fast import _core
from drift_fast.inject.formula import Scale, coefficients

# Elements converted to float32 at a time where a dtype has no exact dot product of its own.
_PIECE = 1 << 24
_KERNEL_DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}


@dataclass(frozen=True)
class Measured:
    """‖x‖ and ⟨x, Δ⟩ of each target, numpy float64 or torch on the device, shape [targets]."""

    norm: Any
    dot: Any


class CpuBackend:
    """Δ in host memory; measured by the kernel that measured the delta, applied by torch."""

    def __init__(self, deltas: Sequence[torch.Tensor], norms: Sequence[float]) -> None:
        self.deltas = list(deltas)
        self.norms = np.asarray(norms, dtype=np.float64)

    def measure(self, tensors: Sequence[torch.Tensor], *, float64: bool = False) -> Measured:
        """Return the sums of each tensor with its Δ; NaN where either holds NaN or infinity."""
        sums = _core.measure(
            [_window(tensor) for tensor in tensors],
            [_window(delta) for delta in self.deltas],
            threads=torch.get_num_threads(),
            float64=float64,
        )
        table = np.asarray(sums, dtype=np.float64).reshape(-1, 3)
        return Measured(np.sqrt(table[:, 0]), table[:, 2])

    def coefficients(self, scale: Scale, alpha: float, sums: Measured, factor: Any) -> Any:
        """Return each target's c, zero where the gradient is not finite, and their count."""
        c = coefficients(scale, alpha, sums.norm, sums.dot, self.norms, factor)
        finite = np.isfinite(sums.norm) & np.isfinite(c)
        return np.where(finite, c, 0.0), int((~finite).sum())

    def subtract(self, tensors: Sequence[torch.Tensor], c: Any) -> None:
        """Subtract c·Δ from each tensor in place, computed in float64 and rounded to its dtype."""
        moved = [at for at, value in enumerate(c.tolist()) if value != 0.0]
        # torch rounds the coefficient to a 16-bit tensor's dtype; the kernel does not. A gradient
        # that is a transposed view is changed in a copy, which is then copied back.
        flat = {at: tensors[at].contiguous() for at in moved}
        _core.subtract_scaled(
            [_window(flat[at]) for at in moved],
            [_window(self.deltas[at]) for at in moved],
            [float(c[at]) for at in moved],
            threads=torch.get_num_threads(),
        )
        for at, tensor in flat.items():
            if tensor.data_ptr() != tensors[at].data_ptr():
                tensors[at].copy_(tensor)

    def vector(self, values: Sequence[float]) -> Any:
        """Return constants of each target in the form that `coefficients` takes."""
        return np.asarray(values, dtype=np.float64)


class DeviceBackend:
    """Δ resident on an accelerator; coefficients never leave it, so a step waits for nothing."""

    def __init__(self, deltas: Sequence[torch.Tensor], norms: Sequence[float]) -> None:
        self.deltas = list(deltas)
        self.norms = self.vector(norms)

    def measure(self, tensors: Sequence[torch.Tensor], *, float64: bool = False) -> Measured:
        """Return the sums of each tensor with its Δ, as vectors on the device.

        They are float32; `float64` asks for that where the device has it, for sums of which a small
        difference is wanted.
        """
        wide = float64 and self.deltas[0].device.type != "mps"
        dtype = torch.float64 if wide else torch.float32
        norm = [torch.linalg.vector_norm(t, dtype=dtype) for t in tensors]
        dot = [_dot(t, delta, dtype) for t, delta in zip(tensors, self.deltas, strict=True)]
        return Measured(torch.stack(norm), torch.stack(dot))

    def coefficients(self, scale: Scale, alpha: float, sums: Measured, factor: Any) -> Any:
        """Return each target's c, zero where the gradient is not finite, and their count."""
        c = coefficients(scale, alpha, sums.norm, sums.dot, self.norms, factor)
        finite = torch.isfinite(sums.norm) & torch.isfinite(c)
        return torch.where(finite, c, torch.zeros_like(c)), (~finite).sum()

    def subtract(self, tensors: Sequence[torch.Tensor], c: Any) -> None:
        """Subtract c·Δ from each tensor in place; c is a float32 vector on the device."""
        for tensor, delta, value in zip(tensors, self.deltas, c.unbind(), strict=True):
            _axpy(tensor, delta, value)

    def vector(self, values: Sequence[float]) -> Any:
        """Return constants of each target in the form that `coefficients` takes."""
        return torch.tensor(values, dtype=torch.float32, device=self.deltas[0].device)


def make_backend(
    deltas: Sequence[torch.Tensor], norms: Sequence[float]
) -> CpuBackend | DeviceBackend:
    """Return the backend for where the deltas lie."""
    on_cpu = deltas[0].device.type == "cpu"
    return CpuBackend(deltas, norms) if on_cpu else DeviceBackend(deltas, norms)


def _window(tensor: torch.Tensor) -> tuple[Any, str]:
    """Return a view of a CPU tensor's bytes and the kernel's name of its dtype."""
    # A gradient may be a transposed view; measuring a copy costs memory but not correctness, and
    # Δ is contiguous, so the copy has Δ's order of elements.
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy(), _KERNEL_DTYPES[tensor.dtype]


def _dot(tensor: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ⟨tensor, delta⟩ as a scalar on the device, multiplied and summed in `dtype`."""
    left, right = tensor.reshape(-1), delta.reshape(-1)
    if left.dtype == right.dtype == dtype:
        return torch.dot(left, right)
    # torch.dot of two bfloat16 vectors rounds its result to bfloat16, three digits.
    pieces = [
        torch.dot(left[start : start + _PIECE].to(dtype), right[start : start + _PIECE].to(dtype))
        for start in range(0, left.numel(), _PIECE)
    ]
    return torch.stack(pieces).sum() if len(pieces) != 1 else pieces[0]


def _axpy(tensor: torch.Tensor, delta: torch.Tensor, c: torch.Tensor) -> None:
    """Compute tensor −= c·delta in place with c a float32 scalar on the device."""
    if tensor.dtype == torch.float32:
        tensor.addcmul_(delta.to(torch.float32), c, value=-1.0)
        return
    # In 16 bits torch would round c itself to the tensor's dtype; in float32 only the result is.
    flat, other = tensor.view(-1) if tensor.is_contiguous() else None, delta.reshape(-1)
    if flat is None:
        tensor.copy_(torch.addcmul(tensor.float(), delta.float(), c, value=-1.0))
        return
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        piece.copy_(
            torch.addcmul(piece.float(), other[start : start + _PIECE].float(), c, value=-1.0)
        )
