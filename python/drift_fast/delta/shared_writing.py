"""One delta written by several processes, with the bytes that one process would write.

Rank 0 makes the hidden directory and reserves every file, each rank streams the tensors of its own
shards into them, and rank 0 joins the statistics, in the order of one process, and gives the delta
its name, which it has only if every rank wrote and flushed its part.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

from drift_fast._core import DeltaWriter, __version__
from drift_fast._core import shards as shards_of
from drift_fast.delta.format import DESCRIPTION
from drift_fast.delta.parallel import agree
from drift_fast.delta.process_group import ProcessGroup, retried
from drift_fast.delta.writing import Content, Destination, with_checksums
from drift_fast.errors import DriftError
from drift_fast.progress_bar import Progress, ProgressCallback

logger = logging.getLogger(__name__)

# First and end tensor of each shard, and its bytes.
Plan: TypeAlias = Sequence[tuple[int, int, int]]

# Largest over mean share of bytes from which a word on it is worth reading.
_UNEVEN = 1.1


def write_together(
    group: ProcessGroup,
    content: Content,
    destination: Destination,
    on_progress: ProgressCallback,
) -> int | None:
    """Write a delta as one of several ranks; when it returns, the delta has its name.

    Returns the most bytes that the buffers of this rank took, where that is known.

    Raises:
        FileExistsError, OSError, DriftError: as `together`; nothing is left that opens.
    """
    tensors, dtype = content.tensors, content.stored_dtype
    plan = shards_of(tensors, dtype, max_shard_nbytes=destination.max_shard_nbytes)
    arguments = [dtype, destination.max_shard_nbytes, destination.overwrite, __version__]
    agree(group, {"list of tensors": tensors, "arguments": arguments})
    shares = balance([nbytes for _, _, nbytes in plan], group.size)
    if group.rank == 0:
        _warn_if_uneven(plan, shares)
    own = shares[group.rank]
    places = [place for shard in own for place in range(*plan[shard][:2])]

    def create() -> DeltaWriter:
        return destination.writer(content, {"shards": own, "join": group.rank != 0})

    def watched(progress: Progress) -> None:
        group.check()
        on_progress(progress)

    writer = _joined(group, create)
    try:
        rows, peak_nbytes = content.backend.write(
            writer, places, watched, destination.memory_nbytes
        )
        writer.flush()
        found = group.collect(json.dumps(with_checksums(rows, writer)))
        if group.rank == 0:
            text = content.text(_in_order(shares, plan, found))
            writer.commit(text)
            group.share(_digest(text))
        else:
            _look_for(group, destination.path, group.share())
    except BaseException as error:
        # Reported first: without their files the others would fail with errors of their own.
        group.fail(error)
        raise
    finally:
        writer.abort()
    return peak_nbytes


def balance(nbytes: Sequence[int], size: int) -> list[list[int]]:
    """Give whole shards to ranks: the largest first, each to whoever has the least so far.

    Returns the shards of each rank in ascending order.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for shard in sorted(range(len(nbytes)), key=lambda shard: (-nbytes[shard], shard)):
        rank = loads.index(min(loads))
        shares[rank].append(shard)
        loads[rank] += nbytes[shard]
    return [sorted(share) for share in shares]


def _warn_if_uneven(plan: Plan, shares: list[list[int]]) -> None:
    size, total = len(shares), sum(nbytes for _, _, nbytes in plan)
    if len(plan) >= 2 * size:
        return
    most = max(sum(plan[shard][2] for shard in share) for share in shares)
    if most * size < _UNEVEN * total:
        return
    idle = sum(not share for share in shares)
    advised = max(1, total // (8 * size))
    shown = f"{advised // 10**6}MB" if advised >= 10**6 else str(advised)
    logger.warning(
        "%d shards over %d ranks are uneven: one rank writes %.0f %% of the bytes, where an even "
        "share is %.0f %%, and %d write nothing; max_shard_size=%r would make about %d shards",
        len(plan),
        size,
        100 * most / total,
        100 / size,
        idle,
        shown,
        8 * size,
    )


def _joined(group: ProcessGroup, create: Callable[[], DeltaWriter]) -> DeltaWriter:
    if group.rank == 0:
        writer = create()
        try:
            group.share()
        except BaseException:
            writer.abort()
            raise
        return writer
    group.share()
    try:
        return retried(create, FileNotFoundError, min(10.0, group.limit))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}: rank 0 made this file but rank {group.rank} does not see it; all ranks need "
            "one shared file system"
        ) from error


def _in_order(
    shares: list[list[int]],
    plan: Plan,
    found: list[str],
) -> list[dict[str, Any]]:
    """Return the rows of all ranks in the order that one process has them in."""
    placed: dict[int, dict[str, Any]] = {}
    for rank, text in enumerate(found):
        places = [place for shard in shares[rank] for place in range(*plan[shard][:2])]
        rows = json.loads(text)
        if len(rows) != len(places):
            raise DriftError(
                f"rank {rank} left statistics of {len(rows)} tensors, expected {len(places)}; "
                "all ranks need the same version of drift_fast"
            )
        placed |= dict(zip(places, rows, strict=True))
    return [placed[place] for place in sorted(placed)]


def _look_for(group: ProcessGroup, place: Path, digest: str) -> None:
    """Wait until this process sees the delta under its name; a network may take a while."""

    def look() -> None:
        # Opening the directory makes a network file system read its entries again.
        os.listdir(place.parent)
        if _digest((place / DESCRIPTION).read_bytes()) != digest:
            raise FileNotFoundError(place)

    try:
        retried(look, OSError, group.limit)
    except OSError as error:
        raise DriftError(
            f"{place}: rank 0 wrote this delta, but rank {group.rank} has not seen it within "
            f"{group.limit:g} s; all ranks need one shared file system"
        ) from error


def _digest(text: bytes) -> str:
    return sha256(text).hexdigest()
