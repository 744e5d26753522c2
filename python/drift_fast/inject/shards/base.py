"""The part of each parameter that this process holds, and how its gradient and weights are reached.

Owns the difference between a whole parameter and a sharded one; knows nothing of Δ or the formula.
A sum over `groups` of what every process finds in its piece counts each element exactly once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from drift_fast.errors import DriftError


class Piece(Protocol):
    """The part of one parameter that this process holds; all of it, where nothing is sharded.

    Local tensors may have any shape whose row-major order is that of the part.
    """

    @property
    def kind(self) -> str:
        """What spread the parameter over processes, for messages."""

    @property
    def span(self) -> tuple[int, int] | None:
        """Elements [start, stop) of the parameter in row-major order, None if it is no such run."""

    @property
    def groups(self) -> tuple[Any, ...]:
        """Process groups over which sums are taken; none where nothing is sharded."""

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this part of a tensor of the parameter's shape; it may share its memory."""

    def gradient(self) -> torch.Tensor | None:
        """Return the local gradient, to be changed in place."""

    def store(self, gradient: torch.Tensor) -> None:
        """Take back what `gradient` returned, where that was a copy."""

    def weight(self) -> torch.Tensor:
        """Return the local weights, to be read; the float32 master copy where there is one."""

    def move(self, weight: torch.Tensor) -> None:
        """Write local weights, the master copy and the one that computes."""


class Whole:
    """A parameter that this process holds whole."""

    kind = "whole"
    span = None
    groups: tuple[Any, ...] = ()

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole

    def gradient(self) -> torch.Tensor | None:
        return self.parameter.grad

    def store(self, gradient: torch.Tensor) -> None:
        pass

    def weight(self) -> torch.Tensor:
        return self.parameter.detach()

    def move(self, weight: torch.Tensor) -> None:
        self.parameter.detach().copy_(weight)


class Sharded:
    """A DTensor parameter: FSDP2, tensor parallelism, or both."""

    kind = "a DTensor of FSDP2 or tensor parallelism"

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._name = name
        tensor: Any = parameter
        mesh = self._mesh = tensor.device_mesh
        self._placements = tuple(tensor.placements)
        if any(placement.is_partial() for placement in self._placements):
            raise DriftError(f"{name} is a DTensor of partial sums, which is no parameter to train")
        # A strided shard is cut out of what the mesh dimensions to its right have cut already; its
        # split factor says into how many parts.
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
        self.groups = tuple(groups)
        self.span = self._rows()

    def _rows(self) -> tuple[int, int] | None:
        """Return the run of elements that this part is, if all cuts are along dimension 0."""
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
                f"as {self._placements}: it is not reduced yet, or laid out by someone else; call "
                "step() after the last backward, with gradient synchronisation on"
            )
        return _local(gradient)

    def store(self, gradient: torch.Tensor) -> None:
        pass

    def weight(self) -> torch.Tensor:
        return _local(self.parameter)

    def move(self, weight: torch.Tensor) -> None:
        _local(self.parameter).copy_(weight)


@torch.no_grad()
def _local(tensor: Any) -> torch.Tensor:
    """Return a DTensor's local tensor itself, not a copy, with nothing for autograd to follow."""
    local: torch.Tensor = tensor.to_local()
    return local.detach()


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
    """Yield name, parameter and full shape of every parameter, tied ones under each of their names.

    Raises:
        DriftError: parameters that are flattened or sharded in a way that is not supported.
    """
    fsdp1 = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    shapes: dict[str, tuple[int, ...]] = {}
    if fsdp1:
        from drift_fast.inject.shards.fsdp1 import full_shapes

        shapes = full_shapes(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in shapes:
            yield name, parameter, shapes[name]
        elif hasattr(parameter, "ds_id"):
            yield name, parameter, tuple(getattr(parameter, "ds_shape", parameter.shape))
        else:
            yield name, parameter, tuple(parameter.shape)


def pieces_of(
    names: Sequence[str], parameters: Sequence[nn.Parameter], model: nn.Module
) -> list[Piece]:
    """Return the part of each parameter that this process holds.

    Raises:
        DriftError: a parameter that is sharded in a way that is not supported.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        from drift_fast.inject.shards import fsdp1

        return fsdp1.pieces(list(names), list(parameters), model)
    return [_piece(*named) for named in zip(names, parameters, strict=True)]


def _piece(name: str, parameter: nn.Parameter) -> Piece:
    if hasattr(parameter, "device_mesh"):
        return Sharded(name, parameter)
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from drift_fast.inject.shards import zero

        return zero.piece(name, parameter)
    return Whole(parameter)


class Reduction:
    """Sums over the processes that share the same parameters, and agreement between them."""

    def __init__(self, groups: tuple[Any, ...]) -> None:
        self.groups = groups

    def sum(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes, in the given vector's memory where it can be.

        One collective for each group, of which there is one in all but two-dimensional meshes.
        """
        for group in self.groups:
            place = _device_of(group, vector.device)
            there = vector.to(place)
            dist.all_reduce(there, group=group)
            vector = there.to(vector.device)
        return vector

    def agree(self, error: Exception | None) -> None:
        """Raise on every process if one of them failed, so that none waits for it for ever.

        Raises:
            What this process failed with, or DriftError that another one did.
        """
        if not self.groups:
            if error is not None:
                raise error
            return
        failed = torch.tensor([0.0 if error is None else 1.0])
        total = self.sum(failed).item()
        if error is not None:
            raise error
        if total:
            raise DriftError("another process of this run could not attach; its message says why")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let no process go on alone to a sum that another one, which failed here, never reaches.

        Raises:
            As `agree`.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        self.agree(failure)


def groups_of(model: nn.Module) -> tuple[Any, ...]:
    """Return every process group over which parameters of a model are sharded."""
    if not isinstance(model, nn.Module) or not dist.is_available() or not dist.is_initialized():
        return ()
    fsdp1 = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    groups: dict[Any, None] = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            groups |= dict.fromkeys(Sharded(name, parameter).groups)
        elif fsdp1 or hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            return (dist.group.WORLD,)
    return tuple(groups)


def _device_of(group: Any, device: torch.device) -> torch.device:
    """Return a device that the group's backends can reduce on: `device` itself where they can."""
    # Of a group that was made without a backend, only this names all that it has.
    if device.type == "cpu" and "cpu:" not in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return device
