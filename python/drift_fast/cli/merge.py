"""The command `drift-fast merge`: its arguments and what it prints.

Owns nothing of a merge itself, which is `merging`'s, nor the exit status of errors, which is
`cli`'s.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from drift_fast.alignment.mapping import parse_mapping
from drift_fast.cli.options import SOURCE
from drift_fast.merging.config import METHODS
from drift_fast.merging.layout import DTYPES
from drift_fast.merging.merge import Merged, merge
from drift_fast.progress_bar import reported
from drift_fast.sizes import MEMORY


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "merge",
        help="merge a reasoning model into a multimodal one and write the result",
        description="Merge a text reasoning model into the language backbone of a multimodal one, "
        "without loading either. The result is a directory that from_pretrained loads.",
    )
    parser.add_argument("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("reasoning", help=f"text-only reasoning checkpoint: {SOURCE}")
    parser.add_argument("multimodal", help=f"multimodal checkpoint: {SOURCE}")
    parser.add_argument("--out", "-o", required=True, type=Path, help="directory to write")
    parser.add_argument("--base", help="the text model that the reasoning model was tuned from")
    parser.add_argument(
        "--weight",
        type=_weight,
        metavar="W",
        help="of the reasoning model: a number, or one for each kind, such as attn=0.7,mlp=1.25",
    )
    parser.add_argument(
        "--multimodal-weight", type=float, metavar="V", help="of multimodal − base (default 1)"
    )
    parser.add_argument(
        "--density", type=float, metavar="SHARE", help="of each task vector that is kept"
    )
    parser.add_argument("--seed", type=int, help="of what DARE drops (default 0)")
    parser.add_argument(
        "--keep-layers", type=int, metavar="N", help="first layers that layer_swap leaves alone"
    )
    parser.add_argument("--modules", help="as for delta; default all")
    parser.add_argument("--layers", help="such as 0-3,8; default all")
    parser.add_argument("--mapping", metavar="MAP", help="as for delta")
    parser.add_argument(
        "--base-mapping", metavar="MAP", help="for --base; default --mapping where it holds"
    )
    parser.add_argument("--rows", choices=("token", "index"), help="as for delta")
    parser.add_argument("--dtype", choices=DTYPES.values(), help="default: each tensor's own")
    parser.add_argument("--threads", type=int, help="default: every core")
    parser.add_argument(
        "--memory", default=MEMORY, metavar="SIZE", help=f"that buffers may take (default {MEMORY})"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default 5GB)"
    )
    parser.add_argument("--reader", choices=("auto", "mmap", "pread"), default="auto")
    parser.add_argument("--overwrite", action="store_true", help="replace a merged model at --out")
    parser.add_argument("--no-strict", action="store_true", help="carry over what has no partner")
    parser.add_argument(
        "--no-check-weights", action="store_true", help="do not compare samples of the weights"
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="count NaN and infinity instead of refusing"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _weight(text: str) -> float | dict[str, float]:
    if "=" not in text:
        return float(text)
    weights: dict[str, float] = {}
    for part in text.split(","):
        kind, _, value = part.partition("=")
        if kind.strip() in weights:
            raise argparse.ArgumentTypeError(f"{kind.strip()} is named twice")
        weights[kind.strip()] = float(value)
    return weights


def _run(options: argparse.Namespace) -> int:
    with reported(None, None) as bar:
        merged = merge(
            options.method,
            options.reasoning,
            options.multimodal,
            options.out,
            base=options.base,
            weight=options.weight,
            multimodal_weight=options.multimodal_weight,
            density=options.density,
            seed=options.seed,
            keep_layers=options.keep_layers,
            modules=options.modules,
            layers=options.layers,
            mapping=parse_mapping(options.mapping),
            base_mapping=parse_mapping(options.base_mapping),
            rows=options.rows,
            dtype=options.dtype,
            memory=options.memory,
            threads=options.threads,
            overwrite=options.overwrite,
            max_shard_size=options.max_shard_size,
            strict=not options.no_strict,
            check_weights=not options.no_check_weights,
            allow_nonfinite=options.allow_nonfinite,
            reader=options.reader,
            progress=bar,
        )
    if options.json:
        json.dump(_to_dict(merged), sys.stdout, indent=1)
        print()
        return 0
    kinds = Counter(tensor.kind for tensor in merged.tensors if tensor.sources)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    print(f"{merged}\nmerged: {told}")
    if merged.left_behind:
        print(f"left behind: {', '.join(merged.left_behind)}")
    print(f"written to {options.out}; at most {merged.peak_nbytes / 1e6:.1f} MB of buffers")
    return 0


def _to_dict(merged: Merged) -> dict[str, Any]:
    fields = dataclasses.asdict(merged)
    return fields | {"path": str(merged.path), "coverage": merged.coverage.to_dict()}
