"""What a tensor's name says: the kind of its module, its layer, its container and its modality.

Module kinds follow the names of Hugging Face text models and, where those do not decide, the place
of a tensor within its layer. Reads no checkpoint and knows no family.

A name is parsed once, by `parsed`. Names of a model differ mostly in the numbers of layers and
experts, so what does not depend on these is found out once for each form of a name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

# Components that wrappers insert and that say nothing about the model.
_WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_forward_module",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "base_layer",
    }
)

# Checked in this order: q_norm is inside self_attn but is a norm.
_KINDS: dict[str, re.Pattern[str]] = {
    "norm": re.compile(r"(^|[._])(layer_?norm|rms_?norm|norm|ln)(_?[a-z0-9]+)?\.(weight|bias)$"),
    "embed": re.compile(
        r"(^|\.)(embed_tokens(_per_layer)?|wte|word_embeddings|tok_embeddings|embed_in)\.weight$"
    ),
    "head": re.compile(
        r"(^|\.)(lm_head|embed_out)\.(weight|bias)$"
        # Outside the layers; within them an output is a projection.
        r"|^(\D*(model|transformer)\.)?output(_layer)?\.weight$"
    ),
    "attn": re.compile(
        r"(^|\.)(self_attn|self_attention|attention|attn)\."
        r"(q|k|v|o|qkv|out|kv_a|kv_b|q_a|q_b)_proj(_with_mqa)?\.(weight|bias)$"
        r"|(^|\.)linear_attn\.(in_proj\w*|out_proj)\.(weight|bias)$"
    ),
    "mlp": re.compile(
        # The first such part: an attempt at each would take time quadratic in a stranger's name.
        r"^(?>[\s\S]*?(^|\.)(mlp|feed_forward|block_sparse_moe)\.)(.+\.)?"
        r"((gate|up|down|gate_up)_proj|w[123]|fc[12])(\.(weight|bias)|_bias)?$"
    ),
}
MODULE_KINDS = tuple(_KINDS)
# The parts of a layer whose weights and biases are attention or MLP whatever a family calls them.
_BLOCKS: dict[str, re.Pattern[str]] = {
    "attn": re.compile(r"self_?(attn|attention)|attn|attention|linear_(attn|attention)", re.I),
    "mlp": re.compile(
        r"(\w+_)?mlps?|feed_?forward|ffn|(block_sparse_)?moe|(shared_)?experts?|fc(1|2|_in|_out)"
        r"|DenseReluDense",
        re.I,
    ),
}
# What has a matrix in such a part and is none of its projections: what chooses experts or tokens,
# convolutions, positions and adapters.
_ASIDE = re.compile(
    r"norm|^ln(_|$)|gate$|^gating$|^wg$|router|indexer|conv(\d?d)?$|^rotary|^rope|pos(itions?)?(_|$)"
    r"|relative_|^rel_|^lora_|adapters?$|^to_",
    re.I,
)
_PARAMETER = re.compile(r"(in_proj_)?(weight|bias)|[vw]\d")

_OTHER_MODALITY = re.compile(
    r"(^|\.)(visual|vision\w*|vit\w*|image_\w+|audio\w*|speech\w*|\w*projector|connector"
    r"|perceiver\w*|resampler|merger)(\.|$)"
)
# As many as three of the largest models have, since each is asked about many times.
_NAMES = 1 << 20
# Remembers what a function finds of the forms of names. A model has some hundreds; each of a
# stranger's names may have its own.
by_form = functools.lru_cache(maxsize=1 << 14)
# More digits than any layer has are part of a name, and may be more than Python converts.
_NUMBERED = re.compile(r"(?:^|\.)(\d{1,9})(?=\.|$)")
_NUMBER = re.compile(r"(?<![^.])\d{1,9}(?=\.|$)")
# Experts that a router chooses from, as `experts.3`, `experts.expert_3` or fused, as `experts`.
_EXPERT = re.compile(r"(?:^|\.)(?!shared)\w*(?:experts|expert_?\d+)(?:\.|$)")


class Parsed(NamedTuple):
    """What a name says; tensors of one module of one layer, such as its experts, share it.

    `form` is the name with 0 for every number. `container` is the part before the number of the
    layer, which is `layer`; both are None outside the layers. `kind` is the preset that selects the
    tensor, or "other". `module` is the module within its layer, such as `self_attn.q_proj`, without
    numbers of experts.
    """

    form: str
    container: str | None
    layer: int | None
    kind: str
    module: str
    is_other_modality: bool


@functools.cache
def parsed(name: str) -> Parsed:
    """Return what a name says."""
    if parsed.cache_info().currsize >= _NAMES:
        parsed.cache_clear()
    found = _NUMBERED.search(name)
    if found is None:
        return _parsed(name, None, None)
    return _parsed(_NUMBER.sub("0", name), name[: found.start()], int(found[1]))


@by_form
def _parsed(form: str, container: str | None, layer: int | None) -> Parsed:
    return Parsed(form, container, layer, *_facts_of_form(form))


@by_form
def _facts_of_form(form: str) -> tuple[str, str, bool]:
    name = bare(form)
    other = _OTHER_MODALITY.search(name) is not None
    return "other" if other else _kind(name), _module(name), other


def is_other_modality(name: str) -> bool:
    """Whether a tensor belongs to a vision or audio tower or a projector, by its name."""
    return parsed(name).is_other_modality


def bare(name: str) -> str:
    """Return a name without the components that DDP, FSDP, torch.compile and PEFT insert."""
    parts = name.split(".")
    return name if _WRAPPERS.isdisjoint(parts) else ".".join(p for p in parts if p not in _WRAPPERS)


def kind_of(name: str) -> str:
    """Return the preset that selects a tensor, or "other"."""
    return parsed(name).kind


def _kind(name: str) -> str:
    found = (kind for kind, pattern in _KINDS.items() if pattern.search(name))
    return next(found, None) or _kind_by_place(name)


def _kind_by_place(name: str) -> str:
    block, inside = _block(name)
    leaf = name.rpartition(".")[2]
    if block is None or not _PARAMETER.fullmatch(leaf) or any(map(_ASIDE.search, inside)):
        return "other"
    # What is called `attn.bias` may be a mask.
    return block if inside or leaf not in ("weight", "bias") else "other"


def _block(name: str) -> tuple[str | None, list[str]]:
    """Return whether a tensor is in attention or an MLP of a layer, and the modules in there."""
    found = _NUMBERED.search(name)
    parts = name[found.end() + 1 :].split(".")[:-1] if found else []
    for at, part in enumerate(parts):
        for block, pattern in _BLOCKS.items():
            if pattern.fullmatch(part):
                return block, parts[at:] if part.startswith("fc") else parts[at + 1 :]
    return None, parts


def may_be_missed(name: str, kinds: Collection[str]) -> bool:
    """Whether a tensor of a layer that has no kind may be what these presets are meant to select.

    Routers and convolutions never are: they are neither attention nor MLP.
    """
    if kind_of(name) != "other" or is_other_modality(name) or layer_of(name) is None:
        return False
    block, inside = _block(bare(name))
    wanted = {"attn", "mlp"} & set(kinds)
    return bool(wanted & {block} if block else wanted) and not any(map(_ASIDE.search, inside))


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor is in, None outside the layers."""
    return parsed(name).layer


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to experts that a router chooses from, by its name."""
    return _EXPERT.search(name) is not None


def container_of(name: str) -> str | None:
    """Return the part of a name before the layer number, None outside the layers."""
    return parsed(name).container


def containers_of(names: Iterable[str]) -> set[str | None]:
    """Return the containers of the layers that any of these tensors are in."""
    return {found.container for found in set(map(parsed, names))} - {None}


def place_of(name: str) -> str:
    """Return the part of a name after the layer number, or all of it outside the layers."""
    container = container_of(name)
    return name if container is None else name[len(container) :].lstrip(".").partition(".")[2]


def common_prefixes(pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return what precedes the common ending of two names of a layer; None without a layer."""
    for first, second in pairs:
        containers = container_of(first), container_of(second)
        if containers[0] is None or containers[1] is None:
            continue
        a, b = containers[0].split("."), containers[1].split(".")
        while a and b and a[-1] == b[-1]:
            a.pop()
            b.pop()
        return ".".join(a), ".".join(b)
    return None


def module_of(name: str) -> str:
    """Return the module within its layer, such as `self_attn.q_proj`, without expert numbers."""
    return parsed(name).module or bare(name)


def _module(name: str) -> str:
    found = _NUMBERED.search(name)
    inside = name[found.end() + 1 :] if found else name.rpartition(".")[0].rpartition(".")[2]
    parts = [part for part in inside.split(".") if not part.isdigit()]
    if found and len(parts) > 1 and parts[-1] in ("weight", "bias"):
        parts.pop()
    return ".".join(parts)
