"""Broken and hostile files of reports to neighboring projects, in small, through every verb.

Each function is one report, and its docstring says where it is and what happened there. What has
one meaning is read, and Δ is exact; the rest is refused with what the file is and what helps.
"""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drift_fast import CheckpointError, DriftWarning, align, check, compute_delta, inspect, merge
from drift_fast.cli.main import main
from support.synthetic import (
    Pair,
    Stored,
    header_of,
    opaque,
    stored,
    write_checkpoint,
    write_file,
    write_pair,
    write_raw,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
CONFIG = {"model_type": "qwen2", "hidden_size": 8}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 4976698672\n"
# What a file of Finder's begins with.
APPLE_DOUBLE = struct.pack(">IIQ", 0x51607, 0x20000, 0) + bytes(4080)
Build = Callable[[Path, dict[str, Stored]], None]


def as_one_file(directory: Path, tensors: Mapping[str, Stored], **metadata: Any) -> None:
    """Replace the two shards by a single file."""
    for name in (FIRST, SECOND, INDEX):
        (directory / name).unlink()
    data = b"".join(tensor.data for tensor in tensors.values())
    write_raw(directory / SINGLE, {**metadata, **header_of(tensors)}, data)


def edit_map(directory: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def shard_of(directory: Path, name: str) -> str:
    return str(json.loads((directory / INDEX).read_text())["weight_map"][name])


# ------------------------------------------------------------------ what is read


def notes_of_macos_beside_the_weights(directory: Path, tensors: dict[str, Stored]) -> None:
    """SceneWorks/SceneWorks#1333, unslothai/unsloth#8919: `._model.safetensors` was loaded."""
    as_one_file(directory, tensors)
    (directory / f"._{SINGLE}").write_bytes(APPLE_DOUBLE)
    (directory / "._config.json").write_bytes(APPLE_DOUBLE)


def notes_of_macos_beside_shards_without_an_index(directory: Path, _: dict[str, Stored]) -> None:
    """lmstudio-ai/mlx-engine#79: `header is unexpectedly large: bytes=2199142139136`."""
    (directory / INDEX).unlink()
    for name in (FIRST, SECOND):
        (directory / f"._{name}").write_bytes(APPLE_DOUBLE)


def entry_of_an_index_for_another_shard(directory: Path, _: dict[str, Stored]) -> None:
    """huggingface/huggingface_hub#4725: the index maps a tensor to a file that lacks it."""
    other = {FIRST: SECOND, SECOND: FIRST}
    edit_map(directory, lambda names: {**names, WEIGHT: other[names[WEIGHT]]})


def tensors_without_elements(directory: Path, tensors: dict[str, Stored]) -> None:
    """vllm-project/vllm#1687, promptfoo/modelaudit#1607: shape [0] was called a bad offset."""
    empty = {"scaled_fp8": Stored("F8_E4M3", (0,), b""), "model.x": Stored("F32", (2, 0), b"")}
    as_one_file(directory, {**empty, **tensors})


def metadata_that_is_empty(directory: Path, tensors: dict[str, Stored]) -> None:
    """foundation-model-stack/fastsafetensors#88: KeyError: 'data_offsets'."""
    as_one_file(directory, tensors, __metadata__={})


def types_that_few_readers_know(directory: Path, tensors: dict[str, Stored]) -> None:
    """foundation-model-stack/fastsafetensors#69: 'F4' is not a valid DType."""
    as_one_file(directory, tensors)
    header, data = header_of(tensors), b"".join(tensor.data for tensor in tensors.values())
    for name, dtype, shape, nbytes in (("f4", "F4", [2, 8], 8), ("c64", "C64", [2, 2], 32)):
        place = [len(data), len(data) + nbytes]
        header[f"visual.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        data += bytes(nbytes)
    write_raw(directory / SINGLE, header, data)


def weights_in_a_second_format(directory: Path, _: dict[str, Stored]) -> None:
    """vllm-project/vllm#40765: `consolidated.safetensors` was loaded beside the shards."""
    write_file(directory / "consolidated.safetensors", {"wq": stored(np.ones((4, 4)))})


def numbers_of_shards_of_two_lengths(directory: Path, _: dict[str, Stored]) -> None:
    """lyogavin/airllm#214: `model-00001-of-000004.safetensors` was looked for with five digits."""
    renamed = {name: name.replace("of-00002", "of-000002") for name in (FIRST, SECOND)}
    for old, new in renamed.items():
        (directory / old).rename(directory / new)
    edit_map(directory, lambda names: {name: renamed[file] for name, file in names.items()})


def infinity_in_the_configuration(directory: Path, _: dict[str, Stored]) -> None:
    """huggingface/transformers#42959, ai-dynamo/dynamo#3043: `Infinity` is no JSON."""
    text = json.dumps(CONFIG)[:-1] + ', "time_step_limit": [0.0, Infinity], "x": NaN}'
    (directory / "config.json").write_text(text)


def configuration_of_a_windows_editor(directory: Path, _: dict[str, Stored]) -> None:
    """AstrBotDevs/AstrBot#5376: Unexpected UTF-8 BOM."""
    text = json.dumps(CONFIG, indent=2).replace("\n", "\r\n").encode()
    (directory / "config.json").write_bytes(b"\xef\xbb\xbf" + text)


def folder_with_the_name_of_a_file(directory: Path, _: dict[str, Stored]) -> None:
    """GeeeekExplorer/nano-vllm#272: a folder `….safetensors` was opened."""
    (directory / "model-00001-of-00001.safetensors").mkdir()


READ: dict[Build, list[str]] = {
    notes_of_macos_beside_the_weights: [],
    notes_of_macos_beside_shards_without_an_index: ["is missing", "all 2 shards are there"],
    entry_of_an_index_for_another_shard: [
        "another shard than the one that holds it", WEIGHT, "read from there",
    ],
    tensors_without_elements: [],
    metadata_that_is_empty: [],
    types_that_few_readers_know: [],
    weights_in_a_second_format: [],
    numbers_of_shards_of_two_lengths: [],
    infinity_in_the_configuration: [],
    configuration_of_a_windows_editor: [],
    folder_with_the_name_of_a_file: [],
}  # fmt: skip


def written(directory: Path, build: Build) -> Pair:
    """Return a pair whose reasoning checkpoint is as reported."""
    pair = write_pair(directory, shards=2)
    (pair.reasoning / "config.json").write_text(json.dumps(CONFIG))
    (pair.multimodal / "config.json").write_text(json.dumps({"text_config": CONFIG}))
    build(pair.reasoning, pair.text)
    return pair


@pytest.mark.parametrize("build", READ, ids=lambda build: build.__name__)
def test_what_has_one_meaning_is_read(tmp_path: Path, build: Build) -> None:
    pair = written(tmp_path, build)
    sources = (pair.reasoning, pair.multimodal)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        delta = compute_delta(*sources, modules="attn")
    said = [str(one.message) for one in caught if issubclass(one.category, DriftWarning)]
    assert len(said) == bool(READ[build]), said
    assert all(word in said[0] for word in READ[build]), said
    assert len(delta) == 8
    for name in delta:
        expected = torch.from_numpy(pair.expected(name, "BF16").view(np.int16))
        assert torch.equal(delta[name].view(torch.int16).flatten(), expected.flatten()), name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        assert len(inspect(*sources, modules="attn").stats) == 8
        assert not [one for one in check(*sources).findings if one.severity == "breaks"]
        assert align(*sources).pairs
        merged = merge("linear", *sources, tmp_path / "merged", weight=0.5, modules="attn")
        assert {one.name for one in merged.tensors} == set(pair.vlm)
        assert main(["delta", *map(str, sources), "--out", str(tmp_path / "delta")]) == 0


# ------------------------------------------------------------------ what is refused


def shard_cut_off(directory: Path, _: dict[str, Stored]) -> None:
    """verl-project/verl#2752, arcee-ai/mergekit#192: MetadataIncompleteBuffer."""
    os.truncate(directory / SECOND, (directory / SECOND).stat().st_size - 100)


def shard_of_a_full_disk(directory: Path, _: dict[str, Stored]) -> None:
    """hiyouga/LlamaFactory#5155: No space left on device, and a file of no bytes."""
    (directory / FIRST).write_bytes(b"")


def pointer_in_place_of_weights(directory: Path, tensors: dict[str, Stored]) -> None:
    """huggingface/transformers#27923, huggingface/diffusers#13559: HeaderTooLarge."""
    as_one_file(directory, tensors)
    (directory / SINGLE).write_text(LFS)


def pickle_renamed(directory: Path, tensors: dict[str, Stored]) -> None:
    """safetensors/safetensors#414: HeaderTooLarge for a `.bin` of PyTorch."""
    as_one_file(directory, tensors)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    (directory / SINGLE).write_bytes(content.getvalue())


def answer_of_a_server(directory: Path, tensors: dict[str, Stored]) -> None:
    """huggingface/diffusers#6713: HeaderTooLarge for what a server answered, saved as it was."""
    as_one_file(directory, tensors)
    (directory / SINGLE).write_text('{"error": "Access to this model is restricted"}')


def page_in_place_of_the_configuration(directory: Path, _: dict[str, Stored]) -> None:
    """The same for a small file: Expecting value: line 1 column 1."""
    (directory / "config.json").write_text("\n<!DOCTYPE html><html>502 Bad Gateway</html>")


def configuration_in_another_encoding(directory: Path, _: dict[str, Stored]) -> None:
    """LianjiaTech/BELLE#495: UnicodeDecodeError out of `from_pretrained`."""
    (directory / "config.json").write_bytes(b'{"_name_or_path": "\xa5"}')


def notes_of_macos_alone(directory: Path, tensors: dict[str, Stored]) -> None:
    """SceneWorks/SceneWorks#1333: a copy in which only Finder's file has the name."""
    notes_of_macos_beside_the_weights(directory, tensors)
    (directory / SINGLE).unlink()


def note_of_macos_with_the_name(directory: Path, tensors: dict[str, Stored]) -> None:
    """lmstudio-ai/lmstudio-bug-tracker#486: `bytes=2199142139136`."""
    as_one_file(directory, tensors)
    (directory / SINGLE).write_bytes(APPLE_DOUBLE)


def index_of_other_shards(directory: Path, _: dict[str, Stored]) -> None:
    """Neph0s/CoSER#3, Blaizzy/mlx-vlm#1827: a stale index, and weights that were not loaded."""
    edit_map(directory, lambda names: dict.fromkeys(names, FIRST.replace("00002", "00030")))


def tensor_that_two_shards_hold(directory: Path, tensors: dict[str, Stored]) -> None:
    """vllm-project/vllm#54230: a reused shard has stale tensors, which overwrote the right ones."""
    holder = {FIRST: SECOND, SECOND: FIRST}[shard_of(directory, WEIGHT)]
    held = {name: tensors[name] for name in tensors if shard_of(directory, name) == holder}
    stale = replace(tensors[WEIGHT], data=bytes(len(tensors[WEIGHT].data)))
    write_file(directory / holder, {**held, WEIGHT: stale})


def link_of_a_shard_to_nothing(directory: Path, _: dict[str, Stored]) -> None:
    """debpalash/VoiceStudio#1056: all blobs are there and the snapshot's links lead nowhere."""
    (directory / FIRST).unlink()
    (directory / FIRST).symlink_to("../../blobs/0123")


def link_of_the_configuration_to_nothing(directory: Path, _: dict[str, Stored]) -> None:
    """huggingface/huggingface_hub#1388: `config.json -> tmp/…/blobs/1960` in a cache."""
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to("tmp/xlmrb/blobs/1960")


def file_without_tensors(directory: Path, tensors: dict[str, Stored]) -> None:
    """huggingface/trl#4416: 40 bytes were saved under ZeRO-3, and loaded without a word."""
    as_one_file(directory, {}, __metadata__={"format": "pt"})


def name_twice_in_a_header(directory: Path, tensors: dict[str, Stored]) -> None:
    """safetensors/safetensors#401: a misleading InvalidOffset."""
    as_one_file(directory, tensors)
    entries = json.dumps(header_of(tensors))
    first = json.dumps({WEIGHT: header_of(tensors)[WEIGHT]})[:-1]
    data = b"".join(tensor.data for tensor in tensors.values())
    write_raw(directory / SINGLE, f"{first}, {entries[1:]}", data)


def one_place_for_two_tensors(directory: Path, tensors: dict[str, Stored]) -> None:
    """safetensors/safetensors#586: tied weights that share their bytes, which is not the format."""
    as_one_file(directory, tensors)
    header = header_of(tensors)
    header["model.twin.weight"] = header["model.embed_tokens.weight"]
    write_raw(directory / SINGLE, header, b"".join(tensor.data for tensor in tensors.values()))


def shape_beyond_the_data(directory: Path, tensors: dict[str, Stored]) -> None:
    """ml-explore/mlx#3363: memory past the file was read as weights."""
    as_one_file(directory, tensors)
    header = header_of(tensors)
    header[WEIGHT]["shape"] = [1000, 1000]
    write_raw(directory / SINGLE, header, b"".join(tensor.data for tensor in tensors.values()))


def bytes_after_the_end(directory: Path, tensors: dict[str, Stored]) -> None:
    """Comfy-Org/ComfyUI#15602: trailing bytes load or not, by the loader."""
    as_one_file(directory, tensors)
    (directory / SINGLE).write_bytes((directory / SINGLE).read_bytes() + bytes(512))


def tensor_with_the_name_of_the_metadata(directory: Path, tensors: dict[str, Stored]) -> None:
    """safetensors/safetensors#849: the library writes it and cannot read it."""
    as_one_file(directory, tensors)
    entry = {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}
    write_raw(directory / SINGLE, {"__metadata__": entry}, bytes(8))


def header_beyond_the_format(directory: Path, tensors: dict[str, Stored]) -> None:
    """safetensors/safetensors#668: 1.29 million tensors, and a header of 132,095,296 bytes."""
    as_one_file(directory, tensors)
    with (directory / SINGLE).open("wb") as file:
        file.write((132_095_296).to_bytes(8, "little"))
        file.truncate(1 << 30)


def index_out_of_the_directory(directory: Path, _: dict[str, Stored]) -> None:
    """huggingface/transformers#47176: `../` of an index was read as weights."""
    other = directory.parent / "other"
    other.mkdir()
    for name in (FIRST, SECOND):
        (directory / name).rename(other / name)
    edit_map(directory, lambda names: {name: f"../other/{file}" for name, file in names.items()})


def index_of_an_absolute_path(directory: Path, _: dict[str, Stored]) -> None:
    """huggingface/transformers#46913, huggingface/diffusers#14175: the same by `/`."""
    edit_map(directory, lambda names: {name: str(directory / f) for name, f in names.items()})


REFUSED: dict[Build, list[str]] = {
    shard_cut_off: [SECOND, "truncated", "download it again"],
    shard_of_a_full_disk: [FIRST, "found 0", "a disk was full", "download the file again"],
    pointer_in_place_of_weights: ["git-lfs pointer", "git lfs pull"],
    pickle_renamed: ["PyTorch pickle", "convert it to safetensors"],
    answer_of_a_server: ["this is text", "a server answers", "download the file again"],
    page_in_place_of_the_configuration: ["config.json", "a web page", "download config.json again"],
    configuration_in_another_encoding: ["config.json", "utf-8", "download config.json again"],
    notes_of_macos_alone: ["there are no weights", "download or copy the model"],
    note_of_macos_with_the_name: ["macOS", "remove it"],
    index_of_other_shards: ["of-00030", "download or copy", "remove the index where it is older"],
    tensor_that_two_shards_hold: [WEIGHT, FIRST, SECOND, "save the checkpoint again"],
    link_of_a_shard_to_nothing: [FIRST, "a link to ../../blobs/0123", "cp -rL"],
    link_of_the_configuration_to_nothing: ["a link to tmp/xlmrb", "download config.json again"],
    file_without_tensors: ["holds no tensor", "ZeRO-3", "save it again"],
    name_twice_in_a_header: [WEIGHT, "named twice", "save it again"],
    one_place_for_two_tensors: ["overlap", "save it again"],
    shape_beyond_the_data: [WEIGHT, "[1000, 1000]", "download the file again"],
    bytes_after_the_end: ["too long", "download it again"],
    tensor_with_the_name_of_the_metadata: ["expected a text", "save it again"],
    header_beyond_the_format: ["132095296", "allows 100000000", "in several files"],
    index_out_of_the_directory: ["../other/", "must stay in the directory"],
    index_of_an_absolute_path: [FIRST, "must stay in the directory"],
}  # fmt: skip
# `align` reads names, which need no configuration.
NOT_READ_BY_ALIGN = {
    page_in_place_of_the_configuration,
    configuration_in_another_encoding,
    link_of_the_configuration_to_nothing,
}


@pytest.mark.parametrize("build", REFUSED, ids=lambda build: build.__name__)
def test_the_rest_is_refused_with_what_it_is_and_what_helps(
    tmp_path: Path, build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = written(tmp_path / "pair", build)
    sources = (pair.reasoning, pair.multimodal)
    out = tmp_path / "out"
    verbs: dict[str, Callable[[], object]] = {
        "compute_delta": lambda: compute_delta(*sources, out=out),
        "inspect": lambda: inspect(*sources),
        "check": lambda: check(*sources),
        "align": lambda: align(*sources),
        "merge": lambda: merge("linear", *sources, out, weight=0.5),
    }
    if build in NOT_READ_BY_ALIGN:
        del verbs["align"]
    for verb, call in verbs.items():
        with pytest.raises((CheckpointError, FileNotFoundError)) as caught:
            call()
        message = str(caught.value)
        assert [word for word in REFUSED[build] if word not in message] == [], (verb, message)
    assert main(["delta", *map(str, sources), "--out", str(out)]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert [word for word in REFUSED[build] if word not in told] == [], told
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def test_a_tensor_of_codes_in_an_unknown_place_is_not_taken_for_a_weight(tmp_path: Path) -> None:
    """foundation-model-stack/fastsafetensors#79: scales of type F8_E8M0 beside the weights."""
    pair = write_pair(tmp_path)
    scale = {WEIGHT.replace("weight", "weight_scale"): opaque("F8_E8M0", 4, 2)}
    write_checkpoint(pair.reasoning, {**pair.text, **scale})
    with pytest.raises(CheckpointError, match=r"is quantized: .*weight_scale.*unquantized"):
        compute_delta(pair.reasoning, pair.multimodal)
