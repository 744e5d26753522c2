"""Why two checkpoints do not make a pair: every refusal, in the order in which they are raised.

A rule is a function of a pair that returns a refusal or None, and one entry of `RULES`. `check`
shows refusals as findings and `align` as its problem; all other verbs raise the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

from drift_fast.alignment.beside import find_beside
from drift_fast.alignment.coverage import listed
from drift_fast.alignment.incomplete import explain_empty, explain_promised, find_lacking
from drift_fast.alignment.inserted import find_inserted_layers
from drift_fast.alignment.missed import missed
from drift_fast.alignment.model_pair import AlignedPair, ModelPair
from drift_fast.alignment.name_alignment import Unmatched
from drift_fast.alignment.stated import LEFT_OUT
from drift_fast.alignment.tied import differing
from drift_fast.errors import AlignmentError, CheckpointError, CoverageError, DriftError
from drift_fast.names import is_other_modality, kind_of

Reason = Literal[
    "changed beside",
    "incomplete checkpoint",
    "not matched",
    "exchanged models",
    "other layers",
    "tied and different",
    "other vocabulary",
    "unmatched tensors",
    "nothing selected",
    "idle preset",
    "low coverage",
    "shifted layers",
    "unlike weights",
]


@dataclass(frozen=True)
class Refusal:
    """One reason why a pair is refused, and the error to raise for it.

    With `strict_only`, `strict=False` continues without the tensors in question.
    """

    reason: Reason
    error: DriftError
    strict_only: bool = False

    def __str__(self) -> str:
        return str(self.error)


Rule = Callable[[ModelPair], Refusal | None]


def why_not(
    pair: ModelPair, *, strict: bool = True, rules: Sequence[Rule] | None = None
) -> list[Refusal]:
    """Return every reason to refuse a pair, as far as it is known; the first one is the cause.

    `rules` are all, or those of `OF_WEIGHTS` where the others found nothing before weights were
    compared.
    """
    found: list[Refusal] = []
    for rule in RULES if rules is None else rules:
        refusal = rule(pair)
        if refusal is not None and (strict or not refusal.strict_only):
            found.append(refusal)
    return found


def is_usable(refusals: Sequence[Refusal]) -> bool:
    """Whether there are pairs all the same, which `strict=False` would take."""
    return all(refusal.strict_only for refusal in refusals)


def refuse(pair: ModelPair, *, strict: bool = True, rules: Sequence[Rule] | None = None) -> None:
    """Raise the first reason to refuse a pair; `rules` are those of `why_not`.

    Raises:
        AlignmentError, CoverageError, CheckpointError: there is one.
    """
    for refusal in why_not(pair, strict=strict, rules=rules):
        raise refusal.error


def _changed_beside(pair: ModelPair) -> Refusal | None:
    sides = pair.reasoning, pair.multimodal
    matched = (
        {source for one in pair.alignment.pairs for source in one.sources},
        {one.name for one in pair.alignment.pairs},
    )
    roles = "reasoning", "multimodal"
    found = zip(find_beside(sides, matched), sides, roles, strict=True)
    texts = [text for beside, side, role in found for text in beside.explain(side, role)]
    return Refusal("changed beside", CheckpointError("; ".join(texts))) if texts else None


def _incomplete(pair: ModelPair) -> Refusal | None:
    for lacking in find_lacking(pair):
        if lacking.empty:
            error = CheckpointError(explain_empty(lacking.side, lacking.empty))
            return Refusal("incomplete checkpoint", error)
        if not isinstance(pair, AlignedPair):
            continue
        names = [name for name in lacking.promised if name in pair.selection]
        if names:
            error = CheckpointError(explain_promised(lacking.side, names))
            return Refusal("incomplete checkpoint", error, strict_only=bool(pair.pairs))
    return None


def _not_matched(pair: ModelPair) -> Refusal | None:
    return None if pair.failure is None else Refusal("not matched", pair.failure)


def _exchanged(pair: ModelPair) -> Refusal | None:
    towers = [name for name, _ in pair.alignment.unmatched_reasoning if is_other_modality(name)]
    # A stray buffer is not a tower.
    if pair.stated or len(towers) < 4 or any(map(is_other_modality, pair.multimodal.shapes)):
        return None
    error = AlignmentError(
        f"the reasoning checkpoint has tensors of another modality, {towers[0]} and "
        f"{len(towers) - 1} more, and the multimodal one has none: the two seem to be exchanged, "
        "and an injection along this Δ would lead away from reasoning. Exchange them; or, to see "
        "what a multimodal model learned beyond its text model, pass strict=False, and "
        "min_coverage=1.0 to have tensors without a match refused all the same"
    )
    return Refusal("exchanged models", error, strict_only=True)


def _layer_conflict(pair: ModelPair) -> Refusal | None:
    if not pair.alignment.layer_conflict:
        return None
    first, second = pair.paths
    remedy = "choose a reasoning model of the same backbone"
    inserted = find_inserted_layers(pair.reasoning.shapes, pair.shapes, pair.alignment)
    if inserted is not None:
        remedy = (
            f"the multimodal model has inserted layers {inserted}, which have no match in the "
            f"other, so all later layers have other numbers. `drift-fast align {first} {second} "
            "--out map.json` writes a map that leaves them out; look it over and pass "
            "mapping='map.json'"
        )
    error = AlignmentError(
        f"{pair.alignment.layer_conflict}. {first} and {second} have different depths; {remedy}"
    )
    return Refusal("other layers", error)


def _vocabulary(pair: ModelPair) -> Refusal | None:
    if not isinstance(pair, AlignedPair) or not pair.row_problems:
        return None
    problem = next(iter(pair.row_problems.values()))
    return Refusal("other vocabulary", CoverageError(problem), strict_only=True)


def _untied(pair: ModelPair) -> Refusal | None:
    if not isinstance(pair, AlignedPair):
        return None
    for side, ties in zip((pair.reasoning, pair.multimodal), pair.ties, strict=True):
        for head, embedding in ties.differ.items():
            return Refusal("tied and different", differing(side, head, embedding))
    return None


def _unmatched(pair: ModelPair) -> Refusal | None:
    if not _is_matched(pair):
        return None
    missing = pair.account.missing_reasoning + pair.account.missing_multimodal
    if pair.stated:
        # What is stated to have no match, and layers that only the multimodal model has, are in
        # the coverage; what a mapping does not mention is missing.
        missing = [item for item in pair.account.missing_reasoning if item[1] != LEFT_OUT]
    if not missing:
        return None
    error = AlignmentError(
        f"{len(missing)} tensors of {pair.selection} have no match "
        f"({pair.coverage.fraction:.1%} of the selected parameters are covered), between "
        f"{' and '.join(pair.paths)}:{listed(missing)}\nSelect other modules or layers, or pass "
        "strict=False to continue without them"
    )
    return Refusal("unmatched tensors", error, strict_only=bool(pair.pairs))


def _nothing_selected(pair: ModelPair) -> Refusal | None:
    if not _is_matched(pair) or pair.pairs:
        return None
    kinds = ", ".join(sorted({kind_of(one.name) for one in pair.alignment.pairs}))
    error = CoverageError(
        f"{pair.selection} selects none of the {len(pair.alignment.pairs)} matched tensors of "
        f"{pair.paths[1]}, whose kinds are {kinds}"
    )
    return Refusal("nothing selected", error)


def _idle_preset(pair: ModelPair) -> Refusal | None:
    """Refuse a preset that selects nothing beside others that do, which coverage does not show.

    A model may lack what is only selected by default, if all that it has is known.
    """
    if not _is_matched(pair):
        return None
    missing = [name for name, _ in pair.account.missing_reasoning + pair.account.missing_multimodal]
    idle = pair.selection.idle_presets([*(one.name for one in pair.pairs), *missing])
    if not idle or not (pair.selection.named or missed(pair)):
        return None
    names = [one.name for one in pair.alignment.pairs]
    return Refusal(
        "idle preset",
        CoverageError(
            f"{' and '.join(pair.paths)}: of the matched tensors, "
            f"{pair.selection.describe_idle(idle, names)}"
        ),
    )


def _low_coverage(pair: ModelPair) -> Refusal | None:
    if not _is_matched(pair):
        return None
    least, share = pair.options.min_coverage, pair.coverage.fraction
    if least is None or share >= least:
        return None
    missing: Sequence[Unmatched] = pair.account.missing_reasoning + pair.account.missing_multimodal
    error = CoverageError(
        f"{share:.1%} of the selected parameters are covered between {' and '.join(pair.paths)}, "
        f"less than min_coverage={least:.1%}:{listed(list(missing))}"
    )
    return Refusal("low coverage", error)


def _shifted(pair: ModelPair) -> Refusal | None:
    shift = None if pair.similarity is None else pair.similarity.shift
    if shift is None:
        return None
    error = AlignmentError(
        f"the layers do not belong together: {shift.source} resembles {shift.resembles} "
        f"(correlation {shift.higher:.2f}) and not its match, {shift.match} "
        f"({shift.correlation:.2f}); {shift.count} of {shift.layers} layers are like this. "
        "The layers of one model are shifted or permuted; state the right pairs with mapping=…, or "
        "pass check_weights=False if this is meant"
    )
    return Refusal("shifted layers", error)


def _unlike(pair: ModelPair) -> Refusal | None:
    outlier = None if pair.similarity is None else pair.similarity.outlier
    if outlier is None:
        return None
    error = AlignmentError(
        f"{outlier.source} does not resemble {outlier.match} (correlation "
        f"{outlier.correlation:.2f}) although other modules do ({outlier.highest:.2f}): the two do "
        "not belong together, are stored in different orders, or one was retrained. Leave the "
        "module out, or pass check_weights=False if this is meant"
    )
    return Refusal("unlike weights", error)


def _is_matched(pair: ModelPair) -> TypeGuard[AlignedPair]:
    """Whether there is an account of the pair to judge."""
    return (
        isinstance(pair, AlignedPair) and pair.failure is None and not pair.alignment.layer_conflict
    )


OF_WEIGHTS: tuple[Rule, ...] = (_shifted, _unlike)
# In this order; the cause of what comes after it comes first.
RULES: tuple[Rule, ...] = (
    _changed_beside,
    _incomplete,
    _not_matched,
    _exchanged,
    _layer_conflict,
    _untied,
    _vocabulary,
    _unmatched,
    _nothing_selected,
    _idle_preset,
    _low_coverage,
    *OF_WEIGHTS,
)
