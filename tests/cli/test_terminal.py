"""What is printed: color on a terminal alone, and nothing that is cut, however wide it is."""

from __future__ import annotations

import re

import pytest

from drift_fast.cli.output import remark, show
from drift_fast.tables import Table
from support.commands import PROGRAM, drawn_by
from support.synthetic import Pair

LONG = "a_module_with_a_name.of_many_words"
NUMBERS = [f"{10**digits + 7:,}" for digits in range(3, 13)]
TABLE = Table(
    ("", *(f"column {at}" for at in range(len(NUMBERS))), "source"),
    [("q_proj", *NUMBERS, "where it comes from, in words"), (LONG, *NUMBERS, "the same")],
    "<" + ">" * len(NUMBERS),
)
ESCAPE = "\x1b["


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def test_a_pipe_gets_whole_lines_without_color(capsys: pytest.CaptureFixture[str]) -> None:
    show("verdict: the models fit each other", TABLE)
    printed = capsys.readouterr().out
    assert printed == f"verdict: the models fit each other\n\n{TABLE}\n"
    assert ESCAPE not in printed


@pytest.mark.parametrize(
    ("line", "style"),
    [
        ("verdict: the models fit each other, 2 notes", "1;32"),
        ("verdict: the run does not fit, λ 0.4", "1;31"),
        ("warning: λ is low", "33"),
        ("next: drift-fast delta a b --out delta", "1;36"),
    ],
)
def test_color_that_is_forced_is_there_and_color_that_is_not_wanted_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, style: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    show(line)
    printed = capsys.readouterr().out
    assert f"{ESCAPE}{style}m" in printed
    assert re.sub(r"\x1b\[[\d;]*m", "", printed) == f"{line}\n"
    monkeypatch.setenv("NO_COLOR", "1")
    show(line, TABLE)
    remark("warning: said on standard error")
    captured = capsys.readouterr()
    assert ESCAPE not in captured.out + captured.err


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_no_width_cuts_a_name_or_a_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    show(TABLE)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    words = " ".join(lines).split()
    assert all(words.count(number) == len(TABLE.rows) for number in NUMBERS)
    assert "…" not in "".join(lines)
    # A name that is broken goes on in the next line of its column, here the first.
    begins = [line[: line.find("  ")] if "  " in line else line for line in lines]
    assert LONG in "".join(begins)
    assert "column 9" in " ".join(lines)


def test_a_command_stays_in_one_line_to_be_copied(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    show("next: drift-fast delta " + "path/" * 30)
    assert capsys.readouterr().out.count("\n") == 1


def test_forced_color_in_a_pipe_has_no_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    show(TABLE)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(TABLE.rows)


def test_inspect_is_in_color_on_a_terminal(pair: Pair) -> None:
    # Its output goes where its errors are drawn.
    program = ["bash", "-c", 'exec "$0" "$@" >&2', *PROGRAM]
    _, drawn = drawn_by("inspect", pair.reasoning, pair.multimodal, program=program)
    assert re.search(r"\x1b\[3\dm[▁▂▃▄▅▆▇█]", drawn), "the heat map has no color"
    assert f"{ESCAPE}1;36mnext" in drawn
