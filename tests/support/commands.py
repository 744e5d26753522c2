"""Run `drift-fast` in a process of its own, and read what it prints."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from support import processes
from support.processes import Child, Ended, environment

PROGRAM = [sys.executable, "-m", "drift_fast"]


def without(package: str) -> list[str]:
    """Return the program that runs the command line where importing a package fails."""
    code = (
        f"import runpy, sys\nsys.modules[{package!r}] = None\n"
        "sys.argv = ['drift-fast', *sys.argv[1:]]\n"
        "runpy.run_module('drift_fast', run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code]


def run(*arguments: object, program: list[str] = PROGRAM, **options: Any) -> Ended:
    return processes.run(*program, *arguments, **{"check": False, **options})


def succeeds(*arguments: object, **options: Any) -> Ended:
    return run(*arguments, check=True, **options)


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def rows_of(document: Any) -> dict[str, Any]:
    return {row["name"]: row for row in document["tensors"]}


def drawn_by(*arguments: object, program: list[str] = PROGRAM) -> tuple[str, str]:
    """Run a command that succeeds; return its output and what its errors draw on a terminal."""
    import pty  # not on Windows

    master, slave = pty.openpty()
    env = environment("NO_COLOR", "FORCE_COLOR", TERM="xterm", COLUMNS=100)
    child = Child(*program, *arguments, env=env, stderr=slave)
    os.close(slave)
    drawn = b""
    # Linux reports the far end's closing as EIO.
    with contextlib.suppress(OSError):
        while piece := os.read(master, 65536):
            drawn += piece
    os.close(master)
    ended = child.finish()
    assert ended.returncode == 0, drawn
    return ended.stdout, drawn.decode(errors="replace")
