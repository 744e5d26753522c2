"""Figures of Matplotlib, an optional dependency that is loaded when a picture is drawn.

Owns how a figure is made, heat maps of layers × modules, and where lines get their colors from:
Okabe and Ito's, which people with any color vision can distinguish, and line styles as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from drift_fast.paths import local_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
# Values that are farther from the quartiles than so many times their distance are outliers.
_FAR = 3.0
# More than any model has, and what a picture of this size still shows.
_MODULES, _LAYERS = 96, 256
_LARGEST = 40.0


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that a notebook shows, of a size in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        # Not pyplot: no global state, and no window system is looked for.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'drift-fast[plot]'") from error
    size = min(width, _LARGEST), min(height, _LARGEST)
    figure = Figure(figsize=size, dpi=150, layout="constrained")

    def as_png() -> bytes:
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()

    # IPython knows figures of pyplot only.
    figure._repr_png_ = as_png  # type: ignore[attr-defined]
    return figure


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a picture that could not be written, before the work that it is to show.

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: there is no directory to write to.
        ValueError: a format that it does not draw.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    target = local_path(path)
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: there is no such directory to write to")
    if target.suffix[1:].lower() not in {"", *known}:
        raise ValueError(f"{target}: expected the ending of a picture, {', '.join(sorted(known))}")


def save(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write a figure where a path is given, in the format of its ending, and return it."""
    if path is not None:
        target = local_path(path)
        figure.savefig(target, format=None if target.suffix else "png")
    return figure


@dataclass(frozen=True)
class Grid:
    """Values over layers × modules, NaN where there is none.

    A file of unknown origin may have a module and a layer for every tensor. No more than a picture
    can show are kept, the first ones; `left_out` counts the others.
    """

    modules: list[str]
    layers: list[int]
    values: list[list[float]]
    left_out: int = 0

    @classmethod
    def of(cls, cells: Mapping[tuple[str, int | None], float]) -> Grid:
        """Return the values by module and layer; those outside the layers only where all are."""
        within = {at: value for at, value in cells.items() if at[1] is not None} or cells
        modules = list(dict.fromkeys(module for module, _ in within))[:_MODULES]
        layers = sorted({layer or 0 for _, layer in within})[:_LAYERS]
        found = {(module, layer or 0): value for (module, layer), value in within.items()}
        values = [[found.get((module, layer), math.nan) for layer in layers] for module in modules]
        shown = set(modules), set(layers)
        kept = sum(module in shown[0] and layer in shown[1] for module, layer in found)
        return cls(modules, layers, values, len(found) - kept)

    def scale(self) -> tuple[float, float, str]:
        """Return the ends of a color scale that outliers do not stretch, and what to say of these.

        The ends are the least and the largest value of those that are at most three times the
        distance of the quartiles away from the nearer quartile.
        """
        finite = sorted(value for row in self.values for value in row if math.isfinite(value))
        if not finite:
            return 0.0, 1.0, ""
        low, high = finite[len(finite) // 4], finite[3 * len(finite) // 4]
        reach = _FAR * (high - low) or math.inf
        near = [value for value in finite if low - reach <= value <= high + reach]
        beyond = len(finite) - len(near)
        remarks = [f"{self.left_out} are left out"] if self.left_out else []
        if beyond:
            all_of_them = f"all are {finite[0]:.3g} to {finite[-1]:.3g}"
            remarks += [f"{beyond} beyond the colors", all_of_them]
        return near[0], near[-1], "; ".join(remarks)


def draw_grid(axes: Axes, grid: Grid, title: str, colors: str) -> None:
    """Draw a heat map of layers × modules, with a color bar."""
    low, high, remark = grid.scale()
    image = axes.imshow(
        grid.values, aspect="auto", cmap=colors, interpolation="nearest", vmin=low, vmax=high
    )
    axes.set_title(f"{title} ({remark})" if remark else title, fontsize=10, loc="left")
    # A name of a file may have a $, which would begin a formula.
    axes.set_yticks(range(len(grid.modules)), [plain(name) for name in grid.modules], fontsize=8)
    step = max(1, len(grid.layers) // 16)
    axes.set_xticks(range(0, len(grid.layers), step), [str(at) for at in grid.layers[::step]])
    axes.tick_params(length=0)
    extend = "both" if remark else "neither"
    axes.figure.colorbar(image, ax=axes, pad=0.02, extend=extend)


def plain(text: str) -> str:
    """Return a text of unknown origin as Matplotlib draws it, without formulas."""
    return text.replace("$", r"\$")
