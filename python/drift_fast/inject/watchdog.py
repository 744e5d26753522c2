"""Which parameters were injected when: for the watchdog, the counts, and a second attachment.

Owns no tensor but counts that stay where they were computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from drift_fast.errors import DriftError
from drift_fast.inject.targets import Target

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


class Record:
    """Which targets were injected when, for the watchdog and the counts.

    A target is one parameter, or the factors of one weight, which are injected together. An
    optimizer may hold some of the targets only, and several optimizers may step after one
    injection, so each keeps its own account of what it has used.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
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

    def inject(self, parameters: Sequence[nn.Parameter], skipped: Any = None) -> None:
        """Note that these were injected; a hook says at once whether its one was skipped."""
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

    def consume(self, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """Return how many targets the optimizer holds, and how many were injected for this step."""
        held = {
            self._place[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._place
        }
        used = self._used.get(optimizer) or [0] * len(self._times)
        fresh = sum(self._times[at] > used[at] for at in held)
        # Of all targets, so that one which joins the optimizer later brings no old injection along.
        self._used[optimizer] = list(self._times)
        self._consumed = self._consumed or bool(held)
        return len(held), fresh

    def has_fresh(self) -> bool:
        """Whether an injection has happened that no optimizer has used."""
        return bool(self._current) and not self._consumed

    def injected(self) -> int:
        return len(self._current) - self._counted()

    def skipped(self) -> int:
        return self._missing + self._counted()

    def skipped_if_known(self) -> int:
        """The count as far as it is on the host, without waiting for a device."""
        return sum(count for count in self._skips if isinstance(count, int))

    def _counted(self) -> int:
        return sum(int(count) for count in [*self._skips, *self._skip_of.values()])
