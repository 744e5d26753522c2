"""Do matched weights resemble each other, and more than they resemble other layers?

Fine-tuning leaves a weight close to where it came from, so a layer of one model correlates with its
match and with no other layer. Names and shapes cannot show a shift or a permutation of layers; this
does, from a thousand elements of each tensor. What is refused because of it is `refusals`'.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from drift_fast._core import Checkpoint, correlate_samples
from drift_fast.alignment.name_alignment import Pair
from drift_fast.errors import DriftWarning
from drift_fast.names import container_of, kind_of, layer_of, module_of, place_of
from drift_fast.shapes import Shape

# Two unrelated tensors correlate by chance with a deviation of 1/√n; six of them is never chance.
_DEVIATIONS = 6.0
# Below this a correlation shows no common origin, above the other it does; and a module whose
# correlation is a fifth of the highest is not what its name says.
_UNLIKE, _ALIKE, _FIFTH = 0.05, 0.5, 0.2
# A tensor made of several parts is held to more: one wrong part of several leaves the others right.
_FUSED = 0.7
# How many correlations of two layers are taken in all: for 30 modules, all of 186 layers.
_COMPARED = 1 << 20
# Elements below which the correlation of one tensor, and that of all together, says nothing.
_FEW, _ENOUGH = 256, 1024


@dataclass(frozen=True)
class Shift:
    """A layer that resembles another layer more than its match, of `count` among `layers`."""

    source: str
    match: str
    correlation: float
    resembles: str
    higher: float
    count: int
    layers: int


@dataclass(frozen=True)
class Outlier:
    """A tensor that does not resemble its match where the best module does."""

    source: str
    match: str
    correlation: float
    highest: float


@dataclass(frozen=True)
class Similarity:
    """How much matched weights correlate: over all, for each module, and with another layer.

    `elsewhere` is the highest correlation of two different layers; `compared` counts elements.
    """

    matched: float
    elsewhere: float
    modules: dict[str, float]
    compared: int
    shift: Shift | None = None
    outlier: Outlier | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a report."""
        return {
            "matched": self.matched,
            "elsewhere": self.elsewhere,
            "modules": self.modules,
            "compared": self.compared,
        }


def compare_weights(
    reasoning: Checkpoint,
    multimodal: Checkpoint,
    pairs: Sequence[Pair],
    shapes: Mapping[str, Shape],
) -> Similarity | None:
    """Compare samples of the matched weights, layer against layer; None if there are none."""
    table = _Correlations()
    for members in _groups(pairs, shapes):
        matrix, sampled = correlate_samples(
            reasoning, multimodal, [(pair.source, pair.name) for pair in members]
        )
        table.add(members, matrix, sampled)
    if not table.own:
        return None
    own = {module: sum(values) / len(values) for module, values in table.own.items()}
    return Similarity(
        sum(own.values()) / len(own),
        table.elsewhere(),
        own,
        sum(table.sampled.values()),
        table.shift(),
        table.outlier(own),
    )


def warn_if_unrelated(similarity: Similarity | None, first: object, second: object) -> None:
    """Warn of weights that have nothing in common, whose difference has no meaning."""
    if similarity is None or similarity.compared < _ENOUGH or similarity.matched >= _UNLIKE:
        return
    warnings.warn(
        f"matched weights of {first} and {second} do not resemble each other (mean correlation "
        f"{similarity.matched:.2f}): the two models seem to share no base, and Δ between them "
        "leads nowhere. Choose a reasoning model that was trained from the same base",
        DriftWarning,
        stacklevel=4,
    )


def _groups(pairs: Sequence[Pair], shapes: Mapping[str, Shape]) -> list[list[Pair]]:
    """Return modules in all their layers, a few of each kind, for weights of two dimensions."""
    found: dict[tuple[str, str, Shape], list[Pair]] = {}
    for pair in pairs:
        shape, layer = shapes[pair.name], layer_of(pair.name)
        if layer is None or len(shape) < 2 or kind_of(pair.name) == "norm":
            continue
        module = f"{container_of(pair.name)}.*.{place_of(pair.name)}"
        found.setdefault((module_of(pair.name), module, shape), []).append(pair)
    chosen: dict[tuple[str, Shape], list[list[Pair]]] = {}
    for (kind, _, shape), members in sorted(found.items()):
        chosen.setdefault((kind, shape), []).append(members)
    # The first and the last of many alike, such as experts.
    groups = [one for alike in chosen.values() for one in (alike[:1] + alike[1:][-1:])]
    # Every layer is compared with every other; of more layers than any model has, the first and
    # the last are.
    most = math.isqrt(_COMPARED // max(1, len(groups)))
    return [
        group if len(group) <= most else group[: most // 2] + group[-(most // 2) :]
        for group in groups
    ]


class _Correlations:
    """Correlations by layer and by module, and what was compared."""

    def __init__(self) -> None:
        self.own: dict[str, list[float]] = {}
        self.sampled: dict[str, int] = {}
        self._pairs: dict[str, list[Pair]] = {}
        # For any two layers the sum of the correlations, how many, and the sum of their variances.
        self._sums: dict[tuple[int, int], tuple[float, int, float]] = {}
        self._names: dict[int, tuple[str, str]] = {}

    def add(self, members: Sequence[Pair], matrix: Sequence[float], sampled: int) -> None:
        """Take the correlations of one module; a tensor that does not vary says nothing."""
        if not sampled:
            return
        size = len(members)
        layers = [layer_of(pair.name) or 0 for pair in members]
        module = module_of(members[0].name)
        for row, column in product(range(size), repeat=2):
            value = matrix[row * size + column]
            if not math.isfinite(value):
                continue
            if row == column:
                self.own.setdefault(module, []).append(value)
                self._pairs.setdefault(module, []).append(members[row])
                self.sampled[module] = self.sampled.get(module, 0) + sampled
                self._names.setdefault(layers[row], (members[row].sources[0], members[row].name))
            key = layers[row], layers[column]
            total, times, variance = self._sums.get(key, (0.0, 0, 0.0))
            self._sums[key] = total + value, times + 1, variance + 1 / sampled

    def elsewhere(self) -> float:
        """Return the highest mean correlation of two different layers."""
        means = [total / times for (a, b), (total, times, _) in self._sums.items() if a != b]
        return max(means, default=0.0)

    def shift(self) -> Shift | None:
        """Return the layer that resembles another one most beyond its own match."""
        shifted = []
        for (row, column), (total, times, variance) in sorted(self._sums.items()):
            own = self._sums.get((row, row))
            if row == column or own is None or column not in self._names:
                continue
            value, here = total / times, own[0] / own[1]
            margin = max(_DEVIATIONS * variance**0.5 / times, 2 * _UNLIKE)
            if value > here + margin:
                shifted.append((row, column, value, here))
        if not shifted:
            return None
        row, column, value, here = max(shifted, key=lambda item: item[2] - item[3])
        return Shift(
            *self._names[row],
            here,
            self._names[column][1],
            value,
            len({item[0] for item in shifted}),
            len(self._names),
        )

    def outlier(self, means: Mapping[str, float]) -> Outlier | None:
        """Return the first tensor that does not resemble its match where others do."""
        highest = max(means.values())
        if highest < _ALIKE:
            return None
        for module, values in self.own.items():
            enough = self.sampled[module] >= _FEW * len(values)
            for pair, value in zip(self._pairs[module], values, strict=True):
                # A fused tensor may be right in some of its parts and wrong in others.
                least = highest * (_FUSED if pair.parts else _FIFTH)
                if (value if enough else means[module]) < least:
                    return Outlier(pair.sources[0], pair.name, value, highest)
        return None
