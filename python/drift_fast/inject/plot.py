"""Pictures of a run: λ by module with its forecast, and what each optimizer step did."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from drift_fast.errors import DriftError
from drift_fast.inject.predict import USEFUL
from drift_fast.pictures import COLORS, STYLES, new_figure, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The summary of each step that was logged.
History: TypeAlias = Mapping[int, Mapping[str, float]]
Line: TypeAlias = tuple[list[int], list[float]]

PROGRESS, FORECAST = "progress", "predicted_progress"
# What each panel shows beside λ, and what it is called.
PANELS = {
    "loss": "training loss",
    "cosine": "cos(g, Δ)",
    "relative_push": "push ‖c·Δ‖ / ‖g‖",
    "alpha": "α in force",
}
# What is compared with zero, so that a small change does not look large.
FROM_ZERO = ("relative_push", "alpha")


def plot_history(history: History, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw λ of all and by module, and the loss, cos(g, Δ), push and α, as far as they are there.

    Raises:
        DriftError: there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    if not history:
        raise DriftError(
            "there is nothing to draw yet: call summary() between steps, or let the trainer log"
        )
    shown = {key: title for key, title in PANELS.items() if line_of(history, key)[0]}
    figure = new_figure(6.4 + 3.2 * -(-len(shown) // 2), 4.8)
    panels = figure.subplot_mosaic(_mosaic(list(shown)), width_ratios=_widths(len(shown)))
    _draw_progress(panels[PROGRESS], history)
    for key, title in shown.items():
        panels[key].plot(*line_of(history, key), color=COLORS[2], linewidth=1.4)
        panels[key].set_title(title, fontsize=10, loc="left")
        if key in FROM_ZERO:
            panels[key].set_ylim(bottom=min(0.0, panels[key].dataLim.y0))
    for axes in panels.values():
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def modules_of(history: History) -> list[str]:
    """Return the modules that λ is known of, the largest final λ first; kinds are left out.

    A module's name has a dot, as in `self_attn.q_proj`, a kind's has none.
    """
    keys = dict.fromkeys(key for row in history.values() for key in row)
    names = [key.removeprefix("progress/") for key in keys if key.startswith("progress/")]
    modules = [name for name in names if "." in name] or names
    return sorted(modules, key=lambda name: -line_of(history, f"progress/{name}")[1][-1])


def line_of(history: History, key: str) -> Line:
    """Return the steps at which a metric was taken, and its values."""
    points = sorted((step, row[key]) for step, row in history.items() if key in row)
    return [step for step, _ in points], [value for _, value in points]


def _draw_progress(axes: Axes, history: History) -> None:
    """Draw λ; lines that others would cover are wide below narrow ones, and all are in the key."""
    names = modules_of(history)
    for at, name in enumerate(names):
        steps, values = line_of(history, f"progress/{name}")
        color, style = COLORS[1 + at % 6], STYLES[at % 4]
        width = max(1.0, 3.4 - 0.3 * at)
        label = plain(f"{name}  {values[-1]:.3g}")
        axes.plot(steps, values, style, color=color, linewidth=width, label=label)
    for key, style, title in ((PROGRESS, "-", "all"), (FORECAST, ":", "forecast of the end")):
        steps, values = line_of(history, key)
        if steps:
            label = f"{title}  {values[-1]:.3g}"
            axes.plot(steps, values, style, color="black", linewidth=1.6, label=label)
    top = axes.get_ylim()[1]
    axes.axhspan(*USEFUL, color="#009E73", alpha=0.07, linewidth=0, zorder=0)
    axes.set_ylim(min(0.0, axes.dataLim.y0), max(1.5 * USEFUL[0], top))
    title = f"progress λ along Δ (shaded: useful, {USEFUL[0]:g} to {USEFUL[1]:g})"
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _mosaic(keys: list[str]) -> list[Any]:
    """Return λ at the left, over both rows, and the others beside it, two above each other."""
    columns = [(*keys[at : at + 2], *keys[at : at + 2])[:2] for at in range(0, len(keys), 2)]
    return [[PROGRESS, *(column[row] for column in columns)] for row in range(2)]


def _widths(panels: int) -> list[float]:
    return [2.2, *[1.0] * -(-panels // 2)]
