"""Gradients on batches, summed up for each direction while the model stays as it is.

Owns what happens to the model meanwhile: every target may have a gradient, nothing drops out or is
counted, and afterwards flags, modes and gradients are what they were. The sums are float32 or
wider, of which each process has those of its part of a parameter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drift_fast.errors import DriftError, NonFiniteError
from drift_fast.inject.placement.residency import free_host_memory
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.target import Target
from drift_fast.protection.options import Place
from drift_fast.protection.ways import Way

Loss = Callable[[Any, Any], torch.Tensor]
Member = tuple[Target, Shard]

# The share of free memory that the sums may take, beside gradients and activations.
_SHARE = 0.8


def loss_of(model: Any, batch: Any) -> Any:
    """Return `model(**batch).loss`, of a batch that is brought to the model's device."""
    if not isinstance(batch, Mapping):
        raise DriftError(
            f"a batch is {type(batch).__name__}, expected a mapping of the model's arguments, such "
            "as a processor or a data collator returns; or pass loss=…, a function of the model "
            "and a batch"
        )
    device = getattr(model, "device", None) or next(model.parameters()).device

    def moved(value: Any) -> Any:
        there = isinstance(value, torch.Tensor) and value.device.type == "cpu"
        return value.to(device) if there else value

    loss = getattr(model(**{key: moved(value) for key, value in batch.items()}), "loss", None)
    if loss is None:
        raise DriftError(
            "the model returned no loss: put labels into the batches, or pass loss=…, a function "
            "of the model and a batch"
        )
    return loss


class Sums:
    """For each target, one sum of gradients for each direction: flat, of this process's part."""

    def __init__(self, members: Sequence[Member], directions: int, place: Place) -> None:
        self.directions = directions
        self.seen = [False] * len(members)
        kinds = [_Kind.of(target, shard) for target, shard in members]
        host = _is_on_host(kinds, directions, place)
        self.vectors = [
            [kind.zeros("cpu" if host else kind.device) for _ in range(directions)]
            for kind in kinds
        ]

    def add(self, at: int, direction: int, gradient: torch.Tensor | None) -> None:
        """Add a gradient of a target, if it has one."""
        if gradient is not None:
            self.seen[at] = True
            there = self.vectors[at][direction]
            there += gradient.detach().reshape(-1).to(there.device)


def measure(
    way: Way,
    members: Sequence[Member],
    batches: Iterable[Any],
    loss: Loss,
    sums: Sums,
) -> torch.Tensor:
    """Add up the gradients of all batches, and return how many there were for each direction.

    Raises:
        DriftError: a loss that is not one number, or that nothing was computed from.
        NonFiniteError: a loss that is NaN or infinite.
    """
    counts = torch.zeros(sums.directions)
    with (
        way.everyone.together(),
        way.running(),
        _prepared(way, members),
        torch.enable_grad(),
    ):
        for number, batch in enumerate(way.in_step(batches)):
            direction = number % sums.directions
            with _folding(way, members, sums, direction):
                value = loss(way.model, batch)
                with way.sharded.together():
                    _check(value, number)
                way.backward(value)
            for at, (_, shard) in enumerate(members):
                if not way.folds(shard):
                    sums.add(at, direction, shard.gradient())
            way.drop()
            counts[direction] += 1
    return way.replicas.sum(counts)


@contextlib.contextmanager
def _folding(way: Way, members: Sequence[Member], sums: Sums, direction: int) -> Iterator[None]:
    """Add each whole gradient as soon as backward has it, and let it go, to save its memory."""

    def fold(at: int) -> Callable[[torch.Tensor], None]:
        def run(parameter: torch.Tensor) -> None:
            sums.add(at, direction, parameter.grad)
            parameter.grad = None

        return run

    whole: list[tuple[int, Any]] = [
        (at, target.parameter) for at, (target, shard) in enumerate(members) if way.folds(shard)
    ]
    handles = [parameter.register_post_accumulate_grad_hook(fold(at)) for at, parameter in whole]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _prepared(way: Way, members: Sequence[Member]) -> Iterator[None]:
    """Let every target have a gradient, and put everything back afterwards."""
    before = [(one, one.requires_grad, one.grad) for one in way.module.parameters()]
    modes = [(module, module.training) for module in way.module.modules()]
    try:
        way.drop()
        for module, _ in modes:
            # Checkpointing asks the module itself whether it trains, dropout asks those inside.
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        for target, _ in members:
            target.parameter.requires_grad_(True)
        yield
    finally:
        way.drop()
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, gradient in before:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if gradient is not None:
                parameter.grad = gradient


def _check(loss: Any, number: int) -> None:
    """Refuse a loss that backward cannot start from.

    Raises:
        DriftError, NonFiniteError: as `measure`.
    """
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        found = (
            f"a tensor of shape {list(loss.shape)}"
            if isinstance(loss, torch.Tensor)
            else type(loss).__name__
        )
        raise DriftError(
            f"the loss of batch {number} is {found}, expected one number: return the mean over the "
            "batch, as a tensor"
        )
    if not loss.requires_grad:
        raise DriftError(
            f"the loss of batch {number} has no gradient: it was detached, or computed under "
            "torch.no_grad or from none of the weights; return it as the model computes it"
        )
    if not bool(torch.isfinite(loss.detach())):
        raise NonFiniteError(
            f"the loss of batch {number} is {float(loss.detach()):g}: leave that batch out, or see "
            "whether all its labels are masked or the model overflows in its dtype"
        )


def refuse_packed(targets: Sequence[Target]) -> None:
    """Refuse weights that are stored as codes.

    Raises:
        DriftError: the first of them.
    """
    for target in targets:
        parameter = target.parameter
        if hasattr(parameter, "quant_state") or not parameter.is_floating_point():
            raise DriftError(
                f"{target.name} is stored as codes ({parameter.dtype}), which have no gradient: "
                "protect Δ with the model loaded without quantization; the result fits the "
                "quantized one too"
            )


@dataclass(frozen=True)
class _Kind:
    """The sum of gradients of one target: its device beside the weight, dtype and elements."""

    device: torch.device
    dtype: torch.dtype
    numel: int

    @classmethod
    def of(cls, target: Target, shard: Shard) -> _Kind:
        weight = shard.weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return cls(weight.device, dtype, target.numel(shard))

    def zeros(self, device: torch.device | str) -> torch.Tensor:
        return torch.zeros(self.numel, dtype=self.dtype, device=device)


def _is_on_host(kinds: Sequence[_Kind], directions: int, place: Place) -> bool:
    """Whether the sums go to host memory.

    Raises:
        DriftError: there is not enough memory for them.
    """
    memory = torch.device("cpu")
    needed: dict[torch.device, int] = {}
    for kind in kinds:
        nbytes = kind.numel * kind.dtype.itemsize
        needed[kind.device] = needed.get(kind.device, 0) + nbytes * directions
        if kind.device != memory:
            # What is taken out of Δ goes there in the end.
            needed[memory] = needed.get(memory, 0) + nbytes
    host = {memory: sum(kind.numel * kind.dtype.itemsize for kind in kinds) * directions}
    tried = {"device": [needed], "host": [host], "auto": [needed, host]}[place]
    short = [_shortage(one) for one in tried]
    if all(short):
        raise DriftError(
            f"the gradients of {directions} directions over {len(kinds)} tensors need "
            f"{' and '.join(dict.fromkeys(short))}; ask for fewer directions, or select fewer "
            "tensors with modules=… or layers=… and protect the others in a second run"
        )
    return tried[short.index("")] is host


def _shortage(needed: Mapping[torch.device, int]) -> str:
    """Return what is short of, or nothing."""
    for device, nbytes in needed.items():
        if device.type == "cuda":
            free: float = torch.cuda.mem_get_info(device)[0]
        else:
            found = free_host_memory()
            free = math.inf if found is None else found
        if nbytes > _SHARE * free:
            there = f"on {device}" if device.type != "cpu" else "in host memory"
            return (
                f"{nbytes / 1e9:.2f} GB {there}, where {free / 1e9:.2f} GB are free, of which they "
                f"may take {_SHARE:.0%}"
            )
    return ""
