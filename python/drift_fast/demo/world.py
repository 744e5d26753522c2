"""The demo's task: fold handwritten digits with made-up operations.

Owns the vocabulary, the operation tables, the split of the digit images, and the drawing of
problems and batches. Knows nothing about models or training. Invariant: everything drawn depends
on the seed and the given generator only, and an image of one split never appears in a problem of
another.

A problem shows nine digits in a 3 x 3 grid and asks either to write out some cells, or to fold them
from the left, ``(B f E) g A``. Operations are random Latin squares over 0-9: without knowing a
table, 10 % of guesses are right. A fold is answered with its chain of thought::

    fact    3 f 7 =               ->  4 <eos>
    text    3 f 7 g 1 ?           ->  3 f 7 = 4 g 1 = 9 <eos>
    image   <image> B f E g A ?   ->  3 f 7 = 4 g 1 = 9 <eos>
    read    <image> B E A :       ->  3 7 1 <eos>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from drift_fast.demo.digits import load_digits

BASE: Final = 10
GRID: Final = 3
CELLS: Final = GRID * GRID
DIGIT_PIXELS: Final = 8
IMAGE_PIXELS: Final = GRID * DIGIT_PIXELS
OPERATIONS: Final = 4

# Token ids. Digits come right after the special tokens, so `DIGIT + d` is the id of digit d.
PAD: Final = 0
BOS: Final = 1
EOS: Final = 2
IMAGE: Final = 3
DIGIT: Final = 4
CELL: Final = DIGIT + BASE
OPERATION: Final = CELL + CELLS
EQUALS: Final = OPERATION + OPERATIONS
FOLD: Final = EQUALS + 1
WRITE_OUT: Final = EQUALS + 2
VOCABULARY: Final = EQUALS + 3

IGNORED_LABEL: Final = -100

Split = Literal["train", "validation", "test"]
# Images of each split, out of 1,797; the others are for training.
HELD_OUT: Final = {"validation": 300, "test": 300}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with its answer: token ids, and the image that it is about (None for text)."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    digits: tuple[int, ...]
    operations: tuple[int, ...]
    image: NDArray[np.float32] | None

    @property
    def answer(self) -> int:
        """The last digit of the target: the value of the fold, or the last digit read."""
        return self.target[-2] - DIGIT


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded arrays: ids and labels ``[n, tokens]`` int64, pixels ``[n, 1, 24, 24]``."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixel_values: NDArray[np.float32] | None


class World:
    """The operation tables, the entries of them that the base knows, and the digit images.

    Args:
        seed: decides the tables, the known half of each, and the split of the images.
    """

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng([seed, 0])
        self.seed = seed
        self.tables = np.stack([_latin_square(generator) for _ in range(OPERATIONS)])
        self.known = np.stack([_half_of_each_row(generator) for _ in range(OPERATIONS)])
        self._known_steps = np.argwhere(self.known)
        self._pixels, self._by_digit = _split_digits(np.random.default_rng([seed, 1]))

    def steps(self, digits: Sequence[int], operations: Sequence[int]) -> list[int]:
        """Values of the left fold after each operation; the last one is the answer."""
        if len(digits) != len(operations) + 1:
            raise ValueError(
                f"a fold of {len(operations)} operations needs {len(operations) + 1} digits, "
                f"got {len(digits)}"
            )
        values = []
        value = digits[0]
        for operation, digit in zip(operations, digits[1:], strict=True):
            value = int(self.tables[operation, value, digit])
            values.append(value)
        return values

    def text_fold(self, generator: np.random.Generator, length: int) -> Problem:
        """Draw a fold of `length` digits as text, from all of every table."""
        digits, operations = self._draw_fold(generator, length)
        return self._fold(digits, operations, [DIGIT + d for d in digits], image=None)

    def text_known_fact(self, generator: np.random.Generator) -> Problem:
        """Draw an entry to complete, from the half of the tables that the base knows."""
        digits, operations = self._draw_known_step(generator)
        statement = _expression([DIGIT + d for d in digits], operations)
        return Problem(
            prompt=(BOS, *statement, EQUALS),
            target=(DIGIT + self.steps(digits, operations)[0], EOS),
            digits=tuple(digits),
            operations=tuple(operations),
            image=None,
        )

    def text_copy(
        self, generator: np.random.Generator, length: int, *, expression: bool = False
    ) -> Problem:
        """Draw digits or an expression to repeat: reading, but in plain text."""
        digits, operations = self._draw_fold(generator, length)
        operands = [DIGIT + d for d in digits]
        return _write_out(digits, operations if expression else [], operands, image=None)

    def image_fold(self, generator: np.random.Generator, length: int, split: Split) -> Problem:
        """Draw a fold of `length` cells of an image, from all of every table."""
        digits, operations = self._draw_fold(generator, length)
        cells, image = self._draw_grid(generator, digits, split)
        return self._fold(digits, operations, [CELL + c for c in cells], image=image)

    def image_known_step(self, generator: np.random.Generator, split: Split) -> Problem:
        """Draw one step over two cells, from the half of the tables that the base knows."""
        digits, operations = self._draw_known_step(generator)
        cells, image = self._draw_grid(generator, digits, split)
        return self._fold(digits, operations, [CELL + c for c in cells], image=image)

    def image_read(
        self,
        generator: np.random.Generator,
        length: int,
        split: Split,
        *,
        expression: bool = False,
    ) -> Problem:
        """Draw `length` cells of an image to read, or an expression over them."""
        digits, operations = self._draw_fold(generator, length)
        cells, image = self._draw_grid(generator, digits, split)
        operands = [CELL + c for c in cells]
        return _write_out(digits, operations if expression else [], operands, image=image)

    def image_indices(self, split: Split) -> NDArray[np.int64]:
        """Indices into the digits that problems of this split may show."""
        return np.sort(np.concatenate(self._by_digit[split]))

    def _draw_fold(
        self, generator: np.random.Generator, length: int
    ) -> tuple[list[int], list[int]]:
        return _integers(generator, BASE, length), _integers(generator, OPERATIONS, length - 1)

    def _draw_known_step(self, generator: np.random.Generator) -> tuple[list[int], list[int]]:
        operation, left, right = self._known_steps[generator.integers(len(self._known_steps))]
        return [int(left), int(right)], [int(operation)]

    def _draw_grid(
        self, generator: np.random.Generator, digits: Sequence[int], split: Split
    ) -> tuple[list[int], NDArray[np.float32]]:
        """Place each digit in its cell, and fill the other cells with any digits."""
        order = generator.permutation(CELLS)
        shown = generator.integers(BASE, size=CELLS)
        cells = order[: len(digits)]
        shown[cells] = digits
        image = np.empty((IMAGE_PIXELS, IMAGE_PIXELS), dtype=np.float32)
        for cell, digit in enumerate(shown):
            top, left = (DIGIT_PIXELS * i for i in divmod(cell, GRID))
            choice = generator.choice(self._by_digit[split][digit])
            image[top : top + DIGIT_PIXELS, left : left + DIGIT_PIXELS] = self._pixels[choice]
        return [int(c) for c in cells], image

    def _fold(
        self,
        digits: Sequence[int],
        operations: Sequence[int],
        operands: Sequence[int],
        *,
        image: NDArray[np.float32] | None,
    ) -> Problem:
        target = [DIGIT + digits[0]]
        values = self.steps(digits, operations)
        for operation, digit, value in zip(operations, digits[1:], values, strict=True):
            target += [OPERATION + operation, DIGIT + digit, EQUALS, DIGIT + value]
        return Problem(
            prompt=(*_opening(image), *_expression(operands, operations), FOLD),
            target=(*target, EOS),
            digits=tuple(digits),
            operations=tuple(operations),
            image=image,
        )


def collate(problems: Sequence[Problem]) -> Batch:
    """Stack problems into one right-padded batch whose labels cover the targets only.

    With causal attention no token sees padding to its right, so no attention mask is needed.
    """
    images = [p.image for p in problems if p.image is not None]
    if len(images) not in (0, len(problems)):
        raise ValueError("a batch has either text problems or image problems, not both")
    rows = [(*p.prompt, *p.target) for p in problems]
    shape = (len(rows), max(map(len, rows)))
    input_ids = np.full(shape, PAD, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    for i, (problem, row) in enumerate(zip(problems, rows, strict=True)):
        input_ids[i, : len(row)] = row
        labels[i, len(problem.prompt) : len(row)] = problem.target
    return Batch(
        input_ids=input_ids,
        labels=labels,
        pixel_values=np.stack(images)[:, None] if images else None,
    )


def _opening(image: NDArray[np.float32] | None) -> tuple[int, ...]:
    return (BOS,) if image is None else (BOS, *[IMAGE] * CELLS)


def _expression(operands: Sequence[int], operations: Sequence[int]) -> list[int]:
    """Return operand tokens with operations between them, or without operations a list."""
    if not operations:
        return list(operands)
    tokens = [operands[0]]
    for operation, operand in zip(operations, operands[1:], strict=True):
        tokens += [OPERATION + operation, operand]
    return tokens


def _write_out(
    digits: Sequence[int],
    operations: Sequence[int],
    operands: Sequence[int],
    *,
    image: NDArray[np.float32] | None,
) -> Problem:
    return Problem(
        prompt=(*_opening(image), *_expression(operands, operations), WRITE_OUT),
        target=(*_expression([DIGIT + d for d in digits], operations), EOS),
        digits=tuple(digits),
        operations=tuple(operations),
        image=image,
    )


def _integers(generator: np.random.Generator, high: int, count: int) -> list[int]:
    return [int(i) for i in generator.integers(high, size=count)]


def _latin_square(generator: np.random.Generator) -> NDArray[np.int64]:
    """A Latin square of order 10: addition modulo 10 with shuffled rows, columns and symbols."""
    rows, columns, symbols = (generator.permutation(BASE) for _ in range(3))
    square: NDArray[np.int64] = symbols[(rows[:, None] + columns[None, :]) % BASE]
    return square


def _half_of_each_row(generator: np.random.Generator) -> NDArray[np.bool_]:
    rank = np.argsort(generator.random((BASE, BASE)), axis=1)
    return rank < BASE // 2


def _split_digits(
    generator: np.random.Generator,
) -> tuple[NDArray[np.float32], dict[Split, list[NDArray[np.int64]]]]:
    """The digits, scaled to 0-1, and the indices of each digit in each split."""
    images, labels = load_digits()
    order = generator.permutation(len(images))
    validation, test, train = np.split(order, np.cumsum(list(HELD_OUT.values())))
    splits: dict[Split, NDArray[np.int64]] = {
        "train": train,
        "validation": validation,
        "test": test,
    }
    pixels = (images / 16.0).astype(np.float32)
    by_digit = {
        name: [indices[labels[indices] == digit] for digit in range(BASE)]
        for name, indices in splits.items()
    }
    return pixels, by_digit
