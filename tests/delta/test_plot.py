"""Pictures of a delta: the values of every cell, and a color scale that outliers do not stretch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import drift_fast
from drift_fast.delta.plot import heat_map
from drift_fast.delta.statistics import Row, Statistics
from drift_fast.pictures import Grid
from support.synthetic import Pair, stored, write_file


def grid(*values: float) -> Grid:
    return Grid.of({("mlp", layer): value for layer, value in enumerate(values)})


def test_a_figure_is_returned_and_written_where_a_path_is_given(pair: Pair, tmp_path: Path) -> None:
    delta = drift_fast.compute_delta(pair.reasoning, pair.multimodal)
    figure = delta.plot(tmp_path / "delta.png")
    assert (tmp_path / "delta.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")
    for axes, column in zip(figure.axes, ("relative", "cosine"), strict=False):
        (image,) = axes.get_images()
        names = [label.get_text() for label in axes.get_yticklabels()]
        shown = np.asarray(image.get_array())
        for row in delta.stats.by_module_and_layer():
            assert shown[names.index(row.module), row.layer] == getattr(row, column)


def test_one_outlier_does_not_take_the_colors_and_is_said() -> None:
    values = [0.1 + 0.01 * at for at in range(20)]
    low, high, remark = grid(*values, 50.0).scale()
    assert (low, high) == (min(values), max(values))
    assert remark == "1 beyond the colors; all are 0.1 to 50"


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.2, 0.1, 0.4], (0.1, 0.4)),
        # Most are equal, so that no distance says what is far.
        ([0.0] * 9 + [1.0], (0.0, 1.0)),
        ([math.nan, 1.0, math.inf], (1.0, 1.0)),
        ([math.nan], (0.0, 1.0)),
    ],
)
def test_without_outliers_the_scale_has_all_values(
    values: list[float], ends: tuple[float, float]
) -> None:
    assert grid(*values).scale() == (*ends, "")


def test_cells_that_are_not_there_are_left_empty() -> None:
    found = Grid.of({("a", 0): 1.0, ("b", 2): 2.0, ("norm", None): 3.0})
    assert (found.modules, found.layers) == (["a", "b"], [0, 2])
    assert np.array_equal(found.values, [[1.0, math.nan], [math.nan, 2.0]], equal_nan=True)
    assert Grid.of({("norm", None): 3.0}).values == [[3.0]]


def test_a_module_and_a_layer_for_every_tensor_take_no_more_than_a_picture() -> None:
    found = Grid.of({(f"module {at}", at): float(at % 7) for at in range(100_000)})
    assert len(found.modules) * len(found.layers) < 30_000
    assert found.left_out == 100_000 - len(found.modules)
    assert found.scale()[2] == f"{found.left_out} are left out"


def test_a_name_with_a_dollar_is_no_formula(tmp_path: Path) -> None:
    tensors = {"model.layers.0.$\\frac.weight": stored([1.0, 2.0])}
    first = write_file(tmp_path / "a.safetensors", tensors)
    second = write_file(tmp_path / "b.safetensors", {name: stored([1.0, 3.0]) for name in tensors})
    delta = drift_fast.compute_delta(first, second, modules="all")
    assert delta.plot(tmp_path / "delta.png").axes


def measured(relative: list[float], module: str) -> list[Row]:
    """Return rows of one module whose ‖Δ‖/‖W‖ is as given, layer by layer."""
    return [
        Row.of(f"layers.{layer}.{module}.weight", (2, 2), share**2, 1.0, 1.0, 0.0, 0, 0)
        for layer, share in enumerate(relative)
    ]


def test_a_heat_map_of_text_has_a_shade_for_every_layer_of_every_module() -> None:
    rising = [0.1 + 0.02 * layer for layer in range(40)]
    rows = measured(rising, "mlp.up_proj") + measured([0.1] * 39 + [50.0], "self_attn.q_proj")
    (table,) = heat_map(Statistics(rows))
    assert table.columns == ("", "0-31", "32-39", "least to largest")
    up, q = table.rows
    assert up[0] == "mlp.up_proj"
    shades = up[1] + up[2]
    assert len(shades) == 40
    assert list(shades) == sorted(shades)
    assert {shades[0], shades[-1]} == {"▁", "█"}
    # The outlier takes the shades from nobody, and is said.
    assert q[1] + q[2] == "▁" * 39 + "█"
    assert q[-1] == "0.1 to 50"
    assert "1 beyond the colors; all are 0.1 to 50" in table.title
    assert heat_map(Statistics(measured([0.1], "mlp.up_proj"))) == []
