"""The results of the demo's runs: means over seeds, and differences seed by seed, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from drift_fast.tables import render

if TYPE_CHECKING:
    from drift_fast.demo.experiment import Outcome

_MEASURES: Final = ("answers_right", "digits_read")


def summarize(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Return the mean and standard deviation over seeds of each measure, for each method.

    The deviation is the sample's (n - 1), and 0 for a single seed. `progress_*` is the mean of the
    progress along either delta at the last step, for methods that train.
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
    """Return the differences of each other method from `baseline`, seed by seed."""
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
    results = [
        (
            labels[method],
            f"{row['answers_right']:.3f} ± {row['answers_right_std']:.3f}",
            f"{row['digits_read']:.3f} ± {row['digits_read_std']:.3f}",
            f"{row['progress_multimodal']:.2f}" if "progress_multimodal" in row else "",
            f"{row['progress_base']:.2f}" if "progress_base" in row else "",
        )
        for method, row in summary.items()
    ]
    columns = ("", "answers right", "digits read right", "λ exp−mm", "λ exp−base")
    lines = [
        f"Held-out images, {seeds} fine-tuning sets, mean ± standard deviation over them",
        render(columns, results, "<>>>>"),
        "λ is how far the weights moved along a Δ: 1 means by all of it",
    ]
    for baseline, rows in paired.items():
        differences = [
            (labels[method], *(_difference(row[measure], seeds) for measure in _MEASURES))
            for method, row in rows.items()
        ]
        lines += [
            "",
            f"Paired difference from {labels[baseline]} (better in how many of {seeds})",
            render(columns[:3], differences, "<>>"),
        ]
    return "\n".join(lines)


def _difference(cell: Mapping[str, Any], seeds: int) -> str:
    return f"{cell['mean']:+.3f} ± {cell['std']:.3f} ({cell['better_in']}/{seeds})"


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
