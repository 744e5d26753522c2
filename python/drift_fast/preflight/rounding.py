"""How much of Δ is rounding of the two checkpoints, judging by samples of their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drift_fast._core import load_differences
from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.name_alignment import Pair
from drift_fast.names import layer_of, module_of
from drift_fast.preflight.fact import Fact
from drift_fast.preflight.findings import Finding

# Tensors of each module, and runs and elements of each tensor.
_TENSORS = 3
_RUNS = 4
_RUN = 4096
# The share of ‖Δ‖ above which Δ is mostly rounding, as `compute_delta` warns.
_MOSTLY = 0.5


@dataclass(frozen=True)
class SampledRounding:
    """The share of ‖Δ‖ that is rounding of the sources, over all and by module."""

    share: float
    modules: dict[str, float]

    def __str__(self) -> str:
        worst = sorted(self.modules.items(), key=lambda item: item[1], reverse=True)[:3]
        shown = ", ".join(f"{module} {share:.1%}" for module, share in worst)
        return (
            f"rounding of the sources is about {self.share:.1%} of ‖Δ‖, by samples of the weights "
            f"({shown})"
        )

    def findings(self, between: tuple[str, str]) -> list[Finding]:
        """Return a note if Δ is mostly rounding."""
        if self.share <= _MOSTLY:
            return []
        message = (
            f"{self}, so that Δ is mostly noise; take checkpoints that are less rounded (float32, "
            "where it was published and not converted), or models that training moved further apart"
        )
        return [Finding("rounding in Δ", "note", Fact(), Fact(), message, between)]


def sample_rounding(pair: AlignedPair) -> SampledRounding | None:
    """Estimate from samples of both checkpoints how much of Δ is rounding.

    None if a checkpoint is on a server, if nothing differs, or if every selected tensor is put
    together from several: those can only be read as a whole.
    """
    if not (pair.reasoning.is_local and pair.multimodal.is_local):
        return None
    sums: dict[str, tuple[float, float]] = {}
    for one in _chosen(pair.comparable(pair.pairs, pair.selection)):
        module = module_of(one.name)
        delta_sq, rounding_sq = sums.get(module, (0.0, 0.0))
        for moments in _sampled(pair, one):
            delta_sq += moments["delta_sq"]
            rounding_sq += moments["rounding_sq"]
        sums[module] = delta_sq, rounding_sq
    total = sum(delta_sq for delta_sq, _ in sums.values())
    if not 0 < total < math.inf:
        return None
    return SampledRounding(
        math.sqrt(sum(rounding_sq for _, rounding_sq in sums.values()) / total),
        {
            module: math.sqrt(rounding_sq / delta_sq)
            for module, (delta_sq, rounding_sq) in sums.items()
            if delta_sq > 0
        },
    )


def _chosen(pairs: Sequence[Pair]) -> list[Pair]:
    """Return a few tensors of each module, from the first layer to the last."""
    modules: dict[str, list[Pair]] = {}
    for pair in pairs:
        if isinstance(pair.source, str):
            modules.setdefault(module_of(pair.name), []).append(pair)
    chosen = []
    for members in modules.values():
        members.sort(key=lambda pair: layer_of(pair.name) or 0)
        places = {index * (len(members) - 1) // (_TENSORS - 1) for index in range(_TENSORS)}
        chosen += [members[place] for place in sorted(places)]
    return chosen


def _sampled(pair: AlignedPair, one: Pair) -> list[Any]:
    """Return the sums over runs of elements that are spread over a tensor."""
    numel = one.numel(pair.shapes)
    length = min(_RUN, -(-numel // _RUNS))
    if not length:
        return []
    starts = {index * (numel - length) // (_RUNS - 1) for index in range(_RUNS)}
    runs = [(one.source, one.name, (start, start + length)) for start in sorted(starts)]
    found = load_differences(
        pair.reasoning.checkpoint,
        pair.multimodal.checkpoint,
        runs,
        "float32",
        ([bytearray(4 * length) for _ in runs], False),
        {"threads": 1},
        detail="rounding",
    )
    return [moments for _, moments in found]
