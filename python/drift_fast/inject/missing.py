"""Targets without a gradient: which of them may be, how many there were, which never had one.

A router sends tokens to some experts only, so an expert may have no gradient in a step. Any other
target without one takes no part in the loss, which is a mistake as a rule.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

from drift_fast.errors import DriftError, DriftWarning
from drift_fast.inject.config import MissingGradients
from drift_fast.inject.refusals import frozen_since
from drift_fast.inject.target import Target
from drift_fast.names import is_expert

# Steps after which targets that have had no gradient in any of them are warned of.
PATIENCE = 100


class MissingAccount:
    """What was missing so far, by the number of the target in a list."""

    def __init__(self, targets: Sequence[Target], policy: MissingGradients) -> None:
        self._targets = targets
        self._needed = [
            policy == "raise" or (policy == "auto" and not is_expert(target.name))
            for target in targets
        ]
        self._never = set(range(len(targets)))
        self._last = 0
        self._steps = 0

    def see(self, present: Collection[int], missing: Collection[int]) -> DriftError | None:
        """Count a step, and return the refusal of what must have a gradient and has none."""
        refused = sorted(at for at in missing if self._needed[at])
        if refused:
            count = len(self._targets)
            return frozen_since([self._targets[at] for at in refused], count) or DriftError(
                f"{len(refused)} of {len(self._targets)} targets have no gradient, "
                f"{self._targets[refused[0]].name} first: they took no part in the loss. Leave "
                'them out with modules=… or layers=…, or pass missing_gradients="skip" to leave '
                "them out of the steps in which they have none, and count them"
            )
        self._never.difference_update(present)
        self._last = len(missing)
        self._steps += 1
        if self._steps == PATIENCE and self._never:
            first = self._targets[min(self._never)].name
            warnings.warn(
                f"{len(self._never)} of {len(self._targets)} targets had no gradient in any of the "
                f"first {PATIENCE} steps, {first} first, so nothing was injected there: see that "
                "the router sends them tokens, or leave them out with modules=… or layers=…",
                DriftWarning,
                stacklevel=2,
            )
        return None

    def metrics(self) -> dict[str, float]:
        """Return the counts; none where every target must have a gradient."""
        if all(self._needed):
            return {}
        return {
            "missing_gradients": float(self._last),
            "never_had_gradient": float(len(self._never)),
        }
