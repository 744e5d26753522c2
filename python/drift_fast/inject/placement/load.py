"""From targets to groups: read the local part of each Δ, one tensor at a time, to where it lives.

Owns the order of targets in a group, and who is left out because its Δ is zero. Host memory holds
one tensor at a time, unless Δ is to live there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from drift_fast.errors import DriftError, NonFiniteError
from drift_fast.inject.compute.base import SMALL, Arithmetic
from drift_fast.inject.compute.device import DeviceArithmetic
from drift_fast.inject.compute.host import HostArithmetic, norm_of
from drift_fast.inject.compute.shortcuts import prepare
from drift_fast.inject.lora.group import FactorGroup
from drift_fast.inject.placement.stores import (
    Held,
    OnDisk,
    Plain,
    Quantised,
    Residency,
    Resident,
    Ring,
    Store,
    choose,
)
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.shards.reduction import Reduction
from drift_fast.inject.target_group import TargetGroup
from drift_fast.inject.targets import DeltaLike, Recent, Target
from drift_fast.names import layer_of

logger = logging.getLogger(__name__)

Member = tuple[Target, Shard]


@dataclass(frozen=True)
class Loading:
    """Where Δ shall live, and the memory on the device for what of it is on its way there."""

    residency: Residency = "auto"
    prefetch_nbytes: int = 10**9
    # All that trains, whose gradients and optimizer states may be yet to come.
    trained: Sequence[torch.Tensor] = ()


def make_arithmetic(device: torch.device) -> Arithmetic:
    """Return the arithmetic for a device."""
    return HostArithmetic() if device.type == "cpu" else DeviceArithmetic(device)


def load_groups(
    members: Sequence[Member], delta: DeltaLike, loading: Loading
) -> tuple[list[TargetGroup], Residency]:
    """Read Δ of every target and return them by device and sharding, and where Δ lives.

    Norms are taken once, here, of the values that will be injected. The delta's statistics know the
    norm before rounding, which for a bias of a few elements differs in the third digit; and a delta
    that streams would have to read both checkpoints once more for them. A Δ that is zero needs no
    injection.

    Raises:
        NonFiniteError: Δ holds NaN or infinity.
        DriftError: Δ is zero in every target, or a float64 parameter on an accelerator.
        All are raised on every process, if on one.
    """
    kinds: dict[Any, list[Member]] = {}
    for target, shard in members:
        kind = (shard.weight().device, shard.process_groups, target.adapted is not None)
        kinds.setdefault(kind, []).append((target, shard))
    residency = loading.residency
    if residency == "auto":
        residency = choose_for(kinds, delta, loading.trained)
    everyone = Reduction(tuple(dict.fromkeys(one for _, some, _ in kinds for one in some)))
    groups: list[TargetGroup] = []
    for (device, _, adapted), some in kinds.items():
        arithmetic = make_arithmetic(device)
        kept, store, norms = load_store(
            in_backward_order(some), delta, arithmetic, residency, loading, everyone
        )
        if kept:
            targets, shards = zip(*kept, strict=True)
            make = FactorGroup if adapted else TargetGroup
            groups.append(make(targets, shards, store, norms, arithmetic))
    if not groups:
        raise DriftError(
            "Δ is zero in every target, so an injection would do nothing; was the delta computed "
            "from the same checkpoint twice?"
        )
    if residency != "device" and all(group.resident for group in groups):
        why = "beside the gradients" if residency == "host" else f"of at most {SMALL} elements each"
        logger.info("residency device instead of %s: all of Δ is %s", residency, why)
        residency = "device"
    return groups, residency


def choose_for(
    kinds: dict[Any, list[Member]], delta: DeltaLike, trained: Sequence[torch.Tensor]
) -> Residency:
    """Choose a residency by the memory that is free, and say so in the log."""
    device, *_ = max(kinds, key=lambda kind: sum(t.numel(p) for t, p in kinds[kind]))
    itemsize = getattr(torch, str(getattr(delta, "dtype", "float32"))).itemsize
    there = [some for (where, *_), some in kinds.items() if where == device]
    numel = sum(target.numel(shard) for some in there for target, shard in some)
    residency, why = choose(numel * itemsize, device, trained)
    logger.info("residency %s: %s", residency, why)
    return residency


def in_backward_order(members: Iterable[Member]) -> list[Member]:
    """Return the last layer first, and small tensors behind all others.

    On an accelerator those are launch-bound and are handled together, when all gradients are there.
    """
    backward = list(members)[::-1]
    small = [member for member in backward if _is_small(*member)]
    return [member for member in backward if not _is_small(*member)] + small


def _is_small(target: Target, shard: Shard) -> bool:
    """Tell by the mean part of all processes, on which they agree: they add up in one order."""
    if not shard.process_groups:
        return target.numel(shard) <= SMALL
    parts = math.prod(dist.get_world_size(group) for group in shard.process_groups)
    return math.prod(target.shape) <= SMALL * parts


def load_store(
    members: Sequence[Member],
    delta: DeltaLike,
    arithmetic: Arithmetic,
    residency: Residency,
    loading: Loading,
    everyone: Reduction,
) -> tuple[list[Member], Store, list[float]]:
    """Return the members whose Δ is not zero, a store of their Δ, and ‖Δ‖ over all processes.

    Raises:
        NonFiniteError, DriftError: as `load_groups`, on every process if on one.
    """
    device = arithmetic.device
    groups = members[0][1].process_groups
    held: list[Held | torch.Tensor] = []
    local: list[float] = []
    with everyone.together():
        recent = Recent(delta)
        scratch: list[torch.Tensor] = []
        for target, shard in members:
            if device.type != "cpu" and shard.weight().dtype == torch.float64:
                raise DriftError(
                    f"{target.name} is float64 on {device}, where norms are taken in float32; "
                    "train in float32 or bfloat16, or on the CPU"
                )
            one, norm = _load(target, shard, recent, arithmetic, residency, scratch)
            held.append(one)
            local.append(norm)
    squares = torch.tensor([norm * norm for norm in local], dtype=torch.float64)
    norms: list[float] = Reduction(groups).sum(squares).sqrt().tolist()
    with everyone.together():
        for (target, _), norm in zip(members, norms, strict=True):
            if not math.isfinite(norm):
                raise NonFiniteError(
                    f"{target.delta_name}: Δ holds NaN or infinite values, which would spread to "
                    "every weight; repair the source checkpoint or leave the tensor out with "
                    "modules=… or layers=…"
                )
        rows = [row for row in zip(members, held, norms, strict=True) if row[2] > 0]
        kept = [member for member, _, _ in rows]
        if device.type == "cuda":
            for _, shard in kept:
                prepare([shard.weight()])
        store = _store([one for _, one, _ in rows], kept, device, loading)
    return kept, store, [norm for _, _, norm in rows]


def _load(
    target: Target,
    shard: Shard,
    recent: Recent,
    arithmetic: Arithmetic,
    residency: Residency,
    scratch: list[torch.Tensor],
) -> tuple[Held | torch.Tensor, float]:
    device = arithmetic.device
    tensor = target.read(recent, shard)
    small = _is_small(target, shard)
    if residency in ("device-int8", "host-int8") and not small:
        quantised = Quantised(tensor.to(device))
        numel = quantised.values.numel()
        if not scratch or scratch[0].numel() < numel:
            scratch[:] = [torch.empty(numel, dtype=quantised.dtype, device=device)]
        quantised.fill(scratch[0][:numel])
        # What is injected is what was rounded, so its norm counts.
        norm = float(arithmetic.measure([scratch[0][: quantised.numel]], None).norm.item())
        return (quantised.to_host() if residency == "host-int8" else quantised), norm
    norm = norm_of(tensor)
    if small or residency == "device" or (residency == "host" and device.type == "cpu"):
        return tensor.to(device), norm
    if residency == "host":
        return Plain(tensor), norm

    def read(out: torch.Tensor) -> None:
        try:
            target.read_into(recent, shard, out)
        except (OSError, DriftError) as error:
            raise DriftError(
                f"{target.delta_name}: Δ could not be read again, as residency='disk' does in "
                f"every step: {error}. Keep the files of the delta, or of both checkpoints, as "
                "they are until training ends, or attach with residency='host' or 'device'"
            ) from error

    return OnDisk(tensor.numel(), tensor.dtype, read), norm


def _store(
    held: Sequence[Held | torch.Tensor],
    members: Sequence[Member],
    device: torch.device,
    loading: Loading,
) -> Store:
    resident = [one for one in held if isinstance(one, torch.Tensor)]
    elsewhere = [one for one in held if not isinstance(one, torch.Tensor)]
    if not elsewhere:
        return Resident(resident, _by_layer(members))
    return Ring(elsewhere, resident, device, loading.prefetch_nbytes)


def _by_layer(members: Sequence[Member]) -> list[tuple[int, int]]:
    """Return runs of targets of one layer, small tensors at the end as one run."""
    marks = [
        None if _is_small(target, shard) else layer_of(target.delta_name)
        for target, shard in members
    ]
    starts = [at for at in range(len(marks)) if at == 0 or marks[at] != marks[at - 1]]
    return list(pairwise([*starts, len(marks)]))
