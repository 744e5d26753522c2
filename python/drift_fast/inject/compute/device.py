"""Measure and subtract on an accelerator: no value returns to the host, which never waits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from drift_fast.inject.compute.base import CHUNK, SMALL, Sums
from drift_fast.inject.compute.shortcuts import (
    fused_step,
    has_fused_step,
    has_joint_norm,
    has_wide_product,
)
from drift_fast.inject.compute.spaced import spaced
from drift_fast.inject.compute.streams import shared_streams
from drift_fast.inject.compute.vectors import is_run

_NARROW = {torch.bfloat16, torch.float16}
# Exact products that are summed in float32 before their sums are in float64.
_RUN = 64
# A dot product is taken as a product of two matrices with this many rows: measured on an H100 in
# bfloat16 as fast as torch.dot, whose result has three digits, and twice as fast as one row.
_ROWS = 64
# Torch's fused step gives each 2¹⁶ elements to one block, which leaves most of a GPU idle where a
# tensor has few: 18 µs for 2¹⁸ elements in float32 of an H200, beside 3 by addcmul; 44 and 47 for
# 13 million.
_FEW = 1 << 23
# Launches on this many streams keep more of a GPU's memory busy: one axpy of 13 GB took 17.5 ms on
# one stream, 14.2 on two and 13.3 on four of an H100; norms of 13 GB took 5.3, 3.7 and 3.3 ms of an
# H200.
_STREAMS = 4


class DeviceArithmetic:
    """Tensors on an accelerator; sums and coefficients never leave it, so nothing is waited for."""

    dtype = torch.float32

    def __init__(self, device: torch.device, *, streams: int = _STREAMS, priority: int = 0) -> None:
        self.device = device
        self.priority = priority
        count = streams if device.type == "cuda" and streams > 1 else 0
        self._streams = shared_streams(device, priority, count)
        self._packs: dict[tuple[int, ...], _Pack] = {}
        # Grows whenever packs are freed: a graph that was captured with them must not run again.
        self.generation = 0

    @contextlib.contextmanager
    def on_capture_streams(self) -> Iterator[None]:
        """Launch on streams that are used for captures only.

        What torch keeps for a stream, such as the workspace of a product, then belongs to the
        graphs and is not given away when torch is asked to free its cache.
        """
        streams = self._streams
        self._streams = shared_streams(self.device, self.priority, len(streams), "capture")
        try:
            yield
        finally:
            self._streams = streams

    def measure(
        self,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor] | None,
    ) -> Sums:
        """Return the sums of each tensor with its Δ, in float32."""
        norm = torch.zeros(len(tensors), dtype=self.dtype, device=self.device)
        dot = torch.full_like(norm, math.nan) if deltas is None else torch.zeros_like(norm)
        small, large = _by_size(tensors)
        self._norms_into(norm, tensors)
        if deltas is None:
            return Sums(norm, dot)
        rows, large = _in_rows(deltas, large)
        if rows:
            beside = [torch.empty_like(stacked) for _, stacked in rows]
            each = [row for one in beside for row in one.unbind()]
            torch._foreach_copy_(each, [tensors[at] for some, _ in rows for at in some])
            sums = [one.mul_(delta).sum(1) for one, (_, delta) in zip(beside, rows, strict=True)]
            _scatter(dot, [at for some, _ in rows for at in some], torch.cat(sums))
        products = self._products(tensors, deltas, large)
        dots = dot.unbind()
        for at in self.spread(large):
            if at in products:
                sides = (tensors[at].view(_ROWS, -1), deltas[at].view(_ROWS, -1).mT)
                torch.mm(*sides, out_dtype=self.dtype, out=products[at])
            else:
                _dot_into(dots[at], tensors[at], deltas[at])
        if products:
            _scatter(dot, list(products), _traces(products))
        if small:
            pack = self._pack([tensors[at] for at in small])
            left = pack.gather([tensors[at] for at in small])
            right = pack.gather([deltas[at] for at in small])
            _scatter(dot, small, (left * right).sum(1))
        return Sums(norm, dot)

    def dots(
        self,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        *,
        room: int = CHUNK,
    ) -> torch.Tensor:
        """Return ⟨x, Δ⟩ of each tensor, in float64 where the device has it."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        dot = torch.zeros(len(tensors), dtype=dtype, device=self.device)
        small, large = _by_size(tensors)
        found: dict[int, list[torch.Tensor]] = {at: [] for at in large}
        for run in _cut(tensors, deltas, large, room):
            left, right = ([one[at][some] for at, some in run] for one in (tensors, deltas))
            for (at, _), value in zip(run, _wide_dots(left, right, dtype), strict=True):
                found[at].append(value)
        if large:
            _scatter(dot, large, torch.stack([torch.stack(one).sum() for one in found.values()]))
        if small:
            pack = self._pack([tensors[at] for at in small])
            first, second = (pack.gather([one[at] for at in small]) for one in (tensors, deltas))
            _scatter(dot, small, (first.to(dtype) * second).sum(1))
        return dot

    def subtract(
        self, tensors: Sequence[torch.Tensor], deltas: Sequence[torch.Tensor], c: torch.Tensor
    ) -> None:
        """Subtract c·Δ from each tensor in place; c is a float32 vector on the device."""
        small, large = _by_size(tensors)
        rows, large = _in_rows(deltas, large)
        values = c.unbind()
        if rows:
            scaled = [d * torch.stack([values[at] for at in some])[:, None] for some, d in rows]
            each = [tensors[at] for some, _ in rows for at in some]
            torch._foreach_sub_(each, [row for one in scaled for row in one.unbind()])
        for at in self.spread(large):
            _axpy(tensors[at], deltas[at], values[at])
        if small:
            some = [tensors[at] for at in small]
            pack = self._pack(some)
            c_each = torch.stack([values[at] for at in small])
            moved = pack.flat(some) - pack.spread(c_each) * pack.flat([deltas[at] for at in small])
            if len({tensor.dtype for tensor in some}) == 1:
                moved = moved.to(some[0].dtype)
            torch._foreach_copy_(some, list(torch.split(moved, pack.sizes)))

    def _norms_into(self, norm: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Write the norm of every tensor, all of a stream in one launch where torch can."""
        full = [at for at, tensor in enumerate(tensors) if tensor.numel()]
        if not full:
            return
        some = [tensors[at] for at in full]
        alike = len({tensor.dtype for tensor in some}) == 1
        if not (alike and has_joint_norm(some[0])):
            each = [torch.linalg.vector_norm(tensor, dtype=norm.dtype) for tensor in some]
            _scatter(norm, full, torch.stack(each))
            return
        large = sum(tensor.numel() for tensor in some) > CHUNK
        shares = min(len(some), max(1, len(self._streams))) if large else 1
        norms = norm.new_empty(len(some))
        for at in self.spread(range(shares)):
            found = torch._foreach_norm(some[at::shares], 2, dtype=norm.dtype)
            norms[at::shares].copy_(torch.stack(list(found)))
        _scatter(norm, full, norms)

    def _products(
        self,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        members: Sequence[int],
    ) -> dict[int, torch.Tensor]:
        """Return memory for each dot product that is taken as a product of matrices.

        torch.dot of two bfloat16 vectors rounds its result to bfloat16; a product of matrices can
        leave it in float32, in half the time that widening both would take. Its trace is the dot
        product.
        """
        wide = [
            at
            for at in members
            # Rows of a multiple of 16 bytes keep the product's loads aligned.
            if tensors[at].dtype == deltas[at].dtype != self.dtype
            and tensors[at].numel() % (_ROWS * 8) == 0
            and has_wide_product(tensors[at])
        ]
        room = torch.empty(len(wide), _ROWS, _ROWS, dtype=self.dtype, device=self.device)
        return dict(zip(wide, room.unbind(), strict=True))

    def spread(self, members: Sequence[int]) -> Iterator[int]:
        """Yield the members, with a current stream of its own for each share of them."""
        if len(members) < 2 or not self._streams:
            yield from members
            return
        current = torch.cuda.current_stream(self.device)
        for stream in self._streams:
            stream.wait_stream(current)
        try:
            for at, stream in enumerate(self._streams):
                with torch.cuda.stream(stream):
                    yield from members[at :: len(self._streams)]
        finally:
            # Also after a failure: a capture cannot end while a stream has not come back.
            for stream in self._streams:
                current.wait_stream(stream)

    def _pack(self, tensors: Sequence[torch.Tensor]) -> _Pack:
        sizes = tuple(tensor.numel() for tensor in tensors)
        if sizes not in self._packs:
            # Gradients that are missing in one step or another make ever new packs.
            if len(self._packs) >= 64:
                self._packs.clear()
                self.generation += 1
            self._packs[sizes] = _Pack(sizes, self.device)
        return self._packs[sizes]


class _Pack:
    """Many small tensors as the rows of one matrix, the short ones padded with zeros."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device) -> None:
        self.sizes = list(sizes)
        numel = sum(sizes)
        # Every row's elements in the concatenation, and beyond its end the zero behind the last.
        places = torch.full((len(sizes), max(sizes)), numel)
        rows = torch.empty(numel, dtype=torch.int64)
        start = 0
        for row, size in enumerate(sizes):
            places[row, :size] = torch.arange(start, start + size)
            rows[start : start + size] = row
            start += size
        self._places = _to_device(places, device)
        self._rows = _to_device(rows, device)

    def flat(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return all elements in a row, as float32."""
        return torch.cat([tensor.view(-1) for tensor in tensors]).float()

    def gather(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the matrix."""
        return torch.nn.functional.pad(self.flat(tensors), (0, 1)).take(self._places)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return one value for each row as one for each element."""
        return values.index_select(0, self._rows)


def _to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on the device, for which the host does not wait."""
    if device.type == "cuda":
        # Pinned memory that is freed is reused only after the copy from it, which torch watches.
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def _in_rows(
    deltas: Sequence[torch.Tensor], members: Sequence[int]
) -> tuple[list[tuple[list[int], torch.Tensor]], list[int]]:
    """Return which float32 Δ are rows of one matrix, with it, and the members that are not.

    Those are LoRA's: hundreds, for each of which a launch takes longer than the device needs.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for at in members:
        if deltas[at].dtype == torch.float32 and deltas[at].numel() <= _FEW:
            key = deltas[at].numel(), deltas[at].untyped_storage().data_ptr()
            alike.setdefault(key, []).append(at)
    rows = [
        ([some[at] for at in run], stacked)
        for some in alike.values()
        for run, stacked in spaced([deltas[at] for at in some])
        if len(run) > 1
    ]
    taken = {at for some, _ in rows for at in some}
    return rows, [at for at in members if at not in taken]


def _by_size(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    small = [at for at, tensor in enumerate(tensors) if 0 < tensor.numel() <= SMALL]
    if len(small) < 8:
        small = []
    packed = set(small)
    large = [at for at, t in enumerate(tensors) if at not in packed and t.numel()]
    return small, large


def _scatter(vector: torch.Tensor, members: Sequence[int], values: torch.Tensor) -> None:
    """Write values at some places; a list as index would be copied to the device."""
    if is_run(members):
        vector[members[0] : members[-1] + 1].copy_(values)
        return
    slots = [vector[at] for at in members]
    torch._foreach_copy_(slots, list(values.to(vector.dtype).unbind()))


def _traces(products: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return the trace of each product; they are adjacent in memory."""
    first = next(iter(products.values()))
    stacked = first.as_strided((len(products), _ROWS), (_ROWS * _ROWS, _ROWS + 1))
    return stacked.sum(1)


def _dot_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Write ⟨left, right⟩ to a scalar in float32 on the device."""
    if left.dtype == right.dtype == out.dtype:
        out.copy_(torch.dot(left, right))
        return
    parts = [torch.dot(left[some].float(), right[some].float()) for some in _chunks(left, CHUNK)]
    out.copy_(torch.stack(parts).sum())


def _cut(
    tensors: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    members: Sequence[int],
    room: int,
) -> Iterator[list[tuple[int, slice]]]:
    """Yield parts of tensors with `room` elements at most, of one dtype and in whole rows."""
    run: list[tuple[int, slice]] = []
    kind, numel = None, 0
    for at in members:
        for some in _chunks(tensors[at], room):
            part = min(some.stop, tensors[at].numel()) - some.start
            now = (tensors[at].dtype, deltas[at].dtype) if part % _RUN == 0 else None
            if run and (now is None or now != kind or numel + part > room):
                yield run
                run, numel = [], 0
            run.append((at, some))
            kind, numel = now, numel + part
    if run:
        yield run


def _wide_dots(
    left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return ⟨left, right⟩ of each pair, summed in `dtype`."""
    sizes = [one.numel() for one in left]
    wide, other = (side[0] if len(side) == 1 else torch.cat(list(side)) for side in (left, right))
    # The product of two 16-bit numbers is exact in float32. Summed there over a few, it loses less
    # than a weight's own rounding does; torch would widen every product before it sums them.
    exact = torch.float32 if {wide.dtype, other.dtype} <= _NARROW else dtype
    product = wide.to(exact) * other
    if product.dtype != dtype and all(size % _RUN == 0 for size in sizes):
        product = product.view(-1, _RUN).sum(1).to(dtype)
        sizes = [size // _RUN for size in sizes]
    return [torch.sum(part, dtype=dtype) for part in torch.split(product, sizes)]


def _chunks(tensor: torch.Tensor, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, tensor.numel(), size)]


def _axpy(tensor: torch.Tensor, delta: torch.Tensor, c: torch.Tensor) -> None:
    """Compute tensor −= c·delta in place with c a float32 scalar on the device."""
    float32 = tensor.dtype == torch.float32
    fused = has_fused_step(tensor) and not (float32 and tensor.numel() <= _FEW)
    if fused and tensor.dtype == delta.dtype:
        fused_step(tensor, delta, c)
        return
    for at in range(0, tensor.numel(), CHUNK):
        part, other = tensor[at : at + CHUNK], delta[at : at + CHUNK]
        if fused:
            fused_step(part, other.to(tensor.dtype), c)
        elif float32:
            part.addcmul_(other.float(), c, value=-1.0)
        else:
            # In 16 bits torch would round c itself to the tensor's dtype; in float32 only the
            # result is.
            part.copy_(torch.addcmul(part.float(), other.float(), c, value=-1.0))
