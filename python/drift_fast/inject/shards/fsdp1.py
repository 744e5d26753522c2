"""Shards of FSDP1: runs of flat parameters that hold original parameters.

Owns the way from an original parameter (`use_orig_params=True`) to the elements of it that this
rank holds. Between backward and the optimizer's step its `grad` is a view of them, reduced and
averaged, and is changed before clipping like any other gradient. FSDP is never imported here: a
model that it wraps has imported it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.shards.base import Shard, Whole


def find_fsdp1(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that FSDP1 wraps."""
    return [module for module in model.modules() if is_fsdp1(module)]


def is_fsdp1(module: nn.Module) -> bool:
    """Whether a module is FSDP1's wrapper."""
    return any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that FSDP1 wraps, or the module itself."""
    inside: Any = module.module if is_fsdp1(module) else module
    return cast(nn.Module, inside)


def full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape before sharding of every parameter that FSDP1 holds, by runtime name.

    Tied parameters are listed under each of their names. Parameters that FSDP1 ignores are left
    out: they have their own shapes.

    Raises:
        DriftError: `use_orig_params=False`, which has no original parameters.
    """
    places = _places(model)
    if not places:
        return {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in places:
            handle, index = places[id(parameter)]
            found[name] = tuple(handle.flat_param._shapes[index])
    return found


def shards(
    names: Sequence[str], parameters: Sequence[nn.Parameter], model: nn.Module
) -> list[Shard]:
    """Return the part of each parameter that this rank holds; `model` is what FSDP1 wraps.

    Raises:
        DriftError: `use_orig_params=False`, a parameter that is not stored row by row, or one that
            tensor parallelism shards as well.
    """
    places = _places(model)
    result: list[Shard] = []
    for name, parameter in zip(names, parameters, strict=True):
        if id(parameter) in places:
            result.append(_shard(name, parameter, *places[id(parameter)]))
        else:
            # One of ignored_states, which FSDP1 leaves as it is.
            result.append(Whole(parameter))
    return result


def _shard(name: str, parameter: nn.Parameter, handle: Any, index: int) -> Shard:
    flat = handle.flat_param
    if flat._param_extensions[index] is not None:
        raise DriftError(
            f"{name} is sharded by FSDP1 and by tensor parallelism: use FSDP2 (fully_shard), or "
            "leave it out with modules=… or layers=…"
        )
    if not flat._contiguities[index]:
        raise DriftError(
            f"{name} is not stored row by row (strides {tuple(flat._strides[index])}), so its "
            "shard is not a run of its elements: make it contiguous before FSDP wraps it"
        )
    return _Flattened(name, parameter, handle, index)


def _places(model: nn.Module) -> dict[int, tuple[Any, int]]:
    """Return handle and place in its flat parameter of every original parameter, by id."""
    places = {}
    for module in find_fsdp1(model):
        handle: Any = getattr(module, "_handle", None)
        if handle is None:
            continue
        if not handle._use_orig_params:
            names = ", ".join(handle.flat_param._fqns[:2])
            raise flattened(f"{names} and others")
        for index, parameter in enumerate(handle.flat_param._params):
            places[id(parameter)] = (handle, index)
    return places


def flattened(what: str) -> DriftError:
    """Return the refusal of parameters that have no gradients of their own."""
    return DriftError(
        f"FSDP1 flattens {what} into one parameter, so they have no gradients of their own: wrap "
        "with use_orig_params=True (Accelerate and Trainer: fsdp_use_orig_params), or use FSDP2 "
        "(fully_shard)"
    )


class _Flattened:
    """A run of one original parameter's elements, at an offset of this rank's flat shard."""

    sharding = "FSDP1"
    gathers = False
    wider = (
        "Shard float32 weights: call model.float() before FullyShardedDataParallel(…, "
        "mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))"
    )

    def __init__(self, name: str, parameter: nn.Parameter, handle: Any, index: int) -> None:
        self._name = name
        self._parameter = parameter
        self._handle = handle
        info = handle.flat_param._shard_param_infos[index]
        total = int(handle.flat_param._numels[index])
        if info.in_shard:
            first = int(info.intra_param_start_idx)
            self.span = (first, first + int(info.numel_in_shard))
            self._offset = int(info.offset_in_shard)
        else:
            # An empty run; at which end of the parameter does not matter.
            self.span = (total, total)
            self._offset = 0
        self._numel = self.span[1] - self.span[0]
        # With HYBRID_SHARD this is the group within which parameters are sharded; its replicas
        # hold equal gradients and would be counted more than once.
        group = handle.process_group
        sharded = handle.uses_sharded_strategy and dist.get_world_size(group) > 1
        self.process_groups: tuple[Any, ...] = (group,) if sharded else ()

    @property
    def accumulated(self) -> tuple[torch.Tensor, ...]:
        return (self._handle.flat_param,)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1)[slice(*self.span)]

    def gradient(self) -> torch.Tensor | None:
        """Return the view of the flat gradient; empty on ranks that hold no element.

        Raises:
            DriftError: a gradient of other elements, as under `no_sync()`, where it is not reduced.
        """
        if self._numel == 0:
            return torch.empty(0, dtype=self._parameter.dtype, device=self.weight().device)
        gradient = self._parameter.grad
        if gradient is None:
            return None
        if gradient.numel() != self._numel:
            raise DriftError(
                f"the gradient of {self._name} has {gradient.numel()} elements where this rank "
                f"holds {self._numel}: it is not reduced yet, as under no_sync(); call step() "
                "after the last backward, outside no_sync()"
            )
        return gradient

    def write_gradient(self, gradient: torch.Tensor) -> None:
        pass

    def weight(self) -> torch.Tensor:
        """Return the full-precision shard, which the parameter itself is not during computation."""
        flat = self._handle.flat_param
        shard: torch.Tensor = getattr(flat, "_local_shard", flat)
        return shard.detach().view(-1).narrow(0, self._offset, self._numel)

    def write_weight(self, weight: torch.Tensor) -> None:
        # The weights that compute are gathered and cast from the shard again.
        self.weight().copy_(weight)
