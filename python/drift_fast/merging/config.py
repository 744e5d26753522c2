"""The options of `merge`."""

from __future__ import annotations

from dataclasses import dataclass

from drift_fast.alignment.mapping import MappingLike, parse_mapping
from drift_fast.alignment.options import AlignOptions, PairOptions
from drift_fast.checkpoints.opened import PathLike
from drift_fast.delta.options import OutputOptions, StreamOptions
from drift_fast.merging.method_options import MethodOptions
from drift_fast.options import option
from drift_fast.selection import Layers, Modules

# The dtypes that a tensor can be merged into, and what users call them.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True, kw_only=True)
class MergeConfig(OutputOptions, StreamOptions, AlignOptions, MethodOptions):
    """What a merge does, which tensors it merges, and how it is written."""

    base: PathLike | None = option(
        None,
        "the text model that the reasoning model was tuned from; without one, ties and dare_* have "
        "one task vector, R − M, and no sign to elect",
        metavar="BASE",
    )
    modules: Modules | None = option(
        None,
        "which tensors are merged: presets attn, mlp, norm, embed, head, all, or re:<pattern>; by "
        "default every language tensor, or the kinds that `weight` names",
    )
    layers: Layers = option(None, "layer numbers, such as 0-3,8; all by default", metavar="LAYERS")
    base_mapping: MappingLike | None = option(
        None,
        "as `mapping`, from the base's names; by default `mapping`, if it holds for the base",
        parse=parse_mapping,
        metavar="MAP",
    )
    dtype: str | None = option(
        None,
        "dtype of merged tensors; by default that of the multimodal checkpoint, tensor by tensor",
        choices=DTYPES.values(),
    )

    def pair_options(self, mapping: MappingLike | None) -> PairOptions:
        """Return how the multimodal model is aligned with another, under a mapping."""
        shared = {name: getattr(self, name) for name in AlignOptions.names()}
        return PairOptions(**(shared | {"mapping": mapping}))
