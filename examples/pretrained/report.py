"""Tables and pictures from the lines of results alone.

Owns what is published: means, intervals, paired differences, and how λ compares with its forecast.
Knows nothing of training.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from choosing import Form
from methods import METHODS

Line = dict[str, Any]

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
# Against what others are compared, where the fine-tuning run itself is alike.
_BEATEN: Final = tuple(
    f"{name}{run}" for run in ("", "_reading", "_lora") for name in ("sft", "merge", "adaptive")
)
# Fewer runs have no interval worth printing.
_ENOUGH: Final = 3

# What the small picture has.
_OVERVIEW: Final = {
    "sft": "SFT",
    "merge": "merge, then SFT",
    "merge_two": "merge with two λ, then SFT",
    "motion": "planned motion",
    "adaptive": "DRIFT",
    "half": "half merged, half DRIFT",
    "sft_reading": "SFT*",
    "merge_reading": "merge, then SFT*",
    "adaptive_reading": "DRIFT*",
    "half_reading": "half merged, half DRIFT*",
}
# What the picture of many pairs has.
_BY_PAIR: Final = {
    "sft_reading": ("SFT", "black"),
    "adaptive_reading_shuffled": ("DRIFT, shuffled Δ", "tab:gray"),
    "merge_reading": ("merge, then SFT", "tab:blue"),
    "merge_reading_late": ("merge, later layers more, then SFT", "tab:cyan"),
    "half_reading": ("half merged, half DRIFT", "tab:green"),
    "adaptive_reading": ("DRIFT", "tab:red"),
}
_TITLE: Final = "Answers and reading: means and 95 % intervals; squares have a protected Δ"
_COLORS: Final = {
    "reference": "black",
    "merge, then SFT": "tab:blue",
    "injection": "tab:red",
    "motion": "tab:purple",
    "mixed": "tab:green",
    "control": "tab:gray",
}

# Shares of reading that a trial keeps.
_KEPT: Final = (0.85, 0.7, 0.55, 0.4)


def write(out: Path, form: Form, lines: Sequence[Line]) -> None:
    """Write results.md and the pictures into a directory."""
    tests = [line for line in lines if line["stage"] == "test"]
    parts = [
        "# Results\n",
        f"{len(tests)} tests, {sum(line['stage'] in ('tune', 'again') for line in lines)} trials. "
        "Answers are stories of 3 to 5 steps with their numbers in an image, reading is the share "
        "of numbers that are read. Both are means with 95 % intervals over pairs and seeds; "
        "differences are paired.\n",
        _checkpoints(lines),
    ]
    if tests:
        parts += [_methods(form, tests), _differences(form, tests), _pairs(form, tests)]
        parts += [
            _forecasts([line for line in lines if "foreseen" in line]),
            _settings(form, tests),
        ]
        if trials := [line for line in lines if line["stage"] == "tune"]:
            parts.append(_trials(form, trials))
        seen = Counter(test["method"] for test in tests)
        enough = {name: METHODS[name].label for name in form.methods if seen[name] >= _ENOUGH}
        if len({test["pair"] for test in tests}) > _ENOUGH:
            _draw_pairs(out / "pairs.png", tests)
        else:
            _pareto(out / "pareto.png", tests, enough)
            few = {name: label for name, label in _OVERVIEW.items() if name in enough}
            _pareto(out / "overview.png", tests, few)
    (out / "results.md").write_text("\n".join(parts), encoding="utf-8")


def interval(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean; not a number of one or two values."""
    if len(values) < _ENOUGH:
        return math.nan
    freedom = len(values) - 1
    t = _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.5 / freedom
    return t * statistics.stdev(values) / math.sqrt(len(values))


def paired(tests: Sequence[Line], method: str, other: str, measure: str) -> list[float]:
    """Return the differences of two methods on the same pairs and seeds."""

    def by_place(name: str) -> dict[tuple[int, int], float]:
        return {(t["pair"], t["seed"]): t[measure] for t in tests if t["method"] == name}

    mine, theirs = by_place(method), by_place(other)
    return [mine[place] - theirs[place] for place in sorted(mine.keys() & theirs.keys())]


def _checkpoints(lines: Sequence[Line]) -> str:
    rows = [
        (
            line["method"],
            line["pair"],
            line["curve"][-1][0],
            f"{line['curve'][-1][1]:.3f}",
            f"{line['seconds']:.0f}",
        )
        for line in lines
        if line["stage"] == "checkpoint"
    ]
    return _table("Checkpoints", ("checkpoint", "pair", "steps", "right", "seconds"), rows)


def _methods(form: Form, tests: Sequence[Line]) -> str:
    rows = []
    for name in form.methods:
        mine = [test for test in tests if test["method"] == name]
        if not mine:
            continue
        method = METHODS[name]
        along = [test["progress"]["along"] for test in mine]
        rows.append(
            (
                method.label,
                method.delta if method.family != "reference" else "",
                _mean([test["answers"] for test in mine]),
                _mean([test["reading"] for test in mine]),
                f"{statistics.mean(along):.2f}",
                f"{statistics.mean(t['progress']['cosine'] for t in mine):.2f}",
                len(mine),
            )
        )
    heads = ("method", "Δ", "answers", "reading", "λ", "cos(motion, Δ)", "runs")
    return _table("Tests", heads, rows)


def _differences(form: Form, tests: Sequence[Line]) -> str:
    rows = []
    for other in _BEATEN:
        for name in form.methods:
            answers = paired(tests, name, other, "answers")
            if name == other or len(answers) < _ENOUGH or _run_of(name) != _run_of(other):
                continue
            reading = paired(tests, name, other, "reading")
            rows.append(
                (
                    f"{METHODS[name].label} ({METHODS[name].delta})",
                    METHODS[other].label,
                    _signed(answers),
                    f"{sum(d > 0 for d in answers)} of {len(answers)}",
                    _signed(reading),
                )
            )
    heads = ("method", "minus", "answers", "more in", "reading")
    return _table("Differences", heads, rows)


def _run_of(name: str) -> tuple[float, bool]:
    return METHODS[name].reading, METHODS[name].lora


def _pairs(form: Form, tests: Sequence[Line]) -> str:
    pairs = sorted({test["pair"] for test in tests})
    rows = []
    for name in form.methods:
        if not any(test["method"] == name for test in tests):
            continue
        cells: list[str] = []
        for pair in pairs:
            mine = [t for t in tests if t["method"] == name and t["pair"] == pair]
            cells.append(
                f"{statistics.mean(t['answers'] for t in mine):.3f} / "
                f"{statistics.mean(t['reading'] for t in mine):.3f}"
                if mine
                else ""
            )
        rows.append((METHODS[name].label, METHODS[name].delta, *cells))
    return _table("Answers / reading by pair", ("method", "Δ", *(f"pair {p}" for p in pairs)), rows)


def _forecasts(tests: Sequence[Line]) -> str:
    rows = []
    for name in dict.fromkeys(test["method"] for test in tests):
        ratios = [
            test["progress"]["along"] / test["foreseen"]
            for test in tests
            if test["method"] == name and test.get("foreseen")
        ]
        if ratios:
            rows.append(
                (
                    METHODS[name].label,
                    METHODS[name].delta,
                    f"{min(ratios):.2f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{max(ratios):.2f}",
                )
            )
    heads = ("method", "Δ", "least", "median", "largest")
    return _table("λ measured, over λ foreseen", heads, rows)


def _settings(form: Form, tests: Sequence[Line]) -> str:
    rows = []
    for name in form.methods:
        mine = [test for test in tests if test["method"] == name]
        if mine and METHODS[name].like is None and METHODS[name].space:
            rows.append((METHODS[name].label, METHODS[name].delta, str(mine[0]["settings"])))
    return _table("Settings that were chosen", ("method", "Δ", "settings"), rows)


def _trials(form: Form, trials: Sequence[Line]) -> str:
    rows = []
    for name in form.methods:
        mine = [trial for trial in trials if trial["method"] == name]
        if not mine:
            continue
        cells = []
        for kept in _KEPT:
            best = max(
                (trial for trial in mine if trial["reading"] >= kept),
                key=lambda trial: trial["answers"],
                default=None,
            )
            cells.append(
                f"{best['answers']:.3f} (λ {best['progress']['along']:.2f})" if best else ""
            )
        rows.append((METHODS[name].label, METHODS[name].delta, len(mine), *cells))
    heads = ("method", "Δ", "trials", *(f"reading ≥ {kept}" for kept in _KEPT))
    return _table("The most answers of any trial on the first tuning pair", heads, rows)


def _pareto(path: Path, tests: Sequence[Line], labels: Mapping[str, str]) -> None:
    """Draw answers against reading: labels stand at their dots if few, else beside the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    few = len(labels) <= len(_OVERVIEW)
    figure, axes = plt.subplots(figsize=(9, 4.2) if few else (11, 6), layout="constrained")
    means = {
        name: tuple(
            statistics.mean(test[m] for test in tests if test["method"] == name)
            for m in ("reading", "answers")
        )
        for name in labels
    }
    across, most = [mean[0] for mean in means.values()], max(mean[1] for mean in means.values())
    middle = (min(across) + max(across)) / 2
    texts: dict[tuple[float, float], list[str]] = {}
    for number, (name, label) in enumerate(labels.items(), 1):
        mine = [test for test in tests if test["method"] == name]
        x, y = ([test[m] for test in mine] for m in ("reading", "answers"))
        at = means[name]
        axes.errorbar(
            *at,
            xerr=interval(x),
            yerr=interval(y),
            fmt="s" if METHODS[name].protection else "o",
            color=_COLORS[METHODS[name].family],
            capsize=2,
            alpha=0.7,
            label=f"{number} {label}",
        )
        # Names of dots that lie on each other are written together.
        near = [
            other
            for other in texts
            if abs(other[0] - at[0]) < 0.009 and abs(other[1] - at[1]) < most / 30
        ]
        texts.setdefault(near[0] if near else at, []).append(label if few else str(number))
    for at, those in texts.items():
        axes.annotate(
            ", ".join(those),
            at,
            fontsize=9 if few else 8,
            ha="right" if (left := few and at[0] > middle) else "left",
            xytext=(-5 if left else 4, 4),
            textcoords="offset points",
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )
    axes.set_xlabel("numbers read right")
    axes.set_ylabel("answers right, stories of 3 to 5 steps")
    axes.set_title("Means and 95 % intervals; * a quarter of reading in the set" if few else _TITLE)
    axes.grid(alpha=0.3)
    if not few:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_pairs(path: Path, tests: Sequence[Line]) -> None:
    """Draw the answers of every run, a column for each pair of checkpoints."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    pairs = sorted({test["pair"] for test in tests})
    for number, (name, (label, color)) in enumerate(_BY_PAIR.items()):
        mine = [test for test in tests if test["method"] == name]
        if not mine:
            continue
        mean = statistics.mean(test["answers"] for test in mine)
        aside = 0.12 * (number - (len(_BY_PAIR) - 1) / 2)
        axes.scatter(
            [pairs.index(test["pair"]) + aside for test in mine],
            [test["answers"] for test in mine],
            color=color,
            s=28,
            label=f"{label}: mean {mean:.3f}",
        )
    axes.set_xticks(range(len(pairs)), [f"checkpoints {pair}" for pair in pairs])
    for at in range(1, len(pairs)):
        axes.axvline(at - 0.5, color="lightgray", linewidth=0.8)
    axes.set_ylabel("answers right, stories of 3 to 5 steps")
    axes.set_title("Every run, by pair of checkpoints; a quarter of reading in the set")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f}{_plus_minus(values)}"


def _signed(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):+.3f}{_plus_minus(values)}"


def _plus_minus(values: Sequence[float]) -> str:
    half = interval(values)
    return "" if math.isnan(half) else f" ± {half:.3f}"


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = [f"## {title}\n", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*text, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"
