"""`protect` over several processes: DDP, FSDP2, FSDP1 and DeepSpeed give what one process gives.

Every process gives batches of its own. The restatement takes all of them in one process, in
float64, from a copy of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from support.joined import Joined, launch
from support.sharded_workers import Scaled, fsdp_options, given_delta, make_engine

Report = dict[str, Any]
# Of each process; three directions get 2, 1 and 1 of them.
EACH = 4


def batches_of(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(60 + rank)
    return [torch.randint(4, 64, (2, 8), generator=generator) for _ in range(EACH)]


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(batch)
    return found


def expected(plain: nn.Module, delta: Any) -> dict[str, torch.Tensor]:
    """Return Δ without the span of the gradients on all batches of all processes, in float64."""
    directions: list[dict[str, torch.Tensor]] = [{} for _ in range(3)]
    for rank in range(dist.get_world_size()):
        for number, batch in enumerate(batches_of(rank)):
            plain.zero_grad()
            loss_of(plain, batch).backward()
            held = directions[number % 3]
            for name, parameter in plain.named_parameters():
                name = name.removeprefix("language.")
                held[name] = held.get(name, 0.0) + parameter.grad.double()
    result = {}
    for name, tensor in delta.items():
        rows = torch.stack([one[name].flatten() for one in directions])
        basis = torch.linalg.svd(rows, full_matrices=False).Vh
        flat = tensor.double().flatten()
        result[name] = (flat - basis.T @ (basis @ flat)).view(tensor.shape)
    return result


def error_of(found: Any, delta: Any, wanted: dict[str, torch.Tensor]) -> float:
    return max(
        float((found[name].double() - wanted[name]).norm() / tensor.norm())
        for name, tensor in delta.items()
    )


def run(
    folder: Path,
    wrap: Callable[[], tuple[Any, nn.Module]],
    *,
    written: bool = True,
) -> Report:
    """Protect with a wrapped model; then a step of it must be as if nothing had been."""
    import drift_fast

    model, plain = wrap()
    delta = given_delta(plain)
    out = folder / "protected" if written else None
    batches = batches_of(dist.get_rank())
    found = drift_fast.protect(model, delta, batches, out, loss=loss_of)
    wanted = expected(plain, delta)
    report = {
        "error": error_of(found, delta, wanted),
        "nothing": error_of(delta, delta, wanted),
        "path": str(found.path),
        "batches": found.sources["protected"]["batches"],
        "model": found.sources["protected"]["model"],
    }
    with contextlib.suppress(AttributeError):
        report["trains"] = bool(model.training)
    return report


def ddp(folder: Path, written: bool) -> Report:
    from torch.nn.parallel import DistributedDataParallel

    def wrap() -> tuple[Any, nn.Module]:
        return DistributedDataParallel(Scaled()), Scaled()

    return run(folder, wrap, written=written)


def fsdp2(folder: Path) -> Report:
    from torch.distributed.fsdp import fully_shard

    def wrap() -> tuple[Any, nn.Module]:
        model: Any = Scaled()
        for layer in model.language.model.layers:
            fully_shard(layer)
        return fully_shard(model), Scaled()

    return run(folder, wrap)


def hybrid(folder: Path) -> Report:
    """FSDP2 within pairs of processes that are replicas of each other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def wrap() -> tuple[Any, nn.Module]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        return fully_shard(Scaled(), mesh=mesh), Scaled()

    return run(folder, wrap)


def fsdp1(folder: Path) -> Report:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    def wrap() -> tuple[Any, nn.Module]:
        model = FullyShardedDataParallel(
            Scaled(),
            auto_wrap_policy=ModuleWrapPolicy({Qwen2DecoderLayer}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
            **fsdp_options({}),
        )
        return model, Scaled()

    return run(folder, wrap)


def engine(folder: Path, options: dict[str, Any]) -> Report:
    """Protect with an engine, and compare a step after it with that of a fresh engine."""
    made: list[Any] = []

    def wrap() -> tuple[Any, nn.Module]:
        found, plain = make_engine(options)
        made.append(found)
        return found, plain

    report = run(folder, wrap)
    used, (fresh, _) = made[0], make_engine(options)
    for one in (used, fresh):
        for batch in batches_of(dist.get_rank())[: options.get("gradient_accumulation_steps", 1)]:
            one.backward(one(batch))
            one.step()
    report["steps"] = [used.global_steps, fresh.global_steps]
    import deepspeed

    worst = 0.0
    for (_, a), (_, b) in zip(
        used.module.named_parameters(), fresh.module.named_parameters(), strict=True
    ):
        with deepspeed.zero.GatheredParameters([a, b], enabled=hasattr(a, "ds_id")):
            worst = max(worst, float((a.detach() - b.detach()).abs().max()))
    report["after"] = worst
    used.destroy()
    fresh.destroy()
    return report


def refusals(folder: Path) -> Report:
    """Return what is said of processes that do not give the same, or of no place to write to."""
    from torch.distributed.fsdp import fully_shard

    import drift_fast

    plain = Scaled()
    delta = given_delta(plain)
    rank = dist.get_rank()
    mine = batches_of(rank)
    report: Report = {}

    def attempt(case: str, model: Any, batches: Any, **options: Any) -> None:
        try:
            drift_fast.protect(model, delta, batches, **{"loss": loss_of, **options})
        except drift_fast.DriftError as error:
            report[case] = str(error)

    sharded: Any = fully_shard(Scaled())
    attempt("no place", sharded, mine)
    attempt("fewer", sharded, mine[: EACH - rank], out=folder / "fewer")
    broken = lambda model, batch: loss_of(model, batch) * (float("nan") if rank else 1.0)  # noqa: E731
    attempt("nan", sharded, mine, out=folder / "nan", loss=broken)
    replica = nn.parallel.DistributedDataParallel(Scaled())
    attempt("nan in a replica", replica, mine, loss=broken)
    frozen: Any = Scaled()
    frozen.language.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    attempt("frozen", fully_shard(frozen), mine, out=folder / "frozen")
    report["left"] = sorted(path.name for path in folder.iterdir())
    return report


CPU = {"device": "cpu"}
BF16 = {"bf16": {"enabled": True}}
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"zero": {"stage": 1}, "gradient_accumulation_steps": 2},
    "ZeRO-2, offloaded": {"zero": {"stage": 2, "offload_optimizer": CPU}},
    "ZeRO-3": {"zero": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "ZeRO-3, offloaded": {
        "zero": {"stage": 3, "offload_optimizer": CPU},
        "gradient_accumulation_steps": 2,
    },
    "stage 0": {"zero": {"stage": 0}},
    "ZeRO-1, BF16_Optimizer": {
        "zero": {"stage": 1},
        **BF16,
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "ZeRO-2 in bf16": {"zero": {"stage": 2}, **BF16},
    "ZeRO-3 in bf16": {"zero": {"stage": 3}, **BF16},
    "ZeRO-2 in fp16": {"zero": {"stage": 2}, "fp16": {"enabled": True, "loss_scale": 128}},
    "stage 0 in bf16": {"zero": {"stage": 0}, **BF16},
}


def engines(folder: Path) -> Report:
    return {name: engine(folder / str(at), one) for at, (name, one) in enumerate(ENGINES.items())}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Report]]:
    folder = tmp_path_factory.mktemp("processes")
    places = {name: folder / name for name in ("ddp", "ddp-lazy", "fsdp2", "fsdp1", "refused")}
    places["refused"].mkdir()
    jobs: dict[str, Any] = {
        "ddp": (ddp, (places["ddp"], True)),
        "ddp-lazy": (ddp, (places["ddp-lazy"], False)),
        "fsdp2": (fsdp2, (places["fsdp2"],)),
        "fsdp1": (fsdp1, (places["fsdp1"],)),
        "refused": (refusals, (places["refused"],)),
    }
    return launch(folder / "jobs", jobs, Joined(2))


@pytest.mark.parametrize("way", ["ddp", "ddp-lazy", "fsdp2", "fsdp1"])
def test_the_result_is_that_of_one_process(reports: list[dict[str, Report]], way: str) -> None:
    for report in (ranks[way] for ranks in reports):
        assert report["error"] < 2e-6
        assert report["nothing"] > 1e-2
        assert report["trains"]
        assert ("protected" in report["path"]) is (way != "ddp-lazy")
        assert sum(report["batches"]) == (2 * EACH if "ddp" in way else EACH)


def test_what_processes_do_not_share_is_refused(reports: list[dict[str, Report]]) -> None:
    first, second = (report["refused"] for report in reports)
    for report in (first, second):
        assert "pass out=…" in report["no place"]
        assert "frozen" in report["frozen"]
        assert report["left"] == []
    assert "this process has fewer batches" in second["fewer"]
    assert "another process has fewer batches" in first["fewer"]
    for case in ("nan", "nan in a replica"):
        assert "the loss of batch 0 is nan" in second[case]
        assert f"process 1 of this run failed: NonFiniteError: {second[case]}" in first[case]


@pytest.mark.slow
def test_replicas_of_shards(tmp_path: Path) -> None:
    for report in launch(tmp_path, {"hybrid": (hybrid, (tmp_path / "out",))}, Joined(4)):
        assert report["hybrid"]["error"] < 2e-6
        assert report["hybrid"]["nothing"] > 1e-2
        assert "protected" in report["hybrid"]["path"]


@pytest.mark.slow
def test_engines_give_what_one_process_gives(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    reports = launch(tmp_path, {"engines": (engines, (tmp_path,))}, Joined(2))
    for report in (ranks["engines"] for ranks in reports):
        for name, row in report.items():
            # In 16 bits DeepSpeed rounds sums over processes, which float64 does not.
            low = 0.1 * row["nothing"] if "16" in name else 2e-6
            assert row["error"] < low, (name, row)
            assert row["nothing"] > 1e-2, (name, row)
            assert row["after"] == 0.0, (name, row)
            assert row["steps"] == [1, 1], (name, row)
