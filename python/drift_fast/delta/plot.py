"""Pictures of a delta, drawn or as text: where two models differ, and by how much."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from drift_fast.delta.statistics import Statistics
from drift_fast.pictures import Grid, draw_grid, new_figure, save
from drift_fast.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Column of the statistics, what a picture calls it, and its colors.
HEAT_MAPS = (
    ("relative", "‖Δ‖ / ‖W multimodal‖", "viridis"),
    ("cosine", "cos(W reason, W multimodal)", "cividis"),
)
# From the least to the largest value, and how many layers stand in a column.
_SHADES = "▁▂▃▄▅▆▇█"
_ABREAST = 32


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


def heat_map(stats: Statistics) -> list[Table]:
    """Return ‖Δ‖/‖W_multimodal‖ over modules × layers as a table of shades, a character a layer.

    Scale and outliers are those of the picture. None for less than two layers.
    """
    grid = grid_of(stats, "relative")
    if len(grid.layers) < 2:
        return []
    low, high, remark = grid.scale()
    last = len(_SHADES) - 1

    def shade(value: float) -> str:
        if not math.isfinite(value):
            return "·"
        share = (value - low) / (high - low) if high > low else 0.0
        return _SHADES[round(last * min(1.0, max(0.0, share)))]

    starts = range(0, len(grid.layers), _ABREAST)
    spans = [grid.layers[start : start + _ABREAST] for start in starts]
    rows = [
        (
            module,
            *("".join(map(shade, values[start : start + _ABREAST])) for start in starts),
            " to ".join(f"{end:.3g}" for end in (min(finite), max(finite))) if finite else "–",
        )
        for module, values in zip(grid.modules, grid.values, strict=True)
        for finite in [[value for value in values if math.isfinite(value)]]
    ]
    title = f"‖Δ‖/‖W‖ by layer, {_SHADES[0]} {low:.3g} to {_SHADES[-1]} {high:.3g}"
    columns = ("", *(f"{span[0]}-{span[-1]}" for span in spans), "least to largest")
    shown = f"{title} ({remark})" if remark else title
    return [Table(columns, rows, "<" + ">" * (len(columns) - 1), shown)]
