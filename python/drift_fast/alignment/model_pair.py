"""Two open checkpoints that are matched: what verbs are given, and what refusals are judged by."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from drift_fast.alignment.account import Account
from drift_fast.alignment.coverage import Coverage
from drift_fast.alignment.name_alignment import NameAlignment, Pair
from drift_fast.alignment.options import PairOptions
from drift_fast.alignment.similarity import Similarity
from drift_fast.alignment.tied import Ties
from drift_fast.checkpoints.opened import ITEMSIZE, Opened
from drift_fast.errors import AlignmentError
from drift_fast.paths import local_path
from drift_fast.selection import Selection
from drift_fast.shapes import Shape

# Where one model is given twice; most verbs then have nothing to do.
SAME = (
    "the same model was given twice, so Δ is zero everywhere: give the reasoning model first and "
    "the multimodal one second"
)


def is_same_source(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two sources are one path or one id, before either is opened."""
    one, other = map(local_path, (first, second))
    return one.resolve() == other.resolve()


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """Two open checkpoints, and how all of their tensors match by name and shape.

    `failure` is why nothing could be matched. `stated` says that a mapping was given. `similarity`
    is None until weights were compared.
    """

    reasoning: Opened
    multimodal: Opened
    alignment: NameAlignment
    stated: bool = False
    failure: AlignmentError | None = None
    similarity: Similarity | None = None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of the multimodal tensors."""
        return self.multimodal.shapes

    @property
    def paths(self) -> tuple[str, str]:
        """Where both checkpoints are, for messages."""
        return str(self.reasoning.source.path), str(self.multimodal.source.path)

    @property
    def is_one_model(self) -> bool:
        """Whether the same checkpoint was given twice."""
        first, second = (Path(side.checkpoint.path) for side in (self.reasoning, self.multimodal))
        return first.resolve() == second.resolve()

    def comparable(self, pairs: list[Pair], selection: Selection) -> list[Pair]:
        """Return the pairs whose weights can be compared: of the selected modules, in any layer."""
        everywhere = replace(selection, layers=None)
        return [
            pair
            for pair in pairs
            if pair.name in everywhere
            and self.multimodal.has_values(pair.name)
            and all(self.reasoning.has_values(name) for name in pair.sources)
            # Parts of codes are refused when they are subtracted.
            and not (pair.parts and any(name in self.reasoning.scales for name in pair.sources))
        ]


@dataclass(frozen=True, kw_only=True)
class AlignedPair(ModelPair):
    """Two open checkpoints and the selected pairs of tensors, layer by layer.

    `rows` says how the rows of embeddings and heads were matched, and `row_problems` why they could
    not be, by multimodal name. `ties` says of either model whether its head is its embedding.
    """

    options: PairOptions
    selection: Selection
    account: Account
    rows: dict[str, str] = field(default_factory=dict)
    row_problems: dict[str, str] = field(default_factory=dict)
    ties: tuple[Ties, Ties] = (Ties(tied=False), Ties(tied=False))

    @property
    def pairs(self) -> list[Pair]:
        """The selected pairs."""
        return self.account.pairs

    @property
    def coverage(self) -> Coverage:
        """Which selected tensors have a match, and which have none."""
        return self.account.coverage

    @cached_property
    def nbytes(self) -> int:
        """How many bytes the selected pairs take in both checkpoints."""
        return sum(map(self.nbytes_of, self.pairs))

    def nbytes_of(self, pair: Pair) -> int:
        """Return how many bytes one pair takes in both checkpoints."""
        source = pair.source if isinstance(pair.source, str) else pair.source[0].source
        itemsize = ITEMSIZE.get(self.reasoning.dtypes[source], 1)
        return self.multimodal.nbytes(pair.name) + pair.numel(self.shapes) * itemsize

    def needed(self) -> tuple[set[str], set[str]]:
        """Return the stored tensors of both checkpoints that the pairs need, scales included."""
        names = (
            {source for pair in self.pairs for source in pair.sources},
            {pair.name for pair in self.pairs},
        )
        # Heads that are stored although they are tied are compared with their embeddings.
        sides = zip((self.reasoning, self.multimodal), names, self.ties, strict=True)
        first, second = (
            side.stored_names({*held, *ties.stored, *ties.stored.values()})
            for side, held, ties in sides
        )
        return first, second

    def to_dict(self) -> dict[str, Any]:
        """Return how the alignment came about, under the keys of `drift.json`."""
        return {
            "prefixes": list(self.alignment.prefixes),
            "rivals": [list(one) for one in self.alignment.alternatives],
            "by": self.alignment.method,
            "composed": {pair.name: pair.sources for pair in self.pairs if pair.parts},
            "rows": self.rows,
            "likeness": None if self.similarity is None else self.similarity.to_dict(),
        }
