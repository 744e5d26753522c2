"""How far a stream has come, and a bar of it on a terminal; nothing in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

_BAR = 24


@dataclass(frozen=True)
class Progress:
    """How far a stream or a download has come: tensors and bytes, done and in all."""

    tensors: int
    total_tensors: int
    nbytes: int
    total_nbytes: int
    stage: str = "reading"


ProgressCallback = Callable[[Progress], object]


class ProgressBar:
    """Show tensors, gigabytes per second and time left on one line of standard error.

    Calling it with a `Progress` redraws the line; leaving the context ends it. Where the stream is
    no terminal it stays silent.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream.isatty()
        self._started = time.monotonic()
        self._stage = ""

    def __call__(self, progress: Progress) -> None:
        if not self._shown:
            return
        if progress.stage != self._stage:
            # A download says nothing of how fast the reading after it will be.
            self._stage, self._started = progress.stage, time.monotonic()
        done, total = progress.nbytes, progress.total_nbytes
        elapsed = max(time.monotonic() - self._started, 1e-3)
        rate = done / elapsed
        share = min(1.0, done / total) if total else 1.0
        filled = round(share * _BAR)
        left = (total - done) / rate if rate > 0 else 0.0
        line = (
            f"{self._stage} [{'█' * filled}{'·' * (_BAR - filled)}] {share:4.0%}  "
            f"{progress.tensors}/{progress.total_tensors} tensors  {rate / 1e9:.2f} GB/s  "
            f"{_clock(left)} left"
        )
        self._stream.write(f"\r\x1b[2K{line}")
        self._stream.flush()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
