"""How a model gives gradients: one of a single process, one that DDP wraps, a sharded one.

Owns what of this differs: what the loss is given, how backward runs, where the gradient is after
it, and which processes go in step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.shards.find import process_groups_of, shards_of
from drift_fast.inject.shards.reduction import Reduction
from drift_fast.inject.target import Target


class Way:
    """A model of torch, whole or sharded over processes.

    What DDP wraps runs without it: sums of gradients are added up over its processes once, in
    float32, in place of every batch's in the weights' dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        replicas: tuple[Any, ...] = ()
        if isinstance(model, nn.parallel.DistributedDataParallel):
            replicas = (model.process_group,)
            model = model.module
        self.module = model
        # What the loss is given.
        self.model: Any = model
        self.replicas = Reduction(replicas)
        self.sharded = Reduction(process_groups_of(model))
        self.everyone = Reduction(tuple(dict.fromkeys(replicas + self.sharded.process_groups)))
        self.is_first = not self.everyone.process_groups or dist.get_rank() == 0

    def shards(self, targets: Sequence[Target]) -> list[Shard]:
        """Return how the gradient of each target is reached."""
        names = [target.name for target in targets]
        return shards_of(names, [target.parameter for target in targets], self.module)

    def in_step(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches; where parameters are sharded, while every process has one.

        Raises:
            DriftError: some processes have fewer batches than others.
        """
        size = math.prod(dist.get_world_size(one) for one in self.sharded.process_groups)
        for batch in batches:
            if self._have(1) < size:
                raise DriftError(
                    "another process has fewer batches, and a sharded model needs all processes "
                    "for each: give every process equally many"
                )
            yield batch
        if self._have(0):
            raise DriftError(
                "this process has fewer batches than another, and a sharded model needs all "
                "processes for each: give every process equally many"
            )

    def _have(self, count: int) -> int:
        return int(self.sharded.sum(torch.tensor([float(count)])).item())

    def backward(self, loss: Any) -> None:
        """Run backward from a loss."""
        loss.backward()

    def drop(self) -> None:
        """Remove the gradients of all parameters."""
        for parameter in self.module.parameters():
            parameter.grad = None

    def join(self, vectors: Sequence[list[torch.Tensor]]) -> None:
        """Add up what replicas of the model found."""
        for some in vectors:
            some[:] = [self.replicas.sum(one) for one in some]


def gathered(target: Target, shard: Shard, part: torch.Tensor) -> torch.Tensor:
    """Return values of a whole target, flat, from the part that each process has."""
    if not shard.process_groups:
        return part
    whole = torch.zeros(target.shape, dtype=part.dtype, device=shard.weight().device)
    local = shard.cut(whole)
    local.copy_(part.view(local.shape))
    return Reduction(shard.process_groups).sum(whole).reshape(-1)
