"""What a tensor's name says: the kind of its module, its layer, its container and its modality.

Module kinds follow the names of Hugging Face text models. Reads no checkpoint and knows no family.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

# Checked in this order: q_norm is inside self_attn but is a norm.
_KINDS: dict[str, re.Pattern[str]] = {
    "norm": re.compile(r"(^|[._])(layer_?norm|rms_?norm|norm|ln)(_?[a-z0-9]+)?\.(weight|bias)$"),
    "embed": re.compile(
        r"(^|\.)(embed_tokens(_per_layer)?|wte|word_embeddings|tok_embeddings)\.weight$"
    ),
    "head": re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$"),
    "attn": re.compile(
        r"(^|\.)(self_attn|self_attention|attention|attn)\."
        r"(q|k|v|o|qkv|out|kv_a|kv_b|q_a|q_b)_proj(_with_mqa)?\.(weight|bias)$"
        r"|(^|\.)linear_attn\.(in_proj\w*|out_proj)\.(weight|bias)$"
    ),
    "mlp": re.compile(
        r"(^|\.)(mlp|feed_forward|block_sparse_moe)\.(.+\.)?"
        r"((gate|up|down|gate_up)_proj|w[123]|fc[12])(\.(weight|bias)|_bias)?$"
    ),
}
MODULE_KINDS = tuple(_KINDS)

_OTHER_MODALITY = re.compile(
    r"(^|\.)(visual|vision\w*|vit\w*|image_\w+|audio\w*|speech\w*|\w*projector|connector"
    r"|perceiver\w*|resampler|merger)(\.|$)"
)
# More digits than any layer has are part of a name, and may be more than Python converts.
_NUMBERED = re.compile(r"(?:^|\.)(\d{1,9})(?=\.|$)")
# Experts that a router chooses from, as `experts.3`, `experts.expert_3` or fused, as `experts`.
_EXPERT = re.compile(r"(?:^|\.)(?!shared)\w*(?:experts|expert_?\d+)(?:\.|$)")


def is_other_modality(name: str) -> bool:
    """Whether a tensor belongs to a vision or audio tower or a projector, by its name."""
    return _OTHER_MODALITY.search(name) is not None


@functools.lru_cache(maxsize=1 << 16)
def kind_of(name: str) -> str:
    """Return the preset that selects a tensor, or "other"."""
    if _OTHER_MODALITY.search(name):
        return "other"
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), "other")


@functools.lru_cache(maxsize=1 << 16)
def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor is in, None outside the layers."""
    found = _NUMBERED.search(name)
    return int(found.group(1)) if found else None


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to experts that a router chooses from, by its name."""
    return _EXPERT.search(name) is not None


def container_of(name: str) -> str | None:
    """Return the part of a name before the layer number, None outside the layers."""
    found = _NUMBERED.search(name)
    return name[: found.start()] if found else None


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


@functools.lru_cache(maxsize=1 << 16)
def module_of(name: str) -> str:
    """Return the module within its layer, such as `self_attn.q_proj`, without expert numbers."""
    found = _NUMBERED.search(name)
    inside = name[found.end() + 1 :] if found else name.rpartition(".")[0].rpartition(".")[2]
    parts = [part for part in inside.split(".") if not part.isdigit()]
    if found and len(parts) > 1 and parts[-1] in ("weight", "bias"):
        parts.pop()
    return ".".join(parts) or name
