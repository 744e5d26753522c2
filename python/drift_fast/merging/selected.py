"""Which tensors a merge selects, from what was asked for or from the kinds that have a weight."""

from __future__ import annotations

from dataclasses import dataclass

from drift_fast.merging.method_options import REST, ChosenMethod
from drift_fast.names import layer_of
from drift_fast.selection import Layers, Modules, Selection


@dataclass(frozen=True)
class _Later(Selection):
    """A selection of decoder layers from a number on."""

    first: int = 0

    def __contains__(self, name: str) -> bool:
        layer = layer_of(name)
        return layer is not None and layer >= self.first and super().__contains__(name)

    def __str__(self) -> str:
        return f"{super().__str__()}, layers from {self.first} on"


def selection_of(chosen: ChosenMethod, modules: Modules | None, layers: Layers) -> Selection:
    """Return which tensors are merged: what was asked for, or the kinds that have a weight.

    Raises:
        ValueError: modules or layers that `Selection` refuses.
    """
    if modules is None:
        modules = [REST] if REST in chosen.weight else list(chosen.weight)
    found = Selection.parse(modules, layers)
    if chosen.keep_layers is None:
        return found
    return _Later(found.modules, found.layers, chosen.keep_layers)
