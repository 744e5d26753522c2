"""The scope "step": inject once for each optimizer step, into gradients that are accumulated.

Owns the order of a step, and the refusal of gradients that cannot be injected into.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence

import torch

from drift_fast.errors import DriftError
from drift_fast.inject.compute.vectors import plain_arithmetic
from drift_fast.inject.overlap import Overlap
from drift_fast.inject.pushes import Pushes
from drift_fast.inject.scope import Scope
from drift_fast.inject.target_group import Push, TargetGroup
from drift_fast.inject.watchdog import Watchdog


class StepScope(Scope):
    """Runs when it is called, after the last backward pass and before clipping.

    strict: refuse a target without a gradient.
    overlap: inject gradients that are final while backward still runs; the step does the rest.
    may_repeat: whether the optimizer may skip a step, after which the next call finds gradients
        that were injected already.
    """

    def __init__(
        self,
        groups: Sequence[TargetGroup],
        pushes: Pushes,
        watchdog: Watchdog,
        *,
        strict: bool,
        overlap: bool,
        may_repeat: bool,
    ) -> None:
        super().__init__(groups, pushes, watchdog)
        self._targets = [target for group in groups for target in group.targets]
        self._strict = strict
        self._may_repeat = may_repeat
        self._pending: weakref.ref[torch.Tensor] | None = None
        self.overlap = Overlap(groups, pushes.begin) if overlap else None
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
            present = [t.parameter for t in self._targets if t.name not in missing]
            pushes = self.pushes.begin() if begun is None else begun
            self.watchdog.begin(len(missing))
            self._inject(pushes)
        finally:
            for group in self.groups:
                group.finish()
            if self.overlap is not None:
                self.overlap.let_go()
        if refusal is not None:
            # Only now: the other processes wait for this one in the sum over all of them.
            raise refusal
        self.watchdog.note(present)
        if self.overlap is not None:
            self.overlap.reset()
        self.pushes.finish()
        # One gradient represents all: the next backward after zero_grad makes another tensor.
        self._pending = self._any_gradient()

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.watchdog.check(optimizer):
            self.optimizer_has_stepped()

    def optimizer_has_stepped(self) -> None:
        """Note that the injected gradients were used; some optimizers keep and zero them."""
        self._pending = None

    def take_back(self) -> None:
        """Note that the optimizer skipped its step, and discarded the gradients."""
        self.pushes.take_back()
        self.watchdog.begin(0)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        if self.overlap is None:
            yield
            return
        with self.overlap.paused():
            yield

    def restate(self) -> None:
        """Nothing is kept from one step to the next."""

    def close(self) -> None:
        if self.overlap is not None:
            self.overlap.close()
        self.overlap = None

    def _inject(self, pushes: list[Push]) -> None:
        """Change all gradients; there are no pushes in a step in which α is zero."""
        if not pushes:
            return
        with plain_arithmetic(self.groups[0].device):
            for at, (group, push) in enumerate(zip(self.groups, pushes, strict=True)):
                if self.overlap is not None:
                    self.overlap.finish(at, push)
                else:
                    group.inject(push)
                self.watchdog.skip(group.skipped())
                group.capture()

    def _check_gradients(self) -> tuple[set[str], DriftError | None]:
        """Return the targets that have no gradient, and the refusal of what cannot be injected."""
        missing = [group.targets[at].name for group in self.groups for at in group.missing()]
        refusal = None
        if len(missing) == len(self._targets):
            refusal = DriftError(
                "no target has a gradient, so nothing can be injected: call step() after backward "
                "and before zero_grad; an optimizer that steps inside backward cannot be used"
            )
        elif missing and self._strict:
            refusal = DriftError(
                f"{len(missing)} of {len(self._targets)} targets have no gradient, {missing[0]} "
                "first: they took no part in the loss. Leave them out with modules=… or layers=…, "
                "or pass strict=False to skip and count them"
            )
        for target in self._targets:
            gradients = [p.grad for p in target.trained if p.grad is not None]
            if any(gradient.layout != torch.strided for gradient in gradients):
                raise DriftError(f"the gradient of {target.name} is sparse, which is not supported")
        return set(missing), refusal

    def _refuse_twice(self) -> None:
        pending = self._pending() if self._pending is not None else None
        # Gradients that zero_grad did not keep are not the ones that were injected.
        if pending is None or self._may_repeat or self.watchdog.skipped_if_known():
            return
        if any(pending is target.parameter.grad for target in self._targets):
            raise DriftError(
                "step() was called twice without an optimizer step between: call it once, when the "
                "gradient is fully accumulated, just before clipping"
            )

    def _any_gradient(self) -> weakref.ref[torch.Tensor] | None:
        for target in self._targets:
            if target.parameter.grad is not None:
                return weakref.ref(target.parameter.grad)
        return None
