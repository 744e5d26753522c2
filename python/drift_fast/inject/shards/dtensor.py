"""Shards of DTensor parameters: FSDP2, tensor parallelism, or both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drift_fast.errors import DriftError


def is_fsdp2(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this module itself."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


class DTensorShard:
    """The local tensor of a DTensor parameter."""

    sharding = "a DTensor of FSDP2 or tensor parallelism"
    gathers = False
    wider = (
        "Shard float32 weights: call model.float() before fully_shard(…, "
        "mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))"
    )

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._name = name
        tensor: Any = parameter
        mesh = tensor.device_mesh
        self._mesh_device = mesh.device_type
        self._placements = tuple(tensor.placements)
        if any(placement.is_partial() for placement in self._placements):
            raise DriftError(
                f"{name} is a DTensor of partial sums, which is not a trainable parameter"
            )
        # A strided shard is cut out of what the mesh dimensions to its right have cut already; its
        # split factor is the number of parts that they made.
        order = sorted(
            range(len(self._placements)),
            key=lambda at: getattr(self._placements[at], "split_factor", 1),
        )
        self._cuts: list[tuple[int, int, int]] = []
        groups = []
        for at in order:
            placement: Any = self._placements[at]
            if placement.is_replicate() or mesh.size(at) == 1:
                continue
            self._cuts.append((placement.dim, mesh.size(at), mesh.get_local_rank(at)))
            groups.append(mesh.get_group(at))
        self.process_groups = tuple(groups)
        self.span = self._rows()

    def _rows(self) -> tuple[int, int] | None:
        """Return the elements of this shard, if all cuts are along dimension 0."""
        if any(dimension != 0 for dimension, _, _ in self._cuts):
            return None
        height = self.parameter.shape[0]
        start, stop = 0, height
        for _, count, rank in self._cuts:
            size = -(-(stop - start) // count)
            first = min(start + rank * size, stop)
            start, stop = first, min(first + size, stop)
        width = self.parameter.numel() // height if height else 0
        return start * width, stop * width

    @property
    def accumulated(self) -> tuple[torch.Tensor, ...]:
        # With a hook FSDP2 waits for each gradient that it offloads, instead of copying beside
        # backward.
        offloaded = self._mesh_device != self.parameter.device.type
        return () if offloaded else (self.parameter,)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        for dimension, count, rank in self._cuts:
            parts = whole.chunk(count, dimension)
            empty = whole.narrow(dimension, 0, 0)
            whole = parts[rank] if rank < len(parts) else empty
        return whole

    def gradient(self) -> torch.Tensor | None:
        gradient: Any = self.parameter.grad
        if gradient is None:
            return None
        if tuple(gradient.placements) != self._placements:
            raise DriftError(
                f"the gradient of {self._name} is placed as {gradient.placements}, its parameter "
                f"as {self._placements}: it is not reduced yet, or something else laid it out; "
                "call step() after the last backward, with gradient synchronization on"
            )
        return _local(gradient)

    def write_gradient(self, gradient: torch.Tensor) -> None:
        pass

    def weight(self) -> torch.Tensor:
        return _local(self.parameter)

    def write_weight(self, weight: torch.Tensor) -> None:
        _local(self.parameter).copy_(weight)


def _local(tensor: Any) -> torch.Tensor:
    """Return a DTensor's local tensor itself, not a copy, with nothing for autograd to follow."""
    # `to_local` returns this too where autograd is off, and takes longer; a step asks for hundreds.
    local: torch.Tensor = tensor._local_tensor
    return local.detach()
