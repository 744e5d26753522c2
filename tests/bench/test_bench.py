"""Whole runs of the benchmark suite, with their aims and reports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drift_fast import DriftError
from drift_fast.bench import (
    aims,
)
from drift_fast.bench import session as session_module
from drift_fast.bench.options import BenchOptions
from drift_fast.bench.pair import Pair
from drift_fast.bench.report import markdown
from drift_fast.bench.results import Results, Row, above_baseline_of
from drift_fast.cli.main import main
from support.bench_runs import LINUX, NO_RIVALS, empty_results
from support.processes import python
from support.synthetic import refused


def reaching(pair: Pair, factor: float) -> Results:
    """Return results that reach every aim `factor` times over."""
    results = empty_results(pair)
    results.size = "1.5B"
    for key, wall in {
        "inside/statistics/xor": 0.9,
        "inside/statistics/ours": 1.0,
        "inside/statistics/tuned": 2.5,
        "inside/delta/xor": 0.9,
        "inside/delta/ours": 1.0,
        "process/statistics/ours": 1.0,
        "process/statistics/tuned": 4.5,
        "process/statistics/plain": 35.0,
        "process/delta/ours": 1.0,
        "process/delta/tuned": 1.8,
        "process/delta/mergekit": 10.0,
        "process/delta/public": 6.0,
        "process/merge/ours": 1.0,
        "process/merge/mergekit": 8.0,
        "cold/read/one after the other": 1.9,
        "cold/read/both at a time": 0.9,
        "cold/statistics/ours": 1.0,
    }.items():
        mine = key.endswith("ours")
        results.rows.append(Row(key, key, walls=[wall if mine else wall * factor]))
    above = int(64e6 / factor)
    results.baseline_nbytes = 10_000_000
    for part in ("statistics", "delta"):
        row = results.row(f"process/{part}/ours")
        assert row is not None
        row.peak_nbytes = results.baseline_nbytes + above
        row.error, row.compared = 1e-6 / factor, 10
    return results


@pytest.mark.parametrize(("factor", "met"), [(1.05, True), (0.95, False)])
def test_every_aim_is_met_or_missed_by_its_own_figures(
    tiny: Pair, tmp_path: Path, factor: float, met: bool
) -> None:
    results = reaching(tiny, factor)
    other = reaching(tiny, factor)
    beside = tmp_path / "other.json"
    row = other.row("process/delta/ours")
    assert row is not None
    assert row.peak_nbytes is not None
    row.peak_nbytes += int(10e6 / factor)
    other.write_json(beside)
    if not met:
        mine = results.row("process/delta/ours")
        assert mine is not None
        mine.wrong = "Δ differs"

    found = aims.evaluate(results, beside)
    assert len(found) == len(aims.AIMS) + 1
    assert [aim["met"] for aim in found] == [met] * len(found)


def test_the_report_holds_every_aim_even_those_not_measured(tiny: Pair) -> None:
    results = empty_results(tiny)
    results.size = "1.5B"
    results.aims = aims.evaluate(results, None)
    report = markdown(results)
    for aim in (*aims.AIMS, "peak memory, difference"):
        text = aim if isinstance(aim, str) else aim.text
        line = next(line for line in report.splitlines() if line.startswith(f"| {text}"))
        assert line.endswith("| not measured |  |")


def test_the_report_begins_with_the_result(tiny: Pair) -> None:
    results = reaching(tiny, 1.0)
    results.nbytes = 5_000_000_000
    for each in results.rows:
        each.cpus = each.walls
    assert markdown(results).splitlines()[2] == (
        "**The pair was read for its statistics in 1 s (5.0 GB/s), 4.5 times as fast as tuned "
        "PyTorch; the pair was turned into Δ in 1 s (5.0 GB/s), 1.8 times as fast as tuned "
        "PyTorch; all of it is right against float64.**"
    )
    row = results.row("process/delta/ours")
    assert row is not None
    row.wrong = "Δ differs"
    assert "WRONG RESULTS: process/delta/ours.**" in markdown(results)
    assert "right against" not in markdown(results).split("## ")[0]


@pytest.mark.slow
def test_without_a_directory_nothing_is_written_where_it_runs(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    only = ["--only", "statistics", "--only", "inside", "--repeats", "1", *NO_RIVALS]
    shared = ["bench", "--size", "tiny", "--directory", str(directory), *only]
    assert main(shared) == 0
    assert "--out results, to keep the report" in capsys.readouterr().out.splitlines()[-1]
    assert main([*shared, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "delta"
    assert not list(tmp_path.iterdir())


def test_a_result_of_something_else_is_no_comparison(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"format_version": 1, "rows": []}')
    with refused(DriftError, path, "expected the JSON of an earlier run"):
        above_baseline_of(path)


def test_a_debug_build_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session_module, "debug_build", True)
    for more in ([], ["--scaling", "1"], ["--trace"]):
        shared = ["--directory", str(tmp_path), "--out", str(tmp_path / "out"), *NO_RIVALS]
        assert main(["bench", "--size", "tiny", *shared, *more]) == 1
        assert "debug build" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_suite_imports_no_torch() -> None:
    code = (
        "import sys, drift_fast.bench, drift_fast.bench.scaling, drift_fast.bench.trace, "
        "drift_fast.bench.inside, drift_fast.bench.chart; "
        "sys.exit(' '.join({'torch', 'transformers', 'matplotlib'} & set(sys.modules)) or None)"
    )
    python(code)


@pytest.fixture
def command(directory: Path, tiny: Pair, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Run `drift-fast bench` on the tiny pair and return where its results lie."""
    out = tmp_path / "results"

    def run(*more: str) -> Path:
        shared = ["bench", "--size", "tiny", "--directory", str(directory), "--out", str(out)]
        assert main([*shared, "--repeats", "1", *more]) == 0
        return out

    yield run
    assert not list(directory.glob("work-*")), "a run left its folder behind"


def test_a_run_without_rivals_leaves_a_table_json_and_a_picture(
    command: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = command("--cold", *NO_RIVALS)

    report = capsys.readouterr().out
    (table,), (stored,), (picture,) = (
        list(out.glob(f"delta-tiny_*core_*.{suffix}")) for suffix in ("md", "json", "png")
    )
    assert table.read_text().strip() == report.strip()
    assert picture.read_bytes().startswith(b"\x89PNG")
    for aim in aims.AIMS:
        assert (f"| {aim.text} |" in report) == (aim.size is None)
    assert "all of it is right against float64." in report.splitlines()[2]
    assert "| tuned PyTorch streaming | left out |" in report
    found = json.loads(stored.read_bytes())
    assert found["command"].startswith("drift-fast bench --size tiny")
    assert {"processor", "cores", "file_system"} <= found["hardware"].keys()
    rows = {row["key"]: row for row in found["rows"]}
    for key in ("process/statistics/ours", "process/delta/ours"):
        assert len(rows[key]["walls"]) == 1
        assert rows[key]["peak_nbytes"] > 0
        assert not rows[key]["wrong"]
    assert rows["process/statistics/ours"]["error"] < 1e-6
    assert rows["process/delta/ours"]["compared"] > 10_000
    assert rows["process/delta/mergekit"]["absent"] == "left out"
    assert {"inside/statistics/xor", "inside/delta/ours", "cold/read/both at a time"} <= set(rows)


def test_only_the_parts_and_settings_that_are_named_run(command: Callable[..., Path]) -> None:
    out = command("--only", "statistics", "--only", "process", *NO_RIVALS)

    (stored,) = out.glob("*.json")
    timed = {row["key"] for row in json.loads(stored.read_bytes())["rows"] if row["walls"]}
    assert timed == {"process/statistics/ours", "process/statistics/xor"}


@pytest.mark.slow
def test_every_rival_runs_and_what_it_computes_is_looked_at(command: Callable[..., Path]) -> None:
    out = command()

    (stored,) = out.glob("*.json")
    rows = {row["key"]: row for row in json.loads(stored.read_bytes())["rows"]}
    for who in ("tuned", "plain"):
        # A sum in float32 may be off by more than is allowed, but not by much on so few values.
        assert rows[f"process/statistics/{who}"]["error"] < 1e-4
    for who in ("ours", "tuned", "plain", "public"):
        row = rows[f"process/delta/{who}"]
        assert not row["absent"]
        assert not row["wrong"]
        assert row["compared"] > 10_000
    assert rows["inside/statistics/tuned"]["walls"]
    assert rows["inside/delta/lean"]["walls"]
    if shutil.which("mergekit-yaml") is None:
        assert rows["process/delta/mergekit"]["absent"] == "mergekit is not installed"


@pytest.mark.slow
def test_scaling_compares_ours_with_the_control_at_every_count(
    command: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = command("--scaling", "1,3")

    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == ["1", "3"]
    (stored,) = out.glob("scaling-tiny_*.json")
    rows = json.loads(stored.read_bytes())["rows"]
    assert {row["key"] for row in rows} == {
        f"inside/{part}/{who}@{threads}"
        for part in ("statistics", "delta")
        for who in ("ours", "xor")
        for threads in (1, 3)
    }
    assert all(row["walls"] for row in rows)
    assert list(out.glob("scaling-tiny_*.png"))


@LINUX
def test_a_trace_leaves_its_samples_and_a_picture(command: Callable[..., Path]) -> None:
    out = command("--trace")

    (table,), (stored,) = out.glob("trace-tiny_*.csv"), out.glob("trace-tiny_*.json")
    header, *lines = table.read_text().splitlines()
    assert header == "command,seconds,resident,anonymous,mapped"
    assert {line.split(",")[0] for line in lines} == {"drift-fast inspect", "drift-fast delta"}
    for line in lines:
        resident, anonymous, mapped = map(int, line.split(",")[2:])
        assert resident == anonymous + mapped
    rows = {row["key"]: row for row in json.loads(stored.read_bytes())["rows"]}
    peak = max(int(line.split(",")[2]) for line in lines)
    assert max(row["peak_nbytes"] for row in rows.values()) >= peak
    assert list(out.glob("trace-tiny_*.png"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"only": ("speed",)}, ("speed", "statistics", "cold")),
        ({"without": ("numpy",)}, ("numpy", "mergekit")),
        ({"threads": 0}, ("positive", "0")),
        ({"repeats": 0}, ("positive", "0")),
    ],
)
def test_options_without_meaning_are_refused(
    options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused(ValueError, *words):
        BenchOptions(**options)


def test_scaling_wants_positive_counts_and_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    with refused(ValueError, "positive", "0"):
        BenchOptions(scaling=(1, 0))
    with refused(ValueError, "choose one"):
        BenchOptions(scaling=(1,), trace=True)
    with pytest.raises(SystemExit):
        main(["bench", "--scaling", "one,two"])
    assert "argument --scaling: scaling must be" in capsys.readouterr().err
