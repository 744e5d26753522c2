"""Which tensors of one model make up which tensor of another, by names and shapes, or as stated.

Names are aligned as they are first. Where parameters of the layers are left over, both sides are
brought to one form, by transformers' own conversions where they can be followed and by names and
shapes otherwise, and aligned again; so per-expert and fused weights, transposed or not, find each
other. No weight is read here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from drift_fast import _core
from drift_fast.alignment.fused import canonical, incomplete_experts, joined_names, unoriented
from drift_fast.alignment.layout import Layout, Part, Shape, compose, covered, whole
from drift_fast.alignment.mapping import CHECKPOINTS, MappingLike, resolve
from drift_fast.errors import AlignmentError
from drift_fast.names import container_of, kind_of, layer_of

# The reason of what a mapping gives None for.
LEFT_OUT = "left out by the mapping"

Convert = Callable[[], "dict[str, Layout] | None"]


@dataclass(frozen=True)
class Side:
    """The tensors of one model, and how to ask for them in the form that they have in memory."""

    tensors: Mapping[str, Shape]
    convert: Convert = lambda: None


@dataclass(frozen=True)
class Pair:
    """A tensor on the right, and the one on the left or the parts of several that make it up."""

    name: str
    source: str | list[Part]

    @property
    def sources(self) -> list[str]:
        """Names on the left, each once."""
        if isinstance(self.source, str):
            return [self.source]
        return list(dict.fromkeys(part[0] for part in self.source))

    @property
    def parts(self) -> list[Part]:
        """The parts; none where the source is a whole tensor."""
        return [] if isinstance(self.source, str) else self.source

    def numel(self, shapes: Mapping[str, Shape]) -> int:
        """Return how many elements of the right tensor have a counterpart."""
        return covered(self.parts) if self.parts else math.prod(shapes[self.name])


@dataclass(frozen=True)
class Match:
    """Pairs in the order of the right side, and every other tensor with the reason it has none."""

    pairs: list[Pair]
    unmatched_left: list[tuple[str, str]]
    unmatched_right: list[tuple[str, str]]
    prefixes: tuple[str, str]
    rivals: list[tuple[str, str, int]] = field(default_factory=list)
    layer_conflict: str = ""
    how: str = "names"
    # Stated pairs of embeddings and heads with other numbers of rows, right to left; see `rows`.
    vocabularies: dict[str, str] = field(default_factory=dict)


def match(
    left: Side,
    right: Side,
    *,
    mapping: MappingLike | None = None,
    prefer_equal_names: bool = False,
    sides: tuple[str, str] = CHECKPOINTS,
) -> Match:
    """Pair the tensors of two models.

    Raises:
        AlignmentError: nothing matches, two pairings fit, or a mapping that does not hold.
    """
    if mapping is not None:
        stated = resolve(mapping, left.tensors, right.tensors, sides)
        pairs = [(name, partner) for name, found in stated.items() for partner in found]
        if not pairs:
            example = next(iter(right.tensors), "none")
            raise AlignmentError(
                "the mapping pairs nothing; check its names or prefixes. Names in the "
                f"{sides[1]} are such as {example}"
            )
        left_out = {name for name, found in stated.items() if not found}
        return _as_stated(left, right, pairs, left_out)
    asked: dict[str, Layout] | None = None
    if prefer_equal_names:
        # Equal names need not be equal tensors: loading may rename, exchange or turn them.
        asked = left.convert()
        left = replace(left, convert=lambda: asked)
        if asked is not None and not _is_stored(asked, left.tensors):
            try:
                made = _composed(left, right, prefer_equal_names)
            except AlignmentError:
                made = None
            if made is not None and not _leftover(made):
                return made
    found = _found(left, right, prefer_equal_names)
    if asked is None:
        _refuse_unoriented(found, left, right)
    return found


def _found(left: Side, right: Side, prefer_equal_names: bool) -> Match:
    """Pair by names as they are, and in one form where layers are left over."""
    failure: AlignmentError | None = None
    plain: Match | None = None
    try:
        plain = _whole(_align(left.tensors, right.tensors, prefer_equal_names))
        if not _leftover(plain):
            return plain
    except AlignmentError as error:
        failure = error
    try:
        made = _composed(left, right, prefer_equal_names)
    except AlignmentError:
        made = None
    # Where neither pairs more, the common form still tells better what stands in the way.
    if made is not None and (plain is None or _leftover(made) <= _leftover(plain)):
        return made
    if plain is None:
        raise failure or AlignmentError("nothing matches")
    return plain


def _align(
    left: Mapping[str, Shape], right: Mapping[str, Shape], prefer_equal_names: bool
) -> _core.Aligned:
    return _core.align(
        [(name, list(shape)) for name, shape in left.items()],
        [(name, list(shape)) for name, shape in right.items()],
        prefer_equal_names=prefer_equal_names,
    )


def _whole(aligned: _core.Aligned) -> Match:
    return Match(
        [Pair(right, left) for left, right in aligned.pairs],
        aligned.unmatched_left,
        aligned.unmatched_right,
        aligned.prefixes,
        aligned.rivals,
        aligned.layer_conflict,
    )


def _refuse_unoriented(found: Match, left: Side, right: Side) -> None:
    """Refuse a pair of square stacked weights of which nothing tells whether one is transposed."""
    for pair in found.pairs:
        sides = [(name, left) for name in pair.sources] + [(pair.name, right)]
        for name, side in sides:
            if unoriented(name, side.tensors):
                raise AlignmentError(
                    f"two pairings fit: {name} {list(side.tensors[name])} is square, so its shape "
                    "does not tell whether it is stored transposed, and the other weight of its "
                    "experts, which would tell, is not there; take both"
                )


def _leftover(found: Match) -> int:
    """Return how many tensors in numbered layers of the left have no partner."""
    return sum(layer_of(name) is not None for name, _ in found.unmatched_left)


def _layouts(left: Side, right: Side) -> tuple[dict[str, Layout], dict[str, Layout], str]:
    """Return both sides in one form, and whose account of it that is."""
    asked = left.convert(), right.convert()
    sides = [
        answer or {name: Layout.stored(name, shape) for name, shape in side.tensors.items()}
        for side, answer in zip((left, right), asked, strict=True)
    ]
    joined = joined_names(sides[0]) | joined_names(sides[1])
    how = "names and shapes" if None in asked else "transformers' conversion"
    return canonical(sides[0], joined), canonical(sides[1], joined), how


def _composed(left: Side, right: Side, prefer_equal_names: bool) -> Match | None:
    left_layouts, right_layouts, how = _layouts(left, right)
    if _is_stored(left_layouts, left.tensors) and _is_stored(right_layouts, right.tensors):
        return None
    aligned = _align(
        {name: layout.shape for name, layout in left_layouts.items()},
        {name: layout.shape for name, layout in right_layouts.items()},
        prefer_equal_names,
    )
    return _assemble(left, right, left_layouts, right_layouts, aligned, how)


def _is_stored(layouts: Mapping[str, Layout], tensors: Mapping[str, Shape]) -> bool:
    """Whether the common form is no other than the stored one."""
    return layouts.keys() == tensors.keys() and all(
        layout.blocks == Layout.stored(name, tensors[name]).blocks
        for name, layout in layouts.items()
    )


def _assemble(
    left: Side,
    right: Side,
    left_layouts: Mapping[str, Layout],
    right_layouts: Mapping[str, Layout],
    aligned: _core.Aligned,
    how: str,
) -> Match:
    filled = compose(left_layouts, right_layouts, aligned.pairs, right.tensors)
    pairs, reasons = [], {}
    for name, parts in filled.items():
        shape = right.tensors[name]
        if covered(parts) == math.prod(shape):
            pairs.append(Pair(name, whole(parts, shape, left.tensors) or parts))
        else:
            reasons[name] = (
                f"only {covered(parts)} of its {math.prod(shape)} elements have a counterpart"
            )
    taken = {source for pair in pairs for source in pair.sources}
    order = {name: at for at, name in enumerate(right.tensors)}
    pairs.sort(key=lambda pair: order[pair.name])
    named = {pair.name for pair in pairs}
    left_reasons = _by_source(aligned.unmatched_left, left_layouts)
    left_reasons |= incomplete_experts(left.tensors)
    right_reasons = _by_source(aligned.unmatched_right, right_layouts) | reasons
    right_reasons |= incomplete_experts(right.tensors)
    missing = "its counterpart is there only in part"
    return Match(
        pairs,
        [(n, left_reasons.get(n, missing)) for n in left.tensors if n not in taken],
        [(n, right_reasons.get(n, missing)) for n in right.tensors if n not in named],
        _prefixes(pairs) or aligned.prefixes,
        aligned.rivals,
        aligned.layer_conflict,
        how,
    )


def _by_source(
    unmatched: Sequence[tuple[str, str]], layouts: Mapping[str, Layout]
) -> dict[str, str]:
    """Return the reason of each stored tensor, with the name that it had in the common form."""
    reasons: dict[str, str] = {}
    for name, reason in unmatched:
        for source in layouts[name].sources:
            reasons[source] = reason if source == name else f"as {name}: {reason}"
    return reasons


def _prefixes(pairs: Sequence[Pair]) -> tuple[str, str] | None:
    """Return where the two names of a layer begin to agree, read backwards."""
    for pair in pairs:
        first, second = container_of(pair.sources[0]), container_of(pair.name)
        if first is None or second is None:
            continue
        a, b = first.split("."), second.split(".")
        while len(a) and len(b) and a[-1] == b[-1]:
            a.pop()
            b.pop()
        return ".".join(a), ".".join(b)
    return None


def _as_stated(
    left: Side, right: Side, stated: Sequence[tuple[str, str]], left_out: AbstractSet[str]
) -> Match:
    """Pair what the user states, refusing what does not fit."""
    together: dict[str, list[str]] = {}
    for name, partner in stated:
        together.setdefault(partner, []).append(name)
    pairs = {
        partner: Pair(partner, names[0])
        for partner, names in together.items()
        if len(names) == 1 and left.tensors[names[0]] == right.tensors[partner]
    }
    vocabularies = {
        partner: names[0]
        for partner, names in together.items()
        if partner not in pairs and _differ_in_rows(left, right, partner, names)
    }
    rest = {
        partner: names
        for partner, names in together.items()
        if partner not in pairs and partner not in vocabularies
    }
    if rest:
        pairs |= _stated_parts(left, right, rest)
    ordered = [pairs[name] for name in right.tensors if name in pairs]
    _refuse_rest(ordered, left)
    taken = {source for pair in ordered for source in pair.sources}
    rows = dict.fromkeys([*vocabularies, *vocabularies.values()], "the numbers of rows differ")
    rows |= dict.fromkeys(left_out, LEFT_OUT)
    without = "not in the mapping"
    return Match(
        ordered,
        [(name, rows.get(name, without)) for name in left.tensors if name not in taken],
        [(name, rows.get(name, without)) for name in right.tensors if name not in pairs],
        _prefixes(ordered) or ("", ""),
        how="the mapping given",
        vocabularies=vocabularies,
    )


def _refuse_rest(pairs: Sequence[Pair], left: Side) -> None:
    """Refuse a left tensor of which a mapping places only a part, or one part twice."""
    used: dict[str, int] = {}
    for pair in pairs:
        if isinstance(pair.source, str):
            used[pair.source] = used.get(pair.source, 0) + math.prod(left.tensors[pair.source])
        for part in pair.parts:
            used[part[0]] = used.get(part[0], 0) + covered([part])
    for name, numel in used.items():
        expected = math.prod(left.tensors[name])
        if numel != expected:
            raise AlignmentError(
                f"the mapping places {numel} elements of {name}, which has {expected}; a tensor "
                "that is split on the other side needs all of its partners, in a list"
            )


def _differ_in_rows(left: Side, right: Side, partner: str, names: Sequence[str]) -> bool:
    """Whether one embedding or head is stated for another that differs in its rows only."""
    kinds = {kind_of(partner), *(kind_of(name) for name in names)}
    here, there = left.tensors[names[0]], right.tensors[partner]
    return (
        len(names) == 1
        and kinds <= {"embed", "head"}
        and len(here) == len(there) == 2
        and here[1] == there[1]
    )


def _stated_parts(left: Side, right: Side, stated: Mapping[str, Sequence[str]]) -> dict[str, Pair]:
    """Find the parts of tensors that are stated to belong together but differ in shape."""
    left_layouts, right_layouts, _ = _layouts(left, right)
    place_left = {s: name for name, layout in left_layouts.items() for s in layout.sources}
    place_right = {s: name for name, layout in right_layouts.items() for s in layout.sources}
    between: dict[str, str] = {}
    for partner, names in stated.items():
        for name in names:
            first, second = place_left[name], place_right[partner]
            agree = left_layouts[first].shape == right_layouts[second].shape
            if not agree or between.setdefault(first, second) != second:
                raise _misfit(left, right, partner, names)
    filled = compose(left_layouts, right_layouts, list(between.items()), right.tensors)
    pairs = {}
    for partner, names in stated.items():
        parts = filled.get(partner, [])
        if {part[0] for part in parts} != set(names) or covered(parts) != math.prod(
            right.tensors[partner]
        ):
            raise _misfit(left, right, partner, names)
        pairs[partner] = Pair(partner, parts)
    return pairs


def _misfit(left: Side, right: Side, partner: str, names: Sequence[str]) -> AlignmentError:
    if len(names) > 1 and all(left.tensors[n] == right.tensors[partner] for n in names):
        return AlignmentError(
            f"the mapping pairs {len(names)} tensors, {names[0]} and {names[1]} first, with "
            f"{partner}, which has one counterpart; correct the mapping"
        )
    given = ", ".join(f"{name} {list(left.tensors[name])}" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return AlignmentError(
        f"the mapping pairs {given}{more} with {partner} {list(right.tensors[partner])}, whose "
        "shapes do not fit together; correct the mapping or leave them out"
    )


@dataclass(frozen=True)
class Inserted:
    """A map that leaves out layers that only the right side has."""

    layers: list[int]
    pairs: list[tuple[str, str]]


def skipping_inserted(
    left: Mapping[str, Shape], right: Mapping[str, Shape], found: Match
) -> Inserted | None:
    """Propose a layer map where the right side has layers of another structure inserted.

    The layers that hold all that the left side's have, in order, must be as many as those; so a
    model that is merely deeper gets no proposal. It is for the user to look over, never applied.
    """
    first = next((pair for pair in found.pairs if layer_of(pair.name) is not None), None)
    if first is None:
        return None
    containers = container_of(first.sources[0]), container_of(first.name)
    if None in containers:
        return None
    here, there = (
        _by_layer(side, str(container))
        for side, container in zip((left, right), containers, strict=True)
    )
    complete = [
        layer
        for layer in sorted(there)
        if any(own.items() <= there[layer].items() for own in here.values())
    ]
    partners = dict(zip(sorted(here), complete, strict=False))
    if len(complete) != len(here) or not all(
        here[a].items() <= there[b].items() for a, b in partners.items()
    ):
        return None
    pairs = [
        (f"{containers[0]}.{a}.{inside}", f"{containers[1]}.{b}.{inside}")
        for a, b in partners.items()
        for inside in here[a]
    ]
    outside = [
        (pair.sources[0], pair.name)
        for pair in found.pairs
        if layer_of(pair.name) is None and len(pair.sources) == 1
    ]
    return Inserted(sorted(set(there) - set(complete)), pairs + outside)


def _by_layer(tensors: Mapping[str, Shape], container: str) -> dict[int, dict[str, Shape]]:
    layers: dict[int, dict[str, Shape]] = {}
    for name, shape in tensors.items():
        layer = layer_of(name)
        if layer is not None and container_of(name) == container:
            inside = name.removeprefix(f"{container}.{layer}.")
            layers.setdefault(layer, {})[inside] = shape
    return layers
