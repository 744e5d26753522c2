"""Charts of a report, drawn in the browser by Plotly, whose script each page carries.

Owns how heat maps and lines look. Plotly reads a few tags in texts, so names are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from drift_fast.config_files import printable
from drift_fast.inject.plot import (
    FORECAST,
    FROM_ZERO,
    PANELS,
    PROGRESS,
    History,
    line_of,
    modules_of,
)
from drift_fast.inject.predict import USEFUL
from drift_fast.pictures import COLORS, Grid
from drift_fast.report.runs import Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Plotly's names of the line styles, as many as `pictures.STYLES` has.
_DASHES = ("solid", "dash", "dashdot", "dot")
_NAME_WIDTH = 40
_CONFIG = {"responsive": True, "displayModeBar": False}
_LAYOUT: dict[str, Any] = {
    "template": "none",
    "font": {"size": 12},
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    "xaxis": {"automargin": True, "showgrid": False, "zeroline": False},
    "yaxis": {"automargin": True, "zeroline": False},
}
_BELOW = {"orientation": "h", "yref": "container", "y": 0}


def script() -> str:
    """Return Plotly's own script.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("reports need plotly: pip install 'drift-fast[report]'") from error
    text: str = get_plotlyjs()
    return text


def heat_map(grid: Grid, title: str, colors: str) -> str:
    """Return a heat map of layers × modules; nothing where there is no value."""
    from plotly.graph_objects import Figure, Heatmap

    low, high, remark = grid.scale()
    values = [[_number(value) for value in row] for row in grid.values]
    if not any(value is not None for row in values for value in row):
        return ""
    figure = Figure(
        Heatmap(
            z=values,
            x=grid.layers,
            y=[_label(name) for name in grid.modules],
            zmin=low,
            zmax=high,
            colorscale=colors,
            xgap=1,
            ygap=1,
            colorbar={"thickness": 12, "xpad": 4},
            hovertemplate="layer %{x}, %{y}<br><b>%{z:.6g}</b><extra></extra>",
        )
    )
    figure.update_layout(_LAYOUT)
    step = max(1, len(grid.layers) // 16)
    figure.update_xaxes(title="layer", type="category", tickvals=grid.layers[::step])
    figure.update_yaxes(autorange="reversed")
    title = f"{title} ({remark})" if remark else title
    return _html(figure, title, 64 + 26 * len(grid.modules))


def progress(history: History, name: str) -> str:
    """Return λ of all and by module over the steps, with the forecast and the useful band."""
    from plotly.graph_objects import Figure

    figure = Figure()
    for at, module in enumerate(modules_of(history)):
        line = {"color": COLORS[1 + at % 6], "dash": _DASHES[at % 4], "width": 2}
        _add(figure, history, f"progress/{module}", _label(module), line)
    _add(figure, history, PROGRESS, "all", {"color": "black", "width": 3})
    _add(figure, history, FORECAST, "forecast", {"color": "black", "dash": "dot", "width": 2})
    if not figure.data:
        return ""
    low, high = USEFUL
    figure.add_hrect(y0=low, y1=high, fillcolor="#009E73", opacity=0.07, line_width=0)
    most = max(value for trace in figure.data for value in trace.y if value is not None)
    least = min(value for trace in figure.data for value in trace.y if value is not None)
    figure.update_layout(_LAYOUT, hovermode="x unified", legend=_BELOW)
    figure.update_yaxes(range=[min(0.0, 1.05 * least), max(1.5 * low, 1.05 * most)])
    figure.update_xaxes(title="optimizer step")
    title = f"progress λ along Δ, {name} (shaded: useful, {low:g} to {high:g})"
    return _html(figure, title, 460)


def panels(runs: Sequence[Run]) -> list[str]:
    """Return a chart of each metric that some run has, with a line for each run."""
    from plotly.graph_objects import Figure

    found = []
    progress_too = {PROGRESS: "progress λ along Δ"} if len(runs) > 1 else {}
    for key, title in (progress_too | PANELS).items():
        figure = Figure()
        for at, run in enumerate(runs):
            line = {"color": COLORS[at % 7], "dash": _DASHES[at % 4], "width": 2}
            _add(figure, run.history, key, _label(run.name), line)
        if not figure.data:
            continue
        figure.update_layout(_LAYOUT, showlegend=len(runs) > 1, legend=_BELOW)
        figure.update_xaxes(title="optimizer step")
        if key in FROM_ZERO:
            figure.update_yaxes(rangemode="tozero")
        found.append(_html(figure, title, 270))
    return found


def _add(figure: Figure, history: History, key: str, name: str, line: dict[str, Any]) -> None:
    steps, values = line_of(history, key)
    if steps:
        mode = "lines" if len(steps) > 40 else "lines+markers"
        shown = [_number(value) for value in values]
        figure.add_scatter(x=steps, y=shown, name=name, line=line, mode=mode, marker={"size": 4})


def _html(figure: Figure, title: str, height: int) -> str:
    text: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config=_CONFIG, default_height=f"{height}px"
    )
    # A title in the chart would be cut off where the page is narrow.
    return f'<div class="chart"><h3>{escape(title)}</h3>{text}</div>'


def _label(name: str) -> str:
    return escape(printable(name, _NAME_WIDTH), quote=False)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
