"""A delta in place of the reasoning model, which is then M + Δ, added in float64.

Its tensors are aligned with the multimodal model by names and shapes; weights are not compared, as
Δ resembles none. A tensor of the multimodal model that is not in the delta has a Δ of zero.
"""

from __future__ import annotations

from dataclasses import replace

from drift_fast.alignment.coverage import listed
from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.options import PairOptions
from drift_fast.alignment.pairing import align_checkpoints
from drift_fast.alignment.stated import LEFT_OUT
from drift_fast.checkpoints.opened import Opened, PathLike, open_checkpoint
from drift_fast.delta.delta import Delta, delta_at
from drift_fast.delta.format import INDEX
from drift_fast.dtypes import COMPRESSED
from drift_fast.errors import AlignmentError, CheckpointError
from drift_fast.selection import Selection


def given_delta(reasoning: PathLike | Delta) -> Delta | None:
    """Return the delta that is given in place of a reasoning model, None if a model is.

    Raises:
        CheckpointError: a directory of a delta that is not whole, or one of 8-bit codes.
        ValueError: a delta that is not on disk.
    """
    if isinstance(reasoning, Delta):
        if reasoning.path is None:
            raise ValueError(
                "the delta to merge is not on disk: write it with delta.save(path), and merge that"
            )
        delta = reasoning
    else:
        found = delta_at(reasoning)
        if found is None:
            return None
        delta = found
    if delta.stored_dtype in COMPRESSED:
        raise CheckpointError(
            f"{delta.path}: Δ is stored as {delta.stored_dtype}, which a merge does not read: "
            "compute it with dtype='bfloat16' or 'float32', or write it anew as such with "
            "Delta.combine({delta: 1.0}).save(…)"
        )
    return delta


def align_delta(
    delta: Delta, multimodal: Opened, options: PairOptions, selection: Selection
) -> AlignedPair:
    """Align a delta with the multimodal model.

    Raises:
        AlignmentError: a selected tensor of the delta has no match, unless not strict.
        As `align_checkpoints`.
    """
    assert delta.path is not None
    delta.check()
    opened = open_checkpoint(delta.path / INDEX, options.reader, is_delta=True)
    if (origin := delta.opened_from) is not None:
        named = replace(opened.source, repo=origin.repo, revision=origin.revision)
        opened = replace(opened, source=named)
    loose = replace(options, strict=False, check_weights=False)
    pair = align_checkpoints(opened, multimodal, loose, selection=selection)
    missing = [one for one in pair.account.missing_reasoning if one[1] != LEFT_OUT]
    if missing and options.strict:
        raise AlignmentError(
            f"{len(missing)} tensors of the delta {delta.path} have no match in "
            f"{multimodal.source.path}:{listed(missing)}\nMerge into the model that Δ is for, "
            "select other modules or layers, or pass strict=False to leave them out"
        )
    return pair
