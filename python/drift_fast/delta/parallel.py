"""One delta written by several processes, which a launcher started, as one would write it.

Owns who takes part, which shards each writes, and what all must agree on before the first byte.
How they meet and end together is `process_group`'s. Every process aligns the checkpoints. Rank 0
makes the hidden directory and reserves every file, each rank streams the tensors of its own shards
into them, and rank 0 joins the statistics, in the order of one process, and gives the delta its
name.

Invariant: every file of the delta has the bytes that one process with the same `max_shard_size`
would write, and it has its name only if every rank wrote and flushed its part.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from drift_fast._core import DeltaWriter, __version__, places_of
from drift_fast._core import shards as shards_of
from drift_fast.errors import DriftError

if TYPE_CHECKING:
    from drift_fast.delta.process_group import ProcessGroup
    from drift_fast.delta.writing import Content, Destination

logger = logging.getLogger(__name__)

Ranks: TypeAlias = Literal["auto"] | tuple[int, int] | None

_TIMEOUT = "DRIFT_FAST_RANK_TIMEOUT"
# Largest over mean share of bytes from which a word on it is worth reading.
_UNEVEN = 1.1

# Variables of launchers: rank and size. torchrun and accelerate, Open MPI, Slurm.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)

T = TypeVar("T")


def identify(ranks: Ranks) -> tuple[int, int]:
    """Return this process' rank and how many there are; (0, 1) is a process alone.

    "auto" asks an initialized torch.distributed, if torch was imported already, then the variables
    of torchrun, Open MPI and Slurm. A Slurm batch script that was not started by srun is alone,
    whatever number of tasks it asked for.

    Raises:
        ValueError: a rank that is not one of 0 … size − 1.
    """
    if ranks is None:
        return 0, 1
    if ranks != "auto":
        if (
            not isinstance(ranks, tuple)
            or len(ranks) != 2
            or not all(isinstance(number, int) for number in ranks)
        ):
            raise ValueError(f"ranks must be 'auto', None or (rank, size), got {ranks!r}")
        return _checked(*ranks, "ranks=(rank, size)")
    distributed = _distributed()
    if distributed is not None:
        return distributed.get_rank(), distributed.get_world_size()
    for rank, size in _LAUNCHERS:
        if rank not in os.environ or size not in os.environ:
            continue
        # In a batch script, Slurm gives rank 0 to the one shell that runs it.
        if rank == "SLURM_PROCID" and "SLURM_JOB_ID" in os.environ and not _in_slurm_step():
            continue
        try:
            numbers = int(os.environ[rank]), int(os.environ[size])
        except ValueError:
            raise ValueError(
                f"{rank}={os.environ[rank]!r} and {size}={os.environ[size]!r} are not numbers; "
                "correct them, or pass ranks=None for this process alone"
            ) from None
        return _checked(*numbers, f"{rank} and {size}")
    return 0, 1


def parse_ranks(text: str) -> Ranks:
    """Return what the command line means by "auto", "none" or "R/N".

    Raises:
        ValueError: anything else.
    """
    if text == "auto":
        return "auto"
    if text == "none":
        return None
    rank, _, size = text.partition("/")
    if not (rank.isdecimal() and size.isdecimal()):
        raise ValueError(f"ranks must be auto, none or R/N, such as 0/4, got {text!r}")
    return _checked(int(rank), int(size), "--ranks R/N")


@contextmanager
def together(target: str | os.PathLike[str], ranks: Ranks) -> Iterator[ProcessGroup | None]:
    """Meet the other ranks that write to `target`; None where this process is alone.

    An error that leaves the block reaches all ranks.

    Raises:
        DriftError: ranks that never came, one that died, or an error of another rank, which is
            raised as an error of its own kind where there is one.
        FileExistsError: another run is writing there.
        ValueError: a rank or a time limit without meaning.
    """
    rank, size = identify(ranks)
    if size == 1:
        yield None
        return
    # Loaded here, since it needs torch, which one process alone does not.
    from drift_fast.delta.process_group import Meeting, joined

    place, hidden = map(Path, places_of(target))
    if hidden.is_symlink():
        raise FileExistsError(f"{hidden} is a link; choose another output directory")
    with joined(Meeting(rank, size, place, _time_limit())) as group:
        yield group


def first(group: ProcessGroup | None, action: Callable[[], T]) -> T:
    """Do something on rank 0 and, once it has done, on the others, which may find it done."""
    if group is None:
        return action()
    if group.rank == 0:
        done = action()
        group.share()
        return done
    group.share()
    return action()


def agree(group: ProcessGroup, seen: dict[str, Any]) -> None:
    """Compare what this rank sees with what rank 0 sees.

    Raises:
        DriftError: the first thing that differs, as both see it.
    """
    import json

    expected = json.loads(group.share(json.dumps(seen)))
    found = json.loads(json.dumps(seen))
    for key, value in found.items():
        if value != expected.get(key):
            here, there = _first_difference(value, expected.get(key))
            raise DriftError(
                f"rank {group.rank} sees another {key} than rank 0: {here}, expected {there}. All "
                "ranks need the same arguments, the same files and the same version of drift_fast"
            )


def write_part(
    group: ProcessGroup,
    content: Content,
    destination: Destination,
    fill: Callable[[DeltaWriter, Sequence[int]], Sequence[Mapping[str, Any]]],
) -> None:
    """Write a delta as one of several ranks; when it returns, the delta has its name.

    `fill` writes the tensors of the given places, numbered from zero in the writer, and returns one
    row of numbers for each.

    Raises:
        FileExistsError, OSError, DriftError: as `together`; nothing is left that opens.
    """
    import json

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
        return destination.writer(content, shards=own, join=group.rank != 0)

    writer = _joined(group, create)
    try:
        rows = [dict(row) for row in fill(writer, places)]
        writer.flush()
        found = group.collect(json.dumps(rows))
        if group.rank == 0:
            text = content.text(_in_order(group, shares, plan, found))
            _name_it(group, writer, text)
        else:
            digest = group.share()
            group.collect()
            _wait_for_name(group, destination.path, digest)
    except BaseException as error:
        # Reported first: without their files the others would fail with errors of their own.
        group.fail(error)
        raise
    finally:
        writer.abort()


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


def _warn_if_uneven(plan: Sequence[tuple[int, int, int]], shares: list[list[int]]) -> None:
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
    from drift_fast.delta.process_group import retried

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
    group: ProcessGroup,
    shares: list[list[int]],
    plan: Sequence[tuple[int, int, int]],
    found: list[str],
) -> list[dict[str, Any]]:
    """Return the rows of all ranks in the order that one process has them in."""
    import json

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


def _name_it(group: ProcessGroup, writer: DeltaWriter, text: str) -> None:
    from hashlib import sha256

    group.share(sha256(text.encode()).hexdigest())
    # Every rank knows what to look for before the delta can have its name.
    group.collect()
    writer.commit(text)


def _wait_for_name(group: ProcessGroup, target: str | os.PathLike[str], digest: str) -> None:
    from hashlib import sha256

    from drift_fast.delta.process_group import retried

    place = Path(target)
    # It goes as the delta gets its name; an overwritten one of the same digest stays until then.
    hidden = Path(places_of(place)[1])

    def look() -> None:
        # Opening the directory makes a network file system ask anew what is in it.
        os.listdir(place.absolute().parent)
        if hidden.exists():
            raise FileExistsError(hidden)
        if sha256((place / "drift.json").read_bytes()).hexdigest() != digest:
            raise FileNotFoundError(place)

    try:
        retried(look, OSError, group.limit)
    except OSError as error:
        raise DriftError(
            f"{place}: rank 0 did not give the delta its name within {group.limit:g} s; see what "
            "that process printed"
        ) from error


def _distributed() -> Any:
    """Return torch.distributed where it is initialized; torch is not imported for it."""
    found: Any = sys.modules.get("torch.distributed")
    if found is not None and found.is_available() and found.is_initialized():
        return found
    return None


def _in_slurm_step() -> bool:
    return any(name in os.environ for name in ("SLURM_STEP_ID", "SLURM_STEPID"))


def _checked(rank: int, size: int, what: str) -> tuple[int, int]:
    if size < 1 or not 0 <= rank < size:
        raise ValueError(
            f"{what}: expected 0 <= rank < size, got rank {rank} of {size}; correct them, or pass "
            "ranks=None for this process alone"
        )
    return rank, size


def _time_limit() -> float:
    text = os.environ.get(_TIMEOUT, "60")
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise ValueError(f"{_TIMEOUT} must be a number of seconds above 0, got {text!r}")
    return limit


def _first_difference(here: Any, there: Any) -> tuple[Any, Any]:
    """Return the first entries in which two lists differ, or how long they are."""
    if not isinstance(here, list) or not isinstance(there, list):
        return here, there
    for mine, other in zip(here, there, strict=False):
        if mine != other:
            return mine, other
    return f"{len(here)} of them", f"{len(there)}"
