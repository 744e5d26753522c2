"""What transformers and safetensors read is read, with a warning where they may differ."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import drift_fast
from drift_fast import CheckpointError, DriftWarning, check, compute_delta, inspect, merge
from support.commands import succeeds
from support.synthetic import (
    Pair,
    Stored,
    header_of,
    opaque,
    refused,
    stored,
    write_checkpoint,
    write_file,
    write_index,
    write_raw,
)

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
OTHER = "model.layers.0.self_attn.k_proj.weight"
TENSORS = {WEIGHT: stored(np.ones((4, 4))), OTHER: stored(np.full((2, 4), 3.0))}
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    zeros = {name: stored(np.full(tensor.shape, 0.5)) for name, tensor in TENSORS.items()}
    return write_file(tmp_path / "sound.safetensors", zeros)


def values_of(source: Path, sound: Path) -> dict[str, float]:
    """Return the value that all elements of each tensor have."""
    delta = compute_delta(source, sound, dtype="float32", check_weights=False)
    return {name: float(delta[name].mean()) + 0.5 for name in delta}


def loaded_by_transformers(directory: Path) -> dict[str, float]:
    """Return the same as transformers finds it, for names of the smallest Llama."""
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=4,
    )  # fmt: skip
    config.save_pretrained(directory)
    model = transformers.LlamaForCausalLM.from_pretrained(directory)
    state = dict(model.named_parameters())
    return {name: float(state[name].detach().float().mean()) for name in TENSORS}


EXPECTED = {WEIGHT: 1.0, OTHER: 3.0}


# ------------------------------------------------------------------ the index and the shards


def sharded(
    directory: Path, tensors: Mapping[str, Stored], weight_map: Mapping[str, str] | str
) -> Path:
    write_file(directory / SHARD, tensors)
    write_index(directory, weight_map)
    return directory


def dotted(directory: Path) -> None:
    sharded(directory, TENSORS, dict.fromkeys(TENSORS, f"./{SHARD}"))


def dotted_in_part(directory: Path) -> None:
    sharded(directory, TENSORS, {WEIGHT: f"./{SHARD}", OTHER: SHARD})


def index_with_byte_order_mark(directory: Path) -> None:
    sharded(directory, TENSORS, dict.fromkeys(TENSORS, SHARD))
    (directory / INDEX).write_bytes(b"\xef\xbb\xbf" + (directory / INDEX).read_bytes() + b"\n")


def index_with_more(directory: Path) -> None:
    sharded(directory, TENSORS, dict.fromkeys(TENSORS, SHARD))
    entries = json.loads((directory / INDEX).read_text())
    (directory / INDEX).write_text(json.dumps(entries | {"metadata": None, "format": [1]}))


def index_of_the_single_file(directory: Path) -> None:
    write_file(directory / "model.safetensors", TENSORS)
    write_index(directory, dict.fromkeys(TENSORS, "model.safetensors"))


def single_file_among_shards(directory: Path) -> None:
    write_file(directory / "model.safetensors", {WEIGHT: TENSORS[WEIGHT]})
    write_file(directory / "more.safetensors", {OTHER: TENSORS[OTHER]})
    write_index(directory, {WEIGHT: "model.safetensors", OTHER: "more.safetensors"})


def metadata_null(directory: Path) -> None:
    header = {"__metadata__": None, **header_of(TENSORS)}
    data = b"".join(tensor.data for tensor in TENSORS.values())
    write_raw(directory / "model.safetensors", header, data)


@pytest.mark.parametrize(
    "build",
    [
        dotted,
        dotted_in_part,
        index_with_byte_order_mark,
        index_with_more,
        index_of_the_single_file,
        single_file_among_shards,
        metadata_null,
    ],
)
def test_what_has_one_meaning_is_read_without_a_word(
    tmp_path: Path, sound: Path, build: Callable[[Path], None]
) -> None:
    build(tmp_path / "model")
    assert values_of(tmp_path / "model", sound) == EXPECTED


def promised(directory: Path) -> None:
    """Write an index that names a tensor which nobody selects and no shard holds."""
    sharded(directory, TENSORS, dict.fromkeys([*TENSORS, "mtp.fc.weight"], SHARD))


def unnamed(directory: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": stored(np.ones(4), "F32")}
    sharded(directory, {**TENSORS, **buffer}, dict.fromkeys(TENSORS, SHARD))


def unnamed_weight(directory: Path) -> None:
    sharded(directory, TENSORS, {WEIGHT: SHARD})


def exchanged(directory: Path) -> None:
    """Write two shards, each of which holds what the index places in the other."""
    for file, name in (("one.safetensors", WEIGHT), ("two.safetensors", OTHER)):
        write_file(directory / file, {name: TENSORS[name]})
    write_index(directory, {OTHER: "one.safetensors", WEIGHT: "two.safetensors"})


def single_beside_an_index(directory: Path) -> None:
    stale = {name: stored(np.full(tensor.shape, 7.0)) for name, tensor in TENSORS.items()}
    sharded(directory, stale, dict.fromkeys(TENSORS, SHARD))
    write_file(directory / "model.safetensors", TENSORS)


def single_beside_a_broken_index(directory: Path) -> None:
    write_file(directory / "model.safetensors", TENSORS)
    (directory / INDEX).write_text("{")


def without_index(directory: Path) -> None:
    write_checkpoint(directory, TENSORS, shards=2)
    (directory / INDEX).unlink()


def without_index_from_zero(directory: Path) -> None:
    without_index(directory)
    for number in (1, 2):
        path = directory / f"model-{number:05}-of-00002.safetensors"
        path.rename(directory / f"model.safetensors-{number - 1:05}-of-00002.safetensors")


def adapter_beside(directory: Path) -> None:
    write_file(directory / "model.safetensors", TENSORS)
    (directory / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (promised, ["names a tensor that no shard holds", "mtp.fc.weight", SHARD]),
        (unnamed, ["hold a tensor that the index does not name", "inv_freq"]),
        (unnamed_weight, ["hold a tensor that the index does not name", OTHER]),
        (exchanged, ["places 2 tensors in another shard", WEIGHT, "it is read from there"]),
        (single_beside_an_index, ["the single file is read", "remove the one", "give the index"]),
        (single_beside_a_broken_index, ["the single file is read"]),
        (without_index, ["is missing", "all 2 shards are there", "download it"]),
        (without_index_from_zero, ["is missing", "all 2 shards are there"]),
        (adapter_beside, ["adapter of PEFT beside the weights", "merge it first"]),
    ],
)
def test_where_loaders_may_differ_it_is_read_with_a_warning(
    tmp_path: Path, sound: Path, build: Callable[[Path], None], words: list[str]
) -> None:
    build(tmp_path / "model")
    with pytest.warns(DriftWarning) as caught:
        assert values_of(tmp_path / "model", sound) == EXPECTED
    said = " ".join(str(one.message).lower() for one in caught)
    assert [word for word in words if word.lower() not in said] == [], said


@pytest.mark.parametrize(
    "build",
    [
        dotted,
        metadata_null,
        index_of_the_single_file,
        promised,
        unnamed,
        unnamed_weight,
        exchanged,
        single_beside_an_index,
    ],
)
def test_transformers_reads_the_same(tmp_path: Path, build: Callable[[Path], None]) -> None:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4 reads only what an index names")
    build(tmp_path / "model")
    assert loaded_by_transformers(tmp_path / "model") == EXPECTED


def test_the_index_itself_reads_the_shards_beside_a_single_file(
    tmp_path: Path, sound: Path
) -> None:
    single_beside_an_index(tmp_path / "model")
    assert values_of(tmp_path / "model" / INDEX, sound) == dict.fromkeys(TENSORS, 7.0)


@pytest.mark.parametrize("strict", [True, False])
def test_a_selected_tensor_that_no_shard_holds_is_refused_or_left_out(
    tmp_path: Path, sound: Path, strict: bool
) -> None:
    directory = sharded(
        tmp_path / "model", {WEIGHT: TENSORS[WEIGHT]}, dict.fromkeys(TENSORS, SHARD)
    )
    for sources in ((directory, sound), (sound, directory)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)
            if not strict:
                assert list(compute_delta(*sources, strict=False)) == [WEIGHT]
                continue
            with refused(CheckpointError, OTHER, SHARD, "download"):
                compute_delta(*sources)
            (found,) = (one for one in check(*sources).findings if one.subject == "alignment")
            assert found.severity == "breaks"
            assert OTHER in found.message


def test_shards_without_an_index_that_hold_a_tensor_twice_are_refused(
    tmp_path: Path, sound: Path
) -> None:
    for number in (1, 2):
        write_file(tmp_path / "m" / f"model-0000{number}-of-00002.safetensors", TENSORS)
    with refused(CheckpointError, "model-00001", "model-00002", "index is missing", "download"):
        inspect(tmp_path / "m", sound)


def test_a_merge_leaves_out_what_an_index_only_promises(tmp_path: Path, pair: Pair) -> None:
    directory = write_checkpoint(tmp_path / "vlm", pair.vlm, shards=2)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["mtp.fc.weight"] = next(iter(index["weight_map"].values()))
    (directory / INDEX).write_text(json.dumps(index))
    (directory / "config.json").write_text("{}")
    with pytest.warns(DriftWarning, match="no shard holds"):
        merged = merge(
            "linear", pair.reasoning, directory, tmp_path / "out", weight=0.5, modules="mlp"
        )
    assert {one.name for one in merged.tensors} == set(pair.vlm)


# ------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"sliding_window": -1}, "sliding_window"),
        ({"max_position_embeddings": 64.0}, "max_position_embeddings"),
        ({"rms_norm_eps": "1e-06"}, "rms_norm_eps"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"hidden_act": {"name": "silu"}}, "hidden_act"),
        ({"rope_scaling": "dynamic"}, "rope_scaling"),
        ({"torch_dtype": 16}, "torch_dtype"),
        ({"quantization_config": {}}, ""),
    ],
    ids=str,
)
def test_no_cosmetic_entry_stops_a_delta(
    tmp_path: Path, sound: Path, entries: dict[str, Any], word: str
) -> None:
    directory = write_checkpoint(tmp_path / "model", TENSORS)
    (directory / "config.json").write_text(json.dumps(entries))
    beside = write_checkpoint(tmp_path / "beside", TENSORS)
    os.replace(sound, beside / "model.safetensors")
    (beside / "config.json").write_text("{}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert values_of(directory, beside) == EXPECTED
    said = [str(one.message) for one in caught if issubclass(one.category, DriftWarning)]
    assert bool(said) == bool(word), said
    assert all(str(directory / "config.json") in one and word in one for one in said), said


def test_a_key_that_occurs_twice_in_a_configuration_stops_every_verb(
    tmp_path: Path, sound: Path
) -> None:
    directory = write_checkpoint(tmp_path / "model", TENSORS)
    (directory / "config.json").write_text('{"vocab_size": 4, "vocab_size": 5}')
    for verb in (compute_delta, inspect, check):
        with refused(CheckpointError, directory / "config.json", "'vocab_size' occurs twice"):
            verb(directory, sound)


# ------------------------------------------------------------------ paths


def test_a_home_directory_is_expanded_by_every_verb(
    tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint(tmp_path / "model", TENSORS)
    (tmp_path / "model" / "config.json").write_text("{}")
    delta = compute_delta("~/model", "~/sound.safetensors", "~/delta", check_weights=False)
    assert delta.path == tmp_path / "delta"
    assert len(drift_fast.Delta.open("~/delta").save("~/copy")) == 2
    assert len(drift_fast.Delta.combine([("~/delta", 0.5), ("~/copy", 0.5)])) == 2
    merge("linear", "~/sound.safetensors", "~/model", "~/merged", weight=0.5, check_weights=False)
    drift_fast.align("~/model", "~/sound.safetensors").save("~/map.json")
    assert check("~/model", "~/model", mapping="~/map.json").pairs == 2
    (tmp_path / "drift.json").write_text('{"modules": "mlp"}')
    options = ["--config", "~/drift.json", "--modules", "attn", "--no-check-weights"]
    succeeds("delta", "~/model", "~/sound.safetensors", "--out=~/by-command", *options)
    made = {path.name for path in tmp_path.iterdir()}
    assert {"delta", "copy", "merged", "map.json", "by-command"} <= made
    assert not Path("~").exists()


def test_a_home_of_nobody_is_a_path_like_any_other(sound: Path) -> None:
    with refused(FileNotFoundError, "~nobody-of-that-name/model"):
        inspect("~nobody-of-that-name/model", sound)


def test_an_integer_buffer_that_no_index_names_is_not_selected(tmp_path: Path, sound: Path) -> None:
    directory = sharded(
        tmp_path / "model",
        {**TENSORS, "model.position_ids": opaque("I64", 1, 4)},
        dict.fromkeys(TENSORS, SHARD),
    )
    with pytest.warns(DriftWarning, match="position_ids"):
        assert values_of(directory, sound) == EXPECTED
