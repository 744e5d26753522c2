"""Which residency: where Δ is kept between steps, chosen by the memory that is free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from drift_fast.inject.config import Residency


def choose(
    nbytes: int, device: torch.device, parameters: Sequence[torch.Tensor]
) -> tuple[Residency, str]:
    """Return an exact residency for Δ of this size, and a line that says why.

    On an accelerator, memory is kept free for what training has yet to allocate (gradients, and two
    AdamW states for every parameter), and a tenth of all memory for activations.
    """
    size = f"{nbytes / 1e9:.2f} GB of Δ"
    if device.type != "cuda":
        free = free_host_memory()
        if device.type != "cpu" or free is None or nbytes < free / 2:
            return "device", f"{size} beside the parameters on {device}"
        return (
            "disk",
            f"{size}, over half of the {free / 1e9:.1f} GB of free memory: read in every step",
        )
    free, total = torch.cuda.mem_get_info(device)
    trained = [p for p in parameters if p.requires_grad and p.device == device]
    # This process allocates for its own part of a sharded parameter.
    local = [p.to_local() if hasattr(p, "to_local") else p for p in trained]
    shares = zip(trained, local, strict=True)
    ahead = sum(own.nbytes * (3 if p.grad is None else 2) for p, own in shares) + total // 10
    if nbytes <= free - ahead:
        return "device", f"{size} on {device}, {(free - nbytes) / 1e9:.1f} GB stay free"
    short = (
        f"{size} would leave less than the {ahead / 1e9:.1f} GB on {device} that gradients, "
        "optimizer and activations may take"
    )
    host = free_host_memory()
    if host is None or nbytes < host * 0.6:
        return "host", (
            f"{short}: kept in pinned host memory (overlap=True with prefetch='4GB' hides most of "
            "its copies; residency='device-int8' takes half of the room instead, rounding Δ)"
        )
    return "disk", f"{short}, and host memory has {host / 1e9:.1f} GB free: read in every step"


def free_host_memory() -> int | None:
    """Return the bytes that are available without swapping, None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError, IndexError):
        return None
