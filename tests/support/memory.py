"""The most memory that a child process was seen with, sampled from outside."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from support.processes import Child


def peak_of(*command: str, of: str = "Anonymous") -> tuple[int, int]:
    """Run Python with these arguments; return its peak in bytes, and how often that was looked at.

    of: the line of /proc/PID/smaps_rollup; "Rss" counts pages of mapped files too.
    """
    child = Child(sys.executable, *command)
    peak = samples = 0
    while child.running:
        try:
            text = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            text = ""
        found = re.search(rf"^{of}: +(\d+) kB", text, re.MULTILINE)
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        samples += 1
        time.sleep(0.002)
    assert child.returncode == 0, str(child)
    return peak, samples
