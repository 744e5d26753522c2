"""Pairs of tensors from a stated mapping: whole tensors, or the parts of split and fused ones.

Owns what is refused in a mapping whose names exist: shapes that do not fit together, and a tensor
that is used in part or twice. Reading a mapping is `mapping`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from drift_fast.alignment.fused import canonical_layouts
from drift_fast.alignment.layout import compose, covered
from drift_fast.alignment.mapping import CHECKPOINTS, MappingLike, resolve
from drift_fast.alignment.name_alignment import NameAlignment, Pair, TensorIndex
from drift_fast.errors import AlignmentError
from drift_fast.names import common_prefixes, kind_of

# The reason of what a mapping gives None for.
LEFT_OUT = "left out by the mapping"

_NOT_STATED = "not in the mapping"


def match_stated(
    reasoning: TensorIndex,
    multimodal: TensorIndex,
    mapping: MappingLike,
    called: tuple[str, str] = CHECKPOINTS,
) -> NameAlignment:
    """Pair what a mapping states, with the checks of a pair that is found.

    Raises:
        AlignmentError: a mapping that does not hold.
    """
    stated = resolve(mapping, reasoning.shapes, multimodal.shapes, called)
    sources: dict[str, list[str]] = {}
    for source, names in stated.items():
        for name in names:
            sources.setdefault(name, []).append(source)
    if not sources:
        raise AlignmentError(
            "the mapping pairs nothing; check its names or prefixes. An example of a name in the "
            f"{called[1]} is {next(iter(multimodal.shapes), 'none')}"
        )
    pairs, vocabularies = _pairs(reasoning, multimodal, sources)
    ordered = [pairs[name] for name in multimodal.shapes if name in pairs]
    _refuse_parts_left_over(ordered, reasoning)
    taken = {source for pair in ordered for source in pair.sources}
    reasons = dict.fromkeys([*vocabularies, *vocabularies.values()], "the numbers of rows differ")
    reasons |= dict.fromkeys((name for name, found in stated.items() if not found), LEFT_OUT)
    return NameAlignment(
        ordered,
        [(n, reasons.get(n, _NOT_STATED)) for n in reasoning.shapes if n not in taken],
        [(n, reasons.get(n, _NOT_STATED)) for n in multimodal.shapes if n not in pairs],
        common_prefixes((pair.sources[0], pair.name) for pair in ordered) or ("", ""),
        method="the mapping given",
        vocabularies=vocabularies,
    )


def _pairs(
    reasoning: TensorIndex, multimodal: TensorIndex, sources: Mapping[str, list[str]]
) -> tuple[dict[str, Pair], dict[str, str]]:
    """Return the pairs by multimodal name, and embeddings and heads that differ in rows alone."""
    pairs: dict[str, Pair] = {}
    vocabularies: dict[str, str] = {}
    split: dict[str, list[str]] = {}
    for name, found in sources.items():
        here, there = reasoning.shapes[found[0]], multimodal.shapes[name]
        kinds = {kind_of(name), kind_of(found[0])}
        same_columns = len(here) == len(there) == 2 and here[1] == there[1]
        if len(found) == 1 and here == there:
            pairs[name] = Pair(name, found[0])
        elif len(found) == 1 and same_columns and kinds <= {"embed", "head"}:
            vocabularies[name] = found[0]
        else:
            split[name] = found
    if split:
        pairs |= _split_pairs(reasoning, multimodal, split)
    return pairs, vocabularies


def _split_pairs(
    reasoning: TensorIndex, multimodal: TensorIndex, sources: Mapping[str, Sequence[str]]
) -> dict[str, Pair]:
    """Find the parts of tensors that are stated to belong together but differ in shape."""
    left, right, _ = canonical_layouts(reasoning, multimodal)
    place_of_source = {s: name for name, layout in left.items() for s in layout.sources}
    place_of = {s: name for name, layout in right.items() for s in layout.sources}
    between: dict[str, str] = {}
    for name, found in sources.items():
        for source in found:
            first, second = place_of_source[source], place_of[name]
            agree = left[first].shape == right[second].shape
            if not agree or between.setdefault(first, second) != second:
                raise _misfit(reasoning, multimodal, name, found)
    filled = compose(left, right, list(between.items()), multimodal.shapes)
    pairs = {}
    for name, found in sources.items():
        parts = filled.get(name, [])
        numel = math.prod(multimodal.shapes[name])
        if {part[0] for part in parts} != set(found) or covered(parts) != numel:
            raise _misfit(reasoning, multimodal, name, found)
        pairs[name] = Pair(name, parts)
    return pairs


def _refuse_parts_left_over(pairs: Sequence[Pair], reasoning: TensorIndex) -> None:
    """Refuse a mapping that places only a part of a reasoning tensor, or one part twice."""
    used: dict[str, int] = {}
    for pair in pairs:
        if isinstance(pair.source, str):
            numel = math.prod(reasoning.shapes[pair.source])
            used[pair.source] = used.get(pair.source, 0) + numel
        for part in pair.parts:
            used[part[0]] = used.get(part[0], 0) + covered([part])
    for name, numel in used.items():
        expected = math.prod(reasoning.shapes[name])
        if numel != expected:
            raise AlignmentError(
                f"the mapping places {numel} elements of {name}, which has {expected}; a tensor "
                "that is split on the other side needs all of its matches, in a list"
            )


def _misfit(
    reasoning: TensorIndex, multimodal: TensorIndex, name: str, sources: Sequence[str]
) -> AlignmentError:
    shape = multimodal.shapes[name]
    if len(sources) > 1 and all(reasoning.shapes[source] == shape for source in sources):
        return AlignmentError(
            f"the mapping pairs {len(sources)} tensors, {sources[0]} and {sources[1]} first, with "
            f"{name}, which takes one; correct the mapping"
        )
    given = ", ".join(f"{source} {list(reasoning.shapes[source])}" for source in sources[:3])
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    return AlignmentError(
        f"the mapping pairs {given}{more} with {name} {list(shape)}, whose shapes do not fit "
        "together; correct the mapping or leave them out"
    )
