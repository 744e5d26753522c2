"""The command `drift-fast demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

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
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run the demo."""
    run_demo(given.out, seeds=given.seeds, workers=given.workers)
    return 0
