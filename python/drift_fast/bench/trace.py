"""The memory of our two commands over time, sampled while they run.

It shows whether memory depends on the size of the models: total and anonymous resident memory, a
few hundred times a second, as CSV and as a picture.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path

from drift_fast.bench import check, commands, page_cache
from drift_fast.bench.aims import evaluate
from drift_fast.bench.files import name
from drift_fast.bench.measure import Sample
from drift_fast.bench.options import BenchOptions
from drift_fast.bench.results import Results, Row
from drift_fast.bench.session import Say, open_session
from drift_fast.bench.timing import time_once
from drift_fast.bench.verify import check_entry, watch_import

Traces = dict[str, tuple[Sample, ...]]


def run_trace(options: BenchOptions, say: Say) -> tuple[Results, Traces]:
    """Watch `inspect` and `delta` once each, check their results, then time each once.

    Raises:
        DriftError: this is a debug build, or our results are wrong.
        OSError: not enough space.
    """
    session = open_session("trace", options, say)
    pair, results = session.pair, session.results
    results.repeats = 1
    traces: Traces = {}
    try:
        say("summing up in float64")
        true = check.truth(pair, threads=options.threads)
        watch_import(session)
        for part in options.measured_parts:
            entry = commands.our_entry(part, pair, session.work, threads=options.threads)
            row = Row(f"process/{entry.part}/ours", entry.label)
            results.rows.append(row)
            say(f"watching {row.key}")
            memory = check_entry(session, entry, row, true)
            traces[entry.label.strip("*")] = memory.samples
            session.clear()
            say(f"timing {row.key}")
            time_once(session, row, entry.command)
            session.clear()
        share = page_cache.resident(pair.files)
        if share is not None:
            results.notes.append(
                f"At the end {share:.0%} of both checkpoints was in the page cache, which belongs "
                "to the system and not to a process"
            )
        imported = (results.baseline_nbytes or 0) / 1e6
        results.notes.append(
            f"`import drift_fast` alone peaks at {imported:.1f} MB; memory was not watched in the "
            "timed run, but in another one"
        )
        results.aims = [
            aim for aim in evaluate(results, options.beside) if aim["measured"] is not None
        ]
    finally:
        shutil.rmtree(session.work, ignore_errors=True)
    return results, traces


def write_trace(results: Results, traces: Mapping[str, tuple[Sample, ...]], out: Path) -> Path:
    """Write the samples as CSV (seconds and bytes) and return the path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name(results)}.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("command", "seconds", "resident", "anonymous", "mapped"))
        for label, samples in traces.items():
            for sample in samples:
                mapped = sample.nbytes - sample.anonymous
                seconds = f"{sample.seconds:.4f}"
                table.writerow((label, seconds, sample.nbytes, sample.anonymous, mapped))
    return path
