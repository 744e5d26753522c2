"""Embeddings and heads, whose rows are tokens: paired row by row, since vocabularies differ.

Owns which embedding or head belongs to which, and what is left out of tied ones. Which rows are the
same token is `vocabulary`'s. They are part of a delta only when they are selected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from drift_fast.alignment.coverage import NOT_SELECTED
from drift_fast.alignment.layout import Rectangle
from drift_fast.alignment.name_alignment import NameAlignment, Pair
from drift_fast.alignment.tied import Ties
from drift_fast.alignment.vocabulary import RowMap, TokenRows, match_rows
from drift_fast.checkpoints.opened import Opened
from drift_fast.errors import CoverageError
from drift_fast.names import bare, kind_of
from drift_fast.selection import Selection
from drift_fast.shapes import Shape

Rows = Literal["token", "index"] | None

# What to download of a checkpoint on a server to read its vocabulary.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json")

# Why a head has no match: the other model has none that is known.
NO_HEAD = (
    "the other model stores no head, and its config.json does not tie one to the embedding; take a "
    "checkpoint of it with its head, or set tie_word_embeddings to true there if the embedding is "
    "its head"
)
TIED = "tied to the embedding by the configuration: one parameter, taken with embed"


@dataclass(frozen=True)
class RowAlignment:
    """The alignment with rows in place of whole embeddings, and what was found on the way.

    `maps` are the matched rows and `problems` why rows could not be matched, by multimodal name.
    """

    alignment: NameAlignment
    maps: dict[str, RowMap] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def align_rows(
    found: NameAlignment,
    reasoning: Opened,
    multimodal: Opened,
    selection: Selection | set[str],
    rows: Rows,
    ties: tuple[Ties, Ties],
) -> RowAlignment:
    """Pair the selected embeddings and heads of the multimodal model by rows.

    Of others with different numbers of rows it is only noted that they are not selected.

    A head that the multimodal model ties to its embedding is left out, since they are one
    parameter. One that only the reasoning model ties is paired with that model's embedding. `ties`
    are those of the reasoning and of the multimodal model.

    Raises:
        CheckpointError: a tokenizer that is not valid.
    """
    held, here = _vocabulary(reasoning), _vocabulary(multimodal)
    for side, names in ((reasoning, held), (multimodal, here)):
        if any(name in selection for name in names):
            side.download_files(TOKENIZER_FILES)
    reasoning_ties, multimodal_ties = ties
    has_embedding = bool(_of_kind("embed", here))
    chosen = [name for name, shape in here.items() if name in selection and len(shape) in (1, 2)]
    sources = _sources(found, reasoning, multimodal, tied=reasoning_ties.tied)
    pairs = {pair.name: pair for pair in found.pairs if pair.name not in chosen}
    maps: dict[str, RowMap] = {}
    problems: dict[str, str] = {}
    reasons = dict(found.unmatched_multimodal)
    reasons_of_reasoning = dict(found.unmatched_reasoning)
    for name in chosen:
        source = sources.get(name)
        if kind_of(name) == "head" and multimodal_ties.tied and has_embedding:
            reasons[name] = TIED
        elif kind_of(name) == "head" and source is None and reasoning_ties.unknown:
            reasons[name] = NO_HEAD
        elif source is None:
            reasons.setdefault(name, "the other model has no single tensor of its kind and width")
        else:
            try:
                maps[name] = _match(source, name, reasoning, multimodal, rows)
            except CoverageError as error:
                reasons[name] = problems[name] = str(error)
                reasons_of_reasoning[source] = f"its rows have no match in those of {name}"
            else:
                pairs[name] = Pair(name, _parts(source, maps[name], multimodal.shapes[name]))
    for name, source in sources.items():
        if name not in chosen and name not in pairs and kind_of(name) == kind_of(source):
            reasons[name] = reasons_of_reasoning[source] = NOT_SELECTED
    if reasoning_ties.tied or multimodal_ties.unknown:
        reason = TIED if reasoning_ties.tied else NO_HEAD
        reasons_of_reasoning |= {n: reason for n in held if kind_of(n) == "head"}
    taken = {source for pair in pairs.values() for source in pair.sources}
    alignment = replace(
        found,
        pairs=[pairs[name] for name in multimodal.shapes if name in pairs],
        unmatched_reasoning=[
            (name, reasons_of_reasoning.get(name) or "its match is left out")
            for name in reasoning.shapes
            if name not in taken
        ],
        unmatched_multimodal=[(n, reasons[n]) for n in multimodal.shapes if n not in pairs],
    )
    return RowAlignment(alignment, maps, problems)


def _match(source: str, name: str, reasoning: Opened, multimodal: Opened, rows: Rows) -> RowMap:
    """Match the rows of one tensor with those of another; an error names both."""
    here, there = reasoning.shapes[source], multimodal.shapes[name]
    try:
        return match_rows(
            TokenRows(reasoning.directory, here[0]),
            TokenRows(multimodal.directory, there[0]),
            by=rows,
        )
    except CoverageError as error:
        raise CoverageError(f"{source} {list(here)} and {name} {list(there)}: {error}") from error


def _vocabulary(side: Opened) -> dict[str, Shape]:
    """Return the embeddings and heads, and everything else whose name says that it is one."""
    return {n: shape for n, shape in side.shapes.items() if kind_of(n) in ("embed", "head")}


def _sources(
    found: NameAlignment, reasoning: Opened, multimodal: Opened, *, tied: bool
) -> dict[str, str]:
    """Return the reasoning tensor of each multimodal embedding and head that has one.

    What was paired or has the same name below the aligned prefixes goes first, so that a second
    language model's embedding is not taken for the backbone's. A leftover is
    placed only if it is the only one of its kind on either side. Where the reasoning model ties
    them, its embedding is its head and its head its embedding.
    """
    held, here = (
        {name: shape for name, shape in _vocabulary(side).items() if len(shape) in (1, 2)}
        for side in (reasoning, multimodal)
    )
    placed = found.vocabularies | {
        pair.name: pair.source
        for pair in found.pairs
        if pair.name in here and isinstance(pair.source, str)
    }
    first, second = (f"{prefix}." if prefix else "" for prefix in found.prefixes)
    stored = {bare(name): name for name in multimodal.shapes}
    for source in held:
        plain = bare(source)
        name = stored.get(second + plain.removeprefix(first), "")
        if name and plain.startswith(first) and name not in placed:
            placed[name] = source
    for kind, tied_kind in (("embed", "head"), ("head", "embed")):
        free = _of_kind(kind, here)
        if any(name in placed for name in free):
            continue
        candidates = _of_kind(kind, held)
        if tied and not candidates:
            candidates = _of_kind(tied_kind, held)
        if len(free) == len(candidates) == 1:
            placed[free[0]] = candidates[0]
    return {
        name: source
        for name, source in placed.items()
        if reasoning.shapes[source][1:] == multimodal.shapes[name][1:]
    }


def _of_kind(kind: str, shapes: Mapping[str, Shape]) -> list[str]:
    return [name for name, shape in shapes.items() if kind_of(name) == kind and len(shape) == 2]


def _parts(source: str, rows: RowMap, shape: Shape) -> str | list[Rectangle]:
    columns = shape[1] if len(shape) > 1 else 1
    if rows.runs == [(0, 0, shape[0])] and rows.reasoning_rows == shape[0]:
        return source
    return [
        Rectangle(source, there, there + count, 0, columns, here * columns, columns, 1)
        for here, there, count in rows.runs
    ]
