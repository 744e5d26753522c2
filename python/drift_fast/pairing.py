"""Open two checkpoints and pair their tensors by name and shape; no weight is read.

Owns what is selected, what is refused and the account of it. The search for prefixes is Rust's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

from drift_fast import _core
from drift_fast.coverage import NOT_SELECTED, Coverage, listed
from drift_fast.errors import AlignmentError, CoverageError
from drift_fast.select import Selection, container_of, kind_of
from drift_fast.source import Source, resolve

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Pairing:
    """Two open checkpoints and the pairs of tensors to subtract, layer by layer."""

    reasoning: _core.Checkpoint
    multimodal: _core.Checkpoint
    sources: tuple[Source, Source]
    selection: Selection
    pairs: list[tuple[str, str]]
    shapes: dict[str, tuple[int, ...]]
    nbytes: int
    coverage: Coverage
    prefixes: tuple[str, str]
    rivals: list[tuple[str, str, int]]


def pair_checkpoints(
    reasoning: PathLike,
    multimodal: PathLike,
    selection: Selection,
    *,
    strict: bool,
    reader: str,
) -> Pairing:
    """Open both checkpoints and pair what is selected.

    Raises:
        FileNotFoundError, CheckpointError: a checkpoint that is not there or not valid.
        AlignmentError: nothing matches, layer counts differ, two pairings fit, or, when strict, a
            selected tensor has no partner of its shape.
        CoverageError: no pair is selected.
        ValueError: a selected layer that the model does not have.
    """
    sources = resolve(reasoning), resolve(multimodal)
    left, right = (_core.Checkpoint(source.path, reader=reader) for source in sources)
    left_tensors, right_tensors = left.tensors(), right.tensors()
    try:
        aligned = _core.align(
            [(name, shape) for name, _, shape, _ in left_tensors],
            [(name, shape) for name, _, shape, _ in right_tensors],
        )
    except AlignmentError as error:
        paths = " and ".join(str(source.path) for source in sources)
        raise AlignmentError(f"{paths}: {error}") from error
    if aligned.layer_conflict:
        raise AlignmentError(
            f"{aligned.layer_conflict}. {sources[0].path} and {sources[1].path} have different "
            "depths; choose a reasoning model of the same backbone"
        )
    shapes = {name: tuple(shape) for name, _, shape, _ in right_tensors}
    selection.check_layers(name for _, name in aligned.pairs)
    pairs = sorted(
        (pair for pair in aligned.pairs if pair[1] in selection), key=lambda pair: _order(pair[1])
    )
    coverage, missing = _account(
        aligned,
        selection,
        pairs,
        shapes,
        {name: tuple(shape) for name, _, shape, _ in left_tensors},
    )
    if missing and (strict or not pairs):
        raise AlignmentError(
            f"{len(missing)} tensors of {selection} have no partner ({coverage.fraction:.1%} of "
            f"the selected parameters are covered), between {sources[0].path} and "
            f"{sources[1].path}:"
            f"{listed(missing)}\nSelect other modules or layers, or pass strict=False to go on "
            "without them"
        )
    if not pairs:
        raise CoverageError(
            f"{selection} selects none of the {len(aligned.pairs)} paired tensors of "
            f"{sources[1].path}, which are of {_kinds(name for _, name in aligned.pairs)}"
        )
    itemsize = _itemsizes(left_tensors), _itemsizes(right_tensors)
    nbytes = sum(
        math.prod(shapes[name]) * (itemsize[0][other] + itemsize[1][name]) for other, name in pairs
    )
    return Pairing(
        left,
        right,
        sources,
        selection,
        pairs,
        shapes,
        nbytes,
        coverage,
        aligned.prefixes,
        aligned.rivals,
    )


def _account(
    aligned: _core.Aligned,
    selection: Selection,
    pairs: list[tuple[str, str]],
    right_shapes: dict[str, tuple[int, ...]],
    left_shapes: dict[str, tuple[int, ...]],
) -> tuple[Coverage, list[tuple[str, str]]]:
    """Return the coverage and what is selected without a partner."""
    chosen = {name for _, name in pairs}
    dropped = [pair for pair in aligned.pairs if pair[1] not in chosen]
    missing_left = [item for item in aligned.unmatched_left if item[0] in selection]
    # Other towers have attention too; only the containers of paired layers are the backbone.
    backbone = {container_of(name) for _, name in aligned.pairs} - {None}
    missing_right = [
        item
        for item in aligned.unmatched_right
        if item[0] in selection and container_of(item[0]) in backbone
    ]
    numel = sum(math.prod(right_shapes[name]) for _, name in pairs)
    # A pair whose shapes differ is missing on both sides but is one parameter of the model.
    missing_numel = max(
        sum(math.prod(left_shapes[name]) for name, _ in missing_left),
        sum(math.prod(right_shapes[name]) for name, _ in missing_right),
    )
    coverage = Coverage(
        matched=pairs,
        unmatched_reasoning=[(name, NOT_SELECTED) for name, _ in dropped] + aligned.unmatched_left,
        unmatched_multimodal=[(name, NOT_SELECTED) for _, name in dropped]
        + aligned.unmatched_right,
        matched_numel=numel,
        selected_numel=numel + missing_numel,
    )
    return coverage, missing_left + missing_right


def _order(name: str) -> list[tuple[int, str]]:
    """Sort layer 2 before layer 10, whatever order the files have."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _kinds(names: Iterable[str]) -> str:
    return ", ".join(sorted({kind_of(name) for name in names}))


_ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


def _itemsizes(tensors: list[tuple[str, str, list[int], os.PathLike[str]]]) -> dict[str, int]:
    return {name: _ITEMSIZE.get(dtype, 1) for name, dtype, _, _ in tensors}
