"""Which parameter of a running model each tensor of a delta belongs to.

Names in memory differ from names on disk and change with wrappers, and experts or projections that
are split on disk are one parameter in memory, so they are matched like two checkpoints are. A
target exists, has the delta's shape, is trained, and is targeted once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from drift_fast.alignment.coverage import (
    NOT_SELECTED,
    Coverage,
    count_beyond,
    listed,
)
from drift_fast.alignment.layout import Layout
from drift_fast.alignment.mapping import RUNTIME, MappingLike
from drift_fast.alignment.match import match
from drift_fast.alignment.name_alignment import NameAlignment, Pair, TensorIndex
from drift_fast.alignment.stated import LEFT_OUT
from drift_fast.alignment.transformers_layout import convert
from drift_fast.delta.delta import open_delta
from drift_fast.delta.protocol import DeltaLike
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
from drift_fast.inject.refusals import packing_of
from drift_fast.inject.shards.find import parameters_of
from drift_fast.inject.target import Target
from drift_fast.inject.tied import refuse_untied, without_tied

_REMEDY = (
    "Compute the delta from the checkpoint that this model was loaded from, state the pairs with "
    "mapping=…, or pass strict=False (and no higher min_coverage) to inject only what fits"
)

Shapes = Mapping[str, tuple[int, ...]]


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
    targets, _ = find_targets(model, open_delta(delta), TargetOptions(mapping=mapping))
    return {target.name: target.delta_name for target in targets}


def find_targets(
    model: nn.Module, delta: DeltaLike, options: TargetOptions, *, weights: bool = False
) -> tuple[list[Target], Coverage]:
    """Return the targets and an account of the delta's tensors and the model's parameters.

    weights: take the weights themselves where adapters would train in their place.

    Raises:
        CoverageError: selected tensors are missing, or fewer than `min_coverage` are there.
        AlignmentError: two parts of the model fit equally well, or a mapping that does not hold.
        DriftError: two different tensors of the delta meet in one parameter (tied weights), or one
            meets one of two that the model ties.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch module to inject into, got {type(model).__name__}")
    candidates = Candidates.of(model, weights=weights)
    wanted = _wanted(delta.shapes, options)
    found = _match(model, delta.shapes, candidates.shapes, options.mapping, len(wanted))
    chosen = [pair for pair in found.pairs if all(source in wanted for source in pair.sources)]
    refuse_untied(model, chosen, candidates.parameters, candidates.adapters.weights)
    chosen, frozen = candidates.without_frozen(chosen, strict=options.strict)
    pairs, twins = without_tied(chosen, candidates.parameters, delta)
    tied = {name: f"tied to {kept}, and injected once with it" for name, kept in twins.items()}
    used = {source for pair in pairs for source in pair.sources}
    reasons = dict(found.unmatched_reasoning) | tied | frozen
    missing = [
        (name, reasons.get(name, "only a part of its parameter is selected"))
        for name in wanted
        if name not in used and name not in tied
    ]
    numel_of = {pair.name: math.prod(candidates.shapes[pair.name]) for pair in pairs}
    coverage = Coverage(
        matched=[
            (source, candidates.names[pair.name]) for pair in pairs for source in pair.sources
        ],
        unmatched_reasoning=missing
        + list(tied.items())
        + [(name, NOT_SELECTED) for name in delta.shapes if name not in wanted],
        unmatched_multimodal=candidates.others(pairs, dict(found.unmatched_multimodal) | frozen),
        matched_numel=sum(numel_of.values()),
        selected_numel=sum(numel_of.values()) + sum(math.prod(wanted[name]) for name, _ in missing),
        **count_beyond((pair.name for pair in found.pairs), candidates.shapes, numel_of),
    )
    # What a mapping leaves out was stated, and is in the coverage; LoRA leaves biases out.
    refused = [item for item in missing if item[1] not in (LEFT_OUT, FROZEN_BIAS)]
    least = 0.0 if options.min_coverage is None else options.min_coverage
    if not pairs or (refused and options.strict) or coverage.fraction < least:
        raise CoverageError(
            f"{len(missing)} of the delta's {len(wanted)} selected tensors have no parameter in "
            f"{type(model).__name__} ({coverage.fraction:.1%} covered):{listed(missing)}\n"
            + (packing_of(model) or _REMEDY)
        )
    return [candidates.target(pair, twins) for pair in pairs], coverage


def _wanted(shapes: Shapes, options: TargetOptions) -> Shapes:
    """Return the selected tensors of a delta.

    Raises:
        CoverageError: there are none, or none of a preset.
    """
    selection = options.selection()
    selection.check_layers(shapes)
    wanted = {name: shape for name, shape in shapes.items() if name in selection}
    if not wanted:
        raise CoverageError(f"{selection} selects none of the delta's {len(shapes)} tensors")
    if idle := selection.idle_presets(wanted):
        raise CoverageError(f"of the delta, {selection.describe_idle(idle, list(shapes))}")
    return wanted


def _match(
    model: nn.Module, shapes: Shapes, held: Shapes, mapping: MappingLike | None, wanted: int
) -> NameAlignment:
    """Match a delta's tensors with parameters, by names and shapes.

    Raises:
        AlignmentError: the match is ambiguous, or the mapping does not hold.
        CoverageError: nothing matches.
    """
    try:
        return match(
            TensorIndex(shapes, lambda: convert(model, shapes)),
            TensorIndex(held, lambda: {name: Layout.stored(name, held[name]) for name in held}),
            mapping=mapping,
            prefer_equal_names=True,
            called=RUNTIME,
        )
    except AlignmentError as error:
        if mapping is not None or isinstance(error, AmbiguousAlignmentError):
            raise
        raise CoverageError(
            f"none of the delta's {wanted} tensors has a parameter in {type(model).__name__}: "
            f"{packing_of(model) or error}"
        ) from error


@dataclass(frozen=True)
class Candidates:
    """The parameters of a model, by the names that they have without adapters.

    `names` has their names as the model runs.
    """

    names: Mapping[str, str]
    parameters: Mapping[str, nn.Parameter]
    shapes: Shapes
    adapters: Adapters

    @classmethod
    def of(cls, model: nn.Module, *, weights: bool = False) -> Candidates:
        """Return those of a model; `weights` leaves what adapters train out of sight.

        Raises:
            CoverageError: it has no parameters.
        """
        adapters = adapters_of(model)
        if weights:
            adapters.weights.clear()
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
        if not parameters:
            raise CoverageError(f"{type(model).__name__} has no parameters to inject into")
        return cls(names, parameters, shapes, adapters)

    def target(self, pair: Pair, twins: Mapping[str, str]) -> Target:
        """Return the target that a pair describes; `twins` are tensors left out for another."""
        adapted = self.adapters.weights.get(pair.name)
        return Target(
            self.names[pair.name],
            tuple(pair.sources),
            tuple(pair.parts),
            self.parameters[pair.name],
            self.shapes[pair.name],
            adapted if isinstance(adapted, Adapted) else None,
            tuple(name for name, kept in twins.items() if kept in pair.sources),
        )

    def others(self, pairs: Sequence[Pair], reasons: Mapping[str, str]) -> list[tuple[str, str]]:
        """Return the parameters that are in none of the pairs, and why."""
        paired = {pair.name for pair in pairs}
        return [
            (self.names[name], reasons.get(name, NOT_SELECTED))
            for name in self.parameters
            if name not in paired
        ] + list(self.adapters.aside.items())

    def without_frozen(
        self, pairs: Sequence[Pair], *, strict: bool
    ) -> tuple[list[Pair], dict[str, str]]:
        """Return the pairs that adapters let train, and why others are left out, by both names.

        Without adapters all are kept, and a frozen one is refused by `check_trained`.
        """
        kept, left_out = [], {}
        for pair in pairs:
            adapted = self.adapters.weights.get(pair.name)
            if isinstance(adapted, str):
                raise DriftError(f"{self.names[pair.name]} cannot be injected into: {adapted}")
            frozen = not self.parameters[pair.name].requires_grad
            if frozen and self.adapters.frozen_bias(pair.name):
                reason = FROZEN_BIAS
            elif frozen and self.adapters.weights and not strict:
                reason = FROZEN
            else:
                kept.append(pair)
                continue
            left_out[pair.name] = reason
            left_out |= dict.fromkeys(pair.sources, reason)
        return kept, left_out
