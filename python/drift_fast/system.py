"""What differs between operating systems: files are opened, locked, written to and flushed."""

from __future__ import annotations

import errno
import os
import sys

if sys.platform == "win32":
    import msvcrt
    import time

    # Bytes stay as they are, and a child does not inherit the file.
    OPEN = os.O_BINARY | os.O_NOINHERIT
    # Pipes have names of their own, so none is in the place of a file that an open could wait for.
    AT_ONCE = OPEN
    # Making a link is a privilege, and the cache is its owner's.
    NO_LINK = 0

    def lock(file: int, *, wait: bool) -> None:
        """Lock a file until it is closed.

        Raises:
            BlockingIOError: another process has the lock, and this one does not wait.
            OSError: the file cannot be locked.
        """
        while True:
            try:
                return msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            except PermissionError as error:
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
            time.sleep(0.1)

    def write_at(file: int, offset: int, data: memoryview) -> int:
        """Write bytes at a place and return how many; one thread at a time may."""
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)

    flush = os.fsync

    def flush_directory(directory: str | os.PathLike[str]) -> None:
        """Do nothing: the file system keeps a journal of its names, and flushes no directory."""

else:
    import fcntl

    OPEN = os.O_CLOEXEC
    # Opening a FIFO does not wait for whoever writes to it.
    AT_ONCE = OPEN | os.O_NONBLOCK
    NO_LINK = os.O_NOFOLLOW

    def lock(file: int, *, wait: bool) -> None:
        """Lock a file until it is closed.

        Raises:
            BlockingIOError: another process has the lock, and this one does not wait.
            OSError: the file system has no locks.
        """
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write_at(file: int, offset: int, data: memoryview) -> int:
        """Write bytes at a place and return how many."""
        return os.pwrite(file, data, offset)

    # macOS has no fdatasync.
    flush = getattr(os, "fdatasync", os.fsync)

    def flush_directory(directory: str | os.PathLike[str]) -> None:
        """Make renames and removals durable before what follows, in case the power fails."""
        file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        except OSError as error:
            # Some network file systems order renames but do not have this call.
            if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
                raise
        finally:
            os.close(file)
