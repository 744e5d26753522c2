"""Tables are plain text, whatever they hold and wherever they are printed."""

from __future__ import annotations

import pytest

from drift_fast.tables import render


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
