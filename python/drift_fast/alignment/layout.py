"""Tensors that one model stores fused and another split: experts, and fused projections.

Owns `Layout`, a tensor that exists only as blocks of stored ones, and the step from two layouts of
one tensor to the rectangles that the reader gathers. Nothing is copied and no weight is read: a
block is a box of the tensor, with the offset and strides at which a stored tensor has its elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import NamedTuple

from drift_fast.shapes import Shape, contiguous_strides, matrix


class Rectangle(NamedTuple):
    """A rectangle of a tensor seen as rows × columns, and where a stored one holds its elements.

    Ends are exclusive; the offset and both strides are in elements of `source`.
    """

    source: str
    first_row: int
    end_row: int
    first_column: int
    end_column: int
    offset: int
    row_stride: int
    column_stride: int


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a tensor (first index and size in each dimension) that is in a stored one."""

    start: Shape
    size: Shape
    source: str
    offset: int
    strides: Shape


@dataclass(frozen=True)
class Layout:
    """A tensor as blocks of stored tensors that tile it."""

    shape: Shape
    blocks: tuple[Block, ...]

    @classmethod
    def stored(cls, name: str, shape: Sequence[int]) -> Layout:
        """Return the layout of a stored tensor: itself."""
        block = Block((0,) * len(shape), tuple(shape), name, 0, contiguous_strides(shape))
        return cls(tuple(shape), (block,))

    @property
    def sources(self) -> list[str]:
        """Names of the stored tensors, each once, in the order of the blocks."""
        return list(dict.fromkeys(block.source for block in self.blocks))

    def transposed(self, first: int, second: int) -> Layout:
        """Exchange two dimensions."""

        order = list(range(len(self.shape)))
        order[first], order[second] = second, first
        return self._reshaped(lambda values, _: tuple(values[dim] for dim in order))

    def unsqueezed(self, dim: int) -> Layout:
        """Insert a dimension of size one."""

        return self._reshaped(lambda values, one: (*values[:dim], one, *values[dim:]))

    def squeezed(self, dim: int) -> Layout:
        """Drop a dimension of size one.

        Raises:
            ValueError: the dimension is larger.
        """
        if self.shape[dim] != 1:
            raise ValueError(f"dimension {dim} of {list(self.shape)} does not have size one")

        return self._reshaped(lambda values, _: (*values[:dim], *values[dim + 1 :]))

    def _reshaped(self, change: Callable[[Shape, int], Shape]) -> Layout:
        """Change the dimensions of starts, sizes and strides; a new one has the number given."""
        blocks = (
            Block(change(b.start, 0), change(b.size, 1), b.source, b.offset, change(b.strides, 0))
            for b in self.blocks
        )
        return type(self)(change(self.shape, 1), tuple(blocks))

    def narrowed(self, dim: int, first: int, length: int) -> Layout:
        """Keep `length` indices of one dimension, from `first` on."""
        start = tuple(first if at == dim else 0 for at in range(len(self.shape)))
        size = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        kept = (_cut(block, start, size) for block in self.blocks)
        moved = (
            replace(b, start=tuple(a - o for a, o in zip(b.start, start, strict=True)))
            for b in kept
            if b is not None
        )
        return type(self)(size, tuple(moved))

    @classmethod
    def concatenated(cls, layouts: Sequence[Layout], dim: int) -> Layout:
        """Put tensors one after another along a dimension.

        Raises:
            ValueError: their other dimensions differ.
        """
        first = layouts[0].shape
        for layout in layouts:
            if [*layout.shape[:dim], *layout.shape[dim + 1 :]] != [*first[:dim], *first[dim + 1 :]]:
                raise ValueError(
                    f"{list(layout.shape)} and {list(first)} differ beside dimension {dim}"
                )
        ends = list(accumulate((layout.shape[dim] for layout in layouts), initial=0))
        blocks = tuple(
            replace(b, start=(*b.start[:dim], b.start[dim] + begin, *b.start[dim + 1 :]))
            for layout, begin in zip(layouts, ends, strict=False)
            for b in layout.blocks
        )
        return cls((*first[:dim], ends[-1], *first[dim + 1 :]), blocks)

    @classmethod
    def stacked(cls, layouts: Sequence[Layout], dim: int) -> Layout:
        """Put tensors one after another along a new dimension."""
        return cls.concatenated([layout.unsqueezed(dim) for layout in layouts], dim)


def compose(
    reasoning: Mapping[str, Layout],
    multimodal: Mapping[str, Layout],
    pairs: Sequence[tuple[str, str]],
    shapes: Mapping[str, Shape],
) -> dict[str, list[Rectangle]]:
    """Return, by stored multimodal name, the rectangles of stored reasoning tensors that fill it.

    `pairs` are names in the two layouts whose shapes agree; `shapes` are those of the stored
    multimodal tensors. `covered` of a tensor that is filled only in part is less than its size.
    """
    filled: dict[str, list[Rectangle]] = {}
    for first, second in pairs:
        if math.prod(multimodal[second].shape) == 0:
            continue
        for a, b in _common(reasoning[first], multimodal[second]):
            filled.setdefault(b.source, []).extend(_rectangles(a, b, shapes[b.source]))
    return filled


def whole(
    parts: Sequence[Rectangle], shape: Sequence[int], stored: Mapping[str, Shape]
) -> str | None:
    """Return the name of the one stored tensor that `parts` amount to, if they do."""
    name = parts[0].source
    if stored[name] != tuple(shape):
        return None
    rows, columns = matrix(shape)
    straight = all(
        part.source == name
        and part.offset == part.first_row * columns + part.first_column
        and (part.end_row - part.first_row == 1 or part.row_stride == columns)
        and (part.end_column - part.first_column == 1 or part.column_stride == 1)
        for part in parts
    )
    return name if straight and covered(parts) == rows * columns else None


def covered(parts: Sequence[Rectangle]) -> int:
    """Return the number of elements in the parts."""
    return sum((p.end_row - p.first_row) * (p.end_column - p.first_column) for p in parts)


def _cut(block: Block, start: Shape, size: Shape) -> Block | None:
    """Return the part of a block that is in a box."""
    first = tuple(max(a, b) for a, b in zip(block.start, start, strict=True))
    end = tuple(
        min(a + m, b + n) for a, m, b, n in zip(block.start, block.size, start, size, strict=True)
    )
    if any(a >= b for a, b in zip(first, end, strict=True)):
        return None
    moved = sum(
        (a - b) * stride for a, b, stride in zip(first, block.start, block.strides, strict=True)
    )
    extent = tuple(b - a for a, b in zip(first, end, strict=True))
    return Block(first, extent, block.source, block.offset + moved, block.strides)


def _common(reasoning: Layout, multimodal: Layout) -> Iterator[tuple[Block, Block]]:
    """Yield the boxes that one block of either side holds."""
    same = {(block.start, block.size): block for block in reasoning.blocks}
    for b in multimodal.blocks:
        a = same.get((b.start, b.size))
        if a is not None:
            yield a, b
            continue
        for a in reasoning.blocks:
            cut = _cut(a, b.start, b.size)
            if cut is not None:
                other = _cut(b, cut.start, cut.size)
                if other is not None:
                    yield cut, other


def _rectangles(a: Block, b: Block, shape: Shape) -> Iterator[Rectangle]:
    """Yield where `b.source`, stored with `shape`, finds the box's elements in `a.source`."""
    strides = contiguous_strides(shape)
    first, size, across = [], [1] * len(shape), [0] * len(shape)
    rest = b.offset
    for stride in strides:
        first.append(rest // stride)
        rest %= stride
    for extent, there, here in zip(b.size, b.strides, a.strides, strict=True):
        if extent > 1:
            dim = next(d for d, stride in enumerate(strides) if stride == there and shape[d] > 1)
            size[dim], across[dim] = extent, here
    while len(shape) < 2:
        shape, first, size, across = (*shape, 1), [*first, 0], [*size, 1], [*across, 0]
    rows, columns = size[-2], size[-1]
    across_columns = across[-1] if columns > 1 else 1
    down = across[-2] if rows > 1 else (columns if across_columns == 1 else 1)
    row_strides = contiguous_strides(shape[:-1])
    for outer in product(*(range(extent) for extent in size[:-2])):
        index = [begin + at for begin, at in zip(first, outer, strict=False)]
        top = sum(at * stride for at, stride in zip([*index, first[-2]], row_strides, strict=True))
        offset = a.offset + sum(at * stride for at, stride in zip(outer, across, strict=False))
        columns_of = (first[-1], first[-1] + columns)
        yield Rectangle(a.source, top, top + rows, *columns_of, offset, down, across_columns)
