"""Weights that move through low-rank factors: Δ is pulled back onto them for the one formula.

With W = W₀ + Σ s·B·A the gradients of the factors are that of W pulled back, for every adapter
g̃ = (s·Bᵀ·g, s·g·Aᵀ). So Δ̃ = (s·Bᵀ·Δ, s·Δ·Aᵀ) is what Δ in the gradient of W would be in theirs. The
formula runs on these joint vectors, with one coefficient for each weight. Δ̃ changes whenever the
factors do, so each step makes it anew; it is as large as the factors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from drift_fast.inject.compute.base import Arithmetic, Sums, flattened
from drift_fast.inject.lora.adapters import Adapted, Factors
from drift_fast.inject.target import Target
from drift_fast.inject.target_group import Push, TargetGroup, pick, put

logger = logging.getLogger(__name__)

# Elements of Δ that are widened at a time: within a CPU's caches, and enough to fill a GPU.
_BLOCK_ON_CPU, _BLOCK = 1 << 18, 1 << 24
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
        """Return the gradients of a target's factors, None unless all are there."""
        found = [parameter.grad for parameter in self.targets[at].trained]
        gradients = [gradient for gradient in found if gradient is not None]
        return gradients if len(gradients) == len(found) else None

    def _process(
        self,
        start: int,
        stop: int,
        deltas: Sequence[torch.Tensor],
        push: Push,
        arithmetic: Arithmetic,
    ) -> None:
        for first, last in _runs(self.targets, start, stop):
            held = {at: self._factor_gradients(at) for at in range(first, last)}
            some = {at: gradients for at, gradients in held.items() if gradients is not None}
            if some:
                own = {at: deltas[at - start] for at in some}
                self._process_run(first, last, some, own, push, arithmetic)

    def _process_run(
        self,
        start: int,
        stop: int,
        held: dict[int, list[torch.Tensor]],
        deltas: dict[int, torch.Tensor],
        push: Push,
        arithmetic: Arithmetic,
    ) -> None:
        """Change the gradients of targets [start, stop), which have equally many factors."""
        assert self.last is not None
        members = list(held)
        each = len(held[members[0]])
        pulled = [part for at in members for part in pull_back(deltas[at], _adapted(self, at))]
        with flattened([gradient for some in held.values() for gradient in some]) as flats:
            sums = arithmetic.measure(flats, pulled if self.last.angles else None)
            length = _joint(arithmetic.measure(pulled, None).norm, each)
            dot = sums.dot.view(-1, each).sum(1)
            # Where Δ̃ is zero it has no angle.
            dot = torch.where(length > 0, dot, torch.full_like(dot, torch.nan))
            self._note(Sums(_joint(sums.norm, each), dot), members)
            put(self.last.delta, members, length)
            c = pick(self._decide(start, stop, members, push), [at - start for at in members])
            of_factors = c.unsqueeze(1).expand(-1, each).reshape(-1)
            arithmetic.subtract(flats, pulled, of_factors)

    def _coefficients(
        self, sums: Sums, delta: torch.Tensor, run: slice, push: Push
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Factors that are all zero have no way along Δ yet: no push, and no failure either.
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
                pairs = [
                    _along(deltas[at - start], _adapted(self, at)) for at in range(first, last)
                ]
                left, right = zip(*pairs, strict=True)
                dots.append(self.arithmetic.measure(left, right, wide=wide).dot)
        dot = torch.cat(dots)
        return Sums(torch.full_like(dot, torch.nan), dot)


def pull_back(delta: torch.Tensor, adapted: Adapted) -> list[torch.Tensor]:
    """Return Δ̃ of every trained factor, flat, in their order; at least float32.

    `delta` is flat, of any dtype, on the factors' device.
    """
    trained = {id(parameter) for parameter in adapted.trained}
    a = any(id(one.a) in trained for one in adapted.factors)
    b = any(id(one.b) in trained for one in adapted.factors)
    rows, columns = _stacked(adapted)
    onto_rows, onto_columns = _products(
        delta.view(adapted.shape),
        rows,
        columns,
        onto_rows=a if adapted.transposed else b,
        onto_columns=b if adapted.transposed else a,
    )
    onto_a, onto_b = (onto_rows, onto_columns)[:: 1 if adapted.transposed else -1]
    parts = []
    for one, run in _adapters(adapted):
        for parameter, part in ((one.a, onto_a[:, run].mT), (one.b, onto_b[:, run])):
            if id(parameter) in trained:
                parts.append((part * one.scaling).contiguous().view(-1))
    return parts


def _along(delta: torch.Tensor, adapted: Adapted) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two flat tensors whose dot product is Σ s·⟨B·A, Δ⟩."""
    rows, columns = _stacked(adapted)
    onto_rows, _ = _products(
        delta.view(adapted.shape), rows, columns, onto_rows=True, onto_columns=False
    )
    for one, run in _adapters(adapted):
        onto_rows[:, run] *= one.scaling
    return rows.to(onto_rows.dtype).contiguous().view(-1), onto_rows.view(-1)


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


def _stacked(adapted: Adapted) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of all adapters side by side, as [rows, ranks] and [columns, ranks]."""
    a = [one.a.detach().mT for one in adapted.factors]
    b = [one.b.detach() for one in adapted.factors]
    sides = (a, b) if adapted.transposed else (b, a)
    rows, columns = (side[0] if len(side) == 1 else torch.cat(side, 1) for side in sides)
    return rows, columns


def _adapters(adapted: Adapted) -> Iterator[tuple[Factors, slice]]:
    """Yield each adapter with where its ranks are among those of all."""
    start = 0
    for one in adapted.factors:
        yield one, slice(start, start + len(one.a))
        start += len(one.a)


# Products with Δ, which is by far the largest tensor here.


def _products(
    matrix: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    *,
    onto_rows: bool,
    onto_columns: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return M·columns and Mᵀ·rows, in float32 or better; empty if not asked for."""
    double = torch.float64 in (rows.dtype, columns.dtype)
    dtype = torch.float64 if double else torch.float32
    height, ranks = rows.shape
    empty = torch.empty(0, ranks, dtype=dtype, device=matrix.device)
    if matrix.dtype == torch.bfloat16 and not double and _multiplies_parts(matrix.device):
        return (
            _multiplied(matrix, columns) if onto_rows else empty,
            _multiplied(matrix.mT, rows) if onto_columns else empty,
        )
    rows, columns = rows.to(dtype), columns.to(dtype)
    first = empty.new_empty(rows.shape) if onto_rows else empty
    second = empty.new_zeros(columns.shape) if onto_columns else empty
    block = _BLOCK_ON_CPU if matrix.device.type == "cpu" else _BLOCK
    step = height if matrix.dtype == dtype else max(1, block // matrix.shape[1])
    with _full_precision(matrix.device):
        for start in range(0, height, step):
            part = matrix[start : start + step].to(dtype)
            if onto_rows:
                first[start : start + step] = part @ columns
            if onto_columns:
                second.addmm_(part.mT, rows[start : start + step])
    return first, second


def _multiplied(matrix: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return matrix·factor in float32, of a bfloat16 matrix that is not widened.

    A float32 factor is the sum of three bfloat16 ones, so its product is the sum of theirs, which
    are exact but for their float32 sums; and a thin product costs no more with three times the
    columns, since what takes time is reading the matrix.
    """
    count = 1 if factor.dtype == torch.bfloat16 else 3
    height, ranks = factor.shape
    parts = torch.empty(height, count, ranks, dtype=torch.bfloat16, device=factor.device)
    rest = factor
    for at in range(count):
        parts[:, at] = rest
        if at + 1 < count:
            rest = rest - parts[:, at]
    product = torch.mm(matrix, parts.view(height, -1), out_dtype=torch.float32)
    return product.view(-1, count, ranks).sum(1)


@functools.cache
def _multiplies_parts(device: torch.device) -> bool:
    """Whether a bfloat16 product leaves this device's units in float32, tried once."""
    if device.type != "cuda":
        return False
    try:
        matrix = torch.full((8, 2048), 1.0, dtype=torch.bfloat16, device=device)
        # 2048·(1 + 2⁻¹⁸) has more bits than a bfloat16 or a TF32.
        factor = torch.full((2048, 8), 1 + 2**-18, device=device)
        product = _multiplied(matrix, factor)
        return bool((product - 2048 * (1 + 2**-18)).abs().max() <= 2048 * 2**-22)
    except (RuntimeError, TypeError) as error:
        logger.info("no wide product on %s, widening Δ instead: %s", device, error)
        return False


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Keep a float32 product from being rounded to TF32, whatever training has chosen."""
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.backends.cuda.matmul
    # Before torch 2.9 the setting has another name, and later the two must not be mixed.
    name, exact = ("fp32_precision", "ieee")
    if not hasattr(torch._C, "_get_fp32_precision_getter"):
        name, exact = "allow_tf32", False  # type: ignore[assignment]
    before = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)
