"""From targets to target groups: read the local part of each Δ to where it is kept.

Owns the order of targets in a group, and which are left out because their Δ is zero. `places` has
what becomes of the Δ of each, `pipeline` how it is read.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from drift_fast.delta.delta import Delta
from drift_fast.delta.protocol import DeltaLike
from drift_fast.dtypes import share_lost
from drift_fast.errors import DriftError, NonFiniteError
from drift_fast.inject.compute.base import SMALL, Arithmetic
from drift_fast.inject.compute.device import DeviceArithmetic
from drift_fast.inject.compute.host import HostArithmetic
from drift_fast.inject.compute.shortcuts import prepare
from drift_fast.inject.config import Residency
from drift_fast.inject.lora.group import FactorGroup
from drift_fast.inject.placement.pipeline import Wanted, load
from drift_fast.inject.placement.places import (
    Beside,
    Loaded,
    OnHost,
    Place,
    Starts,
    Unread,
)
from drift_fast.inject.placement.residency import choose
from drift_fast.inject.placement.rounded import Rounded, Rounding
from drift_fast.inject.placement.stores import Resident, Ring, Store
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.shards.reduction import ALONE, Reduction
from drift_fast.inject.target import DeltaReader, Target
from drift_fast.inject.target_group import TargetGroup
from drift_fast.names import layer_of
from drift_fast.progress_bar import reported

logger = logging.getLogger(__name__)

# By this share ‖Δ‖ may differ between processes, whose devices need not be alike.
_APART = 1e-4

Member = tuple[Target, Shard]


@dataclass(frozen=True)
class Loading:
    """Where Δ is kept, and the memory on the device for the parts of it that are under way."""

    residency: Residency = "auto"
    prefetch_nbytes: int = 10**9
    # All that trains: its gradients and optimizer states may be yet to come.
    trained: Sequence[torch.Tensor] = ()
    # All processes that load, which fail together.
    everyone: Reduction = ALONE


def make_arithmetic(device: torch.device) -> Arithmetic:
    """Return the arithmetic for a device."""
    return HostArithmetic() if device.type == "cpu" else DeviceArithmetic(device)


def load_groups(
    members: Sequence[Member], delta: DeltaLike, loading: Loading
) -> tuple[list[TargetGroup], Residency]:
    """Read Δ of every target; return the targets by device and sharding, and the residency.

    Norms are taken once, here, of the values that will be injected. The delta's statistics know the
    norm before rounding, which for a bias of a few elements differs in the third digit; and a delta
    that streams would have to read both checkpoints once more for them. A Δ that is zero needs no
    injection.

    Raises:
        NonFiniteError: Δ holds NaN or infinity.
        DriftError: Δ is zero in every target, beyond the range of int8 where that was asked for, or
            of a float64 parameter on an accelerator.
        All are raised on every process, if on one.
    """
    kinds: dict[Any, list[Member]] = {}
    for target, shard in members:
        kind = (shard.weight().device, shard.process_groups, target.adapted is not None)
        kinds.setdefault(kind, []).append((target, shard))
    residency = loading.residency
    if residency == "auto":
        residency = _choose_for(kinds, delta, loading.trained)
    groups: list[TargetGroup] = []
    for (device, _, adapted), some in kinds.items():
        loader = _Loader(delta, make_arithmetic(device), residency, loading.everyone)
        kept = loader.load(in_backward_order(some))
        if kept:
            store = loader.store(kept, loading.prefetch_nbytes)
            make = FactorGroup if adapted else TargetGroup
            targets, shards, norms = zip(*((k.target, k.shard, k.norm) for k in kept), strict=True)
            groups.append(make(targets, shards, store, norms, loader.arithmetic, _starts(kept)))
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


def _choose_for(
    kinds: dict[Any, list[Member]], delta: DeltaLike, trained: Sequence[torch.Tensor]
) -> Residency:
    """Choose a residency by the memory that is free, and say so in the log."""
    device, *_ = max(kinds, key=lambda kind: sum(t.numel(p) for t, p in kinds[kind]))
    itemsize = _dtype_of(delta).itemsize
    there = [some for (where, *_), some in kinds.items() if where == device]
    numel = sum(target.numel(shard) for some in there for target, shard in some)
    residency, why = choose(numel * itemsize, device, trained)
    logger.info("residency %s: %s", residency, why)
    return residency


def _dtype_of(delta: DeltaLike) -> torch.dtype:
    """Return the dtype of a delta's tensors, as far as it says."""
    dtype: torch.dtype = getattr(torch, str(getattr(delta, "dtype", "float32")))
    return dtype


def in_backward_order(members: Iterable[Member]) -> list[Member]:
    """Return the last layer first, and small tensors behind all others.

    On an accelerator launching them takes longer than they do, so they are handled together, when
    all gradients are there.
    """
    backward = list(members)[::-1]
    small = [member for member in backward if _is_small(*member)]
    return [member for member in backward if not _is_small(*member)] + small


def _is_small(target: Target, shard: Shard) -> bool:
    """Whether the mean part of all processes is small; they agree on it and add up in one order."""
    if not shard.process_groups:
        return target.numel(shard) <= SMALL
    parts = math.prod(dist.get_world_size(group) for group in shard.process_groups)
    return math.prod(target.shape) <= SMALL * parts


class _Loader:
    """Reads the Δ of one device's targets, which are all sharded in one way."""

    def __init__(
        self, delta: DeltaLike, arithmetic: Arithmetic, residency: Residency, everyone: Reduction
    ) -> None:
        self.arithmetic = arithmetic
        self._delta = delta
        self._recent = DeltaReader(delta)
        self._residency = residency
        self._int8 = residency in ("device-int8", "host-int8")
        self._everyone = everyone
        self._starts = Starts(arithmetic)
        self._rounding = Rounding(arithmetic, self._starts, to_host=residency == "host-int8")

    def load(self, members: Sequence[Member]) -> list[Loaded]:
        """Return the targets whose Δ is not zero, with norms over all processes.

        Raises:
            NonFiniteError, DriftError: as `load_groups`, on every process if on one.
        """
        with self._everyone.together():
            loaded = self._read([self._place(*member) for member in members])
        reduction = Reduction(members[0][1].process_groups)

        def total(norms: list[float]) -> list[float]:
            squares = torch.tensor([norm * norm for norm in norms], dtype=torch.float64)
            summed: list[float] = reduction.sum(squares).sqrt().tolist()
            return summed

        norms = total([one.norm for one in loaded])
        exact = total([one.exact_norm for one in loaded]) if self._int8 else norms
        low, high = self._everyone.extremes(torch.tensor(norms, dtype=torch.float64))
        with self._everyone.together():
            for one, least, largest in zip(loaded, low.tolist(), high.tolist(), strict=True):
                if largest > (1 + _APART) * least:
                    raise DriftError(
                        f"{one.target.delta_name}: the processes of this run have different Δ, of "
                        f"‖Δ‖ from {least:.6g} to {largest:.6g}; give all of them the same delta"
                    )
            for one, norm, exact_norm in zip(loaded, norms, exact, strict=True):
                one.norm, one.exact_norm = norm, exact_norm
                self._check(one)
            return [one for one in loaded if one.norm > 0]

    def store(self, kept: Sequence[Loaded], prefetch_nbytes: int) -> Store:
        """Return a store of what was loaded.

        Raises:
            As `load_groups`, on every process if on one.
        """
        device = self.arithmetic.device
        with self._everyone.together():
            if device.type == "cuda":
                for one in kept:
                    prepare([one.shard.weight()])
            resident = [one.delta for one in kept if isinstance(one.delta, torch.Tensor)]
            elsewhere = [one.delta for one in kept if not isinstance(one.delta, torch.Tensor)]
            if not elsewhere:
                return Resident(resident, _by_layer(kept))
            return Ring(elsewhere, resident, device, prefetch_nbytes)

    def _read(self, places: Sequence[Place]) -> list[Loaded]:
        """Read all runs of elements together, and what is not a run one after the other."""
        delta = self._delta
        found: list[list[Wanted] | None] = [None] * len(places)
        if hasattr(delta, "dtype"):
            Beside.lay_out([one for one in places if isinstance(one, Beside)], _dtype_of(delta))
        if isinstance(delta, Delta) and delta.has_runs:
            found = [place.wanted(delta) for place in places]
            quick = [one for one, some in zip(places, found, strict=True) if some is not None]
            Rounded.lay_out([one for one in quick if isinstance(one, Rounded)])
            # Launchers number the processes of a host, which share its terminal.
            bar = None if os.environ.get("LOCAL_RANK", "0") == "0" else False
            with reported(bar, None) as report:
                load(delta, [one for some in found if some is not None for one in some], report)
        for place, some in zip(places, found, strict=True):
            if some is None:
                place.take(self._recent)
        self._starts.measure()
        return [place.loaded(some or []) for place, some in zip(places, found, strict=True)]

    def _place(self, target: Target, shard: Shard) -> Place:
        device = self.arithmetic.device
        if device.type != "cpu" and shard.weight().dtype == torch.float64:
            raise DriftError(
                f"{target.name} is float64 on {device}, where norms are taken in float32; "
                "train in float32 or bfloat16, or on the CPU"
            )
        small = _is_small(target, shard)
        if self._int8 and not small:
            return Rounded(target, shard, self._delta, self._rounding)
        # Beside gradients in host memory nothing is gained by copying.
        there = self._residency == "device" or (self._residency, device.type) == ("host", "cpu")
        if small or there:
            return Beside(target, shard, device, self._starts)
        if self._residency == "host":
            return OnHost(target, shard, device)
        return Unread(target, shard, device, self._starts, self._recent)

    def _check(self, one: Loaded) -> None:
        """Refuse a Δ that is not finite, or that int8 has no room for."""
        if not math.isfinite(one.norm) or not math.isfinite(one.exact_norm):
            raise NonFiniteError(
                f"{one.target.delta_name}: Δ holds NaN or infinite values, which would spread to "
                "every weight; repair the source checkpoint or leave the tensor out with "
                "modules=… or layers=…"
            )
        if self._int8 and one.norm**2 < (1 - share_lost("int8")) * one.exact_norm**2:
            raise DriftError(
                f"{one.target.delta_name}: {1 - one.norm / one.exact_norm:.1%} of ‖Δ‖ is beyond "
                f"the range of int8, as of an int8 delta (docs/format.md); attach with "
                "residency='device', 'host' or 'disk'"
            )


def _starts(kept: Sequence[Loaded]) -> torch.Tensor | None:
    """Return where all weights start along Δ, if that was measured on loading."""
    starts = [one.start for one in kept if one.start is not None]
    return torch.cat(starts) if len(starts) == len(kept) else None


def _by_layer(kept: Sequence[Loaded]) -> list[tuple[int, int]]:
    """Return runs of targets of one layer, small tensors at the end as one run."""
    marks = [
        None if _is_small(one.target, one.shard) else layer_of(one.target.delta_name)
        for one in kept
    ]
    starts = [at for at in range(len(marks)) if at == 0 or marks[at] != marks[at - 1]]
    return list(pairwise([*starts, len(marks)]))
