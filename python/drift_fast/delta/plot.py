"""Pictures of a delta: where in the network two models differ, and by how much."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_fast.delta.statistics import Row, Statistics
from drift_fast.paths import local_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_statistics(stats: Statistics, path: str | os.PathLike[str]) -> Path:
    """Draw ‖Δ‖/‖W_multimodal‖ and cos(W_reason, W_multimodal) over layers × modules, as a PNG.

    Weights and biases of one module count together. Tensors outside the layers are not shown;
    without any layers, one column holds all tensors.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_class = _figure_class()
    rows = [row for row in stats.by_module_and_layer() if row.layer is not None] or list(
        stats.by_module()
    )
    modules = list(dict.fromkeys(row.module for row in rows))
    layers = sorted({row.layer for row in rows if row.layer is not None}) or [0]
    cells = {(row.module, row.layer or 0): row for row in rows}
    width = max(6.4, 2.6 + 0.3 * len(layers))
    height = max(3.6, 2.2 + 0.56 * len(modules))
    figure = figure_class(figsize=(width, height), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    _heat_map(figure, top, cells, modules, layers, "relative", "‖Δ‖ / ‖W multimodal‖", "viridis")
    _heat_map(
        figure, bottom, cells, modules, layers, "cosine", "cos(W reason, W multimodal)", "cividis"
    )
    bottom.set_xlabel("layer")
    target = local_path(path)
    figure.savefig(target)
    return target


def _heat_map(
    figure: Figure,
    axes: Axes,
    cells: dict[tuple[str, int], Row],
    modules: list[str],
    layers: list[int],
    column: str,
    title: str,
    colors: str,
) -> None:
    values = [
        [
            getattr(cells[module, layer], column) if (module, layer) in cells else math.nan
            for layer in layers
        ]
        for module in modules
    ]
    image = axes.imshow(values, aspect="auto", cmap=colors, interpolation="nearest")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_yticks(range(len(modules)), modules, fontsize=8)
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, pad=0.02)


def _figure_class() -> Any:
    try:
        # Not pyplot: no global state, and no window system is looked for.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'drift-fast[plot]'") from error
    return Figure
