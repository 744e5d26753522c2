"""The benchmark suite behind `drift-fast bench`: a pair, our rivals, and the machine's limit.

Owns the three kinds of run and the files that they write. `pair` makes synthetic pairs; `commands`
lists what runs (`rivals` and `controls` are programs); `session` prepares; `verify` checks results
before `timing` times them; `suite`, `scaling` and `trace` are the kinds of run; `aims`, `report`
and `chart` show results. Torch is not imported: rivals run in their own processes, and the row of
one that is not installed says so.
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
        DriftError: this is a debug build, or our results are wrong.
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
