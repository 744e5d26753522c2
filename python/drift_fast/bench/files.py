"""The files that a run writes: report, JSON and picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from drift_fast.bench.measure import Sample
from drift_fast.bench.report import markdown
from drift_fast.bench.results import Results


def write(
    results: Results, directory: Path, traces: Mapping[str, tuple[Sample, ...]] | None = None
) -> list[Path]:
    """Write report, JSON and, if matplotlib is installed, a picture; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / name(results)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".json", ".png")]
    try:
        from drift_fast.bench import chart

        if traces is None:
            chart.draw(results, paths[2])
        else:
            chart.draw_trace(traces, results.baseline_nbytes or 0, paths[2])
    except ImportError:
        results.notes.append("No picture: matplotlib is not installed")
        paths.pop()
    paths[0].write_text(markdown(results))
    results.write_json(paths[1])
    return paths


def name(results: Results) -> str:
    """Return the stem of a run's files, what_hardware_yyyymm."""
    size = results.size.replace(", ", "-").replace(" ", "")
    month = results.date.replace("-", "")[:6]
    return f"{results.kind}-{size}_{results.hardware['cores']}core_{month}"
