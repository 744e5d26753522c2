"""Shapes of tensors, and how their elements follow one another."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, ...]


def contiguous_strides(shape: Sequence[int]) -> Shape:
    """Return the strides, in elements, of a tensor whose elements are in row-major order."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return a shape as rows × columns; a vector is a column, as the reader takes it."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]
