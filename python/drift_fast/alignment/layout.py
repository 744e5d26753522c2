"""Tensors that one model stores whole and another in pieces: experts, and fused projections.

Owns `Layout`, a tensor that exists only as blocks of stored ones, and the step from two layouts of
one tensor to the parts that the reader gathers. Nothing is copied and no weight is read: a block is
a box of the tensor, and the offset and strides at which a stored tensor holds its elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

Shape = tuple[int, ...]

# Name, first and end row, first and end column, offset, row stride, column stride: a rectangle of a
# tensor seen as rows × columns, and where a stored tensor holds its elements, all in elements.
Part = tuple[str, int, int, int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a tensor (first index and size in each dimension) that lies in a stored one."""

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

        def swap(values: Shape) -> Shape:
            order = list(values)
            order[first], order[second] = order[second], order[first]
            return tuple(order)

        return type(self)(
            swap(self.shape),
            tuple(
                Block(swap(b.start), swap(b.size), b.source, b.offset, swap(b.strides))
                for b in self.blocks
            ),
        )

    def unsqueezed(self, dim: int) -> Layout:
        """Insert a dimension of size one."""

        def insert(values: Shape, value: int) -> Shape:
            return (*values[:dim], value, *values[dim:])

        return type(self)(
            insert(self.shape, 1),
            tuple(
                Block(
                    insert(b.start, 0), insert(b.size, 1), b.source, b.offset, insert(b.strides, 0)
                )
                for b in self.blocks
            ),
        )

    def squeezed(self, dim: int) -> Layout:
        """Drop a dimension of size one.

        Raises:
            ValueError: the dimension is larger.
        """
        if self.shape[dim] != 1:
            raise ValueError(f"dimension {dim} of {list(self.shape)} is not of size one")

        def drop(values: Shape) -> Shape:
            return (*values[:dim], *values[dim + 1 :])

        return type(self)(
            drop(self.shape),
            tuple(
                Block(drop(b.start), drop(b.size), b.source, b.offset, drop(b.strides))
                for b in self.blocks
            ),
        )

    def narrowed(self, dim: int, first: int, length: int) -> Layout:
        """Keep `length` indices of one dimension, from `first` on."""
        box = [(0, size) for size in self.shape]
        box[dim] = (first, length)
        start = tuple(begin for begin, _ in box)
        size = tuple(extent for _, extent in box)
        kept = (_cut(block, start, size) for block in self.blocks)
        moved = tuple(
            Block(
                tuple(a - b for a, b in zip(block.start, start, strict=True)),
                block.size,
                block.source,
                block.offset,
                block.strides,
            )
            for block in kept
            if block is not None
        )
        return type(self)(size, moved)

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
                    f"{list(layout.shape)} and {list(first)} cannot be joined along dimension {dim}"
                )
        ends = list(accumulate((layout.shape[dim] for layout in layouts), initial=0))
        blocks = tuple(
            Block(
                (*b.start[:dim], b.start[dim] + begin, *b.start[dim + 1 :]),
                b.size,
                b.source,
                b.offset,
                b.strides,
            )
            for layout, begin in zip(layouts, ends, strict=False)
            for b in layout.blocks
        )
        return cls((*first[:dim], ends[-1], *first[dim + 1 :]), blocks)

    @classmethod
    def stacked(cls, layouts: Sequence[Layout], dim: int) -> Layout:
        """Put tensors one after another along a new dimension."""
        return cls.concatenated([layout.unsqueezed(dim) for layout in layouts], dim)


def contiguous_strides(shape: Sequence[int]) -> Shape:
    """Return the strides, in elements, of a tensor that lies in memory in order."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def compose(
    left: Mapping[str, Layout],
    right: Mapping[str, Layout],
    pairs: Sequence[tuple[str, str]],
    shapes: Mapping[str, Shape],
) -> dict[str, list[Part]]:
    """Return, by stored name on the right, the parts of stored tensors on the left that fill it.

    `pairs` are names in the two layouts whose shapes agree; `shapes` are those of the tensors
    stored on the right. Of a tensor that is filled only in part, `covered` gives less than it has.
    """
    filled: dict[str, list[Part]] = {}
    for left_name, right_name in pairs:
        if math.prod(right[right_name].shape) == 0:
            continue
        for a, b in _common(left[left_name], right[right_name]):
            filled.setdefault(b.source, []).extend(_parts(a, b, shapes[b.source]))
    return filled


def whole(parts: Sequence[Part], shape: Sequence[int], stored: Mapping[str, Shape]) -> str | None:
    """Return the name of the stored tensor that `parts` are nothing but, if they are."""
    name = parts[0][0]
    if stored[name] != tuple(shape):
        return None
    rows, columns = matrix(shape)
    straight = all(
        source == name
        and offset == first * columns + left
        and (end - first == 1 or down == columns)
        and (right - left == 1 or across == 1)
        for source, first, end, left, right, offset, down, across in parts
    )
    return name if straight and covered(parts) == rows * columns else None


def covered(parts: Sequence[Part]) -> int:
    """Return the number of elements in the parts."""
    return sum((part[2] - part[1]) * (part[4] - part[3]) for part in parts)


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return a shape as rows × columns; a vector is a column, as the reader takes it."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


def _cut(block: Block, start: Shape, size: Shape) -> Block | None:
    """Return what of a block lies in a box."""
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


def _common(left: Layout, right: Layout) -> Iterator[tuple[Block, Block]]:
    """Yield the boxes that one block of either side holds."""
    same = {(block.start, block.size): block for block in left.blocks}
    for b in right.blocks:
        a = same.get((b.start, b.size))
        if a is not None:
            yield a, b
            continue
        for a in left.blocks:
            cut = _cut(a, b.start, b.size)
            if cut is not None:
                other = _cut(b, cut.start, cut.size)
                if other is not None:
                    yield cut, other


def _parts(a: Block, b: Block, shape: Shape) -> Iterator[Part]:
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
        left = first[-1]
        yield (a.source, top, top + rows, left, left + columns, offset, down, across_columns)
