"""How the tensors of two models match by name and shape: each pair, and what is left over and why.

Owns the results of `match`, not how they are found. The two sides are called reasoning and
multimodal after the checkpoints that they mostly are; where a delta is attached to a model in
memory, they are the delta and the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from drift_fast.alignment.layout import Layout, Rectangle, covered
from drift_fast.shapes import Shape

# A tensor's name, and why it has no match.
Unmatched = tuple[str, str]


@dataclass(frozen=True)
class TensorIndex:
    """The tensors of one model, and how to ask for them in the form that they have in memory."""

    shapes: Mapping[str, Shape]
    convert: Callable[[], dict[str, Layout] | None] = lambda: None


@dataclass(frozen=True, slots=True)
class Pair:
    """A multimodal tensor, and the reasoning tensor or the parts of several that match it."""

    name: str
    source: str | list[Rectangle]

    @property
    def sources(self) -> list[str]:
        """Names of the reasoning tensors, each once."""
        if isinstance(self.source, str):
            return [self.source]
        return list(dict.fromkeys(part[0] for part in self.source))

    @property
    def parts(self) -> list[Rectangle]:
        """The parts; none where the source is a whole tensor."""
        return [] if isinstance(self.source, str) else self.source

    def numel(self, shapes: Mapping[str, Shape]) -> int:
        """Return how many elements of the multimodal tensor have a match."""
        return covered(self.parts) if self.parts else math.prod(shapes[self.name])


@dataclass(frozen=True)
class NameAlignment:
    """Pairs in the order of the multimodal side, and every other tensor with the reason.

    `alternatives` are other pairs of prefixes and how many tensors they would match. `method` says
    how the pairs were found. `vocabularies` are stated pairs of embeddings and heads with different
    numbers of rows, multimodal name to reasoning name; see `embeddings`.
    """

    pairs: list[Pair]
    unmatched_reasoning: list[Unmatched]
    unmatched_multimodal: list[Unmatched]
    prefixes: tuple[str, str]
    alternatives: list[tuple[str, str, int]] = field(default_factory=list)
    layer_conflict: str = ""
    method: str = "names"
    vocabularies: dict[str, str] = field(default_factory=dict)
