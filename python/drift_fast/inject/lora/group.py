"""Weights that move through low-rank factors: Δ is pulled back onto them for the one formula.

With W = W₀ + Σ s·B·A the gradients of the factors are that of W pulled back, for every adapter
g̃ = (s·Bᵀ·g, s·g·Aᵀ). So Δ̃ = (s·Bᵀ·Δ, s·Δ·Aᵀ) is what Δ in the gradient of W would be in theirs. The
formula runs on these joint vectors, with one coefficient for each weight. Δ̃ changes whenever the
factors do, so each step computes it; it is as large as the factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from drift_fast.inject.compute.base import Sums, flattened
from drift_fast.inject.compute.vectors import pick, put
from drift_fast.inject.lora.adapters import Adapted
from drift_fast.inject.lora.pull_back import along, pull_back
from drift_fast.inject.target import Target
from drift_fast.inject.target_group import Bucket, Push, TargetGroup

# Elements of Δ̃ that are held at a time.
_ROOM = 1 << 24


class FactorGroup(TargetGroup):
    """Adapted weights on one device, each with all of its factors; none is sharded.

    `norms` and progress are those of the weights along Δ, as in any group. What a step measures,
    `last`, is of the joint vectors: ‖g̃‖, ⟨g̃, Δ̃⟩ and ‖Δ̃‖.
    """

    def begin(self) -> None:
        super().begin()
        assert self.last is not None
        self.last.delta = torch.zeros_like(self.norms)

    def missing(self) -> list[int]:
        return [at for at in range(len(self.targets)) if self._factor_gradients(at) is None]

    def _factor_gradients(self, at: int) -> list[torch.Tensor] | None:
        """Return the gradients of a target's factors, None unless all are there and train."""
        found = [p.grad if p.requires_grad else None for p in self.targets[at].trained]
        gradients = [gradient for gradient in found if gradient is not None]
        return gradients if len(gradients) == len(found) else None

    def _process(self, bucket: Bucket) -> None:
        for first, last in _runs(self.targets, bucket.start, bucket.stop):
            found = {at: self._factor_gradients(at) for at in range(first, last)}
            held = {at: gradients for at, gradients in found.items() if gradients is not None}
            if held:
                self._process_run(bucket.part(first, last), held)

    def _process_run(self, bucket: Bucket, held: dict[int, list[torch.Tensor]]) -> None:
        """Change the gradients of targets that all have equally many factors."""
        assert self.last is not None
        arithmetic, members = bucket.arithmetic, list(held)
        each = len(held[members[0]])
        pulled = [
            part for at in members for part in pull_back(bucket.delta(at), _adapted(self, at))
        ]
        with flattened([gradient for some in held.values() for gradient in some]) as flats:
            sums = arithmetic.measure(flats, pulled if self.last.angles else None)
            length = _joint(arithmetic.measure(pulled, None).norm, each)
            dot = sums.dot.view(-1, each).sum(1)
            # Where Δ̃ is zero it has no angle.
            dot = torch.where(length > 0, dot, torch.full_like(dot, torch.nan))
            self._note(Sums(_joint(sums.norm, each), dot), members)
            put(self.last.delta, members, length)
            c = self._decide(bucket.start, bucket.stop, members, bucket.push)
            c = pick(c, [at - bucket.start for at in members])
            of_factors = c.unsqueeze(1).expand(-1, each).reshape(-1)
            arithmetic.subtract(flats, pulled, of_factors)

    def _coefficients(
        self, sums: Sums, delta: torch.Tensor, run: slice, push: Push
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Factors that are all zero have no direction along Δ yet: no push, and no failure either.
        nothing = delta == 0
        c, finite = super()._coefficients(
            sums, torch.where(nothing, torch.ones_like(delta), delta), run, push
        )
        finite = torch.where(nothing, torch.isfinite(sums.norm), finite & torch.isfinite(delta))
        return torch.where(nothing | ~finite, torch.zeros_like(c), c), finite

    def _weights(self, *, wide: bool) -> Sums:
        """Return Σ s·⟨B·A, Δ⟩, the part of ⟨W, Δ⟩ that changes; ‖W‖ is not known."""
        dots = []
        for start, stop, deltas in self.store.batches():
            for first, last in _runs(self.targets, start, stop):
                pairs = [along(deltas[at - start], _adapted(self, at)) for at in range(first, last)]
                left, right = zip(*pairs, strict=True)
                dots.append(self.arithmetic.measure(left, right, wide=wide).dot)
        dot = torch.cat(dots)
        return Sums(torch.full_like(dot, torch.nan), dot)


def _adapted(group: TargetGroup, at: int) -> Adapted:
    adapted = group.targets[at].adapted
    assert adapted is not None
    return adapted


def _runs(targets: Sequence[Target], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield runs of targets with equally many factors, which are not too large together."""
    first, numel = start, 0
    for at in range(start, stop):
        size = sum(parameter.numel() for parameter in targets[at].trained)
        other = len(targets[at].trained) != len(targets[first].trained)
        if at > first and (other or numel + size > _ROOM):
            yield first, at
            first, numel = at, 0
        numel += size
    yield first, stop


def _joint(norms: torch.Tensor, each: int) -> torch.Tensor:
    """Return the norm of every `each` tensors together, scaled so that no square overflows."""
    table = norms.view(-1, each)
    largest = table.amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    joint: torch.Tensor = torch.linalg.vector_norm(table / largest, dim=1, keepdim=True)
    return (largest * joint).view(-1)
