"""Many small jobs over processes, stopped by a clock and taken up again.

Owns the file of results, one JSON line for each finished run, and the pool. Knows nothing of what
a job does. Invariant: a job whose line is in the file is not run again, and a line is written
whole by one process; a job that failed has a line that says so, and is run again.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

Line = dict[str, Any]

# What a job is taken to need before any of its sort has finished.
_FIRST_GUESS: Final = 20.0


class Clock:
    """Tells whether there is time for another job; `minutes` None sets no limit."""

    def __init__(self, minutes: float | None) -> None:
        self._start = time.perf_counter()
        self._limit = None if minutes is None else 60.0 * minutes

    def elapsed(self) -> float:
        """Return seconds since the start."""
        return time.perf_counter() - self._start

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long would end in time."""
        return self._limit is None or self.elapsed() + seconds <= self._limit


class Results:
    """The lines of a JSONL file, the last of each key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, Line] = {}
        if path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    # A command that was killed may have left its last line unfinished.
                    print(f"{path}: left out an unfinished line: {text[:60]}…", file=sys.stderr)
                    continue
                self._lines[line["key"]] = line

    def add(self, line: Line) -> None:
        """Append a line."""
        self._lines[line["key"]] = line
        text = json.dumps(line, ensure_ascii=False, allow_nan=True)
        # A newline first: what a killed command left unfinished must not swallow this line.
        broken = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if broken and self.path.stat().st_size else "") + text + "\n")

    def done(self, key: str, expected: Mapping[str, Any] | None = None) -> bool:
        """Whether a run has finished without an error, and its line has the `expected` fields."""
        line = self.get(key)
        return line is not None and all(
            line.get(name) == value for name, value in (expected or {}).items()
        )

    def get(self, key: str) -> Line | None:
        """Return the line of a run that finished without an error, or None."""
        line = self._lines.get(key)
        return None if line is None or "error" in line else line

    def lines(self) -> list[Line]:
        """Return the lines of finished runs."""
        return [line for line in self._lines.values() if "error" not in line]

    def failed(self) -> list[Line]:
        """Return the lines of runs that failed and were not run again since."""
        return [line for line in self._lines.values() if "error" in line]


def execute(
    jobs: Sequence[Any],
    work: Callable[[Any], Any],
    *,
    processes: int,
    clock: Clock,
    done: Callable[[Any, Any, float], None],
    ready: Callable[[Any], bool] = lambda job: True,
    begin: Callable[[], None] | None = None,
    cost: Callable[[Any], float] = lambda job: 1.0,
    longest: float = 0.0,
    title: str = "",
) -> int:
    """Run jobs in order, as many at a time as there are processes; return how many are left.

    A job starts when it is `ready`, and if the clock allows the longest that one of its `cost` has
    taken so far, `longest` being the seconds for each unit of cost in earlier calls. `done` is
    called here with the job, its result (an exception if it failed) and the seconds; a job that
    failed is not one that is left. One process is this one.
    """
    waiting, slowest = list(jobs), longest
    finished = 0

    def allowed(job: Any) -> bool:
        return clock.allows((slowest or _FIRST_GUESS) * cost(job))

    def finish(job: Any, result: Any, seconds: float) -> None:
        nonlocal finished, slowest
        finished += 1
        slowest = max(slowest, seconds / cost(job))
        done(job, result, seconds)
        told = f"failed: {result!r}" if isinstance(result, Exception) else f"{seconds:.0f} s"
        print(
            f"[{clock.elapsed():5.0f} s] {title} {finished} of {len(jobs)}, {job}: {told}",
            file=sys.stderr,
            flush=True,
        )

    if processes == 1:
        if begin is not None and waiting:
            begin()
        while (job := next(filter(ready, waiting), None)) is not None and allowed(job):
            waiting.remove(job)
            finish(job, *_timed(work, job))
        return len(waiting)
    if not waiting:
        return 0
    pool = ProcessPoolExecutor(
        max_workers=min(processes, len(waiting)),
        # A process that has used torch's thread pool, or CUDA, must not fork.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=begin,
    )
    running: dict[Future[Any], Any] = {}
    try:
        while True:
            while len(running) < processes:
                job = next(filter(ready, waiting), None)
                if job is None or not allowed(job):
                    break
                waiting.remove(job)
                running[pool.submit(_timed, work, job)] = job
            if not running:
                return len(waiting)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finish(running.pop(future), *future.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _timed(work: Callable[[Any], Any], job: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    try:
        result = work(job)
    except Exception as error:
        print(f"{job}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # Some exceptions cannot be sent between processes.
        result = RuntimeError(f"{type(error).__name__}: {error}")
    return result, time.perf_counter() - start


def by_key(lines: Iterable[Line], *names: str) -> dict[tuple[Any, ...], list[Line]]:
    """Group lines by some of their fields, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(line[name] for name in names), []).append(line)
    return groups
