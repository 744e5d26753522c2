"""What injecting asks of a device: measure flat tensors, and subtract c·Δ from them.

Owns the protocol and how tensors become flat, not the formula and not where Δ comes from. Sums are
taken in float32 or better whatever the dtypes are. Every tensor that is measured or changed has one
dimension and is contiguous.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

# Tensors up to this size are packed into one, since launching kernels costs more than they do.
SMALL = 1 << 15
# Elements converted to a wider type at a time, where there is no way without.
CHUNK = 1 << 24


class Sums(NamedTuple):
    """‖x‖ and ⟨x, Δ⟩ of each tensor, vectors of shape [tensors]; NaN for what was not asked for."""

    norm: torch.Tensor
    dot: torch.Tensor


class Arithmetic(Protocol):
    """Measure and subtract on one device; sums and coefficients have its `dtype`."""

    device: torch.device
    dtype: torch.dtype
    # Of the streams it launches on, as CUDA counts: the lower goes first.
    priority: int
    # Changes whenever a captured graph must not be replayed any longer.
    generation: int

    def on_capture_streams(self) -> contextlib.AbstractContextManager[None]:
        """Launch on streams that are used for captures only."""

    def measure(
        self,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor] | None,
    ) -> Sums:
        """Return the sums of each tensor with its Δ."""

    def dots(
        self,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        *,
        room: int = CHUNK,
    ) -> torch.Tensor:
        """Return ⟨x, Δ⟩ of each tensor, summed in float64 where the device has it.

        room: elements that may be widened at a time.
        """

    def subtract(
        self, tensors: Sequence[torch.Tensor], deltas: Sequence[torch.Tensor], c: torch.Tensor
    ) -> None:
        """Subtract c·Δ from each tensor in place; c is a vector on the device."""


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements in row-major order: its own memory where it is contiguous."""
    # A step asks for hundreds, and each call takes the host a microsecond or more.
    return (tensor if tensor.is_contiguous() else tensor.contiguous()).view(-1)


@contextlib.contextmanager
def flattened(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Give flat tensors to change in place; a transposed view gets a changed copy back."""
    flats = [flat(tensor) for tensor in tensors]
    copies = [at for at, tensor in enumerate(tensors) if not tensor.is_contiguous()]
    yield flats
    for at in copies:
        tensors[at].copy_(flats[at].view(tensors[at].shape))
