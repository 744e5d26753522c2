"""Which tensors a merge selects: those asked for or, by default, the kinds that have a weight."""

from __future__ import annotations

from dataclasses import dataclass

from drift_fast.merging.method_options import REST, ChosenMethod
from drift_fast.names import layer_of
from drift_fast.selection import Layers, Modules, Selection


@dataclass(frozen=True)
class _OfMerge(Selection):
    """A selection of decoder layers from a number on, None for all."""

    first: int | None = None

    def __contains__(self, name: str) -> bool:
        if self.first is None:
            return super().__contains__(name)
        layer = layer_of(name)
        return layer is not None and layer >= self.first and super().__contains__(name)

    def __str__(self) -> str:
        later = "" if self.first is None else f", layers from {self.first} on"
        return f"{super().__str__()}{later}"


def selection_of(chosen: ChosenMethod, modules: Modules | None, layers: Layers) -> Selection:
    """Return the selection; without `modules`, the kinds that have a weight.

    Raises:
        ValueError: modules or layers that `Selection` refuses.
    """
    named = modules is not None
    if modules is None:
        modules = [REST] if REST in chosen.weight else list(chosen.weight)
    found = Selection.parse(modules, layers)
    return _OfMerge(found.modules, found.layers, named, chosen.keep_layers)
