"""Add increments to 16-bit weights that are too small for these, without losing any.

A bfloat16 weight has eight bits, so that an increment below 1/512 of it rounds away, and a motion
in forty of them would not move at all. Here the motion up to now is rounded, to multiples of
the weight's unit in the last place, and the weight gets the difference to the last step. Each
element rounds at a threshold of its own, u in (0, 1), the same in every step:

    w += h·(⌊m_t/h + u⌋ − ⌊m_{t−1}/h + u⌋)        h the unit, m_t the motion up to step t

The mean over u is m_t − m_{t−1} exactly, and while h stays the differences add up to one rounding
of the whole motion. Independent rounding of every increment has that mean too, but its errors add
up: measured for a motion of two units in forty steps, three times as large.

Owns no state: u is a function of the seed, the tensor's name and the element's place in the whole
tensor, so that shards, replicas and a resumed run round alike, on any device.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import torch

# The largest prime below 2²²: rows of no usual width repeat at the same column.
_PERIOD = 4_194_301
# Bits of the significand that are stored, and the smallest unit.
_STORED = {torch.bfloat16: (7, 2.0**-126), torch.float16: (10, 2.0**-24)}


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype would lose small increments."""
    return dtype in _STORED


def units(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the unit in the last place of float32 sizes, none negative, in a 16-bit dtype."""
    bits, smallest = _STORED[dtype]
    # A float32 without its significand is the power of two below.
    unit = (size.view(torch.int32) & 0x7F800000).view(torch.float32).mul_(2.0**-bits)
    # An infinite weight has an infinite unit; the bound makes any finite motion zero units of it.
    return unit.clamp_(smallest, 2.0**120)


class Thresholds:
    """u of every element, from one table of random numbers that is made on the CPU.

    It is read from a place that the tensor's name decides, and from its start again at its end.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tables: dict[torch.device, torch.Tensor] = {}

    def prepare(self, device: torch.device) -> None:
        """Bring the table to a device, which waits for it."""
        if device not in self._tables:
            generator = torch.Generator().manual_seed(self._seed)
            table = torch.rand(_PERIOD, generator=generator).clamp_(2.0**-25, 1 - 2.0**-24)
            self._tables[device] = table.to(device)

    def runs(self, name: str, start: int, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield u of a flat weight's elements in runs; `start` is the first one's place."""
        stop = start + weight.numel()
        while start < stop:
            place = (zlib.crc32(name.encode()) + start) % _PERIOD
            run = self._tables[weight.device][place : place + stop - start]
            yield run
            start += run.numel()


def add_narrow(
    weight: torch.Tensor,
    delta: torch.Tensor,
    before: float,
    after: float,
    thresholds: Iterable[torch.Tensor],
) -> None:
    """Move a flat 16-bit tensor from `before`·delta to `after`·delta, in place.

    Weights that are not finite stay as they are. Nothing waits for the device; memory for four
    million float32 values, a few times over, is used.
    """
    start = 0
    for u in thresholds:
        run = slice(start, start + u.numel())
        _add(weight[run], delta[run], before, after, u)
        start = run.stop


def _add(
    weight: torch.Tensor, delta: torch.Tensor, before: float, after: float, u: torch.Tensor
) -> None:
    wide, step = weight.float(), delta.float()
    old, new = step * before, step * after
    # For a weight that is far smaller than the motion, zero included, a unit that is large enough
    # for float32 to hold the motion's number of units and its fraction.
    unit = units(torch.maximum(wide.abs(), new.abs().mul_(2.0**-8)), weight.dtype)
    count = new.div_(unit).add_(u).floor_().sub_(old.div_(unit).add_(u).floor_())
    weight.copy_(wide.add_(count.mul_(unit)))
