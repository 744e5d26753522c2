"""The aims of the engine, as ratios within one run, and what a run reached.

Owns the table of aims. None is dropped: one that a run did not measure says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_fast.bench.check import TOLERANCE
from drift_fast.bench.results import Results, above_baseline_of

_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Aim:
    """One aim: at least or at most `bound`, in units that `shown` writes."""

    text: str
    bound: float
    measure: Callable[[Results], float | None]
    shown: Callable[[float], str]
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Return whether a value reaches it."""
        return value <= self.bound if self.at_most else value >= self.bound


def _ratio(slower: str, faster: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        other, mine = results.wall(slower), results.wall(faster)
        return None if other is None or mine is None else other / mine

    return measure


def _cold(results: Results) -> float | None:
    walls = [row.wall for row in results.rows if row.group == "cold/read" and row.wall is not None]
    mine = results.wall("cold/statistics/ours")
    return min(walls) / mine if walls and mine else None


def _memory(results: Results) -> float | None:
    above = results.above_baseline()
    return None if above is None else above / _MEGABYTE


def _error(results: Results) -> float | None:
    row = results.row("process/statistics/ours")
    return None if row is None else row.error


def _wrong_values(results: Results) -> float | None:
    row = results.row("process/delta/ours")
    if row is None or not row.compared:
        return None
    return 1.0 if row.wrong else 0.0


def _share(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")


def _times(value: float) -> str:
    return f"{value:.1f}×"


def _megabytes(value: float) -> str:
    return f"{value:.1f} MB"


def _tiny(value: float) -> str:
    return f"{value:.1e}"


def _exact(value: float) -> str:
    return "exact" if value == 0 else "not exact"


_IN, _PROCESS = "inside", "process"
_WRITTEN = "Δ written, warm, whole process, against"
AIMS = (
    Aim(
        "statistics, warm, in process: rate against the XOR control",
        0.9,
        _ratio(f"{_IN}/statistics/xor", f"{_IN}/statistics/ours"),
        _share,
    ),
    Aim(
        "statistics, warm, whole process, against tuned PyTorch (stated for 1.5B)",
        4.5,
        _ratio(f"{_PROCESS}/statistics/tuned", f"{_PROCESS}/statistics/ours"),
        _times,
    ),
    Aim(
        "statistics, warm, whole process, against plain PyTorch (stated for 1.5B)",
        35,
        _ratio(f"{_PROCESS}/statistics/plain", f"{_PROCESS}/statistics/ours"),
        _times,
    ),
    Aim(
        "statistics, warm, in process, against tuned PyTorch",
        2.5,
        _ratio(f"{_IN}/statistics/tuned", f"{_IN}/statistics/ours"),
        _times,
    ),
    Aim(
        "Δ written, warm, in process: rate against XOR + the same write method",
        0.9,
        _ratio(f"{_IN}/delta/xor", f"{_IN}/delta/ours"),
        _share,
    ),
    *(
        Aim(
            f"{_WRITTEN} {name}",
            bound,
            _ratio(f"{_PROCESS}/delta/{who}", f"{_PROCESS}/delta/ours"),
            _times,
        )
        for name, who, bound in (
            ("tuned PyTorch", "tuned", 1.8),
            ("mergekit", "mergekit", 10),
            ("the public way", "public", 6),
        )
    ),
    Aim(
        "merged model written (linear), warm, whole process, against mergekit",
        8,
        _ratio(f"{_PROCESS}/merge/mergekit", f"{_PROCESS}/merge/ours"),
        _times,
    ),
    Aim("statistics, cold: rate against a cold sequential read of both files", 0.9, _cold, _share),
    Aim(
        "peak memory, anonymous + mapped, above `import drift_fast`", 64, _memory, _megabytes, True
    ),
    Aim("norms and cosines against float64", TOLERANCE, _error, _tiny, True),
    Aim("Δ against float64 rounded once, bit for bit", 0, _wrong_values, _exact, True),
)


def evaluate(results: Results, beside: Path | None) -> list[dict[str, Any]]:
    """Return each aim with what was wanted, what was measured and whether it is met.

    `beside` is the JSON of a run at another size, with which peak memory is compared.
    """
    aims = list(AIMS)
    other = above_baseline_of(beside) if beside is not None else None

    def difference(found: Results) -> float | None:
        above = found.above_baseline()
        if other is None or above is None:
            return None
        return abs(above - other[1]) / _MEGABYTE

    size = "another size (0.5B and 7B)" if other is None else other[0]
    aims.insert(
        -2, Aim(f"peak memory, difference from that at {size}", 10, difference, _megabytes, True)
    )
    found = []
    for aim in aims:
        value = aim.measure(results)
        found.append(
            {
                "aim": aim.text,
                "wanted": ("≤ " if aim.at_most else "≥ ") + aim.shown(aim.bound),
                "measured": None if value is None else aim.shown(value),
                "value": value,
                "met": None if value is None else aim.met(value),
            }
        )
    found[-1]["wanted"] = "exact"
    return found
