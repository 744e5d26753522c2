"""Open two checkpoints and align what is selected, up to the point where they can be read.

`align_checkpoints` opens, matches, accounts and refuses, from headers alone; `fetch` downloads what
is needed and `verify` compares samples of the weights. How tensors are matched is `match`'s, rows
of embeddings `embeddings`', and what is refused `refusals`'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from drift_fast.alignment.account import Account, account_for
from drift_fast.alignment.coverage import Coverage
from drift_fast.alignment.embeddings import RowAlignment, align_rows
from drift_fast.alignment.mapping import MappingLike
from drift_fast.alignment.match import match
from drift_fast.alignment.missed import warn_of_missed
from drift_fast.alignment.model_pair import AlignedPair, ModelPair
from drift_fast.alignment.name_alignment import NameAlignment, TensorIndex
from drift_fast.alignment.options import PairOptions
from drift_fast.alignment.refusals import OF_WEIGHTS, refuse
from drift_fast.alignment.similarity import compare_weights, warn_if_unrelated
from drift_fast.alignment.tied import check_ties, find_ties, warn_if_presumed
from drift_fast.alignment.transformers_layout import convert_checkpoint
from drift_fast.checkpoints.opened import Opened, PathLike, open_checkpoint
from drift_fast.checkpoints.unloaded import (
    BEYOND,
    BUFFER,
    layers_beyond,
    stated_layers,
    stored_layers,
)
from drift_fast.errors import AlignmentError
from drift_fast.selection import Selection

OnDownload = Callable[[int, int], object]


def align_checkpoints(
    reasoning: PathLike | Opened,
    multimodal: PathLike | Opened,
    options: PairOptions,
    *,
    selection: Selection | None = None,
) -> AlignedPair:
    """Open two checkpoints and align what is selected, from headers alone.

    `fetch` and `verify` then make the pair ready to be read. `selection` is what is selected where
    the options cannot say it.

    Raises:
        FileNotFoundError, CheckpointError: a checkpoint that is not there or not valid.
        AlignmentError, CoverageError: the first of `refusals.why_not`.
        ValueError: a selected layer that the model does not have.
    """
    pair = survey_checkpoints(reasoning, multimodal, options, selection=selection)
    refuse(pair, strict=options.strict)
    warn_of_missed(pair)
    return pair


def survey_checkpoints(
    reasoning: PathLike | Opened,
    multimodal: PathLike | Opened,
    options: PairOptions,
    *,
    selection: Selection | None = None,
) -> AlignedPair:
    """Do what `align_checkpoints` does, as far as it goes, and refuse nothing about the pair.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as `align_checkpoints`.
    """
    if selection is None:
        selection = options.selection()
    found = match_checkpoints(
        reasoning, multimodal, options.mapping, selection=selection, reader=options.reader
    )
    by_row, account = RowAlignment(found.alignment), Account([], Coverage(), [], [])
    ties = find_ties(found.reasoning, selection), find_ties(found.multimodal, selection)
    if found.failure is None and not found.alignment.layer_conflict:
        selection.check_layers(pair.name for pair in found.alignment.pairs)
        by_row = align_rows(
            found.alignment, found.reasoning, found.multimodal, selection, options.rows, ties
        )
        account = account_for(by_row.alignment, selection, found.reasoning, found.multimodal)
    return AlignedPair(
        reasoning=found.reasoning,
        multimodal=found.multimodal,
        alignment=by_row.alignment,
        stated=found.stated,
        failure=found.failure,
        options=options,
        selection=selection,
        account=account,
        rows={name: str(rows) for name, rows in by_row.maps.items()},
        row_problems=by_row.problems,
        ties=ties,
    )


def match_checkpoints(
    reasoning: PathLike | Opened,
    multimodal: PathLike | Opened,
    mapping: MappingLike | None = None,
    *,
    selection: Selection | None = None,
    reader: str = "auto",
) -> ModelPair:
    """Open two checkpoints and match all of their tensors; a failure to match is in the result.

    What no model loads is left out, unless a mapping pairs it or a pattern of `selection` names it
    on both sides.

    Raises:
        FileNotFoundError, CheckpointError: a checkpoint that is not there or not valid.
    """
    opened = _without_layers_beyond(
        side if isinstance(side, Opened) else open_checkpoint(side, reader)
        for side in (reasoning, multimodal)
    )
    named = _named(opened, mapping, selection)
    first, second = (side.with_loaded(names) for side, names in zip(opened, named, strict=True))
    failure = None
    try:
        found = match(_index(first), _index(second), mapping=mapping)
    except AlignmentError as error:
        found = NameAlignment([], [], [], ("", ""))
        failure = type(error)(f"{first.source.path} and {second.source.path}: {error}")
        failure.__cause__ = error
    first = opened[0].with_loaded({source for pair in found.pairs for source in pair.sources})
    second = opened[1].with_loaded({pair.name for pair in found.pairs})
    return ModelPair(
        reasoning=first,
        multimodal=second,
        alignment=replace(
            found,
            unmatched_reasoning=[x for x in found.unmatched_reasoning if x[0] in first.shapes],
            unmatched_multimodal=[x for x in found.unmatched_multimodal if x[0] in second.shapes],
        ),
        stated=mapping is not None,
        failure=failure,
    )


def _without_layers_beyond(sides: Iterable[Opened]) -> list[Opened]:
    """Leave out layers beyond those that both models have by config.json, which no loader reads."""
    opened = list(sides)
    stated = [stated_layers(side.directory) for side in opened]
    depths = [
        stored_layers(side.shapes) if number is None else number
        for side, number in zip(opened, stated, strict=True)
    ]
    most = max((depth for depth in depths if depth is not None), default=0)
    if stated == [None, None] or None in depths:
        return opened
    return [
        side.without(dict.fromkeys(layers_beyond(side.shapes, most), BEYOND)) for side in opened
    ]


def _named(
    sides: Sequence[Opened], mapping: MappingLike | None, selection: Selection | None
) -> list[set[str]]:
    """Return what no model loads and the user names all the same, on each side."""
    if mapping is not None:
        return [set(side.unloaded) for side in sides]
    buffers = [{name for name, why in side.unloaded.items() if why == BUFFER} for side in sides]
    if selection is None or not any(map(selection.named_by_pattern, set().union(*buffers))):
        return [set(), set()]
    return buffers


def _index(opened: Opened) -> TensorIndex:
    return TensorIndex(opened.shapes, lambda: convert_checkpoint(opened.directory, opened.shapes))


def fetch(
    pair: AlignedPair,
    on_download: OnDownload | None = None,
    *,
    needed: tuple[set[str], set[str]] | None = None,
) -> AlignedPair:
    """Download what the pair needs of checkpoints on a server, or the stored tensors `needed`.

    on_download: called with the bytes that are here and that will be, for one checkpoint at a time.

    Raises:
        CheckpointError: a server that fails, or a file that changed there.
        OSError: the disk is full.
    """
    first, second = pair.needed() if needed is None else needed
    return replace(
        pair,
        reasoning=pair.reasoning.download(first, on_download),
        multimodal=pair.multimodal.download(second, on_download),
    )


def verify(pair: AlignedPair) -> AlignedPair:
    """Compare samples of the weights, if the options say so, and add what was found to the pair.

    Heads that are stored although they are tied are compared in full.

    Raises:
        AlignmentError: weights that do not belong together.
        CheckpointError: a head that is tied and differs from its embedding.
    """
    for side, ties in zip((pair.reasoning, pair.multimodal), pair.ties, strict=True):
        check_ties(side, ties)
    warn_if_presumed(pair.reasoning, pair.pairs)
    if not pair.options.check_weights:
        return pair
    # Layers that are not selected show a shift too, but are not downloaded for it.
    local = pair.reasoning.is_local and pair.multimodal.is_local
    compared = pair.comparable(pair.alignment.pairs if local else pair.pairs, pair.selection)
    similarity = compare_weights(
        pair.reasoning.checkpoint, pair.multimodal.checkpoint, compared, pair.shapes
    )
    verified = replace(pair, similarity=similarity)
    refuse(verified, strict=pair.options.strict, rules=OF_WEIGHTS)
    warn_if_unrelated(similarity, *pair.paths)
    return verified
