"""Training runs as their logs have them: a CSV file of an injection, or what a Trainer saved.

Owns the reading of both. A log is of unknown origin: it is read within limits, and what is not a
number is refused with the line that has it.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from drift_fast.config_files import JsonFile, printable, read_regular
from drift_fast.errors import DriftError

STATE = "trainer_state.json"
_HEADER = ["step", "metric", "value"]
_MAX_NBYTES = 256_000_000
_SAVED = re.compile(r"checkpoint-(\d{1,12})")
_LOG = "log at least once: a smaller logging_steps, or Injection.write_csv(…) between steps"


@dataclass(frozen=True)
class Run:
    """The metrics of one run by step; `remark` says what of its log is left out."""

    name: str
    history: dict[int, dict[str, float]]
    remark: str = ""


class _State(msgspec.Struct):
    """What a Trainer saves; other keys are ignored."""

    log_history: list[dict[str, Any]]


def log_of(path: Path) -> Path | None:
    """Return the log of a run that a path names: itself, or in a directory; None without one."""
    if path.suffix == ".csv" or path.name == STATE:
        return path
    if (path / STATE).is_file():
        return path / STATE
    saved = [(int(found[1]), each) for each in _folders(path) if (found := _named(each))]
    logs = [each / STATE for _, each in sorted(saved) if (each / STATE).is_file()]
    return logs[-1] if logs else None


def read_run(path: Path, name: str) -> Run:
    """Return the metrics of a log.

    Raises:
        FileNotFoundError: there is no such file.
        DriftError: it has no metrics, or is not such a log.
    """
    run = _from_csv(path, name) if path.suffix == ".csv" else _from_state(path, name)
    if not any({"loss", "progress"} & row.keys() for row in run.history.values()):
        raise DriftError(f"{path}: neither a loss nor progress in this log; {_LOG}")
    return run


def _from_csv(path: Path, name: str) -> Run:
    try:
        lines = read_regular(path, _MAX_NBYTES).decode().splitlines()
    except ValueError as error:
        raise DriftError(f"{path}: not a CSV file of metrics ({error}); {_LOG}") from error
    if not lines or lines[0].split(",") != _HEADER:
        found = printable(lines[0], 120) if lines else "nothing"
        raise DriftError(
            f"{path}: expected the columns {', '.join(_HEADER)}, which attach(…, csv=…) and "
            f"Injection.write_csv(…) write, found {found}"
        )
    values: list[tuple[int, str, float]] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            step, metric, value = next(csv.reader([line]))
            values.append((int(step), metric, float(value)))
        except (ValueError, csv.Error, StopIteration):
            shown = printable(line, 80)
            message = f"{path}, line {number}: expected step, metric, value, found {shown!r}"
            raise DriftError(f"{message}; remove the line") from None
    return _in_order(name, values)


def _from_state(path: Path, name: str) -> Run:
    file = JsonFile(path, _MAX_NBYTES, "save a checkpoint again", error=DriftError)
    rows = file.read(_State).log_history
    return _in_order(
        name,
        (
            (row["step"], key.removeprefix("drift/"), float(value))
            for row in rows
            # The summary at the end of training, and evaluations, have other keys.
            if isinstance(row.get("step"), int)
            for key, value in row.items()
            if (key == "loss" or key.startswith("drift/")) and _is_number(value)
        ),
    )


def _in_order(name: str, values: Iterable[tuple[int, str, float]]) -> Run:
    """Return metrics by step; where steps begin again, the run that came last has them."""
    history: dict[int, dict[str, float]] = {}
    last = -math.inf
    replaced = 0
    for step, metric, value in values:
        if step < last:
            later = [each for each in history if each >= step]
            replaced += len(later)
            for each in later:
                del history[each]
        history.setdefault(step, {})[metric] = value
        last = step
    remark = f"{replaced} steps that were logged more than once are shown as the last time"
    return Run(name, history, remark if replaced else "")


def _is_number(value: object) -> bool:
    # An int may be larger than a float can be.
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)


def _folders(path: Path) -> list[Path]:
    return [each for each in path.iterdir() if each.is_dir()] if path.is_dir() else []


def _named(path: Path) -> re.Match[str] | None:
    return _SAVED.fullmatch(path.name)
