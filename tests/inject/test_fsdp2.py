"""FSDP2 and tensor parallelism: each process holds its part of Δ, and all give what one would.

Two processes share one start for many checks, four the slow ones; each check runs on every rank,
and what it found travels to the tests as JSON. A plain copy of the model trains on the whole batch
on every rank, and that is what the shards are compared with.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from drift_fast import Delta, DriftWarning, Injection, PlannedMotion
from drift_fast.inject.shards.dtensor import DTensorShard
from support.injection_models import Backbone, delta_towards, regression_batch, regression_loss
from support.joined import Joined, Report, launch

SCALES = ("absolute", "gradnorm", "adaptive", "project")
# Rows that two processes share evenly, unevenly, and of which one has none.
SHAPES: dict[str, dict[str, int]] = {
    "even": {"width": 8, "inner": 12},
    "uneven": {"width": 7, "inner": 5},
    "empty": {"width": 6, "inner": 1},
}
# Between the parts that two processes have of an "uneven" gate_proj, 21 and 14 elements.
BETWEEN = 17
NAME = "model.layers.0.mlp.gate_proj.weight"
# How long a process waits for another one.
PATIENCE = timedelta(seconds=60)
COUNT = 8


def run(
    folder: Path, checks: list[Callable[[Path], Report]], joined: Joined
) -> dict[str, list[Report]]:
    """Run checks in joined processes; return what each rank reports, by check."""
    for name, shape in SHAPES.items():
        model = Backbone(**shape)
        delta = delta_towards(folder / name, model, dtype="float32", modules=("attn", "mlp"))
        delta.save(folder / name / "delta")
    jobs = {check.__name__: (check, (folder,)) for check in checks}
    reports = launch(folder, jobs, joined)
    return {name: [report[name] for report in reports] for name in jobs}


def found(reports: dict[str, list[Report]], check: Callable[[Path], Report]) -> list[Report]:
    """Return what every rank found."""
    return reports[check.__name__]


# --- training --------------------------------------------------------------------------------


def plain(shape: str) -> Backbone:
    return Backbone(**SHAPES[shape])


def saved(folder: Path, shape: str) -> Delta:
    return Delta.open(folder / shape / "delta")


def mesh_of(*sizes: int, names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def fully_sharded(model: Any, mesh: Any = None) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(dist.get_world_size()) if mesh is None else mesh
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: Any, mesh: Any) -> Any:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    across = {f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    across |= {f"mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
    along = {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, across | along)
    return model


def backward(model: nn.Module, step: int = 0, *, share: int = 0, shares: int = 1) -> None:
    """Take this share's gradients of a batch; shares are equally large."""
    model.zero_grad()
    width = next(model.parameters()).shape[1]
    batch = regression_batch(COUNT, width=width, seed=30 + step)
    regression_loss(model, tuple(part.chunk(shares)[share] for part in batch)).backward()


def full(tensor: Any) -> torch.Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def error_of(model: nn.Module, expected: nn.Module) -> dict[str, float]:
    """Return the largest relative error of a gradient; every process must call it."""
    worst = {"error": 0.0}
    for (name, parameter), other in zip(
        model.named_parameters(), expected.parameters(), strict=True
    ):
        gradient, wanted = full(parameter.grad), other.grad
        error = float((gradient - wanted).norm() / wanted.norm())
        # NaN is no smaller than anything.
        if not error <= worst["error"]:
            worst = {"error": error, "name": name}  # type: ignore[dict-item]
    return worst


class Twins:
    """A sharded model and one that is not, each with an injection of the same options."""

    def __init__(
        self, folder: Path, shape: str, shard: Any = fully_sharded, **options: Any
    ) -> None:
        self.plain = plain(shape)
        self.model = shard(copy.deepcopy(self.plain))
        delta = saved(folder, shape)
        elsewhere = {"residency", "prefetch"} if options.get("residency") == "disk" else set()
        alone = {n: v for n, v in options.items() if n not in elsewhere}
        self.alone = Injection(self.plain, delta, **alone)
        self.injection = Injection(self.model, delta, **options)
        self.optimizers = [
            torch.optim.SGD(model.parameters(), lr=0.1) for model in (self.plain, self.model)
        ]

    def backward(self, step: int = 0, *, share: int | None = None, shares: int = 0) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        backward(self.model, step, share=rank if share is None else share, shares=shares or size)
        backward(self.plain, step)

    def inject(self) -> None:
        self.injection.step()
        self.alone.step()

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def remove(self) -> None:
        self.injection.remove()
        self.alone.remove()


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# --- checks that two processes share -------------------------------------------------------------


def check_spans(folder: Path) -> Report:
    """Where this process's part of every target lies."""
    report: Report = {}
    for shape in SHAPES:
        twins = Twins(folder, shape)
        (group,) = twins.injection._groups
        report[shape] = {
            target.name: [*shard.span, math.prod(target.shape)]
            for target, shard in zip(group.targets, group.shards, strict=True)
        }
        twins.remove()
    return report


def check_memory(folder: Path) -> Report:
    """Bytes of Δ here, and of one row of every target, by which parts may differ."""
    report: Report = {}
    for shape in SHAPES:
        twins = Twins(folder, shape, residency="device")
        (here,), (alone,) = twins.injection._groups, twins.alone._groups
        rows = sum(4 * math.prod(target.shape[1:]) for target in here.targets)
        report[shape] = [here.store.nbytes, alone.store.nbytes, rows]
        twins.remove()
    return report


def check_reads(folder: Path) -> Report:
    """Bytes of Δ that were read at attachment, and that are held."""
    report: Report = {}
    for shape in SHAPES:
        model = fully_sharded(plain(shape))
        delta = saved(folder, shape)
        read: list[int] = []
        original = Delta.load

        def counted(self: Delta, runs: Any, into: Any, *landed: Any) -> list[float]:
            read.extend(tensor.nbytes for tensor in into)  # noqa: B023
            return original(self, runs, into, *landed)  # noqa: B023

        with mock.patch.object(Delta, "load", counted):
            injection = Injection(model, delta, residency="device")
        report[shape] = [sum(read), injection._groups[0].store.nbytes]
        injection.remove()
    return report


def check_gradients(folder: Path) -> Report:
    """Errors of injected gradients, and of those after one step more, in every scale."""
    report: Report = {}
    for shape in SHAPES:
        for scale in SCALES:
            twins = Twins(folder, shape, scale=scale, alpha=0.5)
            for step in range(2):
                twins.backward(step)
                twins.inject()
                report[f"{shape}, {scale}, step {step}"] = error_of(twins.model, twins.plain)
                twins.update()
            twins.remove()
    return report


def check_residencies(folder: Path) -> Report:
    """The same, where parts of Δ live elsewhere and one rank's are large, another's are not."""
    report: Report = {}
    with mock.patch("drift_fast.inject.placement.load.SMALL", BETWEEN):
        for where in ("device", "disk", "device-int8", "host-int8"):
            for shape in ("uneven", "empty"):
                twins = Twins(folder, shape, residency=where, prefetch=1)
                order = [target.name for target in twins.injection._groups[0].targets]
                for step in range(3):
                    twins.backward(step)
                    twins.inject()
                    error = error_of(twins.model, twins.plain)
                    twins.update()
                report[f"{where}, {shape}"] = {
                    **error,
                    "order": order,
                    "residency": twins.injection.residency,
                }
                twins.remove()
    return report


def check_metrics(folder: Path) -> Report:
    """What both tell after three steps."""
    report: Report = {}
    for shape in SHAPES:
        twins = Twins(folder, shape, progress_cap=0.5, max_push=0.8)
        for step in range(3):
            twins.backward(step)
            twins.inject()
            twins.update()
        report[shape] = [twins.injection.metrics(), twins.alone.metrics()]
        report[f"{shape}, summary"] = [twins.injection.summary(), twins.alone.summary()]
        report[f"{shape}, counts"] = [
            (one.injected, one.skipped, one.steps) for one in (twins.injection, twins.alone)
        ]
        twins.remove()
    return report


def check_gradients_that_are_not_finite(folder: Path) -> Report:
    """NaN in the part of one process alone."""
    twins = Twins(folder, "even")
    twins.backward()
    local = twins.model.get_parameter(NAME).grad.to_local()
    before = local.clone()
    if dist.get_rank() == 1:
        local[0, 0] = torch.nan
    twins.plain.get_parameter(NAME).grad.fill_(torch.nan)
    twins.inject()
    untouched = torch.equal(local[-1], before[-1])
    local.copy_(before)
    twins.plain.get_parameter(NAME).grad.copy_(full(twins.model.get_parameter(NAME).grad))
    report = {"untouched": untouched, "skipped": twins.injection.skipped}
    report |= error_of(twins.model, twins.plain)
    twins.remove()
    return report


def check_missing_gradients(folder: Path) -> Report:
    """Gradients that no process has."""
    report: Report = {}
    for policy, outcome in (("raise", "refused"), ("skip", "skipped")):
        twins = Twins(folder, "uneven", missing_gradients=policy)
        twins.backward()
        for model in (twins.model, twins.plain):
            model.get_parameter(NAME).grad = None
        report[outcome] = refusal(twins.injection.step)
        if policy == "skip":
            report["count"] = twins.injection.skipped
            twins.alone.step()
            # What is compared must be there.
            for model in (twins.model, twins.plain):
                parameter = model.get_parameter(NAME)
                parameter.grad = torch.ones_like(parameter)
            report["error"] = error_of(twins.model, twins.plain)["error"]
        twins.remove()
    return report


def check_gradients_that_one_process_lacks(folder: Path) -> Report:
    """One process refuses after the sum, and the other learns of it there."""
    twins = Twins(folder, "uneven")
    twins.backward()
    if dist.get_rank() == 1:
        twins.model.get_parameter(NAME).grad = None
    refused = refusal(twins.injection.step)
    # The next step is not held up by it.
    twins.backward()
    twins.inject()
    report = {"refused": refused, **error_of(twins.model, twins.plain)}
    twins.remove()
    return report


def check_a_step_that_fails(folder: Path) -> Report:
    """A step that fails on every process half way, and the next one."""
    from drift_fast.inject.compute.host import HostArithmetic

    twins = Twins(folder, "uneven")
    twins.backward(5)
    with mock.patch.object(HostArithmetic, "subtract", side_effect=MemoryError("full")):
        failed = refusal(twins.injection.step)
    twins.injection.alpha = twins.alone.alpha = 2.0
    twins.backward()
    # A target that took no part in that step's sum, nor in this one's.
    twins.inject()
    report = {"failed": failed, **error_of(twins.model, twins.plain)}
    twins.remove()
    return report


def check_one_failure_is_everyone_s(folder: Path) -> Report:
    """What one process finds missing, every one is told of, and soon."""
    report: Report = {}
    rank = dist.get_rank()
    own = folder / f"own-{rank}"
    saved(folder, "uneven").save(own, ranks=None)
    if rank == 1:
        (shard,) = own.glob("*.safetensors")
    model = fully_sharded(plain("uneven"))

    def attach(where: Path | Delta, **options: Any) -> None:
        Injection(model, where, **options).remove()

    def note(name: str, where: Path | Delta, **options: Any) -> None:
        began = time.monotonic()
        report[name] = refusal(lambda: attach(where, **options))
        report[f"{name}, seconds"] = time.monotonic() - began

    note("nothing is wrong", own)
    note("no such directory", folder / "nowhere" if rank == 1 else own)
    note("another delta", saved(folder, "even" if rank == 1 else "uneven"))
    opened = Delta.open(own)
    opened[NAME]
    if rank == 1:
        os.truncate(shard, 8)
    note("a file that was cut short", opened)
    with (
        mock.patch(
            "drift_fast.inject.placement.load.Ring",
            side_effect=MemoryError("full") if rank == 1 else None,
        ),
        mock.patch("drift_fast.inject.placement.load.SMALL", BETWEEN),
    ):
        note("no memory for Δ", saved(folder, "uneven"), residency="disk")
    note("nothing is wrong any more", saved(folder, "uneven"))
    return report


def check_state(folder: Path) -> Report:
    """A run that goes on from a saved state, and one that was never cut off."""
    options: dict[str, Any] = {"progress_cap": 0.3, "schedule": "linear", "total_steps": 6}
    twins = Twins(folder, "uneven", **options)
    for step in range(2):
        twins.backward(step)
        twins.inject()
        twins.update()
    state, alone = twins.injection.state_dict(), twins.alone.state_dict()
    json.dumps(state)
    twins.injection.remove()
    twins.injection = Injection(twins.model, saved(folder, "uneven"), **options)
    zero = twins.injection.metrics()["progress"]
    twins.injection.load_state_dict(state)
    for step in range(2, 4):
        twins.backward(step)
        twins.inject()
        error = error_of(twins.model, twins.plain)
        twins.update()
    report: Report = {
        "origin": [state["origin"], alone["origin"]],
        "zero": zero,
        "metrics": [twins.injection.metrics(), twins.alone.metrics()],
        "steps": twins.injection.steps,
        **error,
    }
    twins.remove()
    return report


def check_clipping(folder: Path) -> Report:
    """Clip what was injected."""
    twins = Twins(folder, "uneven", alpha=3.0)
    twins.backward()
    twins.inject()
    norms = [
        full(nn.utils.clip_grad_norm_(model.parameters(), 0.1)).item()
        for model in (twins.model, twins.plain)
    ]
    report = {"norms": norms, **error_of(twins.model, twins.plain)}
    twins.remove()
    return report


def check_refusals(folder: Path) -> Report:
    """What is not for sharded models, and gradients that are placed otherwise."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    model = fully_sharded(plain("even"))
    delta = saved(folder, "even")
    report: Report = {}
    for name, options in (("overlap", {"overlap": True}), ("microbatch", {"scope": "microbatch"})):
        report[name] = refusal(lambda: Injection(model, delta, **options))  # noqa: B023
    parameter: Any = model.get_parameter(NAME)
    with Injection(model, delta) as injection:
        for placement in (Replicate(), Partial()):
            backward(model, share=dist.get_rank(), shares=2)
            # An assignment to `grad` wants the parameter's own placements.
            odd = DTensor.from_local(
                torch.ones(parameter.shape), parameter.device_mesh, [placement]
            )
            shard = next(
                shard
                for group in injection._groups
                for target, shard in zip(group.targets, group.shards, strict=True)
                if target.name == NAME
            )
            assert isinstance(shard, DTensorShard)
            with mock.patch.object(shard, "parameter", mock.Mock(grad=odd)):
                report[type(placement).__name__] = refusal(injection.step)
        backward(model, share=dist.get_rank(), shares=2)
        report["after"] = refusal(injection.step)
    return report


def check_moves(folder: Path) -> Report:
    """An attached model that is offloaded and comes back, as to be saved, between any two calls."""
    twins = Twins(folder, "uneven")
    report: Report = {"steps": {}}
    for step in range(2):
        twins.backward(step)
        twins.inject()
        report["steps"][str(step)] = error_of(twins.model, twins.plain)
        # FSDP2 swaps parameters, which torch refuses where one is referred to weakly.
        report[f"offloaded {step}"] = refusal(lambda: twins.model.cpu().to(torch.float32))
        report[f"stepped {step}"] = refusal(twins.update)
        twins.model.to("cpu")
    twins.remove()
    return report


def check_backward_after_the_injection(folder: Path) -> Report:
    """Optimizer steps on what a backward pass wrote after the injection, or without one."""
    report: Report = {}
    for set_to_none in (True, False):
        twins = Twins(folder, "uneven")
        optimizer = twins.optimizers[1]
        key = "none" if set_to_none else "zeros"
        backward(twins.model)
        twins.injection.step()
        nn.utils.clip_grad_norm_(twins.model.parameters(), 0.1)
        report[f"{key}, clipped"] = refusal(optimizer.step)
        for at, zeroes in enumerate((True, False)):
            if zeroes:
                optimizer.zero_grad(set_to_none=set_to_none)
            regression_loss(twins.model, regression_batch(COUNT, width=7)).backward()
            report[f"{key}, {at}"] = refusal(optimizer.step)
            twins.injection.step()
            report[f"{key}, {at}, injected"] = refusal(optimizer.step)
        # A step of the optimizer is left out: with its gradients cleared, and with them kept.
        for zeroes in (True, False):
            optimizer.zero_grad(set_to_none=set_to_none)
            regression_loss(twins.model, regression_batch(COUNT, width=7)).backward()
            twins.injection.step()
            if zeroes:
                optimizer.zero_grad(set_to_none=set_to_none)
            regression_loss(twins.model, regression_batch(COUNT, width=7)).backward()
            report[f"{key}, {'left out' if zeroes else 'twice'}"] = refusal(twins.injection.step)
        twins.remove()
    return report


def check_tensor_parallel(folder: Path) -> Report:
    """Rows and columns over two processes, which see the same batch."""
    report: Report = {}
    for where in ("device", "disk"):
        with mock.patch("drift_fast.inject.placement.load.SMALL", BETWEEN):
            twins = Twins(
                folder,
                "even",
                lambda model: tensor_parallel(model, mesh_of(2)),
                residency=where,
                prefetch=1,
            )
            report[where] = compare_parts(twins, share=0, shares=1)
    return report


def compare_parts(twins: Twins, *, share: int, shares: int) -> Report:
    """Compare every part with DTensor's own, take two steps, and return the errors."""
    kinds: set[str] = set()
    wrong = []
    nbytes = 0
    for group in twins.injection._groups:
        nbytes += group.store.nbytes
        for target, shard in zip(group.targets, group.shards, strict=True):
            parameter: Any = target.parameter
            if not isinstance(shard, DTensorShard):
                kinds.add("whole")
                continue
            kinds.add(" ".join(str(placement) for placement in parameter.placements))
            part = shard.cut(full(parameter))
            if not torch.equal(part.reshape(-1), parameter.to_local().reshape(-1)):
                wrong.append(target.name)
    report: Report = {"kinds": sorted(kinds), "wrong": wrong, "nbytes": nbytes}
    for step in range(2):
        twins.backward(step, share=share, shares=shares)
        twins.inject()
        report[f"step {step}"] = error_of(twins.model, twins.plain)
        twins.update()
    report["metrics"] = [twins.injection.metrics(), twins.alone.metrics()]
    report["whole"] = sum(group.store.nbytes for group in twins.alone._groups)
    twins.remove()
    return report


def check_lost_steps(folder: Path) -> Report:
    """Attach to bfloat16 weights, and to float32 weights that compute in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    report: Report = {}
    for dtype in (torch.bfloat16, torch.float32):
        model: Any = plain("even").to(dtype)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(model, mesh=mesh_of(dist.get_world_size()), mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            delta = saved(folder, "even")
            Injection(model, delta, optimizer=optimizer).remove()
            PlannedMotion(model, delta, progress=0.5, steps=2, optimizer=optimizer).remove()
        said = [str(one.message) for one in caught if one.category is DriftWarning]
        report[str(dtype)] = said
    return report


PAIR = [
    check_lost_steps,
    check_spans,
    check_memory,
    check_reads,
    check_gradients,
    check_residencies,
    check_metrics,
    check_gradients_that_are_not_finite,
    check_missing_gradients,
    check_gradients_that_one_process_lacks,
    check_a_step_that_fails,
    check_one_failure_is_everyone_s,
    check_state,
    check_clipping,
    check_refusals,
    check_moves,
    check_backward_after_the_injection,
    check_tensor_parallel,
]


@pytest.fixture(scope="module")
def pair_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Report]]:
    # Stated by device: the group's name is not "gloo". No backend at all would mean NCCL alone
    # where there is CUDA, and the mesh is on the CPU.
    return run(tmp_path_factory.mktemp("two"), PAIR, Joined(2, "cpu:gloo", PATIENCE))


def test_bfloat16_shards_lose_steps_and_float32_ones_do_not(
    pair_reports: dict[str, list[Report]],
) -> None:
    for report in found(pair_reports, check_lost_steps):
        injected, moved = report["torch.bfloat16"]
        assert "MixedPrecisionPolicy(param_dtype=torch.bfloat16)" in injected
        assert moved == injected.replace(", that along Δ included", "; the planned motion is not")
        assert report["torch.float32"] == []


def assert_small(report: Report, bound: float = 1e-5) -> None:
    for key, row in report.items():
        assert row["error"] <= bound, (key, row)


def assert_same_metrics(one: dict[str, float], other: dict[str, float]) -> None:
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_parts_of_all_processes_tile_every_parameter(
    pair_reports: dict[str, list[Report]],
) -> None:
    first, second = found(pair_reports, check_spans)
    assert len(first["even"]) == 20
    for shape in SHAPES:
        assert first[shape].keys() == second[shape].keys()
        for name, (start, stop, numel) in first[shape].items():
            assert start == 0, name
            assert second[shape][name] == [stop, numel, numel], name
            assert stop >= numel / 2, name
    assert first["even"][NAME][1] == 48
    assert first["uneven"][NAME][1] == 21
    assert first["empty"][NAME][1] == 6


def test_each_process_holds_its_share_of_delta(pair_reports: dict[str, list[Report]]) -> None:
    reports = found(pair_reports, check_memory)
    for shape in SHAPES:
        whole = reports[0][shape][1]
        assert sum(report[shape][0] for report in reports) == whole
        for report in reports:
            here, _, rows = report[shape]
            assert abs(here - whole / 2) <= rows / 2
    assert [report["even"][0] for report in reports] == [reports[0]["even"][1] / 2] * 2


def test_each_process_reads_its_rows_only(pair_reports: dict[str, list[Report]]) -> None:
    for report in found(pair_reports, check_reads):
        for shape in SHAPES:
            read, held = report[shape]
            assert read == held > 0


def test_gradients_are_those_of_one_process(pair_reports: dict[str, list[Report]]) -> None:
    for report in found(pair_reports, check_gradients):
        assert len(report) == 2 * len(SHAPES) * len(SCALES)
        assert_small(report)


def test_parts_elsewhere_are_in_one_order_on_every_process(
    pair_reports: dict[str, list[Report]],
) -> None:
    first, second = found(pair_reports, check_residencies)
    for key, row in first.items():
        where = key.split(",")[0]
        assert row["order"] == second[key]["order"], key
        assert row["residency"] == second[key]["residency"] == where, key
        assert_small({key: row})


def test_metrics_are_those_of_one_process(pair_reports: dict[str, list[Report]]) -> None:
    for report in found(pair_reports, check_metrics):
        for shape in SHAPES:
            assert_same_metrics(*report[shape])
            assert_same_metrics(*report[f"{shape}, summary"])
            here, alone = report[f"{shape}, counts"]
            assert here == alone == [20, 0, 3]
            assert report[shape][1]["progress"] > 0.01


def test_a_gradient_that_is_not_finite_somewhere_is_left_alone_everywhere(
    pair_reports: dict[str, list[Report]],
) -> None:
    for report in found(pair_reports, check_gradients_that_are_not_finite):
        assert report["untouched"]
        assert report["skipped"] == 1
        assert report["error"] <= 1e-5, report


def test_missing_gradients_are_refused_or_counted(pair_reports: dict[str, list[Report]]) -> None:
    for report in found(pair_reports, check_missing_gradients):
        assert f"1 of 20 targets have no gradient, {NAME}" in report["refused"]
        assert report["skipped"] == ""
        assert report["count"] == 1
        assert report["error"] <= 1e-5


def test_what_one_process_refuses_every_one_raises(pair_reports: dict[str, list[Report]]) -> None:
    first, second = found(pair_reports, check_gradients_that_one_process_lacks)
    assert "another process of this run refused its gradients" in first["refused"]
    assert f"1 of 20 targets have no gradient, {NAME}" in second["refused"]
    for report in (first, second):
        assert report["error"] <= 1e-5, report


def test_an_attached_model_may_be_offloaded(pair_reports: dict[str, list[Report]]) -> None:
    for report in found(pair_reports, check_moves):
        assert_small(report.pop("steps"))
        assert set(report.values()) == {""}, report


def test_what_backward_wrote_after_the_injection_is_not_stepped_on(
    pair_reports: dict[str, list[Report]],
) -> None:
    for report in found(pair_reports, check_backward_after_the_injection):
        for key, refused in report.items():
            if key.endswith(("0", "1")):
                assert "nothing was injected" in refused, key
            elif key.endswith("twice"):
                assert "Δ would be in it twice" in refused, key
            else:
                assert refused == "", key


def test_a_step_that_failed_leaves_the_next_one_right(
    pair_reports: dict[str, list[Report]],
) -> None:
    for report in found(pair_reports, check_a_step_that_fails):
        assert report["failed"] == "MemoryError: full"
        assert report["error"] <= 1e-5, report


def test_what_one_process_cannot_attach_every_one_raises_soon(
    pair_reports: dict[str, list[Report]],
) -> None:
    first, second = found(pair_reports, check_one_failure_is_everyone_s)
    for report in (first, second):
        for name in ("nothing is wrong", "nothing is wrong any more"):
            assert report[name] == ""
        for name, seconds in report.items():
            if name.endswith("seconds"):
                assert seconds < PATIENCE.total_seconds() / 2, name
    reasons = {
        "no such directory": "FileNotFoundError: .*nowhere",
        "another delta": "CoverageError|AlignmentError",
        "a file that was cut short": "OSError: .*safetensors",
        "no memory for Δ": "MemoryError: full",
    }
    for name, reason in reasons.items():
        assert re.match("DriftError: process 1 of this run failed: " + reason, first[name]), name
        assert re.match(reason, second[name]), second[name]


def test_a_run_goes_on_from_its_state(pair_reports: dict[str, list[Report]]) -> None:
    first, second = found(pair_reports, check_state)
    for report in (first, second):
        here, alone = report["origin"]
        assert here == pytest.approx(alone, rel=1e-5, abs=1e-7)
        assert here == first["origin"][0]
        assert report["zero"] == 0.0
        assert report["steps"] == 4
        assert report["error"] <= 1e-5
        assert_same_metrics(*report["metrics"])


def test_what_was_injected_is_clipped(pair_reports: dict[str, list[Report]]) -> None:
    for report in found(pair_reports, check_clipping):
        here, alone = report["norms"]
        assert here == pytest.approx(alone, rel=1e-5)
        assert alone > 0.1
        assert report["error"] <= 1e-5


def test_what_is_not_for_sharded_models_is_refused_by_name(
    pair_reports: dict[str, list[Report]],
) -> None:
    for report in found(pair_reports, check_refusals):
        for name, option in (("overlap", "overlap=True"), ("microbatch", 'scope="microbatch"')):
            assert report[name].startswith("DriftError")
            assert option in report[name]
            assert "FSDP2" in report[name]
        for placement in ("Replicate", "Partial"):
            assert f"the gradient of {NAME} is placed as" in report[placement]
            assert "after the last backward" in report[placement]
        assert report["after"] == ""


def test_rows_and_columns_of_tensor_parallelism_are_those_of_dtensor(
    pair_reports: dict[str, list[Report]],
) -> None:
    reports = found(pair_reports, check_tensor_parallel)
    for report in reports:
        for row in report.values():
            assert row["kinds"] == ["S(0)", "S(1)"]
            assert_parts(row)
    whole = reports[0]["device"]["whole"]
    assert sum(report["device"]["nbytes"] for report in reports) == whole


def assert_parts(row: Report) -> None:
    assert row["wrong"] == []
    assert_small({name: row[name] for name in ("step 0", "step 1")})
    assert_same_metrics(*row["metrics"])


# --- checks that four processes share ------------------------------------------------------------


def check_hybrid(folder: Path) -> Report:
    """Two replicas of a model over two processes each."""
    report: Report = {}
    for shape in SHAPES:
        mesh = mesh_of(2, 2, names=("replicate", "shard"))
        twins = Twins(folder, shape, lambda model: fully_sharded(model, mesh))  # noqa: B023
        report[shape] = compare_parts(twins, share=dist.get_rank(), shares=4)
    return report


def check_more_processes_than_rows(folder: Path) -> Report:
    """Four processes, of which most have no part of some parameters."""
    report: Report = {}
    for shape in SHAPES:
        report[shape] = compare_parts(Twins(folder, shape), share=dist.get_rank(), shares=4)
    return report


def check_both_on_one_dimension(folder: Path) -> Report:
    """FSDP2 over tensor parallelism: rows that are cut twice, and rows and columns."""
    report: Report = {}
    for where in ("device", "disk"):
        mesh = mesh_of(2, 2, names=("data", "tensor"))
        data: int = mesh.get_local_rank("data")

        def shard(model: Any, mesh: Any = mesh) -> Any:
            return fully_sharded(tensor_parallel(model, mesh["tensor"]), mesh["data"])

        with mock.patch("drift_fast.inject.placement.load.SMALL", BETWEEN):
            twins = Twins(folder, "even", shard, residency=where, prefetch=1)
            report[where] = compare_parts(twins, share=data, shares=2)
    return report


def check_one_failure_reaches_every_dimension(folder: Path) -> Report:
    """What one of four processes cannot open, with two dimensions of sharding."""
    mesh = mesh_of(2, 2, names=("data", "tensor"))
    model = fully_sharded(tensor_parallel(plain("even"), mesh["tensor"]), mesh["data"])
    began = time.monotonic()
    where = folder / ("nowhere" if dist.get_rank() == 2 else "even/delta")
    told = refusal(lambda: Injection(model, where))
    return {"told": told, "seconds": time.monotonic() - began}


FOUR = [
    check_hybrid,
    check_more_processes_than_rows,
    check_both_on_one_dimension,
    check_one_failure_reaches_every_dimension,
]


@pytest.fixture(scope="module")
def four_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Report]]:
    return run(tmp_path_factory.mktemp("four"), FOUR, Joined(4, patience=PATIENCE))


@pytest.mark.slow
def test_replicas_of_shards_count_every_element_once(
    four_reports: dict[str, list[Report]],
) -> None:
    reports = found(four_reports, check_hybrid)
    for report in reports:
        for row in report.values():
            assert row["kinds"] == ["R S(0)"]
            assert_parts(row)
    for shape in SHAPES:
        assert sum(report[shape]["nbytes"] for report in reports) == 2 * reports[0][shape]["whole"]


@pytest.mark.slow
def test_processes_without_a_part_take_part_in_the_sums(
    four_reports: dict[str, list[Report]],
) -> None:
    reports = found(four_reports, check_more_processes_than_rows)
    for report in reports:
        for row in report.values():
            assert_parts(row)
    for shape in SHAPES:
        assert sum(report[shape]["nbytes"] for report in reports) == reports[0][shape]["whole"]


@pytest.mark.slow
def test_rows_that_are_cut_twice_are_those_of_dtensor(
    four_reports: dict[str, list[Report]],
) -> None:
    reports = found(four_reports, check_both_on_one_dimension)
    for report in reports:
        for row in report.values():
            assert [kind.startswith("_S") for kind in row["kinds"]].count(True) == 1, row["kinds"]
            assert "S(0) S(1)" in row["kinds"]
            assert_parts(row)
    whole = reports[0]["device"]["whole"]
    assert sum(report["device"]["nbytes"] for report in reports) == whole


@pytest.mark.slow
def test_one_process_of_two_dimensions_that_fails_stops_all(
    four_reports: dict[str, list[Report]],
) -> None:
    reports = found(four_reports, check_one_failure_reaches_every_dimension)
    for rank, report in enumerate(reports):
        assert report["seconds"] < PATIENCE.total_seconds() / 2
        expected = "FileNotFoundError" if rank == 2 else "process 2 of this run failed: FileNot"
        assert expected in report["told"], rank
