"""Δ pulled back onto the factors of stacked experts, a weight [experts, rows, columns].

Each expert has its own B·A, and its factors are slices of two joint parameters. Whole experts are
multiplied together; where rows are sharded, a process may hold a part of the first and the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from drift_fast.inject.lora.adapters import Adapted
from drift_fast.inject.lora.precision import full_precision

# Elements of Δ that are widened at a time.
_BLOCK = 1 << 24


def pull_back(
    delta: torch.Tensor,
    adapted: Adapted,
    weights: Sequence[torch.Tensor],
    rows: tuple[int, int] | None,
) -> list[torch.Tensor]:
    """Return Δ̃ of every trained factor, as `lora.pull_back.pull_back` does."""
    dtype = _widest(weights)
    totals = [torch.zeros(weight.shape, dtype=dtype, device=delta.device) for weight in weights]
    factors, found = _sides(adapted, weights), _sides(adapted, totals)
    with full_precision(delta.device):
        for part, some, inside in _segments(adapted, rows, delta, dtype):
            for one, (left, right), (onto_left, onto_right) in zip(
                adapted.factors, factors, found, strict=True
            ):
                scaled = part * one.scaling
                onto_left[some, inside] += scaled @ right[some].to(dtype)
                onto_right[some] += scaled.mT @ left[some, inside].to(dtype)
    return adapted.of_trained(totals)


def along(
    delta: torch.Tensor,
    adapted: Adapted,
    weights: Sequence[torch.Tensor],
    rows: tuple[int, int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two flat tensors whose dot product is Σ s·⟨B·A, Δ⟩, over the given rows of Δ."""
    dtype = _widest(weights)
    first, second = [torch.empty(0, dtype=dtype, device=delta.device)], []
    second.append(first[0])
    with full_precision(delta.device):
        for part, some, inside in _segments(adapted, rows, delta, dtype):
            for one, (left, right) in zip(adapted.factors, _sides(adapted, weights), strict=True):
                first.append(left[some, inside].to(dtype).reshape(-1))
                second.append((part @ right[some].to(dtype) * one.scaling).view(-1))
    return torch.cat(first), torch.cat(second)


def _widest(weights: Sequence[torch.Tensor]) -> torch.dtype:
    return torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32


def _sides(
    adapted: Adapted, weights: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return views [experts, rows, rank] and [experts, columns, rank] of each adapter's factors."""
    count, sides = adapted.experts, []
    for a, b in zip(weights[::2], weights[1::2], strict=True):
        first = b.view(len(b), -1, count).permute(2, 0, 1)
        second = a.view(count, -1, a.shape[1]).mT
        sides.append((second, first) if adapted.transposed else (first, second))
    return sides


def _segments(
    adapted: Adapted,
    rows: tuple[int, int] | None,
    delta: torch.Tensor,
    dtype: torch.dtype,
) -> Iterator[tuple[torch.Tensor, slice, slice]]:
    """Yield parts of Δ [experts, rows, columns], with which experts and which of their rows."""
    height, width = adapted.shape[-2:]
    start, stop = (0, math.prod(adapted.shape[:-1])) if rows is None else rows
    matrix, at = delta.view(-1, width), start
    while at < stop:
        expert, first = divmod(at, height)
        if first or stop - at < height:
            count, last = 1, min(height, first + stop - at)
        else:
            count, last = min((stop - at) // height, max(1, _BLOCK // (height * width))), height
        end = at + count * (last - first)
        part = matrix[at - start : end - start].view(count, last - first, width)
        yield part.to(dtype), slice(expert, expert + count), slice(first, last)
        at = end
