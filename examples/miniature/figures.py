"""Pictures of the lines of results: answers against perception, and both over λ.

Owns the drawing only. The colors are Okabe and Ito's, told apart with any color vision, and the
markers differ as well.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
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
# Numbers of points that are nearer than so many pixels would cover each other.
_NEAR: Final = (30, 18)
_SHORT: Final = {"multimodal": "exp−mm", "base": "exp−base"}


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
    """Draw each method's mean answers over its mean digits, and the front of both.

    Methods that are named have a number, the same in every panel, and the key has their names:
    names beside the points would cover each other.
    """
    columns = min(2, len(regimes))
    rows = -(-len(regimes) // columns)
    means = {
        regime: {
            name: tuple(statistics.fmean(row[m] for row in mine) for m in ("digits", "answers"))
            for (name,), mine in by_key(lines, "method").items()
        }
        for regime, lines in regimes.items()
    }
    numbers = _numbers(means.values())
    width = 7.5 * columns if columns > 1 else 10.5
    figure: Any = Figure(figsize=(width, 5.4 * rows + 0.8), dpi=130, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (regime, lines) in zip(panels, regimes.items(), strict=False):
        points = means[regime]
        for name, (digits, answers) in points.items():
            color, marker = _FAMILIES[METHODS[name].family]
            axes.plot(digits, answers, marker, color=color, markersize=6)
        front = _front(points)
        axes.step(
            [points[n][0] for n in front], [points[n][1] for n in front], where="pre",
            color="0.7", linewidth=1, zorder=0,
        )  # fmt: skip
        pairs = len({(line["world"], line["set"]) for line in lines})
        axes.set_title(f"{REGIMES[regime].label}\npairs: {pairs}", fontsize=8, loc="left")
        # Room for the numbers at the right.
        axes.margins(x=0.09)
        axes.set_xlabel("digits read right")
        axes.set_ylabel("answers right")
        axes.grid(color="0.93")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(regimes) :]:
        axes.set_visible(False)
    for name, number in numbers.items():
        color, marker = _FAMILIES[METHODS[name].family]
        panels[0].plot([], [], marker, color=color, label=f"{number}  {_name(name)}")
    named = {METHODS[name].family for name in numbers}
    present = {METHODS[name].family for points in means.values() for name in points}
    for family, (color, marker) in _FAMILIES.items():
        if family in present - named:
            panels[0].plot([], [], marker, color=color, label=family)
    figure.legend(loc="outside lower center", ncols=2 * columns, frameon=False, fontsize=8)
    # Only a figure that has been laid out knows where its points lie.
    figure.draw_without_rendering()
    for axes, points in zip(panels, means.values(), strict=False):
        _number(axes, points, numbers)
    figure.savefig(path)
    return path


def _numbers(panels: Iterable[dict[str, tuple[float, ...]]]) -> dict[str, int]:
    """Return a number for each method of a front, and each that is always named."""
    found = [name for points in panels for name in (*_front(points), *_LABELED) if name in points]
    named = dict.fromkeys(name for name in found if METHODS[name].control is None)
    families = list(_FAMILIES)
    ordered = sorted(named, key=lambda name: families.index(METHODS[name].family))
    return {name: at for at, name in enumerate(ordered, 1)}


def _number(axes: Any, points: dict[str, tuple[float, ...]], numbers: Mapping[str, int]) -> None:
    """Write numbers beside points of a figure that is laid out; near ones are written together."""
    groups: list[list[str]] = []
    pixels = {name: axes.transData.transform(points[name]) for name in numbers if name in points}
    for name, (x, y) in sorted(pixels.items(), key=lambda item: tuple(item[1])):
        for group in groups:
            before, above = pixels[group[-1]]
            if abs(x - before) < _NEAR[0] and abs(y - above) < _NEAR[1]:
                group.append(name)
                break
        else:
            groups.append([name])
    for group in groups:
        text = ", ".join(str(number) for number in sorted(numbers[name] for name in group))
        last = max(group, key=lambda name: pixels[name][0])
        axes.annotate(
            text, points[last], xytext=(5, 4), textcoords="offset points", fontsize=8,
            in_layout=False,
        )  # fmt: skip


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
