"""Checkpoints of 8-bit floats under block scales: taken at the values that the model computes with.

Codes are turned into values here by the definition of their formats, in numpy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drift_fast import AlignmentError, CheckpointError, NonFiniteError, compute_delta, inspect
from drift_fast.alignment.report import align
from drift_fast.preflight.check import check
from support.synthetic import (
    Pair,
    Stored,
    refused,
    round_once,
    stored,
    write_checkpoint,
    write_file,
    write_pair,
)

KINDS = ("F8_E4M3", "F8_E5M2")
NAME = "model.layers.0.self_attn.q_proj.weight"
SCALE = f"{NAME}_scale_inv"


def values_of(dtype: str) -> np.ndarray[Any, Any]:
    """Return the values of all 256 codes by the definition of the format."""
    mantissa_nbits, bias = {"F8_E4M3": (3, 7), "F8_E5M2": (2, 15)}[dtype]
    found = np.zeros(256)
    for code in range(128):
        exponent, mantissa = code >> mantissa_nbits, code % (1 << mantissa_nbits)
        hidden = 1 << mantissa_nbits if exponent else 0
        value = (hidden + mantissa) * 2.0 ** (max(exponent, 1) - bias - mantissa_nbits)
        if dtype == "F8_E4M3" and code == 0x7F:
            value = np.nan
        if dtype == "F8_E5M2" and exponent == 31:
            value = np.nan if mantissa else np.inf
        found[code], found[code + 128] = value, -value
    return found


def dequantized(
    codes: np.ndarray[Any, Any], dtype: str, scales: np.ndarray[Any, Any], block: tuple[int, int]
) -> np.ndarray[Any, Any]:
    """Return float32(code) × scale in float32, block by block."""
    rows, columns = codes.shape
    spread = scales.repeat(block[0], 0)[:rows].repeat(block[1], 1)[:, :columns]
    with np.errstate(invalid="ignore"):
        found = values_of(dtype).astype(np.float32)[codes] * spread.astype(np.float32)
    assert found.dtype == np.float32
    return np.asarray(found)


def write_config(directory: Path, block: Any = None, **more: Any) -> None:
    quantization: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if block is not None:
        quantization["weight_block_size"] = block
    directory.mkdir(parents=True, exist_ok=True)
    config = {"quantization_config": quantization, **more}
    (directory / "config.json").write_text(json.dumps(config))


def random_codes(
    rng: np.random.Generator, rows: int, columns: int, block: tuple[int, int], dtype: str
) -> tuple[Stored, Stored, np.ndarray[Any, Any]]:
    """Return finite codes, their scales and their values."""
    codes = rng.integers(0, 0x7C, (rows, columns), dtype=np.uint8)
    codes |= rng.integers(0, 2, codes.shape, dtype=np.uint8) << np.uint8(7)
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    scales = (2.0 ** rng.uniform(-12, -3, shape)).astype(np.float32)
    return (
        Stored(dtype, (rows, columns), codes.tobytes()),
        stored(scales, "F32"),
        dequantized(codes, dtype, scales, block),
    )


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("shape", "block"),
    [((1, 1), None), ((130, 257), None), ((700, 1000), None), ((33, 70), (16, 32))],
)
@pytest.mark.parametrize("reader", ["pread", "mmap"])
def test_delta_is_the_float64_difference_of_the_float32_values(
    tmp_path: Path, dtype: str, shape: tuple[int, int], block: tuple[int, int] | None, reader: str
) -> None:
    rng = np.random.default_rng([1, *shape])
    codes, scales, values = random_codes(rng, *shape, block or (128, 128), dtype)
    other = stored(rng.normal(0, 0.5, shape), "BF16")
    # Neither directory tells more than its config.json; scales may come before or after.
    write_file(tmp_path / "a" / "model.safetensors", {SCALE: scales, NAME: codes}, misalign=1)
    write_config(tmp_path / "a", None if block is None else list(block))
    write_file(tmp_path / "b" / "model.safetensors", {NAME: other}, misalign=5)
    options: dict[str, Any] = {"dtype": "float32", "check_weights": False, "reader": reader}
    delta = compute_delta(tmp_path / "a", tmp_path / "b", **options)
    exact = values.astype(np.float64) - other.values.reshape(shape)
    assert np.array_equal(
        delta[NAME].numpy().view(np.uint32).ravel(), round_once(exact.ravel(), "F32")
    )
    assert delta.stats[NAME].reasoning_norm == pytest.approx(
        np.linalg.norm(values.astype(np.float64)), rel=1e-6
    )
    # From the other side, and a slice that starts inside a block.
    delta = compute_delta(tmp_path / "b", tmp_path / "a", **options)
    start = exact.size // 3
    part = torch.empty(min(500, exact.size - start))
    delta.read_into(NAME, part, start=start)
    expected = round_once(-exact.ravel()[start : start + part.numel()], "F32")
    assert np.array_equal(part.numpy().view(np.uint32) & 0x7FFFFFFF, expected & 0x7FFFFFFF)
    assert not delta.coverage.unmatched_multimodal


@pytest.mark.parametrize("dtype", KINDS)
def test_every_code_has_its_value_and_those_that_are_no_number_are_counted(
    tmp_path: Path, dtype: str
) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    write_file(
        tmp_path / "a.safetensors",
        {
            NAME: Stored(dtype, codes.shape, codes.tobytes()),
            SCALE: stored(np.full((1, 1), 0.3), "F32"),
        },
    )
    zeros = write_file(tmp_path / "b.safetensors", {NAME: stored(np.zeros(codes.shape), "F32")})
    count = {"F8_E4M3": 2, "F8_E5M2": 8}[dtype]
    with refused(NonFiniteError, NAME, f"{count} NaN or infinite", "a.safetensors"):
        inspect(tmp_path / "a.safetensors", zeros, check_weights=False)
    delta = compute_delta(
        tmp_path / "a.safetensors",
        zeros,
        dtype="float32",
        check_weights=False,
        allow_nonfinite=True,
    )
    expected = dequantized(codes, dtype, np.full((1, 1), 0.3, np.float32), (128, 128))
    np.testing.assert_array_equal(delta[NAME].numpy(), expected)
    assert delta.stats[NAME].nonfinite == count


def pair_in_fp8(
    directory: Path, *, both: bool = False, seed: int = 0, config: bool = True
) -> tuple[Pair, dict[str, np.ndarray[Any, Any]]]:
    """Write a pair whose text model, or both, is in E4M3; return the values of the codes."""
    pair = write_pair(directory, seed=seed, hidden=64, inner=96, layers=3)
    values: dict[str, np.ndarray[Any, Any]] = {}

    def quantized(tensors: dict[str, Stored]) -> dict[str, Stored]:
        found = {}
        for name, tensor in tensors.items():
            found[name] = tensor
            if "_proj" not in name or "projector" in name or "vision" in name:
                continue
            weights = torch.from_numpy(tensor.values.reshape(tensor.shape)).float()
            scale = weights.abs().max() / 448
            codes = (weights / scale).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
            scales = np.full((1, 1), scale.item(), np.float32)
            found[name] = Stored("F8_E4M3", tensor.shape, codes.tobytes())
            found[f"{name}_scale_inv"] = stored(scales, "F32")
            values[name] = dequantized(codes, "F8_E4M3", scales, (128, 128))
        return found

    write_checkpoint(pair.reasoning, quantized(pair.text))
    if both:
        write_checkpoint(pair.multimodal, quantized(pair.vlm))
    if config:
        write_config(pair.reasoning)
    return pair, values


@pytest.mark.filterwarnings("ignore:.* is rounding:drift_fast.DriftWarning")
@pytest.mark.parametrize("both", [False, True])
def test_scales_are_no_weights_and_are_not_left_over(tmp_path: Path, both: bool) -> None:
    pair, values = pair_in_fp8(tmp_path, both=both, config=False)
    found = align(pair.reasoning, pair.multimodal)
    assert found.ok, found.problem
    assert not any("scale_inv" in name for item in found.pairs for name in item)
    left = found.unmatched_reasoning + found.unmatched_multimodal
    assert not any("scale_inv" in name for name, _ in left)
    delta = compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta", dtype="float32")
    assert delta.coverage.fraction == 1.0
    # The likeness was taken from values, not from codes.
    likeness = delta.alignment["likeness"]
    assert likeness["matched"] > 0.95
    for name in delta:
        source = pair.source_of(name)
        a = values[source].astype(np.float64)
        b = values[name] if both else pair.vlm[name].values.reshape(a.shape)
        expected = round_once((a - b).ravel(), "F32")
        assert np.array_equal(delta[name].numpy().view(np.uint32).ravel(), expected), name


def test_check_notes_what_the_rounding_means_and_that_the_pair_fits(tmp_path: Path) -> None:
    pair, _ = pair_in_fp8(tmp_path)
    report = check(pair.reasoning, pair.multimodal)
    (row,) = (finding for finding in report.findings if finding.subject == "quantization")
    assert row.severity == "note"
    for word in ("the reasoning model (fp8)", "8-bit floats", "block scales", "rounding"):
        assert word in row.message
    assert report.ok, report.table()
    assert report.plan is not None
    numel = sum(np.prod(shape) for shape in compute_delta(*_paths(pair)).shapes.values())
    assert report.plan.read_nbytes[0] == numel


def test_a_model_in_fp8_cannot_be_trained_along_delta(tmp_path: Path) -> None:
    pair, _ = pair_in_fp8(tmp_path)
    report = check(pair.multimodal, pair.multimodal, pair.reasoning)
    breaks = [row.subject for row in report.findings if row.severity == "breaks"]
    assert "quantization" in breaks


def _paths(pair: Pair) -> tuple[Path, Path]:
    return pair.reasoning, pair.multimodal


def changed(directory: Path, change: dict[str, Stored | None]) -> tuple[Path, Path]:
    """Write a pair of one tensor in codes, with `change` made; return both files."""
    rng = np.random.default_rng(3)
    codes, scales, _ = random_codes(rng, 130, 140, (128, 128), "F8_E4M3")
    tensors: dict[str, Stored | None] = {NAME: codes, SCALE: scales, **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    other = stored(rng.normal(0, 1, (130, 140)), "BF16")
    return (
        write_file(directory / "a.safetensors", kept),
        write_file(directory / "b.safetensors", {NAME: other}),
    )


def test_codes_without_scales_are_refused_with_what_was_expected(tmp_path: Path) -> None:
    first, second = changed(tmp_path, {SCALE: None})
    for sides in ((first, second), (second, first)):
        with refused(CheckpointError, NAME, SCALE, "F32", "[2, 2]", "128 × 128", "BF16"):
            compute_delta(*sides, tmp_path / "delta")
        assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        (stored(np.ones((2, 2)), "BF16"), ("dtype BF16", "expected F32")),
        (stored(np.ones((2, 3)), "F32"), ("[2, 3]", "[2, 2]", "weight_block_size")),
        (stored(np.ones(4), "F32"), ("[4]", "[2, 2]")),
        (stored(np.array([[1.0, 1.0], [np.nan, 1.0]]), "F32"), ("scale 2 is NaN",)),
        (stored(np.array([[1.0, np.inf], [1.0, 1.0]]), "F32"), ("scale 1 is inf",)),
        (stored(np.array([[1.0, 1.0], [1.0, 0.0]]), "F32"), ("scale 3 is 0",)),
        (stored(np.array([[-1.0, 1.0], [1.0, 1.0]]), "F32"), ("scale 0 is -1",)),
    ],
)
def test_scales_that_give_no_value_are_refused(
    tmp_path: Path, scales: Stored, words: tuple[str, ...]
) -> None:
    first, second = changed(tmp_path, {SCALE: scales})
    with refused(CheckpointError, SCALE, *words, "BF16"):
        compute_delta(first, second, tmp_path / "delta", check_weights=False)
    assert not (tmp_path / "delta").exists()


def test_scales_without_codes_are_refused(tmp_path: Path) -> None:
    """Nothing says whether the weight beside them was multiplied by them already."""
    bf16 = stored(np.ones((130, 140)), "BF16")
    first, second = changed(tmp_path, {NAME: bf16})
    with refused(CheckpointError, f"{SCALE} (F32)", "unquantized checkpoint"):
        compute_delta(first, second, check_weights=False)


def test_scales_of_activations_beside_codes_leave_them_as_they_are(tmp_path: Path) -> None:
    activations = {NAME.replace("weight", "input_scale"): stored(1.0, "F32")}
    first, second = changed(tmp_path / "static", activations)
    plain, _ = changed(tmp_path / "plain", {})
    static, dynamic = (compute_delta(one, second, check_weights=False) for one in (first, plain))
    assert torch.equal(static[NAME], dynamic[NAME])


def test_codes_that_are_no_matrix_are_refused(tmp_path: Path) -> None:
    stacked = Stored("F8_E4M3", (2, 65, 140), bytes(18200))
    first, _ = changed(tmp_path, {NAME: stacked})
    second = write_file(tmp_path / "c.safetensors", {NAME: stored(np.zeros((2, 65, 140)))})
    with refused(CheckpointError, NAME, "[2, 65, 140]", "matrices only", "BF16"):
        compute_delta(first, second, check_weights=False).stats  # noqa: B018


def test_parts_of_codes_are_refused_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    at = "model.layers.0.self_attn."
    text: dict[str, Stored] = {f"{at}o_proj.weight": stored(rng.normal(0, 1, (8, 8)))}
    for part in "qkv":
        codes, scales, _ = random_codes(rng, 8, 8, (128, 128), "F8_E4M3")
        text |= {f"{at}{part}_proj.weight": codes, f"{at}{part}_proj.weight_scale_inv": scales}
    first = write_file(tmp_path / "a.safetensors", text)
    second = write_file(
        tmp_path / "b.safetensors",
        {
            f"{at}o_proj.weight": stored(rng.normal(0, 1, (8, 8))),
            f"{at}qkv_proj.weight": stored(rng.normal(0, 1, (24, 8))),
        },
    )
    with refused(CheckpointError, "_proj.weight", "F8_E4M3", "parts of other", "BF16"):
        compute_delta(first, second, check_weights=False).stats  # noqa: B018


@pytest.mark.parametrize("block", [[128], [0, 128], [128, -1], "128", [1.5, 2], [True, 1], 128])
def test_a_block_size_that_is_no_pair_of_counts_is_refused(tmp_path: Path, block: Any) -> None:
    pair, _ = pair_in_fp8(tmp_path)
    write_config(pair.reasoning, block)
    with refused(CheckpointError, "weight_block_size", "must be"):
        compute_delta(pair.reasoning, pair.multimodal)


def test_another_block_size_is_taken_from_the_configuration(tmp_path: Path) -> None:
    pair, _ = pair_in_fp8(tmp_path / "pair")
    write_config(pair.reasoning, [32, 32])
    with refused(
        (CheckpointError, AlignmentError), "[1, 1]", "[2, 3]", "32 × 32", "weight_block_size"
    ):
        compute_delta(pair.reasoning, pair.multimodal, check_weights=False).stats  # noqa: B018
