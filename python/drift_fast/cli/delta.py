"""The command `drift-fast delta`."""

from __future__ import annotations

import argparse
from pathlib import Path

from drift_fast.cli.options import add_config, add_json, add_options, add_sources, from_flags
from drift_fast.cli.output import (
    next_step,
    peak,
    print_json,
    report_transfers,
    show,
    statistics_json,
)
from drift_fast.delta.compute import compute_delta
from drift_fast.delta.options import DeltaOptions
from drift_fast.pictures import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Compute Δ = W_reason − W_multimodal for the language backbone and write it."
    )
    add_sources(parser)
    parser.add_argument("--out", "-o", required=True, type=Path, help="directory to write")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw norms and cosines")
    add_json(parser)
    add_config(parser)
    add_options(parser, DeltaOptions)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Compute, write and report."""
    options = from_flags(given, DeltaOptions, "delta")
    if given.plot is not None:
        check_writable(given.plot)
    delta = compute_delta(given.reasoning, given.multimodal, given.out, **options.to_dict())
    if not options.is_first():
        return 0
    report_transfers(delta.sources)
    if given.plot is not None:
        delta.plot(given.plot)
    if given.json:
        print_json(statistics_json(delta, str(given.out)))
        return 0
    drawn = "" if given.plot is None else f", drawn to {given.plot}"
    show(*delta.blocks())
    show(f"written to {given.out}{drawn}; {peak(delta.peak_nbytes)}")
    next_step(f'drift_fast.attach(trainer, "{given.out}"), before trainer.train()')
    return 0
