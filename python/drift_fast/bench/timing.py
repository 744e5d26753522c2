"""Time commands and passes in turn: warm processes, passes in a process, cold processes.

Invariant: rows that are compared with each other take turns within the same rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from drift_fast.bench import commands, measure, page_cache
from drift_fast.bench.commands import Entry
from drift_fast.bench.results import Row
from drift_fast.bench.session import Session

# A row that takes longer is timed only in half of the rounds.
SLOW_SECONDS = 4.0


def time_rounds(session: Session, timed: list[tuple[Row, Entry]]) -> None:
    for repeat in range(session.options.repeats):
        for row, entry in timed:
            if row.absent or sits_out(row, repeat, session.options.repeats):
                continue
            session.clear()
            session.say(f"round {repeat + 1}, {row.key}")
            time_once(session, row, entry.command)
    session.clear()


def sits_out(row: Row, repeat: int, repeats: int) -> bool:
    """Return whether a slow row has been timed often enough."""
    return bool(row.walls) and row.walls[0] > SLOW_SECONDS and repeat >= (repeats + 1) // 2


def time_once(session: Session, row: Row, command: Iterable[str]) -> None:
    """Run a command and add its time to the row, or say there that it failed."""
    try:
        timing = measure.run(list(command), environment=session.environment)
    except measure.CommandError as error:
        row.absent = f"failed: {error}"
        row.walls.clear()
        row.cpus.clear()
        return
    row.walls.append(timing.wall)
    row.cpus.append(timing.cpu)


def time_passes(session: Session, ways: Mapping[str, str]) -> None:
    options = session.options
    labels = {
        "xor": "control: XOR",
        "ours": "**drift_fast**",
        "tuned": "tuned PyTorch streaming",
        "lean": "tuned PyTorch streaming, Δ without statistics",
    }
    missing = "left out" if "tuned" in options.without else commands.torch_missing()
    absent = {"tuned": missing, "lean": missing}
    for part in options.measured_parts:
        out = session.out if part == "delta" else None
        rows = {
            who: Row(f"inside/{part}/{who}", label, absent=absent.get(who, ""))
            for who, label in labels.items()
            if part == "delta" or who != "lean"
        }
        rows["xor"].label += f" ({ways[part]})"
        session.results.rows += rows.values()
        processes = [
            (
                rows[who],
                commands.inside(
                    session.pair, who, threads=options.threads, way=ways[part], out=out
                ),
            )
            for who in rows
            if not rows[who].absent
        ]
        time_inside(session, processes, options.threads)


def time_inside(session: Session, processes: Iterable[tuple[Row, list[str]]], threads: int) -> None:
    """Time passes in turn, with one process for each row, after an untimed pass of each."""
    environment = commands.environment(threads)
    inside = [(row, measure.Inside(command, environment=environment)) for row, command in processes]
    try:
        for repeat in range(session.options.repeats + 1):
            for row, process in inside:
                if row.absent:
                    continue
                session.clear()
                session.say(f"pass {repeat}, {row.key}")
                try:
                    timing = process.run()
                except measure.CommandError as error:
                    row.absent = f"failed: {error}"
                    continue
                if repeat:
                    row.walls.append(timing.wall)
                    row.cpus.append(timing.cpu)
    finally:
        for _, process in inside:
            process.close()


def time_cold(session: Session, ready: Iterable[Entry]) -> None:
    rows: list[tuple[Row, Sequence[str]]] = [
        (Row(f"cold/read/{way}", way), command)
        for way, command in commands.cold_reads(session.pair).items()
    ]
    rows += [(Row(f"cold/{entry.part}/{entry.who}", entry.label), entry.command) for entry in ready]
    session.results.rows += [row for row, _ in rows]
    if not page_cache.can_evict():
        for row, _ in rows:
            row.absent = "this system does not empty its page cache on request"
        return
    files = list(session.pair.files)
    if session.pair.renamed is not None:
        files += session.pair.renamed.glob("*.safetensors")
    left = 0.0
    for repeat in range(session.options.repeats):
        for row, command in rows:
            if row.absent or sits_out(row, repeat, session.options.repeats):
                continue
            session.clear()
            page_cache.evict(files)
            left = max(left, page_cache.resident(files) or 0.0)
            session.say(f"cold round {repeat + 1}, {row.key}")
            time_once(session, row, command)
    session.clear()
    if left > 1 - page_cache.WARM:
        session.results.notes.append(
            f"**Not cold**: up to {left:.0%} of the pair was still in memory"
        )
