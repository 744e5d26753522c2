"""Which selected tensors an alignment covers, and which are missing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from drift_fast.alignment.coverage import (
    NOT_SELECTED,
    Coverage,
    count_beyond,
)
from drift_fast.alignment.embeddings import TIED
from drift_fast.alignment.name_alignment import NameAlignment, Pair, Unmatched
from drift_fast.checkpoints.opened import Opened
from drift_fast.names import bare, container_of, containers_of, kind_of, layer_of
from drift_fast.selection import Selection


@dataclass(frozen=True)
class Account:
    """The selected pairs, the coverage, and the selected tensors of either side without a match."""

    pairs: list[Pair]
    coverage: Coverage
    missing_reasoning: list[Unmatched]
    missing_multimodal: list[Unmatched]


def account_for(
    found: NameAlignment, selection: Selection, reasoning: Opened, multimodal: Opened
) -> Account:
    """Count the selected elements that have a match, and list the tensors that have none."""
    pairs = sorted(
        (pair for pair in found.pairs if pair.name in selection), key=lambda pair: _order(pair.name)
    )
    belongs = _backbone_test(found, multimodal)
    missing = (
        _missing(found.unmatched_reasoning, selection),
        [item for item in _missing(found.unmatched_multimodal, selection) if belongs(item[0])],
    )
    numel_of = {pair.name: pair.numel(multimodal.shapes) for pair in pairs}
    numel = sum(numel_of.values())
    # Rows of an embedding that only the multimodal vocabulary has.
    rows_numel = sum(math.prod(multimodal.shapes[pair.name]) for pair in pairs) - numel
    # A pair whose shapes differ is missing on both sides but is one parameter of the model.
    missing_numel = max(
        sum(math.prod(side.shapes[name]) for name, _ in items)
        for side, items in zip((reasoning, multimodal), missing, strict=True)
    )
    unselected = _not_selected(found, pairs)
    coverage = Coverage(
        matched=[(source, pair.name) for pair in pairs for source in pair.sources],
        unmatched_reasoning=unselected[0]
        + found.unmatched_reasoning
        + list(reasoning.unloaded.items()),
        unmatched_multimodal=unselected[1]
        + found.unmatched_multimodal
        + list(multimodal.unloaded.items()),
        matched_numel=numel,
        selected_numel=numel + rows_numel + missing_numel,
        unclaimed=_unclaimed(found, selection, multimodal),
        **count_beyond((pair.name for pair in found.pairs), multimodal.shapes, numel_of),
    )
    return Account(pairs, coverage, *missing)


def _missing(unmatched: Sequence[Unmatched], selection: Selection) -> list[Unmatched]:
    return [item for item in unmatched if item[0] in selection and item[1] != TIED]


def _not_selected(
    found: NameAlignment, pairs: Sequence[Pair]
) -> tuple[list[Unmatched], list[Unmatched]]:
    """Return the names of both sides that match and are not selected."""
    chosen = {pair.name for pair in pairs}
    used = {source for pair in pairs for source in pair.sources}
    dropped = [pair for pair in found.pairs if pair.name not in chosen]
    sources = dict.fromkeys(source for pair in dropped for source in pair.sources)
    return (
        [(name, NOT_SELECTED) for name in sources if name not in used],
        [(pair.name, NOT_SELECTED) for pair in dropped],
    )


def _unclaimed(found: NameAlignment, selection: Selection, multimodal: Opened) -> list[str]:
    """Return the matched matrices in selected layers that no preset claims and nothing selects."""
    if not selection.presets:
        return []
    anywhere = replace(selection, modules=("all",))
    return [
        pair.name
        for pair in found.pairs
        if kind_of(pair.name) == "other"
        and len(multimodal.shapes[pair.name]) > 1
        and multimodal.has_values(pair.name)
        and layer_of(pair.name) is not None
        and pair.name in anywhere
        and pair.name not in selection
    ]


def _backbone_test(found: NameAlignment, multimodal: Opened) -> Callable[[str], bool]:
    """Return a function that says whether a multimodal tensor belongs to the language backbone."""
    # Other towers have attention too.
    backbone = containers_of(pair.name for pair in found.pairs)
    heads = [name for name in multimodal.shapes if kind_of(name) == "head"]
    below = f"{found.prefixes[1]}." if found.prefixes[1] else ""

    def belongs(name: str) -> bool:
        if container_of(name) is not None:
            return container_of(name) in backbone
        kind = kind_of(name)
        if kind == "head" and len(heads) == 1:
            return True
        return kind in ("norm", "embed", "head") and bool(below) and bare(name).startswith(below)

    return belongs


def _order(name: str) -> tuple[tuple[int, str], ...]:
    """Sort layer 2 before layer 10, whatever order the files have."""
    return tuple(map(_order_of_component, name.split(".")))


@functools.lru_cache(maxsize=1 << 14)
def _order_of_component(part: str) -> tuple[int, str]:
    # Python converts no more than some thousand digits.
    return (int(part), "") if part.isdecimal() and len(part) <= 9 else (-1, part)
