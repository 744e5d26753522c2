"""A layout says where the elements of a tensor lie; numpy, which moves them, must agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_fast.alignment.layout import Layout, Rectangle, compose, covered, whole
from drift_fast.shapes import matrix

Array = npt.NDArray[np.int64]


def numbered(shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    """Return tensors in which no two elements are equal."""
    arrays, start = {}, 0
    for name, shape in shapes.items():
        numel = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.arange(start, start + numel).reshape(shape)
        start += numel
    return arrays


def materialized(layout: Layout, stored: Mapping[str, Array]) -> Array:
    result = np.full(layout.shape, -1, dtype=np.int64)
    for block in layout.blocks:
        flat = np.ascontiguousarray(stored[block.source]).reshape(-1)
        box = tuple(
            slice(start, start + size) for start, size in zip(block.start, block.size, strict=True)
        )
        index = sum(
            np.arange(size).reshape([-1 if d == dim else 1 for d in range(len(block.size))])
            * stride
            for dim, (size, stride) in enumerate(zip(block.size, block.strides, strict=True))
        )
        assert (result[box] == -1).all(), "two blocks overlap"
        result[box] = flat[block.offset + index]
    return result


def gathered(
    parts: Sequence[Rectangle], shape: Sequence[int], stored: Mapping[str, Array]
) -> Array:
    rows, columns = matrix(shape)
    result = np.full((rows, columns), -1, dtype=np.int64)
    for name, top, bottom, left, right, offset, down, across in parts:
        flat = np.ascontiguousarray(stored[name]).reshape(-1)
        index = np.arange(bottom - top)[:, None] * down + np.arange(right - left) * across
        assert (result[top:bottom, left:right] == -1).all(), "two parts overlap"
        result[top:bottom, left:right] = flat[offset + index]
    return result.reshape(shape)


@st.composite
def built(draw: st.DrawFn) -> tuple[Layout, Array, dict[str, Array]]:
    """A layout made by a random chain of operations, and what numpy makes of the same."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    count = draw(st.integers(1, 3))
    stored = numbered({f"t{n}": shape for n in range(count)})
    layouts = [Layout.stored(name, shape) for name in stored]
    arrays = list(stored.values())
    if draw(st.booleans()):
        dim = draw(st.integers(0, len(shape) - 1))
        layout, array = Layout.concatenated(layouts, dim), np.concatenate(arrays, dim)
    else:
        dim = draw(st.integers(0, len(shape)))
        layout, array = Layout.stacked(layouts, dim), np.stack(arrays, dim)
    for _ in range(draw(st.integers(0, 3))):
        operation = draw(st.sampled_from(["transpose", "narrow", "squeeze"]))
        dim = draw(st.integers(0, array.ndim - 1))
        if operation == "transpose":
            other = draw(st.integers(0, array.ndim - 1))
            layout, array = layout.transposed(dim, other), array.swapaxes(dim, other)
        elif operation == "narrow":
            first = draw(st.integers(0, array.shape[dim] - 1))
            length = draw(st.integers(1, array.shape[dim] - first))
            layout = layout.narrowed(dim, first, length)
            array = array.take(range(first, first + length), dim)
        elif array.ndim > 2 and array.shape[dim] == 1:
            layout, array = layout.squeezed(dim), array.squeeze(dim)
    return layout, array, stored


@given(built())
@settings(deadline=None)
def test_a_layout_holds_what_the_same_operations_on_arrays_give(
    case: tuple[Layout, Array, dict[str, Array]],
) -> None:
    layout, array, stored = case
    assert layout.shape == array.shape
    assert np.array_equal(materialized(layout, stored), array)


@given(built(), st.data())
@settings(deadline=None)
def test_parts_fill_a_stored_tensor_with_its_counterpart_whatever_either_side_is_made_of(
    case: tuple[Layout, Array, dict[str, Array]], data: st.DataObject
) -> None:
    left, array, stored = case
    # The right side holds the same tensor, cut along one dimension into pieces, each transposed.
    dim = data.draw(st.integers(0, array.ndim - 1))
    cut = data.draw(st.integers(1, array.shape[dim]))
    swap = data.draw(st.booleans()) and array.ndim > 1
    pieces = {
        f"p{n}": piece.swapaxes(-1, -2) if swap else piece
        for n, piece in enumerate(np.array_split(array, [cut], dim))
        if piece.size
    }
    layouts = [Layout.stored(name, piece.shape) for name, piece in pieces.items()]
    right = Layout.concatenated(
        [layout.transposed(-1, -2) if swap else layout for layout in layouts], dim
    )
    shapes = {name: piece.shape for name, piece in pieces.items()}
    filled = compose({"x": left}, {"y": right}, [("x", "y")], shapes)
    assert filled.keys() == pieces.keys()
    for name, parts in filled.items():
        assert covered(parts) == pieces[name].size
        assert np.array_equal(gathered(parts, shapes[name], stored), pieces[name])


def test_a_tensor_that_is_another_one_whole_is_known_as_such() -> None:
    left = {"x": Layout.stored("a", (3, 4, 5))}
    parts = compose(left, {"y": Layout.stored("b", (3, 4, 5))}, [("x", "y")], {"b": (3, 4, 5)})
    assert whole(parts["b"], (3, 4, 5), {"a": (3, 4, 5)}) == "a"


@pytest.mark.parametrize("dims", [(0, 1), (1, 2), (0, 2)])
def test_a_square_transposed_tensor_is_not_taken_for_the_whole(dims: tuple[int, int]) -> None:
    left = {"x": Layout.stored("a", (4, 4, 4)).transposed(*dims)}
    parts = compose(left, {"y": Layout.stored("b", (4, 4, 4))}, [("x", "y")], {"b": (4, 4, 4)})
    assert whole(parts["b"], (4, 4, 4), {"a": (4, 4, 4)}) is None


def test_a_tensor_with_a_gap_counts_fewer_elements() -> None:
    left = {"x": Layout.stored("a", (2, 3))}
    right = {"y": Layout.stored("b", (4, 3)).narrowed(0, 1, 2)}
    parts = compose(left, right, [("x", "y")], {"b": (4, 3)})["b"]
    assert covered(parts) == 6
    assert parts == [("a", 1, 3, 0, 3, 0, 3, 1)]


def test_tensors_that_do_not_fit_are_not_joined() -> None:
    layouts = [Layout.stored("a", (2, 3)), Layout.stored("b", (2, 4))]
    with pytest.raises(ValueError, match=r"\[2, 4\].*\[2, 3\].*dimension 0"):
        Layout.concatenated(layouts, 0)
    with pytest.raises(ValueError, match="size one"):
        layouts[0].squeezed(0)
