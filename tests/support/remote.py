"""Checkpoints on a local server: their files, and what a cache directory must hold of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from support.processes import environment

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
START_NBYTES = 256 << 10
GAP_NBYTES = 256 << 10
KB = 1000
# A wait long enough for a thread that must not move to have moved.
MOMENT = 0.2


def shard_of(seed: int, header_nbytes: int = 0, **tensors: int) -> bytes:
    """Return a file of random bytes in U8 tensors of these lengths, its header padded."""
    header: dict[str, Any] = {}
    begin = 0
    for name, nbytes in tensors.items():
        header[name] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    text = json.dumps(header).encode().ljust(header_nbytes)
    return len(text).to_bytes(8, "little") + text + np.random.default_rng(seed).bytes(begin)


def index_of(**places: Any) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": places}).encode()


FILE = shard_of(1, a=3_000_000, b=2_000_000)
CHANGED = shard_of(7, a=3_000_000, b=2_000_000)
SHARDS = {
    "model-00001-of-00003.safetensors": shard_of(2, a=900_000),
    "model-00002-of-00003.safetensors": shard_of(3, b=800_000),
    "model-00003-of-00003.safetensors": shard_of(4, c=700_000),
}
SHARDED = {
    **{f"/m/{name}": data for name, data in SHARDS.items()},
    f"/m/{INDEX}": index_of(**dict(zip("abc", SHARDS, strict=True))),
}


def held(directory: Path, name: str = SINGLE) -> list[tuple[int, int]]:
    stored = json.loads((directory / f"{name}.ranges.json").read_text())
    return [(start, end) for start, end in stored["ranges"]]


def check_held(directory: Path, source: Mapping[str, bytes]) -> None:
    """Check that each shard has the source's length, and its bytes where the list says so."""
    for name, data in source.items():
        assert (directory / name).stat().st_size == len(data)
        local = (directory / name).read_bytes()
        for start, end in held(directory, name):
            assert local[start:end] == data[start:end]


def has(directory: Path, start: int, end: int, name: str = SINGLE) -> bool:
    return any(begin <= start and end <= stop for begin, stop in held(directory, name))


def assert_unseen(secret: str, directory: Path, *texts: str) -> None:
    for text in texts:
        assert secret not in text
    for path in directory.rglob("*"):
        assert secret not in str(path)
        if path.is_file() and not path.is_symlink():
            assert secret.encode() not in path.read_bytes()


def asking_hub(url: str, directory: Path, token: str, **changes: object) -> dict[str, str]:
    """Return the variables of a process that asks a local Hub, and nothing of this one's own."""
    asking = {
        "HF_ENDPOINT": url,
        "HF_HOME": directory / "home",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_TELEMETRY": 1,
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return environment("HF_", "HUGGINGFACE", "HUGGING_FACE", **{**asking, **changes})
