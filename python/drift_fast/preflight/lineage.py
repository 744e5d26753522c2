"""Which of three models comes from which, and so which Δ to take: R − B or R − V.

Owns the verdict. Models that were trained apart differ from their common ancestor in directions at
right angles, so three distances show how much each has of its own since they parted. They do not
show the order in time: a model between two others can be the child of either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.pairing import survey_checkpoints
from drift_fast.alignment.refusals import is_usable, why_not
from drift_fast.names import is_other_modality
from drift_fast.preflight.distances import Distances, measure
from drift_fast.preflight.fact import STATED, Fact
from drift_fast.preflight.findings import Finding, ModelSide
from drift_fast.preflight.meanings import Severity
from drift_fast.preflight.rules import compare

Verdict = Literal[
    "common base",
    "other base",
    "elsewhere",
    "multimodal between",
    "reasoning between",
    "base is reasoning",
    "base is multimodal",
    "nothing to move",
    "unrelated base",
    "unrelated models",
    "exchanged",
    "not compared",
]

# Weights with a common origin have a cosine above this, others one near zero.
_RELATED = 0.5
# A share of a Δ's square below which it is nothing; and how many times another is far.
_LITTLE, _FAR = 0.1, 4.0
# How much above the expected a square of rounding may be in a sample.
_ROUNDED = 1.5


@dataclass(frozen=True)
class Lineage:
    """Who comes from whom, and what to subtract from the reasoning model.

    `subtract` is None where neither Δ is worth taking. `distances` is None where no weights could
    be compared.
    """

    verdict: Verdict
    subtract: Literal["base", "multimodal"] | None
    reason: str
    distances: Distances | None = None

    def finding(self) -> Finding:
        """Return it as a finding of the preflight."""
        values = [Fact("not compared", STATED)] * 2
        if self.distances is not None:
            squares = self.distances.reasoning_base, self.distances.multimodal_base
            values = [Fact(f"{square**0.5:.2%} of ‖W‖", STATED) for square in squares]
        severity: Severity = "breaks" if self.verdict == "unrelated models" else "note"
        between = "reasoning − base", "multimodal − base"
        return Finding("lineage", severity, values[0], values[1], self.reason, between)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "verdict": self.verdict,
            "subtract": self.subtract,
            "reason": self.reason,
            "distances": None if self.distances is None else self.distances.to_dict(),
        }


def trace(reasoning: ModelSide, base: ModelSide, pair: AlignedPair) -> Lineage:
    """Compare samples of three models and say which Δ to take; a base that does not fit is said.

    `pair` is the reasoning model aligned with the multimodal one.

    Raises:
        CheckpointError, OSError: a checkpoint that is not valid or cannot be read.
    """
    then = "so weights were not compared"
    if not is_usable(refusals := why_not(pair)):
        reason = f"the two models do not match, {then}: {refusals[0]}"
        return Lineage("not compared", None, reason)
    if _has_tower(base) and not any(map(is_other_modality, pair.multimodal.shapes)):
        reason = (
            "the base has tensors of another modality and the multimodal model has none: the two "
            f"seem to be exchanged, {then}; give the text model as --base"
        )
        return Lineage("exchanged", None, reason)
    # A mapping is between the names of the first two, which the base may share.
    unstated = replace(pair.options, mapping=None)
    to_multimodal = survey_checkpoints(base.opened, pair.multimodal, pair.options)
    if not is_usable(why_not(to_multimodal)):
        to_multimodal = survey_checkpoints(base.opened, pair.multimodal, unstated)
    to_reasoning = survey_checkpoints(reasoning.opened, base.opened, unstated)
    for role, other in (("multimodal", to_multimodal), ("reasoning", to_reasoning)):
        if not is_usable(refusals := why_not(other)):
            reason = (
                f"the base does not match the {role} model, {then}: {refusals[0]}. Take reasoning "
                "− multimodal, or give the text model that both come from"
            )
            return Lineage("not compared", "multimodal", reason)
    distances = measure(pair, to_multimodal)
    if distances is None:
        reason = f"no matrix is stored whole and as numbers in all three models, {then}"
        return Lineage("not compared", None, reason)
    return judge(distances, other_theta=_other_theta(base, to_multimodal))


def _has_tower(base: ModelSide) -> bool:
    return any(map(is_other_modality, base.opened.shapes))


def judge(found: Distances, *, other_theta: bool = False) -> Lineage:
    """Say who comes from whom by three distances.

    other_theta: whether the base and the multimodal model state different θ of RoPE.
    """
    verdict, subtract, reason = _unrelated(found) or _same(found) or _apart(found, other_theta)
    return Lineage(verdict, subtract, reason, found)


_Judged = tuple[Verdict, Literal["base", "multimodal"] | None, str]


def _unrelated(found: Distances) -> _Judged | None:
    if found.similarity_reasoning_multimodal < _RELATED:
        return (
            "unrelated models",
            None,
            "the weights of the reasoning and the multimodal model have no common origin (cosine "
            f"{found.similarity_reasoning_multimodal:.2f}), so no Δ between them has a meaning; "
            "choose a reasoning model of the multimodal model's base",
        )
    cosines = found.similarity_reasoning_base, found.similarity_multimodal_base
    if min(cosines) >= _RELATED:
        return None
    return (
        "unrelated base",
        "multimodal",
        "take reasoning − multimodal: the two have a common origin, and the base is not part of "
        f"it (cosines {cosines[0]:.2f} and {cosines[1]:.2f}); with the text model that both come "
        "from, reasoning − base may be better",
    )


def _same(found: Distances) -> _Judged | None:
    """Judge models whose weights are the same, or the same but for a cast to another dtype."""
    roundings = found.rounding_reasoning, found.rounding_multimodal, found.rounding_base

    def same(square: float, first: int, second: int) -> bool:
        cast = found.dtypes[first] != found.dtypes[second]
        return square <= (_ROUNDED * max(roundings[first], roundings[second]) if cast else 0.0)

    if same(found.reasoning_multimodal, 0, 1):
        return (
            "nothing to move",
            None,
            "the reasoning model's weights are those inside the multimodal model, so there is "
            "nothing to move; choose a model that was trained to reason",
        )
    if same(found.reasoning_base, 0, 2):
        return (
            "base is reasoning",
            None,
            "the base has the reasoning model's weights, so reasoning − base is zero, and "
            "reasoning − multimodal only undoes what the multimodal model learned if it comes "
            "from them; give the text model that the reasoning model was trained from",
        )
    if same(found.multimodal_base, 1, 2):
        return (
            "base is multimodal",
            "multimodal",
            "the base has the weights inside the multimodal model, so both Δ are the same; "
            "reasoning − multimodal needs no third model",
        )
    return None


def _apart(found: Distances, other_theta: bool) -> _Judged:
    own_reasoning, own_multimodal, own_base = found.branches
    apart = found.reasoning_base, found.multimodal_base, found.reasoning_multimodal
    # Rounding of a model is at right angles to all else, and so looks like training of its own.
    undone = max(0.0, own_multimodal - found.rounding_multimodal) / apart[2]
    foreign = max(0.0, own_base - found.rounding_base) / apart[0]
    angle = f"cosine of R − B and V − B {found.cosine:.2f}"
    if own_reasoning - found.rounding_reasoning < _LITTLE * min(apart[0], apart[2]):
        return (
            "reasoning between",
            None,
            f"the reasoning model is between the other two ({angle}): the multimodal model was "
            "trained from it, or the base was, so nothing of its own is left to move. If two were "
            "exchanged, give the base first and the reasoning model as --base",
        )
    if undone < _LITTLE <= foreign:
        return (
            "multimodal between",
            "multimodal",
            f"take reasoning − multimodal: the weights inside the multimodal model are between "
            f"the other two ({angle}), so it undoes nothing, and {foreign:.0%} of the square of "
            "reasoning − base is what the multimodal model has already or the base learned alone",
        )
    if foreign >= _LITTLE:
        better: Literal["base", "multimodal"] = "base" if foreign < undone else "multimodal"
        return (
            "elsewhere",
            better,
            f"take reasoning − {better}: the base has training of its own, apart from both "
            f"({angle}), which is {foreign:.0%} of the square of reasoning − base; reasoning − "
            f"multimodal undoes what the multimodal model learned, {undone:.0%} of its square. "
            "The text model that both come from would leave out both",
        )
    if other_theta:
        return (
            "other base",
            "multimodal",
            "take reasoning − multimodal: the base is the reasoning model's own, and the "
            f"multimodal model, {_ratio(apart[1] / apart[0])} as far from it and with another θ, "
            "comes from another one. Reasoning − base leaves out what that base had learned, and "
            "was no use in a small world; with the text model that the multimodal model was "
            "trained from as --base, reasoning − base holds both, so compare them in short runs",
        )
    return ("common base", "base", _common(apart, undone, angle))


def _common(apart: tuple[float, float, float], undone: float, angle: str) -> str:
    text = (
        f"take reasoning − base: both models come from the base ({angle}), and reasoning − "
        f"multimodal would also undo what the multimodal model learned, {undone:.0%} of its square"
    )
    if apart[1] > _FAR * apart[0]:
        text += (
            f". The multimodal model is {_ratio(apart[1] / apart[0])} as far from the base as the "
            "reasoning model: if it comes from another text model, give that one as --base"
        )
    elif apart[0] > _FAR * apart[1]:
        text += (
            f". The reasoning model is {_ratio(apart[0] / apart[1])} as far from the base as the "
            "multimodal model: if it was trained from another model of this base, Δ holds what "
            "that one had learned too, as it should"
        )
    return text


def _ratio(squares: float) -> str:
    return f"{squares**0.5:.1f} times"


def _other_theta(base: ModelSide, pair: AlignedPair) -> bool:
    """Whether base and multimodal model state different θ of RoPE."""
    found = compare(base, ModelSide("multimodal", pair.multimodal), pair)
    return any(
        row.subject == "RoPE θ"
        and row.reasoning.known
        and row.multimodal.known
        and row.reasoning.value != row.multimodal.value
        for row in found
    )
