"""The demo's picture of its runs: loss and progress along each delta, by optimizer step.

Each line is the mean over seeds; its band spans the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from drift_fast.pictures import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[Mapping[str, float]]

_STYLES: Final = tuple(zip(COLORS, ("-", "-", "--", "-.", ":"), strict=False))
_PANELS: Final = (
    ("loss", "training loss (log scale)"),
    ("progress_multimodal", "progress λ along expert − multimodal"),
    ("progress_base", "progress λ along expert − text base"),
)


def plot_curves(curves: Mapping[str, Sequence[Curve]], path: Path) -> Path:
    """Draw three panels as a PNG: loss, and progress along either delta.

    `curves` maps a method's label to its curves, one for each seed, with points at the same steps.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or a method's points are at different steps.
    """
    if not curves:
        raise ValueError("no curves to draw")
    figure = new_figure(12.0, 4.4)
    panels = figure.subplots(1, len(_PANELS))
    for axes, (column, title) in zip(panels, _PANELS, strict=True):
        for (label, runs), (color, style) in zip(curves.items(), _STYLES, strict=False):
            _draw(axes, runs, column, label=label, color=color, style=style)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("optimizer step")
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    panels[0].set_ylabel("loss")
    for axes in panels[1:]:
        axes.set_ylabel("λ (1 = all of Δ)")
        axes.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
        axes.axhline(1.0, color="0.8", linewidth=0.8, zorder=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)
    return path


def _draw(
    axes: Axes, runs: Sequence[Curve], column: str, *, label: str, color: str, style: str
) -> None:
    steps = [[point["step"] for point in run] for run in runs]
    if any(other != steps[0] for other in steps):
        raise ValueError(f"{label}: the seeds were logged at different steps")
    values = np.array([[point[column] for point in run] for run in runs])
    axes.fill_between(
        steps[0], values.min(axis=0), values.max(axis=0), color=color, alpha=0.18, linewidth=0
    )
    axes.plot(steps[0], values.mean(axis=0), style, color=color, linewidth=1.6, label=label)
