"""Sums over the processes that share the same parameters, and agreement between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from drift_fast.errors import DriftError


class Reduction:
    """Sums and agreement over process groups; without any, this process is alone."""

    def __init__(self, process_groups: tuple[Any, ...]) -> None:
        self.process_groups = process_groups

    def sum(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes, in the given vector's memory where it can be.

        Each group takes one collective; only two-dimensional meshes have more than one group.
        """
        for group in self.process_groups:
            device = _reducible_device(group, vector.device)
            there = vector.to(device)
            dist.all_reduce(there, group=group)
            vector = there.to(vector.device)
        return vector

    def agree(self, error: Exception | None) -> None:
        """Raise on every process if one of them failed, so that no other waits for it forever.

        Raises:
            Exception: the error of this process.
            DriftError: the error is another process's.
        """
        if not self.process_groups:
            if error is not None:
                raise error
            return
        failed = torch.tensor([0.0 if error is None else 1.0])
        total = self.sum(failed).item()
        if error is not None:
            raise error
        if total:
            raise DriftError("another process of this run failed here; its message says why")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Keep a process from going on to a sum that another one, which failed here, never reaches.

        Raises:
            As `agree`.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        self.agree(failure)


def _reducible_device(group: Any, device: torch.device) -> torch.device:
    """Return a device that the group's backends can reduce on: `device` itself where they can."""
    # For a group that was made without a backend, only this call names all its backends.
    if device.type == "cpu" and "cpu:" not in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return device
