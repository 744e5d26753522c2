"""What one process of several cannot attach, or attaches differently, ends all of them at once.

Owns: that every process raises, with the rank and the message of the one that failed, that nothing
stays attached, and that all can attach afterwards. Two processes on the CPU share one start; one
that waits for the other would fail the test.
"""

from __future__ import annotations

import os
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

import drift_fast
from drift_fast.inject.shards.reduction import Reduction
from support.injection_models import Backbone, delta_towards, moved_text, saved, tiny_qwen2
from support.joined import Joined, Report, launch
from support.motion_workers import Fixed

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

PATIENCE = timedelta(seconds=90)
RATE = 0.05


def replicated(_: dict[str, Any]) -> tuple[Any, Any]:
    model = nn.parallel.DistributedDataParallel(Backbone())
    return model, torch.optim.SGD(model.parameters(), lr=RATE)


def sharded(_: dict[str, Any]) -> tuple[Any, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = Backbone()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.SGD(model.parameters(), lr=RATE)


def engine(options: dict[str, Any]) -> tuple[Any, Any]:
    import deepspeed

    model = Backbone()
    made, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **options,
        },
    )
    return made, made


TORCH: dict[str, Any] = {"DDP": (replicated, {}), "FSDP2": (sharded, {})}
LIBRARIES: dict[str, Any] = {
    "ZeRO-1": (engine, {"zero_optimization": {"stage": 1}}),
    "ZeRO-3": (engine, {"zero_optimization": {"stage": 3}}),
    "stage 0": (engine, {"zero_optimization": {"stage": 0}}),
}


def said(call: Callable[[], Any]) -> str:
    """Return what a call raises; what it attaches is removed."""
    try:
        call().remove()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(folder: Path, way: str) -> Report:
    """Attach in ways that one process refuses, and in good ones in between."""
    make, options = (TORCH | LIBRARIES)[way]
    model, stepping = make(options)
    delta, other = folder / "delta", folder / "other"
    second = dist.get_rank() == 1
    report: Report = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        report[name] = said(call)
        report[f"{name}, then"] = said(lambda: inject(delta))

    def inject(where: Any, config: Any = None, **options: Any) -> Any:
        if stepping is model:
            return drift_fast.attach(model, where, config, **options)
        return drift_fast.Injection(model, where, config, **options)

    def move(where: Any, **options: Any) -> Any:
        plan = {"progress": 0.5, "steps": 2, "optimizer": stepping} | options
        return drift_fast.PlannedMotion(model, where, **plan)

    note("no such delta", lambda: inject(folder / "nowhere" if second else delta))
    note("no such options", lambda: inject(delta, folder / "no.yaml" if second else None))
    note("an option", lambda: inject(delta, alpha="much" if second else 1.0))
    note("other options", lambda: inject(delta, alpha=0.5 if second else 1.0))
    note("other targets", lambda: inject(delta, modules="attn" if second else "all"))
    note("another delta", lambda: inject(other if second else delta))

    def late(module: str, name: str, call: Callable[[], Any]) -> Any:
        error = OSError("at the end") if second else None
        with mock.patch(f"drift_fast.inject.{module}.{name}", side_effect=error):
            return call()

    note("late", lambda: late("injection", "AngleHint", lambda: inject(delta)))
    note("late motion", lambda: late("motion.motion", "logger.info", lambda: move(delta)))
    note("moving no such delta", lambda: move(folder / "nowhere" if second else delta))
    note("moving otherwise", lambda: move(delta, progress=0.6 if second else 0.5))
    if way == "DDP":
        opened = drift_fast.Delta.open(delta)
        held = Fixed({name: opened[name] * (2.0 if second else 1.0) for name in opened})
        note("another mapping", lambda: inject(held))
        where = folder / "nowhere" if second else delta
        note("by optimizer", lambda: drift_fast.attach(stepping, where, model=model))
    return report


def allowed(folder: Path) -> Report:
    """Attach in ways in which processes may differ, and alone; then where warnings are errors."""
    rank, second = dist.get_rank(), dist.get_rank() == 1
    model, _ = replicated({})
    delta, copy = folder / "delta", folder / f"copy {dist.get_rank()}"
    drift_fast.Delta.open(delta).save(copy, ranks=None)
    report: Report = {}

    def note(name: str, where: Any = delta, model: Any = model, **options: Any) -> None:
        report[name] = said(lambda: drift_fast.Injection(model, where, **options))

    note("copies in places of their own", copy)
    note("other places for Δ", residency="host" if second else "device")
    note("functions", schedule=lambda step, total: 1.0, layer_alpha=lambda layer: 1.0)
    if not second:
        note("one alone", model=Backbone())
        report["a motion alone"] = said(
            lambda: drift_fast.PlannedMotion(Backbone(), delta, progress=0.5, steps=2)
        )
    own = dist.new_group([rank], use_local_synchronization=True)
    if not second:
        note(
            "a group of one",
            model=nn.parallel.DistributedDataParallel(Backbone(), None, process_group=own),
        )
    note("still in step")
    narrow = nn.parallel.DistributedDataParallel(Backbone().to(torch.bfloat16))
    adamw = torch.optim.AdamW(narrow.parameters(), lr=1e-5)
    with warnings.catch_warnings():
        if second:
            warnings.simplefilter("error", drift_fast.DriftWarning)
        note("a warning", model=narrow, optimizer=adamw)
        report["a warning of a motion"] = said(
            lambda: drift_fast.PlannedMotion(narrow, delta, progress=0.5, steps=2, optimizer=adamw)
        )
    note("after warnings", model=narrow, optimizer=adamw)
    rounded = drift_fast.compute_delta(
        folder / "pair" / "expert",
        folder / "pair" / "multimodal",
        folder / f"rounded {rank}",
        ranks=None,
    )
    note("another dtype", rounded if second else delta)
    return report


def summed() -> Report:
    """Return a sum over two groups of the same processes, as equal meshes may have them."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    return {"sum": float(Reduction(groups).sum(torch.ones(1)))}


def trainers(folder: Path) -> Report:
    """Attach to Trainers whose models DDP will wrap, where one process lacks the delta."""
    import transformers
    from accelerate.state import AcceleratorState, GradientState

    # The processes have met; Accelerate only wants to see where.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = {"use_cpu": True, "ddp_backend": "gloo", "report_to": "none", "max_steps": 2}
    trainer = transformers.Trainer(
        model=tiny_qwen2(),
        args=transformers.TrainingArguments(output_dir=str(folder / "runs"), **settings),
    )
    delta = folder / "delta of text"
    where = folder / "nowhere" if dist.get_rank() == 1 else delta
    report: Report = {}
    for name, given in (("", delta), (" no such delta", where), (" then", delta)):
        report[f"injection{name}"] = said(lambda given=given: drift_fast.attach(trainer, given))
        report[f"motion{name}"] = said(
            lambda given=given: drift_fast.attach_motion(trainer, given, progress=0.5)
        )
    return report


def reports_of(folder: Path, jobs: dict[str, Any]) -> list[dict[str, Any]]:
    delta_towards(folder / "pair", Backbone(), out=folder / "delta")
    delta_towards(folder / "another", Backbone(), seed=8, out=folder / "other")
    return launch(folder / "work", jobs, Joined(2, patience=PATIENCE))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("torch")
    jobs: dict[str, Any] = {way: (refusals, (folder, way)) for way in TORCH}
    return reports_of(folder, jobs | {"allowed": (allowed, (folder,)), "summed": (summed, ())})


@pytest.fixture(scope="module")
def reports_of_libraries(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    for name in ("transformers", "accelerate", "deepspeed"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("libraries")
    text = tiny_qwen2()
    expert, base = saved(moved_text(text), folder / "expert"), saved(text, folder / "base")
    drift_fast.compute_delta(expert, base, out=folder / "delta of text")
    jobs: dict[str, Any] = {way: (refusals, (folder, way)) for way in LIBRARIES}
    return reports_of(folder, jobs | {"Trainer": (trainers, (folder,))})


# What the process that fails says, None where both say the same.
FAILURES = {
    "no such delta": "FileNotFoundError: ",
    "no such options": "FileNotFoundError: ",
    "an option": "ValueError: alpha",
    "late": "OSError: at the end",
    "late motion": "OSError: at the end",
    "moving no such delta": "FileNotFoundError: ",
    "by optimizer": "FileNotFoundError: ",
}
DIFFERENCES = {
    "other options": ("process 0 has alpha=1.0", "process 1 has alpha=0.5"),
    "other targets": ("process 0 has", "mlp", "process 1 has nothing"),
    "another delta": ("process 0 has ‖Δ‖² = ", "process 1 has ‖Δ‖² = "),
    "another mapping": ("the processes of this run have different Δ",),
    "moving otherwise": ("process 0 has progress=0.5", "process 1 has progress=0.6"),
}


def check(reports: list[dict[str, Any]], way: str) -> None:
    first, second = (report[way] for report in reports)
    seen = set()
    for name, text in first.items():
        if name.endswith(", then"):
            assert text == second[name] == "", name
            continue
        seen.add(name)
        if name in FAILURES:
            assert second[name].startswith(FAILURES[name]), second[name]
            assert text == f"DriftError: process 1 of this run failed: {second[name]}"
        else:
            assert text == second[name]
            assert all(part in text for part in DIFFERENCES[name]), text
    assert len(seen) == (12 if way == "DDP" else 10)


@pytest.mark.parametrize("way", TORCH)
def test_all_processes_end_with_the_failure_of_one_and_can_attach_afterwards(
    reports: list[dict[str, Any]], way: str
) -> None:
    check(reports, way)


def test_processes_may_differ_in_what_changes_no_gradient_and_one_may_attach_alone(
    reports: list[dict[str, Any]],
) -> None:
    first, second = (report["allowed"] for report in reports)
    for name in ("a warning", "a warning of a motion"):
        failed = second.pop(name)
        assert failed.startswith("DriftWarning: the weights are bfloat16")
        assert first.pop(name) == f"DriftError: process 1 of this run failed: {failed}"
    difference = first.pop("another dtype")
    assert difference == second.pop("another dtype")
    assert "process 0 has Δ in float32 where process 1 has Δ in bfloat16" in difference
    assert len(second) == 5
    assert set(first) - set(second) == {"one alone", "a motion alone", "a group of one"}
    assert set(first.values()) | set(second.values()) == {""}


@pytest.mark.slow
@pytest.mark.parametrize("way", LIBRARIES)
def test_those_of_an_engine_do_so_too(reports_of_libraries: list[dict[str, Any]], way: str) -> None:
    check(reports_of_libraries, way)


@pytest.mark.slow
def test_those_of_a_trainer_do_so_before_its_model_is_wrapped(
    reports_of_libraries: list[dict[str, Any]],
) -> None:
    first, second = (report["Trainer"] for report in reports_of_libraries)
    for what in ("injection", "motion"):
        assert first[what] == second[what] == first[f"{what} then"] == second[f"{what} then"] == ""
        failed = second[f"{what} no such delta"]
        assert failed.startswith("FileNotFoundError")
        assert first[f"{what} no such delta"] == (
            f"DriftError: process 1 of this run failed: {failed}"
        )


def test_groups_of_the_same_processes_are_summed_over_once(reports: list[dict[str, Any]]) -> None:
    assert [report["summed"]["sum"] for report in reports] == [2.0, 2.0]
