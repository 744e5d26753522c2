"""Measure, and subtract c·Δ: on a CPU through the Rust kernel, on a device without host syncs.

Owns the arithmetic on tensors, not the formula. A backend holds Δ for its targets, resident and
exact in the delta's dtype. Sums are taken in float32 or better whatever the dtypes are.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from drift_fast import _core
from drift_fast.inject.formula import Scale, coefficients

logger = logging.getLogger(__name__)

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

    def measure(
        self, tensors: Sequence[torch.Tensor], *, float64: bool = False, dot: bool = True
    ) -> Measured:
        """Return the sums of each tensor with its Δ; NaN where either holds NaN or infinity.

        One pass gives both sums, so `dot` makes no difference here.
        """
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

    def pick(self, vector: Any, members: Sequence[int]) -> Any:
        """Return some entries of a vector."""
        return vector[list(members)]

    def part(self, members: Sequence[int]) -> CpuBackend:
        """Return a backend for some of the targets, which shares their Δ."""
        return CpuBackend([self.deltas[at] for at in members], self.pick(self.norms, members))


class DeviceBackend:
    """Δ resident on an accelerator; coefficients never leave it, so a step waits for nothing."""

    def __init__(self, deltas: Sequence[torch.Tensor], norms: Sequence[float]) -> None:
        self.deltas = list(deltas)
        for delta in self.deltas:
            # Both try themselves out once, which waits for the device.
            _has_fused_step(delta)
            _has_wide_product(delta)
        self.norms = self.vector(norms)

    def measure(
        self, tensors: Sequence[torch.Tensor], *, float64: bool = False, dot: bool = True
    ) -> Measured:
        """Return the sums of each tensor with its Δ, as vectors on the device.

        They are float32; `float64` asks for that where the device has it, for sums of which a small
        difference is wanted. Without `dot` the product with Δ, two more passes over memory, is
        left out and NaN.
        """
        wide = float64 and self.deltas[0].device.type != "mps"
        dtype = torch.float64 if wide else torch.float32
        norm = [torch.linalg.vector_norm(t, dtype=dtype) for t in tensors]
        norms = torch.stack(norm)
        if not dot:
            return Measured(norms, torch.full_like(norms, math.nan))
        dots = [_dot(t, delta, dtype) for t, delta in zip(tensors, self.deltas, strict=True)]
        return Measured(norms, torch.stack(dots))

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

    def pick(self, vector: Any, members: Sequence[int]) -> Any:
        """Return some entries of a vector; a list as index would be copied to the device."""
        return torch.stack([vector[at] for at in members])

    def part(self, members: Sequence[int]) -> DeviceBackend:
        """Return a backend for some of the targets, which shares their Δ."""
        part = DeviceBackend.__new__(DeviceBackend)
        part.deltas = [self.deltas[at] for at in members]
        part.norms = self.pick(self.norms, members)
        return part


def norm_of(tensor: torch.Tensor) -> float:
    """Return ‖tensor‖ of a CPU tensor to a millionth, NaN where it holds NaN or infinity."""
    window = _window(tensor)
    ((square, _, _),) = _core.measure([window], [window], threads=torch.get_num_threads())
    return float(square**0.5)


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
    # torch.dot of two bfloat16 vectors rounds its result to bfloat16, three digits; a product of
    # matrices can leave it in float32, at a third of the cost of widening both.
    if left.dtype == right.dtype and dtype == torch.float32 and _has_wide_product(left):
        return torch.mm(left[None, :], right[:, None], out_dtype=dtype).reshape(())
    pieces = [
        torch.dot(left[start : start + _PIECE].to(dtype), right[start : start + _PIECE].to(dtype))
        for start in range(0, left.numel(), _PIECE)
    ]
    return torch.stack(pieces).sum() if len(pieces) != 1 else pieces[0]


def _axpy(tensor: torch.Tensor, delta: torch.Tensor, c: torch.Tensor) -> None:
    """Compute tensor −= c·delta in place with c a float32 scalar on the device."""
    if tensor.dtype == delta.dtype and tensor.is_contiguous() and _has_fused_step(tensor):
        _fused_step(tensor, delta, c)
        return
    if tensor.dtype == torch.float32:
        tensor.addcmul_(delta.to(torch.float32), c, value=-1.0)
        return
    # In 16 bits torch would round c itself to the tensor's dtype; in float32 only the result is.
    if not tensor.is_contiguous():
        tensor.copy_(torch.addcmul(tensor.float(), delta.float(), c, value=-1.0))
        return
    flat, other = tensor.view(-1), delta.reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        piece.copy_(
            torch.addcmul(piece.float(), other[start : start + _PIECE].float(), c, value=-1.0)
        )


def _fused_step(tensor: torch.Tensor, delta: torch.Tensor, c: torch.Tensor) -> None:
    """Subtract c·delta through torch's fused SGD, whose learning rate may stay on the device.

    It computes in float32 and rounds once, in the fewest passes over memory that torch offers.
    """
    torch._fused_sgd_(
        [tensor],
        [delta],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=c,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


# Both shortcuts are newer or less public than the rest of torch, so each is tried once for a device
# and dtype against a known result, at attachment, and left out where it is missing or wrong.


def _has_fused_step(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and _fused_step_works(tensor.device, tensor.dtype)


def _has_wide_product(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and _wide_product_works(tensor.device, tensor.dtype)


@functools.cache
def _fused_step_works(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        tensor = torch.ones(8, dtype=dtype, device=device)
        # 1 − (1 + 2⁻¹²): a coefficient rounded to either 16-bit type would leave zero.
        _fused_step(tensor, tensor.clone(), torch.full((), 1 + 2**-12, device=device))
        return tensor.tolist() == [-(2.0**-12)] * 8
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("no fused step for %s on %s, taking the slower one: %s", dtype, device, error)
        return False


@functools.cache
def _wide_product_works(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        left = torch.ones(1, 2049, dtype=dtype, device=device)
        product = torch.mm(left, left.mT.contiguous(), out_dtype=torch.float32)
        # 2049 has one bit more than either 16-bit type.
        return product.dtype == torch.float32 and product.item() == 2049.0
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("no wide product for %s on %s, widening instead: %s", dtype, device, error)
        return False
