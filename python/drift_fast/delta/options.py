"""The options of streaming two checkpoints and of writing what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from drift_fast.alignment.options import PairOptions
from drift_fast.delta.parallel import Ranks, identify, parse_ranks
from drift_fast.dtypes import STORED_DTYPES, check_stored_dtype
from drift_fast.options import Options, option
from drift_fast.progress_bar import ProgressCallback
from drift_fast.sizes import MEMORY, parse_size, thread_count


def _check_memory(memory: int | str | None) -> None:
    if memory is not None:
        parse_size(memory)


@dataclass(frozen=True, kw_only=True)
class ProgressOptions(Options):
    """How a stream says how far it has come."""

    progress_bar: bool | None = option(
        None, "show a progress bar; by default where stderr is a terminal, and in a notebook"
    )
    on_progress: ProgressCallback | None = option(
        None, "called on this thread with a `Progress`, about 20 times a second", in_file=False
    )


@dataclass(frozen=True, kw_only=True)
class StreamOptions(ProgressOptions):
    """What a stream may take of the machine; none of it changes a bit of the result."""

    threads: int | None = option(
        None, "worker threads; as many as cores by default", check=thread_count
    )
    memory: int | str = option(
        MEMORY,
        "bytes that all buffers may take, whatever the size of the models, such as 64MB",
        check=parse_size,
        metavar="SIZE",
    )
    allow_nonfinite: bool = option(False, "count NaN and infinity instead of refusing them")


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """How a result is written."""

    overwrite: bool = option(False, "replace an earlier result; anything else is never touched")
    max_shard_size: int | str = option(
        "5GB", "maximum size of one shard, such as 500MB", check=parse_size, metavar="SIZE"
    )


@dataclass(frozen=True, kw_only=True)
class RankOptions(Options):
    """Which processes write a delta together."""

    ranks: Ranks = option(
        "auto",
        "which processes write: auto (all that torchrun, Slurm or Open MPI started), none (this "
        "one alone), or R/N",
        parse=parse_ranks,
        metavar="RANKS",
    )

    def is_first(self) -> bool:
        """Whether this process is the only one or the one that reports."""
        return identify(self.ranks)[0] == 0


@dataclass(frozen=True, kw_only=True)
class InspectOptions(StreamOptions, PairOptions):
    """The options of `inspect`."""


@dataclass(frozen=True, kw_only=True)
class DeltaOptions(RankOptions, OutputOptions, StreamOptions, PairOptions):
    """The options of `compute_delta`."""

    dtype: str = option(
        "bfloat16", "dtype that Δ is stored as", choices=STORED_DTYPES, check=check_stored_dtype
    )


@dataclass(frozen=True, kw_only=True)
class SaveOptions(RankOptions, OutputOptions, ProgressOptions):
    """The options of `Delta.save`."""

    memory: int | str | None = option(
        None,
        "bytes that all buffers may take; by default what `compute_delta` was given, and 64MB for "
        "a delta on disk",
        check=_check_memory,
        metavar="SIZE",
    )
