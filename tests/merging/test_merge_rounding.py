"""How much of a merge rounding to the output's dtype takes away, against float64."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from drift_fast import AlignmentError, DriftWarning, check, merge
from support.synthetic import Stored, round_once, stored, widen, write_checkpoint

NAMES = [f"model.layers.{layer}.self_attn.{of}_proj.weight" for layer in range(2) for of in "qkv"]


def write_pair(directory: Path, step: float) -> tuple[dict[str, Stored], ...]:
    rng = np.random.default_rng(31)
    sides: tuple[dict[str, Stored], dict[str, Stored]] = {}, {}
    for number, name in enumerate(NAMES):
        shape = (16 << number, 64)
        weights = rng.normal(0, 0.02, shape)
        sides[0][name] = stored(weights + rng.normal(0, step * 0.02, shape), "F32", shape)
        sides[1][name] = stored(weights, "BF16", shape)
    for side, directory_name in zip(sides, ("text", "vlm"), strict=True):
        path = write_checkpoint(directory / directory_name, side)
        (path / "config.json").write_text("{}")
    return sides


def share_of(tensors: list[tuple[Stored, Stored]], weight: float) -> float:
    rounding_sq = shift_sq = 0.0
    for r, m in tensors:
        merged = m.values + weight * (r.values - m.values)
        rounding_sq += float(np.sum((widen(round_once(merged, "BF16"), "BF16") - merged) ** 2))
        shift_sq += float(np.sum((merged - m.values) ** 2))
    return math.sqrt(rounding_sq / shift_sq)


@pytest.mark.filterwarnings("default::drift_fast.DriftWarning")
def test_rounding_beside_the_shift_is_that_of_float64_and_warns(tmp_path: Path) -> None:
    text, vlm = write_pair(tmp_path, 0.01)
    with pytest.warns(DriftWarning, match=r"rounding to bfloat16 changes .* dtype='float32'"):
        merged = merge("linear", tmp_path / "text", tmp_path / "vlm", tmp_path / "out", weight=0.5)
    whole = share_of([(text[name], vlm[name]) for name in NAMES], 0.5)
    assert whole > 0.25
    # One block in eight was looked at.
    assert merged.rounding_share == pytest.approx(whole, rel=0.05)
    for tensor in merged.tensors:
        expected = share_of([(text[tensor.name], vlm[tensor.name])], 0.5)
        assert tensor.rounding_share == pytest.approx(expected, rel=0.15)
    written = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert written["rounding_share"] == merged.rounding_share
    assert [row["rounding_share"] for row in written["tensors"]] == [
        tensor.rounding_share for tensor in merged.tensors
    ]


def test_float32_and_a_larger_shift_lose_little_and_say_nothing(tmp_path: Path) -> None:
    write_pair(tmp_path, 0.01)
    sources = tmp_path / "text", tmp_path / "vlm"
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        merged = merge("linear", *sources, tmp_path / "wide", weight=0.5, dtype="float32")
        assert merged.rounding_share is not None
        assert merged.rounding_share < 1e-4
        write_pair(tmp_path / "far", 0.1)
        far = tmp_path / "far"
        merged = merge("linear", far / "text", far / "vlm", tmp_path / "out", weight=0.5)
    assert merged.rounding_share is not None
    assert 0.01 < merged.rounding_share < 0.1


def test_what_is_not_shifted_has_no_share(tmp_path: Path) -> None:
    write_pair(tmp_path, 0.01)
    shutil.copytree(tmp_path / "vlm", tmp_path / "copy")
    merged = merge("linear", tmp_path / "copy", tmp_path / "vlm", tmp_path / "out", weight=0.5)
    assert merged.rounding_share is None


def test_a_base_that_is_the_reasoning_model_is_noticed(tmp_path: Path) -> None:
    write_pair(tmp_path, 0.01)
    text, vlm = tmp_path / "text", tmp_path / "vlm"
    with pytest.warns(DriftWarning, match="its task vector is zero"):
        merge("task_arithmetic", text, vlm, tmp_path / "out", base=text)


def test_a_model_is_not_merged_with_itself(tmp_path: Path) -> None:
    write_pair(tmp_path, 0.01)
    with pytest.raises(AlignmentError, match="given twice"):
        merge("linear", tmp_path / "vlm", tmp_path / "vlm", tmp_path / "out", weight=0.5)
    assert not (tmp_path / "out").exists()
    report = check(tmp_path / "vlm", tmp_path / "vlm")
    assert not report.ok
    assert "given twice" in report.table()
