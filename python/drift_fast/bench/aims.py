"""The engine's aims, as ratios within one run, and what a run reached.

Owns the table of aims. An aim that a run did not measure stays in it and says so, unless it is for
pairs of another size.
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
    """One aim: at least or at most `bound`, which `shown` writes with its unit."""

    text: str
    bound: float
    measure: Callable[[Results], float | None]
    shown: Callable[[float], str]
    at_most: bool = False
    # The size of the pair that it is for; None for all.
    size: str | None = None

    def met(self, value: float) -> bool:
        """Return whether a value meets the aim."""
        return value <= self.bound if self.at_most else value >= self.bound


def _faster(
    text: str,
    bound: float,
    group: str,
    who: str,
    shown: Callable[[float], str],
    size: str | None = None,
) -> Aim:
    """Return the aim to be `bound` times as fast as another of the same setting and part."""

    def measure(results: Results) -> float | None:
        other, mine = results.wall(f"{group}/{who}"), results.wall(f"{group}/ours")
        return None if other is None or mine is None else other / mine

    return Aim(text, bound, measure, shown, size=size)


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


AIMS = (
    _faster(
        "statistics, warm, in process: rate against the XOR control",
        0.9,
        "inside/statistics",
        "xor",
        _share,
    ),
    *(
        _faster(
            f"statistics, warm, whole process, against {who} PyTorch",
            bound,
            "process/statistics",
            who,
            _times,
            "1.5B",
        )
        for who, bound in (("tuned", 4.5), ("plain", 35))
    ),
    _faster(
        "statistics, warm, in process, against tuned PyTorch",
        2.5,
        "inside/statistics",
        "tuned",
        _times,
    ),
    _faster(
        "Δ written, warm, in process: rate against XOR + the same write method",
        0.9,
        "inside/delta",
        "xor",
        _share,
    ),
    *(
        _faster(f"{what}, warm, whole process, against {name}", bound, group, who, _times)
        for what, group, name, who, bound in (
            ("Δ written", "process/delta", "tuned PyTorch", "tuned", 1.8),
            ("Δ written", "process/delta", "mergekit", "mergekit", 10),
            ("Δ written", "process/delta", "the public way", "public", 6),
            ("merged model written (linear)", "process/merge", "mergekit", "mergekit", 8),
        )
    ),
    Aim("statistics, cold: rate against a cold sequential read of both files", 0.9, _cold, _share),
    Aim(
        "peak memory, anonymous + mapped, above `import drift_fast`", 64, _memory, _megabytes, True
    ),
    Aim("norms and cosines against float64", TOLERANCE, _error, _tiny, True),
    Aim("Δ against float64 rounded once, bit for bit", 0, _wrong_values, _exact, True),
)


def evaluate(results: Results, beside: Path | None) -> list[dict[str, Any]]:
    """Return each aim, what was measured, and whether it is met.

    `beside` is the JSON of a run at another size, to compare peak memory with.
    """
    aims = [aim for aim in AIMS if aim.size in (None, results.size)]
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
