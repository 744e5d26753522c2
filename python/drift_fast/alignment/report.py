"""Show how two checkpoints belong together, and write it as a map to edit; no delta is computed.

Owns the account for a reader: pairs, leftovers with their reasons, rivals, and how much the weights
speak for it. What `compute_delta` would refuse is told here instead of raised.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from drift_fast.alignment.coverage import listed
from drift_fast.alignment.mapping import MappingLike, write_map
from drift_fast.alignment.match import Match, match, skipping_inserted
from drift_fast.alignment.pairing import comparable, looks_exchanged, side_of
from drift_fast.alignment.similarity import Likeness, compare
from drift_fast.checkpoints.opened import Opened, PathLike, open_checkpoint
from drift_fast.errors import AlignmentError
from drift_fast.names import kind_of
from drift_fast.selection import EVERYTHING, Selection


@dataclass(frozen=True)
class Alignment:
    """How the tensors of two checkpoints pair, by names, shapes and samples of the weights.

    `pairs` are (reasoning, multimodal) names; a fused tensor stands in as many pairs as it has
    sources. `problem` is what `compute_delta` would refuse, None where it would not; `proposed`
    says that the pairs are a proposal to look over, which is never applied by itself.
    """

    pairs: list[tuple[str, str]]
    unmatched_reasoning: list[tuple[str, str]]
    unmatched_multimodal: list[tuple[str, str]]
    prefixes: tuple[str, str]
    rivals: list[tuple[str, str, int]]
    by: str
    likeness: Likeness | None
    problem: str | None
    proposed: bool
    matched_numel: int
    paths: tuple[str, str]
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether `compute_delta` would take this pairing."""
        return self.problem is None

    def save(self, path: PathLike) -> None:
        """Write a map file to edit, for `mapping=`.

        Raises:
            FileExistsError: the file is there.
            AlignmentError: there is nothing to write.
        """
        if not self.pairs:
            raise AlignmentError(f"nothing is paired, so there is no map to write: {self.problem}")
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
            "rivals": [list(rival) for rival in self.rivals],
            "likeness": None if self.likeness is None else self.likeness.to_json(),
            "matched_numel": self.matched_numel,
            "pairs": [list(pair) for pair in self.pairs],
            "unmatched_reasoning": [list(item) for item in self.unmatched_reasoning],
            "unmatched_multimodal": [list(item) for item in self.unmatched_multimodal],
        }

    def table(self, *, every: bool = False) -> str:
        """Return the account as text; `every` lists all pairs and leftovers, not the first."""
        limit = max(len(self.unmatched_reasoning), len(self.unmatched_multimodal)) if every else 8
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        lines = [
            f"{'proposed' if self.proposed else 'paired'}: {len(self.pairs)} tensors ({kinds}), "
            f"{self.matched_numel:,} parameters, by {self.by}",
            f"prefixes: {self.prefixes[0] or '(none)'} → {self.prefixes[1] or '(none)'}",
        ]
        if self.likeness is not None:
            lines.append(
                f"weights: matched tensors correlate {self.likeness.matched:.2f} on average, the "
                f"likest other layer {self.likeness.elsewhere:.2f} "
                f"({self.likeness.compared:,} elements compared)"
            )
        for first, second, count in self.rivals:
            lines.append(
                f"rival: {first or '(none)'} → {second or '(none)'} would match {count} tensors"
            )
        if every:
            lines += [f"  {first} → {second}" for first, second in self.pairs]
        for side, items in (
            ("reasoning", self.unmatched_reasoning),
            ("multimodal", self.unmatched_multimodal),
        ):
            if items:
                lines.append(
                    f"without a partner in the {side} checkpoint: {len(items)}"
                    + listed(items, limit)
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
    """Pair all tensors of two checkpoints and say how and how surely; nothing is written.

    Only headers are read, and samples of the weights where they are on this machine. A pairing that
    `compute_delta` refuses is returned with its `problem`; where the multimodal model has layers of
    another structure inserted, with a layer map as a proposal.

    Raises:
        FileNotFoundError, CheckpointError: a checkpoint that is not there or not valid.
        AlignmentError: a mapping that does not hold.
    """
    left, right = open_checkpoint(reasoning), open_checkpoint(multimodal)
    paths = str(left.source.path), str(right.source.path)
    try:
        found = match(side_of(left), side_of(right), mapping=mapping)
    except AlignmentError as error:
        if mapping is not None:
            raise
        nothing = [(name, "no pairing was found") for name in left.shapes]
        return Alignment([], nothing, [], ("", ""), [], "names", None, str(error), False, 0, paths)
    problem = looks_exchanged(left.shapes, right.shapes, found) if mapping is None else ""
    proposed = False
    if found.layer_conflict and not problem:
        problem = found.layer_conflict
        inserted = skipping_inserted(left.shapes, right.shapes, found)
        if inserted is not None:
            found = replace(
                match(side_of(left), side_of(right), mapping=dict(inserted.pairs)),
                how="names, without the inserted layers",
            )
            proposed = True
            problem += (
                f". The multimodal model has inserted layers {_numbers(inserted.layers)}; the "
                "pairs shown leave them out. Write them with --out, look them over, and pass the "
                "file as mapping"
            )
    likeness = None
    local = left.source.remote is None and right.source.remote is None
    if check_weights and local and (not problem or proposed):
        try:
            pairs = comparable(found.pairs, left, right, Selection.parse(EVERYTHING, None))
            likeness = compare(left.checkpoint, right.checkpoint, pairs, right.shapes)
        except AlignmentError as error:
            problem = str(error)
    return _account(found, left, right, likeness, problem or None, proposed)


def _account(
    found: Match,
    left: Opened,
    right: Opened,
    likeness: Likeness | None,
    problem: str | None,
    proposed: bool,
) -> Alignment:
    return Alignment(
        [(source, pair.name) for pair in found.pairs for source in pair.sources],
        found.unmatched_left,
        found.unmatched_right,
        found.prefixes,
        found.rivals,
        found.how,
        likeness,
        problem,
        proposed,
        sum(math.prod(right.shapes[pair.name]) for pair in found.pairs),
        (str(left.source.path), str(right.source.path)),
        dict(Counter(kind_of(pair.name) for pair in found.pairs)),
    )


def _numbers(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
