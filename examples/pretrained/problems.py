"""The problems: short stories that compute, with their numbers in the text or in an image.

Owns wording, the drawing of numbers and images, and the reading of answers. Knows no model. Every
function draws from the generator it is given, so a seed fixes everything.

A story starts with a number and changes it step by step. The numbers are a list of eight that the
story names by letter, `A` to `H`. As text the list is written out. As an image it is a grid of
handwritten digits (the demo's), two to a number. The answer is a chain of sums.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from drift_fast.demo.digits import load_digits

LETTERS: Final = "ABCDEFGH"
# Pixels of one digit, of an image's side, and digits in a row of it.
DIGIT: Final = 8
SIDE: Final = 32
_ROW: Final = SIDE // DIGIT
# Every number of a list and every result is inside these bounds.
_LOW, _HIGH, _LARGEST = 10, 60, 199
_NAMES: Final = ("Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
_THINGS: Final = ("apples", "books", "cards", "coins", "pens", "shells", "stamps", "stones")
_MORE: Final = ("gets {} more", "finds {} more", "buys {} more", "wins {} more")
_LESS: Final = ("gives {} away", "loses {}", "sells {}", "eats {}")

Half = Literal["train", "test"]


@dataclass(frozen=True)
class Problem:
    """A prompt, the answer that a model is trained to give, and the list that the image shows.

    `numbers` is None where the prompt is all there is. `result` is what counts as right.
    """

    prompt: str
    answer: str
    result: int
    numbers: tuple[int, ...] | None


def story(rng: np.random.Generator, steps: int, *, image: bool) -> Problem:
    """Return a story of so many steps; in a text, half of all stories write their numbers inline.

    Args:
        rng: what is drawn from.
        steps: how often the number changes, 1 or more.
        image: whether the list of numbers is shown, not written.
    """
    inline = not image and rng.random() < 0.5
    name, thing = _NAMES[rng.integers(8)], _THINGS[rng.integers(8)]
    while True:
        numbers = tuple(int(n) for n in rng.integers(_LOW, _HIGH, len(LETTERS)))
        used = rng.permutation(len(LETTERS))
        value = numbers[used[0]]
        sentences = [f"{name} has {_said(used[0], numbers, inline)} {thing}."]
        chain: list[str] = []
        for at in range(1, steps + 1):
            kind = rng.integers(3)
            if kind == 2:
                sentences.append("The number doubles.")
                chain.append(f"{value}+{value}={2 * value}")
                value *= 2
                continue
            other = numbers[used[at]]
            phrases, sign = (_MORE, 1) if kind == 0 else (_LESS, -1)
            said = phrases[rng.integers(4)].format(_said(used[at], numbers, inline))
            sentences.append(f"{name} {said}.")
            chain.append(f"{value}{'+' if sign > 0 else '-'}{other}={value + sign * other}")
            value += sign * other
            if not value >= 0:
                break
        if 0 <= value <= _LARGEST and len(chain) == steps:
            break
    listed = "" if inline or image else f"{_list(numbers)}\n"
    return Problem(
        prompt=f"{listed}{' '.join(sentences)} How many {thing}?\n",
        answer=f"{', '.join(chain)}. Answer: {value}",
        result=value,
        numbers=numbers if image else None,
    )


def reading(rng: np.random.Generator, *, whole: bool = False) -> Problem:
    """Return the question for one number of an image, or for the whole list."""
    numbers = tuple(int(n) for n in rng.integers(_LOW, _HIGH, len(LETTERS)))
    if whole:
        return Problem("What are the numbers?\n", _list(numbers), numbers[-1], numbers)
    at = int(rng.integers(len(LETTERS)))
    return Problem(f"What is {LETTERS[at]}?\n", str(numbers[at]), numbers[at], numbers)


def sorting(rng: np.random.Generator) -> Problem:
    """Return a text task that has nothing to do with stories: sort numbers."""
    numbers = [int(n) for n in rng.integers(_LOW, _HIGH, 6)]
    ordered = sorted(numbers)
    prompt = f"Sort these: {' '.join(map(str, numbers))}\n"
    return Problem(prompt, " ".join(map(str, ordered)), ordered[-1], None)


def single(rng: np.random.Generator) -> Problem:
    """Return one sum, without a story: what a model for numbers would have learned first."""
    left, right = (int(n) for n in rng.integers(_LOW, 2 * _HIGH, 2))
    plus = rng.random() < 0.5 or right > left
    result = left + right if plus else left - right
    return Problem(f"{left}{'+' if plus else '-'}{right}=", str(result), result, None)


def result_of(text: str) -> int | None:
    """Return the last number of an answer, None where there is none."""
    found = re.findall(r"\d+", text)
    return int(found[-1][:9]) if found else None


def image(numbers: Sequence[int], rng: np.random.Generator, half: Half) -> np.ndarray:
    """Return a list of eight numbers as pixels, float32 (3, 32, 32) in [0, 1].

    The digits are of one half of the handwritten ones: no test shows a digit of training.
    """
    canvas = np.zeros((SIDE, SIDE), dtype=np.float32)
    for at, digit in enumerate(int(d) for number in numbers for d in f"{number:02d}"):
        drawn = _digits(half)[digit]
        top, left = DIGIT * (at // _ROW), DIGIT * (at % _ROW)
        canvas[top : top + DIGIT, left : left + DIGIT] = drawn[rng.integers(len(drawn))]
    return np.broadcast_to(canvas, (3, SIDE, SIDE)).copy()


@functools.cache
def _digits(half: Half) -> tuple[np.ndarray, ...]:
    images, labels = load_digits()
    order = np.random.default_rng(0).permutation(len(images))
    cut = len(images) * 2 // 3
    chosen = order[:cut] if half == "train" else order[cut:]
    images = (images[chosen] / 16.0).astype(np.float32)
    return tuple(images[labels[chosen] == digit] for digit in range(10))


def _said(at: int, numbers: Sequence[int], inline: bool) -> str:
    return str(numbers[at]) if inline else LETTERS[at]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(f"{letter}={n}" for letter, n in zip(LETTERS, numbers, strict=True))
