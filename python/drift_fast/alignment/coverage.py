"""What was matched and what was not, and why: the report that every delta and attachment carries.

Each tensor of either side is listed once: matched, or unmatched with a reason, which may be "not
selected". Nothing is left out in silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from drift_fast.config_files import convert
from drift_fast.names import container_of, kind_of, layer_of

NOT_SELECTED = "not selected"


@dataclass(frozen=True)
class Coverage:
    """Pairs of (reasoning, multimodal) names, leftovers of (name, reason), the share covered."""

    matched: list[tuple[str, str]] = field(default_factory=list)
    unmatched_reasoning: list[tuple[str, str]] = field(default_factory=list)
    unmatched_multimodal: list[tuple[str, str]] = field(default_factory=list)
    matched_numel: int = 0
    selected_numel: int = 0
    backbone_numel: int = 0
    backbone_matched_numel: int = 0

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
        # Deltas written before the backbone was counted have no numbers of it.
        return convert(stored, cls, "coverage")

    def __str__(self) -> str:
        reasoning = sum(reason != NOT_SELECTED for _, reason in self.unmatched_reasoning)
        multimodal = sum(reason != NOT_SELECTED for _, reason in self.unmatched_multimodal)
        backbone = (
            f" ({self.backbone_fraction:.1%} of the backbone's)" if self.backbone_numel else ""
        )
        return (
            f"{len(self.matched)} tensors matched, {self.fraction:.1%} of the selected parameters"
            f"{backbone}; without a match: {reasoning} in the reasoning checkpoint, {multimodal} "
            "in the multimodal one"
        )


def backbone_numel(shapes: Mapping[str, tuple[int, ...]], containers: Iterable[str | None]) -> int:
    """Return the parameters of a language backbone: its layers, and norm, embedding and head.

    `containers` hold the layers, as `names.container_of` names them.
    """
    held = set(containers)
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if (container_of(name) in held if layer_of(name) is not None else kind_of(name) != "other")
    )


def listed(items: list[tuple[str, str]], limit: int = 8) -> str:
    """Return (name, reason) items as lines for a message, the first few in full."""
    lines = [f"\n  {name}: {reason}" for name, reason in items[:limit]]
    if len(items) > limit:
        lines.append(f"\n  and {len(items) - limit} more")
    return "".join(lines)
