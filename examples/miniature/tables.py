"""Tables in Markdown from the lines of results, and from nothing else.

Owns the arithmetic of means, deviations and paired differences, and their layout. Invariant: every
number in a table follows from lines that the table counts, and every table says what to run for it;
no sentence here says how a comparison came out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from methods import METHODS, REGIMES
from pool import Line, by_key

from drift_fast import predict_progress

# What every other method is compared with, pair by pair, where it was run.
BASELINES: Final = ("sft", "merge_sft_two", "merge_sft_mm", "drift_base")
MEASURES: Final = ("answers", "digits")
_PRIORS: Final = {"multimodal": "exp−mm", "base": "exp−base"}

# Student's t at 97.5 % for 1, 2, … degrees of freedom.
_T: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


@dataclass(frozen=True)
class Difference:
    """Paired differences in one measure: (world, set) by (world, set).

    `interval` is half the width of the 95 % interval of the mean, by Student's t over the means of
    worlds, or over sets where there is one world; NaN for a single pair. `wins` counts pairs in
    which the measure is larger than the baseline's, `ties` those in which it is equal.
    """

    mean: float
    interval: float
    wins: int
    ties: int
    pairs: int

    @property
    def told(self) -> str:
        """Return whether the interval lies above zero, below it, or holds it."""
        if math.isnan(self.interval):
            return "one pair"
        if self.mean - self.interval > 0:
            return "above"
        return "below" if self.mean + self.interval < 0 else "not told apart"


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample's standard deviation, 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def difference(lines: Sequence[Line], baseline: Sequence[Line], measure: str) -> Difference | None:
    """Return the paired difference of two methods, over the pairs that both have; None of none.

    Raises:
        ValueError: the lines of a pair are of other checkpoints, batches, protocols or profiles.
    """
    reference = {(line["world"], line["set"]): line for line in baseline}
    pairs: dict[int, list[float]] = {}
    for line in lines:
        at = (line["world"], line["set"])
        if at in reference:
            _check_pair(line, reference[at])
            pairs.setdefault(line["world"], []).append(line[measure] - reference[at][measure])
    every = [value for values in pairs.values() for value in values]
    if not every:
        return None
    units = [statistics.fmean(v) for v in pairs.values()] if len(pairs) > 1 else every
    interval = math.nan
    if len(units) > 1:
        quantile = _T[min(len(units) - 1, len(_T)) - 1]
        interval = quantile * statistics.stdev(units) / math.sqrt(len(units))
    return Difference(
        mean=statistics.fmean(every),
        interval=interval,
        wins=sum(value > 0 for value in every),
        ties=sum(value == 0 for value in every),
        pairs=len(every),
    )


def _check_pair(line: Line, other: Line) -> None:
    stated = [(name, line.get(name), other.get(name)) for name in ("protocol", "profile")]
    # What is not trained has no batches, and only the unrelated Δ has a checkpoint more.
    if "batches" in line and "batches" in other:
        stated.append(("batches", line["batches"], other["batches"]))
    mine, theirs = line.get("checkpoints", {}), other.get("checkpoints", {})
    stated += [(f"checkpoint {n}", mine[n], theirs[n]) for n in mine if n in theirs]
    for name, found, expected in stated:
        if found != expected:
            raise ValueError(
                f"{line['key']} and {other['key']} are no pair: {name} {found} and {expected}; run "
                "their stage again, which runs anew what is of other checkpoints or protocols"
            )


def write(
    lines: Sequence[Line], failed: Sequence[Line], path: Path, *, tuned_on: Sequence[int] = ()
) -> Path:
    """Write every table that the lines allow; `tuned_on` are the test worlds also tuned on.

    Raises:
        ValueError: two tests of one method on one world and set, with different settings.
    """
    others = [regime for regime in REGIMES if regime != "main"]
    parts = [
        "# Results of the miniature",
        "Generated from `results.jsonl` by `run.py --stage report`; the README says what is "
        "measured and how.",
    ]
    parts += _circumstances(lines)
    if tuned_on:
        parts.append(
            f"**Tuned and tested on the same world ({', '.join(map(str, tuned_on))})**, though "
            "with other fine-tuning sets and other images. Intervals are over the sets of that "
            "world and say nothing of other worlds; `--full` tests on worlds that no trial saw."
        )
    tested = [line for line in lines if line["stage"] == "test"]
    for pair, rows in by_key(tested, "regime", "method", "world", "set").items():
        if len(rows) > 1:
            raise ValueError(
                f"{len(rows)} tests of {'/'.join(map(str, pair))}, with the settings "
                f"{' and '.join(str(row['settings']) for row in rows)}: it was tuned again after "
                "it was tested; remove the lines of the tests that no longer hold"
            )
    if any(line["regime"] in others for line in tested):
        parts += _overview(tested)
    if trained := [line for line in lines if line["stage"] == "checkpoints"]:
        parts += _checkpoints(trained)
    for regime in REGIMES:
        mine = [line for line in tested if line["regime"] == regime]
        if mine:
            parts += _regime(regime, mine)
    if any(line["stage"] == "dose" for line in lines):
        parts += _doses([line for line in lines if line["stage"] == "dose"])
    parts += _predicted(lines)
    for regime in REGIMES:
        trials = [line for line in lines if (line["stage"], line["regime"]) == ("tune", regime)]
        if trials:
            parts += _tuning(regime, trials)
    if failed:
        parts += [
            "## Runs that failed",
            *[f"* `{line['key']}`: {line['error']}" for line in failed],
        ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _circumstances(lines: Sequence[Line]) -> Iterable[str]:
    """Name the hardware and the libraries of the runs, once for all tables."""
    rows = [
        {"device": line["device"].partition(":")[0], "with": _versions(line)}
        for line in lines
        if "versions" in line
    ]
    told = [
        f"{len(same)} on {device} with {versions}"
        for (device, versions), same in by_key(rows, "device", "with").items()
    ]
    if told:
        yield f"Runs: {'; '.join(told)}."
    if earlier := sum("profile" not in line for line in lines):
        yield (
            f"{earlier} lines are of an earlier version: they do not say of which checkpoints and "
            "which protocol they are, so that this was not compared."
        )


def _versions(line: Line) -> str:
    names = ("torch", "transformers", "drift_fast")
    return ", ".join(f"{n} {line['versions'][n]}" for n in names if n in line["versions"])


def _regime(regime: str, lines: Sequence[Line]) -> Iterable[str]:
    groups = {name: rows for (name,), rows in by_key(lines, "method").items()}
    ordered = [name for name in METHODS if name in groups]
    yield f"## {_title(regime)}"
    yield _described(lines)
    yield _table(
        [
            ("", "Δ", "answers right", "digits read right", "λ exp−mm", "λ exp−base",
             "λ attn / MLP", "runs"),
            *(_summary(name, groups[name]) for name in ordered),
        ]
    )  # fmt: skip
    yield (
        "Answers and digits: mean ± standard deviation over runs. λ is the final progress along "
        "either Δ of the regime over attention and MLP together; the last λ column is by kind, "
        "along the Δ that the method uses (exp−base where it uses none)."
    )
    if any(METHODS[name].control == "unrelated" for name in ordered):
        yield from _unrelated_note(regime, lines)
    if regime == "main":
        yield "![answers against digits](pareto.png)"
    for baseline in BASELINES:
        if baseline not in groups:
            continue
        rows: list[tuple[str, ...]] = []
        above: list[str] = []
        for name in ordered:
            found = [difference(groups[name], groups[baseline], measure) for measure in MEASURES]
            if name != baseline and None not in found:
                rows.append((_label(name), _delta(name), *(c for d in found for c in _cells(d))))
                if found[0].told == "above":
                    told = [_delta(name), f"digits {found[1].told}"]
                    above.append(f"{_label(name)} ({'; '.join(filter(None, told))})")
        prior = _delta(baseline)
        against = _label(baseline) + (f" ({prior})" if prior else "")
        yield f"### Paired differences from {against}: {_title(regime)}"
        yield _table([("", "Δ", "answers", "higher in", "", "digits", "higher in", ""), *rows])
        yield _interval_note(lines)
        yield f"Answers above those of “{against}”: {', '.join(above) or 'none'}."


def _overview(tested: Sequence[Line]) -> Iterable[str]:
    """Put all regimes side by side, for the methods that more than one of them has."""
    groups = by_key(tested, "method", "regime")
    regimes = [regime for regime in REGIMES if any(key[1] == regime for key in groups)]
    rows = []
    for name in METHODS:
        cells = []
        for regime in regimes:
            mine = groups.get((name, regime), [])
            cells.append(
                " / ".join(f"{statistics.fmean(row[m] for row in mine):.3f}" for m in MEASURES)
                if mine
                else ""
            )
        if sum(map(bool, cells)) > 1:
            rows.append((_label(name), _delta(name), *cells))
    yield "## All regimes side by side"
    yield "![answers against digits by regime](regimes.png)"
    yield _table([("", "Δ", *regimes), *rows])
    told = "; ".join(f"`{regime}`: {REGIMES[regime].label}" for regime in regimes)
    yield f"Means of answers / digits right, of what each regime's own section tells. {told}."


def _unrelated_note(regime: str, lines: Sequence[Line]) -> Iterable[str]:
    """Say what the unrelated Δ has in common with the one that it stands for."""
    own = [line for line in lines if METHODS[line["method"]].control == "unrelated"]
    if not all("profile" in line for line in own):
        yield (
            "“Unrelated Δ”: in lines of an earlier version, as these are, it has its own norm, not "
            "that of the Δ that it stands for."
        )
        return
    note = (
        "“Unrelated Δ”: each tensor has the norm of the tensor of Δ that it stands for; that "
        "expert was trained from the common base as the expert of the main comparison was."
    )
    if REGIMES[regime].base != "base":
        note += (
            " Here Δ comes from another base and the control's from the common one, so that they "
            "differ in lineage as well as in operations."
        )
    elif REGIMES[regime].expert != "expert":
        note += " The expert of this regime was trained longer, so that they differ in that too."
    yield note


def _summary(name: str, rows: Sequence[Line]) -> tuple[str, ...]:
    prior = METHODS[name].prior or "base"
    kinds = [
        statistics.fmean(row["progress"][prior][kind] for row in rows) for kind in ("attn", "mlp")
    ]
    return (
        _label(name),
        _delta(name),
        *(f"{m:.3f} ± {s:.3f}" for m, s in (mean_std([r[k] for r in rows]) for k in MEASURES)),
        *(f"{statistics.fmean(r['progress'][p]['all'] for r in rows):.3f}" for p in _PRIORS),
        f"{kinds[0]:.3f} / {kinds[1]:.3f}",
        str(len(rows)),
    )


def _cells(found: Difference) -> tuple[str, str, str]:
    spread = "" if math.isnan(found.interval) else f" ± {found.interval:.3f}"
    ties = f" ({found.ties} equal)" if found.ties else ""
    return f"{found.mean:+.3f}{spread}", f"{found.wins}/{found.pairs}{ties}", found.told


def _interval_note(lines: Sequence[Line]) -> str:
    worlds = {line["world"] for line in lines}
    unit = f"the means of {len(worlds)} worlds" if len(worlds) > 1 else "the sets of one world"
    return (
        f"Mean difference ± half of its 95 % interval (Student's t over {unit}). “Above” and "
        "“below” say that the interval leaves out zero, for one comparison at a time."
    )


# What is measured of checkpoints, in the order of the columns.
_KNOWN: Final = {
    "facts": "facts",
    "steps": "text, two digits",
    "chains": "text, six digits",
    "digits": "digits read",
    "known": "known steps",
    "distance": "distance",
}


def _checkpoints(lines: Sequence[Line]) -> Iterable[str]:
    yield "## Checkpoints"
    yield _described(lines)
    rows = []
    for (name,), mine in by_key(lines, "name").items():
        cells = []
        for measure in _KNOWN:
            values = [row["measured"][measure] for row in mine if measure in row["measured"]]
            cells.append("{:.3f} ± {:.3f}".format(*mean_std(values)) if values else "")
        # Lines of the first version did not count them.
        steps = [row["steps"] for row in mine if "steps" in row]
        again = sum(row.get("attempts", 1) - 1 for row in mine)
        rows.append(
            (name, "", *cells, f"{statistics.fmean(steps):.0f}" if steps else "", str(again),
             str(len(mine)))
        )  # fmt: skip
    head = ("", "", *_KNOWN.values(), "steps", "begun again", "worlds")
    yield _table([head, *rows])
    yield (
        "Mean ± standard deviation over worlds. Shares right of the operations that a checkpoint "
        "was trained for: facts of the half that a base is taught, text folds of two and of six "
        "digits; of the multimodal model, on held-out images, digits read and single known steps. "
        "Distance: ‖W − W_parent‖/‖W_parent‖ over attention and MLP. “Begun again”: trainings that "
        "did not reach their goals (`worlds.py`) and were repeated with other batches."
    )


def _doses(lines: Sequence[Line]) -> Iterable[str]:
    yield "## Answers and digits over λ"
    yield "![answers and digits over λ](progress.png)"
    yield _described(lines)
    found: list[tuple[int, float, tuple[str, ...]]] = []
    for (name, _), same in by_key(_with_text(lines), "method", "text").items():
        settings = same[0]["settings"]
        prior = METHODS[name].prior or "base"
        reached = statistics.fmean(row["progress"][prior]["all"] for row in same)
        cells = (
            _label(name), _delta(name), _settings(settings), f"{reached:.3f}",
            *(f"{statistics.fmean(row[m] for row in same):.3f}" for m in MEASURES),
            str(len(same)),
        )  # fmt: skip
        found.append((list(METHODS).index(name), reached, cells))
    rows = [cells for *_, cells in sorted(found)]
    yield _table(
        [("", "Δ", "settings", "final λ", "answers right", "digits read right", "runs"), *rows]
    )


def _predicted(lines: Sequence[Line]) -> Iterable[str]:
    """Compare the λ that injections ended at with what was to be expected of them beforehand."""
    mine = [
        line
        for line in lines
        if line.get("method") in ("drift", "drift_base")
        and not REGIMES[line["regime"]].lora
        and "rates" in line
    ]
    if not mine:
        return
    groups: dict[int, list[tuple[Line, float]]] = {}
    for line in mine:
        along = line["progress"][METHODS[line["method"]].prior or "base"]
        found = along["all"] * along["rms"] / line["rates"]
        alpha = line["settings"]["alpha"]
        groups.setdefault(math.floor(2 * math.log2(alpha) + 0.5), []).append((line, found))
    rows: list[tuple[str, ...]] = []
    for _, group in sorted(groups.items()):
        alphas = sorted({line["settings"]["alpha"] for line, _ in group})
        rates = sorted({line["settings"]["lr"] for line, _ in group})
        found = sorted(c for _, c in group)
        foreseen = [predict_progress(line["settings"]["alpha"], 1.0, 1.0) for line, _ in group]
        rows.append(
            (_span(alphas), _span(rates), f"{statistics.median(found):.3f}",
             f"{found[0]:.3f} to {found[-1]:.3f}", f"{statistics.median(foreseen):.3f}",
             str(len(group)))
        )  # fmt: skip
    yield "## λ foreseen and found"
    yield (
        f"{len(mine)} runs of DRIFT adaptive on attention and MLP, with either Δ, in every stage "
        "and regime but LoRA. c = λ·rms(Δ)/Σlr, beside the one that `predict_progress` takes."
    )
    yield _table([("α", "lr", "c, median", "lowest to highest", "foreseen", "runs"), *rows])


def _span(values: Sequence[float]) -> str:
    first, last = values[0], values[-1]
    return f"{first:g}" if first == last else f"{first:g} to {last:g}"


def _tuning(regime: str, lines: Sequence[Line]) -> Iterable[str]:
    yield f"## Trials: {_title(regime)}"
    yield _described(lines) + (
        " Best by answers, which is what the test uses; a row “tuned for answers and digits” "
        "has the best of the same trials by the sum of both."
    )
    rows = []
    for (name,), mine in by_key(_with_text(lines), "method").items():
        tried = [
            (same[0]["settings"], *(statistics.fmean(r[m] for r in same) for m in MEASURES))
            for same in by_key(mine, "text").values()
        ]
        tried.sort(key=lambda row: -round(row[1], 9))
        best, *others = tried
        worst = min((row[1] for row in others), default=best[1])
        middle = statistics.median(row[1] for row in tried)
        rows.append(
            (_label(name), _delta(name), str(len(tried)), _settings(best[0]), f"{best[1]:.3f}",
             f"{best[2]:.3f}", f"{middle:.3f}", f"{worst:.3f}")
        )  # fmt: skip
    yield _table(
        [("", "Δ", "trials", "best settings", "answers", "digits", "median answers",
          "lowest answers"), *rows]
    )  # fmt: skip


def _with_text(lines: Iterable[Line]) -> list[Line]:
    return [{**line, "text": _settings(line["settings"])} for line in lines]


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "–"


def _described(lines: Sequence[Line]) -> str:
    """Say which runs a table is of, and what to run for it."""
    worlds = sorted({line["world"] for line in lines})
    sets = {line["set"] for line in lines}
    stage = "regimes" if lines[0]["regime"] != "main" else lines[0]["stage"]
    commands = sorted({f"`{line['command']} --stage {stage} report`" for line in lines})
    one = f"{len(worlds)} world{'s' * (len(worlds) != 1)} ({', '.join(map(str, worlds))})"
    if stage == "checkpoints":
        what = f"{len(lines)} checkpoints of {one}"
    else:
        what = f"{len(lines)} runs: {one} × {len(sets)} fine-tuning set{'s' * (len(sets) != 1)}"
    return f"{what}. Command: {', '.join(commands)}."


def _title(regime: str) -> str:
    return REGIMES[regime].label[0].upper() + REGIMES[regime].label[1:]


def _label(name: str) -> str:
    return METHODS[name].label


def _delta(name: str) -> str:
    prior = METHODS[name].prior
    return "" if prior is None else _PRIORS[prior]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))
