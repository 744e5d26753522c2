"""A report has what was measured, shows strangers' names as text, and says what it cannot show."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import drift_fast
from drift_fast import CheckpointError, DriftError, write_report
from support import processes
from support.commands import run, succeeds, without
from support.synthetic import Pair, stored, write_file

pytest.importorskip("plotly")
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"
CHECKPOINTS = Path(drift_fast.__file__).parent / "demo" / "checkpoints"
CSV = "step,metric,value\n"


class Page(HTMLParser):
    """What a browser would see: the elements with their attributes, the text, and the data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.lasttag == "script":
            self.scripts[-1] += data
        elif self.lasttag != "style":
            self.text += data

    def table(self, column: str) -> list[dict[str, Any]]:
        """Return the rows of the table that has a column."""
        for text in self.scripts:
            if text.startswith('{"columns"'):
                data = json.loads(text)
                names = [name for name, _ in data["columns"]]
                if column in names:
                    return [dict(zip(names, row, strict=True)) for row in data["rows"]]
        raise AssertionError(f"no table has a column {column}")


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., Page]:
    """Write a report and read it."""

    def write(*sources: object, **options: Any) -> Page:
        return Page(write_report(tmp_path / "page.html", *map(str, sources), **options))

    return write


def log(path: Path, *rows: tuple[int, str, float]) -> Path:
    path.write_text(CSV + "".join(f"{step},{name},{value}\n" for step, name, value in rows))
    return path


RUN = [
    (step, name, step * factor)
    for step in (10, 20, 30)
    for name, factor in (
        ("loss", -0.01), ("progress", 0.01), ("predicted_progress", 0.012),
        ("progress/self_attn.q_proj", 0.02), ("progress/attn", 0.02), ("cosine", 0.001),
        ("relative_push", 0.01), ("alpha", 0.1),
    )
]  # fmt: skip


# ------------------------------------------------------------------ what it shows


def test_a_delta_has_every_tensor_with_its_statistics(
    pair: Pair, tmp_path: Path, page: Callable[..., Page]
) -> None:
    delta = drift_fast.compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta")
    found = page(tmp_path / "delta")
    rows = {row["tensor"]: row for row in found.table("‖Δ‖/‖W‖")}
    assert list(rows) == delta.names
    for row in delta.stats:
        shown = rows[row.name]
        assert (shown["‖Δ‖"], shown["cosine"]) == (row.delta_norm, row.cosine)
        assert (shown["elements"], shown["layer"]) == (row.numel, row.layer)
    reasons = {row["tensor"]: row["reason"] for row in found.table("reason")}
    assert reasons == dict(delta.coverage.unmatched_multimodal + delta.coverage.unmatched_reasoning)
    assert str(delta.coverage) in found.text
    for source in delta.sources.values():
        assert source["path"] in found.text
        assert source["shards"][0]["sha256_of_samples"] in found.text


def test_heat_maps_have_each_module_of_each_layer(
    pair: Pair, tmp_path: Path, page: Callable[..., Page]
) -> None:
    delta = drift_fast.compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta")
    maps = [text for text in page(tmp_path / "delta").scripts if '"type":"heatmap"' in text]
    assert len(maps) == 2
    for text, column in zip(maps, ("relative", "cosine"), strict=True):
        shown = json.loads(re.search(r'"z":(\[\[.*?\]\])', text)[1])  # type: ignore[index]
        expected = {
            (row.module, row.layer): getattr(row, column)
            for row in delta.stats.by_module_and_layer()
        }
        assert sorted(value for row in shown for value in row) == pytest.approx(
            sorted(expected.values()), rel=1e-12
        )


def test_a_pair_is_checked_and_measured_with_the_options_of_inspect(
    pair: Pair, page: Callable[..., Page]
) -> None:
    found = page(pair.reasoning, pair.multimodal, modules="attn")
    assert drift_fast.check(pair.reasoning, pair.multimodal, modules="attn").headline() in (
        found.text
    )
    expected = drift_fast.inspect(pair.reasoning, pair.multimodal, modules="attn").stats
    assert [row["tensor"] for row in found.table("‖Δ‖/‖W‖")] == [row.name for row in expected]


def test_a_merge_says_what_became_of_each_tensor(tmp_path: Path, page: Callable[..., Page]) -> None:
    sources = CHECKPOINTS / "expert", CHECKPOINTS / "multimodal"
    merged = drift_fast.merge("slerp", *sources, tmp_path / "merged", weight=0.25, modules="attn")
    found = page(tmp_path / "merged")
    rows = {row["tensor"]: row for row in found.table("copied because")}
    assert list(rows) == [row.name for row in merged.tensors]
    for row in merged.tensors:
        shown = rows[row.name]
        assert (shown["weight"], shown["cosine"]) == (row.weight, row.cosine)
        assert shown["copied because"] == row.reason
    assert str(merged) in found.text


def test_a_run_has_its_curves_and_its_last_values(
    tmp_path: Path, page: Callable[..., Page]
) -> None:
    found = page(log(tmp_path / "a.csv", *RUN))
    (row,) = found.table("forecast of λ")
    assert (row["loss"], row["λ"], row["forecast of λ"], row["α"]) == (-0.3, 0.3, 0.36, 3.0)
    drawn = "".join(text for text in found.scripts if '"type":"scatter"' in text)
    # A module has a line of its own, its kind does not repeat it.
    assert drawn.count('"name":"self_attn.q_proj"') == 1
    assert '"name":"attn"' not in drawn
    for title in ("training loss", "cos(g, Δ)", "push", "α in force", "progress λ"):
        assert title in found.text


def test_runs_are_compared_and_one_without_an_injection_has_its_loss(
    tmp_path: Path, page: Callable[..., Page]
) -> None:
    state = {"log_history": [{"step": 5, "loss": 2.5}, {"step": 5, "train_loss": 2.0}]}
    saved = tmp_path / "sft" / "checkpoint-5"
    saved.mkdir(parents=True)
    (saved / "trainer_state.json").write_text(json.dumps(state))
    found = page(log(tmp_path / "a.csv", *RUN), tmp_path / "sft")
    first, second = found.table("forecast of λ")
    assert (first["λ"], second["λ"], second["loss"]) == (0.3, None, 2.5)
    losses = next(text for text in found.scripts if '"y":[2.5]' in text)
    assert losses.count('"x":[') == 2


def test_a_trainers_state_and_its_csv_file_are_the_same_run(
    tmp_path: Path, page: Callable[..., Page]
) -> None:
    steps: dict[int, dict[str, float]] = {}
    for step, name, value in RUN:
        key = name if name == "loss" else f"drift/{name}"
        steps.setdefault(step, {"step": step})[key] = value
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [*steps.values()]}))
    by_csv = page(log(tmp_path / "a.csv", *RUN)).table("forecast of λ")
    by_state = page(tmp_path).table("forecast of λ")
    assert [dict(row, run="") for row in by_csv] == [dict(row, run="") for row in by_state]


def test_steps_logged_twice_are_shown_as_the_last_time_and_said(
    tmp_path: Path, page: Callable[..., Page]
) -> None:
    rows = [(step, "loss", float(step)) for step in (1, 2, 3)] + [(2, "loss", 9.0)]
    found = page(log(tmp_path / "a.csv", *rows))
    assert '"x":[1,2],"y":[1.0,9.0]' in "".join(found.scripts)
    assert "2 steps that were logged more than once" in found.text


def test_the_newest_checkpoint_of_a_directory_is_read(
    tmp_path: Path, page: Callable[..., Page]
) -> None:
    for step in (9, 10):
        saved = tmp_path / f"checkpoint-{step}"
        saved.mkdir()
        rows = [{"step": step, "loss": float(step)}]
        (saved / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    assert page(tmp_path).table("loss")[0]["steps"] == 10


# ------------------------------------------------------------------ whose names it shows


def evil_delta(tmp_path: Path) -> Path:
    """A delta with markup in a tensor's name, in a module's, and in one that has no match."""
    shared = {
        f"model.layers.0.self_attn.q_proj.{EVIL}": stored([1.0, 2.0]),
        f"model.layers.1.{EVIL}.weight": stored([1.0]),
        "model.layers.0.self_attn.q_proj.weight": stored([1.0, 3.0]),
    }
    first = write_file(tmp_path / "a.safetensors", shared)
    second = write_file(tmp_path / "b.safetensors", {**shared, f"visual.{EVIL}": stored([1.0])})
    drift_fast.compute_delta(first, second, tmp_path / "evil", modules="all", rows="index")
    return tmp_path / "evil"


@pytest.mark.filterwarnings("ignore::drift_fast.DriftWarning")
def test_names_of_strangers_are_text(tmp_path: Path, page: Callable[..., Page]) -> None:
    delta = evil_delta(tmp_path)
    folder = tmp_path / "<img src=y onerror=alert(2)>"
    folder.mkdir()
    rows = [*RUN, (30, f"progress/a.{EVIL}".replace(",", ""), 1.0)]
    found = page(delta, log(folder / "run.csv", *rows))
    names = {row["tensor"] for row in found.table("‖Δ‖/‖W‖")}
    assert any(EVIL in name for name in names)
    harmless = {"html", "head", "meta", "title", "style", "script", "body", "h1", "h2", "h3", "p",
                "section", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "button",
                "input", "output", "noscript", "footer"}  # fmt: skip
    assert {tag for tag, _ in found.tags} <= harmless
    assert not [one for _, attributes in found.tags for one in attributes if one.startswith("on")]
    for script in found.scripts[1:]:
        # Of Plotly's data: what is left would be an element in the text of a label.
        assert "<script" not in script
        assert "<img" not in script
    assert "document.title='taken'" not in found.source.split("</style>")[0]


@pytest.mark.filterwarnings("ignore::drift_fast.DriftWarning")
def test_notebooks_show_names_of_strangers_as_text(tmp_path: Path) -> None:
    delta = drift_fast.Delta.open(evil_delta(tmp_path))
    for shown in (delta, delta.stats, delta.coverage):
        html = shown._repr_html_()
        assert "<script" not in html
        assert "<img" not in html
    assert "&lt;script&gt;" in delta.stats._repr_html_()


def test_a_page_may_fetch_nothing(tmp_path: Path, page: Callable[..., Page]) -> None:
    found = page(log(tmp_path / "a.csv", *RUN))
    policy = next(given["content"] for tag, given in found.tags if "http-equiv" in given)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert not [given for _, given in found.tags if {"src", "href"} & given.keys()]


# ------------------------------------------------------------------ what it cannot show


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "found nothing"),
        ("a,b\n1,2\n", "expected the columns step, metric, value, .* found a,b"),
        (CSV, "neither a loss nor progress in this log; log at least once"),
        (CSV + "1,loss,2\n1,loss\n", "line 3: expected step, metric, value, found '1,loss'"),
        (CSV + "1,loss,much\n", "line 2: .* remove the line"),
        (CSV + "1,accuracy,2\n", "neither a loss nor progress"),
        ("\xff", "not a CSV file"),
        (CSV + "1," + "x" * 200_000 + ",1\n", "line 2: expected step"),
        (CSV + f"{'9' * 5_000},loss,1\n", "line 2: expected step"),
    ],
)
def test_a_csv_file_that_is_none_of_a_run_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "run.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DriftError, match=f"(?s)run.csv.*{said}"):
        write_report(tmp_path / "page.html", path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_given_and_does_not_do_is_said(pair: Pair, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for sources in ((), (pair.reasoning,), (pair.reasoning, pair.multimodal, pair.reasoning)):
        with pytest.raises(ValueError, match="or a reasoning and a multimodal checkpoint; found"):
            write_report(page, *sources)
    with pytest.raises(ValueError, match=r"the page to write comes first and ends in \.html"):
        write_report(pair.reasoning, pair.multimodal)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        write_report(tmp_path / "none" / "page.html", pair.reasoning, pair.multimodal)
    with pytest.raises(FileNotFoundError):
        write_report(page, tmp_path / "none.csv")
    with pytest.raises(ValueError, match="modules: only a pair of checkpoints"):
        write_report(page, log(tmp_path / "a.csv", *RUN), modules="attn")
    (tmp_path / "merge.json").write_text('{"format_version": 1}')
    with pytest.raises(CheckpointError, match=r"merge.json: .*merge again"):
        write_report(page, tmp_path)
    assert not page.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", [1]), ("tensors", [{"name": 1}]), ("coverage", {}), ("format_version", 2)],
)
def test_a_merge_json_of_something_else_is_refused(tmp_path: Path, key: str, value: object) -> None:
    content = {"format_version": 1, "method": "linear", "tensors": [], "coverage": {}, "files": [],
               "left_behind": [], "sources": {}, "weight": {"all": 0.5}}  # fmt: skip
    (tmp_path / "merge.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(CheckpointError, match=r"merge.json: .*merge again"):
        write_report(tmp_path / "page.html", tmp_path)


def test_a_trainers_state_may_hold_what_is_no_number(
    tmp_path: Path, page: Callable[..., Page]
) -> None:
    rows = '{"step": 1, "loss": NaN, "grad_norm": NaN}, {"step": 2, "loss": 1, "epoch": 1e999}'
    (tmp_path / "trainer_state.json").write_text(f'{{"log_history": [{rows}]}}')
    assert page(tmp_path).table("loss")[0]["loss"] == 1.0


def test_a_delta_without_statistics_is_named_with_a_remedy(pair: Pair, tmp_path: Path) -> None:
    drift_fast.compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta")
    path = tmp_path / "delta" / "drift.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"statistics": []}))
    with pytest.raises(DriftError, match="compute the delta again: drift-fast delta "):
        write_report(tmp_path / "page.html", tmp_path / "delta")


def test_the_command_writes_a_page_and_names_a_missing_library(tmp_path: Path) -> None:
    csv = log(tmp_path / "a.csv", *RUN)
    page = tmp_path / "page.html"
    missing = run("report", page, csv, program=without("plotly"))
    assert missing.returncode == 1
    assert missing.stderr == ("drift-fast: reports need plotly: pip install 'drift-fast[report]'\n")
    done = succeeds("report", page, csv)
    assert done.stdout == f"next: open {page.as_uri()} in a browser\n"
    assert page.exists()
    assert str(page) in done.stderr


# ------------------------------------------------------------------ in a browser

_CLICKS = """
const click = (at) => document.querySelectorAll(".sortable th button")[at].click();
const column = (at) => [...document.querySelectorAll(".sortable tbody")[0].rows]
  .map((row) => row.cells[at].textContent);
click(0); const names = column(0); click(0); const backwards = column(0);
click(4); const norms = column(4);
const field = document.querySelector("input"); field.value = "Q_PROJ 1";
field.dispatchEvent(new Event("input"));
const wide = document.documentElement.scrollWidth <= innerWidth;
dispatchEvent(new Event("beforeprint"));
const printed = [...document.querySelectorAll(".main-svg")]
  .map((each) => +each.getAttribute("width"));
const found = { printed, wide, names, backwards, norms, filtered: column(0), errors,
  title: document.title, charts: printed.length };
document.body.replaceChildren(Object.assign(document.createElement("pre"),
  { textContent: "FOUND" + JSON.stringify(found) + "END" }));
"""
_WATCH = (
    "<script>const errors = []; addEventListener('error', (e) => errors.push(e.message));"
    "addEventListener('securitypolicyviolation', (e) => errors.push(e.blockedURI));"
    "console.error = console.warn = (...all) => errors.push(all.join(' '));</script>"
)


@pytest.mark.filterwarnings("ignore::drift_fast.DriftWarning")
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_it_opens_sorts_and_filters_in_a_browser(
    pair: Pair, tmp_path: Path, page: Callable[..., Page], width: int
) -> None:
    delta = drift_fast.compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta")
    source = page(tmp_path / "delta", evil_delta(tmp_path), log(tmp_path / "a.csv", *RUN)).source
    watched = source.replace("<style>", f"{_WATCH}<style>", 1)
    probe = tmp_path / "probe.html"
    script = f"<script>addEventListener('load', () => {{ {_CLICKS} }});</script>"
    probe.write_text(watched.replace("</body>", f"{script}</body>"), "utf-8")
    shown = processes.run(
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
        "--virtual-time-budget=4000", probe.as_uri(),
    ).stdout  # fmt: skip
    found = json.loads(re.search("FOUND(.*)END", shown, re.S)[1])  # type: ignore[index]
    assert found["errors"] == []
    assert found["title"] == "drift_fast report"
    assert found["charts"] >= 4
    assert found["wide"], "the page is wider than the window"
    assert set(found["printed"]) == {690}, "a chart does not fit on paper"
    assert sorted(found["names"]) == sorted(delta.names)
    assert found["backwards"] == found["names"][::-1]
    norms = [float(value) for value in found["norms"]]
    assert norms == sorted(norms, reverse=True)
    assert found["filtered"]
    assert all("q_proj" in name and "1" in name for name in found["filtered"])
