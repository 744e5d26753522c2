"""How far apart three models are, from samples of the weights that they have in common.

Owns which elements are read. Both differences from the multimodal model are taken at the same ones,
so the third is known from them: its square, and every product. What follows is `lineage`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from drift_fast._core import load_differences
from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.name_alignment import Pair
from drift_fast.checkpoints.opened import Opened
from drift_fast.names import kind_of, layer_of

# Tensors, spans of each and elements of a span; fewer where each span is a request to a server.
_LOCAL, _REMOTE = (256, 2, 1024), (24, 1, 4096)
_LIMITS: Any = {"threads": 1, "memory": 1 << 24}
# Bits of a significand after the first.
_SIGNIFICAND_NBITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Distances:
    """Squared distances of three models in units of the base's ‖W‖², and what they mean.

    Each is the mean over tensors of that of a tensor, so large ones do not hide small ones.
    `similarity_…` are cosines of the weights themselves. `rounding_…` is the square that rounding
    to a model's dtype amounts to; `dtypes` has the dtypes in the same order.
    """

    reasoning_base: float
    multimodal_base: float
    reasoning_multimodal: float
    similarity_reasoning_base: float
    similarity_multimodal_base: float
    similarity_reasoning_multimodal: float
    rounding_reasoning: float
    rounding_multimodal: float
    rounding_base: float
    dtypes: tuple[str, str, str]
    tensors: int
    elements: int

    @property
    def product(self) -> float:
        """⟨R−B, V−B⟩, which is what the base learned since the three parted: its own branch²."""
        return (self.reasoning_base + self.multimodal_base - self.reasoning_multimodal) / 2

    @property
    def branches(self) -> tuple[float, float, float]:
        """The squares of what each model has of its own: of reasoning, multimodal and base.

        Three differences at right angles meet in a point, the last ancestor of all three.
        """
        base = self.product
        return self.reasoning_base - base, self.multimodal_base - base, base

    @property
    def cosine(self) -> float:
        """The cosine of R−B and V−B, NaN where one of them is zero."""
        both = self.reasoning_base * self.multimodal_base
        return self.product / math.sqrt(both) if both else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the cosine of both differences from the base."""
        return asdict(self) | {"dtypes": list(self.dtypes), "cosine": self.cosine}


@dataclass(frozen=True)
class _Sampled:
    """One tensor of the multimodal model, and that of the reasoning model and of the base."""

    name: str
    reasoning: str
    base: str
    spans: Spans


def measure(pair: AlignedPair, base: AlignedPair) -> Distances | None:
    """Compare the selected weights of layers, in samples; None if there are none to compare.

    `pair` and `base` are the reasoning model and the base, each aligned with the multimodal model.

    Raises:
        CheckpointError, OSError: a checkpoint that cannot be read.
    """
    models = [pair.reasoning, pair.multimodal, base.reasoning]
    chosen = _choose(pair, base, local=all(model.is_local for model in models))
    names = [[one.reasoning for one in chosen], [x.name for x in chosen], [x.base for x in chosen]]
    spans = [one.spans for one in chosen]
    opened = [
        model.download_elements(dict(zip(of_model, spans, strict=True)))
        for model, of_model in zip(models, names, strict=True)
    ]
    rows = [row for one in chosen if (row := _squares(one, *opened)) is not None]
    if not rows:
        return None
    means = np.mean(np.array([squares for squares, _ in rows]), axis=0)
    dtypes = [
        max((model.dtypes[name] for name in of_model), key=_rounding)
        for model, of_model in zip(models, names, strict=True)
    ]
    a, b, d, first, second, between = map(float, means)
    roundings = [_rounding(dtype) for dtype in dtypes]
    return Distances(
        reasoning_base=a,
        multimodal_base=b,
        reasoning_multimodal=d,
        similarity_reasoning_base=first,
        similarity_multimodal_base=second,
        similarity_reasoning_multimodal=between,
        rounding_reasoning=roundings[0],
        rounding_multimodal=roundings[1],
        rounding_base=roundings[2],
        dtypes=(dtypes[0], dtypes[1], dtypes[2]),
        tensors=len(rows),
        elements=sum(count for _, count in rows),
    )


def _choose(pair: AlignedPair, base: AlignedPair, *, local: bool) -> list[_Sampled]:
    """Return tensors that all three have whole, spread evenly over the model."""
    of_base = {one.name: one.source for one in _comparable(base)}
    both = sorted(
        (one.name, one.source, of_base[one.name])
        for one in _comparable(pair)
        if one.name in of_base
    )
    most, count, length = _LOCAL if local else _REMOTE
    step = max(1.0, len(both) / most)
    places = [both[int(at * step)] for at in range(min(most, len(both)))]
    return [
        _Sampled(name, str(source), str(other), _spans(math.prod(pair.shapes[name]), count, length))
        for name, source, other in places
    ]


def _comparable(pair: AlignedPair) -> Iterable[Pair]:
    """Yield the matrices of layers that are stored as numbers and one for one in both."""
    for one in pair.comparable(pair.pairs, pair.selection):
        matrix = layer_of(one.name) is not None and len(pair.shapes[one.name]) > 1
        if not matrix or kind_of(one.name) == "norm" or one.name in pair.multimodal.scales:
            continue
        source = one.source
        if not isinstance(source, str) or source in pair.reasoning.scales:
            continue
        if pair.reasoning.shapes[source] == pair.shapes[one.name]:
            yield one


def _spans(numel: int, count: int, length: int) -> Spans:
    if numel <= count * length:
        return [(0, numel)]
    # In the middle of each part, since the edges of a tensor are where it is unusual.
    part = numel // count
    starts = (part * at + (part - length) // 2 for at in range(count))
    return [(start, start + length) for start in starts]


def _squares(
    one: _Sampled, reasoning: Opened, multimodal: Opened, base: Opened
) -> tuple[list[float], int] | None:
    """Return what `Distances` begins with, of one tensor, and how many elements were read."""
    sums, count = np.zeros(6), 0
    for span in one.spans:
        first, of_first = _difference(reasoning, one.reasoning, multimodal, one.name, span)
        second, of_second = _difference(base, one.base, multimodal, one.name, span)
        between = first - second
        found = np.array(
            [
                between @ between,
                second @ second,
                first @ first,
                of_first["reasoning_sq"],
                of_first["multimodal_sq"],
                of_second["reasoning_sq"],
            ]
        )
        if np.isfinite(found).all():
            sums, count = sums + found, count + span[1] - span[0]
    a, b, d, r, v, w = map(float, sums)
    if not (r and v and w):
        return None

    def similarity(one_sq: float, other_sq: float, apart: float) -> float:
        return (one_sq + other_sq - apart) / (2 * math.sqrt(one_sq * other_sq))

    alike = [similarity(r, w, a), similarity(v, w, b), similarity(r, v, d)]
    return [a / w, b / w, d / w, *alike], count


def _difference(
    side: Opened, source: str, multimodal: Opened, name: str, span: tuple[int, int]
) -> tuple[Any, Mapping[str, Any]]:
    out = np.empty(span[1] - span[0])
    checkpoints = side.checkpoint, multimodal.checkpoint
    into = [out.view(np.uint8)], False
    ((_, moments),) = load_differences(
        *checkpoints, [(source, name, span)], "float64", into, _LIMITS, detail="moments"
    )
    return out, moments


def _rounding(dtype: str) -> float:
    """Return the mean square of rounding to a dtype, in units of that of the weights.

    A unit in the last place is uniform in its error, and 2.2 is the mean square of a significand.
    """
    return 4.0 ** -_SIGNIFICAND_NBITS[dtype] / 12 / 2.2
