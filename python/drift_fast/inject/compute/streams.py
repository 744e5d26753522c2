"""CUDA streams beside the one that training computes on."""

from __future__ import annotations

import functools

import torch


def new_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """Return a stream beside the current one; work of the lower priority number goes first."""
    return torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]


@functools.cache
def shared_streams(
    device: torch.device, priority: int, count: int, use: str = "launch"
) -> list[torch.cuda.Stream]:
    """Return the streams that all injections share for one use.

    torch keeps a workspace of tens of megabytes for each stream on which matrices were multiplied.
    """
    return [new_stream(device, priority) for _ in range(count)]
