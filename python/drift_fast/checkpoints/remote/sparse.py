"""Shards that are there in part: a file of full length with holes, and a list of what it holds.

Owns the cache directory, its lock, and the sidecar `<shard>.ranges.json`. Invariants: a shard
always has a sidecar of its own content, and a sidecar lists only what has reached the disk. So no
reader takes a hole for zeros, whenever a run ends.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct, json

from drift_fast import system
from drift_fast.checkpoints.remote.attempts import Stopped
from drift_fast.checkpoints.remote.client import Range
from drift_fast.checkpoints.remote.transfer import Identity
from drift_fast.config_files import convert, parse_json
from drift_fast.errors import CheckpointError
from drift_fast.paths import local_path

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# How much may be lost when a run is killed, and how large one request is.
PART_NBYTES = 16 << 20
# As the reader has it.
_SIDECAR_LIMIT_NBYTES = 8 << 20


def merged(ranges: Iterable[Range], gap_nbytes: int = 0) -> list[Range]:
    """Return sorted ranges without empty ones; those at most the gap apart become one."""
    result: list[Range] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if result and start - result[-1][1] <= gap_nbytes:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return result


def missing(wanted: Iterable[Range], held: Iterable[Range]) -> list[Range]:
    """Return the parts of wanted ranges outside of held ranges; both are sorted and merged."""
    result: list[Range] = []
    holes = list(held)
    at = 0
    for start, end in wanted:
        while at < len(holes) and holes[at][1] <= start:
            at += 1
        position, ahead = start, at
        while ahead < len(holes) and holes[ahead][0] < end:
            if position < holes[ahead][0]:
                result.append((position, holes[ahead][0]))
            position = holes[ahead][1]
            ahead += 1
        if position < end:
            result.append((position, end))
    return result


def nbytes_of(ranges: Iterable[Range]) -> int:
    """Return the sum of the ranges' lengths."""
    return sum(end - start for start, end in ranges)


def missing_nbytes(path: Path, wanted: Iterable[Range]) -> int:
    """Return how many bytes of the wanted ranges a local shard does not hold yet."""
    shard = SparseShard.load(path)
    return nbytes_of(missing(merged(wanted), [] if shard is None else shard.ranges))


def parts_of(ranges: Iterable[Range]) -> list[Range]:
    """Cut ranges into parts of one request each."""
    return [
        (begin, min(begin + PART_NBYTES, end))
        for start, end in ranges
        for begin in range(start, end, PART_NBYTES)
    ]


def default_cache() -> Path:
    """Return `$DRIFT_FAST_CACHE`, or `drift_fast` in `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("DRIFT_FAST_CACHE")
    if chosen:
        return local_path(chosen).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "drift_fast"


def make_directory(cache: Path | None, readable: str, key: str) -> Path:
    """Create a checkpoint's directory in the cache, for its owner only.

    Its name is a readable part and a digest of `key`, which identifies the checkpoint.

    Raises:
        CheckpointError: there is a link or file in its place.
    """
    cache = default_cache() if cache is None else cache
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    part = re.sub(r"[^A-Za-z0-9.]+", "-", readable).strip("-.")[:80]
    directory = cache / f"{part}-{digest}"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        if not stat.S_ISDIR(directory.lstat().st_mode):
            raise CheckpointError(
                f"{directory}: expected a directory, found a link or file, which is not "
                "followed; remove it or choose another cache"
            ) from None
    return directory


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes from writing in the directory; wait until they are done.

    Raises:
        CheckpointError: there is a link in place of the lock, or the file system has no locks.
    """
    path = directory / ".lock"
    try:
        lock = _open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise CheckpointError(
            f"{path}: a link, which is not followed; remove it or choose another cache"
        ) from None
    try:
        try:
            system.lock(lock, wait=False)
        except BlockingIOError:
            logger.info("%s: waiting for another process that writes there", directory)
            system.lock(lock, wait=True)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be locked ({error.strerror}), and the lock keeps two processes "
                "from writing at once; set DRIFT_FAST_CACHE to a cache on another file system"
            ) from error
        yield
    finally:
        os.close(lock)


def require_space(directory: Path, nbytes: int) -> None:
    """Check that so many bytes can be written.

    Raises:
        OSError: ENOSPC.
    """
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise OSError(
            errno.ENOSPC,
            f"{nbytes} bytes will be downloaded and {free} are free; free some, or set "
            "DRIFT_FAST_CACHE to a cache on another disk",
            str(directory),
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file completely or not at all; a link is replaced, not followed."""
    partial = path.with_name(f".{path.name}.partial")
    with _created(partial) as file:
        _write(file, 0, data)
        system.flush(file)
    partial.replace(path)


class SparseShard:
    """A shard's file and the ranges that it holds, which `write_parts` extends."""

    def __init__(self, path: Path, identity: Identity, ranges: list[Range]) -> None:
        self.path = path
        self.identity = identity
        self.ranges = ranges
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def load(cls, path: Path) -> SparseShard | None:
        """Return a shard that an earlier run left, or None if there is nothing to resume."""
        described = _read_regular(_sidecar(path), _SIDECAR_LIMIT_NBYTES)
        found = None if described is None else _parse(path, described[0])
        start = _read_regular(path, 8)
        if found is None or start is None or start[1] != found.identity.nbytes:
            return None
        header = (0, 8 + int.from_bytes(start[0], "little"))
        return None if missing([header], found.ranges) else found

    @classmethod
    def create(cls, path: Path, identity: Identity, start: bytes) -> SparseShard:
        """Write a new shard that holds only the first bytes, in place of an older one."""
        # An older sidecar is replaced, never removed: a shard without one counts as complete.
        path.unlink(missing_ok=True)
        system.flush_directory(path.parent)
        shard = cls(path, identity, merged([(0, len(start))]))
        partial = path.with_name(f".{path.name}.partial")
        with _created(partial) as file:
            try:
                os.ftruncate(file, identity.nbytes)
            except (OSError, OverflowError) as error:
                partial.unlink()
                raise CheckpointError(
                    f"{path}: the server states {identity.nbytes:,} bytes, and a file of that "
                    f"length cannot be kept here ({error}); check the URL, or set "
                    "DRIFT_FAST_CACHE to a cache on another disk"
                ) from error
            _write(file, 0, start)
            system.flush(file)
        shard._describe()
        system.flush_directory(path.parent)
        partial.replace(path)
        return shard

    def starts_with(self, data: bytes) -> bool:
        """Compare the first bytes of the file."""
        start = _read_regular(self.path, len(data))
        return start is not None and start[0] == data

    @contextmanager
    def write_parts(self) -> Iterator[Callable[[int, bytes], None]]:
        """Give a sink for bytes at an offset; a part becomes one of the ranges once it is on disk.

        What was written is kept when the context ends, even by an error.
        """
        file = _open_regular(self.path, os.O_WRONLY)
        written: list[Range] = []

        def flush() -> None:
            if written:
                with _naming(self.path):
                    system.flush(file)
                self._extend(written)
                written.clear()

        def write(offset: int, data: bytes) -> None:
            with _naming(self.path):
                _write(file, offset, data)
            end = offset + len(data)
            if written and written[-1][1] == offset:
                written[-1] = (written[-1][0], end)
            else:
                written.append((offset, end))
            if nbytes_of(written) >= PART_NBYTES:
                flush()

        try:
            try:
                yield write
            finally:
                flush()
        finally:
            os.close(file)

    def close(self) -> None:
        """Keep threads that were left behind from changing the sidecar once the lock is free."""
        with self._lock:
            self._closed = True

    def _extend(self, ranges: list[Range]) -> None:
        with self._lock:
            if self._closed:
                raise Stopped
            self.ranges = merged([*self.ranges, *ranges])
            self._describe()

    def _describe(self) -> None:
        identity = self.identity
        content = _Sidecar(
            FORMAT_VERSION, identity.nbytes, self.ranges, identity.etag, identity.last_modified
        )
        write_atomically(_sidecar(self.path), json.encode(content))


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.ranges.json")


class _Sidecar(Struct):
    format_version: int
    nbytes: int
    ranges: list[Range]
    etag: str | None = None
    last_modified: str | None = None


def _parse(path: Path, text: bytes) -> SparseShard | None:
    try:
        stored = convert(parse_json(text), _Sidecar)
    except ValueError:
        return None
    held = stored.ranges
    if stored.format_version != FORMAT_VERSION or held != merged(held):
        return None
    if held and (held[0][0] < 0 or held[-1][1] > stored.nbytes):
        return None
    identity = Identity(stored.nbytes, stored.etag, stored.last_modified)
    return SparseShard(path, identity, held)


def _read_regular(path: Path, limit_nbytes: int) -> tuple[bytes, int] | None:
    """Return the first bytes and the length of a regular file; None for anything else."""
    try:
        file = _open_regular(path, os.O_RDONLY)
    except (OSError, CheckpointError):
        return None
    with open(file, "rb") as reader:
        nbytes = os.fstat(file).st_size
        return reader.read(min(nbytes, limit_nbytes)), nbytes


def _open_regular(path: Path, mode: int) -> int:
    """Open a file that must be a regular one, and neither follow a link nor wait for a FIFO.

    Raises:
        OSError: it cannot be opened; ELOOP for a link.
        CheckpointError: it is something else.
    """
    file = os.open(path, mode | system.NO_LINK | system.AT_ONCE, 0o600)
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise CheckpointError(
        f"{path}: expected a regular file, found something else; remove it or choose another cache"
    )


@contextmanager
def _created(path: Path) -> Iterator[int]:
    path.unlink(missing_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | system.NO_LINK | system.OPEN, 0o600)
    try:
        with _naming(path):
            yield file
    finally:
        os.close(file)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give errors of the system the path that they are about; calls on an open file have none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def _write(file: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = system.write_at(file, offset, view)
        view, offset = view[count:], offset + count
