"""Which processes work on one delta, as a launcher started them, and what they agree on first.

How they meet and end together is `process_group`'s, what each writes `shared_writing`'s.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from drift_fast._core import output_paths
from drift_fast.errors import DriftError

if TYPE_CHECKING:
    from drift_fast.delta.process_group import ProcessGroup

Ranks: TypeAlias = Literal["auto"] | tuple[int, int] | None

_TIMEOUT = "DRIFT_FAST_RANK_TIMEOUT"

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

    place, hidden = map(Path, output_paths(target))
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
