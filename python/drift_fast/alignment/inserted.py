"""A layer map for a multimodal model that has layers of another structure inserted.

The map is for the user to look over and is never applied by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from drift_fast.alignment.name_alignment import NameAlignment
from drift_fast.names import container_of, layer_of
from drift_fast.shapes import Shape


@dataclass(frozen=True)
class InsertedLayers:
    """The layers that only the multimodal model has, and the map that leaves them out."""

    layers: list[int]
    mapping: dict[str, str]

    def __str__(self) -> str:
        return ", ".join(map(str, self.layers))


def find_inserted_layers(
    reasoning: Mapping[str, Shape], multimodal: Mapping[str, Shape], found: NameAlignment
) -> InsertedLayers | None:
    """Propose a layer map that leaves inserted layers out; None where there are none.

    The layers that hold all that the reasoning model's layers have, in order, must be as many as
    those, so a model that is merely deeper gets no proposal.
    """
    first = next((pair for pair in found.pairs if layer_of(pair.name) is not None), None)
    if first is None:
        return None
    here_in, there_in = container_of(first.sources[0]), container_of(first.name)
    if here_in is None or there_in is None:
        return None
    here, there = _by_layer(reasoning, here_in), _by_layer(multimodal, there_in)
    complete = [
        layer
        for layer in sorted(there)
        if any(own.items() <= there[layer].items() for own in here.values())
    ]
    matches = dict(zip(sorted(here), complete, strict=False))
    if len(complete) != len(here) or not all(
        here[a].items() <= there[b].items() for a, b in matches.items()
    ):
        return None
    inside = {
        f"{here_in}.{a}.{module}": f"{there_in}.{b}.{module}"
        for a, b in matches.items()
        for module in here[a]
    }
    outside = {
        pair.sources[0]: pair.name
        for pair in found.pairs
        if layer_of(pair.name) is None and len(pair.sources) == 1
    }
    return InsertedLayers(sorted(set(there) - set(complete)), inside | outside)


def _by_layer(tensors: Mapping[str, Shape], container: str) -> dict[int, dict[str, Shape]]:
    layers: dict[int, dict[str, Shape]] = {}
    for name, shape in tensors.items():
        layer = layer_of(name)
        if layer is not None and container_of(name) == container:
            inside = name.removeprefix(f"{container}.{layer}.")
            layers.setdefault(layer, {})[inside] = shape
    return layers
