"""Float32 products on an accelerator that are float32 throughout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep a float32 product from being rounded to TF32, whatever training has chosen."""
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.backends.cuda.matmul
    # Before torch 2.9 the setting has another name, and later the two must not be mixed.
    name, exact = ("fp32_precision", "ieee")
    if not hasattr(torch._C, "_get_fp32_precision_getter"):
        name, exact = "allow_tf32", False  # type: ignore[assignment]
    before = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)
