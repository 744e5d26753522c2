"""Host memory that is page-locked, so that a GPU copies from it at full speed."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from typing import Any

import torch

# To CUDA: locked for every device, not for the current one alone.
_PORTABLE = 1


def pages(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a flat tensor to be filled and then given to `lock`; its pages are its own.

    Locking pages that are there already is several times as fast as having the driver bring them in
    one after the other, and threads that fill them bring them in together.
    """
    nbytes = numel * dtype.itemsize
    if not torch.cuda.is_available() or not numel:
        return torch.empty(numel, dtype=dtype)
    # Whole pages: one that two tensors share cannot be locked twice.
    nbytes += -nbytes % mmap.PAGESIZE
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    memory = mmap.mmap(-1, nbytes, **private)
    with contextlib.suppress(AttributeError, OSError):
        # Advice: fewer and larger pages, where the system has them.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[: numel * dtype.itemsize].view(dtype)


def lock(owner: object, tensor: torch.Tensor) -> torch.Tensor:
    """Lock the memory of a tensor of `pages` and return it; without a GPU it stays as it is.

    Pages are locked for as long as `owner` lives: torch's own allocator of pinned memory rounds up
    to a power of two, which could double the memory of a model's Δ. Where the driver refuses to
    lock these pages, the result is a copy in memory of that allocator.
    """
    if not torch.cuda.is_available() or not tensor.numel():
        return tensor
    nbytes = tensor.untyped_storage().nbytes()
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(tensor.data_ptr(), nbytes, _PORTABLE)) != 0:
        # The refusal would come back as the error of the next kernel.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        return tensor.pin_memory()
    # Holding the pages here keeps their memory from being freed while it is locked.
    # At the end of the process, or in a fork of it, the system unlocks it.
    weakref.finalize(owner, _unlock, tensor).atexit = False
    return tensor


def _unlock(tensor: torch.Tensor) -> None:
    torch.cuda.synchronize()
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(tensor.data_ptr())
