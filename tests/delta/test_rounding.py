"""How much of Δ is rounding of its sources, against pairs whose true Δ is known.

Masters are drawn in float64 and stored in narrower types. The true share is ‖Δ − true Δ‖/‖Δ‖.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from drift_fast import Delta, DriftWarning, check, compute_delta, inspect
from drift_fast.delta.statistics import Row, Statistics
from support.deltas import layer
from support.synthetic import BITS_DTYPE, Floats, Stored, round_once, stored, widen, write_file

# Most pairs here are mostly rounding on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.* is rounding:drift_fast.DriftWarning")

NUMEL = 40_000
SIGMA = 0.02
# A typical unit in the last place of bfloat16 weights of that size.
UNIT = 7.5e-5
# From a hundredth of a unit to a hundred units.
STEPS = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1, 2, 4, 10, 100)


def drawn(kind: str, rng: np.random.Generator, size: int) -> Floats:
    """Return numbers of variance one, some of them only in every fifth place."""
    values: Floats = {
        "normal": lambda: rng.normal(0, 1, size),
        "laplace": lambda: rng.laplace(0, 0.5**0.5, size),
        "student": lambda: rng.standard_t(5, size) * 0.6**0.5,
        "sparse": lambda: rng.normal(0, 1, size) * (rng.random(size) < 0.2),
    }[kind]()
    return values


def rows_of(directory: Path, pairs: list[tuple[Stored, Stored]]) -> list[Row]:
    report = inspect(
        write_file(directory / "a.safetensors", {layer(i): a for i, (a, _) in enumerate(pairs)}),
        write_file(directory / "b.safetensors", {layer(i): b for i, (_, b) in enumerate(pairs)}),
        check_weights=False,
    )
    return list(report.stats)


def share(found: Floats, true: Floats) -> float:
    return math.sqrt(float(np.sum((found - true) ** 2)) / float(np.sum(found**2)))


@pytest.mark.parametrize("kind", ["normal", "laplace", "student", "sparse"])
@pytest.mark.parametrize(
    "dtypes", [("BF16", "BF16"), ("F16", "F16"), ("BF16", "F32"), ("F32", "BF16"), ("F16", "BF16")]
)
def test_the_share_is_that_of_the_true_delta(
    tmp_path: Path, kind: str, dtypes: tuple[str, str]
) -> None:
    rng = np.random.default_rng(18)
    unit = UNIT / 8 if dtypes == ("F16", "F16") else UNIT
    pairs, true = [], []
    for step in STEPS:
        weights, delta = rng.normal(0, SIGMA, NUMEL), step * unit * drawn(kind, rng, NUMEL)
        pairs.append((stored(weights + delta, dtypes[0]), stored(weights, dtypes[1])))
        true.append(share(pairs[-1][0].values - pairs[-1][1].values, delta))
    for step, row, expected in zip(STEPS, rows_of(tmp_path, pairs), true, strict=True):
        assert row.rounding_share == pytest.approx(expected, rel=0.15, abs=0.01), step


def test_the_share_is_that_of_eight_bit_codes_under_scales(tmp_path: Path) -> None:
    rng = np.random.default_rng(19)
    shape = (256, 256)
    pairs, true, scales = [], [], {}
    for number, step in enumerate((0.003, 0.02, 0.1, 0.5)):
        weights, delta = rng.normal(0, SIGMA, shape), rng.normal(0, step * SIGMA, shape)
        scale = np.abs(weights).reshape(2, 128, 2, 128).max(axis=(1, 3)) / 448
        whole = np.kron(scale.astype(np.float32), np.ones((128, 128), np.float32))
        codes = torch.from_numpy(((weights + delta) / whole).astype(np.float32).clip(-448, 448))
        eight = codes.to(torch.float8_e4m3fn)
        values = eight.float().numpy() * whole
        name = layer(number)
        scales[f"{name}_scale_inv"] = stored(scale, "F32")
        a = Stored("F8_E4M3", shape, eight.view(torch.uint8).numpy().tobytes())
        pairs.append((a, stored(weights)))
        difference = values.astype(np.float64) - pairs[-1][1].values.reshape(shape)
        true.append(share(difference, delta))
    report = inspect(
        write_file(
            tmp_path / "a.safetensors", {layer(i): a for i, (a, _) in enumerate(pairs)} | scales
        ),
        write_file(tmp_path / "b.safetensors", {layer(i): b for i, (_, b) in enumerate(pairs)}),
        check_weights=False,
    )
    for row, expected in zip(report.stats, true, strict=True):
        assert row.rounding_share == pytest.approx(expected, rel=0.15, abs=0.01)


def test_what_was_rounded_before_it_was_stored_in_more_bits_counts_as_rounded(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(20)
    weights, delta = rng.normal(0, SIGMA, NUMEL), rng.normal(0, UNIT, NUMEL)
    narrow = [widen(round_once(x, "BF16"), "BF16") for x in (weights + delta, weights)]
    (first,), (second,), (third,) = (
        rows_of(tmp_path, [(stored(narrow[0], a), stored(narrow[1], b))])
        for a, b in (("BF16", "BF16"), ("F32", "F32"), ("F64", "F32"))
    )
    true = share(narrow[0] - narrow[1], delta)
    assert first.rounding_share == pytest.approx(true, rel=0.1)
    for wider in (second, third):
        assert wider.rounding_share == pytest.approx(first.rounding_share, rel=1e-6)


def test_full_precision_frozen_weights_and_few_changes_have_no_noise_to_speak_of(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(21)
    weights, delta = rng.normal(0, SIGMA, NUMEL), rng.normal(0, UNIT, NUMEL)
    bits = round_once(weights, "BF16")
    frozen = Stored("BF16", (NUMEL,), bits.tobytes())
    # One row of all changed, and by much: the sample may miss it.
    some = bits.copy()
    some[:64] = round_once(weights[:64] + 0.5, "BF16")
    few = Stored("BF16", (NUMEL,), some.astype(BITS_DTYPE["BF16"]).tobytes())
    rows = rows_of(
        tmp_path,
        [
            (stored(weights + delta, "F32"), stored(weights, "F32")),
            (frozen, frozen),
            (few, frozen),
            (stored([1.0, 2.0, 3.0]), stored([1.0, 1.0, 1.0])),
        ],
    )
    assert rows[0].rounding_share < 1e-4
    assert rows[1].rounding_sq == rows[1].rounding_share == 0
    assert 0 < rows[2].rounding_share < 0.01
    assert rows[3].rounding_share < 0.01


def test_a_model_that_was_trained_in_float32_from_the_other_one_has_lost_nothing(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(22)
    base = widen(round_once(rng.normal(0, SIGMA, NUMEL), "BF16"), "BF16")
    moved = stored(base + rng.normal(0, UNIT / 20, NUMEL), "F32")
    (row,) = rows_of(tmp_path, [(moved, stored(base))])
    assert row.rounding_share < 0.01


def write_tensors(directory: Path, step: float) -> tuple[Path, Path]:
    """Write three tensors, one of several chunks, whose true Δ is so many units."""
    rng = np.random.default_rng(23)
    a, b = {}, {}
    for number, size in enumerate((300_000, 20_000, 700)):
        weights = rng.normal(0, SIGMA, size)
        a[layer(number)] = stored(weights + rng.normal(0, step * UNIT, size))
        b[layer(number)] = stored(weights)
    return write_file(directory / "a.safetensors", a), write_file(directory / "b.safetensors", b)


def test_the_estimate_is_kept_added_up_and_independent_of_threads(tmp_path: Path) -> None:
    sources = write_tensors(tmp_path, 1)
    delta = compute_delta(*sources, tmp_path / "delta", threads=1)
    assert list(delta.stats) == list(inspect(*sources, threads=3).stats)
    assert list(Delta.open(tmp_path / "delta").stats) == list(delta.stats)
    total = delta.stats.total
    assert total.rounding_sq == math.fsum(row.rounding_sq or 0 for row in delta.stats)
    assert total.rounding_share == pytest.approx(0.51, rel=0.1)
    assert f"{total.rounding_share:.1%}" in Statistics([total]).table()
    assert delta.stats.to_rows()[0].rounding_sq == delta.stats[0].rounding_sq
    assert total.to_dict()["rounding_share"] == total.rounding_share


def test_a_delta_of_an_earlier_version_and_a_sum_of_deltas_do_not_know_it(tmp_path: Path) -> None:
    delta = compute_delta(*write_tensors(tmp_path, 1), tmp_path / "delta")
    shutil.copytree(tmp_path / "delta", tmp_path / "old")
    description = json.loads((tmp_path / "old" / "drift.json").read_text())
    for row in description["statistics"]:
        del row["rounding_sq"]
    (tmp_path / "old" / "drift.json").write_text(json.dumps(description))
    old = Delta.open(tmp_path / "old")
    for stats in (old.stats, Delta.combine([(delta, 1.0), (delta, 1.0)]).stats):
        assert stats.total.rounding_sq is None
        assert math.isnan(stats.total.rounding_share)
        assert stats.total.to_dict()["rounding_share"] is None
        assert "–" in stats.table()


@pytest.mark.filterwarnings("default::drift_fast.DriftWarning")
def test_a_delta_that_is_mostly_rounding_warns_once_with_the_number(tmp_path: Path) -> None:
    sources = write_tensors(tmp_path, 0.3)
    with pytest.warns(DriftWarning) as caught:
        delta = compute_delta(*sources, tmp_path / "delta")
    (message,) = [str(one.message) for one in caught if "rounding" in str(one.message)]
    for part in (f"{delta.stats.total.rounding_share:.0%}", "q_proj", "float32", "further apart"):
        assert part in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inspect(*write_tensors(tmp_path, 2))


def test_check_estimates_it_from_samples(tmp_path: Path) -> None:
    for step in (0.3, 2):
        sources = write_tensors(tmp_path, step)
        expected = inspect(*sources).stats.total.rounding_share
        report = check(*sources)
        assert report.rounding is not None
        assert report.rounding.share == pytest.approx(expected, rel=0.1)
        assert report.to_dict()["rounding"]["modules"].keys() == {"self_attn.q_proj"}
        assert f"{report.rounding.share:.1%} of ‖Δ‖" in report.table()
        notes = [one for one in report.findings if one.subject == "rounding in Δ"]
        assert len(notes) == (step < 1)
