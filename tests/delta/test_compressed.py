"""Deltas in eight bits: every code is what docs/format.md says, and what it costs is told.

Codes are worked out anew here in numpy from the float64 difference; nothing of drift_fast decodes
them.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import drift_fast
from drift_fast import CheckpointError, Delta, NonFiniteError, compute_delta
from drift_fast.cli.main import main
from drift_fast.delta.delta import combine
from drift_fast.delta.options import DeltaOptions
from support.synthetic import (
    FLOAT_DTYPES,
    Pair,
    Stored,
    awkward_operands,
    contents,
    refused,
    round_once,
    stored,
    stored_bits,
    write_file,
    write_pair,
)

NAME = "model.layers.0.self_attn.q_proj.weight"
FORMAT = Path(__file__).parents[2] / "docs" / "format.md"


def int8_codes(delta: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return codes and scales of a flat Δ in float64, by docs/format.md."""
    padded = np.zeros(-(-delta.size // 64) * 64, np.float32)
    padded[: delta.size] = delta.astype(np.float32)
    blocks = padded.reshape(-1, 64)
    least = np.abs(blocks).max(1).astype(np.float64) / 127
    scale = least.astype(np.float16)
    short = scale.astype(np.float64) < least
    scale = np.where(short, np.nextafter(scale, np.float16(np.inf)), scale).astype(np.float16)
    divisor = np.where(scale == 0, np.float16(1), scale).astype(np.float32)[:, None]
    return np.rint(blocks / divisor).astype(np.int8).ravel()[: delta.size], scale


def as_bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return round_once(values.ravel(), "BF16")


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16).ravel()


def read_delta(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Run the code block of docs/format.md."""
    code = re.findall(r"```python\n(.*?)```", FORMAT.read_text(), re.S)
    scope: dict[str, Any] = {}
    exec(compile("\n".join(code), str(FORMAT), "exec"), scope)  # the documentation's own code
    return dict(scope["read_delta"](path))


def one_tensor(
    directory: Path, a: Stored, b: Stored, dtype: str, **options: Any
) -> tuple[Delta, np.ndarray[Any, Any]]:
    first = write_file(directory / "a.safetensors", {NAME: a})
    second = write_file(directory / "b.safetensors", {NAME: b}, misalign=3)
    options = {"check_weights": False, "overwrite": True} | options
    delta = compute_delta(first, second, directory / "delta", dtype=dtype, **options)
    return delta, a.values - b.values


@pytest.fixture(scope="module")
def pair_and_delta(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Delta]:
    folder = tmp_path_factory.mktemp("int8")
    pair = write_pair(folder, seed=5, hidden=24, inner=40)
    delta = compute_delta(pair.reasoning, pair.multimodal, folder / "delta", dtype="int8")
    return pair, delta


def test_it_comes_out_as_bfloat16_and_says_what_is_on_disk(
    pair_and_delta: tuple[Pair, Delta],
) -> None:
    _, delta = pair_and_delta
    assert (delta.dtype, delta.stored_dtype) == ("bfloat16", "int8")
    assert all(tensor.dtype == torch.bfloat16 for tensor in delta.values())
    assert "int8" in repr(delta)


def test_the_documented_reader_gives_the_same_values(
    pair_and_delta: tuple[Pair, Delta],
) -> None:
    _, delta = pair_and_delta
    assert delta.path is not None
    read = read_delta(delta.path)
    assert read.keys() == set(delta)
    for name, values in read.items():
        assert values.shape == delta.shapes[name]
        assert np.array_equal(as_bf16(values), bits(delta[name])), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_documented_reader_reads_what_is_not_compressed_too(tmp_path: Path, dtype: str) -> None:
    pair = write_pair(tmp_path)
    delta = compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta", dtype=dtype)
    read = read_delta(tmp_path / "delta")
    assert read.keys() == set(delta)
    assert all(np.array_equal(read[name], delta[name].float().numpy()) for name in delta)


@pytest.mark.parametrize("a_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("numel", [1, 63, 64, 65, 2048 + 17, 262144 + 65])
def test_every_int8_code_is_that_of_the_documented_layout(
    tmp_path: Path, a_dtype: str, numel: int
) -> None:
    rng = np.random.default_rng([8, numel, FLOAT_DTYPES.index(a_dtype)])
    spread = 10.0 ** rng.uniform(-5, 2, -(-numel // 64)).repeat(64)[:numel]
    a = stored(rng.normal(0, 1, numel) * spread, a_dtype)
    b = stored(np.where(rng.random(numel) < 0.1, a.values, 0), "F32")
    delta, exact = one_tensor(tmp_path, a, b, "int8")
    codes, scales = int8_codes(exact)
    value = codes * scales.astype(np.float64).repeat(64)[:numel]
    assert np.array_equal(bits(delta[NAME]), as_bf16(value + 0.0))
    row = delta.stats[NAME]
    lost = (value == 0) & (exact.astype(np.float32) != 0)
    assert row.flushed == np.count_nonzero(lost)
    assert row.zeros == np.count_nonzero(exact == 0)


def test_awkward_differences_are_stored_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    a, b = awkward_operands(rng, 5000, "F32", "BF16", "BF16")
    delta, _ = one_tensor(
        tmp_path, stored_bits(a, "F32"), stored_bits(b, "BF16"), "int8", allow_nonfinite=True
    )
    row = delta.stats[NAME]
    # Differences of 3.4e38 have no room, and say so.
    assert row.overflow > 0
    assert row.flushed is not None
    assert row.flushed > 0


@pytest.mark.parametrize("start", [0, 1, 63, 64, 65, 200, 262143, 262144, 262145, 262400])
def test_a_slice_from_any_start_is_that_of_the_whole(tmp_path: Path, start: int) -> None:
    rng = np.random.default_rng(13)
    tensor = stored(rng.normal(0, 1, (2, 131300)), "BF16")
    delta, _ = one_tensor(tmp_path, tensor, stored(np.zeros((2, 131300))), "int8")
    whole = delta[NAME].reshape(-1)
    for count in (0, 1, 5, 64, 150):
        part = torch.full((count,), 9.0, dtype=torch.bfloat16)
        delta.read_into(NAME, part, start=start)
        assert torch.equal(part, whole[start : start + count])


def test_the_cosine_that_is_shown_is_that_of_what_comes_out(
    pair_and_delta: tuple[Pair, Delta],
) -> None:
    pair, delta = pair_and_delta
    cosines = {}
    for name in delta:
        exact = pair.text[pair.source_of(name)].values - pair.vlm[name].values
        found = delta[name].double().numpy().ravel()
        cosines[name] = exact @ found / np.linalg.norm(exact) / np.linalg.norm(found)
        row = delta.stats[name]
        assert row.stored_cosine == pytest.approx(cosines[name], abs=1e-7)
        assert row.stored_norm == pytest.approx(np.linalg.norm(found), rel=1e-9)
        assert row.to_dict()["stored_cosine"] == row.stored_cosine
    compression = delta.compression
    assert compression is not None
    least = min(cosines, key=cosines.__getitem__)
    assert compression.min_cosine == pytest.approx(cosines[least], abs=1e-7)
    assert compression.min_name == least
    assert compression.mean_cosine == pytest.approx(np.mean(list(cosines.values())), abs=1e-7)
    assert compression.min_cosine > 0.9999


def test_the_bytes_do_not_depend_on_the_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(17)
    a, b = (stored(rng.normal(0, 1, 3 * 262144 + 5), "BF16") for _ in range(2))
    found = []
    for threads in (1, 3):
        delta, _ = one_tensor(tmp_path, a, b, "int8", threads=threads)
        found.append((contents(tmp_path / "delta"), delta.stats.to_rows()))
    assert found[0] == found[1]


def test_a_copy_of_a_compressed_delta_has_the_same_bytes(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, seed=2, hidden=72)
    delta = compute_delta(
        pair.reasoning, pair.multimodal, tmp_path / "delta", dtype="int8", max_shard_size="9KB"
    )
    copy = delta.save(tmp_path / "copy", max_shard_size="9KB")
    assert contents(tmp_path / "copy") == contents(tmp_path / "delta")
    assert len(contents(tmp_path / "copy")) > 2
    assert copy.stats.to_rows() == delta.stats.to_rows()
    assert all(torch.equal(copy[name], delta[name]) for name in delta)


def test_without_an_output_tensors_are_exact(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    delta = compute_delta(pair.reasoning, pair.multimodal, dtype="int8")
    assert (delta.dtype, delta.stored_dtype) == ("bfloat16", "int8")
    for name in delta:
        assert np.array_equal(bits(delta[name]), pair.expected(name, "BF16"))
    assert delta.stats.total.stored_sq is None
    assert delta.compression is None
    assert delta.save(tmp_path / "delta").compression is not None


def test_a_delta_of_zeros_is_stored_as_zeros(tmp_path: Path) -> None:
    same = stored(np.ones(100), "BF16")
    with pytest.warns(drift_fast.DriftWarning, match="zero everywhere"):
        delta, _ = one_tensor(tmp_path, same, same, "int8")
    assert not delta[NAME].any()
    assert delta.stats[NAME].flushed == 0
    assert math.isnan(delta.stats[NAME].stored_cosine)


def test_int8_below_the_range_of_its_scales_is_refused_and_counted_where_allowed(
    tmp_path: Path,
) -> None:
    tiny = stored(np.full(128, 2.0**-26), "F32")
    nothing = stored(np.zeros(128), "F32")
    with refused(NonFiniteError, NAME, "below the range of int8", "bfloat16"):
        one_tensor(tmp_path, tiny, nothing, "int8")
    assert not (tmp_path / "delta").exists()
    delta, _ = one_tensor(tmp_path, tiny, nothing, "int8", allow_nonfinite=True)
    assert delta.stats[NAME].flushed == 128
    assert not delta[NAME].any()


def test_int8_beyond_the_range_of_its_scales_is_refused(tmp_path: Path) -> None:
    large = stored(np.full(70, 1e7), "F32")
    with refused(NonFiniteError, NAME, "70 differences", "beyond the range of int8"):
        one_tensor(tmp_path, large, stored(np.zeros(70), "F32"), "int8")


def test_a_difference_that_is_not_finite_is_stored_as_zero(tmp_path: Path) -> None:
    values = np.array([1.0, np.nan, -0.5, np.inf])
    a, b = stored_bits(round_once(values, "F32"), "F32"), stored(np.zeros(4), "F32")
    delta, _ = one_tensor(tmp_path, a, b, "int8", allow_nonfinite=True)
    found = delta[NAME]
    assert delta.stats[NAME].nonfinite == 2
    assert found[[0, 2]].tolist() == pytest.approx([1.0, -0.5], rel=0.01)
    assert found[[1, 3]].tolist() == [0.0, 0.0]


def test_a_compressed_delta_is_injected_as_any_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = write_pair(tmp_path, seed=21, hidden=64, inner=64)
    delta = compute_delta(pair.reasoning, pair.multimodal, tmp_path / "d", dtype="int8")
    plain = {name: tensor.clone() for name, tensor in delta.items()}
    model = torch.nn.Module()
    for name, tensor in plain.items():
        parent = model
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.register_parameter(leaf, torch.nn.Parameter(torch.zeros_like(tensor).float()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with drift_fast.Injection(model, delta, alpha=2.0, scale="absolute") as injection:
        injection.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 1 - 2 * plain[name].float()), name


def test_compressed_deltas_combine(pair_and_delta: tuple[Pair, Delta]) -> None:
    _, delta = pair_and_delta
    combined = combine({delta: 2.0})
    assert combined.dtype == "bfloat16"
    assert all(torch.equal(combined[name], 2 * delta[name]) for name in delta)


def test_a_composed_tensor_is_compressed_where_its_parts_begin_with_a_block(tmp_path: Path) -> None:
    rng = np.random.default_rng(23)

    def models(hidden: int, folder: Path) -> tuple[Path, Path, np.ndarray[Any, Any]]:
        parts = [rng.normal(0, 1, (hidden, hidden)) for _ in range(3)]
        rest = stored(rng.normal(0, 1, (hidden, hidden)), "F32")
        at = "model.layers.0.self_attn."
        text = {
            f"{at}{part}_proj.weight": stored(values, "F32")
            for part, values in zip("qkv", parts, strict=True)
        } | {f"{at}o_proj.weight": rest}
        fused = {
            f"{at}qkv_proj.weight": stored(np.zeros((3 * hidden, hidden)), "F32"),
            f"{at}o_proj.weight": stored(np.zeros((hidden, hidden)), "F32"),
        }
        return (
            write_file(folder / "a.safetensors", text),
            write_file(folder / "b.safetensors", fused),
            np.concatenate(parts).astype(np.float32),
        )

    fused = "model.layers.0.self_attn.qkv_proj.weight"
    first, second, exact = models(24, tmp_path / "aligned")
    options: dict[str, Any] = {"dtype": "int8", "check_weights": False}
    delta = compute_delta(first, second, tmp_path / "d", **options)
    codes, scales = int8_codes(exact.ravel().astype(np.float64))
    value = codes * scales.astype(np.float64).repeat(64)[: codes.size]
    assert np.array_equal(bits(delta[fused]), as_bf16(value + 0.0))

    first, second, _ = models(6, tmp_path / "not")
    with refused(CheckpointError, fused, "element 36", "block of 64", "another dtype"):
        compute_delta(first, second, tmp_path / "e", **options)
    assert not (tmp_path / "e").exists()


def test_storing_in_float8_e4m3_is_gone(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    with refused(ValueError, "float8_e4m3 is gone", "int8", "bfloat16"):
        compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta", dtype="float8_e4m3")
    with refused(ValueError, "float8_e4m3 is gone", "int8", "bfloat16"):
        DeltaOptions(dtype="float8_e4m3")
    compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta", dtype="int8")
    description = tmp_path / "delta" / "drift.json"
    old = json.loads(description.read_text()) | {"dtype": "float8_e4m3"}
    description.write_text(json.dumps(old | {"drift_fast_version": "0.0.9"}))
    with refused(CheckpointError, "drift_fast 0.0.9", "float8_e4m3", "again", "bfloat16", "int8"):
        Delta.open(tmp_path / "delta")


def test_scales_that_are_missing_or_of_another_shape_are_refused(tmp_path: Path) -> None:
    ones = stored(np.ones(65), "F32")
    one_tensor(tmp_path, ones, stored(np.zeros(65), "F32"), "int8")
    codes = Stored("I8", (65,), bytes(65))
    (file,) = (tmp_path / "delta").glob("*.safetensors")
    index = tmp_path / "delta" / "delta.safetensors.index.json"
    for scales in ({}, {f"{NAME}.scale": stored(np.ones(1), "F16")}):
        write_file(file, {NAME: codes, **scales})
        names = dict.fromkeys([NAME, *scales], file.name)
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        with refused(CheckpointError, f"{NAME}.scale", "compute the delta again"):
            Delta.open(tmp_path / "delta")


def test_more_sums_are_taken_in_the_same_pass(tmp_path: Path) -> None:
    rng = np.random.default_rng(29)
    a = np.where(rng.random(9001) < 0.3, 0, rng.normal(0, 1, 9001))
    b = np.where(rng.random(9001) < 0.3, a, rng.normal(0, 1, 9001))
    for dtype in FLOAT_DTYPES:
        # Once as they are, once so small that float32 sums would lose them.
        for factor in (1.0, 1e-30) if dtype != "F16" else (1.0,):
            left, right = stored(a * factor, dtype), stored(b * factor, dtype)
            delta, exact = one_tensor(tmp_path, left, right, "float32")
            row = delta.stats[NAME]
            assert row.max_abs == pytest.approx(np.abs(exact).max(), rel=1e-7)
            assert row.zeros == np.count_nonzero(exact == 0)
            agreeing = np.count_nonzero(left.values * right.values > 0)
            assert row.agreeing == agreeing
            assert row.zero_share == row.zeros / 9001
            assert row.to_dict()["agreeing_share"] == agreeing / 9001
            assert delta.stats.total.max_abs == row.max_abs
            assert delta.stats.to_pandas()["zeros"].tolist() == [row.zeros]


def test_a_delta_written_before_those_sums_opens_without_them(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta")
    description = tmp_path / "delta" / "drift.json"
    told = json.loads(description.read_text())
    before = ("name", "shape", "delta_sq", "reasoning_sq", "multimodal_sq", "dot")
    told["statistics"] = [
        {key: row[key] for key in (*before, "nonfinite", "overflow")} for row in told["statistics"]
    ]
    description.write_text(json.dumps(told))
    delta = Delta.open(tmp_path / "delta")
    assert delta.stats.total.max_abs is None
    assert math.isnan(delta.stats.by_module()[0].zero_share)
    assert delta.stats[0].to_dict()["zero_share"] is None
    assert delta.compression is None
    copy = delta.save(tmp_path / "copy")
    copied = json.loads((tmp_path / "copy" / "drift.json").read_text())
    assert copied["statistics"] == told["statistics"]
    assert copy.stats.to_rows() == delta.stats.to_rows()


def test_the_command_writes_them_and_says_what_they_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = write_pair(tmp_path)
    out = tmp_path / "delta"
    sides = [str(pair.reasoning), str(pair.multimodal)]
    assert main(["delta", *sides, "--out", str(out), "--dtype", "int8"]) == 0
    assert "cos(Δ, stored) 0.99" in capsys.readouterr().out
    assert Delta.open(out).stored_dtype == "int8"
    assert main(["check", *sides, "--dtype", "int8", "--json"]) in (0, 1)
    plan = json.loads(capsys.readouterr().out)["plan"]
    numel = sum(math.prod(shape) for shape in Delta.open(out).shapes.values())
    assert plan["training_memory_nbytes"] == 2 * numel
    assert plan["delta_nbytes"] == math.ceil(numel * (1 + 1 / 32))


def test_a_tensor_that_is_named_as_the_scales_of_another_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    values = np.random.default_rng(0).normal(size=(8, 8))
    sides = [
        write_file(
            tmp_path / f"{side}.safetensors",
            {
                one: stored_bits(round_once((values * factor).reshape(-1), "F32"), "F32", (8, 8))
                for one in (name, f"{name}.scale")
            },
        )
        for side, factor in (("a", 1.0), ("b", 0.5))
    ]
    options: dict[str, Any] = {"modules": "re:.*", "check_weights": False, "rows": "index"}
    with refused(ValueError, f"{name}.scale", "another dtype"):
        compute_delta(*sides, tmp_path / "delta", dtype="int8", max_shard_size=64, **options)
    assert not (tmp_path / "delta").exists()
    assert len(compute_delta(*sides, tmp_path / "delta", **options)) == 2
