"""Which int8 blocks the part of Δ that this process holds is made of, and their codes on disk.

An int8 delta is injected without another rounding: its codes and scales are read, and they give the
bfloat16 values that the delta itself gives. A delta of another dtype is rounded on loading by the
rule that writes an int8 delta, and gives what its values would give, had they been stored as int8.

Blocks are those of the whole parameter in row-major order. So a shard of rows that begins inside a
block takes that whole block, and its values are those of a run that is not sharded. Only where a
parameter has its elements in another order than the delta (transposed, or joined from tensors that
end inside a block), or is sharded across columns inside a block, no stored block stays together:
there this process rounds its own part, an int8 delta once more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from drift_fast.delta.delta import Delta
from drift_fast.delta.protocol import DeltaLike, Run
from drift_fast.dtypes import INT8_BLOCK
from drift_fast.inject.shards.base import Cut, Shard
from drift_fast.inject.target import DeltaReader, Target


@dataclass(frozen=True)
class Int8Blocks:
    """The whole blocks around the part of a parameter that this process holds."""

    target: Target
    cut: Cut
    # Elements [start, stop) of the parameter that `cut` gives; None if they are not such a run.
    span: tuple[int, int] | None
    # Which elements of `cut` this process holds.
    run: slice

    @classmethod
    def around(cls, target: Target, shard: Shard) -> Int8Blocks:
        """Return the blocks around a shard; one that is not a run has blocks of its own."""
        numel = target.numel(shard)
        if shard.span is None:
            span = None if shard.process_groups else (0, numel)
            return cls(target, shard, span, slice(0, numel))
        start, stop = shard.span
        first = start // INT8_BLOCK * INT8_BLOCK
        if start == stop:
            return cls(target, shard, (first, first), slice(0, 0))
        last = min(-(-stop // INT8_BLOCK) * INT8_BLOCK, math.prod(target.shape))
        return cls(target, _Run((first, last)), (first, last), slice(start - first, stop - first))

    def runs(self, *, codes: bool) -> list[Run] | None:
        """Return what the blocks are read from, or None where they are not a run of one tensor.

        codes: of the codes and of their scales, as an int8 delta stores both. If not, of values:
        those before the part that this process holds, that part, and those behind it.
        """
        if self.target.parts or self.span is None:
            return None
        name, (start, stop) = self.target.delta_name, self.span
        if codes:
            scales = start // INT8_BLOCK, -(-stop // INT8_BLOCK)
            return [Run(name, start, stop, True), Run(f"{name}.scale", *scales, True)]
        own = start + self.run.start, start + self.run.stop
        return [Run(name, start, own[0]), Run(name, *own), Run(name, own[1], stop)]

    def values(self, delta: DeltaReader) -> torch.Tensor:
        """Return Δ of the blocks, flat, in the delta's dtype."""
        return self.target.read(delta, self.cut)

    def stored(self, delta: DeltaLike) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the codes of the blocks and a scale for each block as the delta stores them, flat.

        None where the delta is not stored as int8, or its blocks do not stay together here.
        """
        if not isinstance(delta, Delta) or not delta.has_codes:
            return None
        if not self.target.parts and self.span is not None:
            return delta.read_codes(self.target.delta_name, *self.span)
        codes = self.target.read(DeltaReader(_PerElement(delta, scales=False)), self.cut)
        scales = self.target.read(DeltaReader(_PerElement(delta, scales=True)), self.cut)
        rest = -scales.numel() % INT8_BLOCK
        blocks = torch.cat([scales, scales[-1:].expand(rest)]).view(-1, INT8_BLOCK)
        if not torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
            return None
        return codes, blocks[:, 0].contiguous()


@dataclass(frozen=True)
class _Run:
    """Elements [start, stop) of a parameter in row-major order."""

    span: tuple[int, int]

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1)[slice(*self.span)]


@dataclass(frozen=True)
class _PerElement:
    """A delta with a code, or the scale of a code, for each element in place of its value."""

    delta: Delta
    scales: bool

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.delta.shapes

    def __getitem__(self, name: str, /) -> torch.Tensor:
        shape = self.delta.shapes[name]
        codes, scales = self.delta.read_codes(name, 0, math.prod(shape))
        if self.scales:
            codes = scales.repeat_interleave(INT8_BLOCK)[: codes.numel()]
        return codes.view(shape)
