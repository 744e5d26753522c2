"""The options of `merge`."""

from __future__ import annotations

from dataclasses import dataclass

from drift_fast.alignment.mapping import MappingLike, parse_mapping
from drift_fast.alignment.options import MatchOptions
from drift_fast.checkpoints.opened import PathLike
from drift_fast.delta.options import OutputOptions, StreamOptions
from drift_fast.merging.config import Weight
from drift_fast.merging.layout import DTYPES
from drift_fast.options import option
from drift_fast.selection import Modules


def parse_weight(text: str) -> float | dict[str, float]:
    """Return a weight from text such as "0.7" or "attn=0.7,mlp=1.25".

    Raises:
        ValueError: not a number, or a module kind that is named twice.
    """
    if "=" not in text:
        return _number(text)
    weights: dict[str, float] = {}
    for part in text.split(","):
        kind, _, value = part.partition("=")
        if kind.strip() in weights:
            raise ValueError(f"weight names {kind.strip()!r} twice, in {text!r}")
        weights[kind.strip()] = _number(value)
    return weights


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(
            f"weight must be a number, or numbers by module kind such as attn=0.7,mlp=1.25; got "
            f"{text!r}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class MergeOptions(OutputOptions, StreamOptions, MatchOptions):
    """The options of `merge`; the method decides which numbers it takes."""

    base: PathLike | None = option(
        None, "the text model that the reasoning model was tuned from", metavar="BASE"
    )
    weight: Weight | None = option(
        None,
        "weight of the reasoning model: one number, or one for each module kind, such as "
        "attn=0.7,mlp=1.25; 1 by default, except for linear and slerp, which need one",
        parse=parse_weight,
        metavar="W",
    )
    multimodal_weight: float | None = option(
        None, "weight of multimodal − base, 1 by default; it needs a base", metavar="V"
    )
    density: float | None = option(
        None,
        "share of each task vector that ties and dare_* keep, above 0 and up to 1",
        metavar="SHARE",
    )
    seed: int | None = option(None, "seed of what DARE drops, 0 by default")
    keep_layers: int | None = option(
        None, "number of first decoder layers that layer_swap does not change", metavar="N"
    )
    # None depends on the weight, which only a merge has.
    modules: Modules | None = option(  # type: ignore[assignment]
        None,
        "what is merged: presets attn, mlp, norm, embed, head, all, or re:<pattern>; by default "
        "all language tensors, or the kinds that weight names",
    )
    base_mapping: MappingLike | None = option(
        None,
        "which tensor of the base belongs to which; by default mapping where it fits the base, or "
        "names and shapes",
        parse=parse_mapping,
        metavar="MAP",
    )
    dtype: str | None = option(
        None,
        "dtype of the merged tensors; by default that of each in the multimodal checkpoint",
        choices=DTYPES.values(),
    )
