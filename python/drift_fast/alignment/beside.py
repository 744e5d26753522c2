"""Tensors beside a weight that change it: adapters that are not merged, and codes of quantization.

A weight is what a model computes with, and such a tensor is a part of it, so Δ of what is stored
under the weight's own name is Δ of something else. The rule asks for no format: whatever is stored
under the path of a weight of the backbone, and is neither matched nor known to leave the weight as
it is, changes it. Only the wording of the remedy knows families.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from drift_fast.checkpoints.opened import ITEMSIZE, Opened
from drift_fast.checkpoints.source import Source
from drift_fast.names import container_of, containers_of, is_other_modality, kind_of, place_of

# What wraps a weight, or is added to it, in PEFT's names.
_ADAPTER = re.compile(
    r"(?:^|\.)(?:base_layer|original_module|modules_to_save"
    r"|(?:lora|ia3|hada|lokr|oft|boft|vera|hra|trainable_tokens|ln_tuning)_\w+)(?:\.|$)"
)
# What codes need to become a weight, in names that mean nothing else.
_CODED = re.compile(
    r"(?:^|[._])(?:qweight|qzeros|absmax|quant_map|quant_state|SCB|W_q|weight_(?:packed|scale\w*)"
    r"|weight_zero_point|weight_global_scale|qdata)(?:\.|$)"
)
# Where only codes, never floats, have these names.
_BLOCKS = re.compile(r"_(?:blocks|scales)$")
# Words that say that an unknown tensor belongs to a quantization.
_QUANTIZED = re.compile(r"scale|zero|quant|code|pack|bias|amax|blocks|tables|shape|g_idx", re.I)
# Formats that transformers turns back into weights, and how.
_DEQUANTIZED = {
    r"\.(?:absmax|SCB)$": " and save what model.dequantize() returns",
    r"_blocks$": ", quantization_config=Mxfp4Config(dequantize=True), and save it",
}
# Biases, and scales of activations or of a key-value cache, leave the weight as it is.
_HARMLESS = re.compile(
    r"(?:^|[._])(?:bias|(?:[kvqp]|kv|input|output|act|activation|prob)(?:_global)?_scale"
    r"|(?:input|output)_(?:min|max)|running_mean|running_var)$"
)
_FLOATS = ("BF16", "F16", "F32", "F64")
# Indices, counters and masks.
_NO_WEIGHTS = ("I64", "U64", "BOOL")
# How far above a tensor its weight may be: `q_proj.weight.quant_state.bitsandbytes__nf4`.
_DEPTH = 5

# Names of tensors by the container of their layer, place in the layer and dtype.
Groups = dict[tuple[str | None, str, str], list[str]]

_QUANTIZED_NAME = re.compile(
    r"[-_.](?:AWQ|GPTQ|(?:GPTQ-)?Int[48]|FP8|NVFP4|MXFP4|bnb|4bit|8bit|w4a16|w8a8)\b.*$", re.I
)


@dataclass
class Beside:
    """What changes the weights of one checkpoint, by the kind of remedy; each name once."""

    adapters: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def explain(self, side: Opened, role: str) -> list[str]:
        """Return what was found in a checkpoint, what it means and what to do; one text a kind."""
        where = f"the {role} checkpoint {side.source.path}"
        texts = []
        if self.adapters:
            # The wrapped weights say less than the adapter's own.
            names = sorted(self.adapters, key=lambda name: "base_layer" in name)
            texts.append(
                f"{where} has an adapter that is not merged: {_listed(names, side.dtypes)}. Its "
                "weights are the base and the adapter together, so Δ of the base alone would be "
                "another. Merge the adapter first: load the model with it, and save what "
                "model.merge_and_unload() returns"
            )
        if self.codes:
            texts.append(
                f"{where} is quantized: {_listed(self.codes, side.dtypes)}. Its weights are codes "
                f"together with their scales, which cannot be subtracted as {', '.join(_FLOATS)} "
                f"can. Take the unquantized checkpoint{unquantized_name(side.source)}"
                f"{_how(self.codes)} (quantized is also spelled quantised)"
            )
        if self.unknown:
            texts.append(
                f"{where} has tensors under the path of a weight, which the other checkpoint "
                f"lacks: {_listed(self.unknown, side.dtypes)}. They change what the model computes "
                "with, so Δ of the weight alone would be another. Take a checkpoint in which they "
                "are merged into their weights"
            )
        return texts


def find_beside(
    sides: tuple[Opened, Opened], matched: tuple[Collection[str], Collection[str]]
) -> tuple[Beside, Beside]:
    """Return what changes weights of the backbone of either side, selected or not.

    `matched` are the names of either side that have a match. The backbone is the layers that they
    are in, with norm, embeddings and head; where nothing matches, all layers but those of towers.
    """
    first, second = (_grouped(side) for side in sides)
    return (
        _beside(sides[0], first, _Places.of(sides[1], second).weights, matched[0]),
        _beside(sides[1], second, _Places.of(sides[0], first).weights, matched[1]),
    )


def _beside(side: Opened, groups: Groups, others: set[str], matched: Collection[str]) -> Beside:
    """Return what changes weights of one side; `others` are the places of those of the other."""
    containers = containers_of(matched) or {container for container, _, _ in groups}
    own = _Places.of(side, {key: groups[key] for key in groups if key[0] in {None, *containers}})
    weights = own.weights | others
    kinds: dict[str, str] = {}
    for (place, dtype), names in own.names.items():
        kind = _kind(place, dtype, own.weights, weights, kind_of(names[0]))
        # Outside of the layers a model may have more, such as a norm of its embeddings.
        if kind is None or (kind == "unknown" and place == names[0] and dtype in _FLOATS):
            continue
        chosen = names if kind != "unknown" else [name for name in names if name not in matched]
        if kind == "unknown" and _is_coded(chosen, side.dtypes):
            kind = "codes"
        kinds |= dict.fromkeys(chosen, kind)
    # In the order of the file, so that what belongs to one weight is named together.
    found = Beside()
    for name in side.shapes:
        if name in kinds:
            getattr(found, kinds[name]).append(name)
    return found


@dataclass
class _Places:
    """The tensors of a backbone by place in a layer and dtype, and the places of weights.

    A tensor outside of the layers is its own place.
    """

    names: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, side: Opened, groups: Groups) -> _Places:
        found = cls()
        for (_, place, dtype), names in groups.items():
            found.names.setdefault((place, dtype), []).extend(names)
            module, _, leaf = place.rpartition(".")
            if leaf == "weight":
                found.weights.add(module)
            elif leaf != "bias" and any(len(side.shapes[name]) > 1 for name in names):
                found.weights.add(place)
        return found


def _grouped(side: Opened) -> Groups:
    """Return the tensors that may be of a backbone. Layers repeat, so there are few groups."""
    found: Groups = {}
    for name, dtype in side.dtypes.items():
        found.setdefault((container_of(name), place_of(name), dtype), []).append(name)
    return {key: names for key, names in found.items() if not _is_aside(key[0], names[0])}


def _is_aside(container: str | None, name: str) -> bool:
    outside = container is None and not any(_is_vocabulary(one) for one, _ in _above(name))
    return outside or is_other_modality(name)


def _is_vocabulary(module: str) -> bool:
    return kind_of(f"{module}.weight") != "other"


def _kind(place: str, dtype: str, own: set[str], weights: set[str], module_kind: str) -> str | None:
    """Return which kind of tensor one at `place` is; None for a weight and what leaves it alone."""
    if _ADAPTER.search(place):
        return "adapters"
    if _CODED.search(place) or (dtype not in _FLOATS and _BLOCKS.search(place)):
        return "codes"
    module, _, leaf = place.rpartition(".")
    if dtype not in ITEMSIZE and (
        module_kind != "other" or (leaf == "weight" and dtype not in _NO_WEIGHTS)
    ):
        return "codes"
    if leaf == "weight":
        # A weight that is deeper in a module belongs to a part of that module.
        return "unknown" if any(above in own for above, _ in _above(module)) else None
    if dtype in _NO_WEIGHTS or _HARMLESS.search(place):
        return None
    if any(above in (own if "." in rest else weights) for above, rest in _above(place)):
        return "unknown"
    if any(stem in weights for stem in _stems(module, leaf)):
        return "unknown"
    return None


def _above(place: str) -> Iterator[tuple[str, str]]:
    """Return the paths above a place, the nearest first, and what is below each."""
    above = place
    for _ in range(_DEPTH):
        above, dot, _ = above.rpartition(".")
        if not dot:
            return
        yield above, place[len(above) + 1 :]


def _stems(module: str, leaf: str) -> Iterator[str]:
    """Return the names that a parameter's name begins with: `down_proj` of `down_proj_scale`."""
    stem = leaf
    for _ in range(_DEPTH):
        stem, found, _ = stem.rpartition("_")
        if not found:
            return
        yield f"{module}.{stem}" if module else stem


def _is_coded(names: Collection[str], dtypes: Mapping[str, str]) -> bool:
    """Whether tensors of unknown purpose belong to a quantization, by their types or names."""
    return any(
        dtypes[name] not in _FLOATS or _QUANTIZED.search(name.rpartition(".")[2]) for name in names
    )


def _how(names: Collection[str]) -> str:
    """Return how transformers makes the weights that codes mean, where it does."""
    for pattern, how in _DEQUANTIZED.items():
        if any(re.search(pattern, name) for name in names):
            return f"; if there is none, load this one with transformers{how}"
    return ""


def _listed(names: Collection[str], dtypes: Mapping[str, str]) -> str:
    first = ", ".join(f"{name} ({dtypes[name]})" for name in list(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


def unquantized_name(source: Source) -> str:
    """Return the name without the suffix that says how it was quantized, if it has one."""
    name = source.repo or source.path.name
    shorter = _QUANTIZED_NAME.sub("", name)
    return f", by its name {shorter}" if shorter and shorter != name else ""
