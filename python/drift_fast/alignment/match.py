"""Match the tensors of two models by names and shapes, or as stated.

Names are aligned as they are first. Where parameters of the layers are left over, both sides are
brought to one form and aligned again: by transformers' own conversions where they can be followed,
and by names and shapes where not. This way split and fused weights, transposed or not, are matched.
No weight is read here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from drift_fast._core import Aligned
from drift_fast._core import align as align_names
from drift_fast.alignment.fused import canonical_layouts, incomplete_experts, is_unoriented
from drift_fast.alignment.layout import Layout, Rectangle, compose, covered, whole
from drift_fast.alignment.mapping import CHECKPOINTS, MappingLike
from drift_fast.alignment.name_alignment import NameAlignment, Pair, TensorIndex, Unmatched
from drift_fast.alignment.stated import match_stated
from drift_fast.alignment.wrapped import under_stored_names, without_wrappers
from drift_fast.errors import AlignmentError, AmbiguousAlignmentError
from drift_fast.names import common_prefixes, layer_of
from drift_fast.shapes import Shape


def match(
    reasoning: TensorIndex,
    multimodal: TensorIndex,
    *,
    mapping: MappingLike | None = None,
    prefer_equal_names: bool = False,
    called: tuple[str, str] = CHECKPOINTS,
) -> NameAlignment:
    """Match the tensors of two models.

    `prefer_equal_names` is for a delta and a model in memory. `called` names the sides in messages.

    Raises:
        AmbiguousAlignmentError: two alignments fit equally well.
        AlignmentError: nothing matches, or a mapping that does not hold.
    """
    if mapping is not None:
        return match_stated(reasoning, multimodal, mapping, called)
    if not prefer_equal_names:
        found = _match_names(reasoning, multimodal, prefer_equal_names)
        _refuse_unoriented(found, reasoning, multimodal)
        return found
    # Equal names need not be equal tensors: loading may rename, exchange or transpose them.
    converted = reasoning.convert()
    reasoning = replace(reasoning, convert=lambda: converted)
    if converted is not None and not _is_stored(converted, reasoning.shapes):
        found_converted = _match_canonical(reasoning, multimodal, prefer_equal_names)
        if found_converted is not None and not _leftover(found_converted):
            return found_converted
    found = _match_names(reasoning, multimodal, prefer_equal_names)
    if converted is None:
        _refuse_unoriented(found, reasoning, multimodal)
    return found


def _match_names(
    reasoning: TensorIndex, multimodal: TensorIndex, prefer_equal_names: bool
) -> NameAlignment:
    """Match by names as they are and, where layers are left over, by those without wrappers."""
    failure: AlignmentError | None = None
    found: NameAlignment | None = None
    try:
        found = _match_as_named(reasoning, multimodal, prefer_equal_names)
        if not _leftover(found):
            return found
    except AlignmentError as error:
        failure = error
    unwrapped = without_wrappers(reasoning, multimodal)
    if unwrapped is not None:
        with contextlib.suppress(AlignmentError):
            made = _match_as_named(unwrapped[0], unwrapped[1], prefer_equal_names)
            if found is None or _leftover(made) < _leftover(found):
                return under_stored_names(made, *unwrapped[2:])
    if found is None:
        raise failure or AlignmentError("nothing matches")
    return found


def _match_as_named(
    reasoning: TensorIndex, multimodal: TensorIndex, prefer_equal_names: bool
) -> NameAlignment:
    """Match by names as they are, and in one form where layers are left over."""
    failure: AlignmentError | None = None
    plain: NameAlignment | None = None
    try:
        found = _align(reasoning.shapes, multimodal.shapes, prefer_equal_names)
        plain = _as_stored(found, reasoning.shapes, multimodal.shapes)
        if not _leftover(plain):
            return plain
    except AlignmentError as error:
        failure = error
    made = _match_canonical(reasoning, multimodal, prefer_equal_names)
    # Where neither matches more, the common form still shows better what is in the way.
    if made is not None and (plain is None or _leftover(made) <= _leftover(plain)):
        return made
    if plain is None:
        raise failure or AlignmentError("nothing matches")
    return plain


def _align(
    reasoning: Mapping[str, Shape], multimodal: Mapping[str, Shape], prefer_equal_names: bool
) -> Aligned:
    return align_names(
        [(name, list(shape)) for name, shape in reasoning.items()],
        [(name, list(shape)) for name, shape in multimodal.items()],
        prefer_equal_names=prefer_equal_names,
    )


def _as_stored(
    aligned: Aligned, reasoning: Iterable[str], multimodal: Iterable[str]
) -> NameAlignment:
    # The names that are there already, since copies of all would take as much memory again.
    first, second = ({name: name for name in side} for side in (reasoning, multimodal))
    return NameAlignment(
        [Pair(second[name], first[source]) for source, name in aligned.pairs],
        aligned.unmatched_reasoning,
        aligned.unmatched_multimodal,
        aligned.prefixes,
        aligned.alternatives,
        aligned.layer_conflict,
    )


def _refuse_unoriented(
    found: NameAlignment, reasoning: TensorIndex, multimodal: TensorIndex
) -> None:
    """Refuse square fused experts if nothing shows whether one of them is transposed."""
    sides = (
        ((name for pair in found.pairs for name in pair.sources), reasoning.shapes),
        ((pair.name for pair in found.pairs), multimodal.shapes),
    )
    for names, shapes in sides:
        for name in names:
            if is_unoriented(name, shapes):
                raise AmbiguousAlignmentError(
                    f"two alignments fit: {name} {list(shapes[name])} is square, so its shape does "
                    "not show whether it is stored transposed, and the other weight of its "
                    "experts, which would show it, is missing; take both"
                )


def _leftover(found: NameAlignment) -> int:
    """Return how many reasoning tensors in numbered layers have no match."""
    return sum(layer_of(name) is not None for name, _ in found.unmatched_reasoning)


def _is_stored(layouts: Mapping[str, Layout], shapes: Mapping[str, Shape]) -> bool:
    """Whether the common form is the stored one."""
    return layouts.keys() == shapes.keys() and all(
        layout.blocks == Layout.stored(name, shapes[name]).blocks
        for name, layout in layouts.items()
    )


def _match_canonical(
    reasoning: TensorIndex, multimodal: TensorIndex, prefer_equal_names: bool
) -> NameAlignment | None:
    """Match in the common form; None where that is the stored form, or nothing matches in it."""
    sources, targets, method = canonical_layouts(reasoning, multimodal)
    if _is_stored(sources, reasoning.shapes) and _is_stored(targets, multimodal.shapes):
        return None
    try:
        aligned = _align(
            {name: layout.shape for name, layout in sources.items()},
            {name: layout.shape for name, layout in targets.items()},
            prefer_equal_names,
        )
    except AlignmentError:
        return None
    pairs, partial = _pairs(
        compose(sources, targets, aligned.pairs, multimodal.shapes), reasoning, multimodal
    )
    taken = {source for pair in pairs for source in pair.sources}
    named = {pair.name for pair in pairs}
    reasons = _by_source(aligned.unmatched_reasoning, sources)
    reasons |= incomplete_experts(reasoning.shapes)
    reasons_of_multimodal = _by_source(aligned.unmatched_multimodal, targets) | partial
    reasons_of_multimodal |= incomplete_experts(multimodal.shapes)
    missing = "only a part of its match is there"
    return NameAlignment(
        pairs,
        [(n, reasons.get(n, missing)) for n in reasoning.shapes if n not in taken],
        [(n, reasons_of_multimodal.get(n, missing)) for n in multimodal.shapes if n not in named],
        common_prefixes((pair.sources[0], pair.name) for pair in pairs) or aligned.prefixes,
        aligned.alternatives,
        aligned.layer_conflict,
        method,
    )


def _pairs(
    filled: Mapping[str, list[Rectangle]], reasoning: TensorIndex, multimodal: TensorIndex
) -> tuple[list[Pair], dict[str, str]]:
    """Return a pair for each tensor that is filled, and what each filled in part lacks."""
    pairs, partial = [], {}
    order = {name: at for at, name in enumerate(multimodal.shapes)}
    for name in sorted(filled, key=order.__getitem__):
        parts, shape = filled[name], multimodal.shapes[name]
        if covered(parts) == math.prod(shape):
            pairs.append(Pair(name, whole(parts, shape, reasoning.shapes) or parts))
        else:
            partial[name] = f"only {covered(parts)} of its {math.prod(shape)} elements have a match"
    return pairs, partial


def _by_source(unmatched: Sequence[Unmatched], layouts: Mapping[str, Layout]) -> dict[str, str]:
    """Return the reason of each stored tensor, with the name that it had in the common form."""
    reasons: dict[str, str] = {}
    for name, reason in unmatched:
        for source in layouts[name].sources:
            reasons[source] = reason if source == name else f"as {name}: {reason}"
    return reasons
