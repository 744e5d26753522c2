"""A damaged, hostile or unsuitable checkpoint gets one clear error, and nothing is left behind.

Each message must name the file, the tensor, what was expected and what was found. The last part
feeds arbitrary bytes: no crash, no hang, no exception outside the documented ones.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import drift_fast
from drift_fast import CheckpointError, NonFiniteError, compute_delta, inspect
from support.commands import PROGRAM, run
from support.processes import Ended, python
from support.synthetic import (
    Errors,
    Pair,
    Stored,
    everything_under,
    header_of,
    language_model,
    opaque,
    refused,
    stored,
    stored_bits,
    write_checkpoint,
    write_file,
    write_index,
    write_raw,
    write_sparse,
)

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
OTHER = "model.layers.0.self_attn.k_proj.weight"
TENSORS = {WEIGHT: stored(np.ones((4, 4))), OTHER: stored(np.ones((2, 4)))}
DATA = b"".join(tensor.data for tensor in TENSORS.values())


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A sound file to hold against the damaged one."""
    different = {name: stored(np.full(tensor.shape, 2.0)) for name, tensor in TENSORS.items()}
    return write_file(tmp_path / "sound.safetensors", different)


def assert_refused_on_either_side(
    damaged: Path,
    sound: Path,
    *words: object,
    error: Errors = CheckpointError,
    **options: Any,
) -> None:
    """Check delta and inspect with the damaged one on each side, and that nothing is written."""
    out = sound.parent / "result" / "delta"
    out.parent.mkdir(exist_ok=True)
    for sources in ((damaged, sound), (sound, damaged)):
        with refused(error, *words):
            compute_delta(*sources, out, **options)
        assert everything_under(out.parent) == set()
        with refused(error, *words):
            inspect(*sources, **options)


def header(**entries: Any) -> dict[str, Any]:
    return {**header_of(TENSORS), **entries}


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ------------------------------------------------------------------ files that are not there


def test_a_missing_file_or_directory_is_file_not_found(tmp_path: Path, sound: Path) -> None:
    for missing in ("absent.safetensors", "absent", "absent/deeper"):
        assert_refused_on_either_side(
            tmp_path / missing, sound, tmp_path / missing, error=FileNotFoundError
        )


def test_a_directory_without_a_checkpoint_says_what_was_looked_for(
    tmp_path: Path, sound: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    assert_refused_on_either_side(
        empty,
        sound,
        empty,
        "model.safetensors",
        error=(FileNotFoundError, CheckpointError),
    )


def test_a_shard_named_by_the_index_and_missing_is_named(tmp_path: Path, sound: Path) -> None:
    directory = write_checkpoint(tmp_path / "sharded", TENSORS, shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    assert_refused_on_either_side(
        directory,
        sound,
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        error=(FileNotFoundError, CheckpointError),
    )


def test_a_tensor_the_index_promises_and_the_shard_lacks_is_named(
    tmp_path: Path, sound: Path
) -> None:
    directory = write_checkpoint(tmp_path / "sharded", TENSORS, shards=2)
    file = "model-00001-of-00002.safetensors"
    write_index(directory, {WEIGHT: file, OTHER: file})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", drift_fast.DriftWarning)
        assert_refused_on_either_side(directory, sound, OTHER, file, "download")


def test_a_tensor_in_two_shards_is_refused_naming_both(tmp_path: Path, sound: Path) -> None:
    directory = tmp_path / "twice"
    write_file(directory / "one.safetensors", TENSORS)
    write_file(directory / "two.safetensors", {WEIGHT: stored(np.full((4, 4), 5.0))})
    write_index(directory, {WEIGHT: "two.safetensors", OTHER: "one.safetensors"})
    assert_refused_on_either_side(directory, sound, WEIGHT, "one.safetensors", "two.safetensors")


# ------------------------------------------------------------------ length


@pytest.mark.parametrize("cut", [1, 16, len(DATA)])
def test_a_truncated_file_says_how_many_bytes_are_missing(
    tmp_path: Path, sound: Path, cut: int
) -> None:
    path = write_file(tmp_path / "short.safetensors", TENSORS)
    whole = path.stat().st_size
    os.truncate(path, whole - cut)
    assert_refused_on_either_side(path, sound, path, whole, whole - cut)


def test_a_file_longer_than_its_header_says_is_refused(tmp_path: Path, sound: Path) -> None:
    path = write_file(tmp_path / "long.safetensors", TENSORS)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"appended")
    assert_refused_on_either_side(path, sound, path, whole, whole + 8)


def test_a_truncated_shard_is_named_and_not_only_its_directory(tmp_path: Path, sound: Path) -> None:
    directory = write_checkpoint(tmp_path / "sharded", TENSORS, shards=2)
    file = directory / "model-00002-of-00002.safetensors"
    whole = file.stat().st_size
    os.truncate(file, whole - 3)
    assert_refused_on_either_side(directory, sound, file.name, whole, whole - 3)


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_a_file_too_short_for_a_header_is_refused(tmp_path: Path, sound: Path, size: int) -> None:
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(bytes(size))
    assert_refused_on_either_side(path, sound, path)


# ------------------------------------------------------------------ header


@pytest.mark.parametrize("length", [10**6, 100_000_001, 2**31, 2**63, 2**64 - 1, 2**64 - 8])
def test_an_absurd_header_length_is_refused_without_allocating_it(
    tmp_path: Path, sound: Path, length: int
) -> None:
    path = write_raw(tmp_path / "absurd.safetensors", header(), DATA, length=length)
    assert_refused_on_either_side(path, sound, path, length)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"{} {}",
        b"\xff\xfe{}",
        b'{"a": 1}',
        b'{"a": null}',
        b"{" * 10_000,
        b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], "b": "\xff"}}',
        b'{"__metadata__": {"b": "\xff"}}',
    ],
    ids=[
        "empty",
        "prose",
        "open",
        "list",
        "null",
        "string",
        "two",
        "not-utf8",
        "number",
        "null-entry",
        "deep",
        "not-utf8-where-nobody-looks",
        "not-utf8-in-metadata",
    ],
)
def test_a_header_that_is_not_json_of_the_right_form_is_refused(
    tmp_path: Path, sound: Path, text: bytes
) -> None:
    path = write_raw(tmp_path / "garbled.safetensors", text, b"")
    assert_refused_on_either_side(path, sound, path, "header")


def test_a_git_lfs_pointer_is_refused(tmp_path: Path, sound: Path) -> None:
    path = tmp_path / "pointer.safetensors"
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    )
    assert_refused_on_either_side(path, sound, path, "git lfs pull")


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"<!DOCTYPE html><html>", ["web page", "download"]),
        (b"<html><head>", ["web page", "download"]),
        (b"GGUF\x03\0\0\0", ["GGUF", "not read"]),
        (b"PK\x03\x04\0\0\x08\x08", ["pickle", "convert"]),
        (b"\x80\x02}q\0(X\x12\0", ["pickle", "convert"]),
        (bytes(64), ["zeros", "download it again"]),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_kind(
    tmp_path: Path, sound: Path, start: bytes, words: list[str]
) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(start + bytes(100))
    assert_refused_on_either_side(path, sound, path, *words)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({OTHER: entry("BF16", [2, 4], 16, 32)}, [OTHER]),
        ({OTHER: entry("BF16", [2, 4], 40, 56)}, [OTHER]),
        ({OTHER: entry("BF16", [2, 4], 0, 16)}, []),
        ({OTHER: entry("BF16", [2, 4], 48, 32)}, [OTHER]),
        ({OTHER: entry("BF16", [2, 4], 32, 33)}, [OTHER]),
        ({OTHER: entry("BF16", [2, 5], 32, 48)}, [OTHER, "[2, 5]", "BF16", "16"]),
        ({OTHER: entry("F32", [2, 4], 32, 48)}, [OTHER, "[2, 4]", "F32", "16"]),
        ({OTHER: entry("BF16", [2**40, 2**40], 32, 48)}, [OTHER]),
        ({OTHER: entry("BF16", [2**63, 2], 32, 48)}, [OTHER]),
        ({OTHER: entry("BF16", [2, 4], 2**63, 2**63 + 16)}, [OTHER]),
        ({OTHER: entry("BF16", [2, 4], 2**64 - 16, 2**64 - 1)}, [OTHER]),
        ({OTHER: entry("BF16", [-2, -4], 32, 48)}, []),
        ({OTHER: entry("BF16", [2.0, 4.0], 32, 48)}, []),  # type: ignore[list-item]
        ({OTHER: {"dtype": "BF16", "shape": [2, 4]}}, []),
        ({OTHER: {"dtype": "BF16", "shape": [2, 4], "data_offsets": [32]}}, []),
        ({OTHER: {"dtype": "BF16", "data_offsets": [32, 48]}}, []),
        ({OTHER: {"shape": [2, 4], "data_offsets": [32, 48]}}, []),
    ],
    ids=[
        "overlap", "gap", "same-place", "reversed", "odd-length", "shape-too-large",
        "type-too-large", "product-overflow", "product-overflow-to-zero", "far-away",
        "end-of-address-space", "negative",
        "fractional", "no-offsets", "one-offset", "no-shape", "no-dtype",
    ],
)  # fmt: skip
def test_offsets_and_shapes_that_cannot_be_are_refused(
    tmp_path: Path, sound: Path, entries: dict[str, Any], words: list[str]
) -> None:
    path = write_raw(tmp_path / "offsets.safetensors", header(**entries), DATA)
    assert_refused_on_either_side(path, sound, path, *words)


def test_an_end_beyond_the_file_is_refused(tmp_path: Path, sound: Path) -> None:
    path = write_raw(
        tmp_path / "beyond.safetensors", header(**{OTHER: entry("BF16", [4, 4], 32, 64)}), DATA
    )
    assert_refused_on_either_side(path, sound, path)


def test_a_name_twice_in_one_header_is_refused(tmp_path: Path, sound: Path) -> None:
    first = f'"{WEIGHT}": {json.dumps(entry("BF16", [4, 4], 0, 32))}'
    second = f'"{WEIGHT}": {json.dumps(entry("BF16", [2, 4], 32, 48))}'
    path = write_raw(tmp_path / "twice.safetensors", "{" + first + ", " + second + "}", DATA)
    assert_refused_on_either_side(path, sound, path, WEIGHT, "twice")


def test_a_name_twice_spelt_with_an_escape_is_refused_too(tmp_path: Path, sound: Path) -> None:
    escaped = WEIGHT.replace("model", "\\u006dodel")
    first = f'"{WEIGHT}": {json.dumps(entry("BF16", [4, 4], 0, 32))}'
    second = f'"{escaped}": {json.dumps(entry("BF16", [2, 4], 32, 48))}'
    path = write_raw(tmp_path / "twice.safetensors", "{" + first + ", " + second + "}", DATA)
    assert_refused_on_either_side(path, sound, path, WEIGHT)


def test_a_name_twice_in_the_weight_map_is_refused(tmp_path: Path, sound: Path) -> None:
    directory = write_checkpoint(tmp_path / "sharded", TENSORS, shards=2)
    one, two = sorted(path.name for path in directory.glob("*.safetensors"))
    write_index(directory, f'{{"{WEIGHT}": "{one}", "{OTHER}": "{two}", "{WEIGHT}": "{two}"}}')
    assert_refused_on_either_side(directory, sound, "model.safetensors.index.json", WEIGHT)


def test_metadata_in_the_header_is_no_tensor(tmp_path: Path, sound: Path) -> None:
    path = write_raw(
        tmp_path / "meta.safetensors", {"__metadata__": {"format": "pt"}, **header()}, DATA
    )
    delta = compute_delta(sound, path)
    assert sorted(delta) == sorted(TENSORS)
    assert not any("__metadata__" in name for name, _ in delta.coverage.unmatched_multimodal)


# ------------------------------------------------------------------ index


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"weight_map": null}',
     '{"weight_map": []}', '{"weight_map": {}}',
     '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": ["b"]}}'],
)  # fmt: skip
def test_an_index_of_another_form_is_refused(tmp_path: Path, sound: Path, text: str) -> None:
    directory = write_checkpoint(tmp_path / "sharded", TENSORS, shards=2)
    (directory / "model.safetensors.index.json").write_text(text)
    assert_refused_on_either_side(directory, sound, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "escape",
    [
        "../secret.safetensors",
        "sub/../../secret.safetensors",
        "./../secret.safetensors",
        "{absolute}",
        "..",
        ".",
        "",
    ],
)
def test_an_index_entry_that_leaves_the_directory_is_refused(
    tmp_path: Path, sound: Path, escape: str
) -> None:
    secret = write_file(tmp_path / "secret.safetensors", TENSORS)
    directory = tmp_path / "checkpoint"
    (directory / "sub").mkdir(parents=True)
    target = escape.replace("{absolute}", str(secret))
    write_index(directory, dict.fromkeys(TENSORS, target))
    assert_refused_on_either_side(directory, sound, "model.safetensors.index.json", target)


def linked_elsewhere(tmp_path: Path, kind: str) -> Path:
    """Return a checkpoint whose index names a link to a shard outside of its directory."""
    elsewhere = write_file(tmp_path / "elsewhere" / "shard.safetensors", TENSORS)
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    entry_name = "inner/shard.safetensors" if kind == "directory" else "shard.safetensors"
    if kind == "relative":
        (directory / entry_name).symlink_to("../elsewhere/shard.safetensors")
    elif kind == "absolute":
        (directory / entry_name).symlink_to(elsewhere)
    elif kind == "chain":
        (directory / "hop").symlink_to("../elsewhere/shard.safetensors")
        (directory / entry_name).symlink_to("hop")
    else:
        (directory / "inner").symlink_to("../elsewhere")
    write_index(directory, dict.fromkeys(TENSORS, entry_name))
    return directory


@pytest.mark.parametrize("kind", ["relative", "absolute", "directory", "chain"])
def test_ones_own_link_to_a_shard_elsewhere_is_followed(
    tmp_path: Path, sound: Path, kind: str
) -> None:
    assert len(compute_delta(linked_elsewhere(tmp_path, kind), sound)) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("kind", ["relative", "absolute", "directory", "chain"])
def test_a_link_of_another_user_to_a_file_that_is_not_theirs_is_refused(
    tmp_path: Path, sound: Path, kind: str
) -> None:
    directory = linked_elsewhere(tmp_path, kind)
    os.chown(directory, 4321, -1)
    assert_refused_on_either_side(directory, sound, "shard.safetensors", "another user")
    os.chown(tmp_path / "elsewhere" / "shard.safetensors", 4321, -1)
    assert len(compute_delta(directory, sound)) == 2


def test_shards_in_a_folder_of_the_checkpoint_and_links_inside_it_are_read(
    tmp_path: Path, sound: Path
) -> None:
    directory = tmp_path / "checkpoint"
    write_file(directory / "shards" / "one.safetensors", {WEIGHT: TENSORS[WEIGHT]})
    write_file(directory / "shards" / "two.safetensors", {OTHER: TENSORS[OTHER]})
    (directory / "alias.safetensors").symlink_to("shards/two.safetensors")
    write_index(directory, {WEIGHT: "shards/one.safetensors", OTHER: "alias.safetensors"})
    assert len(compute_delta(directory, sound)) == 2


def test_a_checkpoint_reached_through_a_link_of_the_users_own_is_read(
    tmp_path: Path, sound: Path
) -> None:
    directory = write_checkpoint(tmp_path / "models" / "real", TENSORS, shards=2)
    (tmp_path / "alias").symlink_to(directory)
    assert len(compute_delta(tmp_path / "alias", sound)) == 2
    file = write_file(tmp_path / "models" / "one.safetensors", TENSORS)
    (tmp_path / "one.safetensors").symlink_to(file)
    assert len(compute_delta(tmp_path / "one.safetensors", sound)) == 2


@pytest.mark.parametrize("shards", [1, 2])
def test_the_hub_cache_layout_with_its_links_to_blobs_is_read(
    tmp_path: Path, sound: Path, shards: int
) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(
        sorted(write_checkpoint(tmp_path / "plain", TENSORS, shards=shards).iterdir())
    ):
        path.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    assert len(compute_delta(snapshot, sound)) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_shared_hub_cache_links_to_its_own_blobs_whoever_has_them(
    tmp_path: Path, sound: Path
) -> None:
    blob = write_file(tmp_path / "models--org--name" / "blobs" / ("b" * 64), TENSORS)
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "shard.safetensors").symlink_to(blob)
    write_index(snapshot, dict.fromkeys(TENSORS, "shard.safetensors"))
    os.chown(snapshot, 4321, -1)
    assert len(compute_delta(snapshot, sound)) == 2
    secret = write_file(tmp_path / "models--other--name" / "blobs" / ("b" * 64), TENSORS)
    (snapshot / "shard.safetensors").unlink()
    (snapshot / "shard.safetensors").symlink_to(secret)
    assert_refused_on_either_side(snapshot, sound, "shard.safetensors")


# ------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("dtype", ["I64", "I32", "U8", "BOOL"])
def test_a_selected_tensor_of_an_unsupported_type_is_named_with_its_type(
    tmp_path: Path, sound: Path, dtype: str
) -> None:
    path = write_file(tmp_path / "whole.safetensors", {**TENSORS, WEIGHT: opaque(dtype, 4, 4)})
    assert_refused_on_either_side(path, sound, path, WEIGHT, dtype, "BF16", "F16", "F32", "F64")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8"])
def test_a_one_byte_type_is_refused_by_its_name(tmp_path: Path, sound: Path, dtype: str) -> None:
    path = write_file(
        tmp_path / "fp8.safetensors", {**TENSORS, WEIGHT: Stored(dtype, (4, 4), bytes(16))}
    )
    assert_refused_on_either_side(path, sound, path, WEIGHT, dtype)


def test_a_type_nobody_knows_is_refused_by_its_name(tmp_path: Path, sound: Path) -> None:
    path = write_file(
        tmp_path / "odd.safetensors", {**TENSORS, WEIGHT: Stored("Q3_K", (4, 4), bytes(32))}
    )
    assert_refused_on_either_side(path, sound, path, "Q3_K")


def test_a_buffer_of_integers_that_nobody_selects_does_no_harm(tmp_path: Path, sound: Path) -> None:
    buffers = {
        "model.layers.0.self_attn.masked_bias": opaque("BOOL", 3),
        "vision_tower.embeddings.position_ids": opaque("I64", 1, 5),
    }
    path = write_file(tmp_path / "buffers.safetensors", {**buffers, **TENSORS})
    delta = compute_delta(path, sound)
    assert sorted(delta) == sorted(TENSORS)
    assert {name for name, _ in delta.coverage.unmatched_reasoning} == set(buffers)


# ------------------------------------------------------------------ other formats


def live_payload(marker: Path) -> bytes:
    """Return a pickle, written by hand, that creates `marker` when anyone loads it."""
    return b"cbuiltins\nopen\n(S'" + str(marker).encode() + b"'\nS'w'\ntR."


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth", "model.ckpt"]
)
def test_a_pickled_file_is_never_loaded(tmp_path: Path, sound: Path, name: str) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "pickled" / name
    path.parent.mkdir()
    path.write_bytes(live_payload(marker))
    assert_refused_on_either_side(path, sound, path, "safetensors", "convert")
    assert not marker.exists()


@pytest.mark.parametrize(
    "names",
    [["pytorch_model.bin"], ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]],
)
def test_a_directory_with_only_a_pickled_checkpoint_says_convert(
    tmp_path: Path, sound: Path, names: list[str]
) -> None:
    marker = tmp_path / "executed"
    directory = tmp_path / "pickled"
    directory.mkdir()
    for name in names:
        (directory / name).write_bytes(live_payload(marker))
    assert_refused_on_either_side(directory, sound, directory, ".bin", "safetensors", "convert")
    assert not marker.exists()


def test_a_pickle_renamed_to_safetensors_is_not_loaded_either(tmp_path: Path, sound: Path) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "model.safetensors"
    path.write_bytes(live_payload(marker))
    assert_refused_on_either_side(path, sound, path)
    assert not marker.exists()


def test_a_safetensors_file_beside_a_pickle_is_used(tmp_path: Path, sound: Path) -> None:
    directory = write_checkpoint(tmp_path / "both", TENSORS)
    (directory / "pytorch_model.bin").write_bytes(live_payload(tmp_path / "executed"))
    assert len(compute_delta(directory, sound)) == 2
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------ special files


def assert_clear_failure(result: Ended, *words: object) -> None:
    assert result.returncode == 1, (result.returncode, result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    missing = [str(word) for word in words if str(word).lower() not in result.stderr.lower()]
    assert not missing, f"{missing} not in: {result.stderr}"


@pytest.mark.parametrize("as_path", [True, False], ids=["as-path", "in-directory"])
def test_a_pipe_in_place_of_a_checkpoint_does_not_hang(
    tmp_path: Path, sound: Path, as_path: bool
) -> None:
    directory = tmp_path / "pipe"
    directory.mkdir()
    os.mkfifo(directory / "model.safetensors")
    source = directory / "model.safetensors" if as_path else directory
    assert_clear_failure(run("inspect", str(source), str(sound)), "model.safetensors")


def test_a_pipe_in_place_of_an_index_does_not_hang(tmp_path: Path, sound: Path) -> None:
    directory = tmp_path / "pipe"
    directory.mkdir()
    os.mkfifo(directory / "model.safetensors.index.json")
    assert_clear_failure(run("inspect", str(directory), str(sound)), "model.safetensors.index.json")


def test_a_pipe_in_place_of_a_shard_does_not_hang(tmp_path: Path, sound: Path) -> None:
    directory = tmp_path / "pipe"
    write_index(directory, dict.fromkeys(TENSORS, "shard.safetensors"))
    os.mkfifo(directory / "shard.safetensors")
    assert_clear_failure(run("inspect", str(directory), str(sound)), "shard.safetensors")


def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path, sound: Path) -> None:
    directory = tmp_path / "odd"
    (directory / "model.safetensors").mkdir(parents=True)
    assert_refused_on_either_side(
        directory,
        sound,
        "model.safetensors",
        error=(CheckpointError, OSError),
    )


def test_a_device_in_place_of_a_checkpoint_is_refused(sound: Path) -> None:
    for device in ("/dev/zero", "/dev/null"):
        assert_clear_failure(run("inspect", device, str(sound)), device)


def test_a_loop_of_links_is_an_error_and_no_loop(tmp_path: Path, sound: Path) -> None:
    path = tmp_path / "loop.safetensors"
    path.symlink_to(path)
    assert_refused_on_either_side(path, sound, path.name, error=(CheckpointError, OSError))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_one_may_not_read_is_a_permission_error(tmp_path: Path, sound: Path) -> None:
    path = write_file(tmp_path / "private.safetensors", TENSORS)
    path.chmod(0)
    assert_refused_on_either_side(path, sound, path, error=PermissionError)


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(("number", "kind"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_values_that_are_not_finite_are_counted_and_named(
    tmp_path: Path, sound: Path, number: float, kind: str, dtype: str
) -> None:
    values = np.ones((100, 50))
    values.reshape(-1)[[0, 17, 4999]] = number
    path = write_file(tmp_path / "nan.safetensors", {WEIGHT: stored(values, dtype)})
    clean = write_file(tmp_path / "clean.safetensors", {WEIGHT: stored(np.zeros((100, 50)))})
    for sources in ((path, clean), (clean, path)):
        out = tmp_path / "delta"
        with refused(NonFiniteError, WEIGHT, " 3 ", path, "allow_nonfinite"):
            compute_delta(*sources, out)
        assert not out.exists()
        with refused(NonFiniteError, WEIGHT, " 3 ", path):
            list(compute_delta(*sources).values())
    del kind


def test_values_that_are_not_finite_are_written_and_recorded_when_allowed(tmp_path: Path) -> None:
    a = np.ones(5000)
    b = np.zeros(5000)
    a[[1, 4097]] = np.nan
    a[7] = np.inf
    b[7] = np.inf
    b[8] = -np.inf
    delta = compute_delta(
        write_file(tmp_path / "a.safetensors", {WEIGHT: stored(a), OTHER: stored([1.0])}),
        write_file(tmp_path / "b.safetensors", {WEIGHT: stored(b), OTHER: stored([0.5])}),
        tmp_path / "delta",
        allow_nonfinite=True,
    )
    values = delta[WEIGHT]
    assert values.isnan().nonzero().flatten().tolist() == [1, 7, 4097]
    assert values.isinf().nonzero().flatten().tolist() == [8]
    assert values.isfinite().sum() == 4996
    rows = {row.name: row for row in delta.stats}
    assert rows[WEIGHT].nonfinite == 5
    assert rows[OTHER].nonfinite == 0
    assert rows[OTHER].delta_norm == 0.5
    text = (tmp_path / "delta" / "drift.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    reopened = {row.name: row for row in drift_fast.Delta.open(tmp_path / "delta").stats}
    assert reopened[WEIGHT].nonfinite == 5


def test_a_tensor_that_is_not_selected_may_hold_nan(tmp_path: Path, sound: Path) -> None:
    norm = {"model.norm.weight": stored([np.nan] * 4)}
    path = write_file(tmp_path / "nan.safetensors", {**TENSORS, **norm})
    other = write_file(
        tmp_path / "other.safetensors", {**TENSORS, "model.norm.weight": stored([1.0] * 4)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(compute_delta(path, other)) == 2
    with refused(NonFiniteError, "model.norm.weight", "4"):
        compute_delta(path, other, tmp_path / "delta", modules="all")


def test_a_finite_difference_that_overflows_the_output_is_not_silent(tmp_path: Path) -> None:
    a = write_file(tmp_path / "a.safetensors", {WEIGHT: stored([60000.0, 1.0, 2.0])})
    b = write_file(tmp_path / "b.safetensors", {WEIGHT: stored([-60000.0, 1.0, 1.0])})
    assert compute_delta(a, b, dtype="float32")[WEIGHT].tolist() == [119808.0, 0.0, 1.0]
    with refused(drift_fast.DriftError, WEIGHT, "float16"):
        compute_delta(a, b, tmp_path / "delta", dtype="float16")
    assert not (tmp_path / "delta").exists()
    allowed = compute_delta(a, b, tmp_path / "delta", dtype="float16", allow_nonfinite=True)
    assert allowed[WEIGHT].tolist() == [float("inf"), 0.0, 1.0]


def test_the_same_checkpoint_twice_is_said_by_every_verb_and_written_by_none(
    pair: Pair, tmp_path: Path
) -> None:
    shutil.copytree(pair.reasoning, tmp_path / "copy")
    twice = pair.reasoning, pair.reasoning
    for sources in (twice, (pair.reasoning, tmp_path / "copy")):
        with pytest.raises(drift_fast.AlignmentError, match="given twice"):
            compute_delta(*sources, tmp_path / "out")
        with pytest.warns(drift_fast.DriftWarning, match="zero everywhere"):
            delta = compute_delta(*sources)
        assert all(not tensor.any() for tensor in delta.values())
        with pytest.warns(drift_fast.DriftWarning, match="zero everywhere"):
            drift_fast.inspect(*sources)
    with pytest.raises(drift_fast.AlignmentError, match="given twice"):
        drift_fast.write_report(tmp_path / "page.html", *twice)
    with pytest.raises(drift_fast.AlignmentError, match="given twice"):
        drift_fast.merge("linear", *twice, tmp_path / "out", weight=0.5)
    assert {each.name for each in tmp_path.iterdir()} == {"copy"}
    assert "given twice" in str(drift_fast.align(*twice))
    assert not drift_fast.align(*twice).ok
    assert "given twice" in str(drift_fast.check(*twice))
    assert any("given twice" in said for said in drift_fast.plan(*twice, steps=1).warnings)


def test_two_different_checkpoints_are_not_warned_about(pair: Pair, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta")


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float8"},
        {"dtype": "int32"},
        {"dtype": ""},
        {"threads": 0},
        {"threads": -1},
        {"max_shard_size": "many"},
        {"max_shard_size": "-5GB"},
        {"max_shard_size": 0},
        {"max_shard_size": "0"},
    ],
    ids=str,
)
def test_an_argument_out_of_range_is_a_value_error_before_anything_is_written(
    pair: Pair, out: Path, options: dict[str, Any]
) -> None:
    (value,) = options.values()
    with refused(ValueError, value):
        compute_delta(pair.reasoning, pair.multimodal, out, **options)
    assert everything_under(out.parent) == set()


# ------------------------------------------------------------------ full disk


def test_a_delta_that_cannot_fit_is_refused_before_anything_is_written(
    tmp_path: Path, out: Path
) -> None:
    rows = shutil.disk_usage(tmp_path).free // 4096 + 4096
    a = write_sparse(tmp_path / "a.safetensors", {WEIGHT: (rows, 4096)})
    b = write_sparse(tmp_path / "b.safetensors", {WEIGHT: (rows, 4096)})
    with pytest.raises(OSError, match=re.escape(out.name)) as caught:
        compute_delta(a, b, out)
    assert caught.value.errno == errno.ENOSPC
    # Bytes may be grouped or in GB; the leading digits are the same.
    assert str(rows * 4096 * 2)[:3] in re.sub(r"[,_.]", "", str(caught.value))
    assert everything_under(out.parent) == set()


def test_a_write_that_fails_in_the_middle_leaves_nothing(tmp_path: Path, out: Path) -> None:
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (1024, 512) for n in range(6)}
    a = write_sparse(tmp_path / "a.safetensors", shapes, seed=1)
    b = write_sparse(tmp_path / "b.safetensors", shapes, seed=2)
    before = everything_under(tmp_path)
    # No file may grow beyond a megabyte; Python ignores the signal that would say so.
    limited = ["bash", "-c", 'ulimit -f 1024; exec "$@"', "bash", *PROGRAM]
    result = run("delta", str(a), str(b), "--out", str(out), program=limited)
    assert_clear_failure(result, out.name)
    assert everything_under(tmp_path) == before
    assert run("delta", str(a), str(b), "--out", str(out)).returncode == 0


def test_an_output_parent_that_is_a_file_is_an_error_of_the_system(
    pair: Pair, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with refused(OSError, "file"):
        compute_delta(pair.reasoning, pair.multimodal, tmp_path / "file" / "delta")


# ------------------------------------------------------------------ a source that changes


@pytest.mark.parametrize("reader", ["mmap", "pread"])
def test_a_file_that_shrinks_after_it_was_opened_is_an_error_and_no_crash(
    tmp_path: Path, sound: Path, reader: str
) -> None:
    # A lazy delta reads long after it was made: the process must survive what happened meanwhile.
    script = (
        "import os, sys, drift_fast\n"
        "delta = drift_fast.compute_delta(*sys.argv[1:3], reader=sys.argv[3])\n"
        "os.truncate(sys.argv[1], 100)\n"
        "try:\n"
        "    delta[next(iter(delta))]\n"
        "except (drift_fast.DriftError, OSError) as error:\n"
        "    print('refused:', error)\n"
    )
    path = write_file(tmp_path / "shrinks.safetensors", TENSORS)
    result = python(script, path, sound, reader)
    assert "refused:" in result.stdout
    assert "shrinks.safetensors" in result.stdout


# ------------------------------------------------------------------ arbitrary bytes

DOCUMENTED = (drift_fast.DriftError, OSError, ValueError)
PLENTY = settings(
    max_examples=150,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def survives(act: Callable[[], object]) -> None:
    """Run; a documented exception is as good as a result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(*DOCUMENTED):
            act()


@given(st.binary(max_size=400))
@example(b"")
@example(b"\x02\0\0\0\0\0\0\0{}")
@example(b"\x00" * 8)
@example(b"\xff" * 16)
@PLENTY
def test_any_bytes_at_all_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(data)
    sound = write_file(tmp_path / "sound.safetensors", TENSORS)
    survives(lambda: inspect(path, sound))
    survives(lambda: inspect(sound, path))


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """Return a sound file after a few changes of bytes, cuts and insertions."""
    text = json.dumps(header_of(TENSORS)).encode()
    data = bytearray(len(text).to_bytes(8, "little") + text + DATA)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        change = draw(st.sampled_from(["flip", "cut", "insert", "digit", "truncate"]))
        if change == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del data[at : at + draw(st.integers(1, 9))]
        elif change == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif change == "truncate":
            del data[at:]
        else:
            digits = [i for i, byte in enumerate(data[8 : 8 + len(text)], 8) if chr(byte).isdigit()]
            if digits:
                data[draw(st.sampled_from(digits))] = ord(draw(st.sampled_from("0123456789-")))
    return bytes(data)


@given(mutated_files())
@PLENTY
def test_any_damage_to_a_sound_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data)
    sound = write_file(tmp_path / "sound.safetensors", TENSORS)
    survives(lambda: inspect(path, sound, modules="all"))
    survives(
        lambda: [tensor.sum() for tensor in compute_delta(sound, path, modules="all").values()]
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from([WEIGHT, OTHER, "__metadata__", ""]) | st.text(max_size=10),
        json_values
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["BF16", "F16", "F32", "F64", "I64", "F4", "", "bf16"]),
                "shape": st.lists(st.integers(0, 6) | st.integers(-2, 2**64), max_size=3),
                "data_offsets": st.lists(
                    st.integers(0, 64) | st.integers(-2, 2**64), min_size=1, max_size=3
                ),
            }
        ),
        max_size=3,
    ),
    st.integers(0, 64),
)
@PLENTY
def test_any_header_of_json_is_read_or_refused(
    tmp_path: Path, entries: dict[str, Any], size: int
) -> None:
    path = write_raw(tmp_path / "header.safetensors", entries, bytes(size))
    sound = write_file(tmp_path / "sound.safetensors", TENSORS)
    survives(lambda: inspect(path, sound, modules="all"))
    survives(lambda: inspect(sound, path, modules="all"))


@given(
    json_values
    | st.fixed_dictionaries(
        {
            "weight_map": json_values
            | st.dictionaries(
                st.sampled_from([WEIGHT, OTHER, ""]) | st.text(max_size=6),
                st.sampled_from(["model-00001-of-00002.safetensors", "..", "/", "\x00", "a/b", "~"])
                | json_values,
                max_size=3,
            )
        }
    )
)
@PLENTY
def test_any_index_of_json_is_read_or_refused(tmp_path: Path, index: Any) -> None:
    directory = write_checkpoint(tmp_path / "indexed", TENSORS, shards=2)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    sound = write_file(tmp_path / "sound.safetensors", TENSORS)
    survives(lambda: inspect(directory, sound, modules="all"))


@given(
    json_values,
    st.sampled_from(
        ["format_version", "stats", "coverage", "sources", "dtype", "tensors", "alignment"]
    ),
)
@PLENTY
def test_any_change_to_drift_json_is_read_or_refused(tmp_path: Path, value: Any, key: str) -> None:
    out = tmp_path / "delta"
    if not out.exists():
        rng = np.random.default_rng(0)
        a = write_file(tmp_path / "a.safetensors", language_model(rng, layers=1))
        b = write_file(tmp_path / "b.safetensors", language_model(rng, layers=1))
        compute_delta(a, b, out)
        shutil.copy(out / "drift.json", tmp_path / "original.json")
    document = json.loads((tmp_path / "original.json").read_text())
    document[key] = value
    (out / "drift.json").write_text(json.dumps(document))

    def read() -> None:
        delta = drift_fast.Delta.open(out)
        for name in delta:
            assert delta[name].numel() >= 0
        list(delta.stats)
        repr(delta.coverage.fraction)

    survives(read)


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40), st.data())
@PLENTY
def test_any_bits_in_the_tensors_give_a_delta_or_a_count_of_what_is_not_finite(
    tmp_path: Path, bits: list[int], data: st.DataObject
) -> None:
    other = data.draw(st.lists(st.integers(0, 2**16 - 1), min_size=len(bits), max_size=len(bits)))
    a = stored_bits(np.array(bits, dtype="<u2"), "BF16")
    b = stored_bits(np.array(other, dtype="<u2"), "F16")
    paths = (
        write_file(tmp_path / "a.safetensors", {WEIGHT: a}),
        write_file(tmp_path / "b.safetensors", {WEIGHT: b}),
    )
    nonfinite = int((~np.isfinite(a.values)).sum() + (~np.isfinite(b.values)).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (row,) = inspect(*paths, allow_nonfinite=True).stats
        assert row.nonfinite == nonfinite
        if nonfinite:
            with pytest.raises(NonFiniteError):
                inspect(*paths)


@pytest.mark.parametrize("hidden", ["\x1b]0;title\x07", "\nverdict: the models fit", "\u202e"])
def test_a_name_that_a_terminal_would_obey_is_refused_and_spelled_out(
    tmp_path: Path, hidden: str
) -> None:
    name = f"model.layers.0.self_attn.q_proj.weight{hidden}"
    path = write_checkpoint(tmp_path / "model", {name: stored([1.0, 2.0])})
    with pytest.raises(CheckpointError, match="control characters") as found:
        inspect(path, path)
    assert str(found.value).isprintable()
