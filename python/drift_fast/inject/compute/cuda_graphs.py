"""Launch what a bucket's injection does as one: a CUDA graph, replayed while nothing has moved.

An injection is hundreds of short kernels, which take the host about as long to launch as the device
to run. A recording holds addresses, so it is replayed only where every tensor lies where it lay
when it was made, and holds no gradient alive; anything else is launched kernel by kernel. Vectors
that change from step to step are read from where the group keeps them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from drift_fast.inject.compute.arithmetic import shared_streams

logger = logging.getLogger(__name__)

# Recordings of one place that are kept, since gradients may lie here and there in turn, and how
# many are made before it is clear that they never lie still.
_KEPT = 4
_TRIES = 16


class _Due(NamedTuple):
    addresses: Hashable
    launch: Callable[[], None]
    holds: Callable[[], bool]
    priority: int


class Recordings:
    """Recordings of one device, a few for each place: a bucket, with where its Δ lies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, dict[Hashable, torch.cuda.CUDAGraph]] = {}
        self._seen: dict[Hashable, deque[Hashable]] = {}
        self._due: dict[Hashable, _Due] = {}
        self._tries: dict[Hashable, int] = {}
        self._pool: Any = None
        self.replayed = 0

    def replay(
        self,
        place: Hashable,
        addresses: Hashable,
        launch: Callable[[], None],
        holds: Callable[[], bool],
        *,
        priority: int,
        recorded: Callable[[], None] | None = None,
    ) -> None:
        """Do what `launch` does, on the current stream; as one where it was recorded.

        `launch` is called now, and once more by `record`, unless `holds` says by then that
        `addresses` are those of other tensors; it reads and writes there and at places that never
        change. `recorded` is called in its place to record, if that must launch in another way.
        """
        graph = self._graphs.get(place, {}).get(addresses)
        if graph is not None:
            self.replayed += 1
            graph.replay()
            return
        launch()
        # Once may be chance, and the first steps allocate what later ones find.
        seen = self._seen.setdefault(place, deque(maxlen=_KEPT))
        if addresses not in seen:
            seen.append(addresses)
        elif self._tries.get(place, 0) < _TRIES:
            self._due[place] = _Due(addresses, recorded or launch, holds, priority)

    def record(self) -> None:
        """Record what lay twice in one place; nothing runs, and the host waits for nothing."""
        due, self._due = self._due, {}
        for place, one in due.items():
            if not one.holds():
                continue
            self._tries[place] = self._tries.get(place, 0) + 1
            kept = self._graphs.setdefault(place, {})
            if len(kept) == _KEPT:
                del kept[next(iter(kept))]
            try:
                kept[one.addresses] = self._recorded(one)
            except RuntimeError as error:
                self._tries[place] = _TRIES
                logger.info("an injection on %s cannot be recorded: %s", self._device, error)

    def drop(self) -> None:
        """Let go of what was to be recorded."""
        self._due.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._graphs.clear()
        self._seen.clear()
        self._due.clear()

    def _recorded(self, one: _Due) -> torch.cuda.CUDAGraph:
        (stream,) = shared_streams(self._device, one.priority, 1, "recording")
        # A pool goes with the last recording that uses it.
        if not any(self._graphs.values()):
            # Recordings run one after the other, so their intermediate results share memory.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # torch's own context manager waits for the device and gives its cached memory back.
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                one.launch()
            finally:
                graph.capture_end()
        return graph


def may_record(device: torch.device) -> bool:
    """Tell whether kernels of this device can be recorded, and are not being recorded already."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
