"""Processes that are joined by torch.distributed, for tests of sharded training.

Owns starting them and bringing back what they report, as JSON. A job that fails on one rank fails
the test with that rank's traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

Report = dict[str, Any]
# What a process does, and with what; both are sent to it.
Job = tuple[Callable[..., Report], tuple[Any, ...]]


@dataclass(frozen=True)
class Joined:
    """How processes are joined: over which backend, and how long one waits for another."""

    processes: int
    backend: str | None = "gloo"
    patience: timedelta = timedelta(minutes=10)


def launch(folder: Path, jobs: Mapping[str, Job], joined: Joined) -> list[dict[str, Report]]:
    """Run jobs one after the other in joined processes; return each rank's reports by job."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = joined.processes
    torch.multiprocessing.spawn(_enter, args=(str(folder), dict(jobs), joined), nprocs=processes)
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    for rank, report in enumerate(reports):
        for name, found in report.items():
            if "failure" in found:
                pytest.fail(f"{name} on rank {rank}: {found['failure']}", pytrace=False)
    return reports


def _enter(rank: int, folder: str, jobs: Mapping[str, Job], joined: Joined) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": joined.processes}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        joined.backend,
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=joined.processes,
        timeout=joined.patience,
    )
    report: dict[str, Report] = {}
    with _output_in(f"{folder}/{rank}.log"):
        for name, (work, arguments) in jobs.items():
            try:
                report[name] = work(*arguments)
            except Exception:
                report[name] = {"failure": traceback.format_exc()}
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
    # Another process may have given up.
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def _output_in(path: str) -> Iterator[None]:
    """Send this process's output to a file, and what the compilers say that DeepSpeed tries out."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
