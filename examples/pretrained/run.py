"""Run the study: train its checkpoints, tune, test, and write tables and pictures.

Owns the command line and how jobs are shared over processes. What is interrupted goes on where it
stopped, for as long as --out holds what it wrote.

    python examples/pretrained/run.py --out build/pretrained            # shows that the way works
    python examples/pretrained/run.py --full --out build/pretrained-full --device cuda --minutes 9
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).parent.parent / "miniature"))

import choosing
import lessons
import model
import torch
import training
from choosing import Form
from methods import METHODS
from pool import Clock, Results, execute
from training import Job, Protocol

import report

FULL: Final = Form()
# One pair, settings that nobody tuned, and so few steps that nothing is learned.
FAST: Final = Form(
    pairs=(2,),
    seeds=(0,),
    methods=("sft", "merge", "adaptive", "adaptive_protected", "motion"),
    tunes=False,
)
_SETTINGS: Final[dict[str, Any]] = {
    "sft": {"rate": 4e-5},
    "merge": {"rate": 4e-5, "weight": 0.5},
    "motion": {"rate": 4e-5, "weight": 0.5},
    "adaptive": {"rate": 4e-5, "alpha": 1.0},
}
BRIEF: Final = Protocol(samples=16, steps=4, batch=4, tested=12, read=12, kept=8)
SHRINK: Final = 100
# A checkpoint's seconds, in those of a run; three if it is not here.
_COST: Final = {"multimodal": 6.0}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process needs to run a job; it reads what is settled from the file of results."""

    root: Path
    form: Form
    protocol: Protocol
    device: str
    shrink: int

    def __call__(self, job: Job) -> dict[str, Any]:
        if job.stage == "checkpoint":
            found = lessons.train(
                self.root, job.pair, job.method, device=self.device, shrink=self.shrink
            )
            return {"key": job.key, **asdict(job), **found}
        lines = Results(self.root / "results.jsonl").lines()
        settings = choosing.settings(job, self.form, lines, _SETTINGS)
        line = training.run(
            replace(job, settings=json.dumps(settings)),
            self.root,
            self.protocol,
            device=self.device,
        )
        return {**line, "key": job.key}


def begin(threads: int, device: str) -> None:
    """Set a process up: its threads, its GPU where there are several, and silence."""
    import transformers

    if device == "cuda":
        number = multiprocessing.current_process().name.rpartition("-")[2]
        torch.cuda.set_device(int(number) % torch.cuda.device_count() if number.isdigit() else 0)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left, write the report, and return how many jobs are left."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="all pairs, seeds and methods")
    parser.add_argument("--out", type=Path, default=Path("build/pretrained"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, help="start nothing that would end later")
    parser.add_argument("--methods", help="only these, separated by commas")
    parser.add_argument("--pairs", help="test on these pairs, numbers from 2 on")
    parser.add_argument("--seeds", help="test with these seeds")
    parser.add_argument("--tuned", type=Path, help="take settings from these results.jsonl.gz")
    stated = parser.parse_args(arguments)
    out: Path = stated.out
    out.mkdir(parents=True, exist_ok=True)
    model.smollm2(out / "base")
    form = FULL if stated.full else FAST
    if stated.methods:
        unknown = set(stated.methods.split(",")) - set(METHODS)
        if unknown:
            parser.error(f"--methods: expected names of {', '.join(METHODS)}; found {unknown}")
        form = replace(form, methods=tuple(stated.methods.split(",")))
    for name in ("pairs", "seeds"):
        if numbers := getattr(stated, name):
            form = replace(form, **{name: tuple(map(int, numbers.split(",")))})
    if set(form.pairs) & set(choosing.TUNING_PAIRS):
        parser.error(f"--pairs: {choosing.TUNING_PAIRS} are for tuning")
    work = Work(
        root=out,
        form=form,
        protocol=Protocol() if stated.full else BRIEF,
        device=stated.device,
        shrink=1 if stated.full else SHRINK,
    )
    results = Results(out / "results.jsonl")
    if stated.tuned:
        _take_trials(stated.tuned, results)
    left = execute(
        choosing.left([job for job in choosing.jobs(form) if not results.done(job.key)]),
        work,
        processes=stated.processes,
        clock=Clock(stated.minutes),
        done=partial(_add, results),
        ready=lambda job: choosing.ready(job, out, form, results.lines()),
        cost=lambda job: _COST.get(job.method, 3.0) if job.stage == "checkpoint" else 1.0,
        begin=partial(begin, 1 if stated.processes > 1 else os.cpu_count() or 1, stated.device),
        title="run",
    )
    report.write(out, form, results.lines())
    failed = results.failed()
    for line in failed:
        print(f"{line['key']}: {line['error']}", file=sys.stderr)
    print(f"{out / 'results.md'}: {left} runs left, {len(failed)} failed", file=sys.stderr)
    return 1 if left or failed else 0


def _take_trials(file: Path, results: Results) -> None:
    """Copy the trials of an earlier run, so that tests run with the settings chosen there."""
    for text in gzip.decompress(file.read_bytes()).decode().splitlines():
        line = json.loads(text)
        if line["stage"] in ("tune", "again") and not results.done(line["key"]):
            results.add(line)


def _add(results: Results, job: Job, result: Any, seconds: float) -> None:
    if isinstance(result, Exception):
        results.add({"key": job.key, **asdict(job), "error": str(result)})
    else:
        results.add({**result, "wall": round(seconds, 2)})


if __name__ == "__main__":
    raise SystemExit(main())
