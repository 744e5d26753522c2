"""Loads runs of Δ: straight into host memory, or through a ring of it to a device.

Owns the ring, the stream that copies from it, and when a part of it may be filled again. All
threads of the engine fill memory at once; beside what is kept, the host holds the ring and what is
kept for a while, one tensor at a time. While a call lasts, the memory that it fills belongs to the
engine alone: tensors are made for it here and are seen by others only after it, and copies read no
part of the ring that the engine may fill.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from drift_fast.delta.delta import Delta
from drift_fast.delta.protocol import Run
from drift_fast.inject.compute.streams import new_stream
from drift_fast.inject.placement.page_locked import lock, pages
from drift_fast.progress_bar import Progress, ProgressCallback

# Enough for several copies under way while threads fill the rest.
_RING_NBYTES, _LEAST_NBYTES = 1 << 26, 1 << 23
# The engine hands out at most a quarter of the ring at a time.
_UNDER_WAY = 2
# Runs, and their bytes, whose memory is there before they come: while what was done with earlier
# ones is under way on the device, copies go on.
_AHEAD, _AHEAD_NBYTES = 3, 1 << 28
_REPORT_SECONDS = 0.05


@dataclass
class Wanted:
    """A run of Δ, and where it goes.

    make: returns the flat tensor that it goes to, before its first element comes.
    done: called when all of it is there, with it on the current stream of the device.
    for_a_while: whether `done` ends the need for the tensor, so that all of them at once would be
        too many.
    early: whether `done` reads nothing of a tensor in host memory, so that it need not wait until
        the engine has let go of all memory.
    """

    run: Run
    nbytes: int
    device: torch.device
    make: Callable[[], torch.Tensor]
    done: Callable[[], None] | None = None
    for_a_while: bool = False
    early: bool = False
    # ‖Δ‖², once it is loaded; NaN where Δ is not finite.
    square: float = 0.0


@torch.no_grad()
def load(delta: Delta, wanted: Sequence[Wanted], report: ProgressCallback) -> None:
    """Load all of them and set their squares.

    Raises:
        As `Delta.load`.
    """
    host = torch.device("cpu")
    on_host = [one for one in wanted if one.device == host]
    together = [one for one in on_host if not one.for_a_while]
    delta.fetch([one.run for one in wanted], report)
    progress = _Reported(wanted, report)
    for some in [together, *([one] for one in on_host if one.for_a_while)]:
        if some:
            _Direct(some, progress).load(delta)
    elsewhere = [one for one in wanted if one.device != host]
    if elsewhere:
        _Ring(elsewhere, progress).load(delta)
    progress.end()


# Run, first element, end element and offset in the ring of what is in memory.
_Parts = Sequence[tuple[int, int, int, int]]


class _Reported:
    """Reports how much has landed, about twenty times a second."""

    def __init__(self, wanted: Sequence[Wanted], report: ProgressCallback) -> None:
        self._report = report
        self._total = len(wanted), sum(one.nbytes for one in wanted)
        self._tensors = self._nbytes = 0
        self._next = 0.0

    def see(self, wanted: Sequence[Wanted], parts: _Parts) -> None:
        for number, start, stop, _ in parts:
            one = wanted[number]
            numel = one.run.stop - one.run.start
            self._nbytes += one.nbytes * (stop - start) // numel
            self._tensors += stop == numel
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _REPORT_SECONDS
            self.end()

    def end(self) -> None:
        count, nbytes = self._total
        self._report(Progress(self._tensors, count, self._nbytes, nbytes, "loading Δ"))


class _Direct:
    """Runs that are loaded straight to where they are kept, in host memory."""

    def __init__(self, wanted: Sequence[Wanted], progress: _Reported) -> None:
        self._wanted = wanted
        self._progress = progress
        self._calls = 0

    def load(self, delta: Delta) -> None:
        into = [one.make() for one in self._wanted]
        squares = delta.load([one.run for one in self._wanted], into, self._landed)
        for one, square in zip(self._wanted, squares, strict=True):
            one.square = square
            # The rest were done when they landed.
            if one.done is not None and not (one.early and one.run.start < one.run.stop):
                one.done()

    def _landed(self, parts: _Parts) -> int:
        self._progress.see(self._wanted, parts)
        for number, _, stop, _ in parts:
            one = self._wanted[number]
            if one.early and one.done is not None and stop == one.run.stop - one.run.start:
                one.done()
        self._calls += 1
        return self._calls


class _Ring:
    """Runs that pass through a ring of host memory to a device."""

    def __init__(self, wanted: Sequence[Wanted], progress: _Reported) -> None:
        self._wanted = wanted
        self._progress = progress
        self._device = wanted[0].device
        nbytes = min(_LEAST_NBYTES + sum(one.nbytes for one in wanted), _RING_NBYTES)
        self._ring = pages(nbytes, torch.uint8)
        self._lane: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._ring, self._lane = lock(self, self._ring), new_stream(self._device)
            self._current = torch.cuda.current_stream(self._device)
        self._made: dict[int, torch.Tensor] = {}
        # When the memory of a run may be written to: all that used it before is over then.
        self._writable: dict[int, torch.cuda.Event] = {}
        self._next = 0
        self._under_way: deque[torch.cuda.Event | None] = deque()
        self._over = 0

    def load(self, delta: Delta) -> None:
        # Changing streams changes the device.
        home = contextlib.nullcontext() if self._lane is None else torch.cuda.device(self._device)
        try:
            with home:
                squares = delta.load([one.run for one in self._wanted], self._ring, self._landed)
        finally:
            if self._lane is not None:
                # The ring, and after an error the tensors, are freed when this returns.
                self._lane.synchronize()
        self._make_up_to(len(self._wanted))
        for number, (one, square) in enumerate(zip(self._wanted, squares, strict=True)):
            one.square = square
            if one.run.start == one.run.stop:
                self._end(number)

    def _landed(self, parts: _Parts) -> int:
        self._progress.see(self._wanted, parts)
        if parts:
            self._make_up_to(self._ahead(parts[-1][0]))
        self._under_way.append(self._copy(parts))
        for number, _, stop, _ in parts:
            if stop == self._wanted[number].run.stop - self._wanted[number].run.start:
                self._end(number)
        while len(self._under_way) > _UNDER_WAY:
            copied = self._under_way.popleft()
            if copied is not None:
                copied.synchronize()
            self._over += 1
        return self._over

    def _copy(self, parts: _Parts) -> torch.cuda.Event | None:
        """Copy what has landed on the stream for it, and have the current one wait for it."""
        if self._lane is None:
            self._copy_on_stream(parts)
            return None
        for number, start, _, _ in parts:
            if start == 0:
                self._lane.wait_event(self._writable.pop(number))
        # A context would take the host longer than the copies.
        torch.cuda.set_stream(self._lane)
        try:
            self._copy_on_stream(parts)
        finally:
            torch.cuda.set_stream(self._current)
        copied: torch.cuda.Event = self._lane.record_event()
        self._current.wait_event(copied)
        return copied

    def _copy_on_stream(self, parts: _Parts) -> None:
        for number, start, stop, offset in parts:
            out = self._made[number][start:stop]
            source = self._ring[offset : offset + out.nbytes].view(out.dtype)
            out.copy_(source, non_blocking=self._lane is not None)

    def _ahead(self, number: int) -> int:
        """Return the end of the runs whose memory is made when this one comes."""
        stop, nbytes = number + 1, 0
        for one in self._wanted[stop : stop + _AHEAD]:
            nbytes += one.nbytes
            if nbytes > _AHEAD_NBYTES:
                break
            stop += 1
        return stop

    def _make_up_to(self, stop: int) -> None:
        """Make the tensors of all runs before number `stop`."""
        new = range(self._next, stop)
        for number in new:
            self._made[number] = self._wanted[number].make()
        if new and self._lane is not None:
            self._writable |= dict.fromkeys(new, self._current.record_event())
        self._next = stop

    def _end(self, number: int) -> None:
        del self._made[number]
        done = self._wanted[number].done
        if done is not None:
            done()
