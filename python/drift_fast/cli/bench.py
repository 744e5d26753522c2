"""The command `drift-fast bench`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from drift_fast.cli.output import remark


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="time statistics and Δ of a synthetic pair beside rivals and what the machine allows",
        description="Write a seeded synthetic pair, check every result against float64, and time "
        "drift-fast beside those of PyTorch, transformers and mergekit that are installed, and "
        "beside an XOR of both files. Leaves a table, JSON and a picture at --out.",
    )
    parser.add_argument("--size", default="0.5B", metavar="0.5B|1.5B|3B|7B", help="default 0.5B")
    parser.add_argument("--layers", type=int, metavar="N", help="of the pair; default the model's")
    parser.add_argument("--threads", type=int, default=2, help="of everything (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--cold", action="store_true", help="also with an empty page cache")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PART",
        help="statistics, delta, merge (not usual), process, inside or cold; may be repeated",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="RIVAL",
        help="tuned, plain, public or mergekit; may be repeated",
    )
    parser.add_argument(
        "--scaling", metavar="1,2,4", help="instead: ours and the XOR over these thread counts"
    )
    parser.add_argument("--trace", action="store_true", help="instead: our memory over time")
    parser.add_argument(
        "--beside", type=Path, metavar="JSON", help="a run at another size, to compare memory with"
    )
    parser.add_argument("--directory", type=Path, help="for pairs (default ~/.cache/drift-fast)")
    parser.add_argument("--out", "-o", type=Path, default=Path("bench-results"), help="for results")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run the suite and print its report."""
    from drift_fast.bench import Options, bench

    counts = given.scaling.split(",") if given.scaling else []
    try:
        scaling = [int(count) for count in counts]
    except ValueError as error:
        raise ValueError(f"--scaling {given.scaling}: expected counts such as 1,2,4") from error
    report, paths = bench(
        Options(
            size=given.size,
            layers=given.layers,
            threads=given.threads,
            repeats=given.repeats,
            cold=given.cold,
            only=tuple(given.only),
            without=tuple(given.without),
            directory=given.directory,
            beside=given.beside,
            command=shlex.join(["drift-fast", *given.arguments]),
        ),
        given.out,
        remark,
        scaling=scaling,
        trace=given.trace,
    )
    print(report)
    remark(f"written to {', '.join(map(str, paths))}")
    return 0
