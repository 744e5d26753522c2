"""LoRA: factors of frozen weights, in one process and in several."""

from __future__ import annotations

from typing import Any

import torch

from parity.loops import accumulate, sgd, weights_of
from parity.sharded import without_sync
from parity.stacks import Cell
from parity.world import Gradients

# A frozen bias has no factors that a delta could move.
WEIGHTS = r"re:\.weight$"


def _trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora(cell: Cell) -> Gradients:
    model = cell.world.adapted(cell.options.get("adapter", "lora"))
    optimizer = sgd(_trained(model))
    injection = cell.injection(model, modules=WEIGHTS)
    accumulate(cell, model)
    injection.step()
    optimizer.step()
    return weights_of(model)


def lora_ddp(cell: Cell) -> Gradients:
    model = torch.nn.parallel.DistributedDataParallel(cell.world.adapted("lora"))
    optimizer = sgd(_trained(model))
    injection = cell.injection(model, modules=WEIGHTS)
    without_sync(cell, model)
    injection.step()
    optimizer.step()
    return weights_of(model)
