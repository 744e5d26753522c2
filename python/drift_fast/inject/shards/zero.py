"""Shards of DeepSpeed: where it keeps each parameter's gradient and master weights before it clips.

Owns the positions: which elements of a parameter this rank's optimizer holds, and their offset in
DeepSpeed's buffers. When they are used is decided in integrations/deepspeed_engine.py, and what is
supported in zero_support.py. Only positions are kept, since DeepSpeed replaces its buffers, and
DeepSpeed itself is never imported.

What a rank holds, between the last backward and the optimizer's step (DeepSpeed 0.19):

    ZeRO-1, 2     a run of elements, or none; `averaged_gradients`, with an offloaded optimizer the
                  `grad` of `single_partition_of_fp32_groups`
    ZeRO-3        a run of elements, or none; `averaged_gradients`, with an offloaded optimizer the
                  `grad` of `fp32_partitioned_groups_flat`
    BF16_Optimizer  the whole gradient, of which it steps a part; clipping measures the whole
    stage 0       the parameter's own gradient, whole

`_hp_mapping`, the published way to these fragments, is wrong under `round_robin_gradients`: it
counts offsets in another order than the buffers have, hence they are counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.shards.base import Shard, Whole
from drift_fast.inject.shards.zero_support import (
    FULLY_PARTITIONED,
    PARTITIONED,
    REPLICATED,
    STAGE_0,
    check_optimizer,
)


@dataclass(frozen=True)
class _Place:
    """Where an optimizer holds a parameter.

    `offset` counts in the parameter group's flat buffer before it is partitioned, under ZeRO-3 in
    this rank's partition.
    """

    group: int
    index: int
    offset: int


def shards(names: Sequence[str], parameters: Sequence[nn.Parameter], optimizer: Any) -> list[Shard]:
    """Return the part of each parameter that this rank's optimizer holds.

    `optimizer` is `engine.optimizer`. Under the BF16_Optimizer every rank holds whole gradients,
    and `weight()` gathers the master weights: all ranks must call it for the same parameters in
    the same order. After `write_weight()`, call `publish`.

    Raises:
        DriftError: an optimizer that is not supported, or that does not hold a parameter.
    """
    check_optimizer(optimizer)
    try:
        places = _places(optimizer)
    except AttributeError as error:
        raise DriftError(
            f"this version of DeepSpeed keeps its gradients elsewhere ({error}); 0.19 is supported"
        ) from error
    make = _KINDS.get(type(optimizer).__name__)
    result: list[Shard] = []
    for name, parameter in zip(names, parameters, strict=True):
        if id(parameter) not in places and not parameter.requires_grad:
            # A factor that stays as it is beside one that trains.
            result.append(_Frozen(parameter) if hasattr(parameter, "ds_id") else Whole(parameter))
            continue
        if id(parameter) not in places:
            raise DriftError(
                f"{name} is not in the DeepSpeed optimizer: give the optimizer this model's "
                "parameters, or leave it out with modules=… or layers=…"
            )
        if make is None:
            result.append(Whole(parameter))
        else:
            result.append(make(optimizer, parameter, places[id(parameter)]))
    return result


def shard_without_engine(name: str, parameter: nn.Parameter) -> Shard:
    """Return the part of a parameter whose optimizer is not given; ZeRO-3 notes it on parameters.

    Raises:
        DriftError: as `shards`, or a parameter of another stage.
    """
    optimizer = getattr(parameter, "_z3_optimizer", None)
    if optimizer is None:
        raise DriftError(
            f"{name} is held by DeepSpeed, and only its engine leads to its gradients: attach with "
            "drift_fast.attach(engine, delta, …) after deepspeed.initialize"
        )
    return shards([name], [parameter], optimizer)[0]


def gradient_factor(optimizer: Any) -> float:
    """Return the factor that local gradients carry until DeepSpeed divides it out.

    It is the loss scale, 1 except in fp16. Nothing else is left in them: the loss was divided by
    the accumulation steps (`DeepSpeedEngine.backward`, unless scale_wrt_gas=False), and predivision
    and averaging cancel within the reduction (`average_tensor`, `gradient_reduction_w_predivide`;
    `__avg_scatter_grads`). DeepSpeed divides by it together with the clipping factor
    (`unscale_and_clip_grads`).
    """
    if type(optimizer).__name__ in (PARTITIONED, FULLY_PARTITIONED):
        return float(optimizer.loss_scale)
    return 1.0


def settle(optimizer: Any) -> None:
    """Wait for copies of gradients to host memory, which ZeRO-1 and 2 leave to their step."""
    wait = getattr(optimizer, "_wait_for_offload_copies", None)
    if wait is not None:
        wait()


def forget(optimizer: Any) -> None:
    """Drop what backward left, so that the next one starts anew, as after a step."""
    settle(optimizer)
    kind = type(optimizer).__name__
    if kind == PARTITIONED:
        # The first backward after a step counts up from here.
        optimizer.micro_step_id = -1
        optimizer.averaged_gradients = {}
        optimizer._offload_accumulated_param_ids = set()
    elif kind == FULLY_PARTITIONED:
        optimizer.averaged_gradients = {}
        optimizer._offload_boundary_param_ids = set()
    elif kind == REPLICATED:
        optimizer.clear_hp_grads()
    if kind in (PARTITIONED, FULLY_PARTITIONED):
        optimizer.norm_for_param_grads = {}
    optimizer.zero_grad()


@torch.no_grad()
def publish(optimizer: Any) -> None:
    """Give every rank the weights that their owners changed; all ranks must call it."""
    kind = type(optimizer).__name__
    if kind in (PARTITIONED, REPLICATED):
        optimizer.update_lp_params()
    elif kind == FULLY_PARTITIONED and optimizer.persistent_parameters:
        # Small parameters stay gathered between steps; they are released and gathered again.
        persistent = optimizer.persistent_parameters
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def _places(optimizer: Any) -> dict[int, _Place]:
    """Return where the optimizer holds each parameter, by the parameter's id."""
    if isinstance(optimizer, torch.optim.Optimizer):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return {id(parameter): _Place(0, 0, 0) for parameter in held}
    kind = type(optimizer).__name__
    places = {}
    if kind == PARTITIONED:
        groups = optimizer.round_robin_bit16_groups
    elif kind == REPLICATED:
        groups = optimizer.bf16_groups
    else:
        groups = optimizer.fp16_groups
    for group, parameters in enumerate(groups):
        offset = 0
        for index, parameter in enumerate(parameters):
            if kind == PARTITIONED:
                # Parameters may be padded to an alignment.
                offset = int(optimizer.round_robin_bit16_offsets[group][index])
            places[id(parameter)] = _Place(group, index, offset)
            local = kind == FULLY_PARTITIONED
            offset += parameter.partition_numel() if local else parameter.numel()
    return places


class _Run:
    """Elements [start, stop) of a parameter, found at `offset` of this rank's partition."""

    gathers = False
    accumulated: tuple[torch.Tensor, ...] = ()

    def __init__(self, span: tuple[int, int], offset: int, group: Any) -> None:
        self.span = span
        self.process_groups: tuple[Any, ...] = (group,) if dist.get_world_size(group) > 1 else ()
        self._offset = offset
        self._numel = span[1] - span[0]

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1)[slice(*self.span)]

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the elements' view of a partition's flat buffer."""
        return flat.detach().view(-1).narrow(0, self._offset, self._numel)


class _Partitioned(_Run):
    """ZeRO-1 and 2: each parameter group is one flat buffer, cut into equal partitions."""

    sharding = "DeepSpeed ZeRO-1 or 2"

    def __init__(self, optimizer: Any, parameter: nn.Parameter, place: _Place) -> None:
        processes = optimizer.real_dp_process_group[place.group]
        self._rank = dist.get_rank(processes)
        size = int(optimizer.partition_size[place.group])
        span, local = _overlap(place.offset, parameter.numel(), self._rank * size, size)
        super().__init__(span, local, processes)
        self._optimizer = optimizer
        self._group = place.group
        self._key = optimizer.get_param_id(parameter)
        self._entry: tuple[int, int] | None = None

    def gradient(self) -> torch.Tensor | None:
        """Return the fragment; where a parameter took no part in the loss, zeros or None."""
        if self._optimizer.cpu_offload:
            # What took no part has no norm here, and whatever was there before in the buffer.
            if self._numel and self._key not in self._optimizer.norm_for_param_grads:
                return None
            return self.of(self._optimizer.single_partition_of_fp32_groups[self._group].grad)
        entries = self._optimizer.averaged_gradients.get(self._group)
        if entries is None:
            return None
        flat = getattr(entries, "flat_partition", None)
        if flat is not None:
            return self.of(flat)
        if self._numel == 0:
            return torch.empty(0, dtype=entries[0].dtype, device=entries[0].device)
        fragment: torch.Tensor = entries[self._find(entries)]
        return fragment.detach()

    def _find(self, entries: Sequence[torch.Tensor]) -> int:
        """Return the place of the fragment in a list of consecutive ones, alike at every step."""
        if self._entry is not None:
            count, at = self._entry
            if count == len(entries) and entries[at].numel() == self._numel:
                return at
        offset = 0
        for at, entry in enumerate(entries):
            if offset == self._offset and entry.numel() == self._numel:
                self._entry = len(entries), at
                return at
            offset += entry.numel()
        raise DriftError(
            f"no fragment of {self._numel} elements at {self._offset} of DeepSpeed's gradient "
            "partition: this version of DeepSpeed uses a different layout; 0.19 is supported"
        )

    def write_gradient(self, gradient: torch.Tensor) -> None:
        """Let clipping see the change: with offload its norms were taken during backward."""
        if self._optimizer.cpu_offload and self._numel:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            self._optimizer.norm_for_param_grads[self._key] = norm
            if not torch.isfinite(norm):
                self._optimizer.local_overflow = True

    def weight(self) -> torch.Tensor:
        return self.of(self._optimizer.single_partition_of_fp32_groups[self._group])

    def write_weight(self, weight: torch.Tensor) -> None:
        self.weight().copy_(weight)
        partitions = self._optimizer.parallel_partitioned_bit16_groups[self._group]
        self.of(partitions[self._rank]).copy_(weight)


class _FullyPartitioned(_Run):
    """ZeRO-3: each parameter is cut into equal parts, the last ones padded or empty."""

    sharding = "DeepSpeed ZeRO-3"

    def __init__(self, optimizer: Any, parameter: nn.Parameter, place: _Place) -> None:
        zero: Any = parameter
        processes = getattr(zero, "ds_process_group", optimizer.dp_process_group)
        size, total = int(zero.partition_numel()), int(zero.ds_numel)
        start = min(dist.get_rank(processes) * size, total)
        super().__init__((start, min(start + size, total)), place.offset, processes)
        self._optimizer = optimizer
        self._parameter = zero
        self._group = place.group
        self._index = place.index
        self._key = optimizer.get_param_id(parameter)

    def gradient(self) -> torch.Tensor | None:
        """Return the fragment, None where the parameter took no part in the loss."""
        optimizer = self._optimizer
        # The buffer of what took no part keeps whatever was there before.
        if self._numel and self._parameter.ds_id not in optimizer._offload_boundary_param_ids:
            return None
        if optimizer.offload_optimizer:
            return self.of(optimizer.fp32_partitioned_groups_flat[self._group].grad)
        entries = optimizer.averaged_gradients.get(self._group)
        if entries is None:
            return None
        fragment: torch.Tensor = entries[self._index]
        return fragment.detach().view(-1).narrow(0, 0, self._numel)

    def write_gradient(self, gradient: torch.Tensor) -> None:
        """Let clipping see the change: with offload its norms were taken during backward."""
        if self._optimizer.offload_optimizer and self._numel:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            self._optimizer.norm_for_param_grads[self._key] = norm

    def weight(self) -> torch.Tensor:
        return self.of(self._optimizer.fp32_partitioned_groups_flat[self._group])

    def write_weight(self, weight: torch.Tensor) -> None:
        self.weight().copy_(weight)
        flat = self.of(self._optimizer.fp16_partitioned_groups_flat[self._group])
        flat.copy_(weight)
        held = self._parameter.ds_tensor.detach().view(-1).narrow(0, 0, self._numel)
        if held.data_ptr() != flat.data_ptr():
            held.copy_(weight)


class _Frozen(_Run):
    """A parameter that ZeRO-3 partitions and no optimizer holds."""

    sharding = "DeepSpeed ZeRO-3"

    def __init__(self, parameter: Any) -> None:
        group, size = parameter.ds_process_group, int(parameter.partition_numel())
        start = min(dist.get_rank(group) * size, int(parameter.ds_numel))
        super().__init__((start, min(start + size, int(parameter.ds_numel))), 0, group)
        self._parameter = parameter

    def gradient(self) -> torch.Tensor | None:
        return None

    def write_gradient(self, gradient: torch.Tensor) -> None:
        pass

    def weight(self) -> torch.Tensor:
        return self.of(self._parameter.ds_tensor)

    def write_weight(self, weight: torch.Tensor) -> None:
        self.weight().copy_(weight)


class _Replicated(Whole):
    """The BF16_Optimizer: whole float32 gradients everywhere, master weights partitioned.

    Every rank injects into the whole gradient alike, because it clips by its own norm of all of it.
    """

    sharding = "DeepSpeed's BF16_Optimizer"
    gathers = True

    def __init__(self, optimizer: Any, parameter: nn.Parameter, place: _Place) -> None:
        super().__init__(parameter)
        self._optimizer = optimizer
        self._group = place.group
        self._index = place.index
        self._processes = optimizer.real_dp_process_group[place.group]
        size = optimizer.fp32_groups_flat_partition[place.group].numel()
        rank = dist.get_rank(self._processes)
        owned, local = _overlap(place.offset, parameter.numel(), rank * size, size)
        self._owned = _Run(owned, local, self._processes)

    def gradient(self) -> torch.Tensor | None:
        if not self._optimizer.fp32_groups_has_gradients[self._group][self._index]:
            return None
        gradient: torch.Tensor = self._optimizer.fp32_groups_gradients[self._group][self._index]
        return gradient

    @torch.no_grad()
    def weight(self) -> torch.Tensor:
        """Return the master weights, gathered from all ranks, which must all call this."""
        whole = torch.zeros_like(self.parameter, dtype=torch.float32)
        self._owned.cut(whole).copy_(self._master())
        if self._owned.process_groups:
            dist.all_reduce(whole, group=self._processes)
        return whole

    def write_weight(self, weight: torch.Tensor) -> None:
        self._master().copy_(self._owned.cut(weight))
        self.parameter.detach().copy_(weight)

    def _master(self) -> torch.Tensor:
        return self._owned.of(self._optimizer.fp32_groups_flat_partition[self._group])


class _Mastered(Whole):
    """Stage 0 in bf16: the parameter's own gradient, and float32 master weights beside it."""

    sharding = "DeepSpeed in bf16"

    def __init__(self, optimizer: Any, parameter: nn.Parameter, place: _Place) -> None:
        super().__init__(parameter)
        self._optimizer = optimizer
        self._place = place

    def weight(self) -> torch.Tensor:
        separate = getattr(self._optimizer, "fp32_groups", None)
        if separate is not None:
            master: torch.Tensor = separate[self._place.group][self._place.index]
            return master.detach()
        flat: torch.Tensor = self._optimizer.fp32_groups_flat[self._place.group]
        part = flat.detach().narrow(0, self._place.offset, self.parameter.numel())
        return part.view(self.parameter.shape)

    def write_weight(self, weight: torch.Tensor) -> None:
        self.weight().copy_(weight)
        self.parameter.detach().copy_(weight)


def _overlap(offset: int, numel: int, start: int, size: int) -> tuple[tuple[int, int], int]:
    """Return which elements of a parameter a partition holds, and the place of the first in it.

    The parameter takes [offset, offset + numel) of a flat buffer, the partition [start, start +
    size). Where they do not meet, the run is empty and its place 0.
    """
    first, last = max(offset, start), min(offset + numel, start + size)
    if first >= last:
        edge = 0 if offset >= start else numel
        return (edge, edge), 0
    return (first - offset, last - offset), first - start


_KINDS: dict[str, Any] = {
    PARTITIONED: _Partitioned,
    FULLY_PARTITIONED: _FullyPartitioned,
    REPLICATED: _Replicated,
} | dict.fromkeys(STAGE_0, _Mastered)
