"""Where Δ lives between steps, and how it comes to the gradient's device when it is needed.

Owns Δ's memory: all of it beside the gradients, or a ring of buffers there that is filled again
while earlier ones are used. Buckets are runs of targets in the order in which backward finishes
their gradients. All but "device-int8" and "host-int8" are exact.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from drift_fast.inject.compute.streams import new_stream

logger = logging.getLogger(__name__)

Residency = Literal["auto", "device", "device-int8", "host", "host-int8", "disk"]
RESIDENCIES: tuple[str, ...] = get_args(Residency)

# Elements that share one scale. The cosine between Δ and its int8 form was 0.99998 on random
# weights.
BLOCK = 64
# Blocks that are rounded at a time.
_ROWS = 1 << 18
# Buffers of the ring: one is used while others fill. More of them are free again sooner, fewer
# take fewer launches.
_SLOTS, _MOST_SLOTS = 4, 8
_SLOT_NBYTES = 1 << 28
# To CUDA: locked for every device, not for the current one alone.
_PORTABLE = 1


def check_residency(residency: str) -> Residency:
    """Return `residency` if it names one.

    Raises:
        ValueError: an unknown residency.
    """
    if residency not in RESIDENCIES:
        raise ValueError(f"residency must be one of {', '.join(RESIDENCIES)}, got {residency!r}")
    return residency  # type: ignore[return-value]


class Held(Protocol):
    """One Δ, wherever it is kept."""

    numel: int
    dtype: torch.dtype

    def fill(self, out: torch.Tensor) -> None:
        """Write Δ to a flat tensor on the gradient's device, on the current stream.

        `out` is longer than Δ by what makes it whole blocks.
        """


class Plain:
    """Δ as it is, in (page-locked) host memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = _locked(self, tensor)
        self.numel = tensor.numel()
        self.dtype = tensor.dtype

    def fill(self, out: torch.Tensor) -> None:
        out[: self.numel].copy_(self.tensor, non_blocking=True)


class Quantised:
    """Δ as int8 with one bfloat16 scale for each block of 64 elements: 66 bytes instead of 128.

    A scale in bfloat16 rather than float16 cannot underflow to zero where Δ is tiny.
    """

    dtype = torch.bfloat16

    def __init__(self, tensor: torch.Tensor) -> None:
        self.numel = tensor.numel()
        rest = -self.numel % BLOCK
        count = (self.numel + rest) // BLOCK
        padded = torch.nn.functional.pad(tensor, (0, rest)).view(count, BLOCK)
        self.values = torch.empty(padded.shape, dtype=torch.int8, device=tensor.device)
        self.scale = torch.empty(len(padded), 1, dtype=self.dtype, device=tensor.device)
        for start in range(0, len(padded), _ROWS):
            rows = padded[start : start + _ROWS].float()
            # Rounding a scale down by half a unit leaves the largest value within 127 steps.
            scale = (rows.abs().amax(1, keepdim=True) / 126.5).to(self.dtype)
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
            self.scale[start : start + _ROWS] = scale
            steps = (rows / scale.float()).round_().clamp_(-127, 127)
            self.values[start : start + _ROWS] = steps.to(torch.int8)

    @classmethod
    def joined(cls, members: Sequence[Quantised]) -> Quantised:
        """Return the blocks of several as those of one, page-locked where they are in host memory.

        One launch widens them all; the members are left with views of it.
        """
        one = cls.__new__(cls)
        one.values = torch.cat([member.values for member in members])
        one.scale = torch.cat([member.scale for member in members])
        one.numel = one.values.numel()
        if one.values.device.type == "cpu":
            one.values, one.scale = _locked(one, one.values), _locked(one, one.scale)
        counts = [len(member.values) for member in members]
        parts = zip(
            members, torch.split(one.values, counts), torch.split(one.scale, counts), strict=True
        )
        for member, values, scale in parts:
            member.values, member.scale = values, scale
        return one

    def to_host(self) -> Quantised:
        """Move to host memory."""
        self.values, self.scale = self.values.cpu(), self.scale.cpu()
        return self

    def fill(self, out: torch.Tensor) -> None:
        values, scale = self.values, self.scale
        if values.device != out.device:
            values = values.to(out.device, non_blocking=True)
            scale = scale.to(out.device, non_blocking=True)
        torch.mul(values, scale, out=out.view(values.shape))


class OnDisk:
    """Δ in its files, or as the difference of two checkpoints; read each time it is needed."""

    def __init__(
        self, numel: int, dtype: torch.dtype, read: Callable[[torch.Tensor], None]
    ) -> None:
        self.numel = numel
        self.dtype = dtype
        self._read = read

    def fill(self, out: torch.Tensor) -> None:
        if not self.numel:
            return
        if out.device.type == "cpu":
            self._read(out[: self.numel])
            return
        stage = torch.empty(self.numel, dtype=self.dtype, pin_memory=out.device.type == "cuda")
        self._read(stage)
        # Pinned memory that is freed is reused only after the copy from it, which torch watches.
        out[: self.numel].copy_(stage, non_blocking=True)


class Store(Protocol):
    """All Δ of a group of targets."""

    buckets: list[tuple[int, int]]
    nbytes: int

    def batches(self) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """Yield runs of targets [start, stop) with their Δ, which is valid until the next one."""

    def bucket(self, at: int) -> contextlib.AbstractContextManager[list[torch.Tensor]]:
        """Give the Δ of one bucket, valid inside the context."""

    def release(self) -> None:
        """Let go of Δ now."""


class Resident:
    """All Δ on the gradients' device; `nbytes` is what that takes there."""

    def __init__(self, deltas: Sequence[torch.Tensor], buckets: list[tuple[int, int]]) -> None:
        self.deltas = list(deltas)
        self.buckets = buckets
        self.nbytes = sum(delta.nbytes for delta in self.deltas)

    def batches(self) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        yield 0, len(self.deltas), self.deltas

    @contextlib.contextmanager
    def bucket(self, at: int) -> Iterator[list[torch.Tensor]]:
        start, stop = self.buckets[at]
        yield self.deltas[start:stop]

    def release(self) -> None:
        self.deltas.clear()


class Ring:
    """Δ elsewhere; a ring of buffers on the device is filled ahead, bucket after bucket, for ever.

    As the last bucket of a step is used, the first ones of the next are on their way.
    """

    def __init__(
        self, held: Sequence[Held], tail: Sequence[torch.Tensor], device: torch.device, nbytes: int
    ) -> None:
        self._held = list(held)
        self._tail = list(tail)
        # One that holds every Δ exactly.
        self._dtype = functools.reduce(torch.promote_types, [one.dtype for one in held])
        padded = [one.numel + -one.numel % BLOCK for one in held]
        most = max(_SLOTS, min(_MOST_SLOTS, nbytes // _SLOT_NBYTES))
        slot = max(max(padded), nbytes // self._dtype.itemsize // most)
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
        # No wider than the widest bucket, which may be far from what was allowed.
        slot = max(sum(padded[start:stop]) for start, stop in self.buckets)
        self._slots = [torch.empty(slot, dtype=self._dtype, device=device) for _ in range(slots)]
        if tail:
            self.buckets.append((len(held), len(held) + len(tail)))
        self._sources = [self._source(range(*bucket)) for bucket in self.buckets[: self._count]]
        resident = sum(d.nbytes for d in tail) + sum(buffer.nbytes for buffer in self._slots)
        on_device = [
            o.values.nbytes + o.scale.nbytes
            for o in held
            if isinstance(o, Quantised) and o.values.device == device
        ]
        self.nbytes = resident + sum(on_device)
        self._lane = new_stream(device) if device.type == "cuda" else None
        if self._lane is not None:
            self._lane.wait_stream(torch.cuda.current_stream(device))
        self._filled: list[Any] = [None] * slots
        self._used: list[Any] = [None] * slots
        # Reading a file blocks whoever does it, so a thread of its own does.
        slow = any(isinstance(one, OnDisk) for one in held)
        self._reader = ThreadPoolExecutor(1, "drift-fast-reader") if slow else None
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
        if self._head % self._count != at:
            self._turn_to(at)
        while self._next < self._head + len(self._slots):
            self._fill(self._next)
            self._next += 1
        slot = self._head % len(self._slots)
        filled = self._filled[slot]
        if isinstance(filled, Future):
            try:
                filled = filled.result()
            except BaseException:
                # What failed is read anew in the next step.
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

    def release(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        if self._lane is not None:
            # Buffers that are still being filled must not become someone else's memory.
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
            views.append(self._slots[slot][place : place + self._held[member].numel])
            place += self._padded[member]
        return views

    def _source(self, members: range) -> list[tuple[Held, int, int]]:
        """Return what fills a bucket, each with the elements of the buffer that it fills."""
        some = [self._held[member] for member in members]
        quantised = [one for one in some if isinstance(one, Quantised)]
        if len(quantised) == len(some):
            joined = Quantised.joined(quantised)
            return [(joined, 0, joined.numel)]
        ends = list(itertools.accumulate(self._padded[member] for member in members))
        return list(zip(some, [0, *ends[:-1]], ends, strict=True))

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


def _locked(owner: object, tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory that stays page-locked, and so is copied from at full speed.

    The memory is locked where it lies, for as long as `owner` lives: torch's own allocator of
    pinned memory rounds up to a power of two, which could double what a model's Δ takes. That
    allocator is used where the driver will not lock this memory.
    """
    if not torch.cuda.is_available() or not tensor.numel():
        return tensor
    # Whole pages of its own: one that is shared with another tensor cannot be locked twice.
    nbytes = tensor.nbytes + -tensor.nbytes % mmap.PAGESIZE
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    pages = torch.frombuffer(mmap.mmap(-1, nbytes, **private), dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(pages.data_ptr(), nbytes, _PORTABLE)) != 0:
        # The refusal would come back as the error of the next kernel.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        return tensor.pin_memory()
    # Holding the pages here keeps their memory from being freed while it is locked.
    # At the end of the process, or in a fork of it, the system unlocks it.
    weakref.finalize(owner, _unlock, pages).atexit = False
    return pages[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _unlock(pages: torch.Tensor) -> None:
    torch.cuda.synchronize()
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(pages.data_ptr())


def choose(
    nbytes: int, device: torch.device, parameters: Sequence[torch.Tensor]
) -> tuple[Residency, str]:
    """Return an exact residency for Δ of this size, and a line that says why.

    On an accelerator, what training has yet to allocate (gradients, and two states of an AdamW for
    every parameter) and a tenth of the memory for activations are kept free.
    """
    size = f"{nbytes / 1e9:.2f} GB of Δ"
    if device.type != "cuda":
        free = _free_host_memory()
        if device.type != "cpu" or free is None or nbytes < free / 2:
            return "device", f"{size} beside the parameters on {device}"
        return (
            "disk",
            f"{size}, over half of the {free / 1e9:.1f} GB of free memory: read anew",
        )
    free, total = torch.cuda.mem_get_info(device)
    trained = [p for p in parameters if p.requires_grad and p.device == device]
    # Of a sharded parameter this process has its part to allocate for.
    local = [p.to_local() if hasattr(p, "to_local") else p for p in trained]
    shares = zip(trained, local, strict=True)
    ahead = sum(own.nbytes * (3 if p.grad is None else 2) for p, own in shares) + total // 10
    if nbytes <= free - ahead:
        return "device", f"{size} on {device}, {(free - nbytes) / 1e9:.1f} GB stay free"
    short = (
        f"{size} would leave less than the {ahead / 1e9:.1f} GB on {device} that gradients, "
        "optimizer and activations may take"
    )
    host = _free_host_memory()
    if host is None or nbytes < host * 0.6:
        return "host", (
            f"{short}: kept in pinned host memory (residency='device-int8' halves it instead, "
            "rounding Δ)"
        )
    return "disk", f"{short}, and host memory has {host / 1e9:.1f} GB free: read anew each step"


def _free_host_memory() -> int | None:
    """Return the bytes that can be had without swapping, None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, IndexError):
        return None
