"""The whole way on two tiny trained models: delta, fine-tuning, comparison, pictures.

Owns the order of the demo and what it prints and writes. The task is `world`'s, the runs are
`experiment`'s. Invariant: every figure printed was measured in this run, whatever it shows.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drift_fast.delta.delta import Delta, compute_delta

if TYPE_CHECKING:
    from drift_fast.demo.experiment import Outcome, Protocol

__all__ = ["run"]

CHECKPOINTS: Final = Path(__file__).parent / "checkpoints"
# What the others are compared with, seed by seed.
BASELINES: Final = ("sft", "merge_sft")
_MEASURES: Final = ("answers_right", "digits_read")


def run(
    out: Path,
    *,
    seeds: int = 3,
    workers: int = 2,
    checkpoints: Path | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Compute both deltas, fine-tune with every method on every seed, compare, draw and write.

    Writes `delta/` (expert - multimodal), `delta.png`, `curves.png` and `results.json` to `out`,
    replacing those of an earlier run, and prints the tables. The result is what the JSON holds.

    Args:
        out: created if missing.
        seeds: fine-tuning sets; each method runs once on each.
        workers: how many runs at a time, each in a process of one thread; 1 is this process.
        checkpoints: a directory with `base`, `expert` and `multimodal`; default the shipped ones.
        protocol: lengths of training and evaluation; default the demo's.

    Raises:
        ImportError: scikit-learn, matplotlib, transformers or accelerate is missing.
        ValueError: `seeds` or `workers` below one.
        DriftError: as `compute_delta`.
    """
    for name, value in (("seeds", seeds), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    _require_packages()
    from drift_fast.demo.experiment import METHODS, Protocol

    start = time.perf_counter()
    source = CHECKPOINTS if checkpoints is None else checkpoints
    protocol = protocol or Protocol()
    out.mkdir(parents=True, exist_ok=True)

    expert, multimodal, base = (str(source / n) for n in ("expert", "multimodal", "base"))
    delta = compute_delta(expert, multimodal, out / "delta", overwrite=True)
    prior2 = compute_delta(expert, base)
    _print_statistics("Δ = expert − multimodal", delta)
    _print_statistics("Δ = expert − text base (the prior2 form)", prior2)
    print(f"wrote {delta.path} and {delta.plot(out / 'delta.png')}\n", flush=True)

    jobs = [(method, seed) for seed in range(seeds) for method in METHODS]
    outcomes = _run_jobs(jobs, workers=workers, source=source, delta=out / "delta",
                         protocol=protocol)  # fmt: skip

    summary = summarize(outcomes)
    paired = {baseline: compare(outcomes, baseline) for baseline in BASELINES}
    print("\n" + comparison_table(summary, paired, seeds), flush=True)
    picture = _plot(outcomes, out / "curves.png")
    seconds = time.perf_counter() - start
    result = {
        "seeds": seeds,
        "workers": workers,
        "seconds": round(seconds, 1),
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        "protocol": asdict(protocol),
        "settings": {name: asdict(method) for name, method in METHODS.items()},
        "delta": {
            "expert - multimodal": delta.stats.total.to_dict(),
            "expert - base": prior2.stats.total.to_dict(),
        },
        "summary": summary,
        "paired": paired,
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    target = out / "results.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwrote {picture} and {target}; {seconds:.0f} s in all", flush=True)
    return result


def summarize(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Return for each method the mean and the standard deviation over seeds of each measure.

    The deviation is the sample's (n - 1), 0 for a single seed. `progress_*` is the mean of the
    last step's progress along either delta, for methods that train.
    """
    summary: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.method == method]
        row: dict[str, float] = {}
        for measure in _MEASURES:
            row[measure], row[f"{measure}_std"] = _mean_std([getattr(o, measure) for o in mine])
        if all(outcome.curve for outcome in mine):
            for column in ("progress_multimodal", "progress_base"):
                row[column] = statistics.fmean(outcome.curve[-1][column] for outcome in mine)
        summary[method] = row
    return summary


def compare(outcomes: Sequence[Outcome], baseline: str) -> dict[str, dict[str, Any]]:
    """Return for each other method its differences from `baseline`, seed by seed."""
    reference = {o.seed: o for o in outcomes if o.method == baseline}
    compared: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(o.method for o in outcomes if o.method != baseline):
        mine = sorted((o for o in outcomes if o.method == method), key=lambda o: o.seed)
        row: dict[str, Any] = {}
        for measure in _MEASURES:
            differences = [getattr(o, measure) - getattr(reference[o.seed], measure) for o in mine]
            mean, deviation = _mean_std(differences)
            row[measure] = {
                "mean": mean,
                "std": deviation,
                "better_in": sum(difference > 0 for difference in differences),
                "differences": differences,
            }
        compared[method] = row
    return compared


def comparison_table(
    summary: Mapping[str, Mapping[str, float]],
    paired: Mapping[str, Mapping[str, Mapping[str, Any]]],
    seeds: int,
) -> str:
    """Return the held-out results and the paired differences as text."""
    from drift_fast.demo.experiment import METHODS

    labels = {name: method.label for name, method in METHODS.items()}
    lines = [f"Held-out images, {seeds} fine-tuning sets, mean ± standard deviation over them"]
    lines += _aligned(
        [
            ("", "answers right", "digits read right", "λ exp−mm", "λ exp−base"),
            *(
                (
                    labels[method],
                    f"{row['answers_right']:.3f} ± {row['answers_right_std']:.3f}",
                    f"{row['digits_read']:.3f} ± {row['digits_read_std']:.3f}",
                    f"{row['progress_multimodal']:.2f}" if "progress_multimodal" in row else "",
                    f"{row['progress_base']:.2f}" if "progress_base" in row else "",
                )
                for method, row in summary.items()
            ),
        ]
    )
    for baseline, rows in paired.items():
        lines += ["", f"Paired difference from {labels[baseline]} (better in so many of {seeds})"]
        lines += _aligned(
            [
                ("", "answers right", "digits read right"),
                *(
                    (labels[method], *(_difference(row[measure], seeds) for measure in _MEASURES))
                    for method, row in rows.items()
                ),
            ]
        )
    return "\n".join(lines)


def _difference(cell: Mapping[str, Any], seeds: int) -> str:
    return f"{cell['mean']:+.3f} ± {cell['std']:.3f} ({cell['better_in']}/{seeds})"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _print_statistics(title: str, delta: Delta) -> None:
    print(title)
    print(delta.stats.by_module().table())
    print(delta.stats.by_layer().table() + "\n", flush=True)


def _plot(outcomes: Sequence[Outcome], path: Path) -> Path:
    from drift_fast.demo.experiment import METHODS
    from drift_fast.demo.figures import plot_curves

    trained = [outcome for outcome in outcomes if outcome.curve]
    curves = {
        METHODS[method].label: [o.curve for o in trained if o.method == method]
        for method in dict.fromkeys(o.method for o in trained)
    }
    return plot_curves(curves, path)


def _run_jobs(
    jobs: Sequence[tuple[str, int]],
    *,
    workers: int,
    source: Path,
    delta: Path,
    protocol: Protocol,
) -> list[Outcome]:
    """Run (method, seed) jobs, each on one thread; outcomes in the jobs' order.

    One worker is this process; more are processes of their own.
    """
    done: dict[tuple[str, int], Outcome] = {}
    if workers == 1:
        for method, seed in jobs:
            done[method, seed] = _job(method, seed, source, delta, protocol)
            _report(done[method, seed], len(done), len(jobs))
        return [done[job] for job in jobs]
    pool = ProcessPoolExecutor(
        max_workers=min(workers, len(jobs)),
        # Spawned, not forked: a process that has used torch's thread pool must not fork.
        mp_context=multiprocessing.get_context("spawn"),
    )
    try:
        waiting = {pool.submit(_job, *job, source, delta, protocol): job for job in jobs}
        for future in as_completed(waiting):
            done[waiting[future]] = future.result()
            _report(future.result(), len(done), len(jobs))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [done[job] for job in jobs]


def _report(outcome: Outcome, done: int, total: int) -> None:
    from drift_fast.demo.experiment import METHODS

    print(
        f"[{done:2d}/{total}] seed {outcome.seed}, {METHODS[outcome.method].label}: "
        f"answers right {outcome.answers_right:.3f}, digits read right {outcome.digits_read:.3f}",
        file=sys.stderr,
        flush=True,
    )


def _job(method: str, seed: int, source: Path, delta: Path, protocol: Protocol) -> Outcome:
    from drift_fast.demo.experiment import train_and_evaluate

    with _one_thread(), _quiet_transformers():
        return train_and_evaluate(
            method,
            seed,
            checkpoint=source / "multimodal",
            deltas={
                "multimodal": Delta.open(delta),
                "base": compute_delta(source / "expert", source / "base", threads=1),
            },
            protocol=protocol,
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Two threads of two processes each would fight over two cores; one also rounds alike."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep loading bars of fifteen tiny models out of the demo's output."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _require_packages() -> None:
    import importlib.util

    packages = ("torch", "transformers", "accelerate", "sklearn", "matplotlib")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the demo needs {', '.join(missing)}, not installed here: "
            "pip install 'drift-fast[demo]'"
        )
