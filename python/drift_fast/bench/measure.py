"""Run one command, or one pass inside a waiting process, and measure it.

Owns wall time, CPU time and memory of a process. A run is either timed or watched, never both,
since adding up the pages of a process takes CPU time. Memory, total and anonymous, comes from
`/proc/PID/smaps_rollup`, and its peak from the kernel. On other systems it is the largest resident
set that the kernel reports, without the anonymous part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from drift_fast.bench.hardware import proc_nbytes

_LEAST_PAUSE = 0.002


class CommandError(Exception):
    """A command failed; the text is its last line, or how it ended."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: wall time, and CPU time of all cores, in and out of the kernel."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Sample:
    """Resident bytes, total and anonymous, so many seconds after the start."""

    seconds: float
    nbytes: int
    anonymous: int


@dataclass(frozen=True)
class Memory:
    """Peaks of one run in bytes, and their samples."""

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
    wall, usage = _execute(command, environment, output, lambda pid: os.wait4(pid, 0)[1:])
    return Timing(wall, usage.ru_utime + usage.ru_stime)


def watch(
    command: Sequence[str], *, environment: Mapping[str, str], output: Path | None = None
) -> Memory:
    """Run a command to its end and sample its memory, without that of processes that it starts.

    Raises:
        CommandError: it failed or was killed.
    """
    samples: list[Sample] = []
    peaks = [0]

    def wait(process: int) -> tuple[int, Any]:
        start = time.perf_counter()
        while True:
            pid, status, usage = os.wait4(process, os.WNOHANG)
            if pid:
                return status, usage
            began = time.perf_counter()
            held = proc_nbytes(f"/proc/{process}/smaps_rollup", "Rss", "Anonymous")
            if held:
                samples.append(Sample(began - start, *held))
            # The peak, which samples can miss.
            peaks[:] = [max(peaks + proc_nbytes(f"/proc/{process}/status", "VmHWM"))]
            # Adding up a large mapping takes long and stops the process meanwhile.
            time.sleep(max(_LEAST_PAUSE, 4 * (time.perf_counter() - began)))

    _, usage = _execute(command, environment, output, wait)
    if not samples:
        # Bytes on macOS, kilobytes elsewhere.
        unit = 1 if sys.platform == "darwin" else 1024
        return Memory(usage.ru_maxrss * unit, None, ())
    peak = max(*peaks, *(sample.nbytes for sample in samples))
    return Memory(peak, max(sample.anonymous for sample in samples), tuple(samples))


def _execute(
    command: Sequence[str],
    environment: Mapping[str, str],
    output: Path | None,
    wait: Callable[[int], tuple[int, Any]],
) -> tuple[float, Any]:
    """Run a command until `wait` returns its status and usage; return seconds and usage."""
    with ExitStack() as stack:
        # Errors go to a file, so that no pipe fills up.
        errors = stack.enter_context(tempfile.TemporaryFile())
        results = subprocess.DEVNULL if output is None else stack.enter_context(output.open("wb"))
        start = time.perf_counter()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=results,
            stderr=errors,
            env=dict(environment),
        )
        try:
            status, usage = wait(process.pid)
            wall = time.perf_counter() - start
            # `wait4` has waited for it, which subprocess cannot know.
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        if process.returncode:
            raise CommandError(_reason(process.returncode, errors))
    return wall, usage


class Inside:
    """A process that has its imports ready and does one pass for each line."""

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
        """Run one pass and return the seconds that it measured.

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
        return f"killed by signal {-code}" + (", perhaps out of memory" if code == -9 else "")
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {code}"
