"""How a model gives gradients: one of a single process, one that DDP wraps, a sharded one.

Owns what of this differs: what the loss is given, how backward runs, where the gradient is after
it, and which processes go in step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.shards import zero
from drift_fast.inject.shards.base import Shard, Whole
from drift_fast.inject.shards.find import all_processes, processes_of, shards_of
from drift_fast.inject.shards.fsdp1 import find_fsdp1
from drift_fast.inject.shards.reduction import Reduction
from drift_fast.inject.shards.zero_support import is_engine, optimizer_of
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
        self.sharded = Reduction(processes_of(model))
        self.everyone = Reduction(replicas + self.sharded.process_groups)
        self.is_first = all(dist.get_rank(one) == 0 for one in self.everyone.process_groups)

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

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Be ready for backward.

        Raises:
            DriftError: gradients are under way that could not be put back afterwards.
        """
        if find_fsdp1(self.module) and any(p.grad is not None for p in self.module.parameters()):
            raise DriftError(
                "parameters under FSDP1 have gradients, which this would drop: protect Δ before "
                "training, or after optimizer.zero_grad()"
            )
        yield

    def folds(self, shard: Shard) -> bool:
        """Whether a gradient is final as soon as autograd has accumulated it."""
        return isinstance(shard, Whole)

    def backward(self, loss: Any) -> None:
        """Run backward from a loss, until `Shard.gradient` returns what there is."""
        loss.backward()

    def drop(self) -> None:
        """Remove the gradients of all parameters."""
        for parameter in self.module.parameters():
            parameter.grad = None

    def join(self, vectors: Sequence[list[torch.Tensor]]) -> None:
        """Add up what replicas of the model found."""
        for some in vectors:
            some[:] = [self.replicas.sum(one) for one in some]


class EngineWay(Way):
    """A DeepSpeed engine: its backward reduces, and its optimizer holds the gradients."""

    def __init__(self, engine: Any) -> None:
        self._optimizer = optimizer_of(engine)
        super().__init__(engine.module)
        self.model = engine
        self.sharded = self.everyone = Reduction(all_processes())
        self.is_first = dist.get_rank() == 0

    def shards(self, targets: Sequence[Target]) -> list[Shard]:
        names = [target.name for target in targets]
        return zero.shards(names, [target.parameter for target in targets], self._optimizer)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        engine: Any = self.model
        if engine.micro_steps % engine.gradient_accumulation_steps():
            raise DriftError(
                "the DeepSpeed engine is in the middle of a step, whose gradients this would drop: "
                "protect Δ before training, or after the last engine.step() of a step"
            )
        boundary = engine._is_gradient_accumulation_boundary
        # Every batch is reduced at once.
        engine.set_gradient_accumulation_boundary(True)
        try:
            yield
        finally:
            engine.set_gradient_accumulation_boundary(boundary)

    def folds(self, shard: Shard) -> bool:
        return False

    def backward(self, loss: Any) -> None:
        self.model.backward(loss)
        zero.settle(self._optimizer)

    def drop(self) -> None:
        zero.forget(self._optimizer)
        super().drop()


def way_of(model: nn.Module) -> Way:
    """Return how a model gives gradients.

    Raises:
        DriftError: a DeepSpeed engine whose gradients cannot be reached.
    """
    return EngineWay(model) if is_engine(model) else Way(model)


def gathered(target: Target, shard: Shard, part: torch.Tensor) -> torch.Tensor:
    """Return values of a whole target, flat, from the part that each process has."""
    if not shard.process_groups:
        return part
    whole = torch.zeros(target.shape, dtype=part.dtype, device=shard.weight().device)
    local = shard.cut(whole)
    local.copy_(part.view(local.shape))
    return Reduction(shard.process_groups).sum(whole).reshape(-1)
