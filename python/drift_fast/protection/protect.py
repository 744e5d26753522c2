"""A Δ that spares what a model can do: `protect` removes gradients of what must be kept.

Moving weights along a gradient of the loss on some samples changes that loss fastest, so what of Δ
is in the span of such gradients, tensor by tensor, is what disturbs the samples most. It is taken
out: Δ' = Δ − P Δ with the orthogonal projector P on the span, in the Frobenius inner product.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from drift_fast.alignment.coverage import Coverage
from drift_fast.checkpoints.opened import PathLike
from drift_fast.delta.delta import Delta, open_delta
from drift_fast.delta.process_group import retried
from drift_fast.delta.protocol import DeltaLike
from drift_fast.delta.writing import Destination
from drift_fast.errors import DriftError, NonFiniteError
from drift_fast.inject.claims import refuse_second
from drift_fast.inject.refusals import check_trainable
from drift_fast.inject.shards.base import Whole
from drift_fast.inject.shards.reduction import Reduction
from drift_fast.inject.target import DeltaReader, Target
from drift_fast.inject.targets import find_targets
from drift_fast.names import is_expert
from drift_fast.options import takes
from drift_fast.paths import local_path
from drift_fast.progress_bar import reported
from drift_fast.protection.gradients import Loss, Member, Sums, loss_of, measure, refuse_packed
from drift_fast.protection.options import ProtectOptions
from drift_fast.protection.removed import Protected, Removed
from drift_fast.protection.span import Found, blend, project, squares
from drift_fast.protection.ways import Way, gathered, way_of
from drift_fast.sizes import parse_size

if TYPE_CHECKING:
    from drift_fast._keywords import ProtectKeywords

logger = logging.getLogger(__name__)

# Seconds until a file that another process wrote shows over a network.
_VISIBLE = 60.0


@takes(ProtectOptions)
@torch.inference_mode(mode=False)
def protect(
    model: nn.Module,
    delta: DeltaLike | PathLike,
    batches: Iterable[Any],
    out: PathLike | None = None,
    *,
    loss: Loss | None = None,
    **options: Unpack[ProtectKeywords],
) -> Delta:
    """Return Δ without, for each tensor, the span of gradients on samples of what must be kept.

    The batches are dealt out in turn to `directions` sums of gradients of the loss. Per tensor,
    what of Δ is a combination of these sums is taken out, so that the result is orthogonal to each
    of them. Everything else of Δ stays; tensors that are not selected stay as they are. The
    gradients are taken at the model's weights as they are, in evaluation mode, with gradient
    checkpointing where it is on; of a model with adapters at W₀ + s·B·A, with respect to W₀.
    Afterwards the model, its gradients and its buffers are what they were.

    Sums are float32 or wider. What is taken out is computed in float64 and held in float32, in host
    memory; each element of the result is then a float64 difference that is rounded once.
    `sources["protected"]` of the result says from which delta it was made, from how many
    directions and batches, and which share of ‖Δ‖² was taken out of each tensor.

    Args:
        model: the model that will train, or the multimodal model that a merge starts from.
        delta: a `Delta`, or the directory, Hub id or URL of one; its names are matched to the
            model's.
        batches: what `loss` takes, at least as many as `directions`, read once to the end. By
            default mappings of the model's arguments, with labels.
        out: a directory to write; None writes nothing, and tensors are computed when asked for.
        loss: a function of model and batch that returns one number as a tensor; by default
            `model(**batch).loss`, with the batch's tensors brought to the model's device.

    Raises:
        CoverageError: the delta does not fit the model; names and shapes are listed.
        DriftError: too few batches, a loss or tensors without a gradient, weights that can have
            none or that an injection is attached to, or sums of gradients that do not fit into
            memory.
        NonFiniteError: NaN or infinity in a loss, a gradient or Δ.
        FileExistsError, OSError: an output that is taken, or a full disk.
        TypeError: an unknown option.
        ValueError: an argument without meaning.
    """
    given = ProtectOptions.from_keywords(options, function="protect")
    target = None if out is None else local_path(out).absolute()
    if target is not None:
        _refuse_taken(target, overwrite=given.overwrite)
    way = way_of(model)
    with way.everyone.together():
        source = open_delta(delta)
        members, coverage = _find(way, source, given, written=target is not None)
        sums = Sums(members, given.directions, given.gradients)
    counts = measure(way, members, batches, loss or loss_of, sums)
    _refuse_few(counts)
    seen = way.everyone.sum(torch.tensor(sums.seen, dtype=torch.float32))
    _refuse_unseen([target for (target, _), found in zip(members, seen, strict=True) if not found])
    way.join(sums.vectors)
    with way.everyone.together():
        found = _span(members, sums, DeltaReader(source))
    removed = Removed(source.shapes)
    for (one, shard), vectors, part in zip(members, sums.vectors, found, strict=True):
        whole = gathered(one, shard, blend(vectors, part.coefficients))
        vectors.clear()
        # Where one process writes, it alone needs what the others gave it.
        if target is None or way.is_first:
            removed.put(one, whole.to("cpu"))
    described = _describe(way, members, found, counts)
    protected = Protected(source, removed, given.dtype).opened(described, coverage)
    if target is None:
        return protected
    destination = Destination(target, given.overwrite, parse_size(given.max_shard_size))
    with reported(given.progress_bar, given.on_progress) as report, way.everyone.together():
        if way.is_first:
            return protected.write(destination, report, None)
    return retried(lambda: Delta.open(target), FileNotFoundError, _VISIBLE)


def _find(
    way: Way, delta: DeltaLike, given: ProtectOptions, *, written: bool
) -> tuple[list[Member], Coverage]:
    """Return the weights that gradients are taken of, and how the delta covers the model.

    Raises:
        CoverageError, DriftError: as `protect`.
    """
    targets, coverage = find_targets(way.module, delta, given, weights=True)
    # An injection may change gradients inside backward.
    refuse_second(targets, way.module)
    refuse_packed(targets)
    check_trainable(targets, way.module)
    shards = way.shards(targets)
    for target, shard in zip(targets, shards, strict=True):
        if isinstance(shard, Whole):
            continue
        if not target.parameter.requires_grad:
            raise DriftError(
                f"{target.name} is frozen and held by {shard.sharding}, so it has no gradient "
                "here: protect Δ before the model is sharded, or with the model as it trains in "
                "full"
            )
        if not written:
            raise DriftError(
                f"{target.name} is held by {shard.sharding}, and each process has a part of what "
                "is taken out of Δ: pass out=…, a directory that all processes see"
            )
    return list(zip(targets, shards, strict=True)), coverage


def _span(members: Sequence[Member], sums: Sums, delta: DeltaReader) -> list[Found]:
    """Return what of Δ is in the span of each target's sums, over all processes.

    Raises:
        NonFiniteError: a gradient or Δ is not finite.
        DriftError: every gradient is zero.
    """
    kinds: dict[Any, list[int]] = {}
    for at, (_, shard) in enumerate(members):
        kinds.setdefault(shard.process_groups, []).append(at)
    found: dict[int, Found] = {}
    for groups, places in kinds.items():
        vectors = [sums.vectors[at] for at in places]
        grams = squares(vectors, Reduction(groups))
        _refuse_nonfinite([members[at][0] for at in places], grams)

        def read(number: int, places: list[int] = places) -> torch.Tensor:
            target, shard = members[places[number]]
            return target.read(delta, shard)

        found |= zip(places, project(vectors, grams, read, Reduction(groups)), strict=True)
    for at, one in found.items():
        if not math.isfinite(one.delta_sq):
            raise NonFiniteError(
                f"{members[at][0].delta_name}: Δ holds NaN or infinite values; leave the tensor "
                "out with modules=… or layers=…, or repair the source checkpoint"
            )
    if not any(one.delta_sq for one in found.values()):
        raise DriftError(
            "Δ is zero everywhere, so there is nothing to protect: compute it from two models that "
            "differ"
        )
    if not any(one.rank for one in found.values()):
        raise DriftError(
            "every gradient is zero, so there is nothing to take out of Δ: does the loss depend on "
            "the weights that Δ is for?"
        )
    return [found[at] for at in range(len(members))]


def _describe(
    way: Way, members: Sequence[Member], found: Sequence[Found], counts: torch.Tensor
) -> dict[str, Any]:
    """Return how a Δ was protected, for `drift.json`, and say it in the log."""
    names = [target.name for target, _ in members]
    directions = len(counts)
    total = sum(one.delta_sq for one in found)
    share = sum(one.share * one.delta_sq for one in found) / total if total else 0.0
    dropped = sum(directions - one.rank for one in found)
    logger.info(
        "took %.3g %% of ‖Δ‖² out of %d tensors, in the span of %d gradients each over %d batches; "
        "%d gradients were zero or dependent on others",
        100 * share,
        len(found),
        directions,
        int(counts.sum()),
        dropped,
    )
    return {
        "model": type(way.module).__name__,
        "directions": directions,
        "batches": [int(count) for count in counts],
        "zero_or_dependent": dropped,
        "removed_share": share,
        "removed_shares": dict(zip(names, (one.share for one in found), strict=True)),
    }


def _refuse_taken(path: Path, *, overwrite: bool) -> None:
    """Refuse an output before gradients are measured; what is written looks again.

    Raises:
        FileExistsError: it is taken.
    """
    if path.exists() and not (path.is_dir() and (overwrite or not any(path.iterdir()))):
        raise FileExistsError(
            f"{path}: the output exists; choose another path, or pass overwrite=True "
            "(--overwrite) to replace a delta"
        )


def _refuse_few(counts: torch.Tensor) -> None:
    if not bool(counts.all()):
        batches, directions = int(counts.sum()), len(counts)
        were = "was 1 batch" if batches == 1 else f"were {batches} batches"
        why = (
            "was it a generator that is used up already?"
            if not batches
            else "pass smaller batches, or more of them, or ask for fewer directions"
        )
        raise DriftError(f"there {were} for {directions} directions: {why}")


def _refuse_unseen(targets: Sequence[Target]) -> None:
    """Refuse targets without a gradient; a router may send no token to some experts."""
    missing = [target.name for target in targets if not is_expert(target.name)]
    if missing:
        raise DriftError(
            f"{len(missing)} tensors have no gradient on these batches, {missing[0]} first: they "
            "took no part in the loss, or gradient checkpointing with use_reentrant=True cut them "
            "off. Leave them out with modules=… or layers=…, or use use_reentrant=False"
        )


def _refuse_nonfinite(targets: Sequence[Target], grams: torch.Tensor) -> None:
    wrong = (~torch.isfinite(grams.diagonal(dim1=1, dim2=2))).nonzero().tolist()
    if wrong:
        at, direction = wrong[0]
        raise NonFiniteError(
            f"{len({at for at, _ in wrong})} of {len(targets)} tensors have a gradient with NaN or "
            f"infinite values, {targets[at].name} first, in direction {direction} (batches "
            f"{direction}, {direction + len(grams[0])}, …): leave such batches out, or load the "
            "model in bfloat16 or float32 if it is float16"
        )
