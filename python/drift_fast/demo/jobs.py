"""The runs of the demo, in several processes with one thread each."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from drift_fast.delta.compute import compute_delta
from drift_fast.delta.delta import Delta
from drift_fast.errors import DriftWarning

if TYPE_CHECKING:
    from drift_fast.demo.experiment import Outcome, Protocol


def run_jobs(
    jobs: Sequence[tuple[str, int]],
    *,
    workers: int,
    source: Path,
    delta: Path,
    protocol: Protocol,
) -> list[Outcome]:
    """Run (method, seed) jobs on one thread each, and return outcomes in the order of the jobs.

    A single worker is this process; several are new processes.
    """
    done: dict[tuple[str, int], Outcome] = {}
    if workers == 1:
        for method, seed in jobs:
            done[method, seed] = _job(method, seed, source, delta, protocol)
            _report(done[method, seed], len(done), len(jobs))
        return [done[job] for job in jobs]
    pool = ProcessPoolExecutor(
        max_workers=min(workers, len(jobs)),
        # Spawned, not forked: a process that has used torch's thread pool must not fork.
        mp_context=multiprocessing.get_context("spawn"),
    )
    try:
        waiting = {pool.submit(_job, *job, source, delta, protocol): job for job in jobs}
        for future in as_completed(waiting):
            done[waiting[future]] = future.result()
            _report(future.result(), len(done), len(jobs))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [done[job] for job in jobs]


def _report(outcome: Outcome, done: int, total: int) -> None:
    from drift_fast.demo.experiment import METHODS

    print(
        f"[{done:2d}/{total}] seed {outcome.seed}, {METHODS[outcome.method].label}: "
        f"answers right {outcome.answers_right:.3f}, digits read right {outcome.digits_read:.3f}",
        file=sys.stderr,
        flush=True,
    )


def _job(method: str, seed: int, source: Path, delta: Path, protocol: Protocol) -> Outcome:
    with _one_thread(), quiet():
        from drift_fast.demo.experiment import train_and_evaluate

        return train_and_evaluate(
            method,
            seed,
            checkpoint=source / "multimodal",
            deltas={
                "multimodal": Delta.open(delta),
                "base": compute_delta(
                    source / "expert", source / "base", threads=1, progress_bar=False
                ),
            },
            protocol=protocol,
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: processes would compete for cores, and rounding depends on the number."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what other libraries say of themselves: bars, warnings, and records below an error.

    They say it when they are imported, too: `transformers` imports others if they are installed.
    Warnings of drift_fast stay.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", DriftWarning)
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            try:
                yield
            finally:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    finally:
        logging.disable(disabled)
