"""All Δ of a target group, and how it comes to the gradients' device when it is needed.

Owns Δ's memory on the device: all of it, or a ring of buffers that is filled again while earlier
ones are used. Buckets are runs of targets in the order in which backward finishes their gradients.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from drift_fast.dtypes import INT8_BLOCK
from drift_fast.inject.compute.streams import new_stream
from drift_fast.inject.placement.held import Held, OnDisk
from drift_fast.inject.placement.int8 import Apart, Int8

# Buffers of the ring: one is used while others fill. More of them are free again sooner, fewer
# take fewer launches.
_SLOTS, _MOST_SLOTS = 4, 8
_SLOT_NBYTES = 1 << 28


class Store(Protocol):
    """All Δ of a target group."""

    buckets: list[tuple[int, int]]
    nbytes: int
    # What holds every Δ exactly.
    dtype: torch.dtype

    def batches(self) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """Yield runs of targets [start, stop) with their Δ, which is valid until the next one."""

    def bucket(self, at: int) -> contextlib.AbstractContextManager[list[torch.Tensor]]:
        """Give the Δ of one bucket, valid inside the context."""

    def fill_ahead(self) -> None:
        """Begin to bring the Δ of the first buckets to the device, where they are not there."""

    def release(self) -> None:
        """Free Δ now."""


def _joint_dtype(held: Sequence[Held] | Sequence[torch.Tensor]) -> torch.dtype:
    """Return a dtype that holds every Δ exactly."""
    return functools.reduce(torch.promote_types, [one.dtype for one in held])


class Resident:
    """All Δ on the gradients' device; `nbytes` is what that takes there."""

    def __init__(self, deltas: Sequence[torch.Tensor], buckets: list[tuple[int, int]]) -> None:
        self.deltas = list(deltas)
        self.buckets = buckets
        self.nbytes = sum(delta.nbytes for delta in self.deltas)
        self.dtype = _joint_dtype(self.deltas)

    def batches(self) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        yield 0, len(self.deltas), self.deltas

    @contextlib.contextmanager
    def bucket(self, at: int) -> Iterator[list[torch.Tensor]]:
        start, stop = self.buckets[at]
        yield self.deltas[start:stop]

    def fill_ahead(self) -> None:
        """Do nothing: all of Δ is there."""

    def release(self) -> None:
        self.deltas.clear()


class Ring:
    """Δ elsewhere; a ring of buffers on the device is filled ahead, bucket after bucket.

    While the last bucket of a step is used, the first ones of the next are on their way.
    """

    def __init__(
        self, held: Sequence[Held], tail: Sequence[torch.Tensor], device: torch.device, nbytes: int
    ) -> None:
        self._held = list(held)
        self._tail = list(tail)
        self.dtype = _joint_dtype(held)
        padded = [-(-(one.lead + one.numel) // INT8_BLOCK) * INT8_BLOCK for one in held]
        most = max(_SLOTS, min(_MOST_SLOTS, nbytes // _SLOT_NBYTES))
        slot = max(max(padded), nbytes // self.dtype.itemsize // most)
        self.buckets = []
        start = size = 0
        for at, numel in enumerate(padded):
            if size and size + numel > slot:
                self.buckets.append((start, at))
                start, size = at, 0
            size += numel
        self.buckets.append((start, len(held)))
        self._padded = padded
        self._count = len(self.buckets)
        slots = min(most, self._count)
        # No wider than the widest bucket, which may need far less than was allowed.
        slot = max(sum(padded[start:stop]) for start, stop in self.buckets)
        self._slots = [torch.empty(slot, dtype=self.dtype, device=device) for _ in range(slots)]
        if tail:
            self.buckets.append((len(held), len(held) + len(tail)))
        self._sources = [self._source(range(*bucket)) for bucket in self.buckets[: self._count]]
        resident = sum(d.nbytes for d in tail) + sum(buffer.nbytes for buffer in self._slots)
        codes = [one.nbytes for one in held if isinstance(one, Int8) and one.codes.device == device]
        self.nbytes = resident + sum(codes)
        self._lane = new_stream(device) if device.type == "cuda" else None
        if self._lane is not None:
            self._lane.wait_stream(torch.cuda.current_stream(device))
        self._filled: list[Any] = [None] * slots
        self._used: list[Any] = [None] * slots
        # Reading a file blocks, so a thread of its own does it.
        slow = any(isinstance(one, OnDisk) for one in held)
        self._reader: ThreadPoolExecutor | None = None
        if slow:
            self._start_reader()
        self._next = self._head = 0

    def batches(self) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        for at, (start, stop) in enumerate(self.buckets):
            with self.bucket(at) as deltas:
                yield start, stop, deltas

    @contextlib.contextmanager
    def bucket(self, at: int) -> Iterator[list[torch.Tensor]]:
        if at == self._count:
            yield self._tail
            return
        if self._reader is not None and self._reader_of != os.getpid():
            # A fork of the process has no threads.
            self._start_reader()
            self._turn_to(at)
        if self._head % self._count != at:
            self._turn_to(at)
        self.fill_ahead()
        slot = self._head % len(self._slots)
        filled = self._filled[slot]
        if isinstance(filled, Future):
            try:
                filled = filled.result()
            except BaseException:
                # What failed is read again in the next step.
                self._turn_to(at)
                raise
        if self._lane is not None:
            torch.cuda.current_stream(self._slots[slot].device).wait_event(filled)
        yield self._views(at, slot)
        if self._lane is not None:
            self._used[slot] = torch.cuda.current_stream(self._slots[slot].device).record_event()
        self._head += 1
        if len(self._slots) < self._count:
            self._fill(self._next)
            self._next += 1

    def _start_reader(self) -> None:
        self._reader, self._reader_of = ThreadPoolExecutor(1, "drift-fast-reader"), os.getpid()

    def release(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        if self._lane is not None:
            # Buffers that are still being filled must not be allocated again.
            torch.cuda.current_stream(self._lane.device).wait_stream(self._lane)
            # Nor may the host's memory be unlocked that they are filled from.
            self._lane.synchronize()
        self._filled.clear()
        self._held.clear()
        self._sources.clear()
        self._tail.clear()
        self._slots.clear()

    def _turn_to(self, at: int) -> None:
        """Start the ring at another bucket, where a step was cut off by an error."""
        for filled in self._filled:
            if isinstance(filled, Future):
                filled.cancel()
        # A fill that had begun writes to its slot before the next one does: both are in order.
        first = self._next
        self._head = first + (at - first) % self._count
        self._next = self._head
        self._filled = [None] * len(self._slots)

    def _views(self, at: int, slot: int) -> list[torch.Tensor]:
        views, place = [], 0
        for member in range(*self.buckets[at]):
            held = self._held[member]
            first = place + held.lead
            views.append(self._slots[slot][first : first + held.numel])
            place += self._padded[member]
        return views

    def _source(self, members: range) -> list[tuple[Held | Apart, int, int]]:
        """Return what fills a bucket, each with the elements of the buffer that it fills."""
        some = [self._held[member] for member in members]
        codes = [one for one in some if isinstance(one, Int8)]
        if len(codes) == len(some):
            there = codes[0].codes.device == self._slots[0].device
            one = Int8.joined(codes) if there else Apart(codes)
            return [(one, 0, one.numel)]
        ends = list(itertools.accumulate(self._padded[member] for member in members))
        return list(zip(some, [0, *ends[:-1]], ends, strict=True))

    def fill_ahead(self) -> None:
        while self._next < self._head + len(self._slots):
            self._fill(self._next)
            self._next += 1

    def _fill(self, turn: int) -> None:
        at, slot = turn % self._count, turn % len(self._slots)
        if len(self._slots) >= self._count and self._filled[slot] is not None:
            return
        used, buffer = self._used[slot], self._slots[slot]
        sources = self._sources[at]

        def fill() -> Any:
            for source, start, stop in sources:
                source.fill(buffer[start:stop])

        def on_lane() -> Any:
            if self._lane is None:
                fill()
                return True
            if used is not None:
                self._lane.wait_event(used)
            with torch.no_grad(), torch.cuda.stream(self._lane):
                fill()
                return self._lane.record_event()

        self._filled[slot] = self._reader.submit(on_lane) if self._reader else on_lane()
