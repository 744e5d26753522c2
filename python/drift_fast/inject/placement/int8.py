"""Δ as int8 in memory: codes, and one float16 scale for every 64 elements, as on disk.

docs/format.md describes the format, which the Rust kernels write to disk and decode. Codes that
were read from disk and codes that were made here give the same bfloat16 values as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from drift_fast.dtypes import INT8_BLOCK
from drift_fast.inject.placement.page_locked import lock, pages

_CODE_MAX = 127.0
_LARGEST = torch.finfo(torch.float16).max
_LARGEST_BITS = 0x7BFF
# Blocks that are rounded at a time: nearly every tensor in one launch, and on a CPU what fits the
# caches.
_ROWS, _ROWS_ON_CPU = 1 << 20, 1 << 13


class Int8:
    """Δ as codes of shape [blocks, 64] and scales of shape [blocks, 1]: 66 bytes instead of 128.

    `lead` elements of the first block, and the last ones of the last, belong to other shards.
    """

    dtype = torch.bfloat16

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, run: slice | None = None) -> None:
        self.codes = _in_blocks(codes)
        self.scales = scales.view(-1, 1)
        self.lead = 0 if run is None else run.start
        self.numel = codes.numel() if run is None else run.stop - run.start
        # Whose memory this is a part of: pages stay locked as long as it lives.
        self._whole: Int8 | None = None

    def part(self, blocks: slice, run: slice) -> Int8:
        """Return a run of elements of some blocks; it keeps all of this memory."""
        part = Int8(self.codes[blocks], self.scales[blocks], run)
        part._whole = self
        return part

    @classmethod
    def joined(cls, members: Sequence[Int8]) -> Int8:
        """Return the blocks of several as those of one; the members are left with views of it."""
        codes = torch.cat([member.codes for member in members])
        one = cls(codes, torch.cat([member.scales for member in members]))
        counts = [len(member.codes) for member in members]
        parts = zip(torch.split(one.codes, counts), torch.split(one.scales, counts), strict=True)
        for member, (codes, scales) in zip(members, parts, strict=True):
            member.codes, member.scales, member._whole = codes, scales, one
        return one

    @property
    def nbytes(self) -> int:
        """The bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> Int8:
        """Move to a device."""
        self.codes, self.scales = self.codes.to(device), self.scales.to(device)
        return self

    def to_host(self) -> None:
        """Move from a GPU to page-locked memory on the current stream, and wait for it."""
        codes, scales = (
            # Pages that are there are locked several times as fast as those the driver brings in.
            lock(self, pages(one.numel(), one.dtype).zero_()).view(one.shape).copy_(one)
            for one in (self.codes, self.scales)
        )
        self.codes, self.scales = codes, scales

    def fill(self, out: torch.Tensor) -> None:
        _decode(self.codes, self.scales, out)


class Apart:
    """Several in host memory, each in its own; one launch decodes them all on a GPU."""

    def __init__(self, members: Sequence[Int8]) -> None:
        self._members = list(members)
        self.numel = INT8_BLOCK * sum(len(member.codes) for member in members)

    def fill(self, out: torch.Tensor) -> None:
        blocks = self.numel // INT8_BLOCK
        codes = torch.empty(blocks, INT8_BLOCK, dtype=torch.int8, device=out.device)
        scales = torch.empty(blocks, 1, dtype=torch.float16, device=out.device)
        start = 0
        for member in self._members:
            stop = start + len(member.codes)
            codes[start:stop].copy_(member.codes, non_blocking=True)
            scales[start:stop].copy_(member.scales, non_blocking=True)
            start = stop
        _decode(codes, scales, out)


def _decode(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Write values to a flat tensor beside the codes.

    In float32, and rounded once to bfloat16, as an int8 delta is decoded; float16 would round a
    first time.
    """
    values = out.view(codes.shape)
    if codes.device.type != "cpu":
        torch.mul(codes, scales.float(), out=values)
        return
    # On a CPU a product of two types, written as a third, takes ten times as long.
    for start in range(0, len(codes), _ROWS_ON_CPU):
        some = slice(start, start + _ROWS_ON_CPU)
        values[some].copy_(codes[some].float().mul_(scales[some].float()))


def quantize(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes of shape [blocks, 64] and scales of shape [blocks, 1] of a finite flat tensor.

    The rounding is that of the kernel which writes an int8 delta, bit for bit.
    """
    padded = _in_blocks(tensor.float() if tensor.dtype == torch.float64 else tensor)
    largest = _largest(padded)
    scales = _least_scale(largest)
    divisors = scales.float().masked_fill_(largest == 0, 1.0)
    codes = torch.empty(padded.shape, dtype=torch.int8, device=tensor.device)
    rows = _ROWS_ON_CPU if tensor.device.type == "cpu" else _ROWS
    for start in range(0, len(padded), rows):
        some = slice(start, start + rows)
        # Divided in float32, as the wider type of the two.
        codes[some] = (padded[some] / divisors[some]).clamp_(-_CODE_MAX, _CODE_MAX).round_()
    return codes, scales


def _in_blocks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements as rows of one block each, the last one padded with zeros."""
    flat = tensor.reshape(-1)
    missing = -flat.numel() % INT8_BLOCK
    # Padding with nothing would copy.
    padded = torch.nn.functional.pad(flat, (0, missing)) if missing else flat
    return padded.view(-1, INT8_BLOCK)


def _largest(blocks: torch.Tensor) -> torch.Tensor:
    """Return the largest |Δ| of each block, as float32."""
    if blocks.device.type == "cpu":
        # A norm takes five times as long there.
        parts = torch.split(blocks, _ROWS_ON_CPU)
        return torch.cat([part.float().abs().amax(1, keepdim=True) for part in parts])
    norms: torch.Tensor = torch.linalg.vector_norm(blocks, math.inf, dim=1, keepdim=True)
    return norms.float()


def _least_scale(largest: torch.Tensor) -> torch.Tensor:
    """Return the least float16 not below |Δ| / 127 of each block's largest |Δ|, or the largest."""
    # Divided by a tensor: a GPU would multiply by the reciprocal of a number.
    nearest = (largest / torch.full_like(largest, _CODE_MAX)).half().clamp_(max=_LARGEST)
    # The product of 11 bits and 7 is exact.
    short = nearest.float() * _CODE_MAX < largest
    bits = nearest.view(torch.int16) + short.to(torch.int16)
    return bits.clamp_(max=_LARGEST_BITS).view(torch.float16)
