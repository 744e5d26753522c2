"""Vectors of one number for each target, written and read without a copy to the device.

A list as index would be copied there, and the host would wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def beside(vector: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a vector on another device; only the host waits for what comes to it."""
    return vector.to(device, non_blocking=device.type != "cpu")


def is_run(members: Sequence[int]) -> bool:
    """Whether members follow each other without a gap, in their order."""
    return list(members) == list(range(members[0], members[0] + len(members)))


def put(vector: torch.Tensor, members: Sequence[int], values: torch.Tensor) -> None:
    """Write values at some places."""
    if is_run(members):
        vector[members[0] : members[-1] + 1].copy_(values)
        return
    for at, value in zip(members, values.unbind(), strict=True):
        vector[at].copy_(value)


def pick(vector: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
    """Return the entries at some places."""
    if not members:
        return vector[:0]
    if is_run(members):
        return vector[members[0] : members[-1] + 1]
    return torch.stack([vector[at] for at in members])


def plain_arithmetic(device: torch.device) -> torch.autocast:
    """Compute in the dtypes that tensors have, whatever autocast the caller has entered."""
    return torch.autocast(device_type=device.type, enabled=False)
