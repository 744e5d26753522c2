"""A delta is written whole or not at all, and nothing of anybody else's is lost."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import drift_fast
from drift_fast import Delta, compute_delta
from support.deltas import assert_same_delta
from support.synthetic import (
    Pair,
    contents,
    everything_under,
    refused,
    stored,
    write_checkpoint,
)


def test_an_existing_directory_is_refused_and_left_as_it_was(pair: Pair, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("three years of work")
    for overwrite in (False, True):
        with refused((FileExistsError, drift_fast.DriftError), out.name):
            compute_delta(pair.reasoning, pair.multimodal, out, overwrite=overwrite)
        assert everything_under(out) == {"thesis.txt"}
    assert everything_under(out.parent) == {"delta", "delta/thesis.txt"}


def test_an_existing_file_is_refused(pair: Pair, out: Path) -> None:
    out.write_text("a file")
    for overwrite in (False, True):
        with refused((FileExistsError, NotADirectoryError), out.name):
            compute_delta(pair.reasoning, pair.multimodal, out, overwrite=overwrite)
    assert out.read_text() == "a file"


def test_an_existing_delta_is_replaced_only_when_asked(
    pair: Pair, sharded_pair: Pair, out: Path
) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out, max_shard_size="200")
    before = contents(out)
    with refused(FileExistsError, out.name, "overwrite"):
        compute_delta(sharded_pair.reasoning, sharded_pair.multimodal, out)
    assert contents(out) == before
    delta = compute_delta(sharded_pair.reasoning, sharded_pair.multimodal, out, overwrite=True)
    assert len(contents(out)) == 2, "a shard of the former delta is still there"
    assert_same_delta(Delta.open(out), delta)
    assert everything_under(out.parent) == {"delta", *(f"delta/{name}" for name in os.listdir(out))}


def test_a_delta_with_a_strangers_file_in_it_is_not_thrown_away(pair: Pair, out: Path) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    (out / "notes.md").write_text("mine")
    with refused((OSError, drift_fast.DriftError), "notes.md"):
        compute_delta(pair.reasoning, pair.multimodal, out, overwrite=True)
    assert (out / "notes.md").read_text() == "mine"
    assert len(Delta.open(out)) == 14


@pytest.mark.parametrize("name", ["delta-mine.safetensors", "delta-00001-of-mine.safetensors"])
def test_a_file_named_much_like_a_shard_is_a_strangers(pair: Pair, out: Path, name: str) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    (out / name).write_text("mine")
    with refused((OSError, drift_fast.DriftError), name):
        compute_delta(pair.reasoning, pair.multimodal, out, overwrite=True)
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("what", ["notes.txt", "notes/deep.txt"])
def test_a_hidden_directory_with_someones_files_is_left_alone(
    pair: Pair, out: Path, what: str
) -> None:
    theirs = out.parent / f".{out.name}.incomplete" / what
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with refused((OSError, drift_fast.DriftError), "notes"):
        compute_delta(pair.reasoning, pair.multimodal, out)
    assert theirs.read_text() == "mine"


def test_a_failed_overwrite_leaves_the_former_delta_whole(
    pair: Pair, tmp_path: Path, out: Path
) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    before = contents(out)
    broken = dict(pair.text)
    name = "model.layers.1.mlp.down_proj.weight"
    values = broken[name].values.copy()
    values[3] = np.nan
    broken[name] = stored(values, "BF16", broken[name].shape)
    with refused(drift_fast.NonFiniteError, name):
        compute_delta(
            write_checkpoint(tmp_path / "broken", broken), pair.multimodal, out, overwrite=True
        )
    assert contents(out) == before
    assert len(Delta.open(out)) == 14


def test_an_empty_directory_and_missing_parents_are_accepted(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "and" / "deep"):
        assert len(compute_delta(pair.reasoning, pair.multimodal, out)) == 14
        assert len(Delta.open(out)) == 14


def test_a_failed_run_removes_the_parents_it_made(pair: Pair, tmp_path: Path) -> None:
    values = np.full((8, 8), np.nan)
    broken = {**pair.text, "model.layers.0.self_attn.q_proj.weight": stored(values)}
    source = write_checkpoint(tmp_path / "broken", broken)
    before = everything_under(tmp_path)
    with refused(drift_fast.NonFiniteError, "q_proj"):
        compute_delta(source, pair.multimodal, tmp_path / "new" / "and" / "deep")
    assert everything_under(tmp_path) == before


def test_the_delta_may_not_replace_one_of_its_own_sources(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "delta"
    compute_delta(pair.reasoning, pair.multimodal, out)
    before = contents(pair.reasoning)
    with pytest.raises((FileExistsError, drift_fast.DriftError)):
        compute_delta(pair.reasoning, pair.multimodal, pair.reasoning, overwrite=True)
    assert contents(pair.reasoning) == before
