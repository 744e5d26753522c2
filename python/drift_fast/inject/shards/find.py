"""Find how each parameter of a model is sharded; the other modules know one kind each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from drift_fast.inject.shards import fsdp1, zero
from drift_fast.inject.shards.base import Shard, Whole
from drift_fast.inject.shards.dtensor import DTensorShard
from drift_fast.inject.shards.zero_support import is_engine


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


def all_processes() -> tuple[Any, ...]:
    """Return the process group of the whole run; none where this process is alone."""
    joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return (dist.group.WORLD,) if joined else ()


def processes_of(model: nn.Module | None) -> tuple[Any, ...]:
    """Return the groups of all processes that train a model together, with shards or copies."""
    if not isinstance(model, nn.Module) or not all_processes():
        return ()
    if is_engine(model) or fsdp1.find_fsdp1(model):
        return all_processes()
    groups: dict[Any, None] = {}
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            groups[module.process_group] = None
    for parameter in model.parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            groups |= dict.fromkeys(mesh.get_all_groups())
        elif _is_zero(parameter):
            return all_processes()
    return tuple(group for group in groups if dist.get_world_size(group) > 1)


def _is_zero(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-1, 2 or 3 or the BF16_Optimizer holds a parameter."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
