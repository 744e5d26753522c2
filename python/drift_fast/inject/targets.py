"""Which parameter of a running model each tensor of a delta belongs to.

Names in memory differ from names on disk and change with wrappers, so they are aligned like two
checkpoints are. A target exists, has the delta's shape, is trained, and is targeted once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from drift_fast import _core
from drift_fast.coverage import NOT_SELECTED, Coverage, listed
from drift_fast.errors import AlignmentError, CoverageError, DriftError
from drift_fast.select import EVERYTHING, Selection


class DeltaLike(Protocol):
    """What an injection needs of a delta."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def __getitem__(self, name: str, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Target:
    """One parameter and the tensor of the delta that is injected into it."""

    name: str
    delta_name: str
    parameter: nn.Parameter


def match_parameters(model: nn.Module, delta: DeltaLike) -> dict[str, str]:
    """Return runtime parameter name → delta tensor name for every tensor of the delta.

    Nothing is attached. Names are those of `model.named_parameters()`, wrappers included.

    Raises:
        CoverageError: a tensor of the delta that has no parameter of its name and shape.
        AlignmentError: two parts of the model fit equally well.
    """
    targets, _ = find_targets(model, delta, Selection.parse(EVERYTHING, None), strict=True)
    return {target.name: target.delta_name for target in targets}


def find_targets(
    model: nn.Module,
    delta: DeltaLike,
    selection: Selection,
    *,
    strict: bool,
    min_coverage: float = 1.0,
) -> tuple[list[Target], Coverage]:
    """Return the targets and an account of the delta's tensors and the model's parameters.

    Raises:
        CoverageError: what is selected is not there, in full or up to `min_coverage`.
        AlignmentError: two parts of the model fit equally well.
        DriftError: two tensors of the delta meet in one parameter (tied weights).
    """
    refuse_sharded(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not parameters:
        raise CoverageError(f"{type(model).__name__} has no parameters to inject into")
    shapes = delta.shapes
    selection.check_layers(shapes)
    wanted = {name: shape for name, shape in shapes.items() if name in selection}
    if not wanted:
        raise CoverageError(f"{selection} selects none of the delta's {len(shapes)} tensors")
    try:
        aligned = _core.align(
            [(name, list(shape)) for name, shape in shapes.items()],
            [(name, list(parameter.shape)) for name, parameter in parameters.items()],
            prefer_equal_names=True,
        )
    except AlignmentError as error:
        if "two pairings fit" in str(error):
            raise
        raise CoverageError(
            f"none of the delta's {len(wanted)} tensors has a parameter in {type(model).__name__}: "
            f"{error}"
        ) from error
    pairs = [(left, right) for left, right in aligned.pairs if left in wanted]
    missing = [item for item in aligned.unmatched_left if item[0] in wanted]
    matched_numel = sum(parameters[right].numel() for _, right in pairs)
    missing_numel = sum(torch.Size(wanted[name]).numel() for name, _ in missing)
    coverage = Coverage(
        matched=pairs,
        unmatched_reasoning=missing
        + [(name, NOT_SELECTED) for name in shapes if name not in wanted],
        unmatched_multimodal=[
            (name, reason) for name, reason in aligned.unmatched_right if name in parameters
        ],
        matched_numel=matched_numel,
        selected_numel=matched_numel + missing_numel,
    )
    if not pairs or (missing and strict) or coverage.fraction < min_coverage:
        raise CoverageError(
            f"{len(missing)} of the delta's {len(wanted)} selected tensors have no parameter in "
            f"{type(model).__name__} ({coverage.fraction:.1%} covered):{listed(missing)}\n"
            "Compute the delta from the checkpoint that this model was loaded from, or pass "
            "strict=False (and no higher min_coverage) to inject only what fits"
        )
    _refuse_tied(pairs, parameters)
    return [Target(right, left, parameters[right]) for left, right in pairs], coverage


def _refuse_tied(pairs: Sequence[tuple[str, str]], parameters: Mapping[str, nn.Parameter]) -> None:
    seen: dict[int, str] = {}
    for left, right in pairs:
        other = seen.setdefault(id(parameters[right]), left)
        if other != left:
            raise DriftError(
                f"{other} and {left} of the delta are one tied parameter of the model, {right}; "
                "leave one of them out of the selection (modules=…)"
            )


def check_trained(targets: Sequence[Target]) -> None:
    """Refuse frozen targets.

    Raises:
        DriftError: a target does not require a gradient.
    """
    frozen = [target.name for target in targets if not target.parameter.requires_grad]
    if frozen:
        adapted = any(".base_layer." in name for name in frozen)
        remedy = (
            "it is wrapped by an adapter (LoRA), whose factors this version cannot inject into; "
            "train the full parameters"
            if adapted
            else "unfreeze it, or leave it out with modules=… or layers=…"
        )
        raise DriftError(
            f"{len(frozen)} of {len(targets)} targets are frozen (requires_grad is False), "
            f"{frozen[0]} first: {remedy}"
        )


def check_optimized(targets: Sequence[Target], optimizer: torch.optim.Optimizer) -> None:
    """Refuse targets that the optimizer does not step.

    Raises:
        DriftError: a target is in none of its parameter groups.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    absent = [target.name for target in targets if id(target.parameter) not in held]
    if absent:
        raise DriftError(
            f"{len(absent)} of {len(targets)} targets are not in the optimizer, {absent[0]} first: "
            "build the optimizer from this model's parameters, or leave them out with modules=… "
            "or layers=…"
        )


_WHOLE_ONLY = (
    'this version injects into whole parameters, and scope="microbatch" never could do otherwise: '
    "train with DDP or on one device"
)


def refuse_sharded(model: nn.Module) -> None:
    """Refuse models whose parameters are spread over processes; a shard's norm is not the whole's.

    Raises:
        DriftError: DTensor parameters (FSDP2, tensor parallelism), FSDP1 modules, or ZeRO-3.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise DriftError(
                "the model is wrapped by FSDP1, which sees only shards of flattened parameters; "
                + _WHOLE_ONLY
            )
    for name, parameter in model.named_parameters():
        kind = None
        if hasattr(parameter, "device_mesh"):
            kind = "a DTensor (FSDP2 or tensor parallelism)"
        elif hasattr(parameter, "ds_id"):
            kind = "sharded by DeepSpeed ZeRO-3"
        if kind is not None:
            raise DriftError(
                f"{name} is {kind}, of which this process holds only a part; {_WHOLE_ONLY}"
            )
