"""`write_report`: what a report has of a delta, a pair, a merge and training runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from drift_fast.alignment.coverage import Coverage
from drift_fast.alignment.model_pair import SAME, is_same_source
from drift_fast.config_files import json_text
from drift_fast.delta.compute import inspect
from drift_fast.delta.delta import Delta, delta_at
from drift_fast.delta.options import InspectOptions
from drift_fast.delta.plot import HEAT_MAPS, grid_of
from drift_fast.delta.statistics import Statistics
from drift_fast.errors import AlignmentError
from drift_fast.inject.plot import line_of
from drift_fast.merging import written
from drift_fast.merging.merge import Merged
from drift_fast.names import module_of
from drift_fast.options import takes
from drift_fast.paths import local_path
from drift_fast.pictures import Grid
from drift_fast.preflight.check import check
from drift_fast.preflight.options import CheckOptions
from drift_fast.report import charts
from drift_fast.report.page import Section, heading, note, page, sortable
from drift_fast.report.runs import Run, log_of, read_run
from drift_fast.tables import Table, to_html

if TYPE_CHECKING:
    from drift_fast._keywords import InspectKeywords

_SOURCES = "a delta, the directory of a merge, the CSV file or the checkpoint of a training run"
# Metrics of a run, and what its table calls them.
_METRICS = {
    "loss": "loss",
    "progress": "λ",
    "predicted_progress": "forecast of λ",
    "cosine": "cos(g, Δ)",
    "relative_push": "push",
    "alpha": "α",
}


@takes(InspectOptions)
def write_report(
    out: str | os.PathLike[str],
    *sources: str | os.PathLike[str],
    **options: Unpack[InspectKeywords],
) -> Path:
    """Write one HTML file about deltas, merges, training runs, or a pair of checkpoints.

    The page needs no other file and no network. A source is a delta (directory, Hub id or URL); the
    directory of a merge; a CSV file of `attach(csv=…)` or `Injection.write_csv`; a Trainer's
    checkpoint, its trainer_state.json, or the directory of its checkpoints. Several runs are
    compared. Two checkpoints, the reasoning and the multimodal one, are checked and measured, with
    the options of `inspect`, which go with such a pair only.

    Raises:
        FileNotFoundError: a source that is not there.
        CheckpointError, DriftError: a source that is not valid, or has nothing to show; one model
            given as both.
        ImportError: plotly is not installed.
        ValueError: no source, or one checkpoint without another; `out` that is not *.html.
        Exception: as `inspect`, of a pair.
    """
    target = local_path(out)
    if target.suffix != ".html":
        raise ValueError(f"{target}: the page to write comes first and ends in .html")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: there is no such directory to write to")
    # Before anything is read, since a pair may take minutes.
    script = charts.script()
    sections, runs, models = [], [], []
    for source in sources:
        path = local_path(source)
        if (path / written.DESCRIPTION).is_file():
            sections += _of_merge(written.open_merged(path), str(source))
        elif (log := log_of(path)) is not None:
            runs.append(read_run(log, str(source)))
        elif (delta := delta_at(source)) is not None:
            sections += _of_delta(delta, str(source))
        else:
            models.append(source)
    given = InspectOptions.from_keywords(options, function="write_report")
    if len(models) not in (0, 2) or not sources:
        found = f"found {' and '.join(map(str, models))}" if models else "found nothing"
        raise ValueError(
            f"expected {_SOURCES}, or a reasoning and a multimodal checkpoint; {found}"
        )
    if models and is_same_source(*models):
        raise AlignmentError(SAME)
    if models:
        sections += _of_pair(models[0], models[1], given)
    elif options:
        raise ValueError(f"{', '.join(options)}: only a pair of checkpoints has such options")
    sections += _of_runs(runs) if runs else []
    text = page("drift_fast report", sections, script)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    unfinished.replace(target)
    return target


def _of_delta(delta: Delta, name: str) -> list[Section]:
    facts = [delta.headline(), *([str(delta.compression)] if delta.compression else [])]
    return [
        Section(f"Δ {name}", [to_html(facts), *_statistics(delta.stats)]),
        _coverage(delta.coverage, _short(name)),
        _sources(delta.sources, _short(name)),
    ]


def _of_pair(reasoning: Any, multimodal: Any, given: InspectOptions) -> list[Section]:
    both = {name: getattr(given, name) for name in CheckOptions.names() if name in given.names()}
    preflight = check(reasoning, multimodal, **both)
    found = inspect(reasoning, multimodal, **given.to_dict())
    name = f"{_short(reasoning)} − {_short(multimodal)}"
    verdict, *facts = preflight.blocks()[::-1]
    return [
        Section(
            f"Pair {reasoning} − {multimodal}", [to_html([verdict]), *_statistics(found.stats)]
        ),
        Section("Do they fit each other?", [to_html([verdict, *facts[::-1]])]),
        _coverage(found.coverage, name),
        _sources(found.sources, name),
    ]


def _statistics(stats: Statistics) -> list[str]:
    total = Statistics([*stats.by_module(), stats.total])
    columns = {
        "tensor": "text", "module": "text", "layer": "count", "elements": "count",
        "‖Δ‖": "number", "‖Δ‖/‖W‖": "number", "cosine": "number", "largest |Δ|": "number",
        "rounding": "number",
    }  # fmt: skip
    rows = (
        (
            row.name, row.module, row.layer, row.numel, row.delta_norm, row.relative, row.cosine,
            row.max_abs, row.rounding_share,
        )
        for row in stats
    )  # fmt: skip
    return [
        *(charts.heat_map(grid_of(stats, each), title, how) for each, title, how in HEAT_MAPS),
        heading("By module"),
        to_html(total.blocks()),
        heading("Tensors"),
        note("rounding is the share of ‖Δ‖ that is rounding of the sources"),
        sortable(columns, rows, "tensors, such as q_proj 12"),
    ]


def _of_merge(merged: Merged, name: str) -> list[Section]:
    columns = {
        "tensor": "text", "kind": "text", "layer": "count", "weight": "number", "cosine": "number",
        "rounding / shift": "number", "copied because": "text",
    }  # fmt: skip
    rows = (
        (row.name, row.kind, row.layer, row.weight, row.cosine, row.rounding_share, row.reason)
        for row in merged.tensors
    )
    # The largest tensor of a module, which is its matrix, is drawn.
    largest = sorted((row for row in merged.tensors if row.sources), key=lambda row: row.merged)
    maps = []
    for column, title, colors in (
        ("cosine", "cos(reasoning, multimodal) of what was merged", "cividis"),
        ("rounding_share", "‖rounding‖ / ‖shift‖", "viridis"),
    ):
        values = {
            (module_of(row.name), row.layer): value
            for row in largest
            if (value := getattr(row, column)) is not None
        }
        in_order = dict.fromkeys((module_of(row.name), row.layer) for row in merged.tensors)
        grid = Grid.of({at: values[at] for at in in_order if at in values})
        maps.append(charts.heat_map(grid, title, colors))
    return [
        Section(f"Merge {name}", [
            to_html(merged.blocks()), *maps, heading("Tensors"),
            sortable(columns, rows, "tensors, such as q_proj 12"),
        ]),
        _coverage(merged.coverage, _short(name)),
        _sources(merged.sources, _short(name)),
    ]  # fmt: skip


def _of_runs(runs: Sequence[Run]) -> list[Section]:
    columns = {"run": "text", "steps": "count"} | dict.fromkeys(_METRICS.values(), "number")
    rows = []
    for run in runs:
        lines = [line_of(run.history, key)[1] for key in _METRICS]
        rows.append((run.name, max(run.history), *(line[-1] if line else None for line in lines)))
    each = [charts.progress(run.history, run.name) for run in runs]
    panels = ['<div class="panels">', *charts.panels(runs), "</div>"]
    title = f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs"
    return [
        Section(title, [
            note("the last value of each metric that was logged"),
            sortable(columns, rows, "runs"),
            *(note(f"{run.name}: {run.remark}") for run in runs if run.remark),
            *(each + panels if len(runs) == 1 else panels + each),
        ])
    ]  # fmt: skip


def _short(source: Any) -> str:
    """Return the end of a path or an id, which is enough below the heading that has it whole."""
    return str(source).rstrip("/").rpartition("/")[2]


def _coverage(coverage: Coverage, name: str) -> Section:
    rows = [
        (row["reasoning"] or row["multimodal"], "reasoning" if row["reasoning"] else "multimodal",
         row["reason"])
        for row in coverage.records()
        if row["reason"] is not None
    ]  # fmt: skip
    columns = {"tensor": "text", "checkpoint": "text", "reason": "text"}
    every = [heading("Without a match"), sortable(columns, rows, "tensors")] if rows else []
    return Section(f"Coverage of {name}", [to_html(coverage.blocks()), *every])


def _sources(sources: Any, name: str) -> Section:
    """Return where everything comes from; a sum of deltas is told as its description has it."""
    rows = []
    for role, source in sources.items():
        files = source.get("shards") if isinstance(source, dict) else None
        if not isinstance(files, list) or not all(isinstance(each, dict) for each in files):
            continue
        where = source.get("repo") or source.get("url") or source.get("path")
        at = f"@{source['revision']}" if source.get("revision") else ""
        for each in files:
            digest = next((v for k, v in each.items() if k.startswith("sha256")), "")
            cells = role, f"{where}{at}", each.get("file"), each.get("nbytes"), digest
            rows.append([str(cell) for cell in cells])
    columns = ("", "source", "file", "bytes", "sha256 of samples or header")
    told = Table(columns, rows, "<<<>") if rows else json_text(sources).decode()
    return Section(f"Sources of {name}", [to_html([told])])
