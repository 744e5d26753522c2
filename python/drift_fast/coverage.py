"""What was paired and what was not, and why: the account that every delta and attachment carries.

Each tensor of either side is listed once: matched, or unmatched with a reason, of which
"not selected" is one. Nothing is left out in silence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NOT_SELECTED = "not selected"


@dataclass(frozen=True)
class Coverage:
    """Pairs of (reasoning, multimodal) names, leftovers of (name, reason), the share covered."""

    matched: list[tuple[str, str]] = field(default_factory=list)
    unmatched_reasoning: list[tuple[str, str]] = field(default_factory=list)
    unmatched_multimodal: list[tuple[str, str]] = field(default_factory=list)
    matched_numel: int = 0
    selected_numel: int = 0

    @property
    def fraction(self) -> float:
        """Share of the selected parameters, counted by elements, that has a partner."""
        return self.matched_numel / self.selected_numel if self.selected_numel else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return lists and numbers for `drift.json`."""
        return {
            "matched": [list(pair) for pair in self.matched],
            "unmatched_reasoning": [list(item) for item in self.unmatched_reasoning],
            "unmatched_multimodal": [list(item) for item in self.unmatched_multimodal],
            "matched_numel": self.matched_numel,
            "selected_numel": self.selected_numel,
            "fraction": self.fraction,
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Coverage:
        """Restore what `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError: something `to_json` did not write.
        """

        def pairs(key: str) -> list[tuple[str, str]]:
            return [(str(first), str(second)) for first, second in stored[key]]

        return cls(
            pairs("matched"),
            pairs("unmatched_reasoning"),
            pairs("unmatched_multimodal"),
            int(stored["matched_numel"]),
            int(stored["selected_numel"]),
        )

    def __str__(self) -> str:
        left = sum(reason != NOT_SELECTED for _, reason in self.unmatched_reasoning)
        right = sum(reason != NOT_SELECTED for _, reason in self.unmatched_multimodal)
        return (
            f"{len(self.matched)} tensors matched, {self.fraction:.1%} of the selected parameters; "
            f"without a partner: {left} in the reasoning checkpoint, {right} in the multimodal one"
        )


def listed(items: list[tuple[str, str]], limit: int = 8) -> str:
    """Return (name, reason) items as lines for a message, the first few in full."""
    lines = [f"\n  {name}: {reason}" for name, reason in items[:limit]]
    if len(items) > limit:
        lines.append(f"\n  and {len(items) - limit} more")
    return "".join(lines)
