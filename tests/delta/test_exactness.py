"""Every bit of Δ is that of one float64 subtraction, rounded once, and the same on every run.

Every expected bit comes from synthetic.py's float64 oracle, which is tested here too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_fast import Delta, compute_delta, inspect
from support.commands import strict
from support.deltas import assert_same_bits, bits_of, layer
from support.synthetic import (
    EXPONENT_AND_MANTISSA_NBITS,
    FLOAT_DTYPES,
    OUTPUT_DTYPES,
    Pair,
    Stored,
    awkward_operands,
    contents,
    opaque,
    round_once,
    stored,
    stored_bits,
    subtract,
    widen,
    write_file,
)

# Operands of every size at once: the largest, which are all that counts, differ by rounding only.
pytestmark = pytest.mark.filterwarnings("ignore:.* is rounding:drift_fast.DriftWarning")

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
    strict((tmp_path / "delta" / "drift.json").read_text())


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
