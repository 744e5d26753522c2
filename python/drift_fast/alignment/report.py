"""Show how two checkpoints match, and write it as a map to edit; no delta is computed.

Owns the report for a reader: pairs, leftovers with their reasons, alternatives, and how much the
weights confirm it. What `compute_delta` would refuse is reported here instead of raised.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from drift_fast.alignment.coverage import OUTSIDE, Coverage, listed
from drift_fast.alignment.embeddings import align_rows
from drift_fast.alignment.inserted import find_inserted_layers
from drift_fast.alignment.mapping import MappingLike, write_map
from drift_fast.alignment.model_pair import SAME, ModelPair
from drift_fast.alignment.pairing import match_checkpoints
from drift_fast.alignment.refusals import OF_WEIGHTS, why_not
from drift_fast.alignment.similarity import Similarity, compare_weights
from drift_fast.alignment.tied import find_ties
from drift_fast.checkpoints.opened import PathLike
from drift_fast.errors import AlignmentError
from drift_fast.names import kind_of
from drift_fast.selection import EVERYTHING, Selection
from drift_fast.tables import Block, Shown


@dataclass(frozen=True, repr=False)
class Alignment(Shown):
    """How the tensors of two checkpoints match, by names, shapes and samples of the weights.

    `pairs` are (reasoning, multimodal) names; a fused tensor is in as many pairs as it has sources.
    `rows` says which rows of embeddings and heads match whose numbers of rows differ.
    `problem` is what `compute_delta` would refuse, None where it would not. `proposed` says that
    the pairs are a proposal to look over, which is never applied by itself.
    """

    pairs: list[tuple[str, str]]
    unmatched_reasoning: list[tuple[str, str]]
    unmatched_multimodal: list[tuple[str, str]]
    prefixes: tuple[str, str]
    alternatives: list[tuple[str, str, int]]
    by: str
    similarity: Similarity | None
    problem: str | None
    proposed: bool
    matched_numel: int
    paths: tuple[str, str]
    kinds: dict[str, int] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether `compute_delta` would take these pairs."""
        return self.problem is None

    def headline(self) -> str:
        """Return how many pairs there are, and whether `compute_delta` would take them."""
        state = "ok" if self.ok else "refused"
        return f"{len(self.pairs)} pairs by {self.by}, {state}; print it for the report"

    def blocks(self) -> list[Block]:
        """Return the report, with the first of the leftovers."""
        return [self.table()]

    def records(self) -> list[dict[str, Any]]:
        """Return a row for each pair, and for each tensor without one, with the reason."""
        left = self.unmatched_reasoning, self.unmatched_multimodal
        return Coverage(self.pairs, *left).records()

    def save(self, path: PathLike) -> None:
        """Write a map file to edit, for `mapping=`.

        Raises:
            FileExistsError: the file is there.
            AlignmentError: there is nothing to write.
        """
        if not self.pairs:
            raise AlignmentError(f"nothing is matched, so there is no map to write: {self.problem}")
        write_map(
            path,
            self.pairs,
            [name for name, _ in self.unmatched_reasoning],
            reasoning=self.paths[0],
            multimodal=self.paths[1],
            proposed=self.proposed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "ok": self.ok,
            "problem": self.problem,
            "proposed": self.proposed,
            "by": self.by,
            "prefixes": list(self.prefixes),
            "rivals": [list(one) for one in self.alternatives],
            "likeness": None if self.similarity is None else self.similarity.to_dict(),
            "matched_numel": self.matched_numel,
            "pairs": [list(pair) for pair in self.pairs],
            "rows": self.rows,
            "unmatched_reasoning": [list(item) for item in self.unmatched_reasoning],
            "unmatched_multimodal": [list(item) for item in self.unmatched_multimodal],
        }

    def table(self, *, every: bool = False) -> str:
        """Return the report as text; `every` lists all pairs and leftovers, not just the first."""
        limit = max(len(self.unmatched_reasoning), len(self.unmatched_multimodal)) if every else 8
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        lines = [
            f"{'proposed' if self.proposed else 'matched'}: {len(self.pairs)} tensors ({kinds}), "
            f"{self.matched_numel:,} parameters, by {self.by}",
            f"prefixes: {self.prefixes[0] or '(none)'} → {self.prefixes[1] or '(none)'}",
            *(f"{name}: {rows}" for name, rows in self.rows.items()),
        ]
        if self.similarity is not None:
            lines.append(
                f"weights: matched tensors correlate {self.similarity.matched:.2f} on average, "
                f"the most similar other layer {self.similarity.elsewhere:.2f} "
                f"({self.similarity.compared:,} elements compared)"
            )
        for first, second, count in self.alternatives:
            lines.append(
                f"alternative: {first or '(none)'} → {second or '(none)'} would match {count} "
                "tensors"
            )
        if every:
            lines += [f"  {first} → {second}" for first, second in self.pairs]
        others = [item for item in self.unmatched_multimodal if not item[1].startswith(OUTSIDE)]
        towers = len(self.unmatched_multimodal) - len(others)
        if towers:
            lines.append(f"towers and projectors left alone: {towers} tensors")
        for side, items in (
            ("reasoning", self.unmatched_reasoning),
            ("multimodal", self.unmatched_multimodal if every else others),
        ):
            if items:
                lines.append(
                    f"without a match in the {side} checkpoint: {len(items)}" + listed(items, limit)
                )
        if self.problem is not None:
            lines.append(f"\nrefused: {self.problem}")
        return "\n".join(lines)


def align(
    reasoning: PathLike,
    multimodal: PathLike,
    *,
    mapping: MappingLike | None = None,
    check_weights: bool = True,
) -> Alignment:
    """Match all tensors of two checkpoints and report how, and how surely; nothing is written.

    Only headers are read, samples of the weights if they are on this machine, and the tokenizers
    if embeddings have different numbers of rows. What `compute_delta` refuses is in the result as
    its `problem`. If the multimodal model has layers of another structure inserted, the pairs are
    the proposal of a layer map.

    Raises:
        FileNotFoundError, CheckpointError: a checkpoint that is not there or not valid.
        AlignmentError: a mapping that does not hold.
    """
    pair = match_checkpoints(reasoning, multimodal, mapping)
    if pair.failure is not None and mapping is not None:
        raise pair.failure
    refusals = why_not(pair)
    proposed = False
    problem = str(refusals[0]) if refusals else None
    if refusals and refusals[0].reason == "other layers":
        inserted = find_inserted_layers(pair.reasoning.shapes, pair.shapes, pair.alignment)
        problem = pair.alignment.layer_conflict
        if inserted is not None:
            proposal = match_checkpoints(pair.reasoning, pair.multimodal, inserted.mapping)
            alignment = replace(proposal.alignment, method="names, without the inserted layers")
            pair, proposed = replace(proposal, alignment=alignment), True
            problem += (
                f". The multimodal model has inserted layers {inserted}; the pairs shown leave "
                "them out. Write them with --out, look them over, and pass the file as mapping"
            )
    rows: dict[str, str] = {}
    if problem is None or proposed:
        pair, rows = _with_rows(pair)
    local = pair.reasoning.is_local and pair.multimodal.is_local
    if check_weights and local and (problem is None or proposed):
        pair = _compared(pair)
        unlike = why_not(pair, rules=None if proposed else OF_WEIGHTS)
        problem = str(unlike[0]) if unlike else problem
    if problem is None and pair.is_one_model:
        problem = SAME
    return _report(pair, problem, proposed, rows)


def _with_rows(pair: ModelPair) -> tuple[ModelPair, dict[str, str]]:
    """Pair embeddings and heads of different numbers of rows as a delta of them would."""
    paired = {one.name for one in pair.alignment.pairs}
    resized = {
        name for name in pair.shapes if name not in paired and kind_of(name) in ("embed", "head")
    }
    if not resized:
        return pair, {}
    ties = find_ties(pair.reasoning, resized), find_ties(pair.multimodal, resized)
    found = align_rows(pair.alignment, pair.reasoning, pair.multimodal, resized, None, ties)
    rows = {name: str(one) for name, one in found.maps.items()}
    return replace(pair, alignment=found.alignment), rows


def _compared(pair: ModelPair) -> ModelPair:
    pairs = pair.comparable(pair.alignment.pairs, Selection.parse(EVERYTHING, None))
    checkpoints = pair.reasoning.checkpoint, pair.multimodal.checkpoint
    return replace(pair, similarity=compare_weights(*checkpoints, pairs, pair.shapes))


def _report(
    pair: ModelPair, problem: str | None, proposed: bool, rows: dict[str, str]
) -> Alignment:
    found, unmatched = pair.alignment, pair.alignment.unmatched_reasoning
    if pair.failure is not None:
        unmatched = [(name, "nothing was matched") for name in pair.reasoning.shapes]
    return Alignment(
        [(source, one.name) for one in found.pairs for source in one.sources],
        unmatched + list(pair.reasoning.unloaded.items()),
        found.unmatched_multimodal + list(pair.multimodal.unloaded.items()),
        found.prefixes,
        found.alternatives,
        found.method,
        pair.similarity,
        problem,
        proposed,
        sum(one.numel(pair.shapes) for one in found.pairs),
        pair.paths,
        dict(Counter(kind_of(one.name) for one in found.pairs)),
        rows,
    )
