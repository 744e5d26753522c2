"""The command `drift-fast demo`."""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

from drift_fast.cli.options import add_json
from drift_fast.cli.output import next_step, print_json
from drift_fast.demo import run as run_demo
from drift_fast.paths import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Compute a delta between two tiny trained checkpoints, fine-tune on images "
        "with and without it, and compare on held-out images."
    )
    parser.add_argument(
        "--out", "-o", type=local_path, default=Path("demo-output"), help="directory for results"
    )
    parser.add_argument("--seeds", type=int, default=3, help="fine-tuning sets (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run the demo; as JSON, with its tables where progress is."""
    options = {"seeds": given.seeds, "workers": given.workers}
    if given.json:
        with redirect_stdout(sys.stderr):
            result = run_demo(given.out, **options)
        print_json(result)
        return 0
    run_demo(given.out, **options)
    page = given.out / "demo.html"
    next_step(shlex.join(["drift-fast", "report", str(page), str(given.out / "delta")]))
    return 0
