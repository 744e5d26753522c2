"""The notebook runs from its first cell to its last, and every result in it is shown."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def run(source: str, names: dict[str, Any]) -> object:
    """Run a cell; return the value of the expression at its end."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::drift_fast.DriftWarning")
def test_the_notebook_runs_and_shows_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("accelerate", "transformers", "matplotlib", "plotly", "pandas"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = []
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        assert not cell.get("outputs"), "clear the outputs before committing"
        if cell["cell_type"] == "code":
            result = run("".join(cell["source"]), names)
            ways = "_repr_html_", "_repr_png_"
            shown += [getattr(result, way)() for way in ways if hasattr(result, way)]
    assert len(shown) >= 7
    assert sum(isinstance(one, bytes) for one in shown) == 2
    progress = names["injection"].summary()["progress"]
    assert 0.1 < progress < 0.7
    page = (tmp_path / "quickstart.html").read_text("utf-8")
    for part in ("Δ delta", "Merge merged", "Training run metrics.csv"):
        assert f"<h2>{part}</h2>" in page
