"""What a small file may ask for is limited, and a refusal names the limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from drift_fast import AlignmentError, CheckpointError, Delta, check, compute_delta
from drift_fast._core import Checkpoint, json_memory
from drift_fast.alignment.name_alignment import Pair as NamePair
from drift_fast.alignment.similarity import _groups
from drift_fast.alignment.tokenizer_files import read_vocabulary
from drift_fast.checkpoints.config_json import Configuration
from drift_fast.checkpoints.remote.shards import shard_names
from support.synthetic import refused, write_index, write_pair, write_raw

TENSORS = 1 << 18


def empty(path: Path, names: Iterable[str], shape: Sequence[int] = (0,), **more: Any) -> Path:
    """Write a file of tensors without elements, which take no data."""
    entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_raw(path, {**more, **dict.fromkeys(names, entry)}, b"")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 513, ("513 bytes", "at most 512")),
        (".".join("x" * 65), ("65 components", "at most 64")),
        (f"model.layers.{'9' * 19}.weight", ("19 digits", "at most 18")),
        (f"model.layers.{'٣' * 5000}.weight", ("bytes", "at most 512")),
        (f"model.layers.{'٣' * 20}.weight", ("20 digits", "at most 18")),
    ],
    ids=["bytes", "components", "digits", "long-digits", "other-digits"],
)
def test_a_name_that_no_model_has_is_refused(
    tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    path = empty(tmp_path / "a.safetensors", [name])
    with refused(CheckpointError, path, name[:15], *words):
        Checkpoint(path)


def test_a_name_within_the_limits_is_read(tmp_path: Path) -> None:
    names = [".".join("x" * 64), "y" * 512, "model.layers.999999999999999999.weight"]
    path = empty(tmp_path / "a.safetensors", names)
    assert {name for name, *_ in Checkpoint(path).tensors()} == set(names)


def test_a_shape_of_many_ones_is_refused_in_a_short_message(tmp_path: Path) -> None:
    path = empty(tmp_path / "a.safetensors", ["x"], shape=[1] * 100_000)
    with refused(CheckpointError, path, "100000 dimensions", "at most 64"):
        Checkpoint(path)


def test_more_tensors_than_the_limit_are_refused_in_a_header_an_index_and_in_shards(
    tmp_path: Path,
) -> None:
    empty(tmp_path / "one" / "model.safetensors", map(str, range(TENSORS + 1)))
    with refused(CheckpointError, tmp_path / "one", f"more than {TENSORS} tensors", "the limit"):
        Checkpoint(tmp_path / "one")
    half = TENSORS // 2 + 1
    for number in (1, 2):
        names = (f"{number}.{name}" for name in range(half))
        empty(tmp_path / "two" / f"model-0000{number}-of-00002.safetensors", names)
    with refused(CheckpointError, tmp_path / "two", f"more than {TENSORS} tensors", "the limit"):
        Checkpoint(tmp_path / "two")
    empty(tmp_path / "index" / "a.safetensors", ["0"])
    write_index(tmp_path / "index", dict.fromkeys(map(str, range(TENSORS + 1)), "a.safetensors"))
    with refused(CheckpointError, tmp_path / "index", f"more than {TENSORS} tensors", "the limit"):
        Checkpoint(tmp_path / "index")


def test_metadata_is_checked_and_takes_no_memory(tmp_path: Path) -> None:
    many = {str(number): "x" for number in range(100_000)}
    assert Checkpoint(empty(tmp_path / "a.safetensors", ["x"], __metadata__=many)).tensors()
    path = empty(tmp_path / "b.safetensors", ["x"], __metadata__={"a": 1})
    with refused(CheckpointError, path, "a text"):
        Checkpoint(path)


@pytest.mark.parametrize(
    ("name", "nbytes", "limit"),
    [
        ("model.safetensors.index.json", 8 << 30, "67108864"),
        ("model.safetensors.ranges.json", 8 << 30, "8388608"),
    ],
)
def test_a_file_beside_the_weights_that_is_too_long_is_refused_unread(
    tmp_path: Path, name: str, nbytes: int, limit: str
) -> None:
    if "ranges" in name:
        empty(tmp_path / "model.safetensors", ["x"])
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, nbytes)
    with refused(CheckpointError, tmp_path / name, str(nbytes), limit):
        Checkpoint(tmp_path)


def test_a_description_of_a_delta_that_is_too_long_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "drift.json").touch()
    os.truncate(tmp_path / "drift.json", 8 << 30)
    with refused(CheckpointError, "drift.json", "256,000,000", f"{8 << 30:,}"):
        Delta.open(tmp_path)


# ------------------------------------------------------------------ JSON that grows


LISTS = "[" + "[]," * 2_000_000 + "[]]"


def test_json_of_many_small_parts_is_refused_by_the_memory_that_it_would_take(
    tmp_path: Path,
) -> None:
    words = ("MiB of memory", "expected at most 381")
    (tmp_path / "config.json").write_text(f'{{"hidden_size": {LISTS}}}')
    with refused(CheckpointError, tmp_path / "config.json", *words):
        Configuration.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text(f'{{"model": {{"type": "BPE", "vocab": {LISTS}}}}}')
    with refused(CheckpointError, tmp_path / "tokenizer.json", *words):
        read_vocabulary(tmp_path)
    pair = write_pair(tmp_path / "pair")
    compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta")
    described = json.loads((tmp_path / "delta" / "drift.json").read_text())
    text = json.dumps(described | {"coverage": "LISTS"}).replace('"LISTS"', LISTS)
    (tmp_path / "delta" / "drift.json").write_text(text)
    with refused(CheckpointError, tmp_path / "delta" / "drift.json", *words):
        Delta.open(tmp_path / "delta")
    with refused(CheckpointError, "https://host/index", *words):
        shard_names(f'{{"weight_map": {LISTS}}}'.encode(), "https://host/index")


def test_parts_of_a_tokenizer_that_are_not_needed_cost_nothing(tmp_path: Path) -> None:
    text = f'{{"model": {{"type": "BPE", "vocab": {{"a": 0}}, "merges": {LISTS}}}}}'
    (tmp_path / "tokenizer.json").write_text(text)
    found = read_vocabulary(tmp_path)
    assert found is not None
    assert found.tokens == {"a": 0}


def test_the_vocabulary_of_the_largest_model_is_within_the_limits(tmp_path: Path) -> None:
    vocabulary = {f"token {number}": number for number in range(262_144)}
    assert json_memory(json.dumps(vocabulary).encode(), unique=True) < 400_000_000
    too_many = {f"{number}": number for number in range((1 << 19) + 1)}
    content = {"model": {"type": "BPE", "vocab": too_many}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with refused(CheckpointError, tmp_path / "tokenizer.json", "at most 524,288 tokens"):
        read_vocabulary(tmp_path)


# ------------------------------------------------------------------ two models


def test_names_too_alike_to_be_matched_are_refused_and_shown(tmp_path: Path) -> None:
    a = empty(tmp_path / "a.safetensors", (f"p{number}.x.weight" for number in range(1500)))
    b = empty(tmp_path / "b.safetensors", (f"q{number}.x.weight" for number in range(1500)))
    with refused(AlignmentError, a, b, "too alike", "which is the limit"):
        compute_delta(a, b)
    assert "too alike" in str(check(a, b))


@pytest.mark.slow
def test_more_endings_than_the_limit_are_refused(tmp_path: Path) -> None:
    path = ".".join("a" * 60)
    names = [f"{path}.{number}x" for number in range(75_000)]
    a = empty(tmp_path / "a.safetensors", names)
    with refused(AlignmentError, "4194304 different endings", "the limit"):
        compute_delta(a, a)


def test_of_more_layers_than_any_model_has_the_first_and_the_last_are_compared() -> None:
    def pairs(layers: int) -> list[NamePair]:
        names = [f"layers.{layer}.self_attn.q_proj.weight" for layer in range(layers)]
        return [NamePair(name, name) for name in names]

    (group,) = _groups(pairs(1000), {pair.name: (4, 4) for pair in pairs(1000)})
    assert group == pairs(1000)
    many = pairs(20_000)
    (group,) = _groups(many, {pair.name: (4, 4) for pair in many})
    assert group == many[:512] + many[-512:]


# ------------------------------------------------------------------ a file that is exchanged

# Exchanges a source for a FIFO while it is read.
EXCHANGE = """
import os, sys
import drift_fast

def exchange(progress):
    path = sys.argv[1] + "/model.safetensors"
    if os.path.isfile(path):
        os.unlink(path)
        os.mkfifo(path)

try:
    drift_fast.compute_delta(*sys.argv[1:4], threads=1, on_progress=exchange)
except drift_fast.CheckpointError as error:
    print(error)
"""


def test_a_pipe_that_takes_the_place_of_a_shard_while_it_is_read_does_not_hang(
    tmp_path: Path,
) -> None:
    pair = write_pair(tmp_path)
    out = tmp_path / "result" / "delta"
    out.parent.mkdir()
    answer = subprocess.run(
        [sys.executable, "-c", EXCHANGE, pair.reasoning, pair.multimodal, out],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "expected a regular file" in answer.stdout
    assert not list(out.parent.iterdir())
