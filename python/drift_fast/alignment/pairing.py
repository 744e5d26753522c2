"""Open two checkpoints and pair what is selected; of the weights only samples are read.

Owns what is selected, what is refused and the account of it. Which tensor belongs to which is
`matching`'s, rows of embeddings are `rows`', and whether the weights agree is `likeness`'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from drift_fast import _core
from drift_fast.alignment.coverage import NOT_SELECTED, Coverage, backbone_numel, listed
from drift_fast.alignment.embeddings import TIED, Rows, VocabularySide, pair_rows
from drift_fast.alignment.layout import Shape
from drift_fast.alignment.mapping import MappingLike
from drift_fast.alignment.match import LEFT_OUT, Match, Pair, Side, match, skipping_inserted
from drift_fast.alignment.similarity import Likeness, compare, warn_if_unrelated
from drift_fast.alignment.transformers_layout import convert_checkpoint
from drift_fast.checkpoints.config_json import Configuration
from drift_fast.checkpoints.opened import ITEMSIZE, Opened, PathLike, open_checkpoint
from drift_fast.checkpoints.source import Source
from drift_fast.errors import AlignmentError, CoverageError
from drift_fast.names import container_of, is_other_modality, kind_of
from drift_fast.selection import Selection

FetchProgress = Callable[[int, int], object]


@dataclass(frozen=True)
class Pairing:
    """Two open checkpoints and the pairs of tensors to subtract, layer by layer."""

    reasoning: _core.Checkpoint
    multimodal: _core.Checkpoint
    sources: tuple[Source, Source]
    selection: Selection
    pairs: list[Pair]
    shapes: dict[str, Shape]
    nbytes: int
    coverage: Coverage
    prefixes: tuple[str, str]
    rivals: list[tuple[str, str, int]]
    how: str
    opened: tuple[Opened, Opened]
    stated: bool
    compared: list[Pair]
    likeness: Likeness | None = None
    rows: dict[str, str] = field(default_factory=dict)

    def nbytes_of(self, pair: Pair) -> int:
        """Return how many bytes of both checkpoints a pair's difference takes."""
        return _nbytes(pair, *self.opened)

    def needed(self) -> tuple[set[str], set[str]]:
        """Return the stored tensors of either side that the pairs need, scales included."""
        left, right = self.opened
        return (
            left.stored_names(source for pair in self.pairs for source in pair.sources),
            right.stored_names(pair.name for pair in self.pairs),
        )

    def describe(self) -> dict[str, object]:
        """Return how the pairing came about, for `drift.json`."""
        return {
            "prefixes": list(self.prefixes),
            "rivals": [list(rival) for rival in self.rivals],
            "by": self.how,
            "composed": {pair.name: pair.sources for pair in self.pairs if pair.parts},
            "rows": self.rows,
            "likeness": None if self.likeness is None else self.likeness.to_json(),
        }


def side_of(opened: Opened) -> Side:
    """Return the tensors of a checkpoint as `match` takes them."""
    return Side(opened.shapes, lambda: convert_checkpoint(opened.directory, opened.shapes))


def looks_exchanged(left: Mapping[str, Shape], right: Mapping[str, Shape], found: Match) -> str:
    """Return what speaks for the two models being exchanged, or nothing."""
    towers = [name for name, _ in found.unmatched_left if is_other_modality(name)]
    # A stray buffer is no tower.
    if len(towers) < 4 or any(map(is_other_modality, right)):
        return ""
    return (
        f"the reasoning checkpoint has tensors of another modality, {towers[0]} and "
        f"{len(towers) - 1} more, and the multimodal one has none: the two seem to be exchanged, "
        "and an injection along this Δ would lead away from reasoning. Exchange them, or pass "
        "strict=False if this is meant"
    )


def match_checkpoints(
    left: Opened, right: Opened, mapping: MappingLike | None, *, strict: bool = True
) -> Match:
    """Pair all tensors of two checkpoints.

    Raises:
        AlignmentError: nothing matches, layer counts differ, two pairings fit, a mapping that does
            not hold, or, when strict, two models that seem to be exchanged.
    """
    try:
        found = match(side_of(left), side_of(right), mapping=mapping)
    except AlignmentError as error:
        paths = f"{left.source.path} and {right.source.path}"
        raise AlignmentError(f"{paths}: {error}") from error
    exchanged = looks_exchanged(left.shapes, right.shapes, found)
    if exchanged and strict and mapping is None:
        raise AlignmentError(exchanged)
    if found.layer_conflict:
        inserted = skipping_inserted(left.shapes, right.shapes, found)
        names = f"{left.source.path} {right.source.path}"
        remedy = (
            "choose a reasoning model of the same backbone"
            if inserted is None
            else "the multimodal model has inserted layers "
            f"{', '.join(map(str, inserted.layers))}, which the other has no counterpart for, so "
            "all later ones have other numbers. "
            f"`drift-fast align {names} --out map.json` writes a map that leaves them out; look it "
            "over and pass mapping='map.json'"
        )
        raise AlignmentError(
            f"{found.layer_conflict}. {left.source.path} and {right.source.path} have different "
            f"depths; {remedy}"
        )
    return found


def pair_checkpoints(
    reasoning: PathLike | Opened,
    multimodal: PathLike | Opened,
    selection: Selection,
    *,
    strict: bool,
    reader: str = "auto",
    mapping: MappingLike | None = None,
    rows: Rows = None,
    min_coverage: float | None = None,
) -> Pairing:
    """Open both checkpoints and pair what is selected, by names and shapes; no weight is read.

    Raises:
        FileNotFoundError, CheckpointError: a checkpoint that is not there or not valid.
        AlignmentError: nothing matches, layer counts differ, two pairings fit, or, when strict, a
            selected tensor has no partner of its shape.
        CoverageError: no pair is selected, fewer than `min_coverage` of the selected parameters are
            covered, or embeddings whose rows cannot be matched.
        ValueError: a selected layer that the model does not have, or an argument without meaning.
    """
    if min_coverage is not None and not 0.0 <= min_coverage <= 1.0:
        raise ValueError(f"min_coverage must be between 0 and 1, got {min_coverage!r}")
    if rows not in (None, "token", "index"):
        raise ValueError(f"rows must be 'token' or 'index', got {rows!r}")
    left, right = (
        side if isinstance(side, Opened) else open_checkpoint(side, reader)
        for side in (reasoning, multimodal)
    )
    found = match_checkpoints(left, right, mapping, strict=strict)
    selection.check_layers(pair.name for pair in found.pairs)
    by_row = pair_rows(
        found,
        selection,
        VocabularySide(
            left.shapes, _tokenizer(left, selection), Configuration.read(left.directory).is_tied
        ),
        VocabularySide(
            right.shapes, _tokenizer(right, selection), Configuration.read(right.directory).is_tied
        ),
        rows=rows,
        strict=strict,
    )
    found = by_row.match
    pairs = sorted(
        (pair for pair in found.pairs if pair.name in selection), key=lambda pair: _order(pair.name)
    )
    coverage, missing_left, missing_right = _account(
        found, selection, pairs, left.shapes, right.shapes
    )
    missing = missing_left + missing_right
    if mapping is not None:
        # What is stated to have no partner, and layers that only the multimodal model has, are in
        # the coverage; what a mapping does not speak of is missing.
        missing = [item for item in missing_left if item[1] != LEFT_OUT]
    between = f"between {left.source.path} and {right.source.path}"
    if missing and (strict or not pairs):
        raise AlignmentError(
            f"{len(missing)} tensors of {selection} have no partner ({coverage.fraction:.1%} of "
            f"the selected parameters are covered), {between}:"
            f"{listed(missing)}\nSelect other modules or layers, or pass strict=False to go on "
            "without them"
        )
    if not pairs:
        kinds = ", ".join(sorted({kind_of(pair.name) for pair in found.pairs}))
        raise CoverageError(
            f"{selection} selects none of the {len(found.pairs)} paired tensors of "
            f"{right.source.path}, which are of {kinds}"
        )
    if min_coverage is not None and coverage.fraction < min_coverage:
        raise CoverageError(
            f"{coverage.fraction:.1%} of the selected parameters are covered {between}, less than "
            f"min_coverage={min_coverage:.1%}:{listed(missing_left + missing_right)}"
        )
    nbytes = sum(_nbytes(pair, left, right) for pair in pairs)
    # Other layers than the selected ones tell a shift, but are not downloaded for it.
    local = left.source.remote is None and right.source.remote is None
    return Pairing(
        left.checkpoint,
        right.checkpoint,
        (left.source, right.source),
        selection,
        pairs,
        right.shapes,
        nbytes,
        coverage,
        found.prefixes,
        found.rivals,
        found.how,
        (left, right),
        mapping is not None,
        comparable(found.pairs if local else pairs, left, right, selection),
        rows={name: str(rows_of) for name, rows_of in by_row.maps.items()},
    )


def _nbytes(pair: Pair, left: Opened, right: Opened) -> int:
    itemsize = ITEMSIZE.get(left.dtypes[pair.sources[0]], 1)
    return right.nbytes(pair.name) + pair.numel(right.shapes) * itemsize


def comparable(pairs: list[Pair], left: Opened, right: Opened, selection: Selection) -> list[Pair]:
    """Return the pairs whose weights are to be compared: the selected modules, in every layer."""
    everywhere = replace(selection, layers=None)
    return [
        pair
        for pair in pairs
        if pair.name in everywhere
        and right.has_values(pair.name)
        and all(left.has_values(name) for name in pair.sources)
        # Parts of codes are refused when they are subtracted.
        and not (pair.parts and any(name in left.scales for name in pair.sources))
    ]


def fetch(
    pairing: Pairing,
    reader: str,
    progress: FetchProgress | None = None,
    *,
    needed: tuple[set[str], set[str]] | None = None,
) -> Pairing:
    """Download what the pairs need of checkpoints that are not on this machine, or what is named.

    Raises:
        CheckpointError: a server that fails, or a file that changed there.
        OSError: the disk is full.
    """
    opened = []
    for side, source, checkpoint, names in zip(
        pairing.opened,
        pairing.sources,
        (pairing.reasoning, pairing.multimodal),
        pairing.needed() if needed is None else needed,
        strict=True,
    ):
        if source.remote is None:
            opened.append(checkpoint)
            continue
        ranges: dict[str, list[tuple[int, int]]] = {}
        for name in sorted(names):
            path, start, end = checkpoint.place(name)
            ranges.setdefault(Path(path).name, []).append((start, end))
        source.transfers.append(source.remote.fetch(ranges, progress=progress))
        opened.append(_core.Checkpoint(source.path, reader=reader, block=side.block))
    return replace(pairing, reasoning=opened[0], multimodal=opened[1])


def verify(pairing: Pairing) -> Pairing:
    """Compare samples of the paired weights and return the pairing with what was found.

    Raises:
        AlignmentError: weights that do not belong together, as `likeness.compare` finds them.
    """
    likeness = compare(pairing.reasoning, pairing.multimodal, pairing.compared, pairing.shapes)
    warn_if_unrelated(likeness, *(source.path for source in pairing.sources))
    return replace(pairing, likeness=likeness)


def _tokenizer(opened: Opened, selection: Selection) -> Path:
    """Return where a checkpoint's tokenizer lies, downloaded if it is needed and remote."""
    remote = opened.source.remote
    wanted = any(kind_of(n) in ("embed", "head") and n in selection for n in opened.shapes)
    if remote is not None and wanted:
        for name in ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json"):
            remote.optional_file(name)
    return opened.directory


def _account(
    found: Match,
    selection: Selection,
    pairs: list[Pair],
    left_shapes: Mapping[str, Shape],
    right_shapes: Mapping[str, Shape],
) -> tuple[Coverage, list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the coverage and what of either side is selected without a partner."""
    chosen = {pair.name for pair in pairs}
    dropped = [pair for pair in found.pairs if pair.name not in chosen]
    missing_left = [
        item for item in found.unmatched_left if item[0] in selection and item[1] != TIED
    ]
    # Other towers have attention too; only the containers of paired layers are the backbone.
    backbone = {container_of(pair.name) for pair in found.pairs} - {None}
    heads = [name for name in right_shapes if kind_of(name) == "head"]
    below = f"{found.prefixes[1]}." if found.prefixes[1] else ""

    def belongs(name: str) -> bool:
        if container_of(name) is not None:
            return container_of(name) in backbone
        kind = kind_of(name)
        if kind == "head" and len(heads) == 1:
            return True
        return kind in ("norm", "embed", "head") and bool(below) and name.startswith(below)

    missing_right = [
        item
        for item in found.unmatched_right
        if item[0] in selection and item[1] != TIED and belongs(item[0])
    ]
    numel = sum(pair.numel(right_shapes) for pair in pairs)
    # Rows of an embedding that only the multimodal vocabulary has.
    rows_numel = sum(math.prod(right_shapes[pair.name]) for pair in pairs) - numel
    # A pair whose shapes differ is missing on both sides but is one parameter of the model.
    missing_numel = max(
        sum(math.prod(left_shapes[name]) for name, _ in missing_left),
        sum(math.prod(right_shapes[name]) for name, _ in missing_right),
    )
    used = {source for pair in pairs for source in pair.sources}
    coverage = Coverage(
        matched=[(source, pair.name) for pair in pairs for source in pair.sources],
        unmatched_reasoning=[
            (name, NOT_SELECTED)
            for name in dict.fromkeys(source for pair in dropped for source in pair.sources)
            if name not in used
        ]
        + found.unmatched_left,
        unmatched_multimodal=[(pair.name, NOT_SELECTED) for pair in dropped]
        + found.unmatched_right,
        matched_numel=numel,
        selected_numel=numel + rows_numel + missing_numel,
        backbone_numel=backbone_numel(right_shapes, backbone),
        backbone_matched_numel=backbone_numel(
            {pair.name: (pair.numel(right_shapes),) for pair in pairs}, backbone
        ),
    )
    return coverage, missing_left, missing_right


def _order(name: str) -> list[tuple[int, str]]:
    """Sort layer 2 before layer 10, whatever order the files have."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
