"""Norms, cosines and their sums are those of float64, and what has none says so."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import drift_fast
from drift_fast import Delta, compute_delta, inspect
from support.commands import strict
from support.deltas import bits_of, layer
from support.synthetic import (
    FLOAT_DTYPES,
    OUTPUT_DTYPES,
    Pair,
    Stored,
    cosine,
    everything_under,
    norm,
    refused,
    stored,
    stored_bits,
    subtract,
    widen,
    write_file,
)

MIXES = list(itertools.product(FLOAT_DTYPES, FLOAT_DTYPES))
FLOAT_RANGE = ("BF16", "F32", "F64")


def statistics_of(delta: Any) -> dict[str, Any]:
    return {row.name: row for row in delta.stats}


def assert_row_is_right(row: Any, a: Stored, b: Stored) -> None:
    """Compare with float64; the statistics are those of the exact Δ, before it is rounded."""
    delta_values = subtract(a.values, b.values)
    assert row.reasoning_norm == pytest.approx(norm(a.values), rel=1e-6)
    assert row.multimodal_norm == pytest.approx(norm(b.values), rel=1e-6)
    assert row.delta_norm == pytest.approx(norm(delta_values), rel=1e-6)
    assert row.cosine == pytest.approx(cosine(a.values, b.values), abs=1e-6)
    assert row.relative == pytest.approx(norm(delta_values) / norm(b.values), rel=2e-6)


@pytest.mark.parametrize("out_dtype", OUTPUT_DTYPES)
def test_norms_and_cosines_are_those_of_float64(tmp_path: Path, out_dtype: str) -> None:
    rng = np.random.default_rng(3)
    a, b = {}, {}
    for number, (a_dtype, b_dtype) in enumerate(MIXES):
        size = int(rng.integers(3000, 40000))
        weights = rng.normal(0, 1, size)
        a[layer(number)] = stored(weights + rng.normal(0, 10.0 ** -(number % 4), size), a_dtype)
        b[layer(number)] = stored(weights, b_dtype)
    delta = compute_delta(
        write_file(tmp_path / "a.safetensors", a, misalign=1),
        write_file(tmp_path / "b.safetensors", b),
        tmp_path / "delta",
        dtype=out_dtype,
    )
    for name, row in statistics_of(delta).items():
        assert_row_is_right(row, a[name], b[name])
        assert (row.module, row.kind, row.layer, row.shape, row.numel) == (
            "self_attn.q_proj",
            "attn",
            int(name.split(".")[2]),
            a[name].shape,
            len(a[name].values),
        )


def test_an_embedding_of_seventeen_million_values_has_its_float64_norm(tmp_path: Path) -> None:
    # torch's own float32 norm is off by 3.6e-4 at this size.
    rng = np.random.default_rng(4)
    shape = (8208, 2048)
    base = rng.standard_normal(shape, dtype=np.float32).reshape(-1)
    noise = rng.standard_normal(base.size, dtype=np.float32)
    name = "model.embed_tokens.weight"
    a, b = (
        stored_bits((values.view(np.uint32) >> 16).astype("<u2"), "BF16", shape)
        for values in (base + np.float32(0.25) * noise, base)
    )
    report = inspect(
        write_file(tmp_path / "a.safetensors", {name: a, layer(0): stored([1.0, 2.0])}),
        write_file(tmp_path / "b.safetensors", {name: b, layer(0): stored([2.0, 2.0])}),
        modules="embed",
        rows="index",
    )
    (row,) = report.stats
    left, right = a.values, b.values
    assert row.reasoning_norm == pytest.approx(math.sqrt(float(left @ left)), rel=1e-6)
    assert row.multimodal_norm == pytest.approx(math.sqrt(float(right @ right)), rel=1e-6)
    exact = float(left @ right) / math.sqrt(float(left @ left) * float(right @ right))
    assert row.cosine == pytest.approx(exact, abs=1e-6)
    difference = left - right
    assert row.delta_norm == pytest.approx(math.sqrt(float(difference @ difference)), rel=1e-6)


@pytest.mark.parametrize(
    ("magnitude", "dtype"),
    [
        *[(magnitude, dtype) for magnitude in (1e30, 3e37, 1e-30, 1e-38) for dtype in FLOAT_RANGE],
        (1e-42, "F32"),
        (1e-40, "F64"),
    ],
)
def test_squares_beyond_float32_neither_overflow_nor_vanish(
    tmp_path: Path, magnitude: float, dtype: str
) -> None:
    rng = np.random.default_rng(5)
    a = stored(rng.uniform(0.5, 2, 5000) * magnitude, dtype)
    b = stored(rng.uniform(0.5, 2, 5000) * magnitude, dtype)
    delta = compute_delta(
        write_file(tmp_path / "a.safetensors", {layer(0): a}),
        write_file(tmp_path / "b.safetensors", {layer(0): b}),
        tmp_path / "delta",
        dtype="float32",
    )
    (row,) = delta.stats
    assert_row_is_right(row, a, b)
    assert delta[layer(0)].count_nonzero() > 4000


def test_equal_and_opposite_weights_have_cosine_one_and_minus_one(tmp_path: Path) -> None:
    values = np.random.default_rng(6).normal(0, 1, 10_000)
    a = {layer(0): stored(values), layer(1): stored(values)}
    b = {layer(0): stored(values * 2), layer(1): stored(-values)}
    rows = statistics_of(
        inspect(
            write_file(tmp_path / "a.safetensors", a), write_file(tmp_path / "b.safetensors", b)
        )
    )
    assert rows[layer(0)].cosine == pytest.approx(1, abs=1e-12)
    assert rows[layer(1)].cosine == pytest.approx(-1, abs=1e-12)
    assert all(-1 <= row.cosine <= 1 for row in rows.values())


def test_a_tensor_of_zeros_has_no_direction_and_json_stays_json(tmp_path: Path, out: Path) -> None:
    a = {layer(0): stored(np.zeros(16)), layer(1): stored(np.ones(16))}
    b = {layer(0): stored(np.zeros(16)), layer(1): stored(np.zeros(16))}
    delta = compute_delta(
        write_file(tmp_path / "a.safetensors", a), write_file(tmp_path / "b.safetensors", b), out
    )
    rows = statistics_of(delta)
    assert rows[layer(0)].delta_norm == 0.0
    assert rows[layer(1)].delta_norm == 4.0
    document = strict((out / "drift.json").read_text())
    assert document
    reopened = statistics_of(Delta.open(out))
    for name, row in rows.items():
        assert repr(reopened[name].relative) == repr(row.relative)
        assert repr(reopened[name].cosine) == repr(row.cosine)


def test_statistics_add_up_by_module_and_by_layer(pair: Pair) -> None:
    delta = compute_delta(pair.reasoning, pair.multimodal, modules=("attn", "mlp", "norm"))
    rows = list(delta.stats)
    total = delta.stats.total
    assert total.numel == sum(row.numel for row in rows)
    assert total.delta_norm == pytest.approx(math.sqrt(sum(row.delta_norm**2 for row in rows)))
    for groups, key in ((delta.stats.by_module(), "module"), (delta.stats.by_layer(), "layer")):
        assert sum(group.numel for group in groups) == total.numel
        assert len(groups) == len({getattr(row, key) for row in rows})
        for group in groups:
            members = [row for row in rows if getattr(row, key) == getattr(group, key)]
            names = [row.name for row in members]
            assert group.delta_norm == pytest.approx(
                math.sqrt(sum(row.delta_norm**2 for row in members))
            )
            a = np.concatenate([pair.text[pair.source_of(name)].values for name in names])
            b = np.concatenate([pair.vlm[name].values for name in names])
            assert group.reasoning_norm == pytest.approx(norm(a), rel=1e-6)
            assert group.cosine == pytest.approx(cosine(a, b), abs=1e-6)


def test_inspect_reports_what_compute_delta_reports_and_writes_nothing(
    pair: Pair, tmp_path: Path
) -> None:
    before = everything_under(pair.reasoning.parent)
    report = inspect(pair.reasoning, pair.multimodal)
    delta = compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta")
    assert list(report.stats) == list(delta.stats)
    assert report.coverage.matched == delta.coverage.matched
    assert everything_under(pair.reasoning.parent) == before


def write_a_difference_of(step: float, directory: Path) -> tuple[Path, Path]:
    base = np.random.default_rng(12).normal(0, 1e-4, 20_000)
    return (
        write_file(directory / "a.safetensors", {layer(0): stored(base + step, "F32")}),
        write_file(directory / "b.safetensors", {layer(0): stored(base, "F32")}),
    )


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_the_norm_that_scales_a_delta_is_that_of_the_delta_one_gets(
    tmp_path: Path, out_dtype: str
) -> None:
    sources = write_a_difference_of(1e-8, tmp_path)
    delta = compute_delta(*sources, tmp_path / "delta", dtype=out_dtype)
    written = widen(bits_of(delta[layer(0)]), OUTPUT_DTYPES[out_dtype])
    assert delta.stats[layer(0)].delta_norm == pytest.approx(norm(written), rel=2**-8)


def test_a_delta_that_vanishes_in_float16_is_refused(tmp_path: Path, out: Path) -> None:
    # Its norm would say that there is a direction, and an injection along it would do nothing.
    sources = write_a_difference_of(1e-8, tmp_path)
    with refused(drift_fast.DriftError, layer(0), "float16", "bfloat16"):
        compute_delta(*sources, out, dtype="float16")
    assert everything_under(out.parent) == set()
    with refused(drift_fast.DriftError, layer(0), "float16"):
        list(compute_delta(*sources, dtype="float16").values())


def test_values_whose_squares_overflow_float64_have_no_norm_and_are_refused_unless_allowed(
    tmp_path: Path, out: Path
) -> None:
    a = {layer(0): stored([1e200, 1.0], "F64"), layer(1): stored([1.0, 2.0], "F64")}
    b = {layer(0): stored([1e200, 2.0], "F64"), layer(1): stored([1.0, 1.0], "F64")}
    sources = (
        write_file(tmp_path / "a.safetensors", a),
        write_file(tmp_path / "b.safetensors", b),
    )
    with refused(drift_fast.NonFiniteError, layer(0), "float64"):
        compute_delta(*sources, out)
    assert everything_under(out.parent) == set()
    delta = compute_delta(*sources, out, allow_nonfinite=True)
    strict((out / "drift.json").read_text())
    assert delta[layer(0)].tolist() == [0.0, -1.0]
    assert delta.stats[layer(1)].delta_norm == 1.0
    for row in (delta.stats[layer(0)], inspect(*sources, allow_nonfinite=True).stats[layer(0)]):
        assert not math.isfinite(row.multimodal_norm)
        assert math.isnan(row.cosine), "a direction was made up"
