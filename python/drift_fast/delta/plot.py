"""Pictures of a delta: where in the network two models differ, and by how much."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from drift_fast.delta.statistics import Statistics
from drift_fast.pictures import Grid, draw_grid, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Column of the statistics, what a picture calls it, and its colors.
HEAT_MAPS = (
    ("relative", "‖Δ‖ / ‖W multimodal‖", "viridis"),
    ("cosine", "cos(W reason, W multimodal)", "cividis"),
)


def plot_statistics(stats: Statistics, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw ‖Δ‖/‖W_multimodal‖ and cos(W_reason, W_multimodal) over layers × modules.

    Weights and biases of one module count together. Tensors outside the layers are not shown;
    without any layers, one column holds all tensors. Outliers do not stretch the colors.

    Raises:
        ImportError: matplotlib is not installed.
    """
    grids = [grid_of(stats, column) for column, _, _ in HEAT_MAPS]
    figure = new_figure(
        max(6.4, 2.6 + 0.3 * len(grids[0].layers)), max(3.6, 2.2 + 0.56 * len(grids[0].modules))
    )
    panels = figure.subplots(len(grids), 1, sharex=True)
    for axes, grid, (_, title, colors) in zip(panels, grids, HEAT_MAPS, strict=True):
        draw_grid(axes, grid, title, colors)
    panels[-1].set_xlabel("layer")
    return save(figure, path)


def grid_of(stats: Statistics, column: str) -> Grid:
    """Return a column of the statistics over layers × modules."""
    rows = stats.by_module_and_layer()
    return Grid.of({(row.module, row.layer): getattr(row, column) for row in rows})
