"""Run `drift-fast` in a process of its own, and read what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

PROGRAM = [sys.executable, "-m", "drift_fast"]

# Runs the command line in a process where importing torch fails.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["drift-fast", *sys.argv[1:]]
runpy.run_module("drift_fast", run_name="__main__", alter_sys=True)
"""


def run(
    *arguments: object, program: list[str] = PROGRAM, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [*program, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )


def succeeds(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    result = run(*arguments, **options)
    assert result.returncode == 0, result.stderr
    return result


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def rows_of(document: Any) -> dict[str, Any]:
    return {row["name"]: row for row in document["tensors"]}


def read_terminal(master: int, until: float) -> str:
    """Read what a program writes to its terminal until it closes it or the time is over."""
    os.set_blocking(master, False)
    text = b""
    while time.monotonic() < until:
        try:
            piece = os.read(master, 65536)
        except BlockingIOError:
            time.sleep(0.01)
            continue
        except OSError:  # Linux reports the far end's closing as EIO.
            break
        if not piece:
            break
        text += piece
    return text.decode(errors="replace")
