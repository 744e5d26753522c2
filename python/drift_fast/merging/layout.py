"""Every tensor of a merge's output in file order: merged from what and how, or why it is copied.

Turns alignments into the core's list of tensors; opens and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drift_fast.alignment.coverage import listed
from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.name_alignment import Pair
from drift_fast.delta.delta import Delta
from drift_fast.errors import AlignmentError, CheckpointError
from drift_fast.merging.config import DTYPES
from drift_fast.merging.exclusions import LEFT_OUT_AS_TIED, warn_of_routers, why_a_buffer
from drift_fast.merging.method_options import REST, ChosenMethod
from drift_fast.names import kind_of

if TYPE_CHECKING:
    from drift_fast._core import _Blended as Job


@dataclass(frozen=True, slots=True)
class Blended:
    """A tensor to merge: where its values come from, and its weight."""

    pair: Pair
    of_base: Pair | None
    weight: float
    dtype: str


@dataclass(frozen=True)
class Alignments:
    """How the multimodal model is aligned with the reasoning model, and with the base if any.

    `delta` is one that is in the reasoning model's place, which is then M + Δ.
    """

    reasoning: AlignedPair
    base: AlignedPair | None = None
    delta: Delta | None = None

    @property
    def by_role(self) -> dict[str, AlignedPair]:
        """The alignments by the role of the other model."""
        found = {"reasoning": self.reasoning}
        return found if self.base is None else found | {"base": self.base}


@dataclass(frozen=True)
class MergeLayout:
    """Every tensor of the multimodal checkpoint in file order: merged, or why it is not.

    `tied` maps stored heads to the merged embedding that they are tied to. They are not written:
    the loaded model would have the old head. `of_delta` says that the
    reasoning model is M + Δ.
    """

    chosen: ChosenMethod
    names: list[str]
    nbytes: Mapping[str, int]
    blended: Mapping[str, Blended]
    reasons: Mapping[str, str]
    tied: Mapping[str, str]
    of_delta: bool

    @classmethod
    def of(
        cls, chosen: ChosenMethod, found: Alignments, *, dtype: str | None, strict: bool
    ) -> MergeLayout:
        """Decide for each tensor.

        Raises:
            AlignmentError: when strict, a tensor without a match in the base.
            CheckpointError: a tensor that cannot be merged into, such as 8-bit codes.
            ValueError: a selected tensor without a weight, or a weight for a kind that no merged
                tensor has.
        """
        multimodal = found.reasoning.multimodal
        bases = {} if found.base is None else {pair.name: pair for pair in found.base.pairs}
        reasons = dict(found.reasoning.coverage.unmatched_multimodal)
        blended: dict[str, Blended] = {}
        missing = []
        for pair in found.reasoning.pairs:
            name = pair.name
            if reason := why_a_buffer(pair, found.reasoning):
                reasons[name] = reason
                continue
            weight = _weight(chosen, name)
            if found.base is not None and name not in bases:
                reasons[name] = "no match in the base"
                missing.append((name, reasons[name]))
                continue
            stored = multimodal.dtypes[name]
            if stored not in DTYPES:
                raise CheckpointError(
                    f"{multimodal.source.path}: {name} is stored as {stored}, which cannot be "
                    f"merged into; merge into a checkpoint of {', '.join(DTYPES)}, or leave it out "
                    "with modules=… or layers=…"
                )
            blended[name] = Blended(pair, bases.get(name), weight, dtype or DTYPES[stored])
        if found.base is not None and missing and (strict or not blended):
            raise AlignmentError(
                f"{len(missing)} tensors have no match in the base "
                f"{found.base.paths[0]}:{listed(missing)}\nChoose the base that the reasoning "
                "model was tuned from, or pass strict=False to copy them"
            )
        heads = found.reasoning.ties[1].stored
        tied = {head: embedding for head, embedding in heads.items() if embedding in blended}
        reasons |= dict.fromkeys(tied, LEFT_OUT_AS_TIED)
        chosen.refuse_unused(blended)
        warn_of_routers(blended, multimodal.shapes)
        names = [name for name, *_ in multimodal.checkpoint.tensors()]
        places = {name: multimodal.checkpoint.place(name) for name in names}
        nbytes = {name: end - start for name, (_, start, end) in places.items()}
        return cls(chosen, names, nbytes, blended, reasons, tied, found.delta is not None)

    @property
    def written(self) -> list[str]:
        """Names of the tensors of the output."""
        return [name for name in self.names if name not in self.tied]

    def slots(self) -> list[tuple[str, str | None]]:
        """Return each tensor and the dtype of its result; None keeps its own."""
        return [
            (name, self.blended[name].dtype if name in self.blended else None)
            for name in self.written
        ]

    def jobs(self) -> list[tuple[str, Job | None]]:
        """Return each tensor as the core takes it."""
        return [(name, self._job(name)) for name in self.written]

    def _job(self, name: str) -> Job | None:
        one = self.blended.get(name)
        if one is None:
            return None
        base = None if one.of_base is None else one.of_base.source
        weights = one.weight, self.chosen.multimodal_weight
        return one.pair.source, base, one.dtype, *weights, self.of_delta

    @property
    def total_nbytes(self) -> int:
        """Bytes as the core counts progress: a tensor's own, once for each model that is read."""
        return sum(self.nbytes[name] * self._models(name) for name in self.written)

    def _models(self, name: str) -> int:
        one = self.blended.get(name)
        return 1 if one is None else 2 if one.of_base is None else 3


def _weight(chosen: ChosenMethod, name: str) -> float:
    weight = chosen.weight_of(name)
    if weight is None:
        raise ValueError(
            f"{name} is selected, but weight has no number for {kind_of(name)!r}; add one, or one "
            f"for {REST!r}, or leave modules out to merge the kinds that weight names"
        )
    return weight
