"""Pictures of the lines of results: answers against perception, and both over λ.

Owns the drawing only. The colors are Okabe and Ito's, told apart with any color vision, and the
markers differ as well.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from methods import METHODS, REGIMES
from pool import Line, by_key

# By family: color, marker.
_FAMILIES: Final = {
    "reference": ("#000000", "o"),
    "merge": ("#999999", "v"),
    "merge, then SFT": ("#0072B2", "s"),
    "injection": ("#D55E00", "D"),
    "motion": ("#009E73", "P"),
    "control": ("#CC79A7", "x"),
}
_LABELED: Final = (
    "as_is",
    "sft",
    "merge_sft_two",
    "merge_sft_mm",
    "drift",
    "drift_base",
    "drift_base_window",
    "drift_base_cap",
    "motion_base",
)
# Where a label may lie about its point, the first that is free taken: points right and up.
_PLACES: Final = tuple(
    (right, up)
    for far in (7, 40, 80)
    for up in (4, -9, 14, -19, 25, -30, 37, -42, 50, -55, 64, -69)
    for right in (far, -far)
)
_SHORT: Final = {"multimodal": "exp−mm", "base": "exp−base"}
# What leads from a label that lies apart to its point.
_LEADER: Final = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6}


def write(lines: Sequence[Line], out: Path) -> list[Path]:
    """Draw what the lines allow, and return what was written."""
    written = []
    tested = [line for line in lines if line["stage"] == "test"]
    regimes = [name for name in REGIMES if any(line["regime"] == name for line in tested)]
    if "main" in regimes:
        mine = [line for line in tested if line["regime"] == "main"]
        written.append(_pareto({"main": mine}, out / "pareto.png"))
    if others := [name for name in regimes if name != "main"]:
        grouped = {name: [line for line in tested if line["regime"] == name] for name in others}
        written.append(_pareto(grouped, out / "regimes.png"))
    mine = [line for line in lines if line["regime"] == "main" and "progress" in line]
    if mine:
        written.append(_doses(mine, out / "progress.png"))
    return written


def _pareto(regimes: dict[str, list[Line]], path: Path) -> Path:
    """Draw each method's mean answers over its mean digits, and the front of both."""
    columns = min(2, len(regimes))
    rows = -(-len(regimes) // columns)
    figure: Any = Figure(figsize=(7.5 * columns, 5.4 * rows), dpi=130, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    labeled: dict[Any, tuple[dict[str, tuple[float, ...]], list[str]]] = {}
    for axes, (regime, lines) in zip(panels, regimes.items(), strict=False):
        points = {
            name: tuple(statistics.fmean(row[m] for row in rows) for m in ("digits", "answers"))
            for (name,), rows in by_key(lines, "method").items()
        }
        for name, (digits, answers) in points.items():
            color, marker = _FAMILIES[METHODS[name].family]
            axes.plot(digits, answers, marker, color=color, markersize=6)
        front = _front(points)
        axes.step(
            [points[n][0] for n in front], [points[n][1] for n in front], where="pre",
            color="0.7", linewidth=1, zorder=0,
        )  # fmt: skip
        named = [name for name in front if METHODS[name].control is None]
        labeled[axes] = (points, list(dict.fromkeys([*named, *_LABELED])))
        pairs = len({(line["world"], line["set"]) for line in lines})
        axes.set_title(f"{REGIMES[regime].label}\npairs: {pairs}", fontsize=8, loc="left")
        axes.set_xlabel("digits read right")
        axes.set_ylabel("answers right")
        axes.grid(color="0.93")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(regimes) :]:
        axes.set_visible(False)
    present = {METHODS[line["method"]].family for lines in regimes.values() for line in lines}
    for family, (color, marker) in _FAMILIES.items():
        if family in present:
            panels[0].plot([], [], marker, color=color, label=family)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    # Only a figure that has been laid out knows where its points lie.
    figure.draw_without_rendering()
    for axes, (points, names) in labeled.items():
        _label(axes, points, names)
    figure.savefig(path)
    return path


def _label(axes: Any, points: dict[str, tuple[float, ...]], names: Sequence[str]) -> None:
    """Name points, each where its label covers no other point or label, if there is a place."""

    def write(name: str, place: tuple[int, int], **line: Any) -> Any:
        return axes.annotate(
            _name(name), points[name], xytext=place, textcoords="offset points", fontsize=7,
            ha="left" if place[0] > 0 else "right", in_layout=False, **line,
        )  # fmt: skip

    pixels = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in pixels]
    named: set[tuple[float, ...]] = set()
    for name in sorted(names, key=lambda name: METHODS[name].like is not None):
        # Methods of equal settings share a point, and the name of the tuned one says enough.
        if name not in points or points[name] in named:
            continue
        named.add(points[name])
        covered: dict[tuple[int, int], tuple[int, Bbox]] = {}
        for place in _PLACES:
            text = write(name, place)
            box = text.get_window_extent()
            text.remove()
            outside = not (
                axes.bbox.x0 <= box.x0 <= box.x1 <= axes.bbox.x1
                and axes.bbox.y0 <= box.y0 <= box.y1 <= axes.bbox.y1
            )
            covered[place] = (box.count_overlaps(taken) + 100 * outside, box)
        place = min(covered, key=lambda at: covered[at][0])
        far = abs(place[1]) > 9 or abs(place[0]) > 7
        write(name, place, arrowprops=_LEADER if far else None)
        taken.append(covered[place][1])


def _front(points: dict[str, tuple[float, ...]]) -> list[str]:
    """Return the methods that no other beats or equals on both measures, by digits."""
    best = [
        name
        for name, (digits, answers) in points.items()
        if not any(
            (d >= digits and a >= answers) and (d > digits or a > answers)
            for d, a in points.values()
        )
    ]
    return sorted(best, key=lambda name: points[name])


def _doses(lines: Sequence[Line], path: Path) -> Path:
    """Draw both measures over the final λ: every run, and the means of the runs over α and λ."""
    figure: Any = Figure(figsize=(12.0, 8.0), dpi=130, layout="constrained")
    panels = figure.subplots(2, 2, sharey="row", sharex=True)
    for column, prior in enumerate(("multimodal", "base")):
        for row, (measure, told) in enumerate(
            (("answers", "answers right"), ("digits", "digits read right"))
        ):
            axes = panels[row, column]
            for family, (color, marker) in _FAMILIES.items():
                mine = [line for line in lines if METHODS[line["method"]].family == family]
                axes.plot(
                    [line["progress"][prior]["all"] for line in mine],
                    [line[measure] for line in mine],
                    marker, color=color, markersize=3, alpha=0.35, linestyle="none",
                )  # fmt: skip
            _curves(axes, lines, prior, measure)
            axes.axvline(1.0, color="0.85", linewidth=0.8, zorder=0)
            axes.set_ylabel(told)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0, column].set_title(f"Δ = {_SHORT[prior]}", fontsize=10, loc="left")
        panels[1, column].set_xlabel("final progress λ along Δ (1 = all of Δ)")
        panels[1, column].set_xlim(-0.5, 2.2)
    present = {METHODS[line["method"]].family for line in lines}
    for family, (color, marker) in _FAMILIES.items():
        if family in present:
            panels[0, 0].plot([], [], marker, color=color, label=family)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path)
    return path


def _curves(axes: Any, lines: Sequence[Line], prior: str, measure: str) -> None:
    """Join the means of the runs in which only α or only λ was varied."""
    doses = [line for line in lines if line["stage"] == "dose"]
    for (name,), rows in by_key(doses, "method").items():
        if METHODS[name].prior != prior:
            continue
        texts = [{**row, "text": str(row["settings"])} for row in rows]
        points = sorted(
            tuple(
                statistics.fmean(values)
                for values in (
                    [row["progress"][prior]["all"] for row in same],
                    [row[measure] for row in same],
                )
            )
            for same in by_key(texts, "text").values()
        )
        color, _ = _FAMILIES[METHODS[name].family]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.6)


def _name(name: str) -> str:
    prior = METHODS[name].prior
    return METHODS[name].label + ("" if prior is None else f" ({_SHORT[prior]})")
