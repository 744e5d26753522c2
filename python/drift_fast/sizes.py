"""Sizes given as text, and how much of the machine a stream may take unless stated."""

from __future__ import annotations

import os
import re

# What all buffers together take by default.
MEMORY = "64MB"


def thread_count(threads: int | None, *, together: bool = False) -> int:
    """Return the number of threads, by default that of the processors this process may use.

    together: all processes that a launcher started on this host do the same now, so that each takes
        its share, unless it is bound to processors of its own.
    """
    if threads is None:
        mine = _processors(0)
        shared = together and _processors(os.getppid()) == mine
        return max(1, len(mine) // _processes_here()) if shared else len(mine)
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return threads


def _processors(process: int) -> set[int]:
    """Return the processors that a process may use, all if unknown; 0 is this process."""
    try:
        return os.sched_getaffinity(process)
    except (AttributeError, OSError):
        return set(range(os.cpu_count() or 1))


def _processes_here() -> int:
    """Return how many processes a launcher says that it started on this host."""
    stated = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(stated)) if stated.isdecimal() else 1


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Return bytes from a number or from text such as "500MB" or "4GiB".

    Raises:
        ValueError: neither, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"a size must look like 5000000, '500MB' or '4GiB', got {size!r}")
    nbytes = int(float(found[1]) * _UNITS[found[2].upper()])
    if nbytes < 1:
        raise ValueError(f"a size must be positive, got {size!r}")
    return nbytes
