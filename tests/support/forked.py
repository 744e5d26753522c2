"""Python processes that begin with the large packages loaded: forks of one that has loaded them.

To import torch and transformers takes ten seconds of a processor, and tests start a hundred
processes that do. What a test asks of imports itself, or of variables that imports read, needs a
process of its own.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any

# Those that are not installed are left out.
_PRELOADED = [
    "drift_fast",
    "torch.distributed",
    "transformers.trainer",
    "peft",
    "safetensors.torch",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


@atexit.register
def _stop() -> None:
    # It would print what the bindings of packages leak, and has nothing else to do.
    if (pid := forkserver._forkserver._forkserver_pid) is not None:  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)


class _File:
    """An open file, which arrives in the process as its number there."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> Any:
        return _detached, (reduction.DupFd(self._number),)


def _detached(file: Any) -> int:
    return int(file.detach())


class Forked:
    """A forked interpreter, with as much of `subprocess.Popen` as the tests use.

    args: `[sys.executable, …]` with a file, `"-m", module` or `"-c", code`. files: the numbers of
    its standard input, output and errors.
    """

    def __init__(
        self, args: Sequence[str], env: Mapping[str, str], cwd: Path | None, files: Sequence[int]
    ) -> None:
        self.args = args
        given = list(args[1:]), dict(env), str(cwd or Path.cwd()), [_File(each) for each in files]
        self._process = _context.Process(target=_run, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, limit: float) -> None:
        self._process.join(limit)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(self.args, limit)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(words: list[str], env: dict[str, str], cwd: str, files: Sequence[int]) -> None:
    atexit.unregister(_stop)
    gc.freeze()
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # multiprocessing has put another in its place.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    try:
        if words[0] == "-c":
            sys.argv, sys.path[0:0] = ["-c", *words[2:]], [cwd]
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv, sys.path[0:0] = words[1:], [cwd]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0:0] = words, [str(Path(words[0]).parent.absolute())]
            runpy.run_path(words[0], run_name="__main__")
    finally:
        # Which multiprocessing leaves out.
        atexit._run_exitfuncs()
