"""Embeddings and heads, whose rows are tokens: paired row by row, since vocabularies differ.

Owns which embedding or head belongs to which and what is left out of tied ones; which rows are the
same token is `vocabulary`'s. They are never part of a delta unless they are selected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from drift_fast.alignment.layout import Part, Shape
from drift_fast.alignment.match import Match, Pair
from drift_fast.alignment.vocabulary import RowMap, match_rows
from drift_fast.errors import CoverageError
from drift_fast.names import kind_of
from drift_fast.selection import Selection

Rows = Literal["token", "index"] | None

TIED = "tied to the embedding by the configuration: one parameter, taken with embed"


@dataclass(frozen=True)
class VocabularySide:
    """One model's tensors, where its tokenizer lies, and whether the head is tied."""

    tensors: Mapping[str, Shape]
    directory: Path
    tied: bool


@dataclass
class RowPairs:
    """The pairing with rows in place of whole embeddings, and what was found on the way."""

    match: Match
    maps: dict[str, RowMap] = field(default_factory=dict)


def pair_rows(
    found: Match,
    selection: Selection,
    left: VocabularySide,
    right: VocabularySide,
    *,
    rows: Rows,
    strict: bool,
) -> RowPairs:
    """Pair the selected embeddings and heads of the right side by rows.

    A head that the right side ties to its embedding is left out, since they are one parameter; one
    that only the left side ties is paired with the left embedding, which it is.

    Raises:
        CoverageError: when strict, vocabularies that cannot be compared.
        CheckpointError: a tokenizer that is not valid.
        ValueError: another `rows`.
    """
    chosen = {
        name: kind_of(name)
        for name in right.tensors
        if name in selection and _is_vocabulary(name, right.tensors)
    }
    counterparts = _counterparts(found, left, right)
    by_name = {pair.name: pair for pair in found.pairs}
    reasons = dict(found.unmatched_right)
    result = RowPairs(found)
    for name, kind in chosen.items():
        if kind == "head" and right.tied:
            by_name.pop(name, None)
            reasons[name] = TIED
            continue
        source = counterparts.get(name)
        by_name.pop(name, None)
        if source is None:
            reasons.setdefault(name, "the other model has no single tensor of its kind and width")
            continue
        try:
            rows_of = match_rows(
                left.directory,
                right.directory,
                left.tensors[source][0],
                right.tensors[name][0],
                by=rows,
            )
        except CoverageError as error:
            what = f"{source} {list(left.tensors[source])} and {name} {list(right.tensors[name])}"
            if strict:
                raise CoverageError(f"{what}: {error}") from error
            reasons[name] = f"{what}: {error}"
            continue
        result.maps[name] = rows_of
        by_name[name] = Pair(name, _parts(source, rows_of, right.tensors[name]))
    taken = {source for pair in by_name.values() for source in pair.sources}
    left_reasons = dict(found.unmatched_left)
    if left.tied:
        left_reasons |= {name: TIED for name in left.tensors if kind_of(name) == "head"}
    result.match = replace(
        found,
        pairs=[by_name[name] for name in right.tensors if name in by_name],
        unmatched_left=[
            (name, left_reasons.get(name) or "its counterpart is left out")
            for name in left.tensors
            if name not in taken
        ],
        unmatched_right=[(name, reasons[name]) for name in right.tensors if name not in by_name],
    )
    return result


def _is_vocabulary(name: str, tensors: Mapping[str, Shape]) -> bool:
    return kind_of(name) in ("embed", "head") and len(tensors[name]) in (1, 2)


def _counterparts(found: Match, left: VocabularySide, right: VocabularySide) -> dict[str, str]:
    """Return the left tensor of each embedding and head on the right that has one.

    What was paired or has the same name below the aligned prefixes goes first, so that a second
    language model's embedding is not taken for the backbone's; of what is left over, only one of a
    kind on either side is placed.
    """
    placed = found.vocabularies | {
        pair.name: pair.source
        for pair in found.pairs
        if isinstance(pair.source, str) and _is_vocabulary(pair.name, right.tensors)
    }
    first, second = (f"{prefix}." if prefix else "" for prefix in found.prefixes)
    for name in left.tensors:
        partner = second + name.removeprefix(first)
        fits = partner in right.tensors and _is_vocabulary(name, left.tensors)
        if fits and name.startswith(first) and partner not in placed:
            placed[partner] = name
    for kind, sources in (("embed", ("embed",)), ("head", ("head", "embed"))):
        free = [n for n, s in right.tensors.items() if kind_of(n) == kind and len(s) == 2]
        if any(name in placed for name in free):
            continue
        of_kind: list[str] = []
        for wanted in sources:
            of_kind = of_kind or [
                n for n, s in left.tensors.items() if kind_of(n) == wanted and len(s) == 2
            ]
        if len(free) == len(of_kind) == 1:
            placed[free[0]] = of_kind[0]
    return {
        name: source
        for name, source in placed.items()
        if left.tensors[source][1:] == right.tensors[name][1:]
    }


def _parts(source: str, rows: RowMap, shape: Shape) -> str | list[Part]:
    columns = shape[1] if len(shape) > 1 else 1
    if rows.runs == [(0, 0, shape[0])] and rows.left_rows == shape[0]:
        return source
    return [
        (source, right, right + count, 0, columns, left * columns, columns, 1)
        for left, right, count in rows.runs
    ]
