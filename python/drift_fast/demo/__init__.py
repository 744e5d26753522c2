"""All steps on two tiny trained models: delta, fine-tuning, comparison, pictures.

Owns the order of the demo and what it prints and writes. `world` has the task, `experiment` one
run, `jobs` all runs, `comparison` their results. Invariant: every printed figure was measured in
this run.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drift_fast.delta.compute import compute_delta
from drift_fast.delta.delta import Delta
from drift_fast.demo.comparison import compare, comparison_table, summarize
from drift_fast.demo.jobs import quiet, run_jobs

if TYPE_CHECKING:
    from drift_fast.demo.experiment import Outcome, Protocol

__all__ = ["run"]

CHECKPOINTS: Final = Path(__file__).parent / "checkpoints"
# The other methods are compared with these, seed by seed.
BASELINES: Final = ("sft", "merge_sft")


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
    replaces those of an earlier run, prints the tables, and returns the content of the JSON file.

    Args:
        out: created if missing.
        seeds: fine-tuning sets; each method runs once on each.
        workers: number of processes, each with one thread; 1 uses this process.
        checkpoints: a directory with `base`, `expert` and `multimodal`; default the shipped ones.
        protocol: lengths of training and evaluation; by default the demo's.

    Raises:
        ImportError: matplotlib, transformers or accelerate is missing.
        ValueError: `seeds` or `workers` below one.
        DriftError: as `compute_delta`.
    """
    for name, value in (("seeds", seeds), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    _require_packages()
    with quiet():
        from drift_fast.demo.experiment import METHODS, Protocol

    start = time.perf_counter()
    source = CHECKPOINTS if checkpoints is None else checkpoints
    protocol = protocol or Protocol()
    out.mkdir(parents=True, exist_ok=True)

    deltas = _compute_deltas(source, out)
    jobs = [(method, seed) for seed in range(seeds) for method in METHODS]
    print(f"{len(jobs)} runs, each a line below when it is done", file=sys.stderr, flush=True)
    outcomes = run_jobs(jobs, workers=workers, source=source, delta=out / "delta",
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
        "delta": {name: delta.stats.total.to_dict() for name, delta in deltas.items()},
        "summary": summary,
        "paired": paired,
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    target = out / "results.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nlook at {picture} and {out / 'delta.png'}; {target} has all figures", flush=True)
    print(f"{seconds:.0f} s in all", flush=True)
    return result


def _compute_deltas(source: Path, out: Path) -> dict[str, Delta]:
    """Compute expert − multimodal and expert − text base, and print both."""
    expert = source / "expert"
    delta = compute_delta(expert, source / "multimodal", out / "delta", overwrite=True)
    of_base = compute_delta(expert, source / "base")
    _print_statistics("Δ = expert − multimodal", delta)
    _print_statistics("Δ = expert − text base", of_base)
    delta.plot(out / "delta.png")
    print(f"wrote {delta.path} and {out / 'delta.png'}\n", flush=True)
    return {"expert - multimodal": delta, "expert - base": of_base}


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


def _require_packages() -> None:
    import importlib.util

    packages = ("torch", "transformers", "accelerate", "matplotlib")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the demo needs {', '.join(missing)}, not installed here: "
            "pip install 'drift-fast[demo]'"
        )
