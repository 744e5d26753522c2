"""Several deltas summed with weights: exact, in the right order, and nothing taken for zero in
silence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import drift_fast
from drift_fast import CoverageError, Delta, compute_delta
from drift_fast.delta.combined import Combined
from drift_fast.delta.delta import combine
from support.injection_models import Backbone, delta_towards, train
from support.synthetic import Pair, refused, round_once, write_pair


class Tensors:
    """A delta in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], dtype: str | None = None) -> None:
        self._tensors = dict(tensors)
        self.reads: list[str] = []
        if dtype is not None:
            self.dtype = dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self._tensors[name]


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> list[Delta]:
    """Two stored deltas of one architecture."""
    found = []
    for seed in (3, 4):
        folder = tmp_path_factory.mktemp(f"pair{seed}")
        pair: Pair = write_pair(folder, seed=seed)
        found.append(compute_delta(pair.reasoning, pair.multimodal, folder / "delta"))
    return found


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def test_a_combination_of_deltas_is_the_float64_sum_rounded_once(deltas: list[Delta]) -> None:
    first, second = deltas
    combined = combine({first: 0.7, second: -1.3})
    assert combined.dtype == "bfloat16"
    assert combined.names == first.names
    assert combined.shapes == first.shapes
    for name, found in combined.items():
        exact = 0.7 * first[name].double().numpy() - 1.3 * second[name].double().numpy()
        assert found.shape == first[name].shape
        assert np.array_equal(bits(found).ravel(), round_once(exact.ravel(), "BF16")), (
            f"{name} was rounded twice"
        )


@given(
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=20),
    st.sampled_from(["bfloat16", "float16"]),
)
def test_rounding_takes_the_nearest_of_16_bits(values: list[float], dtype: str) -> None:
    limit = 6e4 if dtype == "float16" else 1e30
    exact = np.clip(np.array(values), -limit, limit)
    delta = Tensors({"x": torch.tensor(exact)})
    found = combine([(delta, 1.0)], dtype=dtype)["x"]
    expected = round_once(exact, "BF16" if dtype == "bfloat16" else "F16")
    assert np.array_equal(bits(found), expected)


def test_a_value_just_above_a_tie_rounds_up_where_float32_on_the_way_would_lose_it() -> None:
    # 1 + 2⁻⁸ lies between two bfloat16; 2⁻⁴⁰ more decides, and is not in float32.
    values = torch.tensor([1.0 + 2.0**-8 + 2.0**-40, 1.0 + 2.0**-8 - 2.0**-40], dtype=torch.float64)
    found = combine([(Tensors({"x": values}), 1.0)], dtype="bfloat16")["x"]
    assert found.tolist() == [1.0 + 2.0**-7, 1.0]


@given(
    st.lists(st.tuples(st.integers(-(2**20), 2**20), st.integers(-64, 64)), min_size=1, max_size=6)
)
def test_float32_sums_equal_exact_rational_sums(terms: list[tuple[int, int]]) -> None:
    given_terms = [(Tensors({"x": torch.tensor([float(v)])}), w / 8) for v, w in terms]
    exact = sum((Fraction(v) * Fraction(w, 8) for v, w in terms), Fraction(0))
    assert combine(given_terms)["x"].item() == np.float32(float(exact))


def test_a_weight_of_one_alone_returns_the_delta_bit_for_bit(deltas: list[Delta]) -> None:
    combined = combine({deltas[0]: 1})
    assert all(torch.equal(combined[name], deltas[0][name]) for name in deltas[0])


def test_paths_and_open_deltas_mix_and_one_delta_may_come_twice(deltas: list[Delta]) -> None:
    first, second = deltas
    assert first.path is not None
    combined = combine([(first.path, 0.5), (str(second.path), 1.0), (first, 0.5)])
    expected = combine({first: 1.0, second: 1.0})
    assert all(torch.equal(combined[name], expected[name]) for name in expected)


def test_combinations_combine(deltas: list[Delta]) -> None:
    first, second = deltas
    inner = combine({first: 2.0, second: 1.0}, dtype="float32")
    outer = combine({inner: 0.5, second: -0.5}, dtype="float32")
    for name in outer:
        torch.testing.assert_close(outer[name], first[name].float(), rtol=0, atol=1e-6)


def test_a_tensor_is_read_only_when_it_is_asked_for() -> None:
    delta = Tensors({"a": torch.ones(2), "b": torch.ones(2)})
    combined = combine([(delta, 2.0)])
    assert ("a" in combined, "c" in combined, len(combined), list(combined)) == (
        True,
        False,
        2,
        ["a", "b"],
    )
    assert repr(combined)
    assert delta.reads == []
    assert combined["b"].tolist() == [2.0, 2.0]
    assert delta.reads == ["b"]


def test_a_result_shares_no_memory_with_a_delta() -> None:
    tensor = torch.ones(3)
    combined = combine([(Tensors({"x": tensor}), 1.0)])
    combined["x"].zero_()
    assert tensor.tolist() == [1.0] * 3


def test_scalars_empty_and_non_contiguous_tensors_keep_their_order() -> None:
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
    }
    combined = combine([(Tensors(tensors), -2.0)])
    for name, tensor in tensors.items():
        assert torch.equal(combined[name], -2.0 * tensor), name
        assert combined[name].shape == tensor.shape


def test_long_tensors_are_summed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drift_fast.delta.combined._PIECE", 7)
    values = torch.arange(100.0).reshape(4, 25)
    combined = combine([(Tensors({"x": values}), 1.0), (Tensors({"x": values * values}), 0.5)])
    assert torch.equal(combined["x"], values + 0.5 * values * values)


def test_a_name_that_one_delta_lacks_is_refused_with_its_name_and_where() -> None:
    first, second = Tensors({"a": torch.ones(1)}), Tensors({"a": torch.ones(1), "b": torch.ones(1)})
    with refused(CoverageError, "b: not in Tensors", "missing_as_zero", "modules="):
        combine([(first, 1.0), (second, 1.0)])


def test_a_missing_name_is_zero_where_that_is_said() -> None:
    first, second = Tensors({"a": torch.ones(1)}), Tensors({"b": torch.ones(2), "a": torch.ones(1)})
    combined = combine([(first, 1.0), (second, 3.0)], missing_as_zero=True)
    assert combined.names == ["a", "b"]
    assert combined["a"].tolist() == [4.0]
    assert combined["b"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("missing_as_zero", [False, True])
def test_unequal_shapes_are_refused_with_both(missing_as_zero: bool) -> None:
    first, second = Tensors({"a": torch.ones(2, 3)}), Tensors({"a": torch.ones(3, 2)})
    with refused(CoverageError, "a: shape [2, 3] and [3, 2]"):
        combine([(first, 1.0), (second, 1.0)], missing_as_zero=missing_as_zero)


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", None, True])
def test_a_weight_that_is_no_finite_number_is_refused(weight: Any) -> None:
    with refused(ValueError, "weight", "finite"):
        combine([(Tensors({"a": torch.ones(1)}), weight)])


def test_nothing_to_combine_and_what_is_no_delta_are_refused(
    deltas: list[Delta], tmp_path: Path
) -> None:
    with refused(ValueError, "no delta"):
        combine({})
    with refused(ValueError, "dtype", "float64"):
        combine({deltas[0]: 1.0}, dtype="float64")
    with refused(TypeError, "delta", "dict"):
        combine([({"a": torch.ones(1)}, 1.0)])  # type: ignore[list-item]
    with refused(TypeError, "pairs", "one delta"):
        combine(deltas[0])  # type: ignore[arg-type]
    with refused(FileNotFoundError, "not a delta"):
        combine({tmp_path: 1.0})
    with refused(CoverageError, "tensor"):
        combine([(Tensors({}), 1.0)])


def test_a_sum_beyond_the_dtype_is_refused_when_it_is_read() -> None:
    big = Tensors({"a": torch.full((2,), 6e4)})
    combined = combine([(big, 1.0), (big, 1.0)], dtype="float16")
    with refused(drift_fast.NonFiniteError, "a:", "float16", "float32"):
        combined["a"]
    with refused(drift_fast.NonFiniteError, "a:"):
        combine([(Tensors({"a": torch.tensor([math.nan])}), 0.0)])["a"]


def test_a_delta_that_changes_its_shape_is_refused() -> None:
    class Changing(Tensors):
        def __getitem__(self, name: str) -> torch.Tensor:
            return torch.ones(3)

    with refused(drift_fast.DriftError, "shape [3]", "[2]"):
        combine([(Changing({"a": torch.ones(2)}), 1.0)])["a"]


def test_the_dtype_is_the_common_one_or_float32(deltas: list[Delta]) -> None:
    half = Tensors({"a": torch.ones(1, dtype=torch.float16)}, dtype="float16")
    torch_named = Tensors({"a": torch.ones(1)}, dtype="torch.bfloat16")
    assert combine([(half, 1.0)]).dtype == "float16"
    assert combine([(torch_named, 1.0)]).dtype == "bfloat16"
    assert combine([(half, 1.0), (torch_named, 1.0)]).dtype == "float32"
    assert combine([(Tensors({"a": torch.ones(1)}), 1.0)]).dtype == "float32"
    assert combine([(half, 1.0)], dtype="bfloat16")["a"].dtype == torch.bfloat16


def test_what_was_combined_can_be_told_as_json(deltas: list[Delta]) -> None:
    first, second = deltas
    told = json.loads(json.dumps(combine({first: 0.5, second: -1.0}).to_dict()))
    assert [term["weight"] for term in told["combined"]] == [0.5, -1.0]
    assert [term["delta"] for term in told["combined"]] == [str(first.path), str(second.path)]
    assert told["combined"][0]["sources"] == first.sources
    assert combine({first: 1.0}).path is None


def test_an_injection_takes_a_combination_like_a_delta(tmp_path: Path) -> None:
    changed = []
    for combined in (False, True):
        model = Backbone()
        delta: Delta | Combined = delta_towards(tmp_path / f"{combined}", model)
        if combined:
            delta = combine([(delta, 0.25), (delta, 0.75)])
        with drift_fast.Injection(model, delta) as injection:
            train(model, 3, injection=injection)
        changed.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*changed, strict=True))


# ------------------------------------------------------------------ as a delta of its own


def test_a_combined_delta_is_saved_with_the_bits_of_the_sum(
    deltas: list[Delta], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No multiple of any row, so that pieces cut through tensors.
    monkeypatch.setattr("drift_fast.delta.combined._PIECE", 13)
    first, second = deltas
    assert first.path is not None
    weights = {first.path: 0.7, second: -1.3}
    delta = Delta.combine(weights)
    assert "nan" not in str(delta.stats), "norms of checkpoints, which a sum has not"
    expected = combine(weights)
    assert isinstance(delta, Delta)
    assert (delta.path, delta.dtype, delta.names) == (None, "bfloat16", expected.names)
    saved = delta.save(out, max_shard_size=400)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert saved.names == expected.names
    for name in expected:
        assert torch.equal(saved[name], expected[name]), name
        assert torch.equal(delta[name], expected[name]), name
    part = torch.empty(20, dtype=torch.bfloat16)
    delta.read_into(expected.names[0], part, start=7)
    assert torch.equal(part, expected[expected.names[0]].reshape(-1)[7:27])


def test_the_statistics_of_a_combined_delta_are_those_of_the_exact_sum(
    deltas: list[Delta], out: Path
) -> None:
    first, second = deltas
    delta = Delta.combine({first: 2.0, second: 0.1})
    saved = delta.save(out)
    for row, stored_row in zip(delta.stats, saved.stats, strict=True):
        exact = 2.0 * first[row.name].double().numpy() + 0.1 * second[row.name].double().numpy()
        assert row.delta_sq == pytest.approx(float(np.sum(exact * exact)), rel=1e-12)
        assert stored_row.delta_sq == row.delta_sq
        # The two were taken from different multimodal models, and neither sum is a checkpoint's.
        for value in (row.multimodal_sq, row.reasoning_sq, row.dot, row.relative, row.cosine):
            assert math.isnan(value)
        assert math.isnan(stored_row.multimodal_sq)
    assert saved.stats.table()


def test_a_norm_of_the_weights_that_all_deltas_share_is_kept(deltas: list[Delta]) -> None:
    first = deltas[0]
    assert first.path is not None
    delta = Delta.combine([(first, 0.5), (first.path, 0.25)])
    for row in delta.stats:
        assert row.multimodal_sq == first.stats[row.name].multimodal_sq
        assert row.relative == pytest.approx(0.75 * first.stats[row.name].relative, rel=1e-2)
    assert delta.coverage == first.coverage
    assert delta.selection == first.selection


def test_a_saved_combination_tells_what_it_was_made_of(deltas: list[Delta], out: Path) -> None:
    first, second = deltas
    Delta.combine({first: 0.5, second: -1.0}).save(out)
    told = json.loads((out / "drift.json").read_text())["sources"]["combined"]
    assert [term["weight"] for term in told] == [0.5, -1.0]
    assert [term["delta"] for term in told] == [str(first.path), str(second.path)]
    assert [term["sources"] for term in told] == [first.sources, second.sources]
    assert Delta.open(out).sources["combined"] == told
    # A saved one combines again.
    again = Delta.combine({out: 2.0})
    assert torch.equal(again[first.names[0]], 2.0 * Delta.open(out)[first.names[0]])


def test_a_combination_that_cannot_be_written_leaves_nothing(out: Path) -> None:
    big = Tensors({"a": torch.full((2,), 6e4)})
    with refused(drift_fast.NonFiniteError, "a:", "float16"):
        Delta.combine([(big, 2.0)], dtype="float16").save(out)
    small = Tensors({"a": torch.full((2,), 1e-9)})
    with refused(drift_fast.NonFiniteError, "a:", "below the range of float16", "bfloat16"):
        Delta.combine([(small, 1.0)], dtype="float16").save(out)
    assert list(out.parent.iterdir()) == []
    with refused(CoverageError, "b: not in Tensors"):
        Delta.combine([(big, 1.0), (Tensors({"a": torch.ones(2), "b": torch.ones(1)}), 1.0)])


def test_streamed_deltas_combine_without_being_written(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, seed=5)
    streamed = compute_delta(pair.reasoning, pair.multimodal)
    delta = Delta.combine({streamed: 2.0})
    for name in streamed:
        assert torch.equal(delta[name], 2.0 * streamed[name])
    saved = delta.save(tmp_path / "sum")
    assert all(torch.equal(saved[name], delta[name]) for name in delta)


def test_an_injection_takes_a_saved_combination(tmp_path: Path) -> None:
    changed = []
    for combined in (False, True):
        model = Backbone()
        delta = delta_towards(tmp_path / f"{combined}", model)
        if combined:
            delta = Delta.combine([(delta, 0.25), (delta, 0.75)]).save(tmp_path / "sum")
        with drift_fast.Injection(model, delta) as injection:
            train(model, 3, injection=injection)
        changed.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*changed, strict=True))
