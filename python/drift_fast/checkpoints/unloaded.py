"""Which tensors of a checkpoint no model loads: further-token layers and computed buffers.

Such tensors are no part of a backbone. They are left out of `Opened.shapes`, so that no verb pairs,
counts or misses them, and every coverage lists them with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from drift_fast.checkpoints.config_json import Configuration
from drift_fast.errors import CheckpointError
from drift_fast.names import bare, by_form, container_of, kind_of, layer_of, parsed
from drift_fast.shapes import Shape

FURTHER_TOKENS = "left out: predicts further tokens, and is not loaded with the model"
BEYOND = "left out: in a layer beyond those that config.json states, so it is not loaded"
BUFFER = "left out: a buffer that the model computes itself, not a weight"

_FURTHER_MODULE = re.compile(r"(^|\.)(mtps?|nextn)(_\w+)?\.")
# What only a layer that predicts further tokens has: it joins a hidden state with an embedding.
_FURTHER_LAYER = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")
_FURTHER_COUNTS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_modules",
)
_COMPUTED = re.compile(
    r"(^|\.)((original_)?inv_freq|freqs_cis|(cos|sin)_cached|position_ids|masked_bias|causal_mask"
    r"|rope\.freqs)$"
)
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")

# A tensor's dtype and shape.
Stored = tuple[str, Shape]


def find_unloaded(tensors: Mapping[str, Stored], directory: Path) -> dict[str, str]:
    """Return the tensors of the checkpoint in a directory that no model loads, by name, and why."""
    late = [name for name in tensors if _is_of_further_layer(parsed(name).form)]
    if any(_stated(directory, key) for key in _FURTHER_COUNTS):
        late += layers_beyond(tensors, stated_layers(directory))
    further = {(container_of(name), layer_of(name)) for name in late}
    found = {}
    for name, (dtype, shape) in tensors.items():
        form, container, layer, *_ = parsed(name)
        if (layer is not None and (container, layer) in further) or _is_of_further_module(form):
            found[name] = FURTHER_TOKENS
        elif is_computed(name, dtype, shape) and not _is_beside_weight(name, tensors):
            found[name] = BUFFER
    return found


def is_computed(name: str, dtype: str, shape: Shape) -> bool:
    """Whether a tensor is a buffer that a model computes: position frequencies, masks, indices."""
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return (
        dtype == "BOOL"
        or _is_named_as_computed(parsed(name).form)
        or (square and _MASK.search(bare(name)) is not None)
    )


@by_form
def _is_of_further_layer(form: str) -> bool:
    return _FURTHER_LAYER.search(form) is not None


@by_form
def _is_of_further_module(form: str) -> bool:
    return _FURTHER_MODULE.search(form) is not None


@by_form
def _is_named_as_computed(form: str) -> bool:
    return _COMPUTED.search(bare(form)) is not None


def _is_beside_weight(name: str, names: Collection[str]) -> bool:
    """Whether a tensor may say something of a weight, such as which elements are pruned."""
    return f"{name.rpartition('.')[0]}.weight" in names


def stated_layers(directory: Path) -> int | None:
    """Return how many layers config.json states for the backbone; None where it states none.

    A backbone has layers, so 0 says nothing of the tensors: `check` reports it.
    """
    return _stated(directory, "num_hidden_layers") or None


def layers_beyond(names: Collection[str], stated: int | None) -> list[str]:
    """Return the tensors in layers of the only decoder from number `stated` on."""
    late = [name for name in names if stated is not None and (layer_of(name) or 0) >= stated]
    # Few checkpoints have any, and to look for the decoder takes longer.
    decoder = only_decoder(names) if late else None
    return [name for name in late if decoder is not None and container_of(name) == decoder]


def stored_layers(names: Collection[str]) -> int | None:
    """Return how many layers the only decoder has, by its highest number."""
    decoder = only_decoder(names)
    held = (layer_of(name) or 0 for name in names if container_of(name) == decoder)
    return None if decoder is None else 1 + max(held)


def only_decoder(names: Collection[str]) -> str | None:
    """Return the container of layers of the one part of a model that has attention or MLPs.

    None where there are several, since one stated number does not say which of them it counts.
    """
    decoders = {container_of(name) for name in names if kind_of(name) in ("attn", "mlp")}
    return decoders.pop() if len(decoders) == 1 else None


def _stated(directory: Path, key: str) -> int | None:
    try:
        stated = Configuration.read(directory).backbone.size(key)
    except CheckpointError:
        # Whoever needs the entry says what is wrong with it.
        return None
    return stated if isinstance(stated, int) else None
