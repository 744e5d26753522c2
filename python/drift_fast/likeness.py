"""Do matched weights resemble each other, and more than they resemble other layers?

Fine-tuning leaves a weight close to where it came from, so a layer of one model correlates with its
counterpart and with no other. Names and shapes cannot show a shift or a permutation of layers; this
does, from a thousand elements of each tensor.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drift_fast import _core
from drift_fast.errors import AlignmentError, DriftWarning
from drift_fast.layout import Shape
from drift_fast.matching import Pair
from drift_fast.select import kind_of, layer_of

# Modules that are compared; of more, experts say, an even choice.
_MODULES = 16
# Two unrelated tensors correlate by chance with a deviation of 1/√n; six of them is never chance.
_DEVIATIONS = 6.0
# Below this a correlation shows no common origin, above the other it does; and a module whose
# correlation is a fifth of the highest is not what its name says.
_UNLIKE, _ALIKE, _FIFTH = 0.05, 0.5, 0.2
# Elements below which a correlation near zero says nothing.
_ENOUGH = 4096


@dataclass(frozen=True)
class Likeness:
    """Correlation of matched weights, over all and of each module, the highest with another layer,
    and the number of elements compared.
    """

    matched: float
    elsewhere: float
    modules: dict[str, float]
    compared: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a report."""
        return {
            "matched": self.matched,
            "elsewhere": self.elsewhere,
            "modules": self.modules,
            "compared": self.compared,
        }


def compare(
    reasoning: _core.Checkpoint,
    multimodal: _core.Checkpoint,
    pairs: Sequence[Pair],
    shapes: Mapping[str, Shape],
) -> Likeness | None:
    """Compare samples of the matched weights, layer against layer; None where there is nothing to.

    Raises:
        AlignmentError: a layer that resembles another one more than its own counterpart, or a
            module that does not resemble its counterpart where the others do.
    """
    groups = _groups(pairs, shapes)
    own: dict[str, float] = {}
    sums: dict[tuple[int, int], tuple[float, int]] = {}
    names: dict[int, tuple[str, str]] = {}
    count = compared = 0
    for module, members in groups.items():
        matrix, sampled = _core.likeness(
            reasoning, multimodal, [(pair.source, pair.name) for pair in members]
        )
        size = len(members)
        if not all(math.isfinite(value) for value in matrix):
            # A tensor that does not vary, zeros say, resembles nothing and everything.
            continue
        layers = [layer_of(pair.name) or 0 for pair in members]
        own[module] = sum(matrix[at * size + at] for at in range(size)) / size
        compared += sampled * size
        count = max(count, sampled)
        for row in range(size):
            names.setdefault(layers[row], (members[row].sources[0], members[row].name))
            for column in range(size):
                total, times = sums.get((layers[row], layers[column]), (0.0, 0))
                value = matrix[row * size + column]
                sums[layers[row], layers[column]] = total + value, times + 1
    if not sums:
        return None
    mean = {key: (total / times, times) for key, (total, times) in sums.items()}
    _refuse_shift(mean, names, count)
    _refuse_module(own, groups)
    matched = sum(own.values()) / len(own)
    elsewhere = max((value for (a, b), (value, _) in mean.items() if a != b), default=0.0)
    return Likeness(matched, elsewhere, own, compared)


def warn_if_unrelated(likeness: Likeness | None, first: object, second: object) -> None:
    """Warn of weights that have nothing in common, so that their difference is no direction."""
    if likeness is None or likeness.compared < _ENOUGH or likeness.matched >= _UNLIKE:
        return
    warnings.warn(
        f"matched weights of {first} and {second} do not resemble each other (mean correlation "
        f"{likeness.matched:.2f}): the two models seem to share no base, and Δ between them leads "
        "nowhere. Choose a reasoning model that was trained from the same base",
        DriftWarning,
        stacklevel=4,
    )


def _groups(pairs: Sequence[Pair], shapes: Mapping[str, Shape]) -> dict[str, list[Pair]]:
    """Return each module in all its layers, for weights of two dimensions or more."""
    found: dict[tuple[str, Shape], list[Pair]] = {}
    for pair in pairs:
        shape, layer = shapes[pair.name], layer_of(pair.name)
        if layer is None or len(shape) < 2 or kind_of(pair.name) == "norm":
            continue
        module = re.sub(rf"(^|\.){layer}(?=\.|$)", r"\1*", pair.name, count=1)
        found.setdefault((module, shape), []).append(pair)
    chosen = sorted(found)
    step = max(1, len(chosen) / _MODULES)
    picked = [chosen[int(at * step)] for at in range(min(len(chosen), _MODULES))]
    return {module: found[module, shape] for module, shape in picked}


def _refuse_shift(
    mean: Mapping[tuple[int, int], tuple[float, int]],
    names: Mapping[int, tuple[str, str]],
    sampled: int,
) -> None:
    shifted = []
    for (row, column), (value, times) in sorted(mean.items()):
        here, _ = mean[row, row]
        margin = max(_DEVIATIONS / (sampled * times) ** 0.5, 2 * _UNLIKE)
        if row != column and value > here + margin:
            shifted.append((row, column, value, here))
    if not shifted:
        return
    row, column, value, here = max(shifted, key=lambda item: item[2] - item[3])
    raise AlignmentError(
        f"the layers do not belong together: {names[row][0]} resembles {names[column][1]} "
        f"(correlation {value:.2f}) and not its counterpart by name, {names[row][1]} ({here:.2f}); "
        f"so do {len({item[0] for item in shifted})} of {len(names)} layers. The layers of one "
        "model are shifted or permuted; state the right pairs with mapping=…, or pass "
        "check_weights=False if this is meant"
    )


def _refuse_module(own: Mapping[str, float], groups: Mapping[str, Sequence[Pair]]) -> None:
    highest = max(own.values())
    if highest < _ALIKE:
        return
    for module, value in own.items():
        if value < _FIFTH * highest:
            pair = groups[module][0]
            raise AlignmentError(
                f"{pair.sources[0]} does not resemble {pair.name} (correlation {value:.2f} over "
                f"the layers) although other modules do ({highest:.2f}): the two are stored in "
                "different orders, or one was trained anew. Leave the module out, or pass "
                "check_weights=False if this is meant"
            )
