"""What is taken out of a Δ, by tensor, and the Δ that is left.

The result is a sum of two deltas, Δ and −P Δ, which `Delta` reads, measures and writes like any.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from drift_fast.alignment.coverage import Coverage
from drift_fast.delta.combined import Combined
from drift_fast.delta.delta import Delta
from drift_fast.delta.format import DESCRIPTION
from drift_fast.delta.protocol import DeltaLike, label_of, on_disk
from drift_fast.delta.summed import Summed
from drift_fast.inject.target import Target


class Removed(dict[str, torch.Tensor]):
    """P Δ: tensors on the CPU by the delta's names, of those that something is taken from."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._all = shapes

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: self._all[name] for name in self}

    def put(self, target: Target, part: torch.Tensor) -> None:
        """Take the P Δ of a target, flat and whole, to the tensors that it is made of."""
        if not target.parts:
            self[target.delta_name] = part.view(self._all[target.delta_name])
        for name in target.sources:
            if name not in self:
                self[name] = torch.zeros(self._all[name], dtype=part.dtype)
        if target.parts:
            target.spread(part.view(target.shape), self)
        self.update(dict.fromkeys(target.tied, self[target.delta_name]))


class Protected(Combined):
    """Δ − P Δ, tensor by tensor, when it is asked for."""

    def __init__(self, delta: DeltaLike, removed: Removed, dtype: str | None) -> None:
        kept = str(getattr(delta, "dtype", "float32")) if dtype is None else dtype
        super().__init__([(delta, 1.0), (removed, -1.0)], missing_as_zero=True, dtype=kept)
        self._delta = delta

    def multimodal_sq(self, name: str) -> float:
        stored = on_disk(self._delta)
        return math.nan if stored is None else stored.stats[name].multimodal_sq

    def opened(self, described: Mapping[str, Any], coverage: Coverage) -> Delta:
        """Return this as a `Delta`; `described` is how it was measured, for `drift.json`."""
        source = self._delta
        found = getattr(source, "coverage", None)
        stated = {"delta": label_of(source), "sources": getattr(source, "sources", None)}
        return Delta(
            Summed(self),
            stored_dtype=self.dtype,
            coverage=found if isinstance(found, Coverage) else coverage,
            sources={"protected": stated | _fingerprint(source) | dict(described)},
            alignment=getattr(source, "alignment", {}),
            selection=str(getattr(source, "selection", "")),
        )


def _fingerprint(delta: DeltaLike) -> dict[str, str]:
    """Return what identifies a delta on disk: its description has the checksums of its tensors."""
    stored = on_disk(delta)
    if stored is None:
        return {}
    text = (stored.path / DESCRIPTION).read_bytes()
    return {"sha256_of_description": hashlib.sha256(text).hexdigest()}
