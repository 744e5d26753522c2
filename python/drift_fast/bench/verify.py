"""Run every command once before it is timed, compare its results and watch its memory.

Invariant: nothing is timed before its result was compared with float64.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from drift_fast.bench import check, commands, measure
from drift_fast.bench.commands import Entry
from drift_fast.bench.results import Row
from drift_fast.bench.session import Session
from drift_fast.errors import DriftError


def check_entries(session: Session, entries: Iterable[Entry]) -> dict[tuple[str, str], Row]:
    """Run and watch each command once, and compare its results; this also warms up."""
    true = check.truth(session.pair, threads=session.options.threads)
    watch_import(session)
    rows = {}
    for entry in entries:
        row = Row(f"process/{entry.part}/{entry.who}", entry.label, absent=entry.absent)
        rows[entry.part, entry.who] = row
        if row.absent:
            continue
        session.say(f"checking {row.key}")
        try:
            check_entry(session, entry, row, true)
        except measure.CommandError as error:
            if entry.who in ("ours", "xor"):
                raise DriftError(f"{' '.join(entry.command)} failed: {error}") from error
            row.absent = f"failed: {error}"
        session.clear()
    return rows


def watch_import(session: Session) -> None:
    """Note the memory of a process that only imports the package."""
    command = [sys.executable, "-c", "import drift_fast, time; time.sleep(0.3)"]
    baseline = measure.watch(command, environment=session.environment)
    session.results.baseline_nbytes = baseline.nbytes
    session.results.baseline_anonymous_nbytes = baseline.anonymous


def check_entry(
    session: Session, entry: Entry, row: Row, true: Mapping[str, list[float]]
) -> measure.Memory:
    """Run a command once, note its memory, and compare its results with the reference.

    Raises:
        CommandError: it failed.
        DriftError: it is ours, and its results are wrong.
    """
    session.clear()
    command = entry.checked or entry.command
    printed = entry.results if entry.printed else None
    memory = measure.watch(command, environment=session.environment, output=printed)
    row.peak_nbytes, row.peak_anonymous_nbytes = memory.nbytes, memory.anonymous
    if entry.results is not None:
        verdict = check.check_statistics(_statistics(entry), true)
        row.error, row.wrong = verdict.error, verdict.wrong
    elif entry.part == "merge" and entry.sample and entry.out is not None:
        weight = commands.MERGE_WEIGHT
        exact = entry.who == "ours"
        verdict = check.check_merge(session.pair, entry.out, entry.sample, weight, exact=exact)
        row.error, row.compared, row.wrong = verdict.error, verdict.values, verdict.wrong
    elif entry.sample and entry.out is not None:
        verdict = check.check_delta(session.pair, entry.out, entry.sample)
        row.compared, row.wrong = verdict.values, verdict.wrong
    if row.wrong and entry.who == "ours":
        raise DriftError(f"nothing was timed, since {row.key} is wrong: {row.wrong}")
    return memory


def _statistics(entry: Entry) -> dict[str, list[float]]:
    assert entry.results is not None
    found: dict[str, Any] = json.loads(entry.results.read_bytes())
    if not entry.printed:
        return found
    columns = ("delta_norm", "reasoning_norm", "multimodal_norm", "cosine")
    return {row["name"]: [row[column] for column in columns] for row in found["tensors"]}
