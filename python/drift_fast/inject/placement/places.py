"""What becomes of the Δ of one target on loading, where it is kept as it is; `rounded` has int8.

Owns the memory that Δ is loaded into, and where the weights start along it. Every place takes runs
of elements from `pipeline`, or a tensor that is not a run of the delta's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from drift_fast.delta.delta import Delta
from drift_fast.errors import DriftError
from drift_fast.inject.compute.base import CHUNK, Arithmetic, flat
from drift_fast.inject.compute.host import norm_of
from drift_fast.inject.placement.held import Held, InHostMemory, OnDisk
from drift_fast.inject.placement.page_locked import pages
from drift_fast.inject.placement.pipeline import Wanted
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.target import DeltaReader, Target


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

    def loaded(self, wanted: Sequence[Wanted]) -> Loaded:
        """Return what was loaded, from the runs that were wanted and once starts are measured."""


class Start:
    """Where a weight starts along its Δ: ⟨W, Δ⟩, a vector of one element; None if not measured."""

    value: torch.Tensor | None = None


class Starts:
    """Measures where weights start along their Δ while it is at hand, many in a few launches."""

    def __init__(self, on: Arithmetic) -> None:
        self._on = on
        # Elements of Δ that are measured together.
        self.room = together(on.device)
        self._waiting: list[tuple[Start, Shard, torch.Tensor]] = []
        self._numel = 0

    def add(self, target: Target, shard: Shard, delta: torch.Tensor) -> Start:
        """Note a Δ, which is held until it is measured.

        Not that of an adapter, which is not compared with Δ in this way, nor where a weight has to
        be gathered: processes need not load in one order.
        """
        start = Start()
        if target.adapted is None and not shard.gathers:
            self._waiting.append((start, shard, delta))
            self._numel += delta.numel()
            if self._numel >= self.room:
                self.measure()
        return start

    def measure(self) -> None:
        """Measure what was noted, on the current stream."""
        waiting, self._waiting, self._numel = self._waiting, [], 0
        if waiting:
            starts, shards, deltas = zip(*waiting, strict=True)
            weights = [flat(shard.weight()) for shard in shards]
            dots = self._on.dots(weights, deltas, room=max(self.room // 2, CHUNK))
            for start, dot in zip(starts, torch.split(dots, 1), strict=True):
                start.value = dot


def together(device: torch.device) -> int:
    """Return how many elements of Δ are measured at a time.

    A launch takes the host longer than a small tensor takes a GPU, so many, as long as the dozen
    bytes that each of them takes meanwhile are a small part of the memory. On a CPU nothing is
    gained.
    """
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(max((free + cached) // 128, CHUNK), 1 << 27)


class _Exact(ABC):
    """A Δ that is kept as it is.

    device: where Δ is loaded to.
    """

    # As in `Wanted`.
    _for_a_while = _early = False

    def __init__(self, target: Target, shard: Shard, device: torch.device) -> None:
        self.target, self.shard, self._device = target, shard, device
        self._start = Start()
        self._dtype = torch.float32
        self._norm = 0.0

    def wanted(self, delta: Delta) -> list[Wanted] | None:
        run = self.target.run(self.shard)
        if run is None:
            return None
        self._dtype = getattr(torch, delta.dtype)
        nbytes = (run.stop - run.start) * self._dtype.itemsize
        some = self._for_a_while, self._early
        return [Wanted(run, nbytes, self._device, self._make, self._done, *some)]

    def take(self, delta: DeltaReader) -> None:
        tensor = self.target.read(delta, self.shard)
        self._dtype, self._norm = tensor.dtype, norm_of(tensor)
        self._make().copy_(tensor)
        self._done()

    def loaded(self, wanted: Sequence[Wanted]) -> Loaded:
        norm = wanted[0].square ** 0.5 if wanted else self._norm
        return Loaded(self.target, self.shard, self._held(), norm, norm, self._start.value)

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
        return self.target.numel(self.shard)


class Beside(_Exact):
    """Δ on the gradients' device."""

    _tensor: torch.Tensor | None = None

    def __init__(self, target: Target, shard: Shard, device: torch.device, starts: Starts) -> None:
        super().__init__(target, shard, device)
        self._starts = starts

    @staticmethod
    def lay_out(places: Sequence[Beside], dtype: torch.dtype) -> None:
        """Make Δ of adapted weights of one shape the rows of a matrix.

        Their products with factors then take one launch.
        """
        alike: dict[Hashable, list[Beside]] = {}
        for one in places:
            if one.target.adapted is not None:
                alike.setdefault((one.target.shape, one._numel), []).append(one)
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
        self._start = self._starts.add(self.target, self.shard, self._held())

    def _held(self) -> torch.Tensor:
        assert self._tensor is not None
        return self._tensor


class OnHost(_Exact):
    """Δ in page-locked memory, which is locked while the next ones are read."""

    _early = True

    def __init__(self, target: Target, shard: Shard, beside: torch.device) -> None:
        super().__init__(target, shard, torch.device("cpu"))
        self._beside = beside

    def _make(self) -> torch.Tensor:
        self._tensor = pages(self._numel, self._dtype)
        return self._tensor

    def _done(self) -> None:
        submit = lockers(self._beside).submit
        self._locked: Future[InHostMemory] = submit(InHostMemory, self._tensor)

    def _held(self) -> Held:
        return self._locked.result()


@cache
def lockers(device: torch.device) -> ThreadPoolExecutor:
    """Return threads that lock memory; on another device each would start a context there."""
    start = torch.cuda.set_device if device.type == "cuda" else str
    return ThreadPoolExecutor(4, "drift-fast-lock", start, (device,))


class Unread(_Exact):
    """Δ in its files, to be read again whenever it is needed; now it is only measured."""

    _for_a_while = True

    def __init__(
        self,
        target: Target,
        shard: Shard,
        device: torch.device,
        starts: Starts,
        delta: DeltaReader,
    ) -> None:
        super().__init__(target, shard, device)
        self._starts, self._delta = starts, delta

    def _make(self) -> torch.Tensor:
        self._tensor = torch.empty(self._numel, dtype=self._dtype, device=self._device)
        return self._tensor

    def _done(self) -> None:
        self._start = self._starts.add(self.target, self.shard, self._tensor)
        del self._tensor

    def _held(self) -> Held:
        return OnDisk(self._numel, self._dtype, self._read)

    def _read(self, out: torch.Tensor) -> None:
        try:
            self.target.read_into(self._delta, self.shard, out)
        except (OSError, DriftError) as error:
            raise DriftError(
                f"{self.target.delta_name}: Δ could not be read again, as residency='disk' does "
                f"in every step: {error}. Keep the files of the delta, or of both checkpoints, as "
                "they are until training ends, or attach with residency='host' or 'device'"
            ) from error
