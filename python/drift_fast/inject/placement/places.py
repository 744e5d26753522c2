"""What becomes of the Δ of one target on loading, for each way of keeping it.

Owns the memory that Δ is loaded into, the norm of what will be injected, and where the weight
starts along it. Every place takes runs of elements from `pipeline`, or a tensor that is not a run
of the delta's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from drift_fast.delta.delta import Delta
from drift_fast.delta.protocol import DeltaLike, Run
from drift_fast.errors import DriftError
from drift_fast.inject.compute.base import Arithmetic
from drift_fast.inject.compute.host import norm_of
from drift_fast.inject.compute.streams import new_stream
from drift_fast.inject.placement.held import Held, InHostMemory, OnDisk
from drift_fast.inject.placement.int8 import Int8, quantize
from drift_fast.inject.placement.int8_blocks import Int8Blocks
from drift_fast.inject.placement.page_locked import pages
from drift_fast.inject.placement.pipeline import Wanted
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.target import DeltaReader, Target

# Tensors whose codes go to host memory at a time; until they are there they are on the GPU too.
_MOVING = 8


@dataclass
class Loaded:
    """One target with its Δ where it is kept, and ‖Δ‖: of this process, later of all of them."""

    target: Target
    shard: Shard
    delta: Held | torch.Tensor
    norm: float
    # ‖Δ‖ before it was rounded to int8 here; the same where it was not.
    exact_norm: float
    # ⟨W, Δ⟩ of this process's part, a vector of one element, where it was taken on loading.
    start: torch.Tensor | None = None


class Place(Protocol):
    """Where the Δ of one target goes."""

    def wanted(self, delta: Delta) -> list[Wanted] | None:
        """Return the runs to load, or None where `take` has to read what is not a run."""

    def take(self, delta: DeltaReader) -> None:
        """Read what is not a run."""

    def loaded(self) -> Loaded:
        """Return what was loaded; it may wait for the device."""


def _start_along(
    delta: torch.Tensor, target: Target, shard: Shard, on: Arithmetic
) -> torch.Tensor | None:
    """Return ⟨W, Δ⟩ while Δ is at hand.

    None of an adapter, which is not compared with Δ in this way, and where W has to be gathered:
    processes need not load in one order.
    """
    if target.adapted is not None or shard.gathers:
        return None
    return on.measure([shard.weight().contiguous().view(-1)], [delta], wide=True).dot


class _Exact(ABC):
    """A Δ that is kept as it is.

    on: what computes beside the gradients. device: where Δ is loaded to.
    """

    # As in `Wanted`.
    _for_a_while = _early = False
    _start: torch.Tensor | None = None

    def __init__(
        self, target: Target, shard: Shard, on: Arithmetic, device: torch.device | None = None
    ) -> None:
        self._target, self._shard, self._on = target, shard, on
        self._device = on.device if device is None else device
        self._run: Wanted | None = None
        self._dtype = torch.float32
        self._norm = 0.0

    def wanted(self, delta: Delta) -> list[Wanted] | None:
        run = self._target.run(self._shard)
        if run is None:
            return None
        self._dtype = getattr(torch, delta.dtype)
        nbytes = (run.stop - run.start) * self._dtype.itemsize
        self._run = Wanted(run, nbytes, self._device, self._make, self._done)
        self._run.for_a_while, self._run.early = self._for_a_while, self._early
        return [self._run]

    def take(self, delta: DeltaReader) -> None:
        tensor = self._target.read(delta, self._shard)
        self._dtype, self._norm = tensor.dtype, norm_of(tensor)
        self._make().copy_(tensor)
        self._done()

    def loaded(self) -> Loaded:
        norm = self._norm if self._run is None else self._run.square**0.5
        return Loaded(self._target, self._shard, self._held(), norm, norm, self._start)

    @abstractmethod
    def _make(self) -> torch.Tensor:
        """Return the tensor that Δ is loaded into."""

    @abstractmethod
    def _done(self) -> None:
        """Go on with what was loaded."""

    @abstractmethod
    def _held(self) -> Held | torch.Tensor:
        """Return Δ where it is kept."""

    @property
    def _numel(self) -> int:
        return self._target.numel(self._shard)


class Beside(_Exact):
    """Δ on the gradients' device."""

    _tensor: torch.Tensor | None = None

    @staticmethod
    def lay_out(places: Sequence[Beside], dtype: torch.dtype) -> None:
        """Make Δ of adapted weights of one shape the rows of a matrix.

        Their products with factors then take one launch.
        """
        alike: dict[Hashable, list[Beside]] = {}
        for one in places:
            if one._target.adapted is not None:
                alike.setdefault((one._target.shape, one._numel), []).append(one)
        for some in alike.values():
            shape = len(some), some[0]._numel
            rows = torch.empty(shape, dtype=dtype, device=some[0]._device)
            for one, row in zip(some, rows.unbind(), strict=True):
                one._tensor = row

    def _make(self) -> torch.Tensor:
        if self._tensor is None or self._tensor.dtype != self._dtype:
            self._tensor = torch.empty(self._numel, dtype=self._dtype, device=self._device)
        return self._tensor

    def _done(self) -> None:
        self._start = _start_along(self._held(), self._target, self._shard, self._on)

    def _held(self) -> torch.Tensor:
        assert self._tensor is not None
        return self._tensor


class OnHost(_Exact):
    """Δ in page-locked memory, which is locked while the next ones are read."""

    _early = True

    def __init__(self, target: Target, shard: Shard, on: Arithmetic) -> None:
        super().__init__(target, shard, on, torch.device("cpu"))

    def _make(self) -> torch.Tensor:
        self._tensor = pages(self._numel, self._dtype)
        return self._tensor

    def _done(self) -> None:
        lockers = _lockers(self._on.device)
        self._locked: Future[InHostMemory] = lockers.submit(InHostMemory, self._tensor)

    def _held(self) -> Held:
        return self._locked.result()


@cache
def _lockers(device: torch.device) -> ThreadPoolExecutor:
    """Return threads that lock memory; on another device each would start a context there."""
    start = torch.cuda.set_device if device.type == "cuda" else str
    return ThreadPoolExecutor(4, "drift-fast-lock", start, (device,))


class Unread(_Exact):
    """Δ in its files, to be read again whenever it is needed; now it is only measured."""

    _for_a_while = True

    def __init__(self, target: Target, shard: Shard, on: Arithmetic, delta: DeltaReader) -> None:
        super().__init__(target, shard, on)
        self._delta = delta

    def _make(self) -> torch.Tensor:
        self._tensor = torch.empty(self._numel, dtype=self._dtype, device=self._device)
        return self._tensor

    def _done(self) -> None:
        self._start = _start_along(self._tensor, self._target, self._shard, self._on)
        del self._tensor

    def _held(self) -> Held:
        return OnDisk(self._numel, self._dtype, self._read)

    def _read(self, out: torch.Tensor) -> None:
        try:
            self._target.read_into(self._delta, self._shard, out)
        except (OSError, DriftError) as error:
            raise DriftError(
                f"{self._target.delta_name}: Δ could not be read again, as residency='disk' does "
                f"in every step: {error}. Keep the files of the delta, or of both checkpoints, as "
                "they are until training ends, or attach with residency='host' or 'device'"
            ) from error


class Rounding:
    """What all targets share that are rounded to int8: the arithmetic, and memory to decode in.

    to_host: codes go back to host memory, on threads and a few at a time.
    """

    def __init__(self, arithmetic: Arithmetic, *, to_host: bool) -> None:
        self.arithmetic = arithmetic
        self._to_host = to_host and arithmetic.device.type == "cuda"
        self._moving: deque[Future[None]] = deque()
        self._scratch = torch.empty(0, dtype=Int8.dtype, device=arithmetic.device)

    def settle(self, held: Int8) -> None:
        """Take codes to where they are kept, once what uses them on the current stream is over."""
        device = self.arithmetic.device
        if not self._to_host:
            return
        over = torch.cuda.current_stream(device).record_event()
        self._moving.append(_lockers(device).submit(_move, held, over, device))
        self.wait(_MOVING)

    def wait(self, most: int = 0) -> None:
        """Wait until at most so many are still on their way."""
        while len(self._moving) > most:
            self._moving.popleft().result()

    def values(self, held: Int8, run: slice) -> torch.Tensor:
        """Return the elements of a run, decoded, until the next call."""
        numel = held.codes.numel()
        if self._scratch.numel() < numel:
            device = self.arithmetic.device
            self._scratch = torch.empty(numel, dtype=held.dtype, device=device)
        held.fill(self._scratch[:numel])
        return self._scratch[run]


def _move(held: Int8, over: torch.cuda.Event, device: torch.device) -> None:
    lane = new_stream(device)
    lane.wait_event(over)
    with torch.cuda.stream(lane):
        held.to_host()


class Rounded:
    """Δ as int8: the codes of an int8 delta, or values that are rounded here."""

    def __init__(self, target: Target, shard: Shard, delta: DeltaLike, rounding: Rounding) -> None:
        self._target, self._shard, self._delta, self._rounding = target, shard, delta, rounding
        self._device = rounding.arithmetic.device
        self._blocks = Int8Blocks.around(target, shard)
        # What is loaded into, until it is rounded or decoded.
        self._parts: dict[str, torch.Tensor] = {}
        self._exact: Wanted | None = None
        self._exact_norm: float | None = None

    def wanted(self, delta: Delta) -> list[Wanted] | None:
        runs = self._blocks.runs(codes=delta.has_codes)
        if runs is None:
            return None
        if delta.has_codes:
            codes, scales = runs
            return [
                self._part(codes, "codes", torch.int8),
                self._part(scales, "scales", torch.float16, done=self._decode),
            ]
        own, first = runs[1], runs[0].start
        some = [run for run in runs if run.start < run.stop] or [own]
        dtype = getattr(torch, delta.dtype)
        numel = runs[-1].stop - first
        found = [self._part(run, "values", dtype, first=first, numel=numel) for run in some]
        found[-1].done = self._round
        self._exact = found[some.index(own)]
        return found

    def take(self, delta: DeltaReader) -> None:
        stored = self._blocks.stored(self._delta)
        if stored is not None:
            self._parts = dict(zip(("codes", "scales"), stored, strict=True))
            self._decode()
            return
        values = self._blocks.values(delta)
        self._exact_norm = norm_of(values[self._blocks.run])
        self._parts = {"values": values.to(self._device)}
        self._round()

    def loaded(self) -> Loaded:
        self._rounding.wait()
        # What is injected is what was rounded, so its norm counts.
        norm = float(self._norm.item())
        if self._exact is not None:
            self._exact_norm = self._exact.square**0.5
        exact = norm if self._exact_norm is None else self._exact_norm
        return Loaded(self._target, self._shard, self._held, norm, exact, self._start)

    def _part(
        self,
        run: Run,
        what: str,
        dtype: torch.dtype,
        *,
        first: int | None = None,
        numel: int | None = None,
        done: Callable[[], None] | None = None,
    ) -> Wanted:
        """Return a run that fills all of a tensor, or that part of it which begins at `first`."""
        length = run.stop - run.start
        at = 0 if first is None else run.start - first

        def make() -> torch.Tensor:
            if what not in self._parts:
                size = length if numel is None else numel
                self._parts[what] = torch.empty(size, dtype=dtype, device=self._device)
            return self._parts[what][at : at + length]

        nbytes = length * dtype.itemsize
        return Wanted(run, nbytes, self._device, make, done, for_a_while=what == "values")

    def _round(self) -> None:
        self._keep(*quantize(self._parts["values"]))

    def _decode(self) -> None:
        self._keep(self._parts["codes"], self._parts["scales"])

    def _keep(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self._parts = {}
        self._held = Int8(codes, scales, self._blocks.run).to(self._device)
        on, values = self._rounding.arithmetic, self._rounding.values(self._held, self._blocks.run)
        self._norm = on.measure([values], None).norm
        self._start = _start_along(values, self._target, self._shard, on)
        self._rounding.settle(self._held)
