"""The targets of one device and one way of sharding, with their Δ and where their weights started.

Owns one injection: measure, add up over processes, coefficient, subtract. A group's vectors are of
shape [targets], in the order of `targets`, which is the order in which backward finishes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from drift_fast.inject.compute.base import Arithmetic, Sums, flat, flattened
from drift_fast.inject.compute.cuda_graphs import CudaGraphs, Launch, may_capture
from drift_fast.inject.compute.vectors import pick, put
from drift_fast.inject.placement.stores import Resident, Store
from drift_fast.inject.shards.base import Shard, Whole
from drift_fast.inject.shards.reduction import Reduction
from drift_fast.inject.step_records import Bucket, Last, Push
from drift_fast.inject.strength.control import limit
from drift_fast.inject.strength.formula import NEED_DOT, coefficients
from drift_fast.inject.target import Target


class TargetGroup:
    """Whole or sharded parameters on one device.

    start: ⟨θ_0, Δ⟩ of this process's parts, where that was measured on loading.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        shards: Sequence[Shard],
        store: Store,
        norms: Sequence[float],
        arithmetic: Arithmetic,
        start: torch.Tensor | None = None,
    ) -> None:
        self.targets = list(targets)
        self.shards = list(shards)
        self.store = store
        self.arithmetic = arithmetic
        self.reduction = Reduction(shards[0].process_groups)
        self.norms = self.vector(norms)
        self.last: Last | None = None
        # Whether a process is known to have refused the last gradients.
        self.refused = False
        # What a step reads and counts stays in one place, whose address a captured graph holds.
        self._alpha = self.vector([0.0] * len(self.targets))
        self._loss_scale = torch.ones((), dtype=self._alpha.dtype, device=self.device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self._push: Push | None = None
        captures = self._captures() and self.device.type == "cuda"
        self._graphs = CudaGraphs(self.device) if captures else None
        self._found: dict[int, list[torch.Tensor]] | None = None
        # Whether this step has changed any gradient, or was about to.
        self.changed = False
        self._start, self._origin = start, torch.zeros(0)
        self._factor = self.vector([1.0] * len(self.targets))

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.arithmetic.device

    @property
    def sharded(self) -> bool:
        """Whether this process holds only a part of each target."""
        return bool(self.reduction.process_groups)

    @property
    def resident(self) -> bool:
        """Whether the Δ of every target is at hand at any time."""
        return isinstance(self.store, Resident)

    @property
    def _widest(self) -> torch.dtype:
        """The widest type of float that the device has."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def _captures(self) -> bool:
        """Whether what a step reads and writes stays in place, or has an address to compare."""
        return self.sharded or all(isinstance(shard, Whole) for shard in self.shards)

    def vector(self, values: Sequence[float]) -> torch.Tensor:
        """Return numbers on the host as a vector beside the gradients."""
        return torch.tensor(values, dtype=self.arithmetic.dtype, device=self.device)

    def start(self, *, rescale: bool) -> None:
        """Note ⟨θ_0, Δ⟩ and, if asked, ‖W‖/‖Δ‖; try out what a step will do."""
        dot = self._along(wide=True) if self._start is None else self._start
        norm = self._weight_norms() if rescale else torch.zeros_like(dot)
        sums = self._sum(Sums(norm, dot))
        self._start, self._origin = None, sums.dot
        if rescale:
            self._factor = (sums.norm / self.norms.to(sums.norm.dtype)).to(self.norms.dtype)
        self.store.fill_ahead()
        self.begin()

    def release(self) -> None:
        """Let go of Δ now."""
        if self._graphs is not None:
            self._graphs.clear()
        self.last = None
        self.store.release()

    # One step.

    def begin(self) -> None:
        """Start the account of a step."""
        if self.last is None:
            norm, dot, c = (torch.zeros_like(self.norms) for _ in range(3))
            self.last = Last(norm, dot, c, self.norms)
        for vector in (self.last.norm, self.last.dot, self.last.c, self._skipped):
            vector.zero_()
        self.last.alpha, self._push = None, None

    def rest(self) -> None:
        """Note that α is zero for all targets in this step, which then measures nothing."""
        assert self.last is not None
        self.last.alpha = self._alpha.zero_()

    def missing(self) -> list[int]:
        """Return the targets that are frozen or have no dense gradient, and keep the others'.

        Raises:
            DriftError: a gradient is not in the state that a step needs; none is kept.
        """
        self._found = {}
        self._found = self._look(0, len(self.targets))
        return [at for at in range(len(self.targets)) if at not in self._found]

    def inject(self, push: Push, *, refused: bool = False) -> None:
        """Measure and change every gradient; none where a process of a sharded group has refused.

        A process that refuses must call this too, since the others wait for it in a sum.
        """
        push = self._follow(push)
        if self.sharded:
            self._inject_sharded(push, refused=refused)
        elif not refused:
            for start, stop, deltas in self.store.batches():
                self._process(Bucket(start, stop, deltas, push, self.arithmetic))

    def finish(self) -> None:
        """Let go of this step's gradients, which zero_grad may be about to free."""
        self._found, self.changed = None, False
        if self._graphs is not None:
            self._graphs.drop_pending()

    def capture(self) -> None:
        """Capture what the next step can launch as one; this one's gradients are still there."""
        if self._graphs is not None and may_capture(self.device):
            self._graphs.capture()

    def inject_bucket(self, at: int, push: Push, arithmetic: Arithmetic | None = None) -> None:
        """Measure and change the gradients of one bucket, where nothing is sharded."""
        push = self._follow(push)
        with self.store.bucket(at) as deltas:
            start, stop = self.store.buckets[at]
            self._process(Bucket(start, stop, deltas, push, arithmetic or self.arithmetic))

    def inject_one(self, at: int, gradient: torch.Tensor, push: Push) -> Any:
        """Change a gradient that is not in its place yet; return whether it was skipped."""
        push = self._follow(push)
        assert isinstance(self.store, Resident)
        delta = [self.store.deltas[at]]
        one = slice(at, at + 1)
        with flattened([gradient]) as flats:
            sums = self.arithmetic.measure(flats, delta if push.scale in NEED_DOT else None)
            c, finite = self._coefficients(sums, self.norms[one], one, push)
            self.arithmetic.subtract(flats, delta, c)
        return (~finite).sum()

    def skipped(self) -> Any:
        """Return how many targets had no finite coefficient, an int or a device tensor."""
        return self._skipped.clone()

    def _follow(self, push: Push) -> Push:
        """Copy a step's push to where it is read from; all calls of one step give one object."""
        assert self.last is not None
        if self._push is not push:
            self._alpha.copy_(push.alpha)
            if isinstance(push.loss_scale, torch.Tensor):
                self._loss_scale.copy_(push.loss_scale)
            elif push.loss_scale is not None:
                self._loss_scale.fill_(push.loss_scale)
            self.last.alpha, self.last.angles = self._alpha, push.scale in NEED_DOT
            self._push = push
        loss_scale = None if push.loss_scale is None else self._loss_scale
        return Push(push.scale, self._alpha, loss_scale, push.max_push)

    def _process(self, bucket: Bucket) -> None:
        """Measure and change the gradients of a bucket, where nothing is sharded."""
        start, stop, arithmetic = bucket.start, bucket.stop, bucket.arithmetic
        held = self._held(start, stop)
        if not held:
            return
        self.changed = True
        deltas = [bucket.delta(at).data_ptr() for at in held]

        # Not the gradients themselves: those that zero_grad frees must not live on here.
        def addresses() -> Hashable:
            held = self._held(start, stop)
            moving = self._addresses(held, bucket.push)
            return None if moving is None else (moving, tuple(deltas), self._beside(list(held)))

        def change() -> None:
            self._change(bucket, self._held(start, stop))

        self._launch((start, stop, deltas[0], id(arithmetic)), addresses, change, arithmetic)

    def _launch(
        self,
        place: Hashable,
        addresses: Callable[[], Hashable],
        run: Callable[[], None],
        arithmetic: Arithmetic | None = None,
    ) -> None:
        """Launch kernels, as a CUDA graph once they were seen twice at the same addresses.

        place: names what they do. addresses: returns where they read and write, besides what
        never moves; None where something has no place of its own.
        """
        arithmetic = arithmetic or self.arithmetic
        if self._graphs is None or not may_capture(self.device) or (now := addresses()) is None:
            run()
            return
        generation = arithmetic.generation

        def capture() -> None:
            with arithmetic.on_capture_streams():
                run()

        def unmoved() -> bool:
            return arithmetic.generation == generation and addresses() == now

        launch = Launch(place, (generation, now), run, capture, unmoved, arithmetic.priority)
        self._graphs.launch(launch)

    def _addresses(self, held: Mapping[int, Sequence[torch.Tensor]], push: Push) -> Hashable:
        """Return where gradients are, with the numbers that a graph repeats."""
        gradients = [gradient for some in held.values() for gradient in some]
        # A transposed gradient is changed through a copy, which has no place of its own.
        if not all(map(torch.Tensor.is_contiguous, gradients)):
            return None
        return (
            tuple(held),
            tuple(map(torch.Tensor.data_ptr, gradients)),
            tuple(gradient.dtype for gradient in gradients),
            (push.scale, push.loss_scale is None, push.max_push),
        )

    def _held(self, start: int, stop: int) -> dict[int, list[torch.Tensor]]:
        """Return the gradients of targets [start, stop) that have any."""
        if self._found is None:
            return self._look(start, stop)
        return {at: self._found[at] for at in range(start, stop) if at in self._found}

    def _look(self, start: int, stop: int) -> dict[int, list[torch.Tensor]]:
        """Return the dense gradients of the targets that train and have all of theirs."""
        found = {}
        for at in range(start, stop):
            gradients = self._gradients(at) if self.targets[at].trains else None
            if gradients and all(map(_is_dense, gradients)):
                found[at] = gradients
        return found

    def _gradients(self, at: int) -> list[torch.Tensor] | None:
        """Return the gradients of what moves a target, None unless all are there."""
        gradient = self.shards[at].gradient()
        return None if gradient is None else [gradient]

    def _beside(self, members: Sequence[int]) -> Hashable:
        """Return what else a change reads, as addresses and as numbers that a graph repeats."""
        return ()

    def _change(self, bucket: Bucket, held: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """Measure and change gradients; what changes from step to step comes from vectors."""
        members = list(held)
        deltas = [bucket.delta(at) for at in members]
        with flattened([gradient for (gradient,) in held.values()]) as flats:
            scale, arithmetic = bucket.push.scale, bucket.arithmetic
            sums = arithmetic.measure(flats, deltas if scale in NEED_DOT else None)
            self._note(sums, members)
            c = self._decide(bucket.start, bucket.stop, members, bucket.push)
            arithmetic.subtract(flats, deltas, pick(c, [at - bucket.start for at in members]))
        for at, gradients in held.items():
            self._write(at, gradients)

    def _inject_sharded(self, push: Push, *, refused: bool) -> None:
        # Every process takes part in the sum, whatever gradients it has.
        held = self._held(0, len(self.targets))
        place = self._addresses(held, push) if self.resident else None
        self._launch("measure", lambda: place, lambda: self._measure_shards(held, push))
        self._add_up_measures(refused=refused)
        self.changed = True
        self._launch("subtract", lambda: place, lambda: self._subtract_shards(held, push))
        for at, gradients in held.items():
            self._write(at, gradients)

    def _measure_shards(self, held: Mapping[int, Sequence[torch.Tensor]], push: Push) -> None:
        """Note what this process finds in its shards."""
        with flattened([gradient for (gradient,) in held.values()]) as flats:
            if push.scale in NEED_DOT:
                for inside, tensors, deltas in self._batches(dict(zip(held, flats, strict=True))):
                    self._note(self.arithmetic.measure(tensors, deltas), inside)
            elif flats:
                self._note(self.arithmetic.measure(flats, None), list(held))

    def _add_up_measures(self, *, refused: bool) -> None:
        """Make the measures those of whole targets, with one sum over the processes."""
        assert self.last is not None
        sums = self._sum(Sums(self.last.norm, self.last.dot), refused=refused)
        self.last.norm.copy_(sums.norm)
        self.last.dot.copy_(sums.dot)

    def _subtract_shards(self, held: Mapping[int, Sequence[torch.Tensor]], push: Push) -> None:
        """Change this process's shards by what the measures of whole targets say."""
        c = self._decide(0, len(self.shards), list(held), push)
        with flattened([gradient for (gradient,) in held.values()]) as flats:
            for inside, tensors, deltas in self._batches(dict(zip(held, flats, strict=True))):
                self.arithmetic.subtract(tensors, deltas, pick(c, inside))

    def _write(self, at: int, gradients: Sequence[torch.Tensor]) -> None:
        """Give back the changed gradients of a target."""
        (gradient,) = gradients
        self.shards[at].write_gradient(gradient)

    def _batches(
        self, flats: Mapping[int, torch.Tensor]
    ) -> Iterator[tuple[list[int], list[torch.Tensor], list[torch.Tensor]]]:
        """Yield the targets of each batch of Δ that have gradients, these, and their Δ."""
        for start, stop, deltas in self.store.batches():
            inside = [at for at in flats if start <= at < stop]
            if inside:
                yield inside, [flats[at] for at in inside], [deltas[at - start] for at in inside]

    def _note(self, sums: Sums, members: Sequence[int]) -> None:
        assert self.last is not None
        put(self.last.norm, members, sums.norm)
        put(self.last.dot, members, sums.dot)

    def _decide(self, start: int, stop: int, members: Sequence[int], push: Push) -> torch.Tensor:
        """Return c of targets [start, stop), and count those of them that are left alone."""
        assert self.last is not None
        run = slice(start, stop)
        sums = Sums(self.last.norm[run], self.last.dot[run])
        c, finite = self._coefficients(sums, self.last.delta[run], run, push)
        self.last.c[run].copy_(c)
        self._skipped += (~pick(finite, [at - start for at in members])).sum()
        return c

    def _coefficients(
        self, sums: Sums, delta: torch.Tensor, run: slice, push: Push
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each target's c, zero where the gradient is not finite, and where it is."""
        factor = self._factor[run]
        if push.loss_scale is not None:
            factor = factor * push.loss_scale
        c = coefficients(push.scale, push.alpha[run], sums.norm, sums.dot, delta, factor)
        c = limit(c, sums.norm, delta, push.max_push)
        finite = torch.isfinite(sums.norm) & torch.isfinite(c)
        return torch.where(finite, c, torch.zeros_like(c)), finite

    def _sum(self, sums: Sums, *, refused: bool = False) -> Sums:
        """Add up over processes, squares of norms in float64, which has room for them."""
        if not self.sharded:
            return sums
        squares = sums.norm.double().square()
        if refused:
            # No square is negative, and the root of this is not finite: nobody injects.
            squares.fill_(-math.inf)
        total = self.reduction.sum(torch.cat([squares, sums.dot.double()]))
        norm, dot = total.chunk(2)
        # A device would have to be waited for.
        self.refused = total.device.type == "cpu" and bool((norm == -math.inf).any())
        return Sums(norm.sqrt().to(sums.norm.dtype), dot.to(sums.dot.dtype))

    # Where the weights are.

    def _along(self, *, wide: bool) -> torch.Tensor:
        """Return ⟨W, Δ⟩ of the part of each target that this process holds."""
        dots = []
        for start, stop, deltas in self.store.batches():
            weights = [flat(shard.weight()) for shard in self.shards[start:stop]]
            dots.append(self._dots(weights, deltas, wide=wide))
        return torch.cat(dots)

    def _dots(
        self, left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], *, wide: bool
    ) -> torch.Tensor:
        on = self.arithmetic
        return on.dots(left, right) if wide else on.measure(left, right).dot

    def _weight_norms(self) -> torch.Tensor:
        """Return ‖W‖ of the part of each target that this process holds."""
        norms = [self.arithmetic.measure([flat(one.weight())], None).norm for one in self.shards]
        return torch.cat(norms)

    def progress(self, *, wide: bool = True) -> torch.Tensor:
        """Return λ of each target on the device.

        Progress is a small difference of two large sums, hence float64 unless a step needs it.
        """
        dtype, dot = self._widest, self._along(wide=wide)
        moved = self._sum(Sums(torch.zeros_like(dot), dot)).dot.to(dtype) - self._origin.to(dtype)
        return moved / self.norms.to(dtype).square()

    @property
    def origin(self) -> list[float]:
        """⟨θ_0, Δ⟩ of each target."""
        values: list[float] = self._origin.tolist()
        return values

    @origin.setter
    def origin(self, values: Sequence[float]) -> None:
        self._origin = torch.tensor(values, dtype=self._origin.dtype, device=self.device)

    def last_norms(self) -> list[tuple[float, float]]:
        """Return ‖g‖ and ‖Δ‖ of each target as the last step measured them."""
        if self.last is None:
            return [(0.0, 0.0)] * len(self.targets)
        return list(zip(self.last.norm.tolist(), self.last.delta.tolist(), strict=True))

    def accumulated(self) -> list[tuple[torch.Tensor, ...]]:
        """Return the tensors into which autograd accumulates each target's gradient."""
        return [shard.accumulated for shard in self.shards]

    def squares(self) -> list[float]:
        """Return ‖Δ‖² of each target."""
        return [norm * norm for norm in self.norms.tolist()]


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided
