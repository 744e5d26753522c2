"""The command `drift-fast report`."""

from __future__ import annotations

import argparse

from drift_fast.cli.options import SOURCE, add_config, add_options, from_flags
from drift_fast.cli.output import next_step, remark
from drift_fast.delta.options import InspectOptions
from drift_fast.report.write import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Write one HTML page about deltas, merges, training runs, or a reasoning and a multimodal "
        "checkpoint. The page needs no network. Several runs are compared. The options are for a "
        "pair of checkpoints."
    )
    parser.add_argument("out", metavar="OUT.html", help="page to write")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="directory, Hub id or URL of a delta; directory of a merge; CSV file, checkpoint or "
        "directory of checkpoints of a run; "
        f"or two checkpoints, each a {SOURCE}",
    )
    add_config(parser)
    add_options(parser, InspectOptions)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Read, measure where there is a pair, and write."""
    options = from_flags(given, InspectOptions, "inspect")
    changed = {name: value for name, value in options.to_dict().items()
               if value != getattr(InspectOptions(), name)}  # fmt: skip
    page = write_report(given.out, *given.sources, **changed)
    remark(f"written to {page}")
    next_step(f"open {page.absolute().as_uri()} in a browser")
    return 0
