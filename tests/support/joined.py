"""Processes that are joined by torch.distributed, for tests of sharded training.

Owns starting them and bringing back what they report, as JSON. A job that fails on one rank fails
the test with that rank's traceback. `python -m support.joined FILE` is one of the processes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support.processes import TESTS, Child, environment, wait

Report = dict[str, Any]
# What a process does, and with what; both are sent to it as JSON. Paths arrive as paths.
Job = tuple[Callable[..., Report], tuple[Any, ...]]


@dataclass(frozen=True)
class Joined:
    """How processes are joined: over which backend, and how long one waits for another."""

    processes: int
    backend: str = "gloo"
    patience: timedelta = timedelta(minutes=10)


def launch(folder: Path, jobs: Mapping[str, Job], joined: Joined) -> list[dict[str, Report]]:
    """Run jobs one after the other in joined processes; return each rank's reports by job."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "folder": folder,
        "backend": joined.backend,
        "patience": joined.patience.total_seconds(),
        "jobs": {
            # pytest names a file of tests from the root of the project.
            name: (work.__module__.removeprefix("tests."), work.__name__, arguments)
            for name, (work, arguments) in jobs.items()
        },
    }
    file = folder / "jobs.json"
    file.write_text(json.dumps(content, default=lambda path: {"path": str(path)}))
    children = [
        Child(
            *(sys.executable, "-m", "support.joined", file),
            env=environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=joined.processes),
            cwd=TESTS,
            forked=True,
        )
        for rank in range(joined.processes)
    ]
    reason = wait(children, 1400, grace=3)
    assert not reason, "\n".join([reason, *map(str, children)])
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(children))]
    for rank, report in enumerate(reports):
        for name, found in report.items():
            assert "failure" not in found, f"{name} on rank {rank}: {found['failure']}"
    return reports


def _work(file: Path) -> None:
    given = json.loads(
        file.read_text(), object_hook=lambda it: Path(it["path"]) if it.keys() == {"path"} else it
    )
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        given["backend"],
        init_method=f"file://{given['folder'] / 'meeting'}",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=given["patience"]),
    )
    report: dict[str, Report] = {}
    for name, (module, work, arguments) in given["jobs"].items():
        try:
            report[name] = getattr(importlib.import_module(module), work)(*arguments)
        except Exception:
            report[name] = {"failure": traceback.format_exc()}
    (given["folder"] / f"{rank}.json").write_text(json.dumps(report))
    # Another process may have given up.
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    # Without ending the store, which aborts where another process has just removed its file.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
