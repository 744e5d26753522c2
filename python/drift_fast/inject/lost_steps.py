"""Which share of an optimizer's steps 16-bit weights without wider copies lose, and a warning.

A bfloat16 weight has eight bits, so that a step below 1/512 of it changes nothing. At the learning
rates of fine-tuning most steps are smaller, and what an injection adds to them is lost as they are.

Owns the estimate and what to do in each training stack. It needs no gradient: optimizers of Adam's
kind move an element by about the learning rate at most. Nothing is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from drift_fast.errors import DriftWarning
from drift_fast.inject.lora.shard import FactorShard
from drift_fast.inject.motion.master_weights import copy_key
from drift_fast.inject.motion.optimizer_steps import parameters_of_optimizer
from drift_fast.inject.motion.rounding import is_narrow, units
from drift_fast.inject.optimizer_watch import OptimizerWatch
from drift_fast.inject.target_group import TargetGroup

# Elements of each tensor that are looked at, about.
_SAMPLED = 4096
# From this share on the loss is worth a warning; smaller steps than the largest lose more.
_NOTICEABLE = 0.1
# Words in the options or the state of optimizers that keep what rounding would lose.
_KEPT = ("kahan", "stochastic", "compensat", "master", "shift")

_LOOP = (
    "Train float32 weights under autocast: load the model with dtype=torch.float32, or call "
    "model.float(), before the optimizer is made, and compute under torch.autocast(…, "
    'dtype=torch.bfloat16), with Accelerate under Accelerator(mixed_precision="bf16")'
)
_ADAPTER = (
    "Hold the adapter's factors in float32, as get_peft_model does unless it is called with "
    "autocast_adapter_dtype=False, or cast them before the optimizer is made"
)
_OPTIMIZER = (
    "; or use an optimizer that keeps float32 copies, or rounds stochastically or with "
    "compensation (Kahan), such as those of torchao.optim with bf16_stochastic_round=True"
)


# A parameter that an optimizer steps, and how what this process holds of it is read.
_Weight = tuple[nn.Parameter, Callable[[], torch.Tensor]]


class LostSteps:
    """Looks at the optimizer of 16-bit weights once, as soon as what it keeps can be seen.

    stack: how float32 weights are had in this training stack, empty for a loop's or the shards'.
    along: whether what moves weights along Δ is part of the optimizer's steps, and so lost too.

    `cause` is what is wrong and what helps, empty as long as nothing is known to be wrong. `share`
    is the part of the steps that is lost at the least, None where it is not known.
    """

    def __init__(self, groups: Sequence[TargetGroup], stack: str, *, along: bool = True) -> None:
        self.cause = ""
        self.share: float | None = None
        self._weights = [weight for group in groups for weight in _narrow_weights(group)]
        self._remedy = _remedy(groups, stack)
        self._along = ", that along Δ included" if along else "; the planned motion is not"
        self._watch = OptimizerWatch(self._use) if self._weights else None

    def see(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the optimizer that is known to step the targets, or copies of them."""
        if not self._weights:
            return
        held = parameters_of_optimizer(optimizer)
        stepped = [p for p, _ in self._weights if id(p) in held]
        # What others than torch's keep besides is in their state, which the first step makes.
        plain = type(optimizer).__module__.startswith("torch.optim")
        if stepped and not plain and not any(optimizer.state.get(p) for p in stepped):
            return
        # The watch stays: hooks cannot be removed while optimizers go through them.
        weights, self._weights = self._weights, []
        if not _keeps_more(optimizer, stepped):
            self._judge(optimizer, weights)

    def remove(self) -> None:
        """Look at nothing from now on. May be called twice."""
        if self._watch is not None:
            self._watch.remove()
        self._weights = []

    def _use(self, optimizer: torch.optim.Optimizer) -> None:
        """See an optimizer that is about to step, if it steps one of the weights."""
        held = parameters_of_optimizer(optimizer)
        if any(id(p) in held for p, _ in self._weights):
            self.see(optimizer)

    @torch.no_grad()
    def _judge(self, optimizer: torch.optim.Optimizer, weights: Sequence[_Weight]) -> None:
        """Estimate what is lost; waits for the device once."""
        tensors = [read() for _, read in weights]
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        kept = f"the weights are {dtype}, and no wider copies of them are kept"
        self.cause = f"{kept}, so that small steps are rounded away. {self._remedy}{_OPTIMIZER}"
        if not is_bounded(optimizer):
            return
        rates = _largest_rates(optimizer)
        largest = max(rates.values())
        of_each = [rates.get(id(p), largest) for p, _ in weights]
        self.share = _share_lost(tensors, of_each)
        self.cause = (
            f"{kept}. At a learning rate of {largest:.2g} a step of {type(optimizer).__name__} is "
            f"below half a unit in the last place of {self.share:.0%} of them (estimated from "
            f"samples), so that this much of its motion is lost or more{self._along}. "
            f"{self._remedy}{_OPTIMIZER}"
        )
        if self.share >= _NOTICEABLE:
            warnings.warn(self.cause, DriftWarning, stacklevel=5)


def is_bounded(optimizer: Any) -> bool:
    """Whether an optimizer moves an element by about its learning rate at most, as Adam does."""
    names = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    if any("adafactor" in name for name in names):
        groups = optimizer.param_groups
        absolute = ("scale_parameter", "relative_step")
        return all(group.get(key) is False for group in groups for key in absolute)
    return any("adam" in name or "lion" in name for name in names)


def _narrow_weights(group: TargetGroup) -> Iterator[_Weight]:
    """Yield the 16-bit weights of a group whose optimizer has no float32 copies by its shards."""
    for target, shard in zip(group.targets, group.shards, strict=True):
        own = [(target.parameter, shard.weight)]
        for parameter, read in shard.trained if isinstance(shard, FactorShard) else own:
            if not is_narrow(parameter.dtype):
                continue
            # All shards of a group are of one kind, and some gather what they read.
            if not is_narrow(read().dtype):
                return
            yield parameter, read


def _keeps_more(optimizer: Any, stepped: Sequence[nn.Parameter]) -> bool:
    """Whether an optimizer keeps float32 copies or what rounding loses, as far as it shows."""
    states = [optimizer.state.get(parameter) or {} for parameter in stepped]
    for options in (vars(optimizer), *optimizer.param_groups, *states):
        for key, value in options.items():
            said = any(word in str(key).lower() for word in _KEPT)
            if said and (isinstance(value, torch.Tensor) or bool(value)):
                return True
    return copy_key(optimizer, stepped) is not None


def _largest_rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Return the largest learning rate of each parameter by its id, that after a warm-up."""
    keys = ("lr", "initial_lr", "max_lr")
    return {
        id(parameter): max(float(group[key]) for key in keys if key in group)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _share_lost(tensors: Sequence[torch.Tensor], rates: Sequence[float]) -> float:
    """Return the share of all elements whose half unit in the last place is above their rate."""
    lost: dict[torch.device, list[torch.Tensor]] = {}
    total = 0
    for tensor, rate in zip(tensors, rates, strict=True):
        if tensor.numel() == 0:
            continue
        # An odd stride meets every column of a matrix.
        sample = tensor.reshape(-1)[:: tensor.numel() // _SAMPLED | 1]
        half = units(sample.float().abs(), tensor.dtype).mul_(0.5)
        share = (half > rate).float().mean()
        lost.setdefault(tensor.device, []).append(share * tensor.numel())
        total += tensor.numel()
    return sum(float(torch.stack(each).sum()) for each in lost.values()) / max(1, total)


def _remedy(groups: Sequence[TargetGroup], stack: str) -> str:
    """Return how float32 weights are had: for adapters, in a training stack, or as sharded."""
    if any(target.adapted is not None for group in groups for target in group.targets):
        return _ADAPTER
    return stack or getattr(groups[0].shards[0], "wider", "") or _LOOP
