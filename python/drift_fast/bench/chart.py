"""Pictures of a run: time relative to ours, rates over threads, memory over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drift_fast.bench.measure import Sample
from drift_fast.bench.report import GROUPS
from drift_fast.bench.results import Results, Row
from drift_fast.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 8.6
_OURS, _CONTROL, _RIVAL = "#1b7f5c", "#9aa0a6", "#4a6fa5"


def draw(results: Results, path: Path) -> Path:
    """Draw a run's rows as bars of time relative to ours, or as rates over thread counts.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return _lines(results, path) if results.kind == "scaling" else _bars(results, path)


def _bars(results: Results, path: Path) -> Path:
    groups = {
        group: rows
        for group in GROUPS
        if (rows := [row for row in results.rows if row.group == group and row.wall])
        and any(row.who == "ours" for row in rows)
    }
    counts = [len(rows) for rows in groups.values()]
    figure = new_figure(_WIDTH, 1.1 + 0.62 * len(counts) + 0.34 * sum(counts))
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=counts, sharex=True)[:, 0]
    for (group, rows), ax in zip(groups.items(), axes, strict=True):
        _group(ax, group, rows)
    if len(axes):
        ratios = [ratio for rows in groups.values() for ratio in _ratios(rows)]
        # All groups share one scale.
        axes[-1].set_xlim(min(0.5, *ratios) / 1.2, max(100, *ratios) * 2)
        axes[-1].set_xlabel("time against ours in the same group, logarithmic")
    figure.suptitle(f"drift_fast, {results.size}, {results.threads} threads", fontsize=11)
    figure.savefig(path)
    return path


def _ratios(rows: list[Row]) -> list[float]:
    base = next(row.wall for row in rows if row.who == "ours")
    assert base
    return [(row.wall or base) / base for row in rows]


def _group(ax: Axes, group: str, rows: list[Row]) -> None:
    ratios = _ratios(rows)
    colors = [{"ours": _OURS, "xor": _CONTROL}.get(row.who, _RIVAL) for row in rows]
    # Starting at one: slower than ours to the right, faster to the left.
    ax.barh(range(len(rows)), [ratio - 1 for ratio in ratios], left=1, color=colors, height=0.7)
    for at, ratio in enumerate(ratios):
        ax.text(max(ratio, 1) * 1.1, at, f"{ratio:.2f}×", va="center", fontsize=8)
    names = [row.label.replace("**", "") + (" (wrong)" if row.wrong else "") for row in rows]
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    mine = next(at for at, row in enumerate(rows) if row.who == "ours")
    ax.plot(1, mine, "D", color=_OURS, markersize=6)
    ax.get_yticklabels()[mine].set(color=_OURS, weight="bold")
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xticks(
        [0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5×", "1×", "2×", "5×", "10×", "20×", "50×", "100×"]
    )
    ax.minorticks_off()
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_title(GROUPS[group], fontsize=9, loc="left")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _lines(results: Results, path: Path) -> Path:
    titles = {"statistics": "statistics", "delta": "Δ written"}
    parts = results.timed_inside()
    figure = new_figure(_WIDTH, 3.6)
    axes = figure.subplots(1, max(1, len(parts)), squeeze=False)[0]
    for ax, part in zip(axes, parts, strict=False):
        for who, label, color in (("ours", "drift_fast", _OURS), ("xor", "XOR control", _CONTROL)):
            rows = [
                row
                for row in results.rows
                if row.key.startswith(f"inside/{part}/{who}@") and row.wall
            ]
            rates = [results.nbytes / (row.wall or 1) / 1e9 for row in rows]
            counts = [row.threads for row in rows]
            ax.plot(counts, rates, "o-", color=color, label=label)
        ax.set_title(titles[part], fontsize=10, loc="left")
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.set_xlabel("threads")
        ax.set_ylabel("GB/s of the pair")
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.savefig(path)
    return path


def draw_trace(traces: Mapping[str, Sequence[Sample]], baseline: int, path: Path) -> Path:
    """Draw the memory of each command over time, anonymous and mapped on top of each other.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(_WIDTH, 2.6 * len(traces))
    axes = figure.subplots(len(traces), 1, squeeze=False)[:, 0]
    for ax, (label, samples) in zip(axes, traces.items(), strict=True):
        seconds = [sample.seconds for sample in samples]
        anonymous = [sample.anonymous / 1e6 for sample in samples]
        mapped = [(sample.nbytes - sample.anonymous) / 1e6 for sample in samples]
        ax.stackplot(
            seconds, anonymous, mapped, labels=("anonymous", "mapped"), colors=(_OURS, _CONTROL)
        )
        ax.axhline(
            baseline / 1e6, color="black", linewidth=0.8, linestyle=":", label="import drift_fast"
        )
        ax.set_title(label, fontsize=10, loc="left")
        ax.set_ylabel("resident MB")
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=8, loc="lower right")
    if len(axes):
        axes[-1].set_xlabel("seconds")
    figure.savefig(path)
    return path
