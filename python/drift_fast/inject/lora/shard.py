"""The part of an adapted weight that a process holds: rows of its Δ, and shards of its factors.

Owns which process holds which rows. All processes that share the factors hold equally many rows of
Δ, however the factors are cut. If W₀ of a DoRA is sharded, a process holds the same elements of Δ
as of W₀, so that neither travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from drift_fast.inject.lora import dora
from drift_fast.inject.lora.adapters import Adapted
from drift_fast.inject.shards.base import Shard, Whole
from drift_fast.inject.shards.dtensor import DTensorShard
from drift_fast.inject.shards.reduction import ranks_of
from drift_fast.inject.target import Target

Find = Callable[[Sequence[str], Sequence[nn.Parameter]], Sequence[Shard]]


def shards_of_targets(targets: Sequence[Target], find: Find) -> list[Shard]:
    """Return the part of each target that this process holds.

    find: returns the shards of named parameters.
    """
    named = [(t.name, p) for t in targets for p in _parameters(t)]
    found = iter(find([name for name, _ in named], [parameter for _, parameter in named]))
    return [
        next(found)
        if target.adapted is None
        else FactorShard(
            target.adapted,
            [next(found) for _ in target.adapted.parameters],
            next(found) if target.adapted.is_dora else None,
        )
        for target in targets
    ]


def _parameters(target: Target) -> tuple[nn.Parameter, ...]:
    if target.adapted is None:
        return (target.parameter,)
    return (*target.adapted.parameters, *target.adapted.beside)


class FactorShard:
    """Rows of a weight's Δ, and the shards of its factors; all of both where nothing is sharded.

    shards: those of `adapted.parameters`, in their order. base: that of a DoRA's W₀, which may be
    whole where the factors are not.
    """

    gathers = False

    def __init__(
        self, adapted: Adapted, shards: Sequence[Shard], base: Shard | None = None
    ) -> None:
        self.adapted = adapted
        self._shards = list(shards)
        self._base = base
        # torch may give parameters of one model equal meshes with groups of their own.
        groups = {ranks_of(one): one for shard in shards for one in shard.process_groups}
        self.process_groups: tuple[Any, ...] = tuple(groups.values())
        self.rows: tuple[int, int] | None = None
        self.span: tuple[int, int] | None = None
        self.follows_base = base is not None and bool(base.process_groups)
        if base is not None and self.follows_base:
            self.span = base.span
        elif self.process_groups:
            height, width = math.prod(adapted.shape[:-1]), adapted.shape[-1]
            self.rows = _share(height, self.process_groups)
            self.span = self.rows[0] * width, self.rows[1] * width
        trained = {id(parameter) for parameter in adapted.trained}
        self._trained = [
            at for at, parameter in enumerate(adapted.parameters) if id(parameter) in trained
        ]
        # Which factors count here, where several processes hold the same part of them.
        self._counts = [
            all(
                dist.get_rank(group) == 0
                for ranks, group in groups.items()
                if ranks not in map(ranks_of, shard.process_groups)
            )
            for shard in shards
        ]

    @property
    def is_whole(self) -> bool:
        """Whether the factors are parameters that this process holds whole."""
        return all(isinstance(shard, Whole) for shard in self._shards)

    @property
    def sharding(self) -> str:
        """What spread the factors over processes, for messages."""
        return self._shards[0].sharding

    @property
    def accumulated(self) -> tuple[torch.Tensor, ...]:
        """Tensors into which autograd accumulates."""
        return tuple(one for at in self._trained for one in self._shards[at].accumulated)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return what this process holds of Δ."""
        return whole if self.span is None else whole.reshape(-1)[slice(*self.span)]

    def gradient(self) -> torch.Tensor | None:
        raise TypeError("an adapted weight has gradients of its factors only")

    def write_gradient(self, gradient: torch.Tensor) -> None:
        raise TypeError("an adapted weight has gradients of its factors only")

    def write_weight(self, weight: torch.Tensor) -> None:
        raise TypeError("an adapted weight moves through its factors only")

    def weight(self) -> torch.Tensor:
        """Return the first factor's local weights, to see where they are and of which dtype."""
        return self._shards[0].weight()

    @property
    def trained(self) -> list[tuple[nn.Parameter, Callable[[], torch.Tensor]]]:
        """Each factor that trains, with what returns its local weights as `Shard.weight` does."""
        parameters = self.adapted.parameters
        return [(parameters[at], self._shards[at].weight) for at in self._trained]

    def gradients(self) -> list[torch.Tensor] | None:
        """Return the local gradients of what trains; None unless all are there."""
        gradients = []
        for at in self._trained:
            gradient = self._shards[at].gradient()
            if gradient is None:
                return None
            gradients.append(gradient)
        return gradients

    def write_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Take back what `gradients` returned, after it was changed."""
        for at, gradient in zip(self._trained, gradients, strict=True):
            self._shards[at].write_gradient(gradient)

    def weights(self) -> list[torch.Tensor]:
        """Return all factors, where this process holds them whole."""
        return [
            shard.weight().view(shape)
            for shard, shape in zip(self._shards, self.adapted.shapes, strict=True)
        ]

    def local(self) -> list[torch.Tensor]:
        """Return this process's part of all factors, to be read."""
        return [shard.weight() for shard in self._shards]

    def put(self, local: Sequence[torch.Tensor], wholes: Sequence[torch.Tensor]) -> None:
        """Write what `local` returned into whole factors, unless another process does."""
        for shard, part, whole, counts in zip(
            self._shards, local, wholes, self._counts, strict=True
        ):
            if counts:
                there = shard.cut(whole)
                there.copy_(part.view(there.shape))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The whole shape of each factor that trains."""
        return [self.adapted.shapes[at] for at in self._trained]

    def cuts(self, wholes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return this process's part of tensors like the factors that train, in their memory."""
        return [self._shards[at].cut(one) for at, one in zip(self._trained, wholes, strict=True)]

    def base(self) -> dora.Base | None:
        """Return what this process holds of a DoRA's W₀, to be read; None of other adapters."""
        if self._base is None:
            return None
        held = self._base.weight().reshape(-1)
        if self.span is None:
            return dora.Base(held)
        return dora.Base(held if self.follows_base else self.cut(held), self.span[0])

    @property
    def misfit(self) -> str:
        """What shards a DoRA's W₀ in another way than its factors or than by rows, or nothing."""
        if self._base is None or not self.follows_base:
            return ""
        groups = {tuple(map(ranks_of, s.process_groups)) for s in (self._base, *self._shards)}
        return self._base.sharding if self.span is None or len(groups) > 1 else ""

    @property
    def cuts_rows(self) -> bool:
        """Whether the norms of a DoRA's rows take sums over the processes; alike on all of them."""
        return self.follows_base and not isinstance(self._base, DTensorShard)

    @property
    def counted(self) -> list[bool]:
        """Whether sums count this process's part, for each factor that trains."""
        return [self._counts[at] for at in self._trained]


def _share(height: int, groups: Sequence[Any]) -> tuple[int, int]:
    """Return the rows [start, stop) that this process holds, by its place in each group."""
    start, stop = 0, height
    for group in groups:
        count, rank, size = dist.get_world_size(group), dist.get_rank(group), stop - start
        start, stop = start + size * rank // count, start + size * (rank + 1) // count
    return start, stop
