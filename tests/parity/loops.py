"""Loops of one's own on one device: what runs between forward and the optimizer's step."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch

from parity.stacks import Cell
from parity.world import LEARNING_RATE, Gradients, canonical


def sgd(parameters: Any, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, **options)


def weights_of(model: torch.nn.Module) -> Gradients:
    return {
        canonical(name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def accumulate(cell: Cell, model: Any, context: Any = contextlib.nullcontext) -> None:
    """Forward and backward over every micro-batch; context wraps each forward pass."""
    for batch in cell.micro_batches():
        with context():
            loss = model(**batch).loss / cell.accumulation
        loss.backward()


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain(cell: Cell) -> Gradients:
    model = cell.model()
    options = {key: value for key, value in cell.options.items() if key != "adapter"}
    optimizer = sgd(trained(model), **options)
    injection = cell.injection(model, optimizer=optimizer)
    accumulate(cell, model)
    injection.step()
    optimizer.step()
    return weights_of(model)


def resident(cell: Cell) -> Gradients:
    from drift_fast.inject.placement.held import OnDisk
    from drift_fast.inject.placement.int8 import Int8

    model = cell.world.model()
    optimizer = sgd(model.parameters())
    options = {key: value for key, value in cell.options.items() if key != "read_from"}
    injection = cell.injection(model, **options)
    accumulate(cell, model)
    # What `residency` says is what was asked for; that Δ came from there is seen by its being read.
    store: Any = {"Int8": Int8, "OnDisk": OnDisk}.get(cell.options.get("read_from", ""))
    if store is None or cell.alpha is None:
        injection.step()
    else:
        with mock.patch.object(store, "fill", autospec=True, side_effect=store.fill) as fill:
            injection.step()
        assert fill.call_count, f"no Δ was read from {store.__name__} in the step"
    optimizer.step()
    return weights_of(model)


def overlapped(cell: Cell) -> Gradients:
    model = cell.world.model()
    owner = sgd(model.parameters())
    injection = cell.injection(model, **cell.options)
    batches = cell.micro_batches()
    for index, batch in enumerate(batches):
        loss = model(**batch).loss / cell.accumulation
        final = index == len(batches) - 1 or cell.alpha is None
        with contextlib.nullcontext() if final else injection.accumulating():
            loss.backward()
    injection.step()
    owner.step()
    return weights_of(model)


def optimizer(cell: Cell) -> Gradients:
    model = cell.world.model()
    owner = sgd(model.parameters())
    cell.attach(owner, model=model)
    accumulate(cell, model)
    owner.step()
    return weights_of(model)


def autocast(cell: Cell) -> Gradients:
    model = cell.world.model()
    optimizer = sgd(model.parameters())
    injection = cell.injection(model)
    accumulate(cell, model, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    injection.step()
    optimizer.step()
    return weights_of(model)


def scaled(cell: Cell) -> Gradients:
    model = cell.world.model()
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    injection = cell.injection(model, optimizer=optimizer, scaler=scaler)
    for batch in cell.micro_batches():
        scaler.scale(model(**batch).loss / cell.accumulation).backward()
    if cell.options.get("unscale"):
        scaler.unscale_(optimizer)
    injection.step()
    scaler.step(optimizer)
    scaler.update()
    return weights_of(model)


def checkpointed(cell: Cell) -> Gradients:
    model = cell.world.model()
    model.config.use_cache = False
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": cell.options["reentrant"]}
    )
    model.enable_input_require_grads()
    optimizer = sgd(model.parameters())
    injection = cell.injection(model)
    passes: list[Any] = []
    # Recomputation may stop before a module has ended, but not before it begins.
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *given: passes.append(None))
    accumulate(cell, model)
    # Forward, and once more in backward.
    assert len(passes) == 2 * cell.accumulation, f"{len(passes)} forward passes: not recomputed"
    injection.step()
    optimizer.step()
    return weights_of(model)


def compiled(cell: Cell) -> Gradients:
    # Beyond its limit of recompilations torch runs eagerly, without a word.
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = torch.compile(cell.world.model())
    optimizer = sgd(model.parameters())
    injection = cell.injection(model)
    accumulate(cell, model)
    assert torch._dynamo.utils.counters["frames"]["ok"]
    injection.step()
    optimizer.step()
    return weights_of(model)
