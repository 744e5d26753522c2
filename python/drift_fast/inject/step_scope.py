"""The scope "step": inject once for each optimizer step, into gradients that are accumulated.

Owns the order of a step, and the refusal of gradients that cannot be injected into.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from drift_fast.errors import DriftError
from drift_fast.inject.compute.vectors import plain_arithmetic
from drift_fast.inject.missing import MissingAccount
from drift_fast.inject.overlap import Overlap
from drift_fast.inject.pushes import Pushes
from drift_fast.inject.refusals import frozen_since
from drift_fast.inject.scope import Scope
from drift_fast.inject.step_records import Push
from drift_fast.inject.target_group import TargetGroup
from drift_fast.inject.watchdog import TORN, Watchdog


class StepScope(Scope):
    """Runs when it is called, after the last backward pass and before clipping.

    missing: the account of targets without a gradient.
    overlap: inject gradients that are final while backward still runs; the step does the rest.
    """

    def __init__(
        self,
        groups: Sequence[TargetGroup],
        pushes: Pushes,
        watchdog: Watchdog,
        *,
        missing: MissingAccount,
        overlap: bool,
    ) -> None:
        super().__init__(groups, pushes, watchdog)
        self._targets = [target for group in groups for target in group.targets]
        self._missing = missing
        self.overlap = Overlap(groups, pushes) if overlap else None
        if self.overlap is not None:
            self.handles += self.overlap.handles

    @torch.no_grad()
    def step(self) -> None:
        self._refuse_twice()
        # What was injected inside backward has begun this step already.
        begun = None if self.overlap is None else self.overlap.join()
        try:
            missing, refusal = self._check_gradients()
            if refusal is not None and not any(group.sharded for group in self.groups):
                raise refusal
            pushes = self.pushes.begin() if begun is None else begun
            self.watchdog.begin(len(missing))
            try:
                self._inject(pushes, refused=refusal is not None)
            except BaseException:
                if any(group.changed for group in self.groups):
                    self.watchdog.tear()
                raise
        finally:
            for group in self.groups:
                group.finish()
            if self.overlap is not None:
                self.overlap.let_go()
        # Only now: processes wait for each other in the sum over all of them.
        if refusal is not None:
            raise refusal
        if any(group.refused for group in self.groups):
            raise DriftError("another process of this run refused its gradients, and says why")
        numbered = list(enumerate(self._targets))
        self.watchdog.note([t.parameter for at, t in numbered if at not in missing])
        self.watchdog.leave([t.parameter for at, t in numbered if at in missing])
        if self.overlap is not None:
            self.overlap.reset()
        self.pushes.finish()

    def before_use(self, optimizer: torch.optim.Optimizer) -> None:
        self.watchdog.check(optimizer)

    def take_back(self) -> None:
        """Note that the optimizer skipped its step, and discarded the gradients."""
        self.pushes.take_back()
        self.watchdog.forget()

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        if self.overlap is None:
            yield
            return
        with self.overlap.paused():
            yield

    def settle(self) -> None:
        if self.overlap is not None:
            self.overlap.settle()

    def restate(self) -> None:
        """Nothing is kept from one step to the next."""

    def close(self) -> None:
        if self.overlap is not None:
            self.overlap.close()
        self.overlap = None

    def _inject(self, pushes: list[Push], *, refused: bool) -> None:
        """Change all gradients; there are no pushes in a step in which α is zero."""
        if not pushes:
            return
        with plain_arithmetic(self.groups[0].device):
            for at, (group, push) in enumerate(zip(self.groups, pushes, strict=True)):
                if self.overlap is not None:
                    self.overlap.finish(at, push)
                else:
                    group.inject(push, refused=refused)
                self.watchdog.skip(group.skipped())
                group.capture()

    def _check_gradients(self) -> tuple[set[int], DriftError | None]:
        """Return which targets have no gradient, and the refusal of what cannot be injected.

        Every process of a sharded model must come to the sum over all of them, so nothing is
        raised here.
        """
        missing: set[int] = set()
        refusal: DriftError | None = None
        first = 0
        for group in self.groups:
            try:
                missing.update(first + at for at in group.missing())
            except DriftError as error:
                refusal = error
            first += len(group.targets)
        if refusal is not None:
            return missing, refusal
        changed = [
            f"{target.name} cannot be injected into: {why}"
            for target in self._targets
            if target.adapted is not None and (why := target.adapted.changed())
        ]
        if missing or changed:
            try:
                self.watchdog.check_present()
            except DriftError as error:
                return missing, error
        if changed:
            return missing, DriftError(changed[0])
        for target in (self._targets[at] for at in sorted(missing)):
            gradients = [p.grad for p in target.trained if p.grad is not None]
            if any(gradient.layout != torch.strided for gradient in gradients):
                return missing, DriftError(
                    f"the gradient of {target.name} is sparse, and Δ is dense: build its embedding "
                    "with sparse=False, or leave it out with modules=…"
                )
        if len(missing) == first:
            return missing, frozen_since(self._targets) or DriftError(
                "no target has a gradient, so nothing can be injected: call step() after backward "
                "and before zero_grad; an optimizer that steps inside backward cannot be used"
            )
        return missing, self._missing.see(set(range(first)) - missing, missing)

    def _refuse_twice(self) -> None:
        unused, added_to = self.watchdog.holds_unused(), self.watchdog.holds_injected_and_plain()
        if self.watchdog.torn and (unused or added_to):
            raise DriftError(f"step() was called again, and {TORN}")
        if unused:
            raise DriftError(
                "step() was called twice without a backward pass or an optimizer step between: "
                "call it once, when the gradient is fully accumulated, just before clipping"
            )
        if added_to:
            raise DriftError(
                "step() was called again after a backward pass added to a gradient that is "
                "injected already, so Δ would be in it twice: call step() once for each optimizer "
                "step, after the last micro-batch, or attach to a trainer after what splits its "
                "batches; where an optimizer step is left out, call zero_grad(); for optimizers "
                "that step at different times make an Injection each, with modules=…"
            )
