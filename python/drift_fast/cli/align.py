"""The command `drift-fast align`."""

from __future__ import annotations

import argparse
import shlex

from drift_fast.alignment.options import PairOptions
from drift_fast.alignment.report import align
from drift_fast.cli.options import add_json, add_options, add_sources, from_flags, given_flags
from drift_fast.cli.output import next_step, print_json, remark, show
from drift_fast.paths import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Match the tensors of two checkpoints. The exit status is 1 if delta would refuse "
        "the pair, unless --out asks for a map."
    )
    add_sources(parser)
    parser.add_argument(
        "--out", "-o", type=local_path, metavar="JSON", help="write a map file to edit"
    )
    parser.add_argument("--all", action="store_true", help="list every match and leftover")
    add_json(parser)
    add_options(parser, PairOptions, only=("mapping", "check_weights"))
    parser.set_defaults(run=run, advice_for="delta")


def run(given: argparse.Namespace) -> int:
    """Match, report, and write the map if one was asked for."""
    options = from_flags(given, PairOptions, "align")
    found = align(given.reasoning, given.multimodal, **options.to_dict())
    if given.json:
        print_json(found.to_dict())
    else:
        show(found.table(every=given.all), spelled=given.spelled)
    if given.out is not None:
        found.save(given.out)
        remark(f"map written to {given.out}")
    if not given.json and (found.ok or given.out is not None):
        mapping = given.out or given_flags(given, PairOptions).get("mapping")
        stated = [] if mapping is None else ["--mapping", str(mapping)]
        words = ["drift-fast", "check", given.reasoning, given.multimodal, *stated]
        next_step(shlex.join(words))
    return 0 if found.ok or given.out is not None else 1
