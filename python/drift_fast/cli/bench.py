"""The command `drift-fast bench`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

from drift_fast.bench import bench
from drift_fast.bench.options import BenchOptions
from drift_fast.cli.options import add_json, add_options, given_flags
from drift_fast.cli.output import next_step, print_json, remark, show
from drift_fast.paths import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Write a seeded synthetic pair, check every result against float64, and time drift-fast, "
        "an XOR of both files, and whatever is installed of PyTorch, transformers and mergekit. "
        "Prints a table, and writes it with JSON and a picture to --out."
    )
    parser.add_argument(
        "--out", "-o", type=local_path, help="directory for results; none are kept without it"
    )
    add_json(parser)
    add_options(parser, BenchOptions)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run the suite and print its report."""
    command = shlex.join(["drift-fast", *given.arguments])
    options = BenchOptions(**given_flags(given, BenchOptions), command=command)
    with TemporaryDirectory() as unkept:
        report, paths = bench(options, given.out or Path(unkept), remark)
        results = json.loads(next(path for path in paths if path.suffix == ".json").read_text())
    if given.json:
        print_json(results)
    else:
        show(report.rstrip())
    if given.out is not None:
        remark(f"written to {', '.join(map(str, paths))}")
    elif not given.json:
        next_step(f"{command} --out results, to keep the report, its JSON and a picture")
    return 0
