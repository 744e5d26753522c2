"""How far a stream or a download has come, for a function or as a bar on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a stream or a download has come: tensors and bytes, done and in total."""

    tensors: int
    total_tensors: int
    nbytes: int
    total_nbytes: int
    stage: str = "reading"


ProgressCallback = Callable[[Progress], object]


@contextlib.contextmanager
def reported(
    progress_bar: bool | None, on_progress: ProgressCallback | None
) -> Iterator[ProgressCallback]:
    """Yield what to call with each `Progress`, which passes it to the function and to a bar.

    progress_bar: None shows one where standard error is a terminal, and in a notebook.
    """
    call = on_progress or unreported
    shown = progress_bar
    if shown is None:
        shown = sys.stderr.isatty() or "ipykernel" in sys.modules
    if not shown:
        yield call
        return
    with _bar(forced=progress_bar is True) as draw:
        yield lambda progress: (draw(progress), call(progress))


def unreported(progress: Progress) -> None:
    """Do nothing, for a stream that nobody watches."""


@contextlib.contextmanager
def _bar(*, forced: bool) -> Iterator[ProgressCallback]:
    """Show stage, tensors, rate and time left on one line; it vanishes at the end."""
    # Loaded here, so that a run without a bar does not.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[tensors]} tensors"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, force_terminal=True if forced else None),
        transient=True,
        # The stream calls about twenty times a second; a thread of its own draws nothing better.
        auto_refresh=False,
    )
    # A stage of its own has a rate of its own: a download says nothing of the reading after it.
    tasks: dict[str, TaskID] = {}

    def draw(progress: Progress) -> None:
        fields: dict[str, Any] = {"tensors": f"{progress.tensors}/{progress.total_tensors}"}
        if progress.stage not in tasks:
            for done in tasks.values():
                bar.update(done, visible=False)
            tasks[progress.stage] = bar.add_task(progress.stage, total=None, **fields)
        bar.update(
            tasks[progress.stage],
            completed=progress.nbytes,
            total=max(1, progress.total_nbytes),
            refresh=True,
            **fields,
        )

    with bar:
        yield draw
