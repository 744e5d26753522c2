"""Several processes that write one delta: they meet, pass texts on, and end together.

Owns the meeting, the texts between rank 0 and the others, and how an error of one rank reaches all;
what the texts say is `parallel`'s. torch.distributed does the rest: gloo carries the texts, and its
store tells who has come and why a rank ended. Processes that write one delta share a file system,
so where no group exists a `FileStore` beside the output needs neither address nor port.

The roll is called in the store, since a gloo group can name nobody before all of them are there.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]

from drift_fast import errors
from drift_fast.errors import DriftError

T = TypeVar("T")

# A rank may stream for as long as its disk takes; a rank that died closes its connections at once.
_TIMEOUT = timedelta(days=7)
# How often a waiting rank looks whether another one has failed, in seconds.
_POLL = 0.2
# How long rank 0 keeps the store for others to read why all of them end, in seconds.
_SHUTDOWN = 10.0
# How long a FileStore looks for a file that rank 0 has removed; by default it does for minutes.
_GONE = timedelta(seconds=5)
_MARK = "made by rank 0"
_CLEARED = "cleared"
_ALONE = "if one process alone is to write, pass ranks=None"


@dataclass(frozen=True)
class Meeting:
    """Which processes are to meet, where they write, and how long each waits for the others."""

    rank: int
    size: int
    target: Path
    limit: float


@contextlib.contextmanager
def joined(meeting: Meeting) -> Iterator[ProcessGroup]:
    """Meet the other ranks, in a side group of the default group or in a group of our own.

    An error that leaves the block reaches all ranks.

    Raises:
        DriftError: a rank that never came or that ended, or an error of another rank, which is
            raised as an error of its own kind where there is one.
    """
    if dist.is_initialized() and (dist.get_rank(), dist.get_world_size()) != (
        meeting.rank,
        meeting.size,
    ):
        raise ValueError(
            f"ranks=({meeting.rank}, {meeting.size}) differ from the process group that is "
            f"initialized, where this is rank {dist.get_rank()} of {dist.get_world_size()}; leave "
            "ranks out"
        )
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(_store(meeting))
        _call_roll(store, meeting)
        ours = not dist.is_initialized()
        if ours:
            dist.init_process_group(
                "gloo",
                store=store.open(),
                rank=meeting.rank,
                world_size=meeting.size,
                timeout=_TIMEOUT,
            )
        side = None if ours else dist.new_group(backend="gloo", timeout=_TIMEOUT)
        group = ProcessGroup(store, meeting, side)
        stack.callback(group.close)
        stack.callback(dist.destroy_process_group, side)
        try:
            yield group
        except BaseException as error:
            group.fail(error)
            raise


class ProcessGroup:
    """Processes that met; every one of them calls `share` and `collect` in the same order."""

    def __init__(self, store: _Store, meeting: Meeting, group: Any) -> None:
        self.rank, self.size, self.limit = meeting.rank, meeting.size, meeting.limit
        self._store = store
        self._group = group
        # Collectives cannot be interrupted, waiting for a thread can.
        self._thread = ThreadPoolExecutor(1, "drift_fast ranks")
        self._waiting: Future[object] | None = None
        self._failed = False
        self._next_look = 0.0

    def share(self, text: str = "") -> str:
        """Return rank 0's text on every rank.

        Raises:
            The error of another rank, or DriftError where one has died.
        """
        if self.rank != 0:
            return self._receive(0)
        for rank in range(1, self.size):
            self._send(text, rank)
        return text

    def collect(self, text: str = "") -> list[str]:
        """Return the texts of all ranks on rank 0, and an empty list on the others.

        Raises:
            As `share`.
        """
        if self.rank != 0:
            self._send(text, 0)
            return []
        return [text, *(self._receive(rank) for rank in range(1, self.size))]

    def check(self) -> None:
        """Raise the error that another rank has reported; cheap enough for every tick of a stream.

        Raises:
            As `share`.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _POLL
        reported = self._store.get("failed")
        if reported is not None:
            raise _error_of(json.loads(reported))

    def fail(self, error: BaseException) -> None:
        """Report why this rank ends, and on rank 0 wait until the others have read it."""
        if self._failed:
            return
        self._failed = True
        # A store that is gone with its process must not hide the error that is being raised.
        with contextlib.suppress(RuntimeError):
            self._report(error)

    def _report(self, error: BaseException) -> None:
        if not self._store.is_there:
            return
        if self._store.get("failed") is None:
            # str(OSError) would show its number.
            text = getattr(error, "strerror", None) or str(error)
            report = {"rank": self.rank, "kind": type(error).__name__, "text": text}
            self._store.set("failed", json.dumps(report))
        self._store.set(f"seen-{self.rank}", "")
        seen = [f"seen-{rank}" for rank in range(self.size)]
        if self.rank == 0:
            _until(lambda: all(map(self._store.has, seen)), min(self.limit, _SHUTDOWN))

    def close(self) -> None:
        """Wait for the thread, which ends soon after the group, and let go of all that it held."""
        self._thread.shutdown(wait=False)
        with contextlib.suppress(TimeoutError):
            error = self._waiting.exception(timeout=_SHUTDOWN) if self._waiting else None
            if error is not None:
                # Its frames hold the group, and that holds the store.
                error.with_traceback(None)

    def _send(self, text: str, rank: int) -> None:
        # As bytes: torch's own way to send objects pickles them.
        content = torch.frombuffer(bytearray(text.encode() + b"\n"), dtype=torch.uint8)
        size = torch.tensor([content.numel()])
        self._exchange(rank, lambda: dist.send(size, rank, self._group))
        self._exchange(rank, lambda: dist.send(content, rank, self._group))

    def _receive(self, rank: int) -> str:
        size = torch.zeros(1, dtype=torch.int64)
        self._exchange(rank, lambda: dist.recv(size, rank, self._group))
        content = torch.empty(int(size), dtype=torch.uint8)
        self._exchange(rank, lambda: dist.recv(content, rank, self._group))
        return content.numpy().tobytes().decode()[:-1]

    def _exchange(self, rank: int, action: Callable[[], object]) -> None:
        waiting = self._waiting = self._thread.submit(action)
        try:
            while not waiting.done():
                with contextlib.suppress(TimeoutError):
                    waiting.exception(timeout=_POLL)
                self.check()
            waiting.result()
        except RuntimeError as error:
            if isinstance(error, DriftError):
                raise
            self._next_look = 0.0
            with contextlib.suppress(dist.DistError):
                self.check()
            raise DriftError(
                f"rank {rank} exited unexpectedly while the delta was being written; see what that "
                "process printed"
            ) from error


class _Store:
    """The store of a process group; what is missing is None, and every run has a prefix.

    A key is never deleted: reading one that goes in that moment would wait for its return.
    """

    def __init__(self, open_store: Callable[[], Any], file: Path | None = None) -> None:
        self.open = open_store
        self._file = file
        self.refresh()

    @property
    def is_there(self) -> bool:
        """Whether rank 0 still keeps it; opening a file that is gone would make another."""
        return self._file is None or self._file.exists()

    def refresh(self) -> None:
        """Open it anew, as a rank must whose file was replaced."""
        self._store = self.open()
        if self._file is not None:
            self._store.set_timeout(_GONE)

    def close(self) -> None:
        """Let go of the store."""
        del self._store

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> str | None:
        if not self._ask(lambda: bool(self._store.check([key])), False):
            return None
        text = self._ask(lambda: self._store.get(key).decode(), _CLEARED)
        return None if text == _CLEARED else text

    def set(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def clear(self, key: str) -> None:
        """Make a key count as missing."""
        self._ask(lambda: self._store.set(key, _CLEARED), None)

    def _ask(self, question: Callable[[], T], gone: T) -> T:
        """Return the answer, or `gone` where rank 0 has removed the store, even meanwhile."""
        if not self.is_there:
            return gone
        try:
            return question()
        except dist.DistStoreError:
            if self.is_there:
                raise
            return gone


@contextlib.contextmanager
def _store(meeting: Meeting) -> Iterator[_Store]:
    if dist.is_initialized():
        # It has no public name, but torch's own elastic and checkpoint code asks for it here.
        default: Any = dist.distributed_c10d._get_default_store()
        yield _Store(lambda: PrefixStore(f"drift_fast {meeting.target}", default))
        return
    file = meeting.target.with_name(f".{meeting.target.name}.ranks")
    made: list[Path] = []
    if meeting.rank == 0:
        made = [path for path in file.parents if not path.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        # Made elsewhere, so that it never stands there without its mark; it replaces what a run
        # left that was killed.
        new = file.with_name(file.name + ".new")
        new.unlink(missing_ok=True)
        FileStore(str(new), -1).set(_MARK, "")
        new.replace(file)
    elif not _until(file.exists, meeting.limit):
        raise _nobody_called(meeting)
    # Without a number of workers the file stays until rank 0 removes it.
    store = _Store(lambda: FileStore(str(file), -1), file)
    try:
        yield store
    finally:
        store.close()
        if meeting.rank != 0:
            # A FileStore that ends just after rank 0 has removed the file makes another, unmarked.
            with contextlib.suppress(FileNotFoundError):
                if _MARK.encode() not in file.read_bytes():
                    file.unlink()
        else:
            file.unlink(missing_ok=True)
            for path in made:
                # Not empty any more: the delta is there.
                with contextlib.suppress(OSError):
                    path.rmdir()


def _call_roll(store: _Store, meeting: Meeting) -> None:
    """Wait until every rank has come.

    Each rank says that it is here under a fresh token, and rank 0 answers to that token, so what an
    earlier run left in the store is never taken for this one's.
    """
    if meeting.rank == 0:
        here = {rank: f"here-{rank}" for rank in range(1, meeting.size)}
        came: dict[int, str] = {}

        def all_here() -> bool:
            tokens = {rank: store.get(key) for rank, key in here.items()}
            now = {rank: token for rank, token in tokens.items() if token is not None}
            came.update(now)
            return now.keys() == here.keys()

        if not _until(all_here, meeting.limit):
            # One that came and gave up sooner than this rank says so itself.
            missing = [rank for rank in here if rank not in came] or list(here)
            raise DriftError(
                f"{_named(missing)} of {meeting.size} never came to write {meeting.target} within "
                f"{meeting.limit:g} s (DRIFT_FAST_RANK_TIMEOUT). All ranks must make this call "
                f"with the same output on one shared file system; {_ALONE}"
            )
        store.clear("failed")
        for rank, key in here.items():
            store.clear(key)
            store.clear(f"seen-{rank}")
            store.set(f"go-{came[rank]}", "")
        return
    token = secrets.token_hex(16)

    def called() -> bool:
        if not store.is_there:
            return False
        store.refresh()
        if store.has(f"go-{token}"):
            return True
        if store.get(f"here-{meeting.rank}") != token:
            store.set(f"here-{meeting.rank}", token)
        return False

    answered = _until(called, meeting.limit)
    # Also where rank 0 has answered: it may have read the token just before this rank set it again,
    # and would take that one for a rank of its next run.
    store.clear(f"here-{meeting.rank}")
    if not answered:
        raise _nobody_called(meeting)


def _nobody_called(meeting: Meeting) -> DriftError:
    return DriftError(
        f"rank {meeting.rank} timed out waiting for rank 0 to write {meeting.target} within "
        f"{meeting.limit:g} s (DRIFT_FAST_RANK_TIMEOUT): rank 0, or another rank, never came. All "
        f"ranks must make this call with the same output on one shared file system; {_ALONE}"
    )


def _error_of(report: dict[str, Any]) -> Exception:
    """Return an error of the kind that was reported, which says whose it was."""
    if report["kind"] == "KeyboardInterrupt":
        return DriftError(f"rank {report['rank']} was interrupted, so all ranks stopped")
    kind = getattr(errors, report["kind"], None) or getattr(builtins, report["kind"], None)
    text = f"rank {report['rank']}: {report['text']}"
    if isinstance(kind, type) and issubclass(kind, DriftError | OSError | ValueError):
        with contextlib.suppress(TypeError):
            return kind(text)
    return DriftError(text)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _until(condition: Callable[[], bool], limit: float) -> bool:
    """Wait until a condition holds, at most `limit` seconds, and return whether it does."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def retried(action: Callable[[], T], error: type[BaseException], limit: float) -> T:
    """Return what `action` returns, tried again for `limit` seconds while it raises `error`.

    Over a network a file may show some time after another machine wrote it.
    """
    end = time.monotonic() + limit
    while True:
        try:
            return action()
        except error:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
