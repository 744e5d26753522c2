"""Weights that move through low-rank factors: Δ is pulled back onto them for the one formula.

With W = W₀ + Σ s·B·A the gradients of the factors are that of W pulled back, for every adapter
g̃ = (s·Bᵀ·g, s·g·Aᵀ). So Δ̃ = (s·Bᵀ·Δ, s·Δ·Aᵀ) is what Δ in the gradient of W would be in theirs. The
formula runs on these joint vectors, with one coefficient for each weight. Δ̃ changes whenever the
factors do, so each step computes it; it is as large as the factors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch

from drift_fast.inject.compute.base import Arithmetic, Sums, flat, flattened
from drift_fast.inject.compute.vectors import pick, put
from drift_fast.inject.lora.dora import Base
from drift_fast.inject.lora.pull_back import along, pull_back_all
from drift_fast.inject.lora.shard import FactorShard, add_up, bases, gather
from drift_fast.inject.target import Target
from drift_fast.inject.target_group import Bucket, Push, TargetGroup

# Elements of Δ̃ that are held at a time.
_ROOM = 1 << 24


class FactorGroup(TargetGroup):
    """Adapted weights on one device, each with all of its factors, whole or sharded.

    `norms` and progress are those of the weights along Δ, as in any group. What a step measures,
    `last`, is of the joint vectors: ‖g̃‖, ⟨g̃, Δ̃⟩ and ‖Δ̃‖.
    """

    def begin(self) -> None:
        super().begin()
        assert self.last is not None
        if self.last.delta is self.norms:
            self.last.delta = torch.empty_like(self.norms)
        # In place: a captured graph writes there.
        self.last.delta.zero_()

    def missing(self) -> list[int]:
        return [at for at in range(len(self.targets)) if self._factor_gradients(at) is None]

    def _shard(self, at: int) -> FactorShard:
        shard = self.shards[at]
        assert isinstance(shard, FactorShard)
        return shard

    def _factor_gradients(self, at: int) -> list[torch.Tensor] | None:
        """Return the gradients of a target's factors, None unless all are there and train."""
        return self._shard(at).gradients() if self.targets[at].trains else None

    def _holds_whole(self) -> bool:
        # What DoRA and experts read beside their factors has no address in `_beside`.
        shards = [self._shard(at) for at in range(len(self.shards))]
        plain = all(s.adapted.experts == 1 and not s.adapted.is_dora for s in shards)
        return plain and all(shard.is_whole for shard in shards)

    def _held(self, start: int, stop: int) -> dict[int, list[torch.Tensor]]:
        found = {at: self._factor_gradients(at) for at in range(start, stop)}
        return {at: gradients for at, gradients in found.items() if gradients is not None}

    def _beside(self, members: Sequence[int]) -> Hashable:
        factors = [one for at in members for one in self._shard(at).adapted.factors]
        return tuple((one.a.data_ptr(), one.b.data_ptr(), one.scaling) for one in factors)

    def _change(self, bucket: Bucket, held: Mapping[int, Sequence[torch.Tensor]]) -> None:
        for first, last in _runs(self.targets, bucket.start, bucket.stop):
            inside = {at: held[at] for at in range(first, last) if at in held}
            if inside:
                self._change_run(bucket.part(first, last), inside)

    def _change_run(self, bucket: Bucket, held: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """Change the gradients of targets that all have equally many factors."""
        members = list(held)
        shards = {at: self._shard(at) for at in members}
        some = pull_back_all(
            [bucket.delta(at) for at in members],
            [shard.adapted for shard in shards.values()],
            [shard.weights() for shard in shards.values()],
            [None] * len(members),
            [shard.base() for shard in shards.values()],
            bucket.arithmetic.spread,
        )
        pulled = [part for parts in some for part in parts]
        each = len(held[members[0]])
        with flattened([gradient for some in held.values() for gradient in some]) as flats:
            self._measure(members, flats, pulled, bucket.arithmetic)
            self._measure_pulled(members, pulled, bucket.arithmetic)
            c = self._decide(bucket.start, bucket.stop, members, bucket.push)
            c = pick(c, [at - bucket.start for at in members])
            bucket.arithmetic.subtract(flats, pulled, _for_each(c, each))
        for at, gradients in held.items():
            shards[at].write_gradients(gradients)

    def _measure(
        self,
        members: Sequence[int],
        flats: Sequence[torch.Tensor],
        pulled: Sequence[torch.Tensor],
        arithmetic: Arithmetic,
    ) -> None:
        """Note ‖g̃‖ and ⟨g̃, Δ̃⟩ of targets with equally many factors."""
        assert self.last is not None
        each = len(flats) // len(members)
        sums = arithmetic.measure(flats, pulled if self.last.angles else None)
        self._note(Sums(_joint(sums.norm, each), sums.dot.view(-1, each).sum(1)), members)

    def _measure_pulled(
        self, members: Sequence[int], pulled: Sequence[torch.Tensor], arithmetic: Arithmetic
    ) -> None:
        """Note ‖Δ̃‖ of targets with equally many factors."""
        assert self.last is not None
        norms = arithmetic.measure(pulled, None).norm
        put(self.last.delta, members, _joint(norms, len(pulled) // len(members)))

    # Where the factors are sharded.

    def _inject_sharded(self, push: Push, *, refused: bool) -> None:
        # Every process pulls its rows of every Δ back, whatever gradients it has.
        pulled = self._pulled_apart()
        found = {at: self._factor_gradients(at) for at in range(len(self.targets))}
        held = {at: gradients for at, gradients in found.items() if gradients is not None}
        runs = [range(*run) for run in _runs(self.targets, 0, len(self.targets))]
        for run in runs:
            self._measure_counted(run, held, pulled)
        self._add_up_measures(refused=refused)
        c = self._decide(0, len(self.targets), list(held), push)
        for run in runs:
            inside = [at for at in run if at in held]
            if not inside:
                continue
            with flattened([gradient for at in inside for gradient in held[at]]) as flats:
                parts = [part for at in inside for part in pulled[at]]
                each = len(flats) // len(inside)
                self.arithmetic.subtract(flats, parts, _for_each(pick(c, inside), each))
        for at, gradients in held.items():
            self._shard(at).write_gradients(gradients)

    def _pulled_apart(self) -> list[list[torch.Tensor]]:
        """Return this process's part of Δ̃ of every target, flat; every process must call it."""
        parts: list[list[torch.Tensor]] = []
        for shards, wholes, beside, deltas in self._chunks():
            adapted, rows = [s.adapted for s in shards], [s.rows for s in shards]
            pulled = pull_back_all(deltas, adapted, wholes, rows, beside)
            parts += add_up(shards, pulled, self.reduction)
        return parts

    def _measure_counted(
        self,
        run: range,
        held: Mapping[int, list[torch.Tensor]],
        pulled: Sequence[Sequence[torch.Tensor]],
    ) -> None:
        """Measure this process's parts, leaving out what is counted in another one."""

        def counted(at: int, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
            for part, counts in zip(parts, self._shard(at).counted, strict=True):
                yield flat(part) if counts else flat(part)[:0]

        inside = [at for at in run if at in held]
        ours = {at: list(counted(at, pulled[at])) for at in run}
        if inside:
            flats = [part for at in inside for part in counted(at, held[at])]
            those = [part for at in inside for part in ours[at]]
            self._measure(inside, flats, those, self.arithmetic)
        self._measure_pulled(run, [part for at in run for part in ours[at]], self.arithmetic)

    def _add_up_measures(self, *, refused: bool) -> None:
        """Make the measures those of whole factors, with one sum over the processes."""
        assert self.last is not None
        last, count = self.last, len(self.targets)
        norms = torch.cat([last.norm, last.delta])
        dots = torch.cat([last.dot, torch.zeros_like(last.dot)])
        sums = self._sum(Sums(norms, dots), refused=refused)
        last.norm, last.delta, last.dot = sums.norm[:count], sums.norm[count:], sums.dot[:count]

    def _chunks(
        self,
    ) -> Iterator[
        tuple[
            list[FactorShard],
            list[list[torch.Tensor]],
            list[Base | None],
            Iterator[torch.Tensor],
        ]
    ]:
        """Yield runs of targets that are not too large together.

        Each is their shards, whole factors, the W₀ of DoRAs, and Δ.

        The runs do not depend on how much of Δ a process holds, so all processes gather the same
        factors at a time. The Δ of a run must be used up before the next one.
        """
        deltas = (delta for *_, some in self.store.batches() for delta in some)
        for first, last in _runs(self.targets, 0, len(self.targets)):
            shards = [self._shard(at) for at in range(first, last)]
            wholes = (
                gather(shards, self.reduction)
                if self.sharded
                else [shard.weights() for shard in shards]
            )
            beside = bases(shards, wholes, self.reduction)
            yield shards, wholes, beside, itertools.islice(deltas, last - first)
        # This lets the store free the last Δ.
        next(deltas, None)

    def _decide(self, start: int, stop: int, members: Sequence[int], push: Push) -> torch.Tensor:
        assert self.last is not None
        dot, length = self.last.dot[start:stop], self.last.delta[start:stop]
        # Where Δ̃ is zero it has no angle.
        dot.copy_(torch.where(length > 0, dot, torch.full_like(dot, torch.nan)))
        return super()._decide(start, stop, members, push)

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
        for shards, wholes, beside, deltas in self._chunks():
            pairs = [
                along(delta, shard.adapted, whole, shard.rows, base)
                for shard, whole, base, delta in zip(shards, wholes, beside, deltas, strict=True)
            ]
            left, right = zip(*pairs, strict=True)
            dots.append(self.arithmetic.measure(left, right, wide=wide).dot)
        dot = torch.cat(dots)
        return self._sum(Sums(torch.full_like(dot, torch.nan), dot))


def _for_each(c: torch.Tensor, each: int) -> torch.Tensor:
    """Return the coefficient of every factor, of targets with equally many."""
    return c.unsqueeze(1).expand(-1, each).reshape(-1)


def _runs(targets: Sequence[Target], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield runs of targets with equally many factors, which are not too large together."""
    first, numel = start, 0
    for at in range(start, stop):
        adapted = targets[at].adapted
        assert adapted is not None
        size = sum(math.prod(shape) for shape in adapted.shapes)
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
