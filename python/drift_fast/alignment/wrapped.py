"""Names without wrappers, where one model's names have some that the other's have not.

A wrapper is known by its name (`names.bare`), or by this: every matrix of every layer has it, and
no tensor of the other model. Owns the way to such names and back; matching them is `match`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from drift_fast.alignment.name_alignment import NameAlignment, Pair, TensorIndex, Unmatched
from drift_fast.names import bare, container_of, layer_of
from drift_fast.shapes import Shape

# Stored names by those without wrappers.
Stored = dict[str, str]


def without_wrappers(
    reasoning: TensorIndex, multimodal: TensorIndex
) -> tuple[TensorIndex, TensorIndex, Stored, Stored] | None:
    """Return both models under names without wrappers, and the way back; None if none has any."""
    sides = reasoning.shapes, multimodal.shapes
    components = [{part for name in side for part in name.split(".")} for side in sides]
    names = [
        _unwrapped(side, other) for side, other in zip(sides, reversed(components), strict=True)
    ]
    if all(stored == name for side in names for name, stored in side.items()):
        return None
    if any(len(back) < len(side) for back, side in zip(names, sides, strict=True)):
        # Two tensors would have one name.
        return None
    first, second = (
        TensorIndex({name: side[stored] for name, stored in back.items()})
        for back, side in zip(names, sides, strict=True)
    )
    return first, second, names[0], names[1]


def under_stored_names(found: NameAlignment, first: Stored, second: Stored) -> NameAlignment:
    """Return an alignment of names without wrappers under the names that are stored."""

    def back(items: list[Unmatched], names: Stored) -> list[Unmatched]:
        return [(names[name], reason) for name, reason in items]

    return replace(
        found,
        pairs=[_stored_pair(pair, first, second) for pair in found.pairs],
        unmatched_reasoning=back(found.unmatched_reasoning, first),
        unmatched_multimodal=back(found.unmatched_multimodal, second),
    )


def _stored_pair(pair: Pair, first: Stored, second: Stored) -> Pair:
    if isinstance(pair.source, str):
        return Pair(second[pair.name], first[pair.source])
    return Pair(
        second[pair.name], [part._replace(source=first[part.source]) for part in pair.source]
    )


def _unwrapped(shapes: Mapping[str, Shape], others: set[str]) -> Stored:
    """Return stored names by those without wrappers; `others` are the other model's components."""
    common: dict[str, set[str]] = {}
    modules: dict[str, set[str]] = defaultdict(set)
    for name, shape in shapes.items():
        container = container_of(name)
        if container is None or len(shape) < 2:
            continue
        inside = _inside(name, container)
        common[container] = common.get(container, set(inside)) & set(inside)
        modules[container].add(".".join(inside))
    found = {}
    for name in shapes:
        container = container_of(name)
        wrappers = common.get(container, set()) - others if container is not None else set()
        # What a single matrix has is its own name.
        if container is not None and wrappers and len(modules[container]) > 1:
            length = len(f"{container}.{layer_of(name)}".split("."))
            parts = name.split(".")
            name_without = parts[:length] + [p for p in parts[length:] if p not in wrappers]
            found[bare(".".join(name_without))] = name
        else:
            found[bare(name)] = name
    return found


def _inside(name: str, container: str) -> list[str]:
    """Return the modules of a tensor within its layer."""
    return [
        part for part in name.removeprefix(f"{container}.").split(".")[1:-1] if not part.isdigit()
    ]
