"""The benchmark suite behind `drift-fast bench`: a pair, its rivals and what the machine allows.

Owns the three kinds of run and which files they leave. `pair` makes synthetic pairs; `commands`
says what is run (`rivals` and `controls` are those programs); `session` prepares, `verify` checks
results before `timing` times; `suite`, `scaling` and `trace` have the order; `aims`, `report` and
`chart` show results. It imports no torch: rivals run in processes of their own, and the row of one
that is not installed says so.
"""

from __future__ import annotations

from pathlib import Path

from drift_fast.bench.files import write
from drift_fast.bench.options import BenchOptions
from drift_fast.bench.scaling import run_scaling
from drift_fast.bench.session import Say
from drift_fast.bench.suite import run_table
from drift_fast.bench.trace import run_trace, write_trace

__all__ = ["BenchOptions", "bench"]


def bench(options: BenchOptions, out: Path, say: Say) -> tuple[str, list[Path]]:
    """Run the suite, write its files to `out` and return the report and their paths.

    say: called with a line about what is being done.

    Raises:
        DriftError: a debug build, or results of ours that are wrong.
        OSError: not enough space for the pair and a delta.
    """
    if options.scaling:
        paths = write(run_scaling(options, say), out)
    elif options.trace:
        results, traces = run_trace(options, say)
        paths = [*write(results, out, traces), write_trace(results, traces, out)]
    else:
        paths = write(run_table(options, say), out)
    return paths[0].read_text(), paths
