"""Tables are plain text, whatever they hold and wherever they are printed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import drift_fast
from drift_fast.tables import Block, Shown, Table, render
from support.synthetic import Pair


def test_columns_are_aligned_as_they_are_told() -> None:
    text = render(("name", "numel", ""), [("attn", "1,024", "a note"), ("mlp", "7", "")], "<>")
    assert text.split("\n") == [
        "name  numel",
        "attn  1,024  a note",
        "mlp       7",
    ]


def test_without_a_header_the_first_line_is_the_first_row() -> None:
    assert render(("", ""), [("a", "1"), ("bcd", "2")]) == "a    1\nbcd  2"


@pytest.mark.parametrize("cell", ["[bold]x[/bold]", ":smile:", "[/]", "ΔW ‖Δ‖", "x" * 5_000])
def test_a_cell_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    # What rich goes by to choose colors and a width.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    assert render(("name", ""), [(cell, "end")]) == f"name\n{cell:<4}  end"


def test_wide_characters_take_two_places() -> None:
    assert render(("", ""), [("層", "1"), ("ab", "2")]) == "層  1\nab  2"


class Wall(Shown):
    def headline(self) -> str:
        return "two things"

    def blocks(self) -> list[Block]:
        return ["a <b>text</b>", Table(("name", "n"), [("<i>&", "1")], "<>", "title <u>")]

    def records(self) -> list[dict[str, object]]:
        return [{"name": "x", "n": 1}]


def test_a_result_is_short_in_a_line_whole_in_print_and_escaped_in_a_notebook() -> None:
    wall = Wall()
    assert repr(wall) == "Wall(two things)"
    assert str(wall) == wall.table() == "a <b>text</b>\n\ntitle <u>\n  name  n\n  <i>&  1"
    html = wall._repr_html_()
    for text in ("a &lt;b&gt;text", ">title &lt;u&gt;</caption>", "&lt;i&gt;&amp;</td>"):
        assert text in html
    assert 'text-align:right;white-space:nowrap">1</td>' in html
    assert wall.to_pandas().to_dict("records") == wall.records()


def test_every_result_is_shown_the_same_way(tmp_path: Path) -> None:
    checkpoints = Path(drift_fast.__file__).parent / "demo" / "checkpoints"
    sources = checkpoints / "expert", checkpoints / "multimodal"
    delta = drift_fast.compute_delta(*sources, tmp_path / "delta")
    merged = drift_fast.merge(
        "linear", *sources, tmp_path / "merged", weight=0.5, modules="attn,mlp"
    )
    plan = drift_fast.plan(*sources, steps=10, learning_rate=1e-5)
    found = [drift_fast.inspect(*sources), drift_fast.align(*sources), drift_fast.check(*sources)]
    for result in (delta, delta.stats, delta.coverage, merged, plan, *found):
        assert len(repr(result)) < 300
        assert "\n" not in repr(result)
        html = result._repr_html_()
        assert "<table>" in html or isinstance(result, drift_fast.Alignment)
        assert len(result.to_pandas()) == len(result.records()) > 0


def test_printing_a_delta_that_was_not_computed_reads_no_weights(pair: Pair) -> None:
    delta = drift_fast.compute_delta(pair.reasoning, pair.multimodal)
    for text in (str(delta), delta._repr_html_()):
        assert "14 tensors" in text
    assert delta.peak_nbytes is None, "the statistics were computed"


def test_without_pandas_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        Wall().to_pandas()
