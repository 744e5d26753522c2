"""What became of each tensor of a merge, and the refusal of values that are not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_fast.delta.backends import refuse_problems
from drift_fast.errors import DriftWarning
from drift_fast.merging.layout import Blended
from drift_fast.names import kind_of, layer_of

if TYPE_CHECKING:
    from drift_fast._core import Found

# ‖rounding‖/‖shift‖ from which another dtype is worth its bytes.
_MUCH = 0.25

COPIED_SCALES = "block scales of a tensor that is copied"


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """What became of one tensor.

    `sources` are names of the reasoning checkpoint. A copied tensor has none, and `reason` says why
    it was copied. `merged` counts elements with a match. If the method has them, `kept_reasoning`
    and `kept_multimodal` count what trimming or dropping left of each task vector, and `cosine` is
    that between the two tensors. `rounding_share` is how large rounding to the output's dtype is
    beside the shift from the multimodal model's values, measured in every eighth block of 512
    elements; None where nothing was measured. `nonfinite` counts NaN and infinities in the
    sources, `overflow` results beyond the dtype's range.
    """

    name: str
    kind: str
    layer: int | None
    sources: tuple[str, ...] = ()
    weight: float | None = None
    reason: str = ""
    merged: int = 0
    kept_reasoning: int | None = None
    kept_multimodal: int | None = None
    cosine: float | None = None
    rounding_share: float | None = None
    nonfinite: int = 0
    overflow: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return what is known, for `merge.json`; kind and layer follow from the name."""
        values = ((key, getattr(self, key)) for key in _KEPT)
        return {key: value for key, value in values if value not in (None, "", (), 0)}


_KEPT = [one.name for one in fields(MergedTensor) if one.name not in ("kind", "layer")]


def outcome_of(
    name: str, blended: Blended | None, found: Found | None, reason: str
) -> MergedTensor:
    """Return what became of a tensor, from what the core found or the reason that it was copied."""
    if blended is None or found is None:
        return MergedTensor(name, kind_of(name), layer_of(name), reason=reason or COPIED_SCALES)
    nonfinite = (found[f"nonfinite_{role}"] for role in ("reasoning", "multimodal", "base"))  # type: ignore[literal-required]
    return MergedTensor(
        name,
        kind_of(name),
        layer_of(name),
        tuple(blended.pair.sources),
        blended.weight,
        merged=found["merged"],
        kept_reasoning=found["kept_reasoning"],
        kept_multimodal=found["kept_multimodal"],
        cosine=found["cosine"],
        rounding_share=rounding_share([found]),
        nonfinite=sum(nonfinite),
        overflow=found["overflow"],
    )


def rounding_share(found: Iterable[Found | None]) -> float | None:
    """Return ‖rounding‖/‖shift‖ over tensors; None if none of them was shifted."""
    rows = [row for row in found if row is not None]
    shift_sq = math.fsum(row["shift_sq"] for row in rows)
    if not shift_sq > 0:
        return None
    return math.sqrt(math.fsum(row["rounding_sq"] for row in rows) / shift_sq)


def warn_of_rounding(
    share: float | None, tensors: Sequence[MergedTensor], dtypes: set[str]
) -> None:
    """Warn if rounding to the output's dtype takes a good part of what the merge does."""
    if share is None or share <= _MUCH:
        return
    known = [tensor for tensor in tensors if tensor.rounding_share is not None]
    worst = sorted(known, key=lambda tensor: tensor.rounding_share or 0.0, reverse=True)[:3]
    shown = ", ".join(f"{tensor.name} {tensor.rounding_share:.0%}" for tensor in worst)
    warnings.warn(
        f"rounding to {' and '.join(sorted(dtypes))} changes the merged weights {share:.0%} as "
        f"much as the merge itself does ({shown}). Pass dtype='float32', and load the result with "
        "dtype=torch.float32, or merge with larger weights",
        DriftWarning,
        stacklevel=5,
    )


def refuse_nonfinite(found: Iterable[tuple[Blended, Found]], paths: Mapping[str, Path]) -> None:
    """Refuse NaN and infinities, in sources or in results; `paths` are those of each model.

    Raises:
        NonFiniteError: a value is not finite.
    """
    problems = [problem for blended, row in found for problem in _problems(blended, row, paths)]
    refuse_problems(problems, "count them in the report instead")


def _problems(blended: Blended, row: Found, paths: Mapping[str, Path]) -> Iterator[str]:
    name, base = blended.pair.name, blended.of_base
    for count, names, role in (
        (row["nonfinite_reasoning"], blended.pair.sources, "reasoning"),
        (row["nonfinite_multimodal"], [name], "multimodal"),
        (row["nonfinite_base"], [] if base is None else base.sources, "base"),
    ):
        if count:
            there = " and ".join(names[:3])
            yield f"{there} has {count} NaN or infinite values in {paths[role]}"
    if row["overflow"]:
        remedy = "; choose dtype='float32'" if blended.dtype == "float16" else ""
        yield f"{name}: {row['overflow']} results are beyond the range of {blended.dtype}{remedy}"
