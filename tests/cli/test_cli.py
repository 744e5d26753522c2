"""The command line in scripts and in terminals: streams, statuses, start-up, progress.

Everything runs in a process of its own, since what is printed and how the process ends is what
is tested.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

import drift_fast
from drift_fast import Delta
from support import processes
from support.commands import PROGRAM, drawn_by, rows_of, run, strict, succeeds, without
from support.synthetic import Pair, contents, stored, write_file


def test_delta_writes_what_the_library_writes(pair: Pair, tmp_path: Path) -> None:
    succeeds("delta", pair.reasoning, pair.multimodal, "--out", tmp_path / "cli")
    drift_fast.compute_delta(pair.reasoning, pair.multimodal, tmp_path / "library")
    assert contents(tmp_path / "cli") == contents(tmp_path / "library")


def test_delta_takes_the_options_of_the_library(pair: Pair, tmp_path: Path) -> None:
    succeeds(
        "delta", pair.reasoning, pair.multimodal, "--out", tmp_path / "cli",
        "--modules", "attn,norm", "--layers", "1-1", "--dtype", "float32", "--threads", "2",
    )  # fmt: skip
    drift_fast.compute_delta(
        pair.reasoning,
        pair.multimodal,
        tmp_path / "library",
        modules=("attn", "norm"),
        layers=[1],
        dtype="float32",
    )
    assert contents(tmp_path / "cli") == contents(tmp_path / "library")
    assert Delta.open(tmp_path / "cli").dtype == Delta.open(tmp_path / "library").dtype


def test_inspect_prints_a_table_with_a_row_for_each_module(pair: Pair) -> None:
    result = succeeds("inspect", pair.reasoning, pair.multimodal)
    assert "attn" in result.stdout
    assert "mlp" in result.stdout
    assert "14" in result.stdout, "the number of matched tensors is not in the summary"
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["inspect", "delta"])
def test_json_is_valid_json_and_nothing_else(pair: Pair, out: Path, command: str) -> None:
    options = ["--out", out] if command == "delta" else []
    result = succeeds(command, pair.reasoning, pair.multimodal, "--json", *options)
    rows = rows_of(strict(result.stdout))
    expected = {row.name: row for row in drift_fast.inspect(pair.reasoning, pair.multimodal).stats}
    assert set(rows) == set(expected)
    for name, row in rows.items():
        for key in (
            "delta_norm",
            "reasoning_norm",
            "multimodal_norm",
            "relative",
            "cosine",
            "numel",
            "layer",
            "module",
        ):
            assert row[key] == getattr(expected[name], key)
        assert tuple(row["shape"]) == tuple(expected[name].shape)
    assert result.stderr == ""


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_read(
    pair: Pair, tmp_path: Path
) -> None:
    command = ("delta", pair.reasoning, pair.multimodal, "--out", tmp_path / "delta", "--plot")
    for picture, program, said in (
        (
            "a.png",
            without("matplotlib"),
            "pictures need matplotlib: pip install 'drift-fast[plot]'",
        ),
        ("none/a.png", PROGRAM, "there is no such directory"),
        ("a.xyz", PROGRAM, "expected the ending of a picture"),
    ):
        refused = run(*command, tmp_path / picture, program=program)
        assert refused.returncode == 1
        assert said in refused.stderr
    assert not list(tmp_path.iterdir())
    done = succeeds(*command, tmp_path / "a.png")
    assert f"drawn to {tmp_path / 'a.png'}" in done.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_json_of_undefined_ratios_is_still_valid(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    a = write_file(tmp_path / "a.safetensors", {name: stored([0.0, 0.0])})
    b = write_file(tmp_path / "b.safetensors", {name: stored([0.0, 0.0])})
    assert name in rows_of(strict(run("inspect", a, b, "--json").stdout))


def test_a_name_outside_ascii_is_printed_whatever_the_terminals_encoding(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.größe"
    a = write_file(tmp_path / "a.safetensors", {name: stored([1.0])})
    b = write_file(tmp_path / "b.safetensors", {name: stored([2.0])})
    for encoding in ("ascii", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        for options in ([], ["--json"]):
            result = run("inspect", a, b, "--modules", "all", *options, env=environment)
            assert result.returncode == 0, result.stderr


def test_help_and_version_succeed_on_stdout() -> None:
    for arguments, word in (
        (["--help"], "inspect"),
        (["delta", "--help"], "--modules"),
        (["--version"], drift_fast.__version__),
    ):
        result = succeeds(*arguments)
        assert word in result.stdout
        assert result.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["delta"],
        ["delta", "{a}", "{b}"],
        ["delta", "{a}", "{b}", "--out"],
        ["inspect", "{a}"],
        ["inspect", "{a}", "{b}", "--unknown"],
        ["inspect", "{a}", "{b}", "--threads", "many"],
        ["delta", "{a}", "{b}", "--out", "{out}", "--dtype", "float8"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_two_with_the_usage_on_stderr(
    pair: Pair, out: Path, arguments: list[str]
) -> None:
    filled = [text.format(a=pair.reasoning, b=pair.multimodal, out=out) for text in arguments]
    result = run(*filled)
    assert result.returncode == 2
    assert "usage" in result.stderr.lower()
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [["--modules", "atn"], ["--layers", "3-1"], ["--layers", "x"], ["--threads", "0"]],
    ids=" ".join,
)
def test_a_bad_value_is_status_two_or_one_and_named(
    pair: Pair, out: Path, options: list[str]
) -> None:
    result = run("delta", pair.reasoning, pair.multimodal, "--out", out, *options)
    assert result.returncode in (1, 2)
    assert options[1] in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_a_failure_is_status_one_with_one_message_and_no_traceback(
    pair: Pair, tmp_path: Path
) -> None:
    existing = tmp_path / "existing"
    existing.mkdir()
    (existing / "file").write_text("")
    for arguments, word in (
        (["inspect", tmp_path / "absent", pair.multimodal], "absent"),
        (["inspect", __file__, pair.multimodal], Path(__file__).name),
        (["delta", pair.reasoning, pair.multimodal, "--out", existing], "existing"),
    ):
        for as_json in ([], ["--json"]):
            result = run(*arguments, *as_json)
            assert result.returncode == 1
            assert result.stdout == ""
            assert word in result.stderr
            assert "Traceback" not in result.stderr


def test_a_reader_that_closes_the_pipe_early_gets_no_traceback(pair: Pair) -> None:
    program = f"{sys.executable} -m drift_fast"
    shell = f"{program} inspect {pair.reasoning} {pair.multimodal} --json | head -c 1"
    result = processes.run("bash", "-c", shell, check=False)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_the_same_checkpoint_twice_warns_on_stderr_and_keeps_json_clean(pair: Pair) -> None:
    result = succeeds("inspect", pair.reasoning, pair.reasoning, "--json")
    assert "zero everywhere" in result.stderr
    strict(result.stdout)


def test_overwrite_is_asked_for_by_name(pair: Pair, out: Path) -> None:
    succeeds("delta", pair.reasoning, pair.multimodal, "--out", out)
    result = run("delta", pair.reasoning, pair.multimodal, "--out", out)
    assert result.returncode == 1
    assert "overwrite" in result.stderr
    succeeds("delta", pair.reasoning, pair.multimodal, "--out", out, "--overwrite")


def test_the_output_may_be_the_empty_directory_one_stands_in(pair: Pair, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    succeeds("delta", pair.reasoning, pair.multimodal, "--out", ".", cwd=here)
    assert len(Delta.open(here)) == 14


def test_paths_may_be_relative_and_outside_ascii(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "reasoning").symlink_to(pair.reasoning)
    succeeds("delta", "reasoning", pair.multimodal, "--out", "größe/Δ", cwd=tmp_path)
    assert len(Delta.open(tmp_path / "größe" / "Δ")) == 14


def test_inspect_works_where_torch_cannot_be_imported(pair: Pair) -> None:
    result = run("inspect", pair.reasoning, pair.multimodal, "--json", program=without("torch"))
    assert result.returncode == 0, result.stderr
    assert len(rows_of(strict(result.stdout))) == 14


def test_delta_too_works_where_torch_cannot_be_imported(pair: Pair, out: Path) -> None:
    result = run(
        "delta",
        pair.reasoning,
        pair.multimodal,
        "--out",
        out,
        program=without("torch"),
    )
    assert result.returncode == 0, result.stderr
    assert len(Delta.open(out)) == 14


def test_nothing_heavy_is_imported_to_inspect(pair: Pair) -> None:
    program = [sys.executable, "-X", "importtime", "-m", "drift_fast"]
    result = run("inspect", pair.reasoning, pair.multimodal, program=program)
    imported = {
        line.rsplit("|", 1)[-1].strip().split(".")[0]
        for line in result.stderr.splitlines()
        if "|" in line
    }
    assert "drift_fast" in imported
    assert not imported & {"torch", "transformers", "matplotlib", "huggingface_hub", "pandas"}


def test_a_progress_bar_with_its_rate_appears_on_a_terminal(brief: tuple[Path, Path]) -> None:
    output, drawn = drawn_by("inspect", *brief, "--json")
    strict(output)
    assert "\r" in drawn, "nothing was redrawn in place"
    assert re.search(r"GB/s|MB/s", drawn), drawn[-400:]
    assert re.search(r"\b\d+\s*/\s*8\b", drawn), drawn[-400:]
    assert not re.search(r"\n\s*\n", drawn.replace("\r\n", "\n")), "the bar leaves empty lines"


def test_no_bar_appears_in_a_pipe(brief: tuple[Path, Path]) -> None:
    result = succeeds("inspect", *brief, "--json")
    assert result.stderr == ""
    strict(result.stdout)


def test_a_bar_that_is_not_wanted_is_not_drawn(brief: tuple[Path, Path]) -> None:
    assert drawn_by("inspect", *brief, "--json", "--no-progress-bar")[1] == ""
