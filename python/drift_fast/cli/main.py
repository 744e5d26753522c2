"""The command `drift-fast`: delta, inspect, align, check, plan, merge, demo, bench.

Results go to standard output, progress and messages to standard error. Exit status: 0 done,
1 refused or failed, 2 wrong usage, 130 interrupted. Torch is imported by `demo`, by `plan` for a
training configuration or a model without weights, and where tensors lie otherwise in one model than
in the other.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from drift_fast import _core
from drift_fast.alignment.mapping import parse_mapping
from drift_fast.cli.merge import add_merge
from drift_fast.cli.plan import add_plan
from drift_fast.delta.delta import Delta, Report, compute_delta, inspect
from drift_fast.delta.parallel import identify, parse_ranks
from drift_fast.delta.statistics import Statistics
from drift_fast.dtypes import STORED_DTYPES
from drift_fast.errors import DriftError, DriftWarning
from drift_fast.progress_bar import ProgressBar
from drift_fast.selection import PRESETS
from drift_fast.sizes import MEMORY

_WHAT = "file, directory, Hub id (org/name[@revision]) or URL"
_MODULES_HELP = (
    f"comma-separated presets ({', '.join(PRESETS)}) or one re:<pattern>; default attn,mlp"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        # A name or symbol that the terminal cannot show is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("drift-fast: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    except (DriftError, OSError, ValueError, ImportError) as error:
        print(f"drift-fast: {_message(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drift-fast",
        description="Stream the reasoning delta between two checkpoints, and inject it.",
    )
    parser.add_argument("--version", action="version", version=f"drift-fast {_core.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    delta = commands.add_parser(
        "delta",
        help="compute reasoning − multimodal and write it",
        description="Compute Δ = W_reason − W_multimodal for the language backbone and write it.",
    )
    _add_pair(delta)
    delta.add_argument("--out", "-o", required=True, type=Path, help="directory to write")
    delta.add_argument("--dtype", choices=STORED_DTYPES, default="bfloat16", help="of Δ (bfloat16)")
    delta.add_argument("--overwrite", action="store_true", help="replace a delta at --out")
    delta.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default 5GB)"
    )
    delta.add_argument(
        "--ranks",
        default="auto",
        metavar="RANKS",
        help="who writes: auto (all processes of torchrun, Slurm or Open MPI; the default), none "
        "(this process alone), or R/N",
    )
    delta.add_argument("--plot", type=Path, metavar="PNG", help="draw norms and cosines too")
    delta.set_defaults(run=_delta)

    look = commands.add_parser(
        "inspect",
        help="norms and cosines between two checkpoints; writes nothing",
        description="Measure norms and cosines between two checkpoints in one pass.",
    )
    _add_pair(look)
    look.add_argument(
        "--by",
        choices=("module", "layer", "tensor"),
        default="module",
        help="what one row of the table stands for (default module)",
    )
    look.set_defaults(run=_inspect)

    pairs = commands.add_parser(
        "align",
        help="which tensor of one checkpoint is which of the other, and how surely",
        description="Pair the tensors of two checkpoints. Exit status 1 where delta would refuse "
        "the pairing and no map was asked for.",
    )
    _add_sources(pairs)
    pairs.add_argument("--out", "-o", type=Path, metavar="JSON", help="write a map file to edit")
    pairs.add_argument("--all", action="store_true", help="list every pair and leftover")
    pairs.add_argument("--json", action="store_true", help="print JSON")
    pairs.set_defaults(run=_align)

    fit = commands.add_parser(
        "check",
        help="whether two models fit each other and what Δ will cost; reads no weight",
        description="Compare two models by configuration and headers. With MODEL, the first two "
        "are an expert and its reference, whose Δ is to be attached to it. Exit status: 0 they "
        "fit, notes included, 1 something breaks the method, 2 wrong usage.",
    )
    fit.add_argument("reasoning", help=f"text-only reasoning checkpoint, or expert: {_WHAT}")
    fit.add_argument("multimodal", help="multimodal checkpoint, or reference")
    fit.add_argument("model", nargs="?", help="third model, for a Δ of two text models")
    _add_selection(fit)
    fit.add_argument("--mapping", metavar="MAP", help="as for delta")
    fit.add_argument("--dtype", choices=STORED_DTYPES, default="bfloat16", help="of Δ (bfloat16)")
    fit.add_argument(
        "--read-rate", default="1GB", metavar="SIZE", help="a second, to estimate time (1GB)"
    )
    fit.add_argument("--json", action="store_true", help="print JSON")
    fit.set_defaults(run=_check)

    add_merge(commands, _WHAT, _MODULES_HELP)
    add_plan(commands)

    demo = commands.add_parser(
        "demo",
        help="the whole way on two tiny trained models: delta, fine-tuning, comparison, pictures",
        description="Compute a delta between two tiny trained checkpoints, fine-tune on images "
        "with and without it, and compare on held-out images.",
    )
    demo.add_argument("--out", "-o", type=Path, default=Path("demo-output"), help="for results")
    demo.add_argument("--seeds", type=int, default=3, help="fine-tuning sets (default 3)")
    demo.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    demo.set_defaults(run=_demo)
    _add_bench(commands)
    return parser


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="time statistics and Δ of a synthetic pair beside rivals and what the machine allows",
        description="Write a seeded synthetic pair, check every result against float64, and time "
        "drift-fast beside PyTorch, transformers and mergekit, as far as they are installed, and "
        "beside an XOR of both files. Leaves a table, JSON and a picture at --out.",
    )
    bench.add_argument("--size", default="0.5B", metavar="0.5B|1.5B|3B|7B", help="default 0.5B")
    bench.add_argument("--layers", type=int, metavar="N", help="of the pair; default the model's")
    bench.add_argument("--threads", type=int, default=2, help="of everything (default 2)")
    bench.add_argument("--repeats", type=int, default=3, help="timed rounds (default 3)")
    bench.add_argument("--cold", action="store_true", help="also with an empty page cache")
    bench.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PART",
        help="statistics, delta, merge (not usual), process, inside or cold; may be repeated",
    )
    bench.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="RIVAL",
        help="tuned, plain, public or mergekit; may be repeated",
    )
    bench.add_argument(
        "--scaling", metavar="1,2,4", help="instead: ours and the XOR over these thread counts"
    )
    bench.add_argument("--trace", action="store_true", help="instead: our memory over time")
    bench.add_argument(
        "--beside", type=Path, metavar="JSON", help="a run at another size, to compare memory with"
    )
    bench.add_argument("--directory", type=Path, help="for pairs (default ~/.cache/drift-fast)")
    bench.add_argument("--out", "-o", type=Path, default=Path("bench-results"), help="for results")
    bench.set_defaults(run=_bench)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reasoning", help=f"text-only reasoning checkpoint: {_WHAT}")
    parser.add_argument("multimodal", help=f"multimodal checkpoint: {_WHAT}")
    parser.add_argument(
        "--mapping",
        metavar="MAP",
        help="a map file that `align --out` wrote, or prefix pairs such as model:model.llm",
    )
    parser.add_argument(
        "--no-check-weights",
        action="store_true",
        help="do not compare samples of the weights (a shift of layers goes unseen)",
    )


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--modules", default="attn,mlp", help=_MODULES_HELP)
    parser.add_argument("--layers", help="such as 0-3,8; default all")
    parser.add_argument(
        "--rows",
        choices=("token", "index"),
        help="how rows of embeddings and heads are matched (default token)",
    )


def _add_pair(parser: argparse.ArgumentParser) -> None:
    _add_sources(parser)
    _add_selection(parser)
    parser.add_argument("--threads", type=int, help="default: every core")
    parser.add_argument(
        "--memory",
        default=MEMORY,
        metavar="SIZE",
        help=f"that buffers may take, whatever the size of the models (default {MEMORY})",
    )
    parser.add_argument(
        "--reader", choices=("auto", "mmap", "pread"), default="auto", help="default auto: pread"
    )
    parser.add_argument(
        "--no-strict", action="store_true", help="list what has no partner instead of refusing"
    )
    parser.add_argument(
        "--min-coverage",
        type=float,
        metavar="SHARE",
        help="refuse when less of the selected parameters is covered, such as 0.95",
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="count NaN and infinity instead of refusing"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _shared(options: argparse.Namespace, bar: ProgressBar) -> dict[str, Any]:
    return {
        "modules": options.modules,
        "layers": options.layers,
        "mapping": parse_mapping(options.mapping),
        "rows": options.rows,
        "min_coverage": options.min_coverage,
        "check_weights": not options.no_check_weights,
        "threads": options.threads,
        "memory": options.memory,
        "reader": options.reader,
        "strict": not options.no_strict,
        "allow_nonfinite": options.allow_nonfinite,
        "progress": bar,
    }


def _delta(options: argparse.Namespace) -> int:
    ranks = parse_ranks(options.ranks)
    # Of several processes, one talks.
    is_first = identify(ranks)[0] == 0
    with ProgressBar(None if is_first else io.StringIO()) as bar:
        delta = compute_delta(
            options.reasoning,
            options.multimodal,
            options.out,
            dtype=options.dtype,
            overwrite=options.overwrite,
            max_shard_size=options.max_shard_size,
            ranks=ranks,
            **_shared(options, bar),
        )
    if not is_first:
        return 0
    _report_transfers(delta.sources)
    if options.plot is not None:
        delta.plot(options.plot)
    if options.json:
        _print_json(delta, str(options.out))
        return 0
    print(delta.stats.by_module().table())
    if delta.compression is not None:
        print(f"\n{delta.compression}")
    print(f"\n{delta.coverage}\nwritten to {options.out}; {_peak(delta.peak_nbytes)}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    with ProgressBar() as bar:
        report = inspect(options.reasoning, options.multimodal, **_shared(options, bar))
    _report_transfers(report.sources)
    if options.json:
        _print_json(report, None)
        return 0
    stats = report.stats
    rows = {"module": stats.by_module(), "layer": stats.by_layer(), "tensor": stats}[options.by]
    print(Statistics([*rows, stats.total]).table())
    print(f"\n{report.coverage}\n{_peak(report.peak_nbytes)}")
    return 0


def _align(options: argparse.Namespace) -> int:
    from drift_fast.alignment.report import align

    found = align(
        options.reasoning,
        options.multimodal,
        mapping=parse_mapping(options.mapping),
        check_weights=not options.no_check_weights,
    )
    if options.json:
        json.dump(found.to_dict(), sys.stdout, indent=1)
        print()
    else:
        print(found.table(every=options.all))
    if options.out is not None:
        found.save(options.out)
        print(f"drift-fast: map written to {options.out}", file=sys.stderr)
    return 0 if found.ok or options.out is not None else 1


def _check(options: argparse.Namespace) -> int:
    from drift_fast.preflight.check import check

    try:
        report = check(
            options.reasoning,
            options.multimodal,
            options.model,
            modules=options.modules,
            layers=options.layers,
            mapping=parse_mapping(options.mapping),
            rows=options.rows,
            dtype=options.dtype,
            read_rate=options.read_rate,
        )
    except ValueError as error:
        # Status 1 says that the models do not fit.
        print(f"drift-fast: {error}", file=sys.stderr)
        return 2
    if options.json:
        json.dump(report.to_dict(), sys.stdout, indent=1)
        print()
    else:
        print(report.table())
    return 0 if report.ok else 1


def _demo(options: argparse.Namespace) -> int:
    from drift_fast.demo import run

    run(options.out, seeds=options.seeds, workers=options.workers)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from drift_fast.bench import Options, bench

    counts = options.scaling.split(",") if options.scaling else []
    try:
        scaling = [int(count) for count in counts]
    except ValueError as error:
        raise ValueError(f"--scaling {options.scaling}: expected counts such as 1,2,4") from error
    report, paths = bench(
        Options(
            size=options.size,
            layers=options.layers,
            threads=options.threads,
            repeats=options.repeats,
            cold=options.cold,
            only=tuple(options.only),
            without=tuple(options.without),
            directory=options.directory,
            beside=options.beside,
            command=shlex.join(["drift-fast", *(options.arguments)]),
        ),
        options.out,
        lambda line: print(f"drift-fast: {line}", file=sys.stderr),
        scaling=scaling,
        trace=options.trace,
    )
    print(report)
    print(f"drift-fast: written to {', '.join(map(str, paths))}", file=sys.stderr)
    return 0


def _report_transfers(sources: dict[str, Any]) -> None:
    for source in sources.values():
        if source.get("transfer"):
            print(f"drift-fast: {source['url']}: {source['transfer']['report']}", file=sys.stderr)


def _peak(nbytes: int | None) -> str:
    return f"buffers took {(nbytes or 0) / 1e6:.1f} MB at most"


def _print_json(found: Delta | Report, out: str | None) -> None:
    stats = found.stats
    result = {
        "out": out,
        "sources": found.sources,
        "coverage": found.coverage.to_dict(),
        "peak_nbytes": found.peak_nbytes,
        "total": stats.total.to_dict(),
        "modules": [row.to_dict() for row in stats.by_module()],
        "layers": [row.to_dict() for row in stats.by_layer()],
        "tensors": [row.to_dict() for row in stats],
    }
    json.dump(result, sys.stdout, indent=1)
    print()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    label = "warning" if issubclass(category, DriftWarning) else category.__name__
    print(f"drift-fast: {label}: {message}", file=sys.stderr)


def _message(error: Exception) -> str:
    # str(OSError) would show its number; the text is what a user needs.
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if not error.filename else f"{error.filename}: {error.strerror}"
    return str(error)
