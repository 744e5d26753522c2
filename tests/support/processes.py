"""Child processes of the tests: the one way to start, watch, interrupt and end them.

A child has a session of its own, so that what it starts can be ended with it, and writes to files,
so that it never waits for a reader. It answers Ctrl-C even where the tests run in the background.
What a test leaves running is ended after it, and a failure shows what the children wrote.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.forked import Forked

TESTS = Path(__file__).parents[1]
Ended = subprocess.CompletedProcess[str]

# A shell ignores SIGINT in what it starts under `nohup` or with `&`, and children inherit that by
# exec; a Python handler they do not. Without it nothing that tests interrupt would end.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_children: list[Child] = []


def environment(*without: str, **changes: object) -> dict[str, str]:
    """Return this process's variables, except those that begin as stated, with changes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    # DeepSpeed and inductor look for ninja beside the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    common = {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**kept, **common, **{name: str(value) for name, value in changes.items()}}


class Child:
    """A process that was started.

    stdin: the text that it can read. stderr: a descriptor to write to instead of a file. forked:
    a Python process that begins with the large packages loaded.
    """

    def __init__(
        self,
        *command: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: str = "",
        stderr: int | None = None,
        forked: bool = False,
    ) -> None:
        words, env = [str(part) for part in command], environment() if env is None else env
        self._process: subprocess.Popen[bytes] | Forked
        self._output, self._errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        with tempfile.TemporaryFile() as given:
            given.write(stdin.encode())
            given.seek(0)
            errors = self._errors.fileno() if stderr is None else stderr
            if forked:
                files = given.fileno(), self._output.fileno(), errors
                self._process = Forked(words, env, cwd, files)
            else:
                self._process = subprocess.Popen(
                    words,
                    env=env,
                    cwd=cwd,
                    stdin=given,
                    stdout=self._output,
                    stderr=errors,
                    start_new_session=True,
                )
        self.pid = self._process.pid
        _children.append(self)

    @property
    def returncode(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._process.poll()

    @property
    def running(self) -> bool:
        return self.returncode is None

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return _read(self._output.fileno())

    @property
    def stderr(self) -> str:
        return _read(self._errors.fileno())

    def __str__(self) -> str:
        state = "running" if self.running else f"exit status {self.returncode}"
        return f"{self._process.args}: {state}\n{self.stdout[-2000:]}{self.stderr[-4000:]}"

    def wait_until(self, condition: Callable[[], bool], *, limit: float = 60.0) -> None:
        """Return as soon as the condition holds; the process must be running then."""
        deadline = time.monotonic() + limit
        while not condition():
            assert self.running, f"ended too early: {self}"
            assert time.monotonic() < deadline, f"never got that far: {self}"
            time.sleep(0.005)
        assert self.running, f"ended too early: {self}"

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def finish(self, limit: float = 60.0) -> Ended:
        return finish([self], limit)[0]

    def end(self) -> None:
        """End it, with all that it started. Launchers end their workers when they are asked to."""
        if self.running:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.pid, signal.SIGTERM)
                self._process.wait(3)
        # What it started may outlive it, and keeps the group, whose number nobody else has then.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait(30)


def _read(file: int) -> str:
    # The child writes where this descriptor's position is, so it must not be moved.
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")


def wait(children: Sequence[Child], limit: float, *, grace: float | None = None) -> str:
    """Wait until all have ended; return why some had to be ended, or nothing.

    limit: seconds for all of them. grace: seconds that the others have once one has failed; without
    it they go on.
    """
    deadline = time.monotonic() + limit
    reason = ""
    try:
        while not reason and any(child.running for child in children):
            time.sleep(0.01)
            if time.monotonic() > deadline:
                reason = f"still running after {limit:g} s"
            elif grace is not None and any(child.returncode for child in children):
                time.sleep(grace)
                reason = f"exit codes {[child.returncode for child in children]}"
    finally:
        end_all(children)
    return reason


def finish(
    children: Sequence[Child], limit: float = 120.0, *, grace: float | None = None
) -> list[Ended]:
    """Wait for all and return how each ended; running longer than `limit` seconds is a failure."""
    reason = wait(children, limit, grace=grace)
    if reason.startswith("still"):
        raise AssertionError("\n".join([reason, *map(str, children)]))
    return [
        Ended(child._process.args, child.returncode or 0, child.stdout, child.stderr)
        for child in children
    ]


def run(*command: object, limit: float = 60.0, check: bool = True, **options: Any) -> Ended:
    """Run a command to its end, with the options of `Child`; `check` fails on any status but 0."""
    child = Child(*command, **options)
    ended = child.finish(limit)
    assert not check or ended.returncode == 0, str(child)
    return ended


def python(code: str, *arguments: object, **options: Any) -> Ended:
    """Run code in a fresh interpreter, as `run` does."""
    return run(sys.executable, "-c", code, *arguments, **options)


def end_all(children: Sequence[Child] | None = None) -> None:
    """End these, or whatever was started and still runs."""
    for child in list(_children if children is None else children):
        child.end()
        if child in _children:
            _children.remove(child)
