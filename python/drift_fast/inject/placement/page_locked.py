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


def page_locked(owner: object, tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in page-locked memory, or the tensor itself where there is no GPU.

    Pages are locked for as long as `owner` lives: torch's own allocator of pinned memory rounds up
    to a power of two, which could double the memory of a model's Δ. That allocator is used where
    the driver refuses to lock these pages.
    """
    if not torch.cuda.is_available() or not tensor.numel():
        return tensor
    # Whole pages of its own: a page that two tensors share cannot be locked twice.
    nbytes = tensor.nbytes + -tensor.nbytes % mmap.PAGESIZE
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    pages = torch.frombuffer(mmap.mmap(-1, nbytes, **private), dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(pages.data_ptr(), nbytes, _PORTABLE)) != 0:
        # The refusal would come back as the error of the next kernel.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        return tensor.pin_memory()
    # Holding the pages here keeps their memory from being freed while it is locked.
    # At the end of the process, or in a fork of it, the system unlocks it.
    weakref.finalize(owner, _unlock, pages).atexit = False
    return pages[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _unlock(pages: torch.Tensor) -> None:
    torch.cuda.synchronize()
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(pages.data_ptr())
