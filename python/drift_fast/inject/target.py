"""One weight that is injected into, and how its part of Δ is read.

Owns which elements of which tensor of the delta make up a target, and what of them this process
reads.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from drift_fast.alignment.layout import Rectangle
from drift_fast.delta.delta import Delta
from drift_fast.delta.protocol import DeltaLike, Run
from drift_fast.errors import DriftError
from drift_fast.inject.lora.adapters import Adapted
from drift_fast.inject.shards.base import Cut, Shard
from drift_fast.shapes import matrix


class DeltaReader:
    """A delta that keeps the last two tensors that were read in parts.

    Experts that are fused on disk and apart in memory ask for the same two over and over.
    """

    def __init__(self, delta: DeltaLike) -> None:
        self._delta = delta
        self._kept: dict[str, torch.Tensor] = {}

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor for the caller to keep."""
        return self._read(name)

    def run(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) of a tensor in row-major order, for the caller to keep."""
        if isinstance(self._delta, Delta):
            tensor = torch.empty(stop - start, dtype=getattr(torch, self._delta.dtype))
            self._delta.read_into(name, tensor, start=start)
            return tensor
        return self._read(name).reshape(-1)[start:stop].clone()

    def into(self, name: str, start: int, out: torch.Tensor) -> bool:
        """Fill a flat tensor with elements from `start` on; say whether the delta can do that."""
        if not isinstance(self._delta, Delta):
            return False
        self._delta.read_into(name, out, start=start)
        return True

    def part(self, name: str) -> torch.Tensor:
        """Return a tensor to copy from."""
        if name not in self._kept:
            while len(self._kept) >= 2:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = self._read(name)
        return self._kept[name]

    def _read(self, name: str) -> torch.Tensor:
        """Return a tensor in host memory, also of a mapping that holds its own on a device."""
        return self._delta[name].cpu()


_REQUIRES_GRAD = operator.attrgetter("requires_grad")


@dataclass(frozen=True)
class Target:
    """One weight, and the tensors of the delta that are injected into it, whole or in parts.

    An adapted weight trains through factors; `parameter` is then the first of these. `tied` are
    tensors of the delta that are the same as its source, and the same parameter.
    """

    name: str
    sources: tuple[str, ...]
    parts: tuple[Rectangle, ...]
    parameter: nn.Parameter
    shape: tuple[int, ...]
    adapted: Adapted | None = None
    tied: tuple[str, ...] = ()

    @functools.cached_property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the optimizer steps."""
        return (self.parameter,) if self.adapted is None else self.adapted.trained

    @property
    def trains(self) -> bool:
        """Whether nothing of it is frozen."""
        return all(map(_REQUIRES_GRAD, self.trained))

    @property
    def delta_name(self) -> str:
        """The delta's name, of several the first."""
        return self.sources[0]

    def numel(self, shard: Shard) -> int:
        """Return how many elements this process holds."""
        if shard.span is not None:
            return shard.span[1] - shard.span[0]
        return shard.weight().numel() if shard.process_groups else math.prod(self.shape)

    def read(self, delta: DeltaReader, shard: Cut) -> torch.Tensor:
        """Return the part of Δ that this process holds, flat, in the delta's dtype, on the CPU.

        Only that part is read where it is a run of rows. Where several sources
        make up the weight, two of them at most are held beside the result.
        """
        if not self.parts and shard.span is not None:
            return delta.run(self.delta_name, *shard.span)
        whole = delta.whole(self.delta_name) if not self.parts else self._assembled(delta)
        local = shard.cut(whole)
        # A part must not keep the whole alive.
        if local.numel() == whole.numel():
            return local.reshape(-1)
        return local.clone(memory_format=torch.contiguous_format).view(-1)

    def run(self, shard: Shard) -> Run | None:
        """Return the part that this process holds as elements of one tensor of the delta.

        None where it is not a run of them.
        """
        if self.parts or (shard.span is None and shard.process_groups):
            return None
        return Run(self.delta_name, *(shard.span or (0, math.prod(self.shape))))

    def read_into(self, delta: DeltaReader, shard: Shard, out: torch.Tensor) -> None:
        """Fill a flat CPU tensor, page-locked or not, with the part that this process holds."""
        run = self.run(shard)
        if run is None or not delta.into(run.name, run.start, out):
            out.copy_(self.read(delta, shard))

    def _assembled(self, delta: DeltaReader) -> torch.Tensor:
        result: torch.Tensor | None = None
        for source in self.sources:
            stored = delta.part(source)
            if result is None:
                result = torch.empty(self.shape, dtype=stored.dtype)
            for inside, outside in self._windows(source, stored, result):
                inside.copy_(outside)
        if result is None:
            raise DriftError(f"{self.name} has no tensor of the delta")
        return result

    def spread(self, whole: torch.Tensor, into: Mapping[str, torch.Tensor]) -> None:
        """Copy values of the weight's shape to where the delta holds them, in contiguous tensors.

        Elements of those tensors that other weights hold are left as they are.
        """
        for source in self.sources:
            if not self.parts:
                into[source].copy_(whole.view(into[source].shape))
            for inside, outside in self._windows(source, into[source], whole):
                outside.copy_(inside)

    def _windows(
        self, source: str, stored: torch.Tensor, whole: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the same elements in the weight and in a tensor of the delta, part by part."""
        rows, flat = whole.view(matrix(self.shape)), stored.reshape(-1)
        for name, top, bottom, left, right, offset, down, across in self.parts:
            if name == source:
                box = (bottom - top, right - left)
                inside = rows[top:bottom, left:right]
                yield inside, torch.as_strided(flat, box, (down, across), offset)
