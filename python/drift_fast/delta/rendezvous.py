"""Several processes that do one piece of work: they meet, pass texts on, and end together.

Owns the meeting, the rounds of texts, the heartbeats and how an error of one reaches all; what the
texts say is `ranks`'. It needs nothing but a board that every process can write to and read: files
in a directory, or the store of an initialised torch.distributed, whose collectives would wait half
an hour for a rank that never comes and could not say which one it is.

Invariant: what an earlier run left on the board is never taken for this one's. Each process
announces a fresh random token, rank 0 answers with a roll of tokens under a fresh random name, and
whoever does not find its token there goes on waiting. All later keys carry that name.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from drift_fast import errors
from drift_fast.errors import DriftError

# What follows each look at the board, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5
# How long rank 0 keeps the board for others to read why all end.
_FAREWELL = 10.0
_ALONE = (
    "if this call was meant for one process only, pass ranks=None (drift-fast delta --ranks none)"
)


class Board(Protocol):
    """Texts under keys, which every process can write and read."""

    def put(self, key: str, text: str) -> None:
        """Write or replace a text; what cannot be written is left, and shows as silence."""

    def get(self, key: str) -> str | None:
        """Return a text, or None where there is none yet."""

    def close(self) -> None:
        """Let go of it; rank 0 removes what would be left."""


class FileBoard:
    """A directory on a file system that all processes share; rank 0 makes and locks it."""

    def __init__(self, directory: Path, *, rank: int) -> None:
        self._directory = directory
        self._made: list[Path] = []
        self._lock: int | None = None
        if rank == 0:
            self._make()

    def _make(self) -> None:
        directory = self._directory
        if directory.parent.is_symlink():
            raise FileExistsError(f"{directory.parent}: is a link; choose another output directory")
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        self._made = [directory, directory.parent, *missing[2:]]
        self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise FileExistsError(
                f"{directory}: several processes are writing this delta already; wait for them or "
                "choose another output directory"
            ) from None
        # Left by a run that was cut off; a process of this run that was quick announces itself
        # again.
        for path in directory.iterdir():
            path.unlink(missing_ok=True)

    def put(self, key: str, text: str) -> None:
        path = self._directory / key
        with contextlib.suppress(OSError):
            if path.exists():
                # In place: over a network, a name may stand for the file that it meant before.
                path.write_text(text, encoding="utf-8")
                return
            aside = path.with_name(f".{key}.{secrets.token_hex(4)}")
            aside.write_text(text, encoding="utf-8")
            aside.rename(path)

    def get(self, key: str) -> str | None:
        path = self._directory / key
        with contextlib.suppress(OSError, UnicodeDecodeError):
            try:
                return path.read_text(encoding="utf-8")
            except FileNotFoundError:
                # Opening the directory makes a network file system ask anew what is in it.
                if key in os.listdir(self._directory):
                    return path.read_text(encoding="utf-8")
        return None

    def close(self) -> None:
        if self._lock is None:
            return
        shutil.rmtree(self._directory, ignore_errors=True)
        for path in self._made[1:]:
            # Not empty any more, or gone: either way not ours to remove.
            with contextlib.suppress(OSError):
                path.rmdir()
        os.close(self._lock)
        self._lock = None


class StoreBoard:
    """The key-value store of torch.distributed's default group."""

    def __init__(self, store: Any, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def put(self, key: str, text: str) -> None:
        # A store whose server has gone is silence, which the heartbeats find.
        with contextlib.suppress(RuntimeError):
            self._store.set(self._prefix + key, text)

    def get(self, key: str) -> str | None:
        with contextlib.suppress(RuntimeError, UnicodeDecodeError):
            # Asked first, since get() alone waits for the key, and holds the store meanwhile.
            if self._store.check([self._prefix + key]):
                found: bytes = self._store.get(self._prefix + key)
                return found.decode()
        return None

    def close(self) -> None:
        return None


@dataclass(frozen=True)
class _Trouble:
    """Why all end: which rank, the kind of error, and its text."""

    rank: int
    kind: str
    text: str

    def error(self) -> BaseException:
        """Return an error of the same kind that says whose it was."""
        if self.kind == "KeyboardInterrupt":
            return DriftError(f"rank {self.rank} was interrupted, so all ranks stopped")
        kind = getattr(errors, self.kind, None) or getattr(builtins, self.kind, None)
        text = f"rank {self.rank}: {self.text}"
        if isinstance(kind, type) and issubclass(kind, DriftError | OSError | ValueError):
            with contextlib.suppress(TypeError):
                return kind(text)
        return DriftError(text)

    @classmethod
    def read(cls, text: str | None) -> _Trouble | None:
        found = _json(text)
        if not isinstance(found, dict):
            return None
        rank = found.get("rank")
        rank = rank if isinstance(rank, int) else -1
        return cls(rank, str(found.get("kind")), str(found.get("text")))


class Group:
    """Processes that met; every one of them calls `share` and `collect` in the same order."""

    def __init__(self, board: Board, *, rank: int, size: int, limit: float, run: str) -> None:
        self.rank = rank
        self.size = size
        self.limit = limit
        self._board = board
        self._run = run
        self._round = 0
        self._trouble: _Trouble | None = None
        self._told = False
        self._ended = threading.Event()
        self._watch = threading.Thread(
            target=self._keep_watch, daemon=True, name="drift_fast ranks"
        )
        self._watch.start()

    @classmethod
    def meet(cls, board: Board, *, rank: int, size: int, limit: float, where: str) -> Group:
        """Wait until every rank has come, at most `limit` seconds.

        Raises:
            DriftError: ranks that never came, by number.
        """
        until = time.monotonic() + limit
        run = (
            _call_the_roll(board, size, until, where)
            if rank == 0
            else _answer(board, rank, until, where)
        )
        return cls(board, rank=rank, size=size, limit=limit, run=run)

    def share(self, text: str | None = None) -> str:
        """Return rank 0's text on every rank.

        Raises:
            An error of another rank, or DriftError where one has died.
        """
        key = self._key(0)
        if self.rank == 0:
            self._board.put(key, text or "")
            return text or ""
        return self._wait(key)

    def collect(self, text: str = "") -> list[str]:
        """Return the texts of all ranks on rank 0, and an empty list on the others.

        Raises:
            As `share`.
        """
        base = self._round
        if self.rank != 0:
            self._board.put(self._key(self.rank), text)
            return []
        self._round = base + 1
        return [text, *(self._wait(f"{self._run}-{base}-{rank}") for rank in range(1, self.size))]

    def check(self) -> None:
        """Raise what another rank reported, or that one has died.

        Raises:
            As `share`.
        """
        if self._trouble is not None:
            raise self._trouble.error()

    def fail(self, error: BaseException) -> None:
        """Tell all ranks why this one ends, and on rank 0 wait until they know."""
        if self._told:
            return
        self._told = True
        if self._trouble is None:
            # str(OSError) would show its number.
            text = getattr(error, "strerror", None) or str(error)
            self._report(_Trouble(self.rank, type(error).__name__, text))
        self._board.put(f"{self._run}-seen-{self.rank}", "")
        if self.rank != 0:
            return
        awaited = set(range(1, self.size))
        if self._trouble is not None and self._trouble.kind == "died":
            awaited.discard(self._trouble.rank)
        until = time.monotonic() + min(self.limit, _FAREWELL)
        for _ in _looks(until):
            if all(self._board.get(f"{self._run}-seen-{rank}") is not None for rank in awaited):
                return

    def close(self) -> None:
        """End the heartbeats; after this no other rank hears of this one."""
        self._ended.set()
        self._watch.join()
        self._board.close()

    def _key(self, rank: int) -> str:
        self._round += 1
        return f"{self._run}-{self._round - 1}-{rank}"

    def _wait(self, key: str) -> str:
        # Without a limit: a slow rank is no dead one, and the watch finds those.
        looks = _looks(None)
        while (found := self._board.get(key)) is None:
            self.check()
            next(looks)
        return found

    def _report(self, trouble: _Trouble) -> None:
        told = {"rank": trouble.rank, "kind": trouble.kind, "text": trouble.text}
        self._board.put(f"{self._run}-failed", json.dumps(told))

    def _keep_watch(self) -> None:
        """Beat, and look for failures and for ranks that beat no more.

        Rank 0 watches all and the others rank 0, so that the board is asked a few times per rank
        and second. Clocks are not compared: a rank is dead when its beat has not changed for
        `limit` seconds of the watcher's own clock.
        """
        watched = range(1, self.size) if self.rank == 0 else range(1)
        beats = dict.fromkeys(watched, ("", time.monotonic()))
        count = 0
        while not self._ended.wait(min(1.0, self.limit / 10)):
            count += 1
            self._board.put(f"{self._run}-beat-{self.rank}", str(count))
            if self._trouble is not None:
                continue
            self._trouble = _Trouble.read(self._board.get(f"{self._run}-failed"))
            for rank, (last, since) in beats.items():
                beat = self._board.get(f"{self._run}-beat-{rank}")
                now = time.monotonic()
                if beat and beat != last:
                    beats[rank] = (beat, now)
                elif now - since > self.limit and self._trouble is None:
                    text = (
                        f"it has given no sign of life for {self.limit:g} s and was given up; see "
                        "what that process printed"
                    )
                    self._trouble = _Trouble(rank, "died", text)
                    self._report(self._trouble)


def _call_the_roll(board: Board, size: int, until: float, where: str) -> str:
    called: list[str | None] = []
    run = ""
    missing: list[int] = []
    for _ in _looks(until):
        tokens = [board.get(f"announced-{rank}") for rank in range(1, size)]
        missing = [rank for rank, token in enumerate(tokens, 1) if not token]
        if missing:
            continue
        if tokens != called:
            # Also where a token was an earlier run's and its rank has come since.
            called, run = tokens, secrets.token_hex(8)
            board.put("roll", json.dumps({"run": run, "tokens": called}))
        missing = [rank for rank in range(1, size) if board.get(f"{run}-here-{rank}") is None]
        if not missing:
            board.put(f"{run}-go", "")
            return run
    raise DriftError(
        f"{_ranks(missing)} of {size} never came to write {where} within the time limit "
        f"(DRIFT_FAST_RANK_TIMEOUT, in seconds). All ranks must call this with the same output on "
        f"one shared file system; {_ALONE}"
    )


def _answer(board: Board, rank: int, until: float, where: str) -> str:
    token = secrets.token_hex(16)
    for _ in _looks(until):
        if board.get(f"announced-{rank}") != token:
            board.put(f"announced-{rank}", token)
        roll = _json(board.get("roll"))
        if not isinstance(roll, dict) or not isinstance(roll.get("tokens"), list):
            continue
        run, tokens = str(roll.get("run")), roll["tokens"]
        # It becomes part of file names.
        if not run.isalnum() or rank > len(tokens) or tokens[rank - 1] != token:
            continue
        if board.get(f"{run}-here-{rank}") is None:
            board.put(f"{run}-here-{rank}", "")
        if board.get(f"{run}-go") is not None:
            return run
    raise DriftError(
        f"rank {rank} waited in vain for rank 0 to call all ranks to write {where} within the time "
        "limit (DRIFT_FAST_RANK_TIMEOUT, in seconds): rank 0 never came, or another rank did not. "
        f"All ranks must call this with the same output on one shared file system; {_ALONE}"
    )


def _looks(until: float | None) -> Iterator[None]:
    """Yield at once, then after longer and longer pauses, until the clock says stop."""
    pause = _FIRST_PAUSE
    while True:
        yield
        if until is not None and time.monotonic() > until:
            return
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, 1.3 * pause)


def _json(text: str | None) -> Any:
    """Return what a text says, or None where it is none, or cut off while it was written."""
    with contextlib.suppress(ValueError, RecursionError):
        return None if text is None else json.loads(text)
    return None


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def retried(action: Callable[[], Any], error: type[BaseException], limit: float) -> Any:
    """Return what `action` returns, tried again for `limit` seconds while it raises `error`.

    Over a network a file may show some time after another machine wrote it.
    """
    until = time.monotonic() + limit
    for _ in _looks(until):
        with contextlib.suppress(error):
            return action()
    return action()
