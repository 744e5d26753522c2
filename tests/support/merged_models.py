"""Three models on disk, a base and two that come from it, and what a merge of them must be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support import merge_reference
from support.synthetic import (
    BITS_DTYPE,
    Stored,
    language_model,
    projector,
    round_once,
    stored,
    vision_tower,
    widen,
    write_checkpoint,
)

DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
PREFIX = "model.language_model."


def text_name(name: str) -> str:
    return name.replace(PREFIX, "model.")


@dataclass(frozen=True)
class Three:
    """A reasoning model, a multimodal one and their base on disk, and what was written."""

    reasoning: Path
    multimodal: Path
    base: Path
    text: dict[str, Stored]
    vlm: dict[str, Stored]
    origin: dict[str, Stored]


def near(rng: np.random.Generator, tensors: dict[str, Stored], dtype: str) -> dict[str, Stored]:
    """Return the tensors some fine-tuning apart, half of their elements not moved at all."""
    return {
        name: stored(
            tensor.values.reshape(tensor.shape)
            + rng.normal(0, 0.05, tensor.shape) * rng.integers(0, 2, tensor.shape),
            dtype,
        )
        for name, tensor in tensors.items()
    }


def write_three(
    directory: Path, *, dtypes: tuple[str, str, str] = ("BF16", "BF16", "BF16"), **model: Any
) -> Three:
    rng = np.random.default_rng(7)
    origin = language_model(rng, dtype=dtypes[2], **model)
    text = near(rng, origin, dtypes[0])
    backbone = {
        name.replace("model.", PREFIX, 1): tensor
        for name, tensor in near(rng, origin, dtypes[1]).items()
    }
    vlm = {**vision_tower(rng), **projector(rng), **backbone}
    three = Three(
        write_checkpoint(directory / "text", text, shards=2),
        write_checkpoint(directory / "vlm", vlm, shards=3),
        write_checkpoint(directory / "base", origin),
        text,
        vlm,
        origin,
    )
    (three.multimodal / "config.json").write_text("{}")
    return three


def stored_tensors(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Read every tensor of a checkpoint with nothing but the format's text."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                body = data[8 + length + start : 8 + length + end]
                found[name] = (entry["dtype"], entry["shape"], body)
    return found


def exact(tensors: dict[str, Stored], name: str) -> merge_reference.Array:
    tensor = tensors[name]
    return np.asarray(tensor.values, dtype=np.float64).reshape(tensor.shape)


def agrees(
    three: Three,
    name: str,
    found: tuple[str, list[int], bytes],
    method: str,
    options: dict[str, Any],
) -> None:
    """Check that a tensor is the float64 result rounded once.

    The reference takes the operations in another order, so a result within 1e-13 of the operands'
    size of a midpoint may round to either side; there are few of those.
    """
    with_base = options.pop("base", None) is not None
    r, m = exact(three.text, text_name(name)), exact(three.vlm, name)
    b = exact(three.origin, text_name(name)) if with_base else None
    expected = merge_reference.METHODS[method](r, m, b, name=name, **options)
    dtype, shape, body = found
    assert shape == list(expected.shape)
    bits = np.frombuffer(body, BITS_DTYPE[dtype])
    scale = sum(np.abs(side) for side in (r, m, b if b is not None else m))
    slack = (1e-13 * scale).reshape(-1)
    flat = expected.reshape(-1)
    values = widen(bits, dtype)
    low, high = (widen(round_once(flat + side * slack, dtype), dtype) for side in (-1, 1))
    # Sign of zero apart, which no formula fixes.
    assert np.all((low <= values) & (values <= high)), name
    other = np.sum(values != widen(round_once(flat, dtype), dtype))
    assert dtype == "F64" or other <= 2 + values.size // 1000, (name, other)
