"""An injection is shown in a line, in a notebook and as a picture, from the summaries it kept."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from drift_fast import DriftError, Injection
from drift_fast.inject.plot import plot_history
from drift_fast.inject.telemetry import keep
from support.injection_models import Backbone


def trained(model: Backbone, injection: Injection, steps: int) -> dict[int, dict[str, float]]:
    """Take some steps, and return what the summary of each said."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    said = {}
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        injection.step()
        optimizer.step()
        said[injection.steps] = dict(injection.summary())
    return said


def lines_of(figure: Any) -> dict[str, Any]:
    return {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}


def test_the_summary_of_every_step_is_kept_for_plot(
    model: Backbone, delta: drift_fast.Delta, tmp_path: Path
) -> None:
    with Injection(model, delta, alpha=0.5) as injection:
        with pytest.raises(DriftError, match=r"nothing to draw yet: call summary\(\)"):
            injection.plot()
        said = trained(model, injection, 3)
        assert injection.history == said
        figure = injection.plot(tmp_path / "run.png")
        assert injection.to_pandas()["progress"].tolist() == [
            row["progress"] for row in said.values()
        ]
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")
    total = next(line for label, line in lines_of(figure).items() if label.startswith("all"))
    assert list(total.get_xdata()) == [1, 2, 3]
    assert list(total.get_ydata()) == [row["progress"] for row in said.values()]
    # After the attachment too.
    assert injection.plot().axes


def test_no_line_is_hidden_by_one_of_the_same_looks() -> None:
    names = [f"self_attn.{at}_proj" for at in range(12)]
    history = {step: {f"progress/{name}": 0.1 * step for name in names} for step in (1, 2)}
    figure = plot_history({step: row | {"progress": 0.1 * step} for step, row in history.items()})
    drawn = [line for line in figure.axes[0].get_lines() if "_proj" in str(line.get_label())]
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == len(names)
    assert sorted(label.split()[0] for label in lines_of(figure) if "_proj" in label) == (
        sorted(names)
    )


def test_a_notebook_shows_modules_and_the_last_progress(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    with Injection(model, delta, alpha=0.5) as injection:
        assert "self_attn.q_proj" in injection._repr_html_()
        last = trained(model, injection, 2)[2]
        html = injection._repr_html_()
        assert f"{last['progress/self_attn.q_proj']:.3g}" in html
        assert repr(injection).startswith(f"Injection({len(injection.targets)} parameters, ")
        assert len(repr(injection)) < 120
    assert "self_attn.q_proj" in injection._repr_html_()


def test_a_long_run_keeps_a_bounded_history_from_its_first_step_to_its_last() -> None:
    history: dict[int, dict[str, float]] = {}
    for step in range(1, 10_001):
        keep(history, step, {"progress": step / 10_000})
    assert 500 < len(history) <= 1024
    assert min(history) == 1
    assert max(history) == 10_000


def test_a_run_from_the_start_begins_a_history_of_its_own() -> None:
    history = {7: {"progress": 0.5}}
    keep(history, 1, {"progress": 0.0})
    assert history == {1: {"progress": 0.0}}


def test_without_matplotlib_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = builtins.__import__

    def absent(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'drift-fast\[plot\]'"):
        plot_history({1: {"progress": 0.1}})
