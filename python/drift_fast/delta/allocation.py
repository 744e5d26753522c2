"""Memory for one tensor of Δ, or an error that says how to do with less."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def empty_tensor(name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Return a tensor on the CPU whose elements are still to be filled in.

    Raises:
        MemoryError: there is not enough memory.
    """
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    try:
        return torch.empty(shape, dtype=kind)
    # PyTorch has no type of its own for it; nothing else can fail here.
    except RuntimeError as error:
        raise MemoryError(
            f"{name}: Δ of shape {list(shape)} takes {math.prod(shape) * kind.itemsize:,} bytes of "
            "memory, which are not free; read it in parts with read_into(…, start=…)"
        ) from error
