"""The benchmark suite behind `drift-fast bench`: a pair, its rivals and what the machine allows.

Owns the three kinds of run and which files they leave. Pairs are `pair`'s, what is run `commands`'
(`rivals` and `controls` are those programs), the order `suite`'s, `scaling`'s and `trace`'s,
right or wrong `check`'s, aims `aims`', words `report`'s, pictures `chart`'s. It imports no torch:
rivals run in processes of their own, and where one is not installed its row says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drift_fast.bench.suite import Options, Say, run_table, write

__all__ = ["Options", "bench"]


def bench(
    options: Options, out: Path, say: Say, *, scaling: Sequence[int] = (), trace: bool = False
) -> tuple[str, list[Path]]:
    """Run the suite, write its files to `out` and return the report and their paths.

    Args:
        say: called with a line about what is being done.
        scaling: thread counts; runs ours and the control over them, in place of the table.
        trace: watch our memory over time, in place of the table.

    Raises:
        DriftError: a debug build, or results of ours that are wrong.
        OSError: not enough space for the pair and a delta.
        ValueError: options without meaning.
    """
    if scaling and trace:
        raise ValueError("scaling and trace are runs of their own; choose one")
    if scaling:
        from drift_fast.bench.scaling import run_scaling

        results = run_scaling(scaling, options, say)
        return _finished(write(results, out))
    if trace:
        from drift_fast.bench.trace import run_trace, write_trace

        results, traces = run_trace(options, say)
        return _finished([*write(results, out, traces), write_trace(results, traces, out)])
    return _finished(write(run_table(options, say), out))


def _finished(paths: list[Path]) -> tuple[str, list[Path]]:
    return paths[0].read_text(), paths
