"""The command `drift-fast merge`."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from drift_fast.cli.options import add_config, add_json, add_options, add_sources, from_flags
from drift_fast.cli.output import next_step, peak, print_json, show
from drift_fast.merging.config import MergeConfig
from drift_fast.merging.merge import merge
from drift_fast.merging.methods import METHODS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Merge a text reasoning model into the language backbone of a multimodal one, "
        "without loading either. The result is a directory that from_pretrained loads."
    )
    parser.add_argument("method", choices=tuple(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add_sources(parser)
    parser.add_argument("--out", "-o", required=True, type=Path, help="directory to write")
    add_json(parser)
    add_config(parser)
    add_options(parser, MergeConfig)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Merge, write and report."""
    options = from_flags(given, MergeConfig, "merge").to_dict()
    merged = merge(given.method, given.reasoning, given.multimodal, given.out, **options)
    if given.json:
        fields = {"path": str(merged.path), "coverage": merged.coverage.to_dict()}
        print_json(asdict(merged) | fields)
        return 0
    kinds = Counter(tensor.kind for tensor in merged.tensors if tensor.sources)
    show(*merged.blocks())
    said = [f"merged: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"]
    if merged.rounding_share is not None:
        said.append(f"rounding to the output's dtype: {merged.rounding_share:.1%} of the shift")
    if merged.left_behind:
        said.append(f"left behind: {', '.join(merged.left_behind)}")
    show("\n".join([*said, f"written to {given.out}; {peak(merged.peak_nbytes)}"]))
    next_step(f'transformers.AutoModelForImageTextToText.from_pretrained("{given.out}")')
    return 0
