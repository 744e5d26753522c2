"""What runs inside the processes of the planned-motion tests: FSDP2 and DeepSpeed.

Owns the processes' work and what they report; expectations are in the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from drift_fast.inject.motion.motion import PlannedMotion
from support.injection_models import Backbone, regression_batch, regression_loss
from support.sharded_workers import engine_step, make_engine, micro_batches

STEPS = 6
PLAN: dict[str, Any] = {"progress": {"attn": 0.8, "mlp": 1.2}, "steps": 4}


def backbone(dtype: torch.dtype) -> Backbone:
    # Five rows more than two processes share evenly.
    return Backbone(width=16, inner=37, seed=3).to(dtype)


def train(model: nn.Module, motion: PlannedMotion | None, *, lr: float) -> None:
    """Take steps of SGD on the same batch in every process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(STEPS):
        optimizer.zero_grad()
        regression_loss(model, regression_batch(width=16, seed=step)).backward()
        optimizer.step()
        if motion is not None:
            motion.step()


def fsdp2(delta: str, folder: str) -> dict[str, Any]:
    """Train sharded, in float32 and in bfloat16 without learning; rank 0 saves the weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    report: dict[str, Any] = {}
    for name, dtype, lr in (("float32", torch.float32, 0.05), ("bfloat16", torch.bfloat16, 0.0)):
        model = backbone(dtype)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with PlannedMotion(model, delta, **PLAN) as motion:
            train(model, motion, lr=lr)
            report[name] = motion.metrics()
        weights = {n: p.full_tensor() for n, p in model.named_parameters()}
        if dist.get_rank() == 0:
            torch.save(weights, Path(folder) / f"{name}.pt")
    return report


class Fixed(dict[str, torch.Tensor]):
    """A delta in memory."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.items()}


def deepspeed(options: dict[str, Any]) -> dict[str, Any]:
    """Train with a learning rate of zero, and report progress and what is computed with."""
    engine, plain = make_engine(options)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    generator = torch.Generator().manual_seed(9)
    # So small that increments are below what a 16-bit copy can tell.
    delta = Fixed(
        {
            name: 0.01 * p.float().std() * torch.randn(p.shape, generator=generator)
            for name, p in plain.named_parameters()
            if "proj" in name and p.ndim == 2
        }
    )
    accumulate = options.get("gradient_accumulation_steps", 1)
    with PlannedMotion(engine, delta, progress=0.7, steps=20, optimizer=engine) as motion:
        counted, computing = True, None
        for step in range(30):
            engine_step(engine, micro_batches(2 * accumulate, step=step))
            if motion.finished and computing is None:
                computing = weights_in_use(engine)
            counted &= motion.taken == min(20, engine.global_steps - engine.skipped_steps)
        report: dict[str, Any] = motion.metrics()
        report |= {"counted": counted, "left out": engine.skipped_steps}
    report["wrapped"] = "step" in engine.optimizer.__dict__
    assert computing is not None
    along = total = 0.0
    for name, start in plain.named_parameters():
        if name in delta:
            along += float(((computing[name] - start.double()) * delta[name].double()).sum())
            total += float(delta[name].double().square().sum())
        else:
            same = bool(torch.equal(computing[name], start.double()))
            report["others"] = report.get("others", True) and same
    report["computing"] = along / total
    engine.destroy()
    return report


def weights_in_use(engine: Any) -> dict[str, torch.Tensor]:
    """Return what the engine's model computes with, whole, in float64."""
    from deepspeed import zero

    found = {}
    for name, parameter in engine.module.named_parameters():
        with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().double().clone()
    return found
