"""Runs stacks in processes of their own and compares what they trained with what was expected.

Owns: what is started, with which time limit, and the error of a cell. `measure` is the entry;
`python -m parity.run` with a job is what it starts, once for each process of a stack.
Invariant: every cell asked for has one result, an error or a failure with its reason. No process
outlives its limit.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from parity.stacks import BY_NAME, Cell, Stack
from parity.world import ACCUMULATIONS, LEARNING_RATE, NONE, SCALES, Gradients, World, build
from support.processes import TESTS, Child, environment, wait

# How long a process waits for the others, within a collective or at the end of a cell.
PATIENCE = timedelta(seconds=60)
OUTPUT_LINES = 40


@dataclass(frozen=True)
class Entry:
    """What one cell of the matrix asks for.

    strength: a factor on α, for controls that must fail; None leaves the injection out.
    """

    stack: str
    scale: str
    accumulation: int
    strength: float | None = 1.0


@dataclass(frozen=True)
class Result:
    """What came of it: the largest relative error over all trained parameters, or the failure.

    worst: the parameter with that error. output: the end of what the processes printed.
    """

    entry: Entry
    error: float | None = None
    worst: str = ""
    failure: str = ""
    output: str = ""

    @property
    def fault(self) -> str:
        """Why the cell has not passed, or nothing."""
        stack = BY_NAME[self.entry.stack]
        if self.error is None:
            return self.failure
        if self.error > stack.tolerance:
            return "beyond the tolerance"
        if self.entry.scale != NONE and self.error < stack.at_least:
            return f"below {stack.at_least:.0e}, so nothing was rounded as the row says"
        return ""

    @property
    def passed(self) -> bool:
        return not self.fault

    def __str__(self) -> str:
        entry = f"{self.entry.stack}, {self.entry.scale}, accumulation {self.entry.accumulation}"
        if self.error is None:
            return f"{entry}: {self.failure}"
        return f"{entry}: {self.error:.1e} in {self.worst}"


def entries(
    stack: Stack,
    *,
    scales: Sequence[str] = (NONE, *SCALES),
    accumulations: Sequence[int] = ACCUMULATIONS,
    strength: float | None = 1.0,
) -> list[Entry]:
    """The cells of one row."""
    return [
        Entry(stack.name, scale, accumulation, strength)
        for scale in scales
        if scale in stack.scales
        for accumulation in accumulations
    ]


def build_worlds(folder: Path, stacks: Iterable[Stack]) -> dict[str, World]:
    """Build the worlds that these stacks train in, by their shapes."""
    kinds: dict[str, set[str]] = {}
    for stack in stacks:
        kinds.setdefault(stack.shapes, set()).add(stack.kind)
    return {
        shapes: build(folder / shapes, shapes, adapters=sorted(found - {"weights"}))
        for shapes, found in sorted(kinds.items())
    }


def measure(
    wanted: Sequence[Entry], worlds: Mapping[str, World], *, limit: float = 600.0
) -> list[Result]:
    """Fill cells, within one set of processes, and return them in the same order.

    wanted: of stacks that need equally many processes and the same environment.
    limit: seconds for all of it, after which the processes are ended.
    """
    stacks = [BY_NAME[entry.stack] for entry in wanted]
    processes, environment = stacks[0].processes, stacks[0].environment
    if any((s.processes, s.environment) != (processes, environment) for s in stacks):
        raise ValueError("stacks of one run need equally many processes and one environment")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {
            "entries": [asdict(entry) for entry in wanted],
            "worlds": {shapes: str(world.folder) for shapes, world in worlds.items()},
            "results": str(folder / "results"),
            "store": str(folder / "store"),
        }
        (folder / "job.json").write_text(json.dumps(job))
        (folder / "results").touch()
        ended, output = _spawn(folder, processes, environment, limit)
        lines = (folder / "results").read_text().splitlines()
    found = [_read(line) for line in lines]
    missing = [
        Result(entry, failure=f"no result: {ended}", output=output)
        for entry in wanted[len(found) :]
    ]
    return found + missing


def _read(line: str) -> Result:
    fields = json.loads(line)
    return Result(**{**fields, "entry": Entry(**fields["entry"])})


def _spawn(
    folder: Path, processes: int, variables: Mapping[str, str], limit: float
) -> tuple[str, str]:
    """Run the job; return how it ended and the last lines that were printed."""
    common: dict[str, object] = {
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": 1,
        "HF_DATASETS_CACHE": folder / "datasets",
        **variables,
    }
    if processes > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        common |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    children = []
    for rank in range(processes):
        own = {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        command = [sys.executable, "-m", "parity.run", folder / "job.json"]
        children.append(Child(*command, env=environment(**common, **own), cwd=folder))
    # Those that wait for a process that ended would do so for PATIENCE.
    ended = wait(children, limit, grace=3)
    ended = ended or f"exit codes {[child.returncode for child in children]}"
    return ended, "\n".join(
        f"process {rank}: {line}"
        for rank, child in enumerate(children)
        for line in (child.stdout + child.stderr).splitlines()[-OUTPUT_LINES:]
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


# --- in the spawned processes -------------------------------------------------------------------


class _Worker:
    """One process of a job."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self._job = job
        self._plain: dict[tuple[str, int], Gradients] = {}
        self._store = torch.distributed.FileStore(job["store"], self.size)

    def run(self) -> None:
        for index, fields in enumerate(self._job["entries"]):
            result = self._result(Entry(**fields))
            # A process that failed alone leaves the others in a collective, so no collective here.
            self._store.set(f"{index}/{self.rank}", result.failure)
            keys = [f"{index}/{rank}" for rank in range(self.size)]
            self._store.wait(keys, PATIENCE)
            failures = [self._store.get(key).decode() for key in keys]
            if self.rank == 0:
                if any(failures):
                    lone = "" if all(failures) else "on some processes only: "
                    first = next(text for text in failures if text)
                    result = replace(result, error=None, worst="", failure=lone + first)
                with Path(self._job["results"]).open("a") as results:
                    results.write(json.dumps(asdict(result)) + "\n")

    def _result(self, entry: Entry) -> Result:
        try:
            error, worst = self._measured(entry)
        except Exception as raised:
            traceback.print_exc()
            failure = f"{type(raised).__name__}: {first_line(str(raised))}"
            printed = "".join(traceback.format_exception(raised))
            return Result(entry, failure=failure, output=printed)
        return Result(entry, error=error, worst=worst)

    def _measured(self, entry: Entry) -> tuple[float, str]:
        stack = BY_NAME[entry.stack]
        world = World(Path(self._job["worlds"][stack.shapes]))
        start = world.start(stack.kind)
        alpha = world.alpha(entry.scale)
        if alpha is not None:
            alpha = None if entry.strength is None else entry.strength * alpha
        found = self._trained(stack, world, entry, alpha)
        if stack.own_gradient:
            key = stack.name, entry.accumulation
            if key not in self._plain:
                after = self._trained(stack, world, entry, None)
                self._plain[key] = _taken(start, after)
            expected = world.injected(stack.kind, entry.scale, self._plain[key])
        else:
            expected = world.expected(stack.kind, entry.scale)
        return error_of(_taken(start, found), expected) if self.rank == 0 else (0.0, "")

    def _trained(self, stack: Stack, world: World, entry: Entry, alpha: float | None) -> Gradients:
        # Some stacks end the process group with their run.
        if self.size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        cell = Cell(
            world,
            entry.scale,
            entry.accumulation,
            alpha,
            rank=self.rank,
            size=self.size,
            options=stack.options,
        )
        try:
            return stack.train(cell)
        finally:
            for injection in cell.attached:
                injection.remove()


def _taken(start: Gradients, after: Gradients) -> Gradients:
    """The gradient that one step of SGD must have seen."""
    return {
        name: (start[name].double() - weight.double()) / LEARNING_RATE
        for name, weight in after.items()
    }


def error_of(found: Gradients, expected: Gradients) -> tuple[float, str]:
    """Return the largest relative error of a parameter's gradient, and which parameter has it.

    Raises:
        AssertionError: other parameters than expected, or one that is not finite.
    """
    if found.keys() != expected.keys():
        raise AssertionError(
            f"trained {len(found)} parameters, expected {len(expected)}: "
            f"{sorted(found.keys() ^ expected.keys())[:4]} are in one only"
        )
    errors = {
        name: float((found[name] - wanted).norm() / wanted.norm())
        for name, wanted in expected.items()
    }
    broken = [name for name, error in errors.items() if not math.isfinite(error)]
    if broken:
        raise AssertionError(f"the step of {broken[0]} is not finite")
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def first_line(text: str, *, length: int = 300) -> str:
    """Shorten a message, without the paths of this machine."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    line = re.sub(r"(?:/[\w.+@-]+){2,}/([\w.+@-]+)", r"…/\1", line)
    return line if len(line) <= length else line[:length].rstrip() + " …"


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    worker = _Worker(json.loads(Path(sys.argv[1]).read_text()))
    worker.run()
    # Interpreters that wait for each other's groups at exit would hang on a process that failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
