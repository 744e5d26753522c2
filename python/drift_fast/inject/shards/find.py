"""Find how each parameter of a model is sharded; the other modules know one kind each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from drift_fast.inject.shards import fsdp1, zero
from drift_fast.inject.shards.base import Shard, Whole
from drift_fast.inject.shards.dtensor import DTensorShard


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
    """Yield name, parameter and full shape of every parameter, tied ones under each of their names.

    Raises:
        DriftError: parameters that are flattened or sharded in a way that is not supported.
    """
    shapes = fsdp1.full_shapes(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in shapes:
            yield name, parameter, shapes[name]
        else:
            # Under ZeRO-3 a parameter has no shape of its own between uses.
            yield name, parameter, tuple(getattr(parameter, "ds_shape", parameter.shape))


def shards_of(
    names: Sequence[str], parameters: Sequence[nn.Parameter], model: nn.Module
) -> list[Shard]:
    """Return the part of each parameter that this process holds.

    Raises:
        DriftError: a parameter that is sharded in a way that is not supported.
    """
    if fsdp1.find_fsdp1(model):
        return fsdp1.shards(names, parameters, model)
    return [_shard(*named) for named in zip(names, parameters, strict=True)]


def _shard(name: str, parameter: nn.Parameter) -> Shard:
    if hasattr(parameter, "device_mesh"):
        return DTensorShard(name, parameter)
    if _is_zero(parameter):
        return zero.shard_without_engine(name, parameter)
    return Whole(parameter)


def process_groups_of(model: nn.Module) -> tuple[Any, ...]:
    """Return every process group over which parameters of a model are sharded."""
    if not isinstance(model, nn.Module) or not dist.is_available() or not dist.is_initialized():
        return ()
    is_fsdp1 = bool(fsdp1.find_fsdp1(model))
    groups: dict[Any, None] = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            groups |= dict.fromkeys(DTensorShard(name, parameter).process_groups)
        elif is_fsdp1 or _is_zero(parameter):
            return (dist.group.WORLD,)
    return tuple(groups)


def _is_zero(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-1, 2 or 3 or the BF16_Optimizer holds a parameter."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
