"""Which parameter of a running model each tensor of a delta belongs to.

Names in memory differ from names on disk and change with wrappers, and experts or projections that
lie apart on disk are one parameter in memory, so they are matched like two checkpoints are. A
target exists, has the delta's shape, is trained, and is targeted once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from drift_fast.alignment.coverage import NOT_SELECTED, Coverage, backbone_numel, listed
from drift_fast.alignment.layout import Layout, Rectangle
from drift_fast.alignment.mapping import RUNTIME, MappingLike
from drift_fast.alignment.match import match
from drift_fast.alignment.name_alignment import Pair, TensorIndex
from drift_fast.alignment.stated import LEFT_OUT
from drift_fast.alignment.transformers_layout import convert
from drift_fast.delta.delta import Delta
from drift_fast.errors import AlignmentError, AmbiguousAlignmentError, CoverageError, DriftError
from drift_fast.inject.config import TargetOptions
from drift_fast.inject.lora.adapters import (
    FROZEN,
    FROZEN_BIAS,
    Adapted,
    Adapters,
    adapters_of,
    stored_shape,
)
from drift_fast.inject.shards.base import Cut, Shard
from drift_fast.inject.shards.find import parameters_of
from drift_fast.names import container_of
from drift_fast.shapes import matrix


class DeltaLike(Protocol):
    """What an injection needs of a delta."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def __getitem__(self, name: str, /) -> torch.Tensor: ...


def opened(delta: DeltaLike | str | os.PathLike[str]) -> DeltaLike:
    """Return a delta, opened from its directory if that is given.

    Raises:
        FileNotFoundError, CheckpointError: no whole delta there.
        TypeError: neither a delta nor a path.
    """
    if isinstance(delta, str | os.PathLike):
        return Delta.open(delta)
    if not hasattr(delta, "shapes") or not hasattr(delta, "__getitem__"):
        raise TypeError(
            f"expected a Delta or the directory of one, got {type(delta).__name__}; "
            "compute_delta(…) and Delta.open(…) return one"
        )
    return delta


class Recent:
    """A delta that keeps the last two tensors that were read in parts.

    Experts that are fused on disk and apart in memory ask for the same two over and over.
    """

    def __init__(self, delta: DeltaLike) -> None:
        self._delta = delta
        self._kept: dict[str, torch.Tensor] = {}

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor for the caller to keep."""
        return self._delta[name]

    def run(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) of a tensor in row-major order, for the caller to keep."""
        if isinstance(self._delta, Delta):
            tensor = torch.empty(stop - start, dtype=getattr(torch, self._delta.dtype))
            self._delta.read_into(name, tensor, start=start)
            return tensor
        return self._delta[name].reshape(-1)[start:stop].clone()

    def into(self, name: str, start: int, out: torch.Tensor) -> bool:
        """Fill a flat tensor with elements from `start` on; say whether the delta can do that."""
        if not isinstance(self._delta, Delta):
            return False
        self._delta.read_into(name, out, start=start)
        return True

    def part(self, name: str) -> torch.Tensor:
        """Return a tensor to copy from."""
        if name not in self._kept:
            while len(self._kept) >= 2:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = self._delta[name]
        return self._kept[name]


@dataclass(frozen=True)
class Target:
    """One weight, and the tensors of the delta that are injected into it, whole or in parts.

    Of an adapted weight, `parameter` is the first of the factors that train in its stead.
    """

    name: str
    sources: tuple[str, ...]
    parts: tuple[Rectangle, ...]
    parameter: nn.Parameter
    shape: tuple[int, ...]
    adapted: Adapted | None = None

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the optimizer steps."""
        return (self.parameter,) if self.adapted is None else self.adapted.trained

    @property
    def delta_name(self) -> str:
        """The delta's name, of several the first."""
        return self.sources[0]

    def numel(self, shard: Shard) -> int:
        """Return how many elements this process holds."""
        if shard.span is not None:
            return shard.span[1] - shard.span[0]
        return shard.weight().numel() if shard.process_groups else math.prod(self.shape)

    def read(self, delta: Recent, shard: Cut) -> torch.Tensor:
        """Return the part of Δ that this process holds, flat, in the delta's dtype, on the CPU.

        Only that part is read where it is a run of rows. Where Δ lies in parts, two of its sources
        at most are held beside the result.
        """
        if not self.parts and shard.span is not None:
            return delta.run(self.delta_name, *shard.span)
        whole = delta.whole(self.delta_name) if not self.parts else self._composed(delta)
        local = shard.cut(whole)
        # A part must not keep the whole alive.
        if local.numel() == whole.numel():
            return local.reshape(-1)
        return local.clone(memory_format=torch.contiguous_format).view(-1)

    def read_into(self, delta: Recent, shard: Shard, out: torch.Tensor) -> None:
        """Fill a flat CPU tensor, page-locked or not, with the part that this process holds."""
        whole = shard.span is None and not shard.process_groups
        if not self.parts and (whole or shard.span is not None):
            start = 0 if shard.span is None else shard.span[0]
            if delta.into(self.delta_name, start, out):
                return
        out.copy_(self.read(delta, shard))

    def _composed(self, delta: Recent) -> torch.Tensor:
        result: torch.Tensor | None = None
        for source in self.sources:
            stored = delta.part(source).reshape(-1)
            if result is None:
                result = torch.empty(self.shape, dtype=stored.dtype)
            rows = result.view(matrix(self.shape))
            for name, top, bottom, left, right, offset, down, across in self.parts:
                if name == source:
                    box = (bottom - top, right - left)
                    values = torch.as_strided(stored, box, (down, across), offset)
                    rows[top:bottom, left:right].copy_(values)
        if result is None:
            raise DriftError(f"{self.name} has no tensor of the delta")
        return result


def match_parameters(
    model: nn.Module,
    delta: DeltaLike | str | os.PathLike[str],
    *,
    mapping: MappingLike | None = None,
) -> dict[str, str]:
    """Return runtime parameter name → delta tensor name for every tensor of the delta.

    Nothing is attached. Names are those of `model.named_parameters()`, wrappers included; a
    parameter that several tensors make up is given with the first of them.

    Raises:
        CoverageError: a tensor of the delta that has no parameter of its name and shape.
        AlignmentError: two parts of the model fit equally well, or a mapping that does not hold.
    """
    targets, _ = find_targets(model, opened(delta), TargetOptions(mapping=mapping))
    return {target.name: target.delta_name for target in targets}


def find_targets(
    model: nn.Module,
    delta: DeltaLike,
    options: TargetOptions,
) -> tuple[list[Target], Coverage]:
    """Return the targets and an account of the delta's tensors and the model's parameters.

    Raises:
        CoverageError: what is selected is not there, in full or up to `min_coverage`.
        AlignmentError: two parts of the model fit equally well, or a mapping that does not hold.
        DriftError: two different tensors of the delta meet in one parameter (tied weights).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch module to inject into, got {type(model).__name__}")
    adapters = adapters_of(model)
    names, parameters, held = _candidates(model, adapters)
    if not parameters:
        raise CoverageError(f"{type(model).__name__} has no parameters to inject into")
    shapes, selection, mapping = delta.shapes, options.selection(), options.mapping
    selection.check_layers(shapes)
    wanted = {name: shape for name, shape in shapes.items() if name in selection}
    if not wanted:
        raise CoverageError(f"{selection} selects none of the delta's {len(shapes)} tensors")
    try:
        found = match(
            TensorIndex(shapes, lambda: convert(model, shapes)),
            TensorIndex(held, lambda: {name: Layout.stored(name, held[name]) for name in held}),
            mapping=mapping,
            prefer_equal_names=True,
            called=RUNTIME,
        )
    except AlignmentError as error:
        ambiguous = isinstance(error, AmbiguousAlignmentError)
        if mapping is not None or ambiguous or "two pairings fit" in str(error):
            raise
        raise CoverageError(
            f"none of the delta's {len(wanted)} tensors has a parameter in {type(model).__name__}: "
            f"{error}"
        ) from error
    chosen = [pair for pair in found.pairs if all(source in wanted for source in pair.sources)]
    chosen, frozen = _without_frozen(chosen, parameters, adapters, names, strict=options.strict)
    pairs, tied = _without_tied(chosen, parameters, delta)
    used = {source for pair in pairs for source in pair.sources}
    reasons = dict(found.unmatched_reasoning) | tied | frozen
    missing = [
        (name, reasons.get(name, "only a part of its parameter is selected"))
        for name in wanted
        if name not in used and name not in tied
    ]
    matched_numel = sum(math.prod(held[pair.name]) for pair in pairs)
    missing_numel = sum(math.prod(wanted[name]) for name, _ in missing)
    paired = {pair.name for pair in pairs}
    right_reasons = dict(found.unmatched_multimodal) | frozen
    containers = {container_of(pair.name) for pair in found.pairs}
    coverage = Coverage(
        matched=[(source, names[pair.name]) for pair in pairs for source in pair.sources],
        unmatched_reasoning=missing
        + list(tied.items())
        + [(name, NOT_SELECTED) for name in shapes if name not in wanted],
        unmatched_multimodal=[
            (names[name], right_reasons.get(name, NOT_SELECTED))
            for name in parameters
            if name not in paired
        ]
        + list(adapters.aside.items()),
        matched_numel=matched_numel,
        selected_numel=matched_numel + missing_numel,
        backbone_numel=backbone_numel(held, containers),
        backbone_matched_numel=backbone_numel(
            {pair.name: held[pair.name] for pair in pairs}, containers
        ),
    )
    # What a mapping leaves out was stated, and is in the coverage; LoRA leaves biases out.
    refused = [item for item in missing if item[1] not in (LEFT_OUT, FROZEN_BIAS)]
    least = 0.0 if options.min_coverage is None else options.min_coverage
    if not pairs or (refused and options.strict) or coverage.fraction < least:
        raise CoverageError(
            f"{len(missing)} of the delta's {len(wanted)} selected tensors have no parameter in "
            f"{type(model).__name__} ({coverage.fraction:.1%} covered):{listed(missing)}\n"
            "Compute the delta from the checkpoint that this model was loaded from, state the "
            "pairs with mapping=…, or pass strict=False (and no higher min_coverage) to inject "
            "only what fits"
        )
    targets = []
    for pair in pairs:
        adapted = adapters.weights.get(pair.name)
        targets.append(
            Target(
                names[pair.name],
                tuple(pair.sources),
                tuple(pair.parts),
                parameters[pair.name],
                held[pair.name],
                adapted if isinstance(adapted, Adapted) else None,
            )
        )
    return targets, coverage


def _candidates(
    model: nn.Module, adapters: Adapters
) -> tuple[dict[str, str], dict[str, nn.Parameter], dict[str, tuple[int, ...]]]:
    """Return names, parameters and shapes by the names that they have without adapters."""
    names: dict[str, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter, shape in parameters_of(model):
        if name not in adapters.aside:
            bare = adapters.bare(name)
            names[bare], parameters[bare] = name, parameter
            shapes[bare] = stored_shape(parameter, shape)
    for bare, adapted in adapters.weights.items():
        # However W₀ is stored, W has the shape that its factors make.
        if isinstance(adapted, Adapted):
            names[bare], parameters[bare] = adapters.runtime[bare], adapted.trained[0]
            shapes[bare] = adapted.shape
    return names, parameters, shapes


def _without_frozen(
    pairs: Sequence[Pair],
    parameters: Mapping[str, nn.Parameter],
    adapters: Adapters,
    names: Mapping[str, str],
    *,
    strict: bool,
) -> tuple[list[Pair], dict[str, str]]:
    """Return the pairs that adapters let train, and why others are left out, by both names.

    Without adapters all are kept, and a frozen one is refused by `check_trained`.
    """
    kept, left_out = [], {}
    for pair in pairs:
        adapted = adapters.weights.get(pair.name)
        if isinstance(adapted, str):
            raise DriftError(f"{names[pair.name]} cannot be injected into: {adapted}")
        frozen = not parameters[pair.name].requires_grad
        if frozen and adapters.frozen_bias(pair.name):
            reason = FROZEN_BIAS
        elif frozen and adapters.weights and not strict:
            reason = FROZEN
        else:
            kept.append(pair)
            continue
        left_out[pair.name] = reason
        left_out |= dict.fromkeys(pair.sources, reason)
    return kept, left_out


def _without_tied(
    pairs: Sequence[Pair], parameters: Mapping[str, nn.Parameter], delta: DeltaLike
) -> tuple[list[Pair], dict[str, str]]:
    """Return one pair for each parameter, and why others of tied ones are left out."""
    first: dict[int, Pair] = {}
    left_out: dict[str, str] = {}
    for pair in pairs:
        other = first.setdefault(id(parameters[pair.name]), pair)
        if other is pair:
            continue
        same = [*pair.sources, *other.sources]
        if len(same) != 2 or not torch.equal(delta[same[0]], delta[same[1]]):
            raise DriftError(
                f"{same[1]} and {same[0]} of the delta are one tied parameter of the model, "
                f"{other.name}, but differ; leave one of them out of the selection (modules=…)"
            )
        left_out[same[0]] = f"tied to {same[1]}, and injected once with it"
    return list(first.values()), left_out
