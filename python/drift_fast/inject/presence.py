"""Whether targets are still in the model: parameters may be replaced while it trains."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.target import Target


class Present:
    """Whether targets are still parameters of the model, looked at without walking through it."""

    def __init__(self, model: nn.Module, targets: Sequence[Target]) -> None:
        self._model = weakref.ref(model)
        self._targets = list(targets)
        self._links = self._find(model)

    def check(self) -> None:
        """Refuse targets that are no longer in the model.

        Raises:
            DriftError: the first of them.
        """
        for holder, name, child in self._links:
            if holder.get(name) is not child:
                break
        else:
            return
        model = self._model()
        if model is None:
            return
        lost = lost_from(model, self._targets)
        if lost:
            raise DriftError(
                f"{len(lost)} of {len(self._targets)} targets are no longer parameters of the "
                f"model, {lost[0]} first, so nothing can be injected into what takes their place: "
                "they were replaced after attaching, as by fully_shard, an adapter or a new layer; "
                "attach after the model was wrapped and has its final form"
            )
        self._links = self._find(model)

    def holds_any(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer holds parameters of the model."""
        model = self._model()
        if model is None:
            return False
        present = {id(parameter) for parameter in model.parameters()}
        return any(id(p) in present for group in optimizer.param_groups for p in group["params"])

    def _find(self, model: nn.Module) -> list[tuple[Any, str, Any]]:
        """Return every link from the model down to a target."""
        wanted = {id(p) for target in self._targets for p in target.trained}
        links: list[tuple[Any, str, Any]] = []
        _leads(model, wanted, links, {})
        return links


def _leads(
    module: nn.Module, wanted: set[int], links: list[tuple[Any, str, Any]], below: dict[int, bool]
) -> bool:
    """Note the links below a module, and return whether there are any."""
    # No function inside another: one that calls itself would keep the model until it is collected.
    if id(module) in below:
        return below[id(module)]
    below[id(module)] = False
    own = [n for n, p in module._parameters.items() if id(p) in wanted]
    links.extend((module._parameters, name, module._parameters[name]) for name in own)
    inside = [(n, m) for n, m in module._modules.items() if m is not None]
    children = [n for n, m in inside if _leads(m, wanted, links, below)]
    links.extend((module._modules, name, module._modules[name]) for name in children)
    below[id(module)] = bool(own or children)
    return below[id(module)]


def lost_from(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Return the targets that are not parameters of a model, such as one wrapped since."""
    held = {id(parameter) for parameter in model.parameters()}
    return [t.name for t in targets if any(id(p) not in held for p in t.trained)]
