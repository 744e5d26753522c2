"""Run one command, or one pass inside a waiting process, and measure it.

Owns wall time, CPU time and memory of a process. A run is either timed or watched, never both:
summing up the pages of a process takes time of its cores. Memory is what `/proc/PID/smaps_rollup`
says, total and anonymous, with the kernel's own high-water mark for the total; on other systems it
is the largest resident set that the kernel reports, without the anonymous part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_LEAST_PAUSE = 0.002


class CommandError(Exception):
    """A command that failed; the text is its last line, or how it ended."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: on the wall, and of all cores together in and out of the kernel."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Sample:
    """Resident bytes at a moment, in seconds since the start; mapped files are the difference."""

    seconds: float
    nbytes: int
    anonymous: int


@dataclass(frozen=True)
class Memory:
    """Peaks of one run in bytes, and the samples that they come from."""

    nbytes: int
    anonymous: int | None
    samples: tuple[Sample, ...]


def run(
    command: Sequence[str], *, environment: Mapping[str, str], output: Path | None = None
) -> Timing:
    """Run a command to its end; standard output goes to a file or nowhere.

    Raises:
        CommandError: it failed or was killed.
    """
    with _Started(command, environment, output) as started:
        start = time.perf_counter()
        process = started.process()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        started.ended(status)
    return Timing(wall, usage.ru_utime + usage.ru_stime)


def watch(
    command: Sequence[str], *, environment: Mapping[str, str], output: Path | None = None
) -> Memory:
    """Run a command to its end and sample its memory; processes that it starts are not in it.

    Raises:
        CommandError: it failed or was killed.
    """
    samples: list[Sample] = []
    peak = 0
    with _Started(command, environment, output) as started:
        start = time.perf_counter()
        process = started.process()
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            began = time.perf_counter()
            sample = _sample(process.pid, began - start)
            if sample is not None:
                samples.append(sample)
            peak = max(peak, _high_water(process.pid))
            # Summing up a large mapping takes long, and stops the process meanwhile.
            time.sleep(max(_LEAST_PAUSE, 4 * (time.perf_counter() - began)))
        started.ended(status)
    if not samples:
        # Bytes on macOS, kilobytes elsewhere.
        unit = 1 if sys.platform == "darwin" else 1024
        return Memory(usage.ru_maxrss * unit, None, ())
    peak = max(peak, *(sample.nbytes for sample in samples))
    return Memory(peak, max(sample.anonymous for sample in samples), tuple(samples))


class _Started:
    """A command with its errors in a file, so that no pipe fills up."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], output: Path | None
    ) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Started:
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        self._results: IO[bytes] | None = None
        if self._output is not None:
            self._results = self._output.open("wb")
        return self

    def process(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._results or subprocess.DEVNULL,
            stderr=self._errors,
            env=self._environment,
        )
        return self._process

    def ended(self, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        assert self._process is not None
        # It was waited for by `wait4`, which subprocess cannot know.
        self._process.returncode = code
        if code:
            raise CommandError(_reason(code, self._errors))

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        self._errors.close()
        if self._results is not None:
            self._results.close()


class Inside:
    """A process that has imported what it needs, and does one pass for each line."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str]) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=dict(environment),
        )

    def run(self) -> Timing:
        """Run one pass and return the time it measured.

        Raises:
            CommandError: the process ended instead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            found: dict[str, Any] = json.loads(answer)
            return Timing(float(found["wall"]), float(found["cpu"]))
        except (OSError, ValueError) as error:
            self._process.kill()
            raise CommandError(_reason(self._process.wait(), self._errors)) from error

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()
        self._errors.close()


def _reason(code: int, errors: IO[bytes]) -> str:
    if code < 0:
        return f"killed by signal {-code}" + (", out of memory perhaps" if code == -9 else "")
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {code}"


def _sample(pid: int, seconds: float) -> Sample | None:
    found = {}
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                name, _, rest = line.partition(b":")
                if name in (b"Rss", b"Anonymous"):
                    found[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    if len(found) < 2:
        return None
    return Sample(seconds, found[b"Rss"], found[b"Anonymous"])


def _high_water(pid: int) -> int:
    """Return the most that was ever resident since the program began, which samples can miss."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0
