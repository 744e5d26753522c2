"""The metrics of an injection: progress along Δ, angles, pushes and α in force.

Owns the arithmetic of the summary. Everything here waits for the device, so it is computed when
metrics are logged, not in every step.
"""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from drift_fast.inject.strength.control import Control
from drift_fast.inject.strength.formula import Scale
from drift_fast.inject.target import Target
from drift_fast.inject.target_group import TargetGroup
from drift_fast.names import MODULE_KINDS, kind_of, module_of
from drift_fast.paths import local_path
from drift_fast.tables import Table

logger = logging.getLogger(__name__)

# At so many logging steps the mean |cos(g, Δ)| is below this before a hint is given: the factor
# (1 + cos)/2 of "adaptive" is then within 5 % of a half.
_LOOKS, _FLAT = 3, 0.05
# Summaries of a run that are kept at most; each takes some kilobytes.
_KEPT = 1024

# How many metrics a line of a training log has unless all are asked for.
_BRIEF = 8

# What a log has one number of.
_SINGLE = (
    "progress",
    "alpha",
    "relative_push",
    "cosine",
    "skipped",
    "missing_gradients",
    "never_had_gradient",
    "stopped",
)


def measure(groups: Sequence[TargetGroup], control: Control) -> dict[str, float]:
    """Return progress overall and by parameter, and cosines, push and α of the last step."""
    result: dict[str, float] = {}
    moved = total = push = gradient = along = lengths = 0.0
    alphas: list[float] = []
    for group in groups:
        names = [target.name for target in group.targets]
        squares = group.squares()
        for name, value, square in zip(names, group.progress().tolist(), squares, strict=True):
            result[f"progress/{name}"] = value
            moved, total = moved + value * square, total + square
        last = group.last
        if last is None or last.alpha is None:
            continue
        alphas += last.alpha.tolist()
        vectors = (last.norm, last.dot, last.c, last.delta)
        rows = zip(names, *(vector.tolist() for vector in vectors), strict=True)
        for name, norm, dot, c, delta in rows:
            if not math.isfinite(norm):
                continue
            push, gradient = push + (c * delta) ** 2, gradient + norm**2
            # A zero gradient has no angle, and only some scales ask for one.
            if last.angles and norm > 0 and math.isfinite(dot):
                result[f"cosine/{name}"] = dot / norm / delta
                along, lengths = along + dot, lengths + delta**2
    result["progress"] = moved / total
    result["alpha"] = sum(alphas) / len(alphas) if alphas else _stated(control)
    if gradient > 0:
        result["relative_push"] = math.sqrt(push / gradient)
    if lengths > 0:
        result["cosine"] = along / math.sqrt(gradient * lengths)
    if control.needs_progress:
        result["stopped"] = float(control.stopped)
    return result


def summarize(metrics: Mapping[str, float], groups: Sequence[TargetGroup]) -> dict[str, float]:
    """Return metrics for a log: overall, by kind (attn, mlp, …) and by module (q_proj, …).

    λ of several targets is their mean weighted by ‖Δ‖². Their cosine is that of their gradients
    taken together.
    """
    result = {key: metrics[key] for key in _SINGLE if key in metrics}
    moved: dict[str, list[float]] = {}
    angle: dict[str, list[float]] = {}
    for group in groups:
        norms = group.last_norms()
        for at, (target, square) in enumerate(zip(group.targets, group.squares(), strict=True)):
            cosine = metrics.get(f"cosine/{target.name}")
            for key in {kind_of(target.delta_name), module_of(target.delta_name)}:
                _add(moved, key, metrics[f"progress/{target.name}"] * square, square)
                if cosine is not None:
                    norm, delta = norms[at]
                    _add(angle, key, cosine * norm * delta, norm**2, delta**2)
    result |= {f"progress/{kind}": sums[0] / sums[1] for kind, sums in moved.items()}
    result |= {
        f"cosine/{kind}": dot / math.sqrt(gradient * delta)
        for kind, (dot, gradient, delta) in angle.items()
    }
    return result


def as_logged(metrics: Mapping[str, float], log: str) -> dict[str, float]:
    """Return what a training log shows of a summary, under `drift/…`.

    log: "all", or "brief" for the eight most telling ones at most: those of all targets, and λ by
        kind as far as there is room.
    """
    keys = list(metrics)
    if log == "brief":
        first = ("progress", "predicted_progress", *_SINGLE[1:])
        kinds = (f"progress/{kind}" for kind in MODULE_KINDS)
        keys = [key for key in (*first, *kinds) if key in metrics][:_BRIEF]
    return {f"drift/{key}": metrics[key] for key in keys}


def keep(history: dict[int, dict[str, float]], step: int, summary: dict[str, float]) -> None:
    """Keep the summary of a step, fewer where there are many, and none of a run before this one."""
    if history and step < max(history):
        history.clear()
    if len(history) >= _KEPT:
        for each in list(history)[1::2]:
            del history[each]
    history[step] = summary


def module_table(targets: Sequence[Target], history: Mapping[int, Mapping[str, float]]) -> Table:
    """Return how many parameters and elements each module has, and its last λ and cosine."""
    modules: dict[str, list[Target]] = {}
    for target in targets:
        modules.setdefault(module_of(target.delta_name), []).append(target)
    last = history[max(history)] if history else {}

    def shown(key: str) -> str:
        return f"{last[key]:.3g}" if key in last else "–"

    rows = [
        (
            name,
            str(len(found)),
            f"{sum(math.prod(target.shape) for target in found):,}",
            shown(f"progress/{name}"),
            shown(f"cosine/{name}"),
        )
        for name, found in modules.items()
    ]
    return Table(("module", "parameters", "elements", "λ", "cos(g, Δ)"), rows, "<>>>>")


class AngleHint:
    """Says once in the log that "adaptive" measures angles that make no difference.

    On real pairs the mean |cos(g, Δ)| was below 0.035. "adaptive" is then "gradnorm" at α/2.
    """

    def __init__(self, scale: Scale) -> None:
        self._left = _LOOKS if scale == "adaptive" else 0
        self._step = 0

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the metrics after a step, in order."""
        found = [abs(value) for key, value in metrics.items() if key.startswith("cosine/")]
        if not self._left or step <= self._step or not found:
            return
        self._step = step
        mean = math.fsum(found) / len(found)
        # One look at other angles, and the hint would be wrong.
        self._left = self._left - 1 if mean < _FLAT else 0
        if not self._left and mean < _FLAT:
            logger.info(
                "cos(g, Δ) is near zero (mean size %.3f after %d steps), so that scale='adaptive' "
                "does what scale='gradnorm' does at half of alpha, which saves two passes over "
                "memory in each step",
                mean,
                step,
            )


def csv_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of a CSV file that may be written.

    Raises:
        ValueError: a directory is there.
    """
    path = local_path(path)
    if path.is_dir():
        raise ValueError(f"csv names the directory {path}; name a file in it, such as metrics.csv")
    return path


def append_rows(path: str | os.PathLike[str], step: int, metrics: Mapping[str, float]) -> None:
    """Append one row of step, metric and value for each metric to a CSV file.

    Its directory is made where there is none.
    """
    path = csv_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(["step", "metric", "value"])
        writer.writerows([step, name, value] for name, value in metrics.items())


def set_aside(path: str | os.PathLike[str]) -> None:
    """Rename the CSV file of an earlier run, `m.csv` to the first free of `m-1.csv`, `m-2.csv`, …

    A run that begins does so before its first row; one that is resumed goes on with its file.
    """
    path = csv_file(path)
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while (kept := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    path.rename(kept)
    logger.info("%s has the rows of an earlier run; it is %s now", path, kept)


def _add(sums: dict[str, list[float]], kind: str, *values: float) -> None:
    found = sums.setdefault(kind, [0.0] * len(values))
    for at, value in enumerate(values):
        found[at] += value


def _stated(control: Control) -> float:
    """Return α before any step: as stated, the mean where it is stated by module."""
    alpha = control.alpha
    return alpha if not isinstance(alpha, dict) else sum(alpha.values()) / len(alpha)
