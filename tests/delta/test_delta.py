"""Δ is exact, its statistics are right, and a delta directory is whole or absent.

Every expected bit comes from synthetic.py's float64 oracle; torch and safetensors only read back.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import drift_fast
from drift_fast import Delta, compute_delta, inspect
from drift_fast.progress_bar import Progress
from support.synthetic import (
    EXPONENT_AND_MANTISSA_NBITS,
    FLOAT_DTYPES,
    OUTPUT_DTYPES,
    Bits,
    Pair,
    Stored,
    awkward_operands,
    contents,
    cosine,
    everything_under,
    norm,
    opaque,
    refused,
    round_once,
    stored,
    stored_bits,
    subtract,
    widen,
    write_checkpoint,
    write_file,
    write_pair,
)

FLOAT_RANGE = ("BF16", "F32", "F64")
SIZES = (
    0,
    1,
    2,
    7,
    8,
    15,
    16,
    17,
    31,
    33,
    63,
    65,
    4095,
    4096,
    4097,
    262143,
    262144,
    262145,
    786437,
)


def bits_of(tensor: torch.Tensor) -> Bits:
    """Return the bits of a tensor, flat."""
    kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return (
        tensor.reshape(-1)
        .view(kind)
        .numpy()
        .view({2: np.uint16, 4: np.uint32}[tensor.element_size()])
    )


def layer(number: int) -> str:
    return f"model.layers.{number}.self_attn.q_proj.weight"


def assert_same_bits(found: Bits, expected: Bits, a: Stored, b: Stored) -> None:
    wrong = np.flatnonzero(found != expected)
    if wrong.size:
        at = int(wrong[0])
        pytest.fail(
            f"{wrong.size} of {expected.size} differ, first at {at}: "
            f"{a.values[at]!r} - {b.values[at]!r} is {int(expected[at]):#x}, "
            f"found {int(found[at]):#x}"
        )


# ------------------------------------------------------------------ the oracle itself


def nearest_by_fractions(value: float, dtype: str) -> int:
    """Round by exact comparison with both neighbors: slow, obvious, and unlike round_once."""
    exponent_nbits, mantissa_nbits = EXPONENT_AND_MANTISSA_NBITS[dtype]
    sign = math.copysign(1.0, value) < 0
    bias = (1 << (exponent_nbits - 1)) - 1

    def exact(bits: int) -> Fraction:
        field, fraction = bits >> mantissa_nbits, bits & ((1 << mantissa_nbits) - 1)
        significand = fraction + ((1 << mantissa_nbits) if field else 0)
        return Fraction(significand) * Fraction(2) ** (max(field, 1) - bias - mantissa_nbits)

    infinity = ((1 << exponent_nbits) - 1) << mantissa_nbits
    target = abs(Fraction(value))
    low, high = 0, infinity
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exact(middle) <= target else (low, middle)
    below, above = target - exact(low), exact(high) - target
    nearest = low if below < above or (below == above and low % 2 == 0) else high
    return nearest | (int(sign) << (exponent_nbits + mantissa_nbits))


@given(
    st.one_of(
        st.floats(allow_nan=False, allow_infinity=False),
        st.floats(-4, 4),
        st.floats(-1e-36, 1e-36),
        st.builds(lambda n, e: n * 2.0**e, st.integers(-1025, 1025), st.integers(-160, 118)),
        st.builds(lambda n, e: 1 + n * 2.0**-9 + 2.0**-e, st.integers(0, 600), st.integers(20, 52)),
    ),
    st.sampled_from(["BF16", "F16", "F32"]),
)
@settings(max_examples=400, deadline=None)
def test_the_oracle_rounds_to_the_nearest_neighbor_and_ties_to_even(
    value: float, dtype: str
) -> None:
    assert int(round_once(value, dtype)[0]) == nearest_by_fractions(value, dtype)


def test_the_oracle_rounds_once_where_torch_rounds_twice() -> None:
    just_above_a_midpoint = 1 + 2.0**-8 + 2.0**-30
    assert widen(round_once(just_above_a_midpoint, "BF16"), "BF16")[0] == 1 + 2.0**-7
    assert torch.tensor(just_above_a_midpoint, dtype=torch.float64).to(torch.bfloat16).item() == 1.0


# ------------------------------------------------------------------ exactness

MIXES = list(itertools.product(FLOAT_DTYPES, FLOAT_DTYPES))


@pytest.fixture(scope="module", params=OUTPUT_DTYPES)
def mixes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """All sixteen mixes of input types in one pair of files, each tensor at an odd offset."""
    out_dtype = request.param
    directory = tmp_path_factory.mktemp(out_dtype)
    rng = np.random.default_rng(list(OUTPUT_DTYPES).index(out_dtype))
    reasoning: dict[str, Stored] = {}
    multimodal: dict[str, Stored] = {}
    for number, (a_dtype, b_dtype) in enumerate(MIXES):
        count = 300_000 if number < 2 else 20_001
        a, b = awkward_operands(rng, count, a_dtype, b_dtype, OUTPUT_DTYPES[out_dtype])
        # One byte before each tensor of one file and two before each of the other: tensors lie at
        # every offset modulo eight, and the two of a pair never at the same one for long.
        reasoning[f"model.layers.{number}.pad"] = opaque("U8", 1)
        multimodal[f"model.layers.{number}.pad"] = opaque("U8", 2)
        reasoning[layer(number)] = stored_bits(a, a_dtype)
        multimodal[layer(number)] = stored_bits(b, b_dtype)
    delta = compute_delta(
        write_file(directory / "a.safetensors", reasoning, misalign=3),
        write_file(directory / "b.safetensors", multimodal, misalign=5),
        directory / "delta",
        modules="attn",
        dtype=out_dtype,
        allow_nonfinite=True,  # differences beyond the output's range become infinite
    )
    return out_dtype, reasoning, multimodal, delta


@pytest.mark.parametrize("number", range(len(MIXES)), ids=["-".join(mix) for mix in MIXES])
def test_delta_is_a_float64_subtraction_rounded_once(mixes: Any, number: int) -> None:
    out_dtype, reasoning, multimodal, delta = mixes
    a, b = reasoning[layer(number)], multimodal[layer(number)]
    expected = round_once(subtract(a.values, b.values), OUTPUT_DTYPES[out_dtype])
    assert delta[layer(number)].dtype == getattr(torch, out_dtype)
    assert_same_bits(bits_of(delta[layer(number)]), expected, a, b)
    row = delta.stats[layer(number)]
    assert row.overflow == np.isinf(widen(expected, OUTPUT_DTYPES[out_dtype])).sum()
    assert row.nonfinite == 0


@pytest.mark.parametrize("out_dtype", OUTPUT_DTYPES)
def test_tensors_of_every_size_are_exact_to_the_last_element(
    tmp_path: Path, out_dtype: str
) -> None:
    rng = np.random.default_rng(7)
    a, b = {}, {}
    for number, size in enumerate(SIZES):
        a_dtype, b_dtype = FLOAT_DTYPES[number % 4], FLOAT_DTYPES[(number // 4) % 4]
        left, right = awkward_operands(rng, size, a_dtype, b_dtype, OUTPUT_DTYPES[out_dtype])
        a[layer(number)], b[layer(number)] = stored_bits(left, a_dtype), stored_bits(right, b_dtype)
    delta = compute_delta(
        write_file(tmp_path / "a.safetensors", a, misalign=1),
        write_file(tmp_path / "b.safetensors", b),
        tmp_path / "delta",
        dtype=out_dtype,
        allow_nonfinite=True,
    )
    for number, size in enumerate(SIZES):
        left, right = a[layer(number)], b[layer(number)]
        expected = round_once(subtract(left.values, right.values), OUTPUT_DTYPES[out_dtype])
        assert tuple(delta[layer(number)].shape) == (size,)
        assert_same_bits(bits_of(delta[layer(number)]), expected, left, right)


@pytest.mark.parametrize("out_dtype", OUTPUT_DTYPES)
def test_the_whole_range_of_float64_is_subtracted_exactly(tmp_path: Path, out_dtype: str) -> None:
    rng = np.random.default_rng(13)
    a = rng.integers(0, 2**63 - 2**52, 50_000, dtype=np.uint64) | rng.choice(
        np.array([0, 1 << 63], dtype=np.uint64), 50_000
    )
    b = np.where(rng.random(a.size) < 0.5, a ^ np.uint64(1 << 20), rng.permutation(a))
    left, right = stored_bits(a, "F64"), stored_bits(b, "F64")
    delta = compute_delta(
        write_file(tmp_path / "a.safetensors", {layer(0): left}, misalign=1),
        write_file(tmp_path / "b.safetensors", {layer(0): right}, misalign=2),
        dtype=out_dtype,
        allow_nonfinite=True,
    )
    expected = round_once(subtract(left.values, right.values), OUTPUT_DTYPES[out_dtype])
    assert_same_bits(bits_of(delta[layer(0)]), expected, left, right)


def test_a_value_above_a_midpoint_by_less_than_float32_can_hold_is_rounded_up(
    tmp_path: Path,
) -> None:
    # 1 + 2**-8 lies between two bfloat16 values; float32 would lose the 2**-30 and tie to even.
    a = stored([1 + 2.0**-8] * 9, "F16")
    b = stored([-(2.0**-30), 2.0**-30, 0.0] * 3, "BF16")
    delta = compute_delta(
        write_file(tmp_path / "a.safetensors", {layer(0): a}),
        write_file(tmp_path / "b.safetensors", {layer(0): b}),
    )
    assert delta[layer(0)].tolist() == [1 + 2.0**-7, 1.0, 1.0] * 3


def test_scalars_empty_tensors_and_shapes_survive(tmp_path: Path) -> None:
    at = "model.layers.0.self_attn.q_proj."
    a = {
        at + "weight": stored(np.full((2, 3, 1, 4), 1.5)),
        at + "scale": stored(3.0, "F32", ()),
        at + "empty": stored(np.zeros((0, 5))),
    }
    b = {
        at + "weight": stored(np.full((2, 3, 1, 4), 1.0)),
        at + "scale": stored(1.0, "F64", ()),
        at + "empty": stored(np.zeros((0, 5)), "F16"),
    }
    delta = compute_delta(
        write_file(tmp_path / "a.safetensors", a),
        write_file(tmp_path / "b.safetensors", b),
        tmp_path / "delta",
        modules="all",
    )
    assert {name: tuple(tensor.shape) for name, tensor in delta.items()} == {
        at + "weight": (2, 3, 1, 4),
        at + "scale": (),
        at + "empty": (0, 5),
    }
    assert delta[at + "scale"].item() == 2.0
    assert torch.equal(delta[at + "weight"], torch.full((2, 3, 1, 4), 0.5, dtype=torch.bfloat16))
    rows = {row.name: row for row in delta.stats}
    assert rows[at + "empty"].numel == 0
    assert rows[at + "empty"].delta_norm == 0.0
    assert rows[at + "scale"].delta_norm == 2.0
    strictly_json((tmp_path / "delta" / "drift.json").read_text())


def test_the_delta_of_sharded_checkpoints_is_exact_although_no_shard_holds_the_same_tensors(
    sharded_pair: Pair, out: Path
) -> None:
    delta = compute_delta(sharded_pair.reasoning, sharded_pair.multimodal, out)
    assert len(delta) == 14
    for name, tensor in delta.items():
        assert_same_bits(
            bits_of(tensor),
            sharded_pair.expected(name, "BF16"),
            sharded_pair.text[sharded_pair.source_of(name)],
            sharded_pair.vlm[name],
        )


# ------------------------------------------------------------------ statistics


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
    document = strictly_json((out / "drift.json").read_text())
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
    strictly_json((out / "drift.json").read_text())
    assert delta[layer(0)].tolist() == [0.0, -1.0]
    assert delta.stats[layer(1)].delta_norm == 1.0
    for row in (delta.stats[layer(0)], inspect(*sources, allow_nonfinite=True).stats[layer(0)]):
        assert not math.isfinite(row.multimodal_norm)
        assert math.isnan(row.cosine), "a direction was made up"


# ------------------------------------------------------------------ the same bytes every time


@pytest.fixture(scope="module")
def large_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Tensors of many chunks, so that threads have something to disagree about."""
    directory = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(8)
    a, b = {}, {}
    for number, size in enumerate((3_000_017, 1, 500_000, 262_144, 40_001)):
        dtype = ("BF16", "F32")[number % 2]
        values = rng.normal(0, 1, size)
        a[layer(number)] = stored(values, dtype)
        b[layer(number)] = stored(values + rng.normal(0, 0.1, size), "BF16")
    return write_file(directory / "a.safetensors", a), write_file(directory / "b.safetensors", b)


@pytest.fixture(scope="module")
def reference(large_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("reference") / "delta"
    delta = compute_delta(*large_pair, directory, threads=1)
    return contents(directory), list(delta.stats)


@pytest.mark.parametrize("reader", ["mmap", "pread"])
@pytest.mark.parametrize("threads", [1, 2, 3, 7, None])
def test_the_result_depends_neither_on_the_number_of_threads_nor_on_the_reader(
    large_pair: tuple[Path, Path], reference: Any, out: Path, threads: int | None, reader: str
) -> None:
    delta = compute_delta(*large_pair, out, threads=threads, reader=reader)
    assert contents(out) == reference[0]
    assert list(delta.stats) == reference[1]
    assert list(inspect(*large_pair, threads=threads, reader=reader).stats) == reference[1]


def test_a_rerun_gives_the_same_directory_byte_for_byte(pair: Pair, tmp_path: Path) -> None:
    everything = [
        {**contents(directory), "drift.json": (directory / "drift.json").read_bytes()}
        for directory in (tmp_path / "first", tmp_path / "second")
        if compute_delta(pair.reasoning, pair.multimodal, directory)
    ]
    assert len(everything) == 2
    assert everything[0] == everything[1]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("reader", ["mmap", "pread"])
def test_a_lazy_tensor_is_the_written_one_whatever_reads_it(
    large_pair: tuple[Path, Path], reference: Any, tmp_path: Path, threads: int, reader: str
) -> None:
    compute_delta(*large_pair, tmp_path / "lazy", threads=threads, reader=reader)
    written = Delta.open(tmp_path / "lazy")
    lazy = compute_delta(*large_pair, threads=threads, reader=reader)
    for name in lazy:
        assert torch.equal(lazy[name], written[name])


# ------------------------------------------------------------------ on disk


def strictly_json(text: str) -> Any:
    """Parse JSON and refuse the NaN and Infinity that Python would let through."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def strings_in(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        for key, value in document.items():
            yield key
            yield from strings_in(value)
    elif isinstance(document, list):
        for value in document:
            yield from strings_in(value)
    elif isinstance(document, str):
        yield document


def test_plain_safetensors_opens_the_directory_through_its_index(pair: Pair, out: Path) -> None:
    delta = compute_delta(pair.reasoning, pair.multimodal, out)
    index = strictly_json((out / "delta.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(delta)
    nbytes = 0
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as shard:
            tensor = shard.get_tensor(name)
        nbytes += tensor.nbytes
        assert_same_bits(
            bits_of(tensor),
            pair.expected(name, "BF16"),
            pair.text[pair.source_of(name)],
            pair.vlm[name],
        )
    assert index["metadata"]["total_size"] == nbytes
    files = set(index["weight_map"].values())
    assert everything_under(out) == {*files, "delta.safetensors.index.json", "drift.json"}


def test_max_shard_size_splits_and_a_tensor_larger_than_it_gets_its_own_shard(
    tmp_path: Path,
) -> None:
    pair = write_pair(tmp_path, layers=4, hidden=64, inner=128)
    delta = compute_delta(
        pair.reasoning, pair.multimodal, tmp_path / "delta", max_shard_size="20KB"
    )
    files = sorted(path.name for path in (tmp_path / "delta").glob("*.safetensors"))
    count = len(files)
    assert files == [
        f"delta-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
    ]
    assert count > 4
    held: list[str] = []
    for file in files:
        with safe_open(tmp_path / "delta" / file, "pt") as shard:
            names = list(shard.keys())
            assert len(names) == 1 or sum(shard.get_tensor(name).nbytes for name in names) <= 20_000
        held += names
    assert sorted(held) == sorted(delta)
    for name in delta:
        assert (bits_of(delta[name]) == pair.expected(name, "BF16")).all()


def test_drift_json_holds_what_is_needed_to_know_where_a_delta_came_from(
    pair: Pair, out: Path
) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    document = strictly_json((out / "drift.json").read_text())
    text = set(strings_in(document))
    joined = " ".join(text)
    assert "bfloat16" in text
    assert str(pair.reasoning) in joined
    assert str(pair.multimodal) in joined
    assert "model.safetensors" in joined
    size = (pair.reasoning / "model.safetensors").stat().st_size
    assert str(size) in json.dumps(document)
    assert {
        "model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
    } <= text
    assert any("vision_tower" in string for string in text), "the coverage is not recorded"
    for key in ("format_version", "formula", "alignment", "coverage", "matched", "statistics"):
        assert key in text, f"no {key} in drift.json"
    assert len(document["statistics"]) == 14
    assert "reasoning - multimodal" in document["formula"]
    shards = document["sources"]["reasoning"]["shards"]
    assert [shard["file"] for shard in shards] == ["model.safetensors"]
    assert any("sha256" in key and len(value) == 64 for key, value in shards[0].items())


def test_a_changed_source_has_another_fingerprint(tmp_path: Path) -> None:
    def fingerprints(delta: Any) -> str:
        return json.dumps(delta.sources, default=vars, sort_keys=True)

    pair = write_pair(tmp_path)
    before = fingerprints(compute_delta(pair.reasoning, pair.multimodal))
    again = fingerprints(compute_delta(pair.reasoning, pair.multimodal))
    file = pair.reasoning / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    assert before == again
    assert fingerprints(compute_delta(pair.reasoning, pair.multimodal)) != before


def assert_same_delta(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    assert found.dtype == expected.dtype
    assert found.names == expected.names
    for name in expected:
        assert torch.equal(found[name], expected[name])
        assert tuple(found.shapes[name]) == tuple(expected[name].shape)
    assert list(found.stats) == list(expected.stats)
    assert found.coverage.matched == expected.coverage.matched
    assert found.coverage.unmatched_multimodal == expected.coverage.unmatched_multimodal
    assert found.coverage.unmatched_reasoning == expected.coverage.unmatched_reasoning
    assert found.coverage.fraction == expected.coverage.fraction


def test_a_delta_opened_again_is_the_delta_that_was_written(sharded_pair: Pair, out: Path) -> None:
    written = compute_delta(
        sharded_pair.reasoning, sharded_pair.multimodal, out, max_shard_size="1KB"
    )
    assert_same_delta(Delta.open(out), written)
    assert_same_delta(Delta.open(str(out)), written)


def test_a_delta_without_out_yields_the_same_tensors_and_writes_nothing(
    pair: Pair, out: Path
) -> None:
    before = everything_under(pair.reasoning.parent)
    lazy = compute_delta(pair.reasoning, pair.multimodal)
    assert everything_under(pair.reasoning.parent) == before
    assert_same_delta(lazy, compute_delta(pair.reasoning, pair.multimodal, out))


@pytest.mark.parametrize("out_dtype", OUTPUT_DTYPES)
def test_saving_a_lazy_delta_writes_what_compute_delta_would_have_written(
    pair: Pair, tmp_path: Path, out_dtype: str
) -> None:
    lazy = compute_delta(pair.reasoning, pair.multimodal, dtype=out_dtype)
    lazy.save(tmp_path / "saved")
    compute_delta(pair.reasoning, pair.multimodal, tmp_path / "direct", dtype=out_dtype)
    assert contents(tmp_path / "saved") == contents(tmp_path / "direct")
    assert_same_delta(Delta.open(tmp_path / "saved"), lazy)


def test_an_opened_delta_can_be_saved_elsewhere(pair: Pair, tmp_path: Path) -> None:
    compute_delta(pair.reasoning, pair.multimodal, tmp_path / "first")
    first = Delta.open(tmp_path / "first")
    first.save(tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert_same_delta(Delta.open(tmp_path / "second"), first)


def test_an_opened_delta_is_split_again_when_it_is_saved_with_another_shard_size(
    pair: Pair, tmp_path: Path
) -> None:
    compute_delta(pair.reasoning, pair.multimodal, tmp_path / "whole")
    Delta.open(tmp_path / "whole").save(tmp_path / "split", max_shard_size=300)
    compute_delta(pair.reasoning, pair.multimodal, tmp_path / "direct", max_shard_size=300)
    assert contents(tmp_path / "split") == contents(tmp_path / "direct")


def test_a_tensor_taken_from_a_delta_is_a_copy_of_its_own(pair: Pair, out: Path) -> None:
    for delta in (
        compute_delta(pair.reasoning, pair.multimodal, out),
        compute_delta(pair.reasoning, pair.multimodal),
    ):
        name = next(iter(delta))
        first = delta[name]
        kept = first.clone()
        first.add_(1)
        assert torch.equal(delta[name], kept)
    assert torch.equal(Delta.open(out)[name], kept)


def test_an_unknown_name_is_a_key_error_as_in_any_mapping(pair: Pair) -> None:
    delta = compute_delta(pair.reasoning, pair.multimodal)
    assert "nowhere.weight" not in delta
    with pytest.raises(KeyError, match=r"nowhere\.weight"):
        delta["nowhere.weight"]


def test_two_text_models_give_the_prior2_form_under_the_base_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    from support.synthetic import language_model, moved

    base = language_model(rng)
    expert = moved(rng, base, to="model.")
    delta = compute_delta(
        write_checkpoint(tmp_path / "expert", expert), write_checkpoint(tmp_path / "base", base)
    )
    assert len(delta) == 14
    for name, tensor in delta.items():
        expected = round_once(expert[name].values - base[name].values, "BF16")
        assert (bits_of(tensor) == expected).all()


# ------------------------------------------------------------------ overwriting


def test_an_existing_directory_is_refused_and_left_as_it_was(pair: Pair, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("three years of work")
    for overwrite in (False, True):
        with refused((FileExistsError, drift_fast.DriftError), out.name):
            compute_delta(pair.reasoning, pair.multimodal, out, overwrite=overwrite)
        assert everything_under(out) == {"thesis.txt"}
    assert everything_under(out.parent) == {"delta", "delta/thesis.txt"}


def test_an_existing_file_is_refused(pair: Pair, out: Path) -> None:
    out.write_text("a file")
    for overwrite in (False, True):
        with refused((FileExistsError, NotADirectoryError), out.name):
            compute_delta(pair.reasoning, pair.multimodal, out, overwrite=overwrite)
    assert out.read_text() == "a file"


def test_an_existing_delta_is_replaced_only_when_asked(
    pair: Pair, sharded_pair: Pair, out: Path
) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out, max_shard_size="200")
    before = contents(out)
    with refused(FileExistsError, out.name, "overwrite"):
        compute_delta(sharded_pair.reasoning, sharded_pair.multimodal, out)
    assert contents(out) == before
    delta = compute_delta(sharded_pair.reasoning, sharded_pair.multimodal, out, overwrite=True)
    assert len(contents(out)) == 2, "a shard of the former delta is still there"
    assert_same_delta(Delta.open(out), delta)
    assert everything_under(out.parent) == {"delta", *(f"delta/{name}" for name in os.listdir(out))}


def test_a_delta_with_a_strangers_file_in_it_is_not_thrown_away(pair: Pair, out: Path) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    (out / "notes.md").write_text("mine")
    with refused((OSError, drift_fast.DriftError), "notes.md"):
        compute_delta(pair.reasoning, pair.multimodal, out, overwrite=True)
    assert (out / "notes.md").read_text() == "mine"
    assert len(Delta.open(out)) == 14


@pytest.mark.parametrize("name", ["delta-mine.safetensors", "delta-00001-of-mine.safetensors"])
def test_a_file_named_much_like_a_shard_is_a_strangers(pair: Pair, out: Path, name: str) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    (out / name).write_text("mine")
    with refused((OSError, drift_fast.DriftError), name):
        compute_delta(pair.reasoning, pair.multimodal, out, overwrite=True)
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("what", ["notes.txt", "notes/deep.txt"])
def test_a_hidden_directory_with_someones_files_is_left_alone(
    pair: Pair, out: Path, what: str
) -> None:
    theirs = out.parent / f".{out.name}.incomplete" / what
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with refused((OSError, drift_fast.DriftError), "notes"):
        compute_delta(pair.reasoning, pair.multimodal, out)
    assert theirs.read_text() == "mine"


def test_a_failed_overwrite_leaves_the_former_delta_whole(
    pair: Pair, tmp_path: Path, out: Path
) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    before = contents(out)
    broken = dict(pair.text)
    name = "model.layers.1.mlp.down_proj.weight"
    values = broken[name].values.copy()
    values[3] = np.nan
    broken[name] = stored(values, "BF16", broken[name].shape)
    with refused(drift_fast.NonFiniteError, name):
        compute_delta(
            write_checkpoint(tmp_path / "broken", broken), pair.multimodal, out, overwrite=True
        )
    assert contents(out) == before
    assert len(Delta.open(out)) == 14


def test_an_empty_directory_and_missing_parents_are_accepted(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "and" / "deep"):
        assert len(compute_delta(pair.reasoning, pair.multimodal, out)) == 14
        assert len(Delta.open(out)) == 14


def test_a_failed_run_removes_the_parents_it_made(pair: Pair, tmp_path: Path) -> None:
    values = np.full((8, 8), np.nan)
    broken = {**pair.text, "model.layers.0.self_attn.q_proj.weight": stored(values)}
    source = write_checkpoint(tmp_path / "broken", broken)
    before = everything_under(tmp_path)
    with refused(drift_fast.NonFiniteError, "q_proj"):
        compute_delta(source, pair.multimodal, tmp_path / "new" / "and" / "deep")
    assert everything_under(tmp_path) == before


def test_the_delta_may_not_replace_one_of_its_own_sources(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "delta"
    compute_delta(pair.reasoning, pair.multimodal, out)
    before = contents(pair.reasoning)
    with pytest.raises((FileExistsError, drift_fast.DriftError)):
        compute_delta(pair.reasoning, pair.multimodal, pair.reasoning, overwrite=True)
    assert contents(pair.reasoning) == before


# ------------------------------------------------------------------ opening what is not a delta


def test_a_directory_that_is_not_a_delta_is_not_opened_as_one(pair: Pair, tmp_path: Path) -> None:
    with refused(FileNotFoundError, "nowhere"):
        Delta.open(tmp_path / "nowhere")
    with refused(
        (drift_fast.CheckpointError, FileNotFoundError), "drift.json", pair.reasoning.name
    ):
        Delta.open(pair.reasoning)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"format_version": 999}', '{"format_version": "1"}', "\x00\xff"],
)
def test_a_damaged_drift_json_is_named(pair: Pair, out: Path, content: str) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    (out / "drift.json").write_text(content)
    with refused(drift_fast.CheckpointError, "drift.json"):
        Delta.open(out)


def test_a_newer_format_says_which_version_it_is(pair: Pair, out: Path) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    document = json.loads((out / "drift.json").read_text())
    document["format_version"] = 999
    (out / "drift.json").write_text(json.dumps(document))
    with refused(drift_fast.CheckpointError, "drift.json", "999", "version"):
        Delta.open(out)


def test_a_delta_whose_shard_is_missing_or_cut_short_is_refused(pair: Pair, out: Path) -> None:
    compute_delta(pair.reasoning, pair.multimodal, out)
    (shard,) = out.glob("*.safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data[:-5])
    with refused((drift_fast.CheckpointError, FileNotFoundError), shard.name):
        list(Delta.open(out).values())
    shard.unlink()
    with refused((drift_fast.CheckpointError, FileNotFoundError), shard.name):
        list(Delta.open(out).values())


@pytest.mark.parametrize("function", [compute_delta, inspect])
def test_a_retired_keyword_says_what_to_do_instead(tmp_path: Path, function: Any) -> None:
    pair = write_pair(tmp_path)
    with refused(TypeError, function.__name__, "singular", "torch.linalg.svdvals"):
        function(pair.reasoning, pair.multimodal, singular=4)
    with refused(TypeError, function.__name__, "progress_bar=True", "on_progress="):
        function(pair.reasoning, pair.multimodal, progress=False)
    with refused(TypeError, function.__name__, "moduls", "did you mean 'modules'?"):
        function(pair.reasoning, pair.multimodal, moduls="attn")


def test_a_bar_is_shown_on_request_and_never_in_a_pipe(
    pair: Pair, capfd: pytest.CaptureFixture[str]
) -> None:
    sources = pair.reasoning, pair.multimodal
    drift_fast.inspect(*sources)
    drift_fast.inspect(*sources, progress_bar=False)
    assert capfd.readouterr() == ("", "")
    seen: list[Progress] = []
    drift_fast.inspect(*sources, progress_bar=True, on_progress=seen.append)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "reading" in captured.err
    assert seen[-1].nbytes == seen[-1].total_nbytes > 0
