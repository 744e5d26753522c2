"""Checkpoints written byte by byte, well formed or not, and float64 oracles for their delta.

Owns: the bytes of a safetensors file and index as the format's text describes them, and the
rounding of float64 to each element type in integer arithmetic.
Does not own: anything of drift_fast; no function here imports it or the safetensors package, so a
mistake of either cannot cancel out in a test.
Invariant: the same arguments give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Floats = npt.NDArray[np.float64]
Bits = npt.NDArray[Any]
Errors = type[BaseException] | tuple[type[BaseException], ...]

EXPONENT_AND_MANTISSA_NBITS = {"BF16": (8, 7), "F16": (5, 10), "F32": (8, 23), "F64": (11, 52)}
BITS_DTYPE = {"BF16": "<u2", "F16": "<u2", "F32": "<u4", "F64": "<u8"}
NBYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
NBYTES |= {"U32": 4, "U16": 2, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
OUTPUT_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


# ------------------------------------------------------------------ float64 oracle


def round_once(values: npt.ArrayLike, dtype: str) -> Bits:
    """Round float64 to the nearest `dtype`, ties to even, in integer arithmetic; return the bits.

    Nothing lies between float64 and the target, so a value next to a midpoint is not rounded
    twice, as it is by torch's float64 → float32 → bfloat16. NaN becomes the quiet NaN.
    """
    source = np.atleast_1d(np.asarray(values, dtype=np.float64)).view(np.uint64)
    if dtype == "F64":
        return source.copy()
    exponent_nbits, mantissa_nbits = EXPONENT_AND_MANTISSA_NBITS[dtype]
    bias = (1 << (exponent_nbits - 1)) - 1
    lowest = 1 - bias
    negative = (source >> np.uint64(63)).astype(np.uint64)
    field = ((source >> np.uint64(52)) & np.uint64(0x7FF)).astype(np.int64)
    fraction = source & np.uint64((1 << 52) - 1)
    exponent = np.maximum(field, 1) - 1023
    significand = np.where(field > 0, fraction | np.uint64(1 << 52), fraction)

    # One unit in the last place of the target is 2 ** (max(exponent, lowest) - mantissa_nbits);
    # beyond 54 bits every significand is below half a unit, so 54 stands for all larger shifts.
    shift = np.clip(np.maximum(exponent, lowest) - mantissa_nbits - (exponent - 52), 0, 54)
    shift = shift.astype(np.uint64)
    kept = significand >> shift
    rest = significand & ((np.uint64(1) << shift) - np.uint64(1))
    half = np.uint64(1) << (shift - np.uint64(1))
    kept += ((rest > half) | ((rest == half) & (kept & np.uint64(1) == 1))).astype(np.uint64)

    # `kept` carries its own leading one, so adding it to (exponent - lowest) makes the exponent
    # field right for normal values, for subnormal ones and after a carry.
    magnitude = (
        np.maximum(exponent - lowest, 0).astype(np.uint64) << np.uint64(mantissa_nbits)
    ) + kept
    infinity = np.uint64(((1 << exponent_nbits) - 1) << mantissa_nbits)
    magnitude = np.minimum(magnitude, infinity)
    special = field == 0x7FF
    quiet = infinity | np.uint64(1 << (mantissa_nbits - 1))
    magnitude = np.where(special, np.where(fraction > 0, quiet, infinity), magnitude)
    bits = magnitude | (negative << np.uint64(exponent_nbits + mantissa_nbits))
    return bits.astype(BITS_DTYPE[dtype])


def widen(bits: Bits, dtype: str) -> Floats:
    """Return the float64 value of each element, exactly."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    with np.errstate(invalid="ignore"):
        return np.ascontiguousarray(bits).view(kind).astype(np.float64)


def finite_bits(bits: Bits, dtype: str) -> Bits:
    """Turn every NaN and infinity into a finite value of the same sign."""
    exponent_nbits, mantissa_nbits = EXPONENT_AND_MANTISSA_NBITS[dtype]
    kind = bits.dtype.type
    exponent = kind(((1 << exponent_nbits) - 1) << mantissa_nbits)
    return np.where(bits & exponent == exponent, bits & ~kind(1 << mantissa_nbits), bits)


def subtract(a: Floats, b: Floats) -> Floats:
    """Return a − b as float64 arithmetic gives it, overflow included."""
    with np.errstate(over="ignore", invalid="ignore"):
        return a - b


def norm(values: Floats) -> float:
    """Return the Euclidean norm in extended precision, scaled so that no square overflows."""
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0.0:
        return 0.0
    scaled = values.astype(np.longdouble) / np.longdouble(largest)
    return float(np.longdouble(largest) * np.sqrt(np.sum(scaled * scaled)))


def cosine(a: Floats, b: Floats) -> float:
    """Return ⟨a, b⟩ / (‖a‖·‖b‖) in extended precision, each factor scaled first."""
    left = a.astype(np.longdouble) / np.longdouble(norm(a))
    right = b.astype(np.longdouble) / np.longdouble(norm(b))
    return float(np.sum(left * right))


# ------------------------------------------------------------------ awkward operands


def awkward_operands(
    rng: np.random.Generator, count: int, a_dtype: str, b_dtype: str, out_dtype: str
) -> tuple[Bits, Bits]:
    """Return finite operands whose difference is hard to round to `out_dtype`.

    Eight equal families, in turn: random bits; close values; midpoints of the output beside
    something tiny; differences that are midpoints; subnormals; the edge of overflow; zeros of both
    signs and equal values; exponent gaps wider than any significand.
    """
    size = -(-count // 8)

    def random_bits(dtype: str) -> Bits:
        raw = rng.integers(0, 256, size * NBYTES[dtype], dtype=np.uint8)
        bits = finite_bits(raw.view(BITS_DTYPE[dtype]), dtype)
        # Statistics are sums of squares in float64; a test of its own goes beyond their range.
        magnitude = widen(bits, dtype)
        return np.where(np.abs(magnitude) < 1e150, bits, round_once(np.sin(magnitude), dtype))

    def encoded(values: Floats, dtype: str) -> Bits:
        return finite_bits(round_once(values, dtype), dtype)

    def tiny_beside(values: Floats) -> Floats:
        sign = rng.choice([-1.0, 0.0, 1.0], size)
        return sign * np.abs(values) * 2.0 ** -rng.integers(1, 90, size).astype(np.float64)

    def output_midpoints() -> Floats:
        values = rng.choice([-1.0, 1.0], size) * 2.0 ** rng.uniform(-20, 12, size)
        bits = round_once(values, out_dtype)
        return (widen(bits, out_dtype) + widen(bits + bits.dtype.type(1), out_dtype)) / 2

    def subnormal_bits(dtype: str) -> Bits:
        exponent_nbits, mantissa_nbits = EXPONENT_AND_MANTISSA_NBITS[dtype]
        kind = np.dtype(BITS_DTYPE[dtype]).type
        keep = kind((1 << (mantissa_nbits + 1)) - 1 | 1 << (exponent_nbits + mantissa_nbits))
        return random_bits(dtype) & keep

    near = rng.uniform(-2, 2, size)
    midpoints = output_midpoints()
    offsets = rng.uniform(-4, 4, size)
    exponent_nbits, mantissa_nbits = EXPONENT_AND_MANTISSA_NBITS[out_dtype]
    top = 2.0 ** ((1 << (exponent_nbits - 1)) - 1)
    half_ulp = top * 2.0 ** -(mantissa_nbits + 1)
    edge = rng.choice([-1.0, 1.0], size) * (
        2 * top - 2 * half_ulp + rng.integers(-3, 4, size) * half_ulp
    )
    zeros = rng.choice([-0.0, 0.0], (2, size))
    equal = rng.random(size) < 0.5
    gap = 2.0 ** rng.uniform(-8, 8, size)
    families = [
        (random_bits(a_dtype), random_bits(b_dtype)),
        (encoded(near, a_dtype), encoded(near * (1 + rng.normal(0, 1e-3, size)), b_dtype)),
        (encoded(midpoints, a_dtype), encoded(tiny_beside(midpoints), b_dtype)),
        (encoded(output_midpoints() + offsets, a_dtype), encoded(offsets, b_dtype)),
        (subnormal_bits(a_dtype), subnormal_bits(b_dtype)),
        (encoded(edge, a_dtype), encoded(tiny_beside(edge), b_dtype)),
        (
            encoded(np.where(equal, near, zeros[0]), a_dtype),
            encoded(np.where(equal, near, zeros[1]), b_dtype),
        ),
        (encoded(gap, a_dtype), encoded(gap * 2.0 ** rng.uniform(-140, -50, size), b_dtype)),
    ]
    a = np.concatenate([left for left, _ in families])
    b = np.concatenate([right for _, right in families])
    order = rng.permutation(a.size)[:count]
    return a[order], b[order]


# ------------------------------------------------------------------ tensors and files


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file: element type, shape and little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def bits(self) -> Bits:
        return np.frombuffer(self.data, dtype=BITS_DTYPE[self.dtype])

    @property
    def values(self) -> Floats:
        return widen(self.bits, self.dtype)


def stored(
    values: npt.ArrayLike, dtype: str = "BF16", shape: tuple[int, ...] | None = None
) -> Stored:
    array = np.asarray(values, dtype=np.float64)
    bits = round_once(array.reshape(-1), dtype)
    return Stored(dtype, array.shape if shape is None else shape, bits.tobytes())


def stored_bits(bits: Bits, dtype: str, shape: tuple[int, ...] | None = None) -> Stored:
    return Stored(dtype, (bits.size,) if shape is None else shape, bits.tobytes())


def opaque(dtype: str, *shape: int) -> Stored:
    """Return a tensor of zero bytes in a type that is not a float, such as a position buffer."""
    return Stored(dtype, shape, bytes(math.prod(shape) * NBYTES[dtype]))


def header_of(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    return header


def write_raw(
    path: Path,
    header: bytes | str | Mapping[str, Any],
    data: bytes = b"",
    *,
    length: int | None = None,
) -> Path:
    """Write a file of this header and data as they stand; `length` replaces the header's length."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    length = len(header) if length is None else length
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return path


def write_file(path: Path, tensors: Mapping[str, Stored], *, misalign: int = 0) -> Path:
    """Write a valid file whose data begin `misalign` bytes past a multiple of eight."""
    header = json.dumps(header_of(tensors)).encode()
    header += b" " * ((misalign - len(header)) % 8)
    return write_raw(path, header, b"".join(tensor.data for tensor in tensors.values()))


def write_index(directory: Path, weight_map: Mapping[str, Any] | str) -> Path:
    """Write the index; a string stands for the text of the weight map, duplicates and all."""
    text = weight_map if isinstance(weight_map, str) else json.dumps(weight_map)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.safetensors.index.json"
    path.write_text('{"metadata": {"total_size": 0}, "weight_map": ' + text + "}")
    return path


def write_checkpoint(
    directory: Path, tensors: Mapping[str, Stored], *, shards: int = 1, misalign: int = 0
) -> Path:
    """Write a directory with model.safetensors, or with an index and `shards` shards."""
    if shards == 1:
        write_file(directory / "model.safetensors", tensors, misalign=misalign)
        return directory
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        held = {name: tensors[name] for name in names[number::shards]}
        write_file(directory / file, held, misalign=misalign)
        weight_map.update(dict.fromkeys(held, file))
    write_index(directory, weight_map)
    return directory


def write_sparse(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str = "BF16",
    *,
    seed: int | None = None,
) -> Path:
    """Write a file of holes that takes no disk, with some random values if `seed` is set."""
    header: dict[str, Any] = {}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * NBYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    write_raw(path, header)
    start = path.stat().st_size
    os.truncate(path, start + begin)
    if seed is not None:
        rng = np.random.default_rng(seed)
        block = round_once(rng.normal(0, 1, 1 << 15), dtype).tobytes()
        with path.open("r+b") as file:
            for offset in range(start, start + begin - len(block), 1 << 24):
                file.seek(offset)
                file.write(block)
    return path


# ------------------------------------------------------------------ models


def language_model(
    rng: np.random.Generator,
    *,
    layers: int = 2,
    hidden: int = 8,
    inner: int = 12,
    vocab: int = 16,
    prefix: str = "model.",
    head: str | None = "lm_head.weight",
    bias: bool = False,
    dtype: str = "BF16",
) -> dict[str, Stored]:
    """Return the random tensors of a Llama-like model, as a text checkpoint names them."""

    def random(*shape: int) -> Stored:
        return stored(rng.normal(0, 1, shape), dtype)

    tensors = {f"{prefix}embed_tokens.weight": random(vocab, hidden)}
    for layer in range(layers):
        at = f"{prefix}layers.{layer}."
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}self_attn.{projection}.weight"] = random(hidden, hidden)
            if bias and projection != "o_proj":
                tensors[f"{at}self_attn.{projection}.bias"] = random(hidden)
        tensors[f"{at}mlp.gate_proj.weight"] = random(inner, hidden)
        tensors[f"{at}mlp.up_proj.weight"] = random(inner, hidden)
        tensors[f"{at}mlp.down_proj.weight"] = random(hidden, inner)
        tensors[f"{at}input_layernorm.weight"] = random(hidden)
        tensors[f"{at}post_attention_layernorm.weight"] = random(hidden)
    tensors[f"{prefix}norm.weight"] = random(hidden)
    if head is not None:
        tensors[head] = random(vocab, hidden)
    return tensors


def vision_tower(
    rng: np.random.Generator,
    *,
    layers: int = 2,
    hidden: int = 8,
    inner: int = 12,
    prefix: str = "vision_tower.vision_model.",
    dtype: str = "BF16",
) -> dict[str, Stored]:
    """Return the tensors of a CLIP-like tower: its attention is named as a language model's is."""
    tensors = {
        f"{prefix}embeddings.patch_embedding.weight": stored(
            rng.normal(0, 1, (hidden, 3, 2, 2)), dtype
        )
    }
    for layer in range(layers):
        at = f"{prefix}encoder.layers.{layer}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors[f"{at}self_attn.{projection}.weight"] = stored(
                rng.normal(0, 1, (hidden, hidden)), dtype
            )
            tensors[f"{at}self_attn.{projection}.bias"] = stored(rng.normal(0, 1, hidden), dtype)
        tensors[f"{at}mlp.fc1.weight"] = stored(rng.normal(0, 1, (inner, hidden)), dtype)
        tensors[f"{at}mlp.fc2.weight"] = stored(rng.normal(0, 1, (hidden, inner)), dtype)
        tensors[f"{at}layer_norm1.weight"] = stored(rng.normal(0, 1, hidden), dtype)
    return tensors


def projector(
    rng: np.random.Generator, *, hidden: int = 8, dtype: str = "BF16"
) -> dict[str, Stored]:
    return {
        "multi_modal_projector.linear_1.weight": stored(rng.normal(0, 1, (hidden, hidden)), dtype)
    }


def moved(
    rng: np.random.Generator,
    tensors: Mapping[str, Stored],
    *,
    prefix: str = "model.",
    to: str = "model.language_model.",
) -> dict[str, Stored]:
    """Return the tensors a little moved and under another prefix, as after fine-tuning."""
    return {
        (to + name.removeprefix(prefix) if name.startswith(prefix) else name): stored(
            tensor.values.reshape(tensor.shape) + rng.normal(0, 0.05, tensor.shape), tensor.dtype
        )
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class Pair:
    """A text and a multimodal checkpoint on disk, and the tensors written to them."""

    reasoning: Path
    multimodal: Path
    text: dict[str, Stored]
    vlm: dict[str, Stored]

    def source_of(self, name: str) -> str:
        """Return the text checkpoint's name for a multimodal tensor."""
        return name.replace("model.language_model.", "model.")

    def expected(self, name: str, dtype: str) -> Bits:
        """Return the bits of Δ for a multimodal name, rounded once to `dtype`."""
        difference = subtract(self.text[self.source_of(name)].values, self.vlm[name].values)
        return round_once(difference, dtype)


def write_pair(directory: Path, *, seed: int = 0, shards: int = 1, **model: Any) -> Pair:
    """Write a text model and a multimodal one of the same backbone, some fine-tuning apart."""
    rng = np.random.default_rng(seed)
    text = language_model(rng, **model)
    sizes = {key: value for key, value in model.items() if key in {"layers", "hidden", "dtype"}}
    vlm = {
        **vision_tower(rng, **sizes),
        **projector(rng, **{key: value for key, value in sizes.items() if key != "layers"}),
        **moved(rng, text),
    }
    return Pair(
        write_checkpoint(directory / "text", text, shards=shards),
        write_checkpoint(directory / "vlm", vlm, shards=1 if shards == 1 else shards + 1),
        text,
        vlm,
    )


# ------------------------------------------------------------------ expectations


@contextmanager
def refused(error: Errors, *words: object) -> Iterator[None]:
    """Expect `error` with a message for people that holds each of the words, in any case."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    missing = [str(word) for word in words if str(word).lower() not in message.lower()]
    assert not missing, f"{missing} not in: {message}"
    for debug in ("Some(", "None)", "Error {", "Err(", "panicked", "Os {"):
        assert debug not in message, f"debug output in: {message}"


def everything_under(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def contents(
    directory: Path, patterns: Iterable[str] = ("*.safetensors", "*.index.json")
) -> dict[str, bytes]:
    """Return the bytes of the delta's shards and index by file name."""
    return {
        path.name: path.read_bytes()
        for pattern in patterns
        for path in sorted(directory.glob(pattern))
    }
