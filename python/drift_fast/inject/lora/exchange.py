"""Sharded factors of some targets: gathered, pulled back, and added up over processes.

Owns the collectives that factors and Δ̃ take, and the memory between them. Only what is as large as
the factors travels, and the norms of a DoRA's rows. The memory stays from step to step, so that the
kernels between two sums can be launched as one CUDA graph each.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch

from drift_fast.inject.lora import dora
from drift_fast.inject.lora.pull_back import pull_back_all
from drift_fast.inject.lora.shard import FactorShard
from drift_fast.inject.shards.reduction import Reduction

# Launches kernels: what they are called, where they read and write, and what launches them.
Launch = Callable[[Hashable, Callable[[], Hashable], Callable[[], None]], None]


class Room:
    """Memory that runs of targets use one after the other."""

    def __init__(self, numel: int, device: torch.device) -> None:
        self._numel, self._device = numel, device
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, use: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the flat buffer of a use, the same as before unless its dtype has changed."""
        held = self._buffers.get(use)
        if held is None or held.dtype != dtype:
            held = torch.empty(self._numel, dtype=dtype, device=self._device)
            self._buffers[use] = held
        return held


class Run:
    """Consecutive targets whose factors travel together.

    `pulled` is this process's part of Δ̃ by target: flat tensors, written by `pull_back`.
    """

    def __init__(
        self, first: int, shards: Sequence[FactorShard], reduction: Reduction, room: Room
    ) -> None:
        self.targets = range(first, first + len(shards))
        self.pulled: dict[int, list[torch.Tensor]] = {}
        self._shards, self._reduction, self._room = list(shards), reduction, room
        self._views: dict[str, tuple[torch.Tensor, list[list[torch.Tensor]]]] = {}
        self._owned: list[torch.Tensor] = []
        # How often there was new memory for `pulled`: a graph of the memory before must not run.
        self.generation = 0

    def factors(self, launch: Launch) -> list[list[torch.Tensor]]:
        """Return the whole factors, valid until another run asks; every process must call it."""
        if not self._reduction.process_groups:
            return [shard.weights() for shard in self._shards]
        local = [shard.local() for shard in self._shards]
        every = [one for some in local for one in some]
        dtype = functools.reduce(torch.promote_types, {one.dtype for one in every})
        shapes = [shard.adapted.shapes for shard in self._shards]
        flat, wholes = self._flat("factors", dtype, shapes)

        def put() -> None:
            flat.zero_()
            for shard, parts, whole in zip(self._shards, local, wholes, strict=True):
                shard.put(parts, whole)

        def addresses() -> Hashable:
            return flat.data_ptr(), tuple((one.data_ptr(), one.dtype) for one in every)

        launch(("put", self.targets.start), addresses, put)
        # Each element is that of one process and zero in the others, so the sum is exact.
        self._reduction.sum(flat)
        return wholes

    def bases(self, wholes: Sequence[Sequence[torch.Tensor]]) -> list[dora.Base | None]:
        """Return what this process holds of the W₀ of DoRAs, with the norms of rows that are cut.

        wholes: whole factors. Every process must call it.
        """
        shards = self._shards
        found = [shard.base() for shard in shards]
        cut = {at: one for at, one in enumerate(found) if one is not None and shards[at].cuts_rows}
        if cut:
            squares = [dora.squares(shards[at].adapted, wholes[at], one) for at, one in cut.items()]
            norms = self._reduction.sum(torch.cat(squares)).sqrt_()
            each = torch.split(norms, [one.numel() for one in squares])
            for (at, base), some in zip(cut.items(), each, strict=True):
                found[at] = replace(base, norms=some)
        return found

    def pull_back(
        self,
        deltas: Sequence[torch.Tensor] | Iterator[torch.Tensor],
        launch: Launch,
    ) -> None:
        """Write `pulled`; every process must call it, and use up an iterator of Δ."""
        wholes = self.factors(launch)
        beside = self.bases(wholes)
        adapted = [shard.adapted for shard in self._shards]
        rows = [shard.rows for shard in self._shards]
        double = any(one.dtype == torch.float64 for some in wholes for one in some)
        dtype = torch.float64 if double else torch.float32
        flat, parts = self._flat("pulled back", dtype, [shard.shapes for shard in self._shards])

        def pull() -> None:
            pulled = pull_back_all(deltas, adapted, wholes, rows, beside)
            torch.cat([part for some in pulled for part in some], out=flat)

        def addresses() -> Hashable:
            # What comes from elsewhere is waited for.
            if not isinstance(deltas, Sequence):
                return None
            scalings = tuple(factor.scaling for one in adapted for factor in one.factors)
            read = [one for some in wholes for one in some]
            places = tuple(one.data_ptr() for one in (flat, *read, *deltas))
            return places, tuple(one.dtype for one in read), scalings

        launch(("pull back", self.targets.start), addresses, pull)
        self._reduction.sum(flat)
        if not self._owned or self._owned[0].dtype != dtype:
            self._make_room(parts)
        here = flat.data_ptr(), self.generation

        def own() -> None:
            torch._foreach_copy_(self._owned, self._cuts(parts))

        launch(("own", self.targets.start), lambda: here, own)

    def _cuts(self, parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Return this process's part of tensors like all factors that train."""
        pairs = zip(self._shards, parts, strict=True)
        return [cut for shard, some in pairs for cut in shard.cuts(some)]

    def _make_room(self, parts: Sequence[Sequence[torch.Tensor]]) -> None:
        """Allocate `pulled`, to be what is cut from the given tensors.

        What has one shape is the rows of one matrix, which take one launch together.
        """
        self.generation += 1
        cuts = self._cuts(parts)
        rows = {
            shape: iter(cuts[0].new_empty(count, *shape).unbind())
            for shape, count in Counter(cut.shape for cut in cuts).items()
        }
        self._owned = [next(rows[cut.shape]) for cut in cuts]
        flat = iter(self._owned)
        self.pulled = {
            at: [next(flat).view(-1) for _ in shard.shapes]
            for at, shard in zip(self.targets, self._shards, strict=True)
        }

    def _flat(
        self, use: str, dtype: torch.dtype, shapes: Sequence[Sequence[tuple[int, ...]]]
    ) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """Return the buffer of a use, as long as these shapes need, and a view of each."""
        whole = self._room.take(use, dtype)
        if use not in self._views or self._views[use][0].dtype != dtype:
            sizes = [math.prod(shape) for some in shapes for shape in some]
            flat = whole[: sum(sizes)]
            parts = iter(torch.split(flat, sizes))
            views = [[next(parts).view(shape) for shape in some] for some in shapes]
            self._views[use] = flat, views
        return self._views[use]
