"""What was matched and what was not, and why: the report that every delta and attachment carries.

Each tensor of either side is listed once: matched, or unmatched with a reason, which may be "not
selected". Nothing is left out in silence.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from drift_fast.config_files import convert
from drift_fast.names import Parsed, module_of, parsed
from drift_fast.shapes import Shape
from drift_fast.tables import Block, Shown, Table

NOT_SELECTED = "not selected"
# How the core begins the reason of what is in neither layers nor embeddings of the backbone.
OUTSIDE = "outside the language backbone"


@dataclass(frozen=True, repr=False)
class Coverage(Shown):
    """Pairs of (reasoning, multimodal) names, leftovers of (name, reason), the share covered.

    `unclaimed` are the matrices in paired layers that are selected by no preset and by nothing
    else: routers, say, or a projection whose name is not known.
    """

    matched: list[tuple[str, str]] = field(default_factory=list)
    unmatched_reasoning: list[tuple[str, str]] = field(default_factory=list)
    unmatched_multimodal: list[tuple[str, str]] = field(default_factory=list)
    matched_numel: int = 0
    selected_numel: int = 0
    backbone_numel: int = 0
    backbone_matched_numel: int = 0
    layers_numel: int = 0
    layers_matched_numel: int = 0
    unclaimed: list[str] = field(default_factory=list)

    @property
    def layers_fraction(self) -> float:
        """Share of the paired layers' parameters, selected or not, that has a match."""
        return self.layers_matched_numel / self.layers_numel if self.layers_numel else 0.0

    @property
    def backbone_fraction(self) -> float:
        """Share of the language backbone's parameters, selected or not, that has a match."""
        return self.backbone_matched_numel / self.backbone_numel if self.backbone_numel else 0.0

    @property
    def fraction(self) -> float:
        """Share of the selected parameters, counted by elements, that has a match."""
        return self.matched_numel / self.selected_numel if self.selected_numel else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return lists and numbers for `drift.json`."""
        return {
            "matched": [list(pair) for pair in self.matched],
            "unmatched_reasoning": [list(item) for item in self.unmatched_reasoning],
            "unmatched_multimodal": [list(item) for item in self.unmatched_multimodal],
            "matched_numel": self.matched_numel,
            "selected_numel": self.selected_numel,
            "fraction": self.fraction,
            "backbone_numel": self.backbone_numel,
            "backbone_matched_numel": self.backbone_matched_numel,
            "backbone_fraction": self.backbone_fraction,
            "layers_numel": self.layers_numel,
            "layers_matched_numel": self.layers_matched_numel,
            "layers_fraction": self.layers_fraction,
            "unclaimed": list(self.unclaimed),
        }

    @classmethod
    def from_dict(cls, stored: object) -> Coverage:
        """Restore what `to_dict` returned.

        Raises:
            ValueError: something that `to_dict` did not write; the message names the key.
        """
        absent = {each.name for each in fields(cls)[:5]} - convert(stored, dict[str, Any]).keys()
        if absent:
            raise ValueError(f"coverage has no {min(absent)}")
        # Deltas written before backbone and layers were counted have no numbers of them.
        return convert(stored, cls, "coverage")

    def headline(self) -> str:
        """Return the sentence that every command prints."""
        return str(self)

    def blocks(self) -> list[Block]:
        """Return the sentence, and why tensors have no match."""
        counts: dict[tuple[str, str], list[str]] = {}
        for side, items in self._unmatched.items():
            for name, reason in items:
                counts.setdefault((side, _without_name(reason, name)), []).append(name)
        rows = [
            (side, reason, f"{len(names):,}", modules_in(names, 4))
            for (side, reason), names in counts.items()
        ]
        without = Table(("without a match", "reason", "tensors", "modules"), rows, "<<>")
        return [str(self), without] if rows else [str(self)]

    def records(self) -> list[dict[str, Any]]:
        """Return a row for each match, and for each tensor without one, with the reason."""
        found = [{"reasoning": one, "multimodal": other} for one, other in self.matched]
        left = [
            {side: name, "reason": reason}
            for side, items in self._unmatched.items()
            for name, reason in items
        ]
        empty = {"reasoning": None, "multimodal": None, "reason": None}
        return [empty | row for row in found + left]

    @property
    def _unmatched(self) -> dict[str, list[tuple[str, str]]]:
        return {"reasoning": self.unmatched_reasoning, "multimodal": self.unmatched_multimodal}

    def __str__(self) -> str:
        reasoning = sum(reason != NOT_SELECTED for _, reason in self.unmatched_reasoning)
        multimodal = sum(reason != NOT_SELECTED for _, reason in self.unmatched_multimodal)
        towers = sum(reason.startswith(OUTSIDE) for _, reason in self.unmatched_multimodal)
        alone = f"; towers and projectors left alone ({towers} tensors)" if towers else ""
        shares = [
            f"{share:.1%} of the {what}"
            for share, what, numel in (
                (self.layers_fraction, "paired layers'", self.layers_numel),
                (self.backbone_fraction, "backbone's", self.backbone_numel),
            )
            if numel
        ]
        within = f" ({', '.join(shares)})" if shares else ""
        unclaimed = f"; of no preset: {modules_in(self.unclaimed)}" if self.unclaimed else ""
        return (
            f"{len(self.matched)} tensors matched, {self.fraction:.1%} of the selected parameters"
            f"{within}; without a match: {reasoning} in the reasoning checkpoint, "
            f"{multimodal - towers} in the multimodal one{alone}{unclaimed}"
        )


def _without_name(reason: str, name: str) -> str:
    """Return a reason without the name that it is about, so that those of one kind are the same."""
    end = ".".join(name.split(".")[-2:])
    return " ".join("…" if word.endswith(end) else word for word in reason.split(" "))


def modules_in(names: Iterable[str], limit: int = 8) -> str:
    """Return modules and how many tensors each has, the first few, for a message."""
    counts = Counter(map(module_of, names))
    found = [f"{module} ({count})" for module, count in counts.most_common(limit)]
    return ", ".join(found) + (f" and {len(counts) - limit} more" if len(counts) > limit else "")


class Beyond(TypedDict):
    """What a coverage counts beyond the selection, under its names there."""

    backbone_numel: int
    backbone_matched_numel: int
    layers_numel: int
    layers_matched_numel: int


def count_beyond(
    paired: Iterable[str], shapes: Mapping[str, Shape], matched: Mapping[str, int]
) -> Beyond:
    """Count the parameters of the backbone and of the paired layers, in all and with a match.

    `paired` are the names that have a match, selected or not, `shapes` those of the whole model,
    and `matched` the numbers of elements that are matched. The backbone is the containers of paired
    layers, with norm, embedding and head.
    """
    layers = {(one.container, one.layer) for one in map(parsed, paired) if one.layer is not None}
    containers = {container for container, _ in layers}

    def count(items: Iterable[tuple[str, int]]) -> tuple[int, int]:
        by_place: dict[Parsed, int] = defaultdict(int)
        for name, numel in items:
            by_place[parsed(name)] += numel
        backbone = in_layers = 0
        for one, numel in by_place.items():
            if one.container in containers if one.layer is not None else one.kind != "other":
                backbone += numel
            if (one.container, one.layer) in layers:
                in_layers += numel
        return backbone, in_layers

    backbone, in_layers = count((name, math.prod(shape)) for name, shape in shapes.items())
    backbone_matched, in_layers_matched = count(matched.items())
    return {
        "backbone_numel": backbone,
        "backbone_matched_numel": backbone_matched,
        "layers_numel": in_layers,
        "layers_matched_numel": in_layers_matched,
    }


def listed(items: list[tuple[str, str]], limit: int = 8) -> str:
    """Return (name, reason) items as lines for a message, the first few in full."""
    lines = [f"\n  {name}: {reason}" for name, reason in items[:limit]]
    if len(items) > limit:
        lines.append(f"\n  and {len(items) - limit} more")
    return "".join(lines)
