"""Flags are made from the options of a command, and `--config` sets them from a file."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from drift_fast.bench.options import BenchOptions
from drift_fast.cli.setup import SetupOptions
from drift_fast.delta.options import DeltaOptions, InspectOptions
from drift_fast.merging.config import MergeConfig
from drift_fast.options import Options, about_of
from drift_fast.planner.options import PlanOptions
from drift_fast.preflight.options import CheckOptions
from drift_fast.protection.options import ProtectOptions
from support.commands import rows_of, run, strict, succeeds
from support.synthetic import Pair


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("delta", DeltaOptions),
        ("inspect", InspectOptions),
        ("check", CheckOptions),
        ("merge", MergeConfig),
        ("protect", ProtectOptions),
        ("plan", PlanOptions),
        ("bench", BenchOptions),
        ("setup", SetupOptions),
    ],
)
def test_every_option_of_a_command_is_a_flag_with_its_help(
    command: str, options: type[Options]
) -> None:
    environment = {**os.environ, "COLUMNS": "1000"}
    shown = succeeds(command, "--help", env=environment).stdout
    for each in fields(options):
        if about_of(each).in_file:
            assert f"--{each.name.replace('_', '-')}" in shown
            assert about_of(each).help in shown


def test_a_dtype_that_is_gone_says_what_to_write(pair: Pair, out: Path) -> None:
    arguments = ("delta", pair.reasoning, pair.multimodal, "--out", out)
    result = run(*arguments, "--dtype", "float8_e4m3")
    assert result.returncode == 2
    assert "storing Δ as float8_e4m3 is gone" in result.stderr
    assert "int8" in result.stderr


@pytest.mark.parametrize("section", [True, False], ids=["in a section", "at the top"])
@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_configuration_file_sets_options_and_flags_win(
    pair: Pair, tmp_path: Path, section: bool, ending: str
) -> None:
    pytest.importorskip("yaml")
    values: dict[str, Any] = {"modules": ["attn"], "layers": "0", "strict": False}
    content = {"inspect": values, "delta": {"dtype": "float32"}} if section else values
    path = tmp_path / f"drift.{ending}"
    # JSON is YAML, too.
    path.write_text(json.dumps(content))
    arguments = ("inspect", pair.reasoning, pair.multimodal, "--json", "--config", path)
    names = set(rows_of(strict(succeeds(*arguments).stdout)))
    assert names
    assert all(".layers.0.self_attn." in name for name in names)
    names = set(rows_of(strict(succeeds(*arguments, "--layers", "1").stdout)))
    assert names
    assert all(".layers.1.self_attn." in name for name in names)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"module": "attn"}, ["'module'", "did you mean 'modules'?"]),
        ({"inspect": {"thread": 2}}, ["'thread'", "did you mean 'threads'?"]),
        ({"inspect": {"singular": 3}}, ["'singular'", "it is gone"]),
        ({"threads": "many"}, ["threads must be an integer", "'many'"]),
        ({"delta": {"threads": 2}}, ["a section 'inspect'", "delta"]),
        ({"inspect": {"threads": 2}, "modules": "attn"}, ["modules", "beside the sections"]),
        ({"inspect": None, "mrege": {"density": 0.2}}, ["mrege", "inspect"]),
        (["attn"], ["a mapping of options"]),
    ],
)
def test_a_configuration_file_that_is_wrong_is_named_with_the_key(
    pair: Pair, tmp_path: Path, content: Any, words: list[str]
) -> None:
    path = tmp_path / "drift.json"
    path.write_text(json.dumps(content))
    result = run("inspect", pair.reasoning, pair.multimodal, "--config", path)
    assert result.returncode in (1, 2)
    for word in [str(path), *words]:
        assert word in result.stderr
