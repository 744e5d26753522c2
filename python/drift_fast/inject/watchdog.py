"""The watchdog: no optimizer steps on gradients that were to be injected and were not.

Owns the account of which targets were injected when, which optimizer has used what, and which
parameters are held by an attachment. The only tensors it keeps are counts, where they were
computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from drift_fast.errors import DriftError
from drift_fast.inject.config import ScopeName
from drift_fast.inject.missing import MissingAccount
from drift_fast.inject.target import Target

# Parameters that an attachment holds, so that a second one is refused.
_attached: Any = WeakIdKeyDictionary()


def claim(targets: Sequence[Target], holder: object) -> None:
    """Note that these parameters belong to an attachment."""
    for target in targets:
        for parameter in target.trained:
            _attached[parameter] = weakref.ref(holder)


def disclaim(targets: Sequence[Target], holder: object) -> None:
    """Give back the parameters that this attachment holds."""
    for parameter in (parameter for target in targets for parameter in target.trained):
        found = _attached.get(parameter)
        if found is not None and found() is holder:
            del _attached[parameter]


def refuse_second(targets: Sequence[Target]) -> None:
    """Refuse parameters that another attachment holds.

    Raises:
        DriftError: the first of them.
    """
    for target in targets:
        found = [_attached.get(parameter) for parameter in target.trained]
        if any(one is not None and one() is not None for one in found):
            raise DriftError(
                f"{target.name} has an injection attached already; call remove() on that one "
                "first, or both would push"
            )


class Watchdog:
    """Follows injections and optimizer steps, and fails a step without an injection.

    A target is one parameter, or the factors of one weight, which are injected together. An
    optimizer may hold some of the targets only, and several optimizers may step after one
    injection, so each has its own account of what it has used.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        *,
        scope: ScopeName,
        missing: MissingAccount,
    ) -> None:
        self._model = weakref.ref(model)
        self._targets = list(targets)
        self._scope = scope
        self._account = missing
        # Optimizers that hold no target and were looked at.
        self._foreign: Any = weakref.WeakSet()
        self._place = {id(p): at for at, target in enumerate(targets) for p in target.trained}
        self._times = [0] * len(targets)
        self._used: Any = weakref.WeakKeyDictionary()
        self._current: set[int] = set()
        self._consumed = False
        self._missing = 0
        # Counts stay where they were computed; adding them up is what waits for a device.
        self._skips: list[Any] = []
        self._skip_of: dict[int, Any] = {}

    def begin(self, missing: int) -> None:
        """Start the account of a new step."""
        self._current, self._missing, self._skips, self._skip_of = set(), missing, [], {}
        self._consumed = False

    def note(self, parameters: Sequence[nn.Parameter], skipped: Any = None) -> None:
        """Note that these were injected; a hook says at once whether its parameter was skipped."""
        if self._consumed:
            self.begin(0)
        for parameter in parameters:
            at = self._place[id(parameter)]
            self._times[at] += 1
            self._current.add(at)
            if skipped is not None:
                self._skip_of[at] = skipped

    def skip(self, count: Any) -> None:
        """Add a number of parameters that were skipped, an int or a device tensor."""
        self._skips.append(count)

    def check(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether an optimizer that is about to step holds any target.

        Raises:
            DriftError: it would use gradients without the injection.
        """
        held, fresh = self._consume(optimizer)
        if not held:
            self._refuse_replaced(optimizer)
            return False
        if not fresh:
            call = (
                "call injection.step() between backward and optimizer.step()"
                if self._scope == "step"
                else "no backward pass reached its hooks (were the parameters replaced or wrapped "
                "after attaching?)"
            )
            raise DriftError(
                f"nothing was injected before this step of {type(optimizer).__name__}: {call}; or "
                "call injection.remove() to train without it"
            )
        if self._scope == "microbatch":
            refusal = self._account.see(fresh, held - fresh)
            if refusal is not None:
                raise refusal
        return True

    def has_fresh(self) -> bool:
        """Whether an injection has happened that no optimizer has used."""
        return bool(self._current) and not self._consumed

    def injected(self) -> int:
        """Return how many targets were injected; waits for the device."""
        return len(self._current) - self._counted()

    def skipped(self) -> int:
        """Return how many targets were left alone; waits for the device."""
        return self._missing + self._counted()

    def skipped_if_known(self) -> int:
        """Return the count as far as it is on the host, without waiting for a device."""
        return sum(count for count in self._skips if isinstance(count, int))

    def _counted(self) -> int:
        return sum(int(count) for count in [*self._skips, *self._skip_of.values()])

    def _consume(self, optimizer: torch.optim.Optimizer) -> tuple[set[int], set[int]]:
        """Return which targets the optimizer holds, and which were injected for this step."""
        held = {
            self._place[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._place
        }
        used = self._used.get(optimizer) or [0] * len(self._times)
        fresh = {at for at in held if self._times[at] > used[at]}
        # All targets, so that one which joins the optimizer later brings no old injection along.
        self._used[optimizer] = list(self._times)
        self._consumed = self._consumed or bool(held)
        return held, fresh

    def _refuse_replaced(self, optimizer: torch.optim.Optimizer) -> None:
        """Fail where an optimizer trains the model, and no target can train any more."""
        model = self._model()
        if model is None or optimizer in self._foreign:
            return
        self._foreign.add(optimizer)
        present = {id(parameter) for parameter in model.parameters()}
        if any(id(p) in present and p.requires_grad for t in self._targets for p in t.trained):
            return
        if any(id(p) in present for group in optimizer.param_groups for p in group["params"]):
            raise DriftError(
                f"nothing can be injected before this step of {type(optimizer).__name__}: all "
                f"{len(self._targets)} targets were replaced or frozen after attaching, as by "
                "fully_shard or an adapter; attach after the model was wrapped"
            )
