"""Embedding and head of a running model: one parameter that is injected once, or two by mistake.

PEFT copies a module that trains in full, and adapts each module by itself, so what the model ties
may train as two parameters. Δ of the tied weight would reach one of them alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from drift_fast.alignment.name_alignment import Pair
from drift_fast.delta.protocol import DeltaLike
from drift_fast.errors import DriftError
from drift_fast.inject.lora.adapters import Adapted
from drift_fast.names import kind_of


def without_tied(
    pairs: Sequence[Pair], parameters: Mapping[str, nn.Parameter], delta: DeltaLike
) -> tuple[list[Pair], dict[str, str]]:
    """Return one pair for each parameter, and of tied ones which tensor stands for a left-out one.

    Raises:
        DriftError: two tensors of the delta that differ are one parameter.
    """
    first: dict[int, Pair] = {}
    left_out: dict[str, str] = {}
    for pair in pairs:
        other = first.setdefault(id(parameters[pair.name]), pair)
        if other is pair:
            continue
        same = [*pair.sources, *other.sources]
        if len(same) != 2 or not torch.equal(delta[same[0]], delta[same[1]]):
            raise DriftError(
                f"{same[1]} and {same[0]} of the delta are one tied parameter of the model, "
                f"{other.name}, but differ; leave one of them out of the selection (modules=…)"
            )
        left_out[same[0]] = same[1]
    return list(first.values()), left_out


def refuse_untied(
    model: nn.Module,
    pairs: Sequence[Pair],
    parameters: Mapping[str, nn.Parameter],
    adapted: Mapping[str, Adapted | str],
) -> None:
    """Refuse an embedding or head that the model ties to another which trains without Δ.

    Raises:
        DriftError: there is one.
    """
    held = {name: kind_of(name) for name in parameters if kind_of(name) in ("embed", "head")}
    targeted = {pair.name for pair in pairs} & held.keys()
    if not targeted or not _ties(model):
        return
    trained = {name: _trained(name, parameters, adapted) for name in held}
    for name in targeted:
        for other in held.keys() - targeted:
            apart = _in_one_model(name, other) and not _share(trained[name], trained[other])
            if apart and any(parameter.requires_grad for parameter in trained[other]):
                raise DriftError(
                    f"the model ties {name} and {other}, and they are two parameters here, of "
                    f"which the delta has {name} alone: {other} would train without Δ. Make them "
                    "one, with ensure_weight_tying=True in the PEFT config or without adapters "
                    "with model.tie_weights(), or leave embeddings and head out with modules=…"
                )


def _in_one_model(first: str, second: str) -> bool:
    """Whether one is the head and the other the embedding of one of the model's language models."""
    heads = [name for name in (first, second) if kind_of(name) == "head"]
    if len(heads) != 1:
        return False
    owner = heads[0].rpartition(".")[0].rpartition(".")[0]
    return not owner or all(name.startswith(f"{owner}.") for name in (first, second))


def _ties(model: nn.Module) -> bool:
    """Whether a model of transformers ties its head: as it was loaded, or else as it states."""
    for module in model.modules():
        keys = getattr(module, "all_tied_weights_keys", None)
        if keys is not None:
            return any(kind_of(name) == "head" for name in keys)
        stated = getattr(getattr(module, "config", None), "tie_word_embeddings", None)
        if stated is not None:
            return bool(stated)
    return False


def _trained(
    name: str, parameters: Mapping[str, nn.Parameter], adapted: Mapping[str, Adapted | str]
) -> Sequence[nn.Parameter]:
    found = adapted.get(name)
    return found.trained if isinstance(found, Adapted) else (parameters[name],)


def _share(first: Sequence[nn.Parameter], second: Sequence[nn.Parameter]) -> bool:
    """Whether parameters are the same, or views of the same memory, as PEFT ties factors."""
    if {id(one) for one in first} & {id(one) for one in second}:
        return True
    if len(first) == len(second) == 1:
        return False
    places = [{one.untyped_storage().data_ptr() for one in side} for side in (first, second)]
    return bool(places[0] & places[1])
