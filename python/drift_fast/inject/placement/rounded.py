"""What becomes of the Δ of one target on loading, where it is kept as int8.

Owns the memory that blocks are loaded into until they are codes, and which targets are rounded,
decoded and measured in one go.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

import torch

from drift_fast.delta.delta import Delta
from drift_fast.delta.protocol import DeltaLike, Run
from drift_fast.dtypes import INT8_BLOCK
from drift_fast.inject.compute.base import Arithmetic
from drift_fast.inject.compute.host import norm_of
from drift_fast.inject.compute.streams import new_stream
from drift_fast.inject.placement.int8 import Int8, quantize
from drift_fast.inject.placement.int8_blocks import Int8Blocks
from drift_fast.inject.placement.pipeline import Wanted
from drift_fast.inject.placement.places import Loaded, Starts, lockers
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.target import DeltaReader, Target

# Batches whose codes go to host memory at a time; until they are there they are on the GPU too.
_MOVING = 4


class Rounding:
    """What all batches share: the arithmetic, and memory to decode in.

    to_host: codes go back to host memory, on threads and a few at a time.
    """

    def __init__(self, arithmetic: Arithmetic, starts: Starts, *, to_host: bool) -> None:
        self.arithmetic, self.starts = arithmetic, starts
        self.device = arithmetic.device
        self._to_host = to_host and self.device.type == "cuda"
        self._moving: deque[Future[None]] = deque()
        self._scratch = torch.empty(0, dtype=Int8.dtype, device=self.device)

    def settle(self, held: Int8) -> None:
        """Take codes to where they are kept, once what uses them on the current stream is over."""
        if not self._to_host:
            return
        over = torch.cuda.current_stream(self.device).record_event()
        self._moving.append(lockers(self.device).submit(_move, held, over, self.device))
        self.wait(_MOVING)

    def wait(self, most: int = 0) -> None:
        """Wait until at most so many are still on their way."""
        while len(self._moving) > most:
            self._moving.popleft().result()

    def values(self, held: Int8) -> torch.Tensor:
        """Return what codes stand for, until the next call."""
        numel = held.codes.numel()
        if self._scratch.numel() < numel:
            self._scratch = torch.empty(numel, dtype=held.dtype, device=self.device)
        held.fill(self._scratch[:numel])
        return self._scratch[:numel]


def _move(held: Int8, over: torch.cuda.Event, device: torch.device) -> None:
    lane = new_stream(device)
    lane.wait_event(over)
    with torch.cuda.stream(lane):
        held.to_host()


@dataclass(frozen=True)
class _Member:
    """The blocks of a target that this process takes."""

    target: Target
    shard: Shard
    numel: int
    # Which elements of them it holds.
    run: slice

    @property
    def count(self) -> int:
        return -(-self.numel // INT8_BLOCK)


class Rounded:
    """Δ as int8: the codes of an int8 delta, or values that are rounded here."""

    # The batch that this is loaded in, and its place there.
    _batch: _Batch
    _at: int

    def __init__(self, target: Target, shard: Shard, delta: DeltaLike, rounding: Rounding) -> None:
        self._target, self._shard, self._delta, self._rounding = target, shard, delta, rounding
        self._blocks = Int8Blocks.around(target, shard)
        start, stop = self._blocks.span or (0, target.numel(shard))
        self._member = _Member(target, shard, stop - start, self._blocks.run)
        # Which of the runs has the values that this process holds; None of codes.
        self._own: int | None = None
        self._exact_norm: float | None = None

    @classmethod
    def lay_out(cls, places: Sequence[Rounded]) -> None:
        """Let those that are loaded one after the other be rounded and measured together."""
        some: list[Rounded] = []
        numel = 0
        for place in places:
            if not place._member.numel:
                # It comes after all that has elements.
                cls._join_all([place])
                continue
            if some and numel + place._member.numel > place._rounding.starts.room:
                cls._join_all(some)
                some, numel = [], 0
            some.append(place)
            numel += place._member.numel
        cls._join_all(some)

    @staticmethod
    def _join_all(places: Sequence[Rounded]) -> None:
        if places:
            batch = _Batch([one._member for one in places], places[0]._rounding)
            for at, one in enumerate(places):
                one._batch, one._at = batch, at

    def wanted(self, delta: Delta) -> list[Wanted] | None:
        runs = self._blocks.runs(codes=delta.has_codes)
        if runs is None:
            return None
        if delta.has_codes:
            codes, scales = runs
            found = [self._part(codes, "codes", torch.int8)]
            found.append(self._part(scales, "scales", torch.float16))
        else:
            own, first = runs[1], runs[0].start
            some = [run for run in runs if run.start < run.stop] or [own]
            dtype = getattr(torch, delta.dtype)
            found = [self._part(run, "values", dtype, run.start - first) for run in some]
            self._own = some.index(own)
        found[-1].done = lambda: self._batch.landed()
        return found

    def take(self, delta: DeltaReader) -> None:
        stored = self._blocks.stored(self._delta)
        if stored is None:
            values = self._blocks.values(delta)
            self._exact_norm = norm_of(values[self._member.run])
            stored = quantize(values.to(self._rounding.device))
        self._join_all([self])
        self._batch.keep(*stored)

    def loaded(self, wanted: Sequence[Wanted]) -> Loaded:
        self._rounding.wait()
        norm, exact_norm = self._batch.norms[self._at], self._exact_norm
        if self._own is not None:
            exact_norm = wanted[self._own].square ** 0.5
        mine = self._batch.held.part(self._batch.blocks[self._at], self._member.run)
        # What is injected is what was rounded, so its norm counts.
        exact = norm if exact_norm is None else exact_norm
        start = self._batch.starts[self._at].value
        return Loaded(self._target, self._shard, mine, norm, exact, start)

    def _part(self, run: Run, what: str, dtype: torch.dtype, at: int = 0) -> Wanted:
        """Return a run that fills this target's part of a memory of the batch, from `at` on."""
        length = run.stop - run.start

        def make() -> torch.Tensor:
            return self._batch.part(self._at, what, dtype)[at : at + length]

        nbytes, passing = length * dtype.itemsize, what == "values"
        return Wanted(run, nbytes, self._rounding.device, make, for_a_while=passing)


class _Batch:
    """Targets whose blocks lie one behind the other, so that a launch does for all of them."""

    def __init__(self, members: Sequence[_Member], rounding: Rounding) -> None:
        self._members, self._rounding = members, rounding
        self._lacking = len(members)
        ends = list(itertools.accumulate(one.count for one in members))
        self.blocks = [slice(*pair) for pair in itertools.pairwise([0, *ends])]
        self._memory: dict[str, torch.Tensor] = {}

    def part(self, at: int, what: str, dtype: torch.dtype) -> torch.Tensor:
        """Return what a member's codes, scales or values are loaded into, flat."""
        each = 1 if what == "scales" else INT8_BLOCK
        if what not in self._memory:
            # Zeros behind the last element of a block that is not full.
            full = all(one.numel % INT8_BLOCK == 0 for one in self._members)
            make, numel = torch.empty if full else torch.zeros, self.blocks[-1].stop * each
            self._memory[what] = make(numel, dtype=dtype, device=self._rounding.device)
        blocks = self.blocks[at]
        return self._memory[what][blocks.start * each : blocks.stop * each]

    def landed(self) -> None:
        """Go on when all members are there."""
        self._lacking -= 1
        if self._lacking == 0:
            values = self._memory.pop("values", None)
            if values is None:
                codes, scales = self._memory.pop("codes"), self._memory.pop("scales")
            else:
                codes, scales = quantize(values)
                # What follows needs memory of its own.
                del values
            self.keep(codes, scales)

    def keep(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Keep all codes, and measure what they stand for."""
        rounding, each = self._rounding, []
        self.held = Int8(codes, scales).to(rounding.device)
        values = rounding.values(self.held)
        for one, blocks in zip(self._members, self.blocks, strict=True):
            first = blocks.start * INT8_BLOCK
            each.append(values[first + one.run.start : first + one.run.stop])
        self._norms = rounding.arithmetic.measure(each, None).norm
        self.starts = [
            rounding.starts.add(one.target, one.shard, some)
            for one, some in zip(self._members, each, strict=True)
        ]
        # What follows is decoded into the same memory.
        rounding.starts.measure()
        rounding.settle(self.held)

    @cached_property
    def norms(self) -> list[float]:
        """‖Δ‖ of each as it is injected; waits for the device."""
        found: list[float] = self._norms.tolist()
        return found
