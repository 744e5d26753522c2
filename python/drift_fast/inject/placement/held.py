"""The Δ of one target, kept elsewhere than beside its gradient; both ways here are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from drift_fast.inject.placement.page_locked import lock


class Held(Protocol):
    """One Δ, wherever it is kept."""

    numel: int
    # Elements of the buffer before the first one of Δ.
    lead: int
    dtype: torch.dtype

    def fill(self, out: torch.Tensor) -> None:
        """Write Δ to a flat buffer on the gradient's device, on the current stream.

        `out` is as long as the whole blocks of 64 elements that `lead` and Δ take.
        """


class InHostMemory:
    """Δ as it is, in host memory that is page-locked: `tensor` is one of `page_locked.pages`."""

    lead = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = lock(self, tensor)
        self.numel = tensor.numel()
        self.dtype = tensor.dtype

    def fill(self, out: torch.Tensor) -> None:
        out[: self.numel].copy_(self.tensor, non_blocking=True)


class OnDisk:
    """Δ in its files, or as the difference of two checkpoints; read each time it is needed."""

    lead = 0

    def __init__(
        self, numel: int, dtype: torch.dtype, read: Callable[[torch.Tensor], None]
    ) -> None:
        self.numel = numel
        self.dtype = dtype
        self._read = read

    def fill(self, out: torch.Tensor) -> None:
        if not self.numel:
            return
        if out.device.type == "cpu":
            self._read(out[: self.numel])
            return
        stage = torch.empty(self.numel, dtype=self.dtype, pin_memory=out.device.type == "cuda")
        self._read(stage)
        # Pinned memory that is freed is reused only after the copy from it, which torch watches.
        out[: self.numel].copy_(stage, non_blocking=True)
