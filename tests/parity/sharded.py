"""Several processes: DDP, FSDP2, FSDP1 and DeepSpeed's engine, each in a loop of one's own."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from parity.loops import accumulate, sgd, trained, weights_of
from parity.stacks import Cell
from parity.world import LEARNING_RATE, Gradients, canonical


def without_sync(cell: Cell, model: Any) -> None:
    """Forward and backward, gradients reduced with the last micro-batch only."""
    batches = cell.micro_batches()
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with contextlib.nullcontext() if last else model.no_sync():
            (model(**batch).loss / cell.accumulation).backward()


def ddp(cell: Cell) -> Gradients:
    model = torch.nn.parallel.DistributedDataParallel(cell.model())
    optimizer = sgd(trained(model))
    injection = cell.injection(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cell.options.get("mixed", False)):
        without_sync(cell, model)
    injection.step()
    optimizer.step()
    return weights_of(model)


def decoder_of(model: Any) -> Any:
    """Return what has the layers, also where PEFT has wrapped the model."""
    return next(module for module in model.modules() if hasattr(module, "layers"))


def shard(model: Any, decoder: Any, size: int, **options: Any) -> Any:
    """Apply FSDP2's fully_shard to every block and the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def full_weights(model: Any) -> Gradients:
    """Gather DTensors; every process must call it."""
    return {
        canonical(name): parameter.detach().full_tensor().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def fsdp2(cell: Cell) -> Gradients:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    options: dict[str, Any] = {}
    if cell.options.get("mixed"):
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if cell.options.get("offload"):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    model = cell.model()
    shard(model, decoder_of(model), cell.size, **options)
    optimizer = sgd(trained(model))
    injection = cell.injection(model)
    accumulate(cell, model)
    injection.step()
    optimizer.step()
    return full_weights(model)


def fsdp1(cell: Cell) -> Gradients:
    import functools

    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    model = cell.model()
    whole = sum(parameter.numel() for parameter in model.parameters())
    layer = type(decoder_of(model).layers[0])
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={layer})
    model = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.8 * whole
    optimizer = sgd(trained(model))
    injection = cell.injection(model)
    without_sync(cell, model)
    injection.step()
    optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return weights_of(model)


def zero_configuration(cell: Cell, stage: int) -> dict[str, Any]:
    count = len(cell.micro_batches()[0]["input_ids"])
    return {
        "train_micro_batch_size_per_gpu": count,
        "gradient_accumulation_steps": cell.accumulation,
        "train_batch_size": count * cell.accumulation * cell.size,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Small enough that the tiny model's parameters are sharded and its buckets are several.
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 4096,
            "overlap_comm": False,
        },
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }


def zero_weights(model: Any, stage: int) -> Gradients:
    """Gather what ZeRO-3 partitioned; every process must call it."""
    import deepspeed

    gathered = list(model.parameters()) if stage == 3 else []
    # What is partitioned is empty until it is gathered.
    assert not any(parameter.numel() for parameter in gathered)
    with deepspeed.zero.GatheredParameters(gathered, enabled=stage == 3):
        return weights_of(model)


def zero(cell: Cell) -> Gradients:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    stage, mixed = cell.options["stage"], cell.options.get("mixed", False)
    model = cell.model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained(model), lr=LEARNING_RATE),
        config=zero_configuration(cell, stage) | {"bf16": {"enabled": mixed}},
    )
    cell.attach(engine)
    for batch in cell.micro_batches():
        engine.backward(engine(**batch).loss)
        engine.step()
    if mixed:
        # The masters; the weights that compute have eight bits.
        return {
            canonical(name): deepspeed.utils.safe_get_full_fp32_param(parameter).clone()
            for name, parameter in engine.module.named_parameters()
            if parameter.requires_grad
        }
    return zero_weights(engine.module, stage)
