"""The ring of buffers that Δ comes through, by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drift_fast.inject.placement.held import InHostMemory
from drift_fast.inject.placement.stores import Ring


def plain_ring(count: int = 7, *, dtype: torch.dtype = torch.bfloat16) -> tuple[Ring, list[Any]]:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(100 + 31 * at, generator=generator).to(dtype) for at in range(count)]
    ring = Ring([InHostMemory(tensor) for tensor in tensors], [], torch.device("cpu"), 0)
    return ring, tensors


def walk(ring: Ring, tensors: list[torch.Tensor], *, buckets: int | None = None) -> None:
    for at in range(len(ring.buckets) if buckets is None else buckets):
        with ring.bucket(at) as found:
            start, stop = ring.buckets[at]
            for one, other in zip(found, tensors[start:stop], strict=True):
                assert torch.equal(one, other), at


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_a_ring_of_host_tensors_turns_for_ever(count: int) -> None:
    ring, tensors = plain_ring(count)
    for _ in range(5):
        walk(ring, tensors)


@pytest.mark.parametrize("count", [3, 5, 9])
def test_a_ring_starts_anew_wherever_it_was_left(count: int) -> None:
    ring, tensors = plain_ring(count)
    count = len(ring.buckets)
    assert count >= 2
    for buckets in (*range(count + 1), *reversed(range(count))):
        walk(ring, tensors, buckets=buckets)
        # Given up inside a bucket.
        with pytest.raises(KeyError), ring.bucket(min(buckets, count - 1)):
            raise KeyError
        walk(ring, tensors)
    walk(ring, tensors)


def test_what_is_kept_in_several_types_stays_exact() -> None:
    tensors = [torch.randn(70), torch.randn(200).bfloat16(), torch.randn(300).half()]
    for order in (tensors, tensors[::-1]):
        ring = Ring([InHostMemory(tensor) for tensor in order], [], torch.device("cpu"), 0)
        for start, stop, found in ring.batches():
            for one, other in zip(found, order[start:stop], strict=True):
                assert torch.equal(one, other.float())
