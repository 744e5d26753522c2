"""The results of a run of the suite, as rows that report, chart and aims read.

Owns the form of the JSON. A row's key is `setting/part/who`: *process* (warm, a whole process),
*inside* (warm, one pass within a process) or *cold*; *statistics*, *delta* or *merge*; and whose it
is.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drift_fast.errors import DriftError

FORMAT_VERSION = 1


@dataclass
class Row:
    """Timings and memory of one command or pass; `absent` says why it did not run."""

    key: str
    label: str
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    peak_nbytes: int | None = None
    peak_anonymous_nbytes: int | None = None
    # The largest error against float64, if statistics were checked.
    error: float | None = None
    # The number of values of Δ that were compared bit for bit.
    compared: int | None = None
    wrong: str = ""
    absent: str = ""
    threads: int = 0

    @property
    def group(self) -> str:
        """Setting and part."""
        return self.key.rpartition("/")[0]

    @property
    def who(self) -> str:
        """Whose it is."""
        return self.key.rpartition("/")[2]

    @property
    def wall(self) -> float | None:
        """Median seconds."""
        return statistics.median(self.walls) if self.walls else None


@dataclass
class Results:
    """All rows of one run, and the machine and versions it ran with.

    `kind` is "delta", "scaling" or "trace"; `baseline_nbytes` is the peak of a process that only
    imports drift_fast.
    """

    kind: str
    size: str
    nbytes: int
    delta_nbytes: int
    threads: int
    repeats: int
    command: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    date: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    baseline_nbytes: int | None = None
    baseline_anonymous_nbytes: int | None = None
    aims: list[dict[str, Any]] = field(default_factory=list)

    def row(self, key: str) -> Row | None:
        """Return the row with this key."""
        return next((row for row in self.rows if row.key == key), None)

    def wall(self, key: str) -> float | None:
        """Return the median seconds of a row; None if it did not run."""
        row = self.row(key)
        return None if row is None else row.wall

    def timed_inside(self) -> list[str]:
        """Return which of "statistics" and "delta" were timed over thread counts."""
        keys = [row.key for row in self.rows if row.walls]
        return [
            part
            for part in ("statistics", "delta")
            if any(key.startswith(f"inside/{part}/ours@") for key in keys)
        ]

    def above_baseline(self) -> int | None:
        """Return the largest peak of our own commands above an import, in bytes."""
        peaks = [
            row.peak_nbytes
            for part in ("statistics", "delta")
            if (row := self.row(f"process/{part}/ours")) is not None and row.peak_nbytes
        ]
        if not peaks or self.baseline_nbytes is None:
            return None
        return max(peaks) - self.baseline_nbytes

    def write_json(self, path: Path) -> None:
        """Write everything as JSON."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        # An error may be infinite, which JSON cannot express.
        path.write_text(json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n")


def above_baseline_of(path: Path) -> tuple[str, int]:
    """Return the size of another run, and its peak above an import, from its JSON.

    Raises:
        OSError: there is no such file.
        DriftError: it is not a result of this suite, or has no memory.
    """
    try:
        stored = json.loads(path.read_bytes())
        if stored["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {stored['format_version']!r}")
        peaks = [
            int(row["peak_nbytes"])
            for row in stored["rows"]
            if row["key"] in ("process/statistics/ours", "process/delta/ours")
            and row["peak_nbytes"]
        ]
        return str(stored["size"]), max(peaks) - int(stored["baseline_nbytes"])
    except (ValueError, TypeError, KeyError) as error:
        raise DriftError(
            f"{path}: expected the JSON of an earlier run with peaks of memory "
            f"({type(error).__name__}: {error})"
        ) from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return value
