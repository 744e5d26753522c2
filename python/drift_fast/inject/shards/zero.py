"""Where DeepSpeed keeps each parameter's gradient and master weights just before it clips.

Owns the positions: which elements of a parameter this rank's optimizer holds, and where they lie in
DeepSpeed's buffers. Does not own the moment, which is integrations/deepspeed.py. Only positions are
kept, since DeepSpeed replaces its buffers, and DeepSpeed itself is never imported.

What a rank holds, between the last backward and the optimizer's step (DeepSpeed 0.19):

    ZeRO-1, 2     a run of elements, or none; `averaged_gradients`, with an offloaded optimizer the
                  `grad` of `single_partition_of_fp32_groups`
    ZeRO-3        a run of elements, or none; `averaged_gradients`, with an offloaded optimizer the
                  `grad` of `fp32_partitioned_groups_flat`
    BF16_Optimizer  the whole gradient, of which it steps a part; clipping measures the whole
    stage 0       the parameter's own gradient, whole

`_hp_mapping`, the published way to these fragments, is wrong under `round_robin_gradients`, where
it counts offsets in another order than the buffers have; so they are counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.shards.base import Piece, Whole

_PARTITIONED = "DeepSpeedZeroOptimizer"
_FULLY_PARTITIONED = "DeepSpeedZeroOptimizer_Stage3"
_REPLICATED = "BF16_Optimizer"
_STAGE_0 = ("FP16_Optimizer", "FP16_UnfusedOptimizer")


def is_zero(parameter: nn.Parameter) -> bool:
    """Tell whether a parameter is held by ZeRO-1, 2 or 3 or by the BF16_Optimizer."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the full shape of a parameter, which under ZeRO-3 has none of its own between uses."""
    shape = getattr(parameter, "ds_shape", None)
    return tuple(parameter.shape if shape is None else shape)


def optimizer_of(engine: Any) -> Any:
    """Return the engine's optimizer, if its gradients can be reached.

    Raises:
        TypeError: not a DeepSpeed engine.
        DriftError: a kind of training or of optimizer that is not supported, with a remedy.
    """
    kinds = {kind.__name__ for kind in type(engine).__mro__}
    if "DeepSpeedEngine" not in kinds:
        raise TypeError(f"expected a DeepSpeed engine, got {type(engine).__name__}")
    if "PipelineEngine" in kinds:
        raise _refused("pipeline parallelism", "train with ZeRO and without pipeline stages")
    if getattr(engine, "has_moe_layers", False):
        raise _refused("its mixture-of-experts layers", "train the experts with ZeRO alone")
    if engine.autotp_size() > 1 or getattr(engine, "mp_world_size", 1) > 1:
        raise _refused("its tensor parallelism", "train with ZeRO alone")
    if engine.is_deepcompile_enabled():
        raise _refused("DeepCompile", "leave compile.deepcompile out of the configuration")
    if getattr(engine, "torch_autocast_z0_gradscaler", None) is not None:
        raise _refused("torch_autocast in float16", "use bfloat16, or fp16.enabled with ZeRO")
    optimizer = engine.optimizer
    if optimizer is None:
        raise DriftError("the DeepSpeed engine has no optimizer; give one to deepspeed.initialize")
    check_optimizer(optimizer)
    return optimizer


def check_optimizer(optimizer: Any) -> None:
    """Refuse optimizers whose gradients are elsewhere, or are no gradients.

    Raises:
        DriftError: named, with a remedy.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.Optimizer):
        return
    if kind not in (_PARTITIONED, _FULLY_PARTITIONED, _REPLICATED, *_STAGE_0):
        # ZenFlow, SuperOffload and MiCS are subclasses that keep or reduce gradients otherwise.
        raise _refused(kind, "use plain ZeRO-1, 2 or 3")
    if getattr(optimizer, "has_moe_layers", False):
        raise _refused("its mixture-of-experts layers", "train the experts with ZeRO alone")
    if "muon" in type(optimizer.optimizer).__name__.lower():
        raise _refused("Muon, whose buffers hold updates and not gradients", "use Adam or SGD")
    if getattr(optimizer, "zenflow", False):
        raise _refused("ZenFlow", "leave zenflow out of the configuration")
    if getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
        # It updates its scale once for each parameter group of a step.
        raise _refused("torch_autocast in float16", "use bfloat16, or fp16.enabled")
    if getattr(optimizer, "swap_optimizer", False) or getattr(
        optimizer, "params_in_nvme_and_cpu", False
    ):
        raise _refused("offloading to NVMe", 'offload to device "cpu"')
    if getattr(optimizer, "zero_hpz_partition_size", 1) > 1:
        raise _refused("zero_hpz_partition_size", "leave it out of the configuration")
    if kind in _STAGE_0 and optimizer.loss_scale_config.use_grad_scaling:
        # `DeepSpeedEngine.backward` scales the loss for a ZeROOptimizer only.
        raise DriftError(
            "at ZeRO stage 0 in fp16 DeepSpeed 0.19 divides gradients by a loss scale that its "
            "backward did not apply, so neither they nor an injection move the weights as they "
            "should: use stage 1, or bf16"
        )


def pieces(names: Sequence[str], parameters: Sequence[nn.Parameter], optimizer: Any) -> list[Piece]:
    """Return the part of each parameter that this rank's optimizer holds.

    `optimizer` is `engine.optimizer`. Under the BF16_Optimizer every rank holds whole gradients,
    and `weight()` gathers the master weights: all ranks must call it for the same parameters in
    the same order. After `move()`, call `publish`.

    Raises:
        DriftError: an optimizer that is not supported, or that does not hold a parameter.
    """
    check_optimizer(optimizer)
    kind = type(optimizer).__name__
    try:
        places = _places(optimizer, kind)
    except AttributeError as error:
        raise DriftError(
            f"this version of DeepSpeed keeps its gradients elsewhere ({error}); 0.19 is supported"
        ) from error
    result: list[Piece] = []
    for name, parameter in zip(names, parameters, strict=True):
        if id(parameter) not in places:
            raise DriftError(
                f"{name} is not in the DeepSpeed optimizer: give the optimizer this model's "
                "parameters, or leave it out with modules=… or layers=…"
            )
        group, index, offset = places[id(parameter)]
        if kind == _PARTITIONED:
            result.append(_Partitioned(optimizer, parameter, group, offset))
        elif kind == _FULLY_PARTITIONED:
            result.append(_FullyPartitioned(optimizer, parameter, group, index, offset))
        elif kind == _REPLICATED:
            result.append(_Replicated(optimizer, parameter, group, index, offset))
        elif kind in _STAGE_0:
            result.append(_Mastered(optimizer, parameter, group, index, offset))
        else:
            result.append(Whole(parameter))
    return result


def piece(name: str, parameter: nn.Parameter, optimizer: Any = None) -> Piece:
    """Return the part of one parameter; for many, `pieces` is quicker.

    Raises:
        DriftError: as `pieces`; or no optimizer given, which only ZeRO-3 notes on its parameters.
    """
    if optimizer is None:
        optimizer = getattr(parameter, "_z3_optimizer", None)
    if optimizer is None:
        raise DriftError(
            f"{name} is held by DeepSpeed, whose engine must be known to reach its gradients: "
            "attach with drift_fast.attach(engine, delta, …) after deepspeed.initialize"
        )
    return pieces([name], [parameter], optimizer)[0]


def gradient_factor(optimizer: Any) -> float:
    """Return the factor that local gradients carry until DeepSpeed divides it out.

    It is the loss scale, 1 but for fp16. Nothing else is left in them: the loss was divided by the
    accumulation steps (`DeepSpeedEngine.backward`, unless scale_wrt_gas=False), and predivision
    and averaging cancel within the reduction (`average_tensor`, `gradient_reduction_w_predivide`;
    `__avg_scatter_grads`). DeepSpeed divides by it together with the clipping factor
    (`unscale_and_clip_grads`).
    """
    if type(optimizer).__name__ in (_PARTITIONED, _FULLY_PARTITIONED):
        return float(optimizer.loss_scale)
    return 1.0


def settle(optimizer: Any) -> None:
    """Wait for copies of gradients to host memory, which ZeRO-1 and 2 leave to their step."""
    wait = getattr(optimizer, "_wait_for_offload_copies", None)
    if wait is not None:
        wait()


@torch.no_grad()
def publish(optimizer: Any) -> None:
    """Give every rank the weights that `move()` changed on their owners; all ranks must call it."""
    kind = type(optimizer).__name__
    if kind in (_PARTITIONED, _REPLICATED):
        optimizer.update_lp_params()
    elif kind == _FULLY_PARTITIONED and optimizer.persistent_parameters:
        # Small parameters stay gathered between steps; they are released and gathered again.
        persistent = optimizer.persistent_parameters
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def _places(optimizer: Any, kind: str) -> dict[int, tuple[int, int, int]]:
    """Return parameter group, place in it and offset, by the parameter's id.

    The offset is in the group's flat buffer before it is partitioned, under ZeRO-3 in this rank's
    partition.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return {id(parameter): (0, 0, 0) for parameter in held}
    places = {}
    if kind == _PARTITIONED:
        groups = optimizer.round_robin_bit16_groups
    elif kind == _REPLICATED:
        groups = optimizer.bf16_groups
    else:
        groups = optimizer.fp16_groups
    for group, parameters in enumerate(groups):
        offset = 0
        for index, parameter in enumerate(parameters):
            if kind == _PARTITIONED:
                # Parameters may be padded to an alignment.
                offset = int(optimizer.round_robin_bit16_offsets[group][index])
            places[id(parameter)] = (group, index, offset)
            local = kind == _FULLY_PARTITIONED
            offset += parameter.partition_numel() if local else parameter.numel()
    return places


class _Part:
    """Elements [start, stop) of a parameter, which lie at `offset` of this rank's partition."""

    def __init__(self, span: tuple[int, int], offset: int, group: Any) -> None:
        self.span = span
        self.groups: tuple[Any, ...] = (group,) if dist.get_world_size(group) > 1 else ()
        self._offset = offset
        self._numel = span[1] - span[0]

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1)[slice(*self.span)]

    def _of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.detach().view(-1).narrow(0, self._offset, self._numel)


class _Partitioned(_Part):
    """ZeRO-1 and 2: each parameter group is one flat buffer, cut into equal partitions."""

    kind = "DeepSpeed ZeRO-1 or 2"

    def __init__(self, optimizer: Any, parameter: nn.Parameter, group: int, offset: int) -> None:
        processes = optimizer.real_dp_process_group[group]
        self._rank = dist.get_rank(processes)
        size = int(optimizer.partition_size[group])
        span, local = _overlap(offset, parameter.numel(), self._rank * size, size)
        super().__init__(span, local, processes)
        self._optimizer = optimizer
        self._group = group
        self._key = optimizer.get_param_id(parameter)
        self._entry: tuple[int, int] | None = None

    def gradient(self) -> torch.Tensor | None:
        """Return the fragment; where a parameter took no part in the loss, zeros or None."""
        if self._optimizer.cpu_offload:
            # What took no part has no norm here, and whatever was there before in the buffer.
            if self._numel and self._key not in self._optimizer.norm_for_param_grads:
                return None
            return self._of(self._optimizer.single_partition_of_fp32_groups[self._group].grad)
        entries = self._optimizer.averaged_gradients.get(self._group)
        if entries is None:
            return None
        flat = getattr(entries, "flat_partition", None)
        if flat is not None:
            return self._of(flat)
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
            "partition: this version of DeepSpeed lays them out otherwise; 0.19 is supported"
        )

    def store(self, gradient: torch.Tensor) -> None:
        """Let clipping see the change: with offload its norms were taken during backward."""
        if self._optimizer.cpu_offload and self._numel:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            self._optimizer.norm_for_param_grads[self._key] = norm
            if not torch.isfinite(norm):
                self._optimizer.local_overflow = True

    def weight(self) -> torch.Tensor:
        return self._of(self._optimizer.single_partition_of_fp32_groups[self._group])

    def move(self, weight: torch.Tensor) -> None:
        self.weight().copy_(weight)
        partitions = self._optimizer.parallel_partitioned_bit16_groups[self._group]
        self._of(partitions[self._rank]).copy_(weight)


class _FullyPartitioned(_Part):
    """ZeRO-3: each parameter is cut into equal parts of its own, the last ones padded or empty."""

    kind = "DeepSpeed ZeRO-3"

    def __init__(
        self, optimizer: Any, parameter: nn.Parameter, group: int, index: int, offset: int
    ) -> None:
        zero: Any = parameter
        processes = getattr(zero, "ds_process_group", optimizer.dp_process_group)
        size, total = int(zero.partition_numel()), int(zero.ds_numel)
        start = min(dist.get_rank(processes) * size, total)
        super().__init__((start, min(start + size, total)), offset, processes)
        self._optimizer = optimizer
        self._parameter = zero
        self._group = group
        self._index = index
        self._key = optimizer.get_param_id(parameter)

    def gradient(self) -> torch.Tensor | None:
        """Return the fragment, None where the parameter took no part in the loss."""
        optimizer = self._optimizer
        # The buffer of what took no part keeps whatever was there before.
        if self._numel and self._parameter.ds_id not in optimizer._offload_boundary_param_ids:
            return None
        if optimizer.offload_optimizer:
            return self._of(optimizer.fp32_partitioned_groups_flat[self._group].grad)
        entries = optimizer.averaged_gradients.get(self._group)
        if entries is None:
            return None
        fragment: torch.Tensor = entries[self._index]
        return fragment.detach().view(-1).narrow(0, 0, self._numel)

    def store(self, gradient: torch.Tensor) -> None:
        """Let clipping see the change: with offload its norms were taken during backward."""
        if self._optimizer.offload_optimizer and self._numel:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            self._optimizer.norm_for_param_grads[self._key] = norm

    def weight(self) -> torch.Tensor:
        return self._of(self._optimizer.fp32_partitioned_groups_flat[self._group])

    def move(self, weight: torch.Tensor) -> None:
        self.weight().copy_(weight)
        flat = self._of(self._optimizer.fp16_partitioned_groups_flat[self._group])
        flat.copy_(weight)
        held = self._parameter.ds_tensor.detach().view(-1).narrow(0, 0, self._numel)
        if held.data_ptr() != flat.data_ptr():
            held.copy_(weight)


class _Replicated(Whole):
    """The BF16_Optimizer: whole float32 gradients everywhere, master weights partitioned.

    The whole gradient is injected on every rank alike, because clipping takes each rank's own norm
    of all of it.
    """

    kind = "DeepSpeed's BF16_Optimizer"

    def __init__(
        self, optimizer: Any, parameter: nn.Parameter, group: int, index: int, offset: int
    ) -> None:
        super().__init__(parameter)
        self._optimizer = optimizer
        self._group = group
        self._index = index
        self._processes = optimizer.real_dp_process_group[group]
        size = optimizer.fp32_groups_flat_partition[group].numel()
        rank = dist.get_rank(self._processes)
        owned, local = _overlap(offset, parameter.numel(), rank * size, size)
        self._owned = _Part(owned, local, self._processes)

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
        if self._owned.groups:
            dist.all_reduce(whole, group=self._processes)
        return whole

    def move(self, weight: torch.Tensor) -> None:
        self._master().copy_(self._owned.cut(weight))
        self.parameter.detach().copy_(weight)

    def _master(self) -> torch.Tensor:
        return self._owned._of(self._optimizer.fp32_groups_flat_partition[self._group])


class _Mastered(Whole):
    """Stage 0 in bf16: the parameter's own gradient, and float32 master weights beside it."""

    kind = "DeepSpeed in bf16"

    def __init__(
        self, optimizer: Any, parameter: nn.Parameter, group: int, index: int, offset: int
    ) -> None:
        super().__init__(parameter)
        self._optimizer = optimizer
        self._group = group
        self._index = index
        self._offset = offset

    def weight(self) -> torch.Tensor:
        separate = getattr(self._optimizer, "fp32_groups", None)
        if separate is not None:
            master: torch.Tensor = separate[self._group][self._index]
            return master.detach()
        flat: torch.Tensor = self._optimizer.fp32_groups_flat[self._group]
        part = flat.detach().narrow(0, self._offset, self.parameter.numel())
        return part.view(self.parameter.shape)

    def move(self, weight: torch.Tensor) -> None:
        self.weight().copy_(weight)
        self.parameter.detach().copy_(weight)


def _overlap(offset: int, numel: int, start: int, size: int) -> tuple[tuple[int, int], int]:
    """Return which elements of a parameter lie in a partition, and where in it the first one does.

    The parameter takes [offset, offset + numel) of a flat buffer, the partition [start, start +
    size). Where they do not meet, the run is empty and its place 0.
    """
    first, last = max(offset, start), min(offset + numel, start + size)
    if first >= last:
        edge = 0 if offset >= start else numel
        return (edge, edge), 0
    return (first - offset, last - offset), first - start


def _refused(what: str, remedy: str) -> DriftError:
    return DriftError(
        f"DeepSpeed runs {what}, where this version cannot reach the gradients: {remedy}"
    )
