"""The command `drift-fast inspect`."""

from __future__ import annotations

import argparse
import shlex

from drift_fast.alignment.options import SelectionOptions
from drift_fast.cli.options import (
    add_config,
    add_json,
    add_options,
    add_sources,
    from_flags,
    words_for,
)
from drift_fast.cli.output import (
    next_step,
    peak,
    print_json,
    report_transfers,
    show,
    statistics_json,
)
from drift_fast.delta.compute import inspect
from drift_fast.delta.options import InspectOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = "Measure norms and cosines between two checkpoints in one pass."
    add_sources(parser)
    parser.add_argument(
        "--by",
        choices=("module", "layer", "tensor"),
        default="module",
        help="what each row of the table is for (default module)",
    )
    add_json(parser)
    add_config(parser)
    add_options(parser, InspectOptions)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Measure and report."""
    options = from_flags(given, InspectOptions, "inspect")
    report = inspect(given.reasoning, given.multimodal, **options.to_dict())
    report_transfers(report.sources)
    if given.json:
        print_json(statistics_json(report, None))
        return 0
    show(*report.blocks(given.by))
    show(peak(report.peak_nbytes))
    if not report.stats.total.delta_sq:
        # What warned of it says what to do.
        return 0
    chosen = words_for(options, SelectionOptions.names())
    words = ["drift-fast", "delta", given.reasoning, given.multimodal, *chosen, "--out", "delta"]
    next_step(shlex.join(words))
    return 0
