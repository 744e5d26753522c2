"""The table of a run: what runs, in which order, and the notes about it.

Invariant: a row that cannot run says why.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace

from drift_fast.bench import commands
from drift_fast.bench.aims import evaluate
from drift_fast.bench.commands import Entry
from drift_fast.bench.options import BenchOptions
from drift_fast.bench.results import Results
from drift_fast.bench.session import Say, Session, open_session, pick_way
from drift_fast.bench.timing import SLOW_SECONDS, time_cold, time_passes, time_rounds
from drift_fast.bench.verify import check_entries


def run_table(options: BenchOptions, say: Say) -> Results:
    """Run everything that `options` asks for and return the results, aims included.

    Raises:
        DriftError: this is a debug build, or our results are wrong.
        OSError: not enough space.
    """
    session = open_session("delta", options, say)
    try:
        ways = {part: pick_way(session, part, options.threads) for part in options.parts}
        entries = _entries(session, ways)
        rows = check_entries(session, entries)
        ready = [entry for entry in entries if not rows[entry.part, entry.who].absent]
        session.results.rows += rows.values()
        if "process" in options.settings:
            time_rounds(session, [(rows[entry.part, entry.who], entry) for entry in ready])
        if "inside" in options.settings:
            time_passes(session, ways)
        if "cold" in options.settings:
            time_cold(session, ready)
        _explain(session)
        session.results.aims = evaluate(session.results, options.beside)
    finally:
        shutil.rmtree(session.work, ignore_errors=True)
    return session.results


def _entries(session: Session, ways: Mapping[str, str]) -> list[Entry]:
    options = session.options
    return [
        replace(entry, absent="left out") if entry.who in options.without else entry
        for part in options.parts
        for entry in commands.ENTRIES[part](
            session.pair, session.work, threads=options.threads, way=ways[part]
        )
    ]


def _explain(session: Session) -> None:
    session.results.notes += [
        f"Rows that take more than {SLOW_SECONDS:.0f} s were timed only in the first half "
        "of the rounds",
        "Every command ran once before it was timed. In that run its result was compared with "
        "float64 and its memory was watched, which timed runs are not",
        "Times exclude flushing earlier files, removing the last output and, in process, touching "
        "buffers. Ours, the tuned rivals and the control allocate their file first and flush it; "
        "plain, public and mergekit do not flush",
        "Statistics and Δ are of every tensor of the backbone, except in the public way. It loads "
        "transformers' Qwen2ForCausalLM and Qwen2_5_VLForConditionalGeneration (with a vision "
        "tower of one block) and subtracts attention and MLP",
        "mergekit matches by name only, so it gets the multimodal weights with the text model's "
        "names; GB/s count the bytes of the tensors that both models have, in both",
    ]
    if "merge" in session.options.parts:
        session.results.notes.append(
            "Merges write all of the backbone; ours and the plain one also write the vision tower. "
            "Ours is compared bit for bit with float64 rounded once; the others compute in float32 "
            "and may differ in the last bit of one value in a thousand"
        )
    if "cold" in session.options.settings:
        session.results.notes.append(
            "Cold: both checkpoints were flushed and dropped with posix_fadvise before each run, "
            "and checked with mincore; the cache of a virtual machine's host is out of reach"
        )
