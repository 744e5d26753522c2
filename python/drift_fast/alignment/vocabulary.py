"""Which rows of two embeddings or heads mean the same token.

A row is matched only where both sides are known to mean the same token: by its string in one
spelling, or by its index because the caller says so. No weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from drift_fast.errors import CoverageError

if TYPE_CHECKING:
    from drift_fast.alignment.tokenizer_files import Vocabulary

_BY_INDEX = 'pass rows="index" if row i of both means the same token'


@dataclass(frozen=True)
class TokenRows:
    """The rows of an embedding or head, and the checkpoint whose tokenizer names them."""

    directory: Path
    count: int


@dataclass(frozen=True)
class RowCount:
    """What of one side's rows is left over: rows without a match, and tokens beyond the rows.

    Padding rows, which have no token, are not counted.
    """

    unmatched: int
    beyond: int = 0


@dataclass(frozen=True)
class RowMap:
    """Matched rows as maximal runs (reasoning row, multimodal row, count), by multimodal row.

    `reasoning` and `multimodal` count the leftovers of either side.
    """

    runs: list[tuple[int, int, int]]
    reasoning_rows: int
    multimodal_rows: int
    reasoning: RowCount
    multimodal: RowCount
    how: Literal["token", "index"] = "token"

    @property
    def matched(self) -> int:
        """The number of matched rows."""
        return sum(count for *_, count in self.runs)

    def __str__(self) -> str:
        way, what = ("token string", "tokens") if self.how == "token" else ("index", "rows")
        beyond = ""
        if self.reasoning.beyond or self.multimodal.beyond:
            beyond = (
                f"; ids beyond the rows: {self.reasoning.beyond:,} and {self.multimodal.beyond:,}"
            )
        return (
            f"{self.matched:,} of {self.multimodal_rows:,} rows matched by {way}; "
            f"{self.reasoning.unmatched:,} {what} only in the reasoning checkpoint, "
            f"{self.multimodal.unmatched:,} only in the multimodal one{beyond}"
        )


def match_rows(
    reasoning: TokenRows, multimodal: TokenRows, *, by: Literal["token", "index"] | None = None
) -> RowMap:
    """Match the rows of two embeddings or heads, by token unless the caller says by index.

    By token, the tokenizers beside both checkpoints are read and equal strings match. By index,
    row i matches row i up to the smaller size and no tokenizer is read.

    Raises:
        CheckpointError: a tokenizer that `read_vocabulary` refuses.
        CoverageError: a tokenizer that is missing, two that spell tokens differently, or no match.
        ValueError: another `by`.
    """
    if by not in (None, "token", "index"):
        raise ValueError(f"rows must be 'token' or 'index', got {by!r}")
    found, against = (
        _by_index(reasoning, multimodal) if by == "index" else _by_token(reasoning, multimodal)
    )
    if not found.runs:
        raise CoverageError(
            f"no row of the {reasoning.count:,} of {reasoning.directory} matches one of the "
            f"{multimodal.count:,} of {multimodal.directory} by {against}; leave embeddings and "
            "heads out"
        )
    return found


def count_moved(reasoning: Path, multimodal: Path) -> int:
    """Return how many tokens of two tokenizers have another row, or none, on the other side.

    Raises:
        CheckpointError, CoverageError: as `match_rows` by token.
    """
    first, second = _comparable(reasoning, multimodal)
    return len({token for token, _ in first.tokens.items() ^ second.tokens.items()})


def _by_index(reasoning: TokenRows, multimodal: TokenRows) -> tuple[RowMap, str]:
    count = min(reasoning.count, multimodal.count)
    left_over = RowCount(reasoning.count - count), RowCount(multimodal.count - count)
    runs = [(0, 0, count)] if count else []
    return RowMap(runs, reasoning.count, multimodal.count, *left_over, "index"), "index"


def _by_token(reasoning: TokenRows, multimodal: TokenRows) -> tuple[RowMap, str]:
    first, second = _comparable(reasoning.directory, multimodal.directory)
    pairs = [
        (row, other)
        for token, row in first.tokens.items()
        if row < reasoning.count
        and (other := second.tokens.get(token, multimodal.count)) < multimodal.count
    ]
    pairs.sort(key=lambda pair: pair[1])

    def left_over(vocabulary: Vocabulary, rows: TokenRows) -> RowCount:
        held = sum(row < rows.count for row in vocabulary.tokens.values())
        return RowCount(held - len(pairs), len(vocabulary.tokens) - held)

    found = RowMap(
        _runs(pairs),
        reasoning.count,
        multimodal.count,
        left_over(first, reasoning),
        left_over(second, multimodal),
    )
    sizes = [f"{one.path} ({len(one.tokens):,})" for one in (first, second)]
    return found, f"token between {' and '.join(sizes)}"


def _comparable(reasoning: Path, multimodal: Path) -> tuple[Vocabulary, Vocabulary]:
    # Loaded here, since few runs select an embedding.
    from drift_fast.alignment.tokenizer_files import SAVE, read_vocabulary

    first, second = read_vocabulary(reasoning), read_vocabulary(multimodal)
    if first is None or second is None:
        missing = [str(path) for path, v in ((reasoning, first), (multimodal, second)) if v is None]
        raise CoverageError(
            f"no tokenizer in {' nor in '.join(missing)}, so rows cannot be matched by token; "
            f"{SAVE}, or {_BY_INDEX}"
        )
    if first.scheme != second.scheme:
        raise CoverageError(
            f"{first.path} spells tokens as {first.scheme} and {second.path} as {second.scheme}, "
            "so equal strings are not equal tokens; choose a reasoning model with the same "
            f"tokenizer, or {_BY_INDEX}"
        )
    return first, second


def _runs(pairs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    def start(item: tuple[int, tuple[int, int]]) -> tuple[int, int]:
        index, (first, second) = item
        return first - index, second - index

    groups = (list(group) for _, group in groupby(enumerate(pairs), start))
    return [(*group[0][1], len(group)) for group in groups]
