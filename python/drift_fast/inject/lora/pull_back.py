"""Δ pulled back onto low-rank factors: products of Δ, by far the largest tensor, and thin ones.

A bfloat16 Δ is not widened on a GPU. A float32 factor is the difference of two bfloat16 ones to 16
bits, so its product is that of theirs, which are exact but for their float32 sums. What takes time
is reading Δ, so twice the columns take little longer. Δ̃ is then off by some 1e-6, where the
rounding of Δ itself to bfloat16 is 2e-3; a third part would make an injection a fourth longer
(benches/results/multi_gpu_lora_2xh200_202611.md).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch

from drift_fast.inject.compute.spaced import spaced
from drift_fast.inject.lora import dora, experts
from drift_fast.inject.lora.adapters import Adapted, Factors
from drift_fast.inject.lora.precision import full_precision

logger = logging.getLogger(__name__)

# Elements of Δ that are widened at a time: within a CPU's caches, and enough to fill a GPU.
_BLOCK_ON_CPU, _BLOCK = 1 << 18, 1 << 24


def pull_back(
    delta: torch.Tensor,
    adapted: Adapted,
    weights: Sequence[torch.Tensor],
    rows: tuple[int, int] | None = None,
    base: dora.Base | None = None,
) -> list[torch.Tensor]:
    """Return Δ̃ of every trained factor, flat, in their order; at least float32.

    `delta` is flat, of any dtype, on the factors' device; `weights` are the whole `parameters` of
    `adapted`. Of Δ's rows [start, stop) alone the result is what they add to Δ̃; of a DoRA that of
    the elements of `base`.
    """
    if base is not None:
        return dora.pull_back(delta, adapted, weights, base)
    if adapted.experts > 1:
        return experts.pull_back(delta, adapted, weights, rows)
    trained = {id(parameter) for parameter in adapted.trained}
    a = any(id(one.a) in trained for one in adapted.factors)
    b = any(id(one.b) in trained for one in adapted.factors)
    asks_rows, asks_columns = (a, b) if adapted.transposed else (b, a)
    beside_rows, beside_columns = _stacked(adapted, weights)
    onto_rows, onto_columns = _products(
        delta.view(-1, adapted.shape[-1]),
        beside_rows if rows is None else beside_rows[slice(*rows)],
        beside_columns,
        onto_rows=asks_rows,
        onto_columns=asks_columns,
    )
    if rows is not None and asks_rows:
        whole = onto_rows.new_zeros(beside_rows.shape)
        whole[slice(*rows)] = onto_rows
        onto_rows = whole
    onto_a, onto_b = (onto_rows, onto_columns)[:: 1 if adapted.transposed else -1]
    parts = []
    for one, run in _adapters(adapted):
        for parameter, part in ((one.a, onto_a[:, run].mT), (one.b, onto_b[:, run])):
            if id(parameter) in trained:
                parts.append((part * one.scaling).contiguous().view(-1))
    return parts


def pull_back_all(
    deltas: Sequence[torch.Tensor] | Iterator[torch.Tensor],
    adapted: Sequence[Adapted],
    weights: Sequence[Sequence[torch.Tensor]],
    rows: Sequence[tuple[int, int] | None],
    bases: Sequence[dora.Base | None],
) -> list[list[torch.Tensor]]:
    """Return `pull_back` of several weights, in fewer launches where bfloat16 is not widened.

    Each Δ of an iterator is used up before the next one is asked for. Weights of a sequence that
    are alike, and whose Δ lie at equal distances in one memory, are multiplied in one launch.
    """
    every = [weight for some in weights for weight in some]
    plain = all(one.experts == 1 and not one.is_dora for one in adapted)
    double = any(weight.dtype == torch.float64 for weight in every)
    wide = isinstance(deltas, Sequence) and all(one.dtype != torch.bfloat16 for one in deltas)
    if not plain or double or wide or not multiplies_parts(every[0].device):
        return [pull_back(*one) for one in zip(deltas, adapted, weights, rows, bases, strict=True)]
    batches: list[list[int]] = [[at] for at in range(len(adapted))]
    each: Iterator[torch.Tensor]
    if isinstance(deltas, Sequence):
        found_alike = list(_alike(deltas, adapted, rows))
        batches = [members for members, _ in found_alike]
        each = (stacked for _, stacked in found_alike)
    else:
        each = (delta.unsqueeze(0) for delta in deltas)
    parts = iter(
        _in_parts([one for some in batches for one in _factors(some, adapted[some[0]], weights)])
    )
    found: list[list[torch.Tensor]] = [[] for _ in adapted]
    for some, delta in zip(batches, each, strict=True):
        one, run = adapted[some[0]], rows[some[0]]
        stacks = [next(parts) for _ in one.parameters]
        if delta.dtype == torch.bfloat16:
            pulled = _multiply(delta, one, stacks, run)
        else:
            pulled = [pull_back(delta[0], one, weights[some[0]], run)]
        for at, mine in zip(some, pulled, strict=True):
            found[at] = mine
    return found


def _alike(
    deltas: Sequence[torch.Tensor],
    adapted: Sequence[Adapted],
    rows: Sequence[tuple[int, int] | None],
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield numbers of weights whose products take one launch, with their Δ as one tensor."""
    kinds: dict[Hashable, list[int]] = {}
    for at, (delta, one, held) in enumerate(zip(deltas, adapted, rows, strict=True)):
        trained = {id(parameter) for parameter in one.trained}
        factors = tuple(
            (f.rank, f.scaling, id(f.a) in trained, id(f.b) in trained) for f in one.factors
        )
        apart = -1 if delta.dtype == torch.bfloat16 else at
        kind = (one.shape, one.transposed, factors, held, apart)
        kinds.setdefault(kind, []).append(at)
    for members in kinds.values():
        for run, stacked in spaced([deltas[at] for at in members]):
            yield [members[at] for at in run], stacked


class _Alike(NamedTuple):
    """Factors of one shape, what scales them, and the dimension that numbers their parts.

    1 gives [factors, parts, *shape], and 2 puts the parts behind the first dimension of the shape.
    """

    factors: Sequence[torch.Tensor]
    scaling: float
    place: int


def _factors(
    members: Sequence[int], adapted: Adapted, weights: Sequence[Sequence[torch.Tensor]]
) -> Iterator[_Alike]:
    """Yield A and B of each adapter of weights that are alike."""
    for which in range(len(weights[members[0]])):
        some = [weights[at][which] for at in members]
        yield _Alike(some, adapted.factors[which // 2].scaling, 1 + which % 2)


def _in_parts(alike: Sequence[_Alike]) -> list[torch.Tensor]:
    """Return each factor in bfloat16 parts: itself, or two whose difference is s times it."""
    if all(factor.dtype == torch.bfloat16 for some, *_ in alike for factor in some):
        return [torch.stack(list(some)).unsqueeze(place) for some, _, place in alike]
    wide = torch.cat([factor.reshape(-1) for some, *_ in alike for factor in some]).float()
    sizes = [len(some) * some[0].numel() for some, *_ in alike]
    stacks = []
    for (some, scaling, place), one in zip(alike, torch.split(wide, sizes), strict=True):
        shape = [len(some), *some[0].shape]
        one = one.view(shape)
        shape.insert(place, 2)
        stack = one.new_empty(shape, dtype=torch.bfloat16)
        rounded, beyond = stack.unbind(place)
        torch.sub(torch.mul(one, scaling, out=rounded), one, alpha=scaling, out=beyond)
        stacks.append(stack)
    return stacks


def _multiply(
    deltas: torch.Tensor,
    adapted: Adapted,
    stacks: Sequence[torch.Tensor],
    rows: tuple[int, int] | None,
) -> list[list[torch.Tensor]]:
    """Return Δ̃ of the trained factors of weights that are alike, of Δ that are not widened.

    deltas: bfloat16, [weights, elements]. stacks: their factors in parts, A and B in turn.
    """
    count, trained = len(deltas), {id(parameter) for parameter in adapted.trained}
    height = math.prod(adapted.shape[:-1]) if rows is None else rows[1] - rows[0]
    matrices = deltas.view(count, height, adapted.shape[-1])
    # As [weights, out, in], of which a transposed weight has some of `in` where others have of out.
    matrices = matrices.mT if adapted.transposed else matrices
    some, every = slice(None) if rows is None else slice(*rows), slice(None)
    inputs, outputs = (some, every) if adapted.transposed else (every, some)
    # The parts of each adapter side by side: [weights, in or out, parts · rank].
    a = [stack.flatten(1, 2).mT for stack in stacks[::2]]
    b = [stack.flatten(2) for stack in stacks[1::2]]
    widths = [one.shape[2] for one in a]
    onto_b = onto_a = [torch.empty(0)] * len(a)
    if any(id(one.b) in trained for one in adapted.factors):
        product = _wide_product(matrices, _joined(a)[:, inputs])
        onto_b = list(torch.split(product, widths, 2))
    if any(id(one.a) in trained for one in adapted.factors):
        product = _wide_product(_joined(b)[:, outputs].mT, matrices)
        onto_a = list(torch.split(product, widths, 1))
    found: list[list[torch.Tensor]] = [[] for _ in range(count)]
    shapes = iter(adapted.shapes)
    for one, *products in zip(adapted.factors, onto_a, onto_b, strict=True):
        for place, parameter, part in zip((1, 2), (one.a, one.b), products, strict=True):
            shape = next(shapes)
            if id(parameter) not in trained:
                continue
            whole = joined = _of_parts(part, place, one.rank, one.scaling)
            if rows is not None:
                whole = joined.new_zeros(count, *shape)
                (whole[..., inputs] if place == 1 else whole[:, outputs]).copy_(joined)
            for at, mine in enumerate(whole.view(count, -1)):
                found[at].append(mine)
    return found


def _joined(sides: Sequence[torch.Tensor]) -> torch.Tensor:
    return sides[0] if len(sides) == 1 else torch.cat(list(sides), 2)


def _of_parts(product: torch.Tensor, place: int, rank: int, scaling: float) -> torch.Tensor:
    """Return s times the product of a factor, from that of its parts.

    Dimension `place` of theirs is parts · rank.
    """
    if product.shape[place] == rank:
        return product.mul_(scaling).contiguous()
    rounded, beyond = torch.split(product, rank, place)
    return rounded - beyond


def _wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the float32 products of bfloat16 matrices, [matrices, rows, columns]."""
    if len(left) > 1:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.mm(left[0], right[0], out_dtype=torch.float32).unsqueeze(0)


def along(
    delta: torch.Tensor,
    adapted: Adapted,
    weights: Sequence[torch.Tensor],
    rows: tuple[int, int] | None = None,
    base: dora.Base | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two flat tensors whose dot product is Σ s·⟨B·A, Δ⟩, over the given rows of Δ.

    For a DoRA the product is ⟨W, Δ⟩; it too changes by as much as W moves along Δ.
    """
    if base is not None:
        return dora.along(delta, adapted, weights, base)
    if adapted.experts > 1:
        return experts.along(delta, adapted, weights, rows)
    beside_rows, beside_columns = _stacked(adapted, weights)
    if rows is not None:
        beside_rows = beside_rows[slice(*rows)]
    onto_rows, _ = _products(
        delta.view(-1, adapted.shape[-1]),
        beside_rows,
        beside_columns,
        onto_rows=True,
        onto_columns=False,
    )
    for one, run in _adapters(adapted):
        onto_rows[:, run] *= one.scaling
    return beside_rows.to(onto_rows.dtype).contiguous().view(-1), onto_rows.view(-1)


def _stacked(
    adapted: Adapted, weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of all adapters side by side, as [rows, ranks] and [columns, ranks]."""
    a, b = [one.mT for one in weights[::2]], list(weights[1::2])
    sides = (a, b) if adapted.transposed else (b, a)
    rows, columns = (side[0] if len(side) == 1 else torch.cat(side, 1) for side in sides)
    return rows, columns


def _adapters(adapted: Adapted) -> Iterator[tuple[Factors, slice]]:
    """Yield each adapter with where its ranks are among those of all."""
    start = 0
    for one in adapted.factors:
        yield one, slice(start, start + one.rank)
        start += one.rank


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
    if matrix.dtype == torch.bfloat16 and not double and multiplies_parts(matrix.device):
        return (
            _multiplied(matrix, columns) if onto_rows else empty,
            _multiplied(matrix.mT, rows) if onto_columns else empty,
        )
    rows, columns = rows.to(dtype), columns.to(dtype)
    first = empty.new_empty(rows.shape) if onto_rows else empty
    second = empty.new_zeros(columns.shape) if onto_columns else empty
    block = _BLOCK_ON_CPU if matrix.device.type == "cpu" else _BLOCK
    step = max(1, height if matrix.dtype == dtype else block // matrix.shape[1])
    with full_precision(matrix.device):
        for start in range(0, height, step):
            part = matrix[start : start + step].to(dtype)
            if onto_rows:
                first[start : start + step] = part @ columns
            if onto_columns:
                second.addmm_(part.mT, rows[start : start + step])
    return first, second


def _multiplied(matrix: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return matrix·factor in float32, of a bfloat16 matrix that is not widened."""
    (stack,) = _in_parts([_Alike([factor], 1.0, 2)])
    product = torch.mm(matrix, stack[0].flatten(1), out_dtype=torch.float32)
    return _of_parts(product, 1, factor.shape[1], 1.0)


@functools.cache
def multiplies_parts(device: torch.device) -> bool:
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
