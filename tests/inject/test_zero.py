"""DeepSpeed: local gradients and master weights are found, and injections reach the weights.

Every test trains in processes joined by gloo and compares with one process on the whole batch.
Three processes, so that neither partitions nor parameters divide evenly and some hold nothing.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from drift_fast import DriftError
from support import sharded_workers
from support.joined import Joined, launch
from support.processes import python

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)

PROCESSES = 3
# All slow tests share one run of three processes.
patient = pytest.mark.timeout(1500)
CPU = {"device": "cpu"}
BF16 = {"bf16": {"enabled": True}}
FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
FP16 = {"fp16": {"enabled": True, "loss_scale": 128}}
CLIP = {"gradient_clipping": 0.5}
FOUR = {"gradient_accumulation_steps": 4}
GROUPS = {"groups": True}


def zero(stage: int, **section: Any) -> dict[str, Any]:
    return {"zero": {"stage": stage, **section}}


VARIANTS: dict[str, dict[str, Any]] = {
    "ZeRO-1, accumulation 4, clipped": zero(1) | FOUR | CLIP,
    "ZeRO-2, offloaded, round robin, two groups, clipped": zero(
        2, offload_optimizer=CPU, round_robin_gradients=True
    )
    | GROUPS
    | CLIP,
    "ZeRO-3, clipped": zero(3, stage3_param_persistence_threshold=0) | CLIP,
    "ZeRO-3, offloaded, small parameters kept, accumulation 4, clipped": zero(
        3, offload_optimizer=CPU
    )
    | FOUR
    | CLIP,
}
VARIANTS_TOO: dict[str, dict[str, Any]] = {
    "ZeRO-1, not contiguous, not scattered": zero(
        1, contiguous_gradients=False, reduce_scatter=False
    )
    | GROUPS,
    "ZeRO-1, offloaded, accumulation 4, clipped": zero(1, offload_optimizer=CPU) | FOUR | CLIP,
    "ZeRO-1, bf16, accumulation 4": zero(1) | BF16 | FOUR | GROUPS,
    "ZeRO-1, bf16, float32 sums, clipped": zero(1) | BF16 | FLOAT32_SUMS | FOUR | CLIP,
    "ZeRO-2, round robin": zero(2, round_robin_gradients=True) | CLIP,
    "ZeRO-2, not contiguous": zero(2, contiguous_gradients=False) | GROUPS,
    "ZeRO-2, overlapped, accumulation 4": zero(2, overlap_comm=True) | FOUR,
    "ZeRO-2, aligned parameters": zero(2, parameter_alignment=True) | FOUR,
    "ZeRO-2, bf16": zero(2) | BF16 | CLIP,
    "ZeRO-2, bf16, float32 sums, accumulation 4": zero(2) | BF16 | FLOAT32_SUMS | FOUR | GROUPS,
    "ZeRO-2, bf16, float32 sums, offloaded": zero(2, offload_optimizer=CPU)
    | BF16
    | FLOAT32_SUMS
    | FOUR
    | CLIP,
    "ZeRO-2, fp16, clipped": zero(2) | FP16 | CLIP,
    "ZeRO-3, small parameters kept": zero(3) | FOUR,
    "ZeRO-3, bf16, two groups, clipped": zero(3, stage3_param_persistence_threshold=100)
    | BF16
    | GROUPS
    | CLIP,
    "ZeRO-3, bf16, float32 sums, sub-groups": zero(3, sub_group_size=5000)
    | BF16
    | FLOAT32_SUMS
    | FOUR,
    "ZeRO-3, bf16, all offloaded, clipped": zero(3, offload_optimizer=CPU, offload_param=CPU)
    | BF16
    | CLIP,
    "ZeRO-3, not scattered": zero(3, reduce_scatter=False),
    "ZeRO-3, fp16, clipped": zero(3) | FP16 | CLIP,
    "stage 0 in bf16, clipped": zero(0) | BF16 | CLIP,
}
INJECTED: dict[str, dict[str, Any]] = {
    "ZeRO-1": zero(1) | FOUR | {"scale": "adaptive"},
    "ZeRO-2 in fp16": zero(2) | FP16 | {"scale": "absolute"},
    "ZeRO-3": zero(3) | {"scale": "adaptive"},
}
INJECTED_TOO: dict[str, dict[str, Any]] = {
    "stage 0": zero(0) | {"scale": "gradnorm"},
    "stage 0, clipped": zero(0) | {"gradient_clipping": 1000.0, "scale": "gradnorm"},
    "ZeRO-1, BF16_Optimizer": zero(1) | BF16 | FLOAT32_SUMS | {"scale": "adaptive"},
    "ZeRO-2": zero(2) | {"scale": "absolute"},
    "ZeRO-2, offloaded": zero(2, offload_optimizer=CPU) | {"scale": "gradnorm"},
    "ZeRO-3 in fp16": zero(3) | FP16 | {"scale": "absolute"},
    "ZeRO-3, offloaded": zero(3, offload_optimizer=CPU) | {"scale": "gradnorm"},
}
# What has float32 copies of bfloat16 weights, and what has been told to have none.
KEEPING: dict[str, dict[str, Any]] = {
    "ZeRO-2": zero(2) | BF16,
    "ZeRO-3": zero(3) | BF16,
    "BF16_Optimizer": zero(1) | BF16 | FLOAT32_SUMS,
    "stage 0": zero(0) | BF16,
    # As bf16_master_weights_and_grads has it, which only DeepSpeed's own CPU optimizer takes.
    "without copies": zero(2) | BF16 | {"narrow": True},
}
KINDS = {"ZeRO-1": "Partitioned", "ZeRO-2": "Partitioned", "ZeRO-3": "FullyPartitioned"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has to say; starting processes takes longer than what they do."""
    jobs = {
        "variants": (sharded_workers.deepspeed_variants, (VARIANTS,)),
        "injected": (sharded_workers.engine_injections, (INJECTED,)),
        "lost steps": (sharded_workers.lost_steps, (KEEPING,)),
    }
    return launch(tmp_path_factory.mktemp("zero"), jobs, Joined(PROCESSES))


@pytest.fixture(scope="module")
def more_reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs = {
        "variants": (sharded_workers.deepspeed_variants, (VARIANTS_TOO,)),
        "injected": (sharded_workers.engine_injections, (INJECTED_TOO,)),
        "overflow at stage 2": (sharded_workers.overflow, (2,)),
        "overflow at stage 3": (sharded_workers.overflow, (3,)),
        "refused": (
            sharded_workers.engine_refusals,
            ({name: options for name, (options, _) in REFUSED.items()},),
        ),
        **{str(case): (sharded_workers.unused, case[:2]) for case in UNUSED},
    }
    return launch(tmp_path_factory.mktemp("more"), jobs, Joined(PROCESSES))


def check(reports: list[dict[str, Any]], variants: dict[str, dict[str, Any]]) -> None:
    """Check what every rank reports of every variant."""
    assert len(reports) == PROCESSES
    for name, options in variants.items():
        low = 2e-2 if "bf16" in options else 3e-3 if "fp16" in options else 1e-6
        kind = KINDS.get(name[:6], "Mastered")
        for report in reports:
            row = report["variants"][name]
            whole = row["optimizer"] == "BF16_Optimizer"
            assert row["kinds"] == ["Replicated" if whole else kind], name
            assert row["tiled"], f"{name}: elements held twice or by nobody"
            assert row["shapes"], name
            assert row["factor"] == (128.0 if "fp16" in options else 1.0), name
            assert row["clipped"] == ("gradient_clipping" in options), name
            assert row["gradient"] <= low, (name, row)
            # A changed gradient is clipped and stepped as if backward had made it.
            assert row["step"] <= 1e-6, (name, row)
            assert row["moved"] <= 1e-6, (name, row)
            assert row["working"] == row["working moved"] == 0.0, (name, row)


def test_local_gradients_tile_the_whole_one_and_changes_to_them_reach_the_weights(
    reports: list[dict[str, Any]],
) -> None:
    check(reports, VARIANTS)
    # Three processes leave some of them without elements of some parameters.
    for name in VARIANTS:
        assert any(report["variants"][name]["empty"] for report in reports), name


@pytest.mark.slow
@patient
def test_they_do_in_every_configuration(more_reports: list[dict[str, Any]]) -> None:
    check(more_reports, VARIANTS_TOO)
    # bf16 with float32 sums at stage 1 is an optimizer of its own.
    found = more_reports[0]["variants"]["ZeRO-1, bf16, float32 sums, clipped"]
    assert found["optimizer"] == "BF16_Optimizer"


def check_injected(reports: list[dict[str, Any]], variants: dict[str, dict[str, Any]]) -> None:
    for report in reports:
        for name, options in variants.items():
            row = report["injected"][name]
            assert row["injected"] == row["targets"] == 20, name
            assert row["steps"] == 1, name
            low = 2e-2 if "bf16" in options else 3e-3 if "fp16" in options else 1e-6
            assert row["step"] <= low, (name, row)
            assert "runs by itself" in row["by hand"], name
            assert "attached already" in row["second"], name
            # At stage 0 in float32 the optimizer holds the targets themselves, as anywhere.
            assert name.startswith("stage 0") or "stepped past" in row["bypassed"], (name, row)
            assert row["restored"], name


def test_an_attached_engine_steps_along_the_injected_gradient(
    reports: list[dict[str, Any]],
) -> None:
    check_injected(reports, INJECTED)


def test_float32_copies_of_bfloat16_weights_lose_nothing(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        found = report["lost steps"]
        assert "bf16_master_weights_and_grads" in found.pop("without copies")
        assert found == dict.fromkeys(KEEPING.keys() - {"without copies"}, "")


@pytest.mark.slow
@patient
def test_it_does_in_every_configuration(more_reports: list[dict[str, Any]]) -> None:
    check_injected(more_reports, INJECTED_TOO)


@pytest.mark.slow
@patient
@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_skipped_for_overflow_is_not_counted(
    more_reports: list[dict[str, Any]], stage: int
) -> None:
    for report in more_reports:
        found = report[f"overflow at stage {stage}"]
        rows = found["rows"]
        assert rows[0]["overflow"]
        assert not rows[-1]["overflow"]
        done = 0
        for row in rows:
            done += not row["overflow"]
            assert row["moved"] != row["overflow"]
            assert row["steps"] == done
            assert row["injected"] == (0 if row["overflow"] else found["targets"])


UNUSED = [(1, False, 0.0), (2, True, "none"), (3, False, "none"), (3, True, "none")]


@pytest.mark.slow
@patient
@pytest.mark.parametrize("case", UNUSED, ids=str)
def test_parameters_outside_the_loss_have_no_gradient_or_a_zero_one(
    more_reports: list[dict[str, Any]], case: tuple[int, bool, float | str]
) -> None:
    together: dict[str, Any] = {}
    for report in more_reports:
        together |= report[str(case)]
    assert len(together) == 4
    assert set(together.values()) == {case[2]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp16 at stage 0": (zero(0) | FP16, "use stage 1"),
    "microbatch": (zero(2) | {"choices": {"scope": "microbatch"}}, 'use scope="step"'),
    "overlap": (zero(2) | {"choices": {"overlap": True}}, "overlap=False"),
    "scaler": (zero(2) | {"choices": {"scaler": 1}}, "leave scaler=… out"),
    "left out": (zero(2) | {"left_out": True}, "up_proj.weight is not in the DeepSpeed optimizer"),
    "NVMe": (zero(3) | {"spoiled": {"swap_optimizer": True}}, "NVMe"),
    "hpZ": (zero(3) | {"spoiled": {"zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
    "experts": (zero(2) | {"spoiled": {"has_moe_layers": True}}, "mixture-of-experts"),
    "ZenFlow": (zero(2) | {"spoiled": {"zenflow": True}}, "ZenFlow"),
}


@pytest.mark.slow
@patient
def test_what_cannot_be_reached_is_refused_by_name_with_a_remedy(
    more_reports: list[dict[str, Any]],
) -> None:
    for report in more_reports:
        for name, (_, message) in REFUSED.items():
            assert message in report["refused"][name], name


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"fp16": {"enabled": True}}, "use stage 1"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "NVMe"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "NVMe"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "MiCS"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "ZenFlow"),
        ({"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 2}}, "Adam or SGD"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor parallelism"),
        ({"compile": {"deepcompile": True}}, "DeepCompile"),
    ],
)
def test_a_configuration_is_refused_before_there_is_an_engine(
    section: dict[str, Any], message: str
) -> None:
    from drift_fast.inject.shards.zero_support import check_configuration

    with pytest.raises(DriftError, match=message):
        check_configuration(section)


def test_a_configuration_that_is_supported_is_taken() -> None:
    from drift_fast.inject.shards.zero_support import check_configuration

    check_configuration({})
    check_configuration(
        {
            "fp16": {"enabled": "auto"},
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW"},
            "zero_optimization": {
                "stage": 3,
                "zero_hpz_partition_size": 1,
                "mics_shard_size": -1,
                "reduce_bucket_size": "auto",
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "none"},
            },
        }
    )


def test_something_that_is_no_engine_is_refused() -> None:
    from drift_fast.inject.shards.zero_support import optimizer_of

    with pytest.raises(TypeError, match="expected a DeepSpeed engine, got object"):
        optimizer_of(object())


def test_deepspeed_is_not_imported_before_it_is_used() -> None:
    code = (
        "import sys, drift_fast.inject.shards.zero, drift_fast.inject.shards.fsdp1\n"
        "import drift_fast.integrations.deepspeed_engine\n"
        "assert 'deepspeed' not in sys.modules\n"
        "assert 'torch.distributed.fsdp.fully_sharded_data_parallel' not in sys.modules\n"
    )
    python(code)
