"""Tensors that lie at equal distances in one memory, taken as one: one launch in place of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def spaced(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[range, torch.Tensor]]:
    """Yield runs of contiguous tensors of one shape and dtype, each with a view of the run.

    A view has the shape [run, *shape] and copies nothing. A run goes on while the next tensor lies
    behind the last one in the same memory, as far from it as that is from the one before.
    """
    start = 0
    while start < len(tensors):
        first, distance, stop = tensors[start], 0, start + 1
        while stop < len(tensors) and _memory(tensors[stop]) == _memory(first):
            gap = int(tensors[stop].storage_offset() - tensors[stop - 1].storage_offset())
            if gap < first.numel() or (stop > start + 1 and gap != distance):
                break
            distance, stop = gap, stop + 1
        shape, strides = (stop - start, *first.shape), (distance, *first.stride())
        yield range(start, stop), first.as_strided(shape, strides)
        start = stop


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
