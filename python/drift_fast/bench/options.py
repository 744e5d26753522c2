"""The options of a run of the suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_fast.options import Options, option

PARTS = ("statistics", "delta", "merge")
# By default; a merge takes as long again and runs only on request.
USUAL = PARTS[:2]
SETTINGS = ("process", "inside", "cold")
RIVALS = ("tuned", "plain", "public", "mergekit")


def cache_directory() -> Path:
    """Return where pairs are kept by default."""
    # Loaded here, since most runs name a directory.
    from drift_fast.checkpoints.remote.sparse import default_cache

    return default_cache() / "bench"


def parse_counts(text: str) -> tuple[int, ...]:
    """Return thread counts from text such as "1,2,4".

    Raises:
        ValueError: anything else.
    """
    try:
        return tuple(int(count) for count in text.split(","))
    except ValueError as error:
        raise ValueError(f"scaling must be thread counts such as 1,2,4, got {text!r}") from error


def _check_names(name: str, known: tuple[str, ...], value: Any) -> None:
    for one in value:
        if one not in known:
            raise ValueError(f"{name} must be of {', '.join(known)}, got {one!r}")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """What a run of the suite measures."""

    size: str = option("0.5B", "size of the pair: 0.5B, 1.5B, 3B or 7B", metavar="SIZE")
    layers: int | None = option(
        None, "layers of the pair; by default those of the model", metavar="N"
    )
    threads: int = option(
        2, "threads of every command", check=lambda value: _check_positive("threads", value)
    )
    repeats: int = option(3, "timed rounds", check=lambda value: _check_positive("repeats", value))
    cold: bool = option(False, "time with an empty page cache too")
    only: tuple[str, ...] = option(
        (),
        "leave out the other parts and settings: statistics, delta, merge (runs only if named), "
        "process, inside or cold",
        check=lambda value: _check_names("only", (*PARTS, *SETTINGS), value),
        metavar="PART",
    )
    without: tuple[str, ...] = option(
        (),
        "leave out a rival: tuned, plain, public or mergekit",
        check=lambda value: _check_names("without", RIVALS, value),
        metavar="RIVAL",
    )
    scaling: tuple[int, ...] = option(
        (),
        "only time ours and the XOR with these thread counts, such as 1,2,4",
        parse=parse_counts,
        check=lambda value: _check_positive("thread counts of scaling", min(value, default=1)),
        metavar="COUNTS",
    )
    trace: bool = option(False, "only watch our memory over time")
    beside: Path | None = option(
        None, "JSON of a run at another size, to compare memory with", parse=Path, metavar="JSON"
    )
    directory: Path | None = option(
        None, "where pairs are kept; by default bench in the cache, $DRIFT_FAST_CACHE", parse=Path
    )
    command: str = option("drift-fast bench", "the command that the report names", in_file=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling and self.trace:
            raise ValueError("scaling and trace exclude each other; choose one")

    @property
    def parts(self) -> list[str]:
        """The parts to run."""
        return [part for part in PARTS if part in self.only] or list(USUAL)

    @property
    def measured_parts(self) -> list[str]:
        """The parts measured in process, over threads and over time: all but merges."""
        return [part for part in self.parts if part != "merge"]

    @property
    def settings(self) -> list[str]:
        """The settings to run; `cold` only on request."""
        named = [setting for setting in SETTINGS if setting in self.only]
        settings = named or ["process", "inside"]
        return settings + (["cold"] if self.cold and "cold" not in settings else [])
