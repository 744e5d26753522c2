"""Launch the kernels of a bucket's injection as one CUDA graph, replayed while nothing has moved.

An injection is hundreds of short kernels, which take the host about as long to launch as the device
to run. A graph holds addresses, so it is replayed only while every tensor is where it was at the
capture, and it keeps no gradient alive; anything else is launched kernel by kernel. Vectors that
change from step to step are read from where the target group keeps them.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from drift_fast.inject.compute.streams import shared_streams

logger = logging.getLogger(__name__)

# Graphs of one place that are kept, since gradients may alternate between addresses, and how many
# are captured before it is clear that their addresses never repeat.
_KEPT = 4
_TRIES = 16


@dataclass(frozen=True)
class Launch:
    """Kernels to launch, which only read and write at `addresses` and at places that never change.

    `place` names what they do, such as a bucket and where its Δ is. `run` launches them, and
    `capture` once more while a graph is captured; `unmoved` says by then whether `addresses` are
    still those of the same tensors.
    """

    place: Hashable
    addresses: Hashable
    run: Callable[[], None]
    capture: Callable[[], None]
    unmoved: Callable[[], bool]
    priority: int = 0


class CudaGraphs:
    """The graphs of one device, a few for each place."""

    def __init__(self, device: torch.device) -> None:
        # A process may hold no part of what some kernels change.
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")
        self._device = device
        self._graphs: dict[Hashable, dict[Hashable, torch.cuda.CUDAGraph]] = {}
        self._seen: dict[Hashable, deque[Hashable]] = {}
        self._pending: dict[Hashable, Launch] = {}
        self._tries: dict[Hashable, int] = {}
        self._pool: Any = None
        self.replayed = 0

    def launch(self, launch: Launch) -> None:
        """Launch on the current stream: by replaying a graph, or kernel by kernel."""
        graph = self._graphs.get(launch.place, {}).get(launch.addresses)
        if graph is not None:
            self.replayed += 1
            graph.replay()
            return
        launch.run()
        # Once may be chance, and the first steps allocate what later ones find.
        seen = self._seen.setdefault(launch.place, deque(maxlen=_KEPT))
        if launch.addresses not in seen:
            seen.append(launch.addresses)
        elif self._tries.get(launch.place, 0) < _TRIES:
            self._pending[launch.place] = launch

    def capture(self) -> None:
        """Capture what was launched twice at the same addresses.

        Nothing runs, and the host waits for nothing.
        """
        pending, self._pending = self._pending, {}
        for place, launch in pending.items():
            if not launch.unmoved():
                continue
            self._tries[place] = self._tries.get(place, 0) + 1
            kept = self._graphs.setdefault(place, {})
            if len(kept) == _KEPT:
                del kept[next(iter(kept))]
            try:
                kept[launch.addresses] = self._captured(launch)
            except RuntimeError as error:
                self._tries[place] = _TRIES
                logger.info("an injection on %s cannot be captured: %s", self._device, error)

    def drop_pending(self) -> None:
        """Forget what was about to be captured."""
        self._pending.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._graphs.clear()
        self._seen.clear()
        self._pending.clear()

    def _captured(self, launch: Launch) -> torch.cuda.CUDAGraph:
        (stream,) = shared_streams(self._device, launch.priority, 1, "capture")
        # A pool is freed with the last graph that uses it.
        if not any(self._graphs.values()):
            # Graphs are replayed one after the other, so their intermediate results share memory.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # torch's own context manager waits for the device and gives its cached memory back.
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch.capture()
            finally:
                graph.capture_end()
        return graph


def may_capture(device: torch.device) -> bool:
    """Whether kernels of this device can be captured, and no capture is under way."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
