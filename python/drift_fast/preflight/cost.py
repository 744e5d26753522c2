"""What computing Δ and training with it takes: bytes on disk, read, downloaded and in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from drift_fast.alignment.model_pair import AlignedPair

# What the README's table shows for either command, whatever the size of the checkpoints.
_COMPUTE_MEMORY_NBYTES = 20_000_000
# Bytes of an element on disk and on the device, where a compressed Δ is decoded to bfloat16.
ITEMSIZE = {
    "bfloat16": (2.0, 2),
    "float16": (2.0, 2),
    "float32": (4.0, 4),
    "int8": (1 + 2 / 64, 2),
}


@dataclass(frozen=True)
class DeltaCost:
    """What computing Δ and training with it takes, in bytes, and seconds at an assumed rate.

    `read_nbytes` are of the first and of the second checkpoint. `seconds` is reading both and
    writing Δ at `rate_nbytes` a second. `training_memory_nbytes` is Δ on the device, beside the
    weights; `compute_memory_nbytes` was measured and does not depend on the size.
    """

    dtype: str
    delta_nbytes: int
    read_nbytes: tuple[int, int]
    compute_memory_nbytes: int
    training_memory_nbytes: int
    rate_nbytes: int
    seconds: float
    download_nbytes: int

    def lines(self) -> list[str]:
        """Return the cost as text, a line for each resource."""
        first, second = map(_nbytes, self.read_nbytes)
        return [
            f"disk      {_nbytes(self.delta_nbytes)} for Δ in {self.dtype}",
            f"reading   {first} of the first checkpoint and {second} of the second",
            f"download  {_nbytes(self.download_nbytes)}",
            f"time      {_seconds(self.seconds)} to read and write at {_nbytes(self.rate_nbytes)} "
            "per second, a rate assumed and not measured",
            f"memory    about {_nbytes(self.compute_memory_nbytes)} to compute, whatever the size",
            f"training  {_nbytes(self.training_memory_nbytes)} for Δ on the device, beside the "
            "weights",
        ]


def estimate_cost(pair: AlignedPair, dtype: str, rate_nbytes: int) -> DeltaCost:
    """Return what Δ of a pair takes, with reading and writing at an assumed rate."""
    of_second = sum(pair.multimodal.nbytes(one.name) for one in pair.pairs)
    on_disk, on_device = ITEMSIZE[dtype]
    numel = sum(math.prod(pair.shapes[one.name]) for one in pair.pairs)
    delta_nbytes = math.ceil(on_disk * numel)
    return DeltaCost(
        dtype=dtype,
        delta_nbytes=delta_nbytes,
        read_nbytes=(pair.nbytes - of_second, of_second),
        compute_memory_nbytes=_COMPUTE_MEMORY_NBYTES,
        training_memory_nbytes=on_device * numel,
        rate_nbytes=rate_nbytes,
        seconds=(pair.nbytes + delta_nbytes) / rate_nbytes,
        download_nbytes=sum(
            side.download_nbytes(needed)
            for side, needed in zip((pair.reasoning, pair.multimodal), pair.needed(), strict=True)
        ),
    )


def _nbytes(nbytes: int) -> str:
    if nbytes == 0:
        return "nothing"
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}".replace(".00 ", " ")
    return f"{nbytes} bytes"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
