"""Float32 copies of 16-bit weights that an optimizer keeps in its own state.

Owns finding them, by value and not by a table of names: the optimizer steps the copy, so its next
step would overwrite a motion of the 16-bit weights alone. Copies that an engine keeps elsewhere
(DeepSpeed) are reached by its shards.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from drift_fast.inject.motion.optimizer_steps import parameters_of_optimizer
from drift_fast.inject.motion.rounding import is_narrow
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.target_group import TargetGroup

logger = logging.getLogger(__name__)


class MasterWeights:
    """A shard whose weights are those of a copy in an optimizer's state."""

    def __init__(
        self, shard: Shard, parameter: nn.Parameter, optimizer: torch.optim.Optimizer, key: str
    ) -> None:
        self._shard = shard
        self._parameter = parameter
        self._optimizer = optimizer
        self._key = key
        self.sharding = shard.sharding
        self.span = shard.span
        self.process_groups = shard.process_groups
        self.accumulated = shard.accumulated
        self.gathers = False

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return self._shard.cut(whole)

    def gradient(self) -> torch.Tensor | None:
        return self._shard.gradient()

    def write_gradient(self, gradient: torch.Tensor) -> None:
        self._shard.write_gradient(gradient)

    def weight(self) -> torch.Tensor:
        # Looked up each time: loading an optimizer's state puts another tensor there.
        return _local(self._optimizer.state[self._parameter][self._key])

    def write_weight(self, weight: torch.Tensor) -> None:
        self.weight().copy_(weight)
        self._shard.write_weight(weight)


def reach_master_weights(groups: Sequence[TargetGroup], optimizer: torch.optim.Optimizer) -> None:
    """Reach 16-bit weights through the float32 copies that an optimizer's state may hold."""
    held = parameters_of_optimizer(optimizer)
    found = [
        (group, at)
        for group in groups
        for at, shard in enumerate(group.shards)
        if id(group.targets[at].parameter) in held and is_narrow(shard.weight().dtype)
    ]
    parameters = [group.targets[at].parameter for group, at in found]
    key = copy_key(optimizer, parameters)
    if key is None:
        return
    logger.info("moving %d parameters through %r of the optimizer's state", len(found), key)
    for (group, at), parameter in zip(found, parameters, strict=True):
        group.shards[at] = MasterWeights(group.shards[at], parameter, optimizer, key)


@torch.no_grad()
def copy_key(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> str | None:
    """Return the name under which the optimizer's state holds float32 copies of these parameters.

    Every copy must be there and equal its parameter except for rounding, and one of them must not
    be all zeros, since moments start at zero. Waits for the device.
    """
    states: list[Any] = [optimizer.state.get(parameter) for parameter in parameters]
    if not states or not all(isinstance(state, dict) for state in states):
        return None
    for key in states[0]:
        pairs = [(state.get(key), p) for state, p in zip(states, parameters, strict=True)]
        if all(_is_copy(*pair) for pair in pairs) and any(bool(_local(p).any()) for _, p in pairs):
            return str(key)
    return None


def _is_copy(held: Any, parameter: nn.Parameter) -> bool:
    if not isinstance(held, torch.Tensor) or held.dtype != torch.float32:
        return False
    if held.shape != parameter.shape:
        return False
    limits = torch.finfo(parameter.dtype)
    low = _local(parameter).float()
    return torch.allclose(_local(held), low, rtol=limits.eps, atol=limits.tiny * limits.eps)


def _local(tensor: Any) -> torch.Tensor:
    """Return the tensor, or a DTensor's local part, with nothing for autograd to follow."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()
