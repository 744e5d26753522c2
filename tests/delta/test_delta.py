"""A delta on disk: what is in its directory, what opens it, and how it is read and saved again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import drift_fast
from drift_fast import Delta, compute_delta, inspect
from drift_fast.delta.allocation import empty_tensor
from drift_fast.progress_bar import Progress
from support.commands import strict
from support.deltas import assert_same_bits, assert_same_delta, bits_of
from support.synthetic import (
    OUTPUT_DTYPES,
    Pair,
    contents,
    everything_under,
    refused,
    round_once,
    write_checkpoint,
    write_pair,
)


def strings_in(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        for key, value in document.items():
            yield key
            yield from strings_in(value)
    elif isinstance(document, list):
        for value in document:
            yield from strings_in(value)
    elif isinstance(document, str):
        yield document


def test_plain_safetensors_opens_the_directory_through_its_index(pair: Pair, out: Path) -> None:
    delta = compute_delta(pair.reasoning, pair.multimodal, out)
    index = strict((out / "delta.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(delta)
    nbytes = 0
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as shard:
            tensor = shard.get_tensor(name)
        nbytes += tensor.nbytes
        assert_same_bits(
            bits_of(tensor),
            pair.expected(name, "BF16"),
            pair.text[pair.source_of(name)],
            pair.vlm[name],
        )
    assert index["metadata"]["total_size"] == nbytes
    files = set(index["weight_map"].values())
    assert everything_under(out) == {*files, "delta.safetensors.index.json", "drift.json"}


def test_max_shard_size_splits_and_a_tensor_larger_than_it_gets_its_own_shard(
    tmp_path: Path,
) -> None:
    pair = write_pair(tmp_path, layers=4, hidden=64, inner=128)
    delta = compute_delta(
        pair.reasoning, pair.multimodal, tmp_path / "delta", max_shard_size="20KB"
    )
    files = sorted(path.name for path in (tmp_path / "delta").glob("*.safetensors"))
    count = len(files)
    assert files == [
        f"delta-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
    ]
    assert count > 4
    held: list[str] = []
    for file in files:
        with safe_open(tmp_path / "delta" / file, "pt") as shard:
            names = list(shard.keys())
            assert len(names) == 1 or sum(shard.get_tensor(name).nbytes for name in names) <= 20_000
        held += names
    assert sorted(held) == sorted(delta)
    for name in delta:
        assert (bits_of(delta[name]) == pair.expected(name, "BF16")).all()


def test_drift_json_holds_what_is_needed_to_know_where_a_delta_came_from(
    pair: Pair, out: Path
) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    document = strict((out / "drift.json").read_text())
    text = set(strings_in(document))
    joined = " ".join(text)
    assert "bfloat16" in text
    assert str(pair.reasoning) in joined
    assert str(pair.multimodal) in joined
    assert "model.safetensors" in joined
    size = (pair.reasoning / "model.safetensors").stat().st_size
    assert str(size) in json.dumps(document)
    assert {
        "model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
    } <= text
    assert any("vision_tower" in string for string in text), "the coverage is not recorded"
    for key in ("format_version", "formula", "alignment", "coverage", "matched", "statistics"):
        assert key in text, f"no {key} in drift.json"
    assert len(document["statistics"]) == 14
    assert "reasoning - multimodal" in document["formula"]
    shards = document["sources"]["reasoning"]["shards"]
    assert [shard["file"] for shard in shards] == ["model.safetensors"]
    assert any("sha256" in key and len(value) == 64 for key, value in shards[0].items())


def test_a_changed_source_has_another_fingerprint(tmp_path: Path) -> None:
    def fingerprints(delta: Any) -> str:
        return json.dumps(delta.sources, default=vars, sort_keys=True)

    pair = write_pair(tmp_path)
    before = fingerprints(compute_delta(pair.reasoning, pair.multimodal))
    again = fingerprints(compute_delta(pair.reasoning, pair.multimodal))
    file = pair.reasoning / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    assert before == again
    assert fingerprints(compute_delta(pair.reasoning, pair.multimodal)) != before


def test_a_delta_opened_again_is_the_delta_that_was_written(sharded_pair: Pair, out: Path) -> None:
    written = compute_delta(
        sharded_pair.reasoning, sharded_pair.multimodal, out, max_shard_size="1KB"
    )
    assert_same_delta(Delta.open(out), written)
    assert_same_delta(Delta.open(str(out)), written)


def test_a_delta_without_out_yields_the_same_tensors_and_writes_nothing(
    pair: Pair, out: Path
) -> None:
    before = everything_under(pair.reasoning.parent)
    lazy = compute_delta(pair.reasoning, pair.multimodal)
    assert everything_under(pair.reasoning.parent) == before
    assert_same_delta(lazy, compute_delta(pair.reasoning, pair.multimodal, out))


@pytest.mark.parametrize("out_dtype", OUTPUT_DTYPES)
def test_saving_a_lazy_delta_writes_what_compute_delta_would_have_written(
    pair: Pair, tmp_path: Path, out_dtype: str
) -> None:
    lazy = compute_delta(pair.reasoning, pair.multimodal, dtype=out_dtype)
    lazy.save(tmp_path / "saved")
    compute_delta(pair.reasoning, pair.multimodal, tmp_path / "direct", dtype=out_dtype)
    assert contents(tmp_path / "saved") == contents(tmp_path / "direct")
    assert_same_delta(Delta.open(tmp_path / "saved"), lazy)


def test_an_opened_delta_can_be_saved_elsewhere(pair: Pair, tmp_path: Path) -> None:
    compute_delta(pair.reasoning, pair.multimodal, tmp_path / "first")
    first = Delta.open(tmp_path / "first")
    first.save(tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert_same_delta(Delta.open(tmp_path / "second"), first)


def test_an_opened_delta_is_split_again_when_it_is_saved_with_another_shard_size(
    pair: Pair, tmp_path: Path
) -> None:
    compute_delta(pair.reasoning, pair.multimodal, tmp_path / "whole")
    Delta.open(tmp_path / "whole").save(tmp_path / "split", max_shard_size=300)
    compute_delta(pair.reasoning, pair.multimodal, tmp_path / "direct", max_shard_size=300)
    assert contents(tmp_path / "split") == contents(tmp_path / "direct")


def test_a_tensor_taken_from_a_delta_is_a_copy_of_its_own(pair: Pair, out: Path) -> None:
    for delta in (
        compute_delta(pair.reasoning, pair.multimodal, out),
        compute_delta(pair.reasoning, pair.multimodal),
    ):
        name = next(iter(delta))
        first = delta[name]
        kept = first.clone()
        first.add_(1)
        assert torch.equal(delta[name], kept)
    assert torch.equal(Delta.open(out)[name], kept)


def test_an_unknown_name_is_a_key_error_as_in_any_mapping(pair: Pair) -> None:
    delta = compute_delta(pair.reasoning, pair.multimodal)
    assert "nowhere.weight" not in delta
    with pytest.raises(KeyError, match=r"nowhere\.weight"):
        delta["nowhere.weight"]


def test_two_text_models_give_the_prior2_form_under_the_base_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    from support.synthetic import language_model, moved

    base = language_model(rng)
    expert = moved(rng, base, to="model.")
    delta = compute_delta(
        write_checkpoint(tmp_path / "expert", expert), write_checkpoint(tmp_path / "base", base)
    )
    assert len(delta) == 14
    for name, tensor in delta.items():
        expected = round_once(expert[name].values - base[name].values, "BF16")
        assert (bits_of(tensor) == expected).all()


# ------------------------------------------------------------------ opening what is not a delta


def test_a_directory_that_is_not_a_delta_is_not_opened_as_one(pair: Pair, tmp_path: Path) -> None:
    with refused(FileNotFoundError, "nowhere"):
        Delta.open(tmp_path / "nowhere")
    with refused(
        (drift_fast.CheckpointError, FileNotFoundError), "drift.json", pair.reasoning.name
    ):
        Delta.open(pair.reasoning)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"format_version": 999}', '{"format_version": "1"}', "\x00\xff"],
)
def test_a_damaged_drift_json_is_named(pair: Pair, out: Path, content: str) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    (out / "drift.json").write_text(content)
    with refused(drift_fast.CheckpointError, "drift.json"):
        Delta.open(out)


def test_a_newer_format_says_which_version_it_is(pair: Pair, out: Path) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    document = json.loads((out / "drift.json").read_text())
    document["format_version"] = 999
    (out / "drift.json").write_text(json.dumps(document))
    with refused(drift_fast.CheckpointError, "drift.json", "999", "version"):
        Delta.open(out)


def test_a_delta_whose_shard_is_missing_or_cut_short_is_refused(pair: Pair, out: Path) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    (shard,) = out.glob("*.safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data[:-5])
    with refused((drift_fast.CheckpointError, FileNotFoundError), shard.name):
        list(Delta.open(out).values())
    shard.unlink()
    with refused((drift_fast.CheckpointError, FileNotFoundError), shard.name):
        list(Delta.open(out).values())


@pytest.mark.parametrize("function", [compute_delta, inspect])
def test_a_retired_keyword_says_what_to_do_instead(tmp_path: Path, function: Any) -> None:
    pair = write_pair(tmp_path)
    with refused(TypeError, function.__name__, "singular", "torch.linalg.svdvals"):
        function(pair.reasoning, pair.multimodal, singular=4)
    with refused(TypeError, function.__name__, "progress_bar=True", "on_progress="):
        function(pair.reasoning, pair.multimodal, progress=False)
    with refused(TypeError, function.__name__, "moduls", "did you mean 'modules'?"):
        function(pair.reasoning, pair.multimodal, moduls="attn")


def test_a_bar_is_shown_on_request_and_never_in_a_pipe(
    pair: Pair, capfd: pytest.CaptureFixture[str]
) -> None:
    sources = pair.reasoning, pair.multimodal
    drift_fast.inspect(*sources)
    drift_fast.inspect(*sources, progress_bar=False)
    assert capfd.readouterr() == ("", "")
    seen: list[Progress] = []
    drift_fast.inspect(*sources, progress_bar=True, on_progress=seen.append)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "reading" in captured.err
    assert seen[-1].nbytes == seen[-1].total_nbytes > 0


def test_a_tensor_that_memory_cannot_hold_says_how_to_read_it_in_parts() -> None:
    with pytest.raises(MemoryError, match=r"model\.w: Δ of shape \[144115188075855872, 2\]"):
        empty_tensor("model.w", (2**57, 2), "float32")
