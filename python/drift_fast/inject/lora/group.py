"""Weights that move through low-rank factors: Δ is pulled back onto them for the one formula.

With W = W₀ + Σ s·B·A the gradients of the factors are that of W pulled back, for every adapter
g̃ = (s·Bᵀ·g, s·g·Aᵀ). So Δ̃ = (s·Bᵀ·Δ, s·Δ·Aᵀ) is what Δ in the gradient of W would be in theirs. The
formula runs on these joint vectors, with one coefficient for each weight. Δ̃ changes whenever the
factors do, so each step computes it; it is as large as the factors.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch

from drift_fast.inject.compute.base import Arithmetic, Sums, flat, flattened
from drift_fast.inject.compute.vectors import pick, put
from drift_fast.inject.lora.exchange import Room, Run
from drift_fast.inject.lora.pull_back import along, multiplies_parts, pull_back_all
from drift_fast.inject.lora.shard import FactorShard
from drift_fast.inject.step_records import Bucket, Push
from drift_fast.inject.target import Target
from drift_fast.inject.target_group import TargetGroup

# Elements of Δ̃ that are held at a time.
_ROOM = 1 << 25


class FactorGroup(TargetGroup):
    """Adapted weights on one device, each with all of its factors, whole or sharded.

    `norms` and progress are those of the weights along Δ, as in any group. What a step measures,
    `last`, is of the joint vectors: ‖g̃‖, ⟨g̃, Δ̃⟩ and ‖Δ̃‖.
    """

    # The state of the factors whose Δ̃ is at hand before the step asks for it.
    _ahead: Hashable = None

    def begin(self) -> None:
        super().begin()
        assert self.last is not None
        if self.last.delta is self.norms:
            self.last.delta = torch.empty_like(self.norms)
        # In place: a captured graph writes there.
        self.last.delta.zero_()

    def release(self) -> None:
        super().release()
        self._runs.clear()

    def finish(self) -> None:
        super().finish()
        self._ahead = None

    @functools.cached_property
    def pulls_back_ahead(self) -> bool:
        """Whether Δ̃ may be computed beside backward: not where that takes float32 products.

        On a GPU torch's setting of their precision is one for all threads.
        """
        if self.device.type == "cpu":
            return True
        double = any(p.dtype == torch.float64 for some in self._read for p in some)
        narrow = self._is_plain and self.store.dtype == torch.bfloat16 and not double
        return narrow and multiplies_parts(self.device)

    def pull_back_ahead(self, now: Hashable, arithmetic: Arithmetic) -> None:
        """Compute Δ̃, which the next `inject` uses unless a factor is written to or moved before it.

        It takes memory as large as the factors in float32, and a little more. now: what
        `factors_now` says; writes through `.data`, which torch does not count, are not seen.
        """
        self._ahead = None
        self._pull_back(arithmetic)
        self._ahead = now

    def inject(self, push: Push, *, refused: bool = False) -> None:
        if self._ahead is not None and self._ahead != self.factors_now():
            self._ahead = None
        if refused or self._ahead is None:
            super().inject(push, refused=refused)
            return
        push = self._follow(push)
        for run in self._runs:
            pulled = [run.pulled[at][0] for at in run.targets]
            self._process(
                Bucket(run.targets.start, run.targets.stop, pulled, push, self.arithmetic)
            )

    def factors_now(self) -> Hashable:
        """Return what tells that no factor is replaced, written to or scaled otherwise."""
        members = range(len(self.targets))
        versions = tuple(p._version for at in members for p in self._read[at])
        return self._factors(members), versions

    def _pull_back(self, arithmetic: Arithmetic) -> None:
        """Write this process's part of every Δ̃, on the current stream."""
        launch = functools.partial(self._launch, arithmetic=arithmetic)
        for run, deltas in self._each_run():
            # Δ that stays may be multiplied together.
            some = list(deltas) if self.resident else deltas
            run.pull_back(some, launch)

    def _shard(self, at: int) -> FactorShard:
        shard = self.shards[at]
        assert isinstance(shard, FactorShard)
        return shard

    def _gradients(self, at: int) -> list[torch.Tensor] | None:
        return self._shard(at).gradients()

    def _write(self, at: int, gradients: Sequence[torch.Tensor]) -> None:
        self._shard(at).write_gradients(gradients)

    def _captures(self) -> bool:
        # What DoRA and experts read beside their factors has no address in `_beside`.
        whole = all(self._shard(at).is_whole for at in range(len(self.shards)))
        return self._is_plain and (self.sharded or whole)

    @property
    def _is_plain(self) -> bool:
        adapted = [self._shard(at).adapted for at in range(len(self.shards))]
        return all(one.experts == 1 and not one.is_dora for one in adapted)

    def _beside(self, members: Sequence[int]) -> Hashable:
        if self._ahead is not None:
            return tuple(run.generation for run in self._runs)
        return self._factors(members)

    def _factors(self, members: Sequence[int]) -> Hashable:
        """Return where the factors are, and what they are scaled by."""
        places = tuple(p.data_ptr() for at in members for p in self._read[at])
        factors = (one for at in members for one in self._shard(at).adapted.factors)
        return places, tuple(one.scaling for one in factors)

    @functools.cached_property
    def _read(self) -> list[tuple[torch.Tensor, ...]]:
        """The parameters that Δ̃ of each target takes."""
        adapted = [self._shard(at).adapted for at in range(len(self.shards))]
        return [(*one.parameters, *one.beside) for one in adapted]

    def _change(self, bucket: Bucket, held: Mapping[int, Sequence[torch.Tensor]]) -> None:
        for some in _ranges(self.targets, bucket.start, bucket.stop):
            inside = {at: held[at] for at in some if at in held}
            if inside:
                self._change_run(bucket.part(some.start, some.stop), inside)

    def _change_run(self, bucket: Bucket, held: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """Change the gradients of targets that all have equally many factors."""
        members = list(held)
        some = self._pulled_back(bucket, members)
        pulled = [part for parts in some for part in parts]
        each = len(held[members[0]])
        with flattened([gradient for some in held.values() for gradient in some]) as flats:
            self._measure(members, flats, pulled, bucket.arithmetic)
            self._measure_pulled(members, pulled, bucket.arithmetic)
            c = self._decide(bucket.start, bucket.stop, members, bucket.push)
            c = pick(c, [at - bucket.start for at in members])
            bucket.arithmetic.subtract(flats, pulled, _for_each(c, each))
        for at, gradients in held.items():
            self._write(at, gradients)

    def _pulled_back(self, bucket: Bucket, members: Sequence[int]) -> list[list[torch.Tensor]]:
        if self._ahead is not None:
            runs = {at: run for run in self._runs for at in run.targets}
            return [runs[at].pulled[at] for at in members]
        shards = [self._shard(at) for at in members]
        return pull_back_all(
            [bucket.delta(at) for at in members],
            [shard.adapted for shard in shards],
            [shard.weights() for shard in shards],
            [None] * len(members),
            [shard.base() for shard in shards],
        )

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
        self._pull_back(self.arithmetic)
        super()._inject_sharded(push, refused=refused)

    def _addresses(self, held: Mapping[int, Sequence[torch.Tensor]], push: Push) -> Hashable:
        moving = super()._addresses(held, push)
        if moving is None or not self.sharded:
            return moving
        return moving, tuple(run.generation for run in self._runs)

    def _measure_shards(self, held: Mapping[int, Sequence[torch.Tensor]], push: Push) -> None:
        # What is counted in another process is left out.
        def counted(at: int, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            pairs = zip(parts, self._shard(at).counted, strict=True)
            return [flat(part) if counts else flat(part)[:0] for part, counts in pairs]

        for run in self._runs:
            pulled = {at: counted(at, parts) for at, parts in run.pulled.items()}
            if inside := [at for at in pulled if at in held]:
                flats = [part for at in inside for part in counted(at, held[at])]
                those = [part for at in inside for part in pulled[at]]
                self._measure(inside, flats, those, self.arithmetic)
            every = [part for parts in pulled.values() for part in parts]
            self._measure_pulled(list(pulled), every, self.arithmetic)

    def _add_up_measures(self, *, refused: bool) -> None:
        assert self.last is not None
        last, count = self.last, len(self.targets)
        norms = torch.cat([last.norm, last.delta])
        dots = torch.cat([last.dot, torch.zeros_like(last.dot)])
        sums = self._sum(Sums(norms, dots), refused=refused)
        last.norm.copy_(sums.norm[:count])
        last.delta.copy_(sums.norm[count:])
        last.dot.copy_(sums.dot[:count])

    def _subtract_shards(self, held: Mapping[int, Sequence[torch.Tensor]], push: Push) -> None:
        c = self._decide(0, len(self.targets), list(held), push)
        for run in self._runs:
            inside = {at: parts for at, parts in run.pulled.items() if at in held}
            if not inside:
                continue
            with flattened([gradient for at in inside for gradient in held[at]]) as flats:
                parts = [part for some in inside.values() for part in some]
                each = len(flats) // len(inside)
                self.arithmetic.subtract(flats, parts, _for_each(pick(c, list(inside)), each))

    @functools.cached_property
    def _runs(self) -> list[Run]:
        """All targets, in runs that are not too large together.

        They do not depend on how much of Δ a process holds, so all processes gather the same
        factors at a time.
        """
        ranges = list(_ranges(self.targets, 0, len(self.targets)))
        largest = max(sum(_numel(self.targets[at]) for at in some) for some in ranges)
        room = Room(largest, self.device)
        shards = [self._shard(at) for at in range(len(self.targets))]
        return [Run(r.start, shards[r.start : r.stop], self.reduction, room) for r in ranges]

    def _each_run(self) -> Iterator[tuple[Run, Iterator[torch.Tensor]]]:
        """Yield runs of targets with their Δ, which must be used up before the next one."""
        deltas = (delta for *_, some in self.store.batches() for delta in some)
        for run in self._runs:
            yield run, itertools.islice(deltas, len(run.targets))
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

    def _along(self, *, wide: bool) -> torch.Tensor:
        """Return Σ s·⟨B·A, Δ⟩, the part of ⟨W, Δ⟩ that changes."""
        dots = []
        for run, deltas in self._each_run():
            wholes = run.factors(self._launch)
            beside = run.bases(wholes)
            shards = [self._shard(at) for at in run.targets]
            pairs = [
                along(delta, shard.adapted, whole, shard.rows, base)
                for shard, whole, base, delta in zip(shards, wholes, beside, deltas, strict=True)
            ]
            left, right = zip(*pairs, strict=True)
            dots.append(self._dots(left, right, wide=wide))
        return torch.cat(dots)


def _for_each(c: torch.Tensor, each: int) -> torch.Tensor:
    """Return the coefficient of every factor, of targets with equally many."""
    return c.unsqueeze(1).expand(-1, each).reshape(-1)


def _ranges(targets: Sequence[Target], start: int, stop: int) -> Iterator[range]:
    """Yield runs of targets with equally many factors, which are not too large together."""
    first, numel = start, 0
    for at in range(start, stop):
        size = _numel(targets[at])
        other = len(targets[at].trained) != len(targets[first].trained)
        if at > first and (other or numel + size > _ROOM):
            yield range(first, at)
            first, numel = at, 0
        numel += size
    yield range(first, stop)


def _numel(target: Target) -> int:
    """Return how many elements a target's factors have."""
    assert target.adapted is not None
    return sum(math.prod(shape) for shape in target.adapted.shapes)


def _joint(norms: torch.Tensor, each: int) -> torch.Tensor:
    """Return the norm of every `each` tensors together, scaled so that no square overflows."""
    table = norms.view(-1, each)
    largest = table.amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    joint: torch.Tensor = torch.linalg.vector_norm(table / largest, dim=1, keepdim=True)
    return (largest * joint).view(-1)
