"""The page cache: ask how much of a file it holds, fill it, empty it.

Owns warm and cold. A *warm* file was read as a whole beforehand; a *cold* one was flushed and
dropped with `posix_fadvise`. Both are checked with `mincore`, since a file may not fit or may not
be dropped. A virtual machine cannot empty its host's cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

# A warm file has at least this share in memory; a cold one has at most the rest.
WARM = 0.99


def can_evict() -> bool:
    """Return whether this system drops a file's pages on request."""
    return hasattr(os, "posix_fadvise")


def warm(paths: Iterable[Path]) -> None:
    """Read every file as a whole, so that what fits is in memory."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def evict(paths: Iterable[Path]) -> None:
    """Flush every file and have the system drop its pages, if it can."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident(paths: Iterable[Path]) -> float | None:
    """Return the share of the files' pages in memory; None if the system does not say."""
    if not sys.platform.startswith("linux"):
        return None
    system = ctypes.CDLL(None, use_errno=True)
    system.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    held = pages = 0
    for path in paths:
        nbytes = path.stat().st_size
        if nbytes == 0:
            continue
        count = -(-nbytes // mmap.PAGESIZE)
        states = ctypes.create_string_buffer(count)
        with path.open("rb") as file:
            # A private writable mapping, since ctypes cannot take the address of a read-only one.
            # No page is touched.
            mapped = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY)
        window = ctypes.c_char.from_buffer(mapped)
        failed = system.mincore(ctypes.addressof(window), nbytes, states)
        number = ctypes.get_errno()
        del window
        mapped.close()
        if failed:
            raise OSError(number, os.strerror(number), str(path))
        # The lowest bit is the answer; the others are undefined.
        held += sum(state & 1 for state in states.raw)
        pages += count
    return held / pages if pages else 1.0


def touch(nbytes: int) -> None:
    """Take memory and write to each of its pages, so that a virtual machine's host provides it.

    Run this in its own process, whose end returns the memory.
    """
    with mmap.mmap(-1, nbytes) as memory:
        for start in range(0, nbytes, mmap.PAGESIZE):
            memory[start] = 1
