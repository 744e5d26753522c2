"""FSDP1: local gradients and weights are found, and injections reach the weights.

Three processes, so that flat parameters do not divide evenly; four for replicas of shards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import sharded_workers
from support.joined import Joined, launch

VARIANTS: dict[str, dict[str, Any]] = {
    "clipped": {"clip": 0.5},
    "accumulation 4 without synchronization": {
        "strategy": "SHARD_GRAD_OP",
        "accumulate": 4,
        "no_sync": True,
    },
    "accumulation 4": {"accumulate": 4, "clip": 0.5},
    "not sharded": {"strategy": "NO_SHARD", "clip": 0.5},
    "one parameter ignored": {"ignore_gain": True},
    "computed in bf16": {"reduce_dtype": "float32", "clip": 0.5},
    "reduced and kept in bf16": {"reduce_dtype": "bfloat16", "keep_low_precision": True},
}


INJECTED = {
    "adaptive": {"scale": "adaptive"},
    "gradnorm, accumulation 4": {"scale": "gradnorm", "accumulate": 4, "no_sync": True},
    "absolute, not sharded": {"scale": "absolute", "strategy": "NO_SHARD"},
}
HYBRID: dict[str, dict[str, Any]] = {"hybrid": {"hybrid": True, "accumulate": 2, "clip": 0.5}}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has to say; starting processes takes longer than what they do."""
    jobs = {
        "variants": (sharded_workers.fsdp_variants, (VARIANTS,)),
        "injected": (sharded_workers.fsdp_injections, (INJECTED,)),
        "lost steps": (sharded_workers.fsdp_lost_steps, ()),
        "late": (sharded_workers.fsdp_late_backward, ()),
        "refused": (sharded_workers.fsdp_refusals, ()),
    }
    return launch(tmp_path_factory.mktemp("fsdp1"), jobs, Joined(3))


def check(reports: list[dict[str, Any]], variants: dict[str, dict[str, Any]]) -> None:
    for report in reports:
        for name, options in variants.items():
            row = report["variants"][name]
            assert row["kinds"] == ["Flattened"] + ["Whole"] * ("ignore_gain" in options), name
            assert row["tiled"], f"{name}: elements held twice or by nobody"
            assert row["shapes"], name
            assert row["clipped"] == ("clip" in options), name
            low = 5e-2 if "reduce_dtype" in options else 1e-6
            assert row["gradient"] <= low, (name, row)
            # A changed gradient is clipped and stepped as if backward had made it.
            assert row["step"] <= 1e-6, (name, row)
            assert row["moved"] <= 1e-6, (name, row)
            assert row["working"] == row["working moved"] == 0.0, (name, row)


def test_local_gradients_tile_the_whole_one_and_changes_to_them_reach_the_weights(
    reports: list[dict[str, Any]],
) -> None:
    check(reports, VARIANTS)
    assert any(report["variants"]["clipped"]["empty"] for report in reports)
    assert all(report["variants"]["not sharded"]["empty"] == 0 for report in reports)


@pytest.mark.slow
def test_replicas_of_a_shard_are_not_counted_twice(tmp_path: Path) -> None:
    jobs = {"variants": (sharded_workers.fsdp_variants, (HYBRID,))}
    check(launch(tmp_path, jobs, Joined(4)), HYBRID)


def test_an_injection_steps_along_the_injected_gradient(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        for name, row in report["injected"].items():
            assert row["injected"] == row["targets"] == 20, name
            assert row["steps"] == 1, name
            assert row["step"] <= 1e-6, (name, row)


def test_what_backward_wrote_after_the_injection_is_not_stepped_on(
    reports: list[dict[str, Any]],
) -> None:
    for report in reports:
        for key, refused in report["late"].items():
            if key.endswith("late"):
                assert "nothing was injected" in refused, key
            else:
                assert refused == "", key


def test_flattened_parameters_and_unreduced_gradients_are_refused(
    reports: list[dict[str, Any]],
) -> None:
    for report in reports:
        assert "use_orig_params=True" in report["refused"]["flat"]
        assert "outside no_sync()" in report["refused"]["no_sync"]


def test_bfloat16_shards_lose_steps_and_float32_ones_do_not(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        found = report["lost steps"]
        assert "mixed_precision=MixedPrecision(param_dtype=torch.bfloat16)" in found["bfloat16"]
        assert found["float32"] == ""
