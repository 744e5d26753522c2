"""Which parameters belong to which attachment, and which are copies of such parameters.

Owns the refusal of a second attachment. An attachment lives as long as the model: the modules that
hold its parameters hold it too, and nothing global does. No tensor is referred to weakly, since
torch refuses to move a parameter that is (`swap_tensors`, which FSDP2's `model.to()` uses).
"""

from __future__ import annotations

import gc
import logging
import secrets
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.target import Target

logger = logging.getLogger(__name__)

# On modules a `_Mark`. On parameters a string, which pickles hold and any program can read.
_ATTRIBUTE = "_drift_fast"


class Claim:
    """The parameters that an attachment holds until `release()`.

    holder: the attachment, which others may have let go of.
    undo: what removes the attachment; here so that it can be done without the holder.
    what: what it is, for messages.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        holder: object,
        undo: ExitStack,
        *,
        what: str = "an injection",
    ) -> None:
        self.token = secrets.token_hex(8)
        self.what = what
        # The attachment itself, while it is to live as long as the model whoever refers to it.
        self.kept: object = None
        # Whether a later attachment took the place of this one, whose parameters do not train.
        self.superseded = False
        self.parameters = {id(p): p for target in targets for p in target.trained}
        self._names = {target.delta_name for target in targets}
        self._holder = weakref.ref(holder)
        self._undo = undo
        self._modules: list[nn.Module] = []

    def take(self, model: nn.Module) -> Self:
        """Mark the parameters, and the modules of a model that hold them, as this claim's."""
        for other in list(_live.values()):
            lost = other.is_lost_in(model, self._names)
            other.superseded |= lost or other.is_adapted_in(model, self._names)
        _live[self.token] = self
        for parameter in self.parameters.values():
            parameter.__dict__[_ATTRIBUTE] = self.token
        for module in model.modules():
            own = [p for p in module._parameters.values() if p is not None]
            own = [p for p in own if id(p) in self.parameters]
            if own:
                self._mark(module, own)
        if not self._modules:
            # FSDP1 may keep its parameters elsewhere.
            self._mark(model, [])
        return self

    def release(self) -> None:
        """Give the parameters back. May be called twice."""
        _live.pop(self.token, None)
        for parameter in self.parameters.values():
            if parameter.__dict__.get(_ATTRIBUTE) == self.token:
                del parameter.__dict__[_ATTRIBUTE]
        for module in self._modules:
            marks = module.__dict__.get(_ATTRIBUTE)
            if isinstance(marks, _Marks):
                marks.pop(self.token, None)
                if not marks:
                    del module.__dict__[_ATTRIBUTE]
        self._modules = []

    @property
    def is_held(self) -> bool:
        """Whether anybody can still call `remove()` on the attachment."""
        return self._holder() is not None

    def is_in(self, model: nn.Module) -> bool:
        """Whether modules of a model have this claim's marks."""
        return any(self.token in module.__dict__.get(_ATTRIBUTE, ()) for module in model.modules())

    def is_lost_in(self, model: nn.Module, names: set[str]) -> bool:
        """Whether a model has lost all these parameters, and has others for the same Δ.

        names: of the tensors of Δ that have parameters now.
        """
        if not (self._names <= names and self.is_in(model)):
            return False
        return self.parameters.keys().isdisjoint(id(parameter) for parameter in model.parameters())

    def is_adapted_in(self, model: nn.Module, names: set[str]) -> bool:
        """Whether a model has frozen all these parameters, and trains others for some of the Δ."""
        if self._names.isdisjoint(names) or not self.is_in(model):
            return False
        return not any(parameter.requires_grad for parameter in self.parameters.values())

    def abandon(self) -> None:
        """Remove the attachment, which nobody else can any more."""
        self._undo.close()
        self.release()

    def copies_in(self, optimizer: torch.optim.Optimizer) -> int:
        """Return how many parameters of an optimizer are copies of this claim's."""
        held = (p for group in optimizer.param_groups for p in group["params"])
        return sum(
            getattr(p, _ATTRIBUTE, None) == self.token and id(p) not in self.parameters
            for p in held
        )

    def _mark(self, module: nn.Module, own: list[nn.Parameter]) -> None:
        marks = module.__dict__.setdefault(_ATTRIBUTE, _Marks())
        if not isinstance(marks, _Marks):
            # What unpickling has left.
            marks = module.__dict__[_ATTRIBUTE] = _Marks()
        marks[self.token] = (self, own)
        self._modules.append(module)


# Modules and holders keep the claims alive.
_live: weakref.WeakValueDictionary[str, Claim] = weakref.WeakValueDictionary()


class _Marks(dict[str, tuple[Claim | None, list[nn.Parameter]]]):
    """The claims on a module's parameters, by token; in a copy of the module, no claims."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Marks:
        # copy.deepcopy drops a parameter's attributes. Its copy exists by now, since a module has
        # its parameters before it gets this mark.
        copied = _Marks()
        for token, (_, own) in self.items():
            copies = [memo[id(p)] for p in own if id(p) in memo]
            for parameter in copies:
                parameter.__dict__[_ATTRIBUTE] = token
            copied[token] = (None, copies)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A pickled model must load where this library is not installed.
        return str, ()


def refuse_second(targets: Sequence[Target], model: nn.Module) -> None:
    """Refuse parameters that another attachment holds.

    One that nobody refers to is removed, also where the model has lost its parameters.

    Raises:
        DriftError: the first of them.
    """
    names = {id(p): target.name for target in targets for p in target.trained}
    wanted = {target.delta_name for target in targets}
    for claim in list(_live.values()):
        taken = [name for key, name in names.items() if key in claim.parameters]
        if not taken:
            if not claim.is_held and claim.is_lost_in(model, wanted):
                logger.info("removing an attachment to parameters that the model has lost")
                claim.abandon()
            continue
        if claim.is_held:
            # A trainer that was dropped refers to itself.
            gc.collect()
        if claim.is_held:
            raise DriftError(
                f"{taken[0]} has {claim.what} attached already; call remove() on that one "
                "first, or both would act on it"
            )
        logger.info("removing an attachment to %s that nothing refers to any more", taken[0])
        claim.abandon()
