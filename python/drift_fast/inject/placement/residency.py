"""Which residency: where Δ is kept between steps, chosen by the memory that is free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from drift_fast.inject.config import Residency


def check_residency(residency: str) -> Residency:
    """Return `residency` if it names one.

    Raises:
        ValueError: an unknown residency.
    """
    if residency not in get_args(Residency):
        raise ValueError(
            f"residency must be one of {', '.join(get_args(Residency))}, got {residency!r}"
        )
    return residency  # type: ignore[return-value]


def choose(
    nbytes: int, device: torch.device, parameters: Sequence[torch.Tensor]
) -> tuple[Residency, str]:
    """Return an exact residency for Δ of this size, and a line that says why.

    On an accelerator, what training has yet to allocate (gradients, and two states of an AdamW for
    every parameter) and a tenth of the memory for activations are kept free.
    """
    size = f"{nbytes / 1e9:.2f} GB of Δ"
    if device.type != "cuda":
        free = _free_host_memory()
        if device.type != "cpu" or free is None or nbytes < free / 2:
            return "device", f"{size} beside the parameters on {device}"
        return (
            "disk",
            f"{size}, over half of the {free / 1e9:.1f} GB of free memory: read anew",
        )
    free, total = torch.cuda.mem_get_info(device)
    trained = [p for p in parameters if p.requires_grad and p.device == device]
    # Of a sharded parameter this process has its part to allocate for.
    local = [p.to_local() if hasattr(p, "to_local") else p for p in trained]
    shares = zip(trained, local, strict=True)
    ahead = sum(own.nbytes * (3 if p.grad is None else 2) for p, own in shares) + total // 10
    if nbytes <= free - ahead:
        return "device", f"{size} on {device}, {(free - nbytes) / 1e9:.1f} GB stay free"
    short = (
        f"{size} would leave less than the {ahead / 1e9:.1f} GB on {device} that gradients, "
        "optimizer and activations may take"
    )
    host = _free_host_memory()
    if host is None or nbytes < host * 0.6:
        return "host", (
            f"{short}: kept in pinned host memory (residency='device-int8' halves it instead, "
            "rounding Δ)"
        )
    return "disk", f"{short}, and host memory has {host / 1e9:.1f} GB free: read anew each step"


def _free_host_memory() -> int | None:
    """Return the bytes that can be had without swapping, None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, IndexError):
        return None
