"""Whatever is read of a delta on disk is what was written, or the tensor is named.

Checksums are worked out anew here with zlib, as docs/format.md says; what damages a file is done to
its bytes alone, so that sizes and headers still fit.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from drift_fast import CheckpointError, Delta, combine, compute_delta
from support.synthetic import Pair, everything_under, refused, write_pair

BLOCK = 1 << 20
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"
# Several blocks in every dtype, the last of them short; its scales in int8 are one block.
EMBEDDING = "model.language_model.embed_tokens.weight"
DTYPES = ("bfloat16", "float16", "float32", "int8")


@pytest.fixture(scope="module")
def large_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("large")
    return write_pair(directory, layers=1, hidden=128, inner=160, vocab=18_001, head=None)


@pytest.fixture(scope="module")
def written(large_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Deltas in every dtype; read only."""
    directory = tmp_path_factory.mktemp("written")
    for dtype in DTYPES:
        compute_delta(
            large_pair.reasoning,
            large_pair.multimodal,
            directory / dtype,
            modules="all",
            rows="index",
            dtype=dtype,
            max_shard_size="1MB",
        )
    return {dtype: directory / dtype for dtype in DTYPES}


@pytest.fixture(params=DTYPES)
def delta(request: pytest.FixtureRequest, written: dict[str, Path], tmp_path: Path) -> Path:
    """A delta of one dtype, to be damaged."""
    return copied(written[request.param], tmp_path / request.param)


def copied(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def description(delta: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((delta / "drift.json").read_text())
    return found


def place(delta: Path, name: str) -> tuple[Path, int, int]:
    """Return the file that holds a tensor, and where it begins and ends there."""
    index = json.loads((delta / "delta.safetensors.index.json").read_text())
    path = delta / index["weight_map"][name]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return path, 8 + length + start, 8 + length + end


def change(delta: Path, name: str, at: int) -> None:
    """Change one bit of byte `at` of a tensor; negative ones count from its end."""
    path, start, end = place(delta, name)
    data = bytearray(path.read_bytes())
    data[(start if at >= 0 else end) + at] ^= 1 << 3
    path.write_bytes(data)


def edit(delta: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = description(delta)
    change(content)
    (delta / "drift.json").write_text(json.dumps(content))


# --- what is written --------------------------------------------------------------------------


def test_every_block_has_the_crc_of_zlib(delta: Path) -> None:
    found = description(delta)["checksums"]
    assert (found["algorithm"], found["block_nbytes"]) == ("crc32", BLOCK)
    expected = {}
    index = json.loads((delta / "delta.safetensors.index.json").read_text())
    for name in index["weight_map"]:
        path, start, end = place(delta, name)
        data = path.read_bytes()[start:end]
        blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
        expected[name] = "".join(f"{zlib.crc32(block):08x}" for block in blocks)
    assert found["tensors"] == expected
    assert len(expected[EMBEDDING]) > 2 * 8


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 5}, {"memory": "3MB"}])
def test_they_depend_on_neither_threads_nor_memory(
    large_pair: Pair, written: dict[str, Path], out: Path, options: dict[str, Any]
) -> None:
    paths = large_pair.reasoning, large_pair.multimodal
    compute_delta(*paths, out, modules="all", rows="index", max_shard_size="1MB", **options)
    assert description(out)["checksums"] == description(written["bfloat16"])["checksums"]


@pytest.mark.parametrize("memory", [None, "2MB", 1001])
def test_a_copy_has_those_of_the_original(
    written: dict[str, Path], out: Path, memory: int | str | None
) -> None:
    Delta.open(written["int8"]).save(out, memory=memory)
    assert description(out)["checksums"] == description(written["int8"])["checksums"]


def test_a_combination_that_is_saved_has_its_own(written: dict[str, Path], out: Path) -> None:
    saved = Delta.combine({Delta.open(written["bfloat16"]): 0.5}).save(out)
    assert saved.has_checksums
    change(out, Q_PROJ, 0)
    with refused(CheckpointError, Q_PROJ):
        Delta.open(out)[Q_PROJ]


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, -1])
def test_a_changed_bit_is_found_with_the_name_of_its_tensor(delta: Path, at: int) -> None:
    opened = Delta.open(delta)
    expected = {name: opened[name] for name in opened}
    change(delta, EMBEDDING, at)
    for damaged in (opened, Delta.open(delta)):
        with refused(CheckpointError, EMBEDDING, "damaged or edited", "compute it again"):
            damaged[EMBEDDING]
        for name in damaged:
            if name != EMBEDDING:
                assert torch.equal(damaged[name], expected[name])


def test_a_changed_scale_is_found(written: dict[str, Path], tmp_path: Path) -> None:
    delta = copied(written["int8"], tmp_path / "delta")
    change(delta, f"{EMBEDDING}.scale", -1)
    with refused(CheckpointError, f"{EMBEDDING}.scale"):
        Delta.open(delta)[EMBEDDING]
    with refused(CheckpointError, f"{EMBEDDING}.scale"):
        Delta.open(delta).read_codes(EMBEDDING, 0, 64)


def test_runs_of_elements_are_those_of_the_whole_and_compared_too(delta: Path) -> None:
    opened = Delta.open(delta)
    whole = opened[EMBEDDING].reshape(-1)
    _, start, end = place(delta, EMBEDDING)
    block = BLOCK * whole.numel() // (end - start)
    change(delta, EMBEDDING, BLOCK + 5)
    generator = random.Random(17)
    edges = [0, 1, block - 1, block, block + 1, 2 * block - 1, 2 * block, whole.numel()]
    pairs = [(first, last) for first in edges for last in edges if first <= last]
    pairs += [sorted(generator.sample(range(whole.numel()), 2)) for _ in range(20)]
    for first, last in pairs:
        tensor = torch.empty(last - first, dtype=whole.dtype)
        if first < last and first < 2 * block and last > block:
            with refused(CheckpointError, EMBEDDING):
                opened.read_into(EMBEDDING, tensor, start=first)
        else:
            opened.read_into(EMBEDDING, tensor, start=first)
            assert torch.equal(tensor, whole[first:last]), (first, last)


def test_a_damaged_delta_is_neither_copied_nor_combined(delta: Path, tmp_path: Path) -> None:
    change(delta, EMBEDDING, 12)
    target = tmp_path / "copies"
    target.mkdir()
    with refused(CheckpointError, EMBEDDING):
        Delta.open(delta).save(target / "copy")
    with refused(CheckpointError, EMBEDDING):
        Delta.combine({delta: 2.0}).save(target / "twice")
    with refused(CheckpointError, EMBEDDING):
        combine({delta: 2.0})[EMBEDDING]
    assert everything_under(target) == set()


# --- what earlier versions wrote, and what nobody wrote ---------------------------------------


def test_a_delta_without_checksums_is_read_as_it_is(delta: Path, tmp_path: Path) -> None:
    expected = Delta.open(delta)[Q_PROJ]
    edit(delta, lambda content: content.pop("checksums"))
    opened = Delta.open(delta)
    assert torch.equal(opened[Q_PROJ], expected)
    assert not opened.has_checksums
    assert "without checksums" in repr(opened)
    change(delta, Q_PROJ, 1)
    assert not torch.equal(opened[Q_PROJ], expected)
    saved = opened.save(tmp_path / "copy")
    assert saved.has_checksums
    assert "without checksums" not in repr(saved)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda found: found["tensors"].pop(Q_PROJ), Q_PROJ),
        (lambda found: found["tensors"].update({Q_PROJ: ""}), Q_PROJ),
        (lambda found: found["tensors"].update({Q_PROJ: "0123456g"}), Q_PROJ),
        (lambda found: found["tensors"].update({Q_PROJ: "+1234567"}), Q_PROJ),
        (lambda found: found["tensors"].update({Q_PROJ: "é" * 4}), Q_PROJ),
        (lambda found: found["tensors"].update({Q_PROJ: 7}), "checksums.tensors"),
        (lambda found: found.update(algorithm="sha256"), "checksums.algorithm"),
        (lambda found: found.update(block_nbytes=4096), "checksums.block_nbytes"),
        (lambda found: found.pop("tensors"), "tensors"),
    ],
)
def test_checksums_that_are_not_those_of_the_tensors_are_refused(
    written: dict[str, Path], tmp_path: Path, spoil: Callable[[dict[str, Any]], object], word: str
) -> None:
    delta = copied(written["bfloat16"], tmp_path / "delta")
    edit(delta, lambda content: [spoil(content["checksums"])])
    with refused(CheckpointError, word, "again"):
        Delta.open(delta)
