"""Δ pulled back onto low-rank factors: products of Δ, by far the largest tensor, and thin ones.

A bfloat16 Δ is not widened on a GPU. A float32 factor is the sum of three bfloat16 ones, so its
product is the sum of theirs, which are exact but for their float32 sums. What takes time is reading
Δ, so three times the columns take less than twice as long.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from drift_fast.inject.lora import dora, experts
from drift_fast.inject.lora.adapters import Adapted, Factors
from drift_fast.inject.lora.precision import full_precision

logger = logging.getLogger(__name__)

# Bfloat16 tensors that hold all digits of a float32 factor. Two would save less than 1 % of a step,
# and be off by 3e-6 (benches/results/multi_gpu_lora_2xh200_202611.md).
_PARTS = 3
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
    spread: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> list[list[torch.Tensor]]:
    """Return `pull_back` of several weights, in fewer launches where bfloat16 is not widened.

    From an iterator each Δ is used up before the next one is asked for, on the caller's stream. A
    sequence of Δ is `spread` over streams, in the order of `spread`.
    """
    every = [weight for some in weights for weight in some]
    plain = all(one.experts == 1 and not one.is_dora for one in adapted)
    double = any(weight.dtype == torch.float64 for weight in every)
    if not plain or double or not _multiplies_parts(every[0].device):
        return [pull_back(*one) for one in zip(deltas, adapted, weights, rows, bases, strict=True)]
    stacks = iter(_in_parts(every))
    stacked = [[next(stacks) for _ in some] for some in weights]
    # What outlives the loop is allocated here, on the stream of the caller.
    found = [_room(one, run, every[0].device) for one, run in zip(adapted, rows, strict=True)]
    unscaled: list[int] = []
    order = spread(range(len(adapted))) if isinstance(deltas, Sequence) else range(len(adapted))
    for at in order:
        delta = deltas[at] if isinstance(deltas, Sequence) else next(deltas)
        if delta.dtype == torch.bfloat16:
            _multiply_into(found[at], delta, adapted[at], stacked[at], rows[at])
            unscaled.append(at)
            continue
        pulled = pull_back(delta, adapted[at], weights[at], rows[at])
        for out, part in zip(found[at].values(), pulled, strict=True):
            out.copy_(part.view(out.shape))
    outs = [out for at in unscaled for out in found[at].values()]
    scalings = [adapted[at].factors[k // 2].scaling for at in unscaled for k in found[at]]
    if outs:
        torch._foreach_mul_(outs, scalings)
    return [[out.view(-1) for out in some.values()] for some in found]


def _in_parts(factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return each factor as stacked bfloat16 tensors that add up to it: itself, or three."""
    if all(factor.dtype == torch.bfloat16 for factor in factors):
        return [factor.unsqueeze(0) for factor in factors]
    rest = torch.cat([factor.reshape(-1) for factor in factors])
    sizes = [factor.numel() for factor in factors]
    memory = rest.new_empty(_PARTS * rest.numel(), dtype=torch.bfloat16)
    stacks = [
        some.view(_PARTS, *factor.shape)
        for some, factor in zip(
            torch.split(memory, [_PARTS * n for n in sizes]), factors, strict=True
        )
    ]
    for at in range(_PARTS):
        low = rest.to(torch.bfloat16)
        torch._foreach_copy_(
            [stack[at].view(-1) for stack in stacks], list(torch.split(low, sizes))
        )
        rest = rest - low
    return stacks


def _as_columns(stack: torch.Tensor, *, of_a: bool) -> torch.Tensor:
    """Return the parts of a factor side by side, as [columns or rows of Δ, parts · rank]."""
    return stack.flatten(0, 1).mT if of_a else stack.movedim(0, 1).flatten(1)


def _room(
    adapted: Adapted, rows: tuple[int, int] | None, device: torch.device
) -> dict[int, torch.Tensor]:
    """Return memory for Δ̃ of each parameter that trains, by its place among all of them."""
    trained = {id(parameter) for parameter in adapted.trained}
    make = torch.empty if rows is None else torch.zeros
    return {
        at: make(adapted.shapes[at], dtype=torch.float32, device=device)
        for at, parameter in enumerate(adapted.parameters)
        if id(parameter) in trained
    }


def _multiply_into(
    found: dict[int, torch.Tensor],
    delta: torch.Tensor,
    adapted: Adapted,
    stacks: Sequence[torch.Tensor],
    rows: tuple[int, int] | None,
) -> None:
    """Write Δ̃/s of every trained factor, of a bfloat16 Δ that is not widened."""
    matrix = delta.view(-1, adapted.shape[-1])
    for is_b in (False, True):
        if not any(at % 2 == is_b for at in found):
            continue
        # Δ·Aᵀ belongs to B and Bᵀ·Δ to A; of a transposed weight the sides are exchanged.
        onto_rows = is_b != adapted.transposed
        beside = [_as_columns(stack, of_a=is_b) for stack in stacks[not is_b :: 2]]
        factor = beside[0] if len(beside) == 1 else torch.cat(beside, 1)
        if rows is not None and not onto_rows:
            factor = factor[slice(*rows)]
        left = matrix if onto_rows else matrix.mT
        product = torch.mm(left, factor, out_dtype=torch.float32)
        each = torch.split(product, [one.shape[1] for one in beside], 1)
        for at, (one, parts) in enumerate(zip(adapted.factors, each, strict=True)):
            if (place := 2 * at + is_b) in found:
                out = found[place] if is_b else found[place].mT
                if rows is not None and onto_rows:
                    out = out[slice(*rows)]
                count = parts.shape[1] // one.rank
                torch.sum(parts.view(len(parts), count, one.rank), 1, out=out)


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
    if matrix.dtype == torch.bfloat16 and not double and _multiplies_parts(matrix.device):
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
    (stack,) = _in_parts([factor])
    product = torch.mm(matrix, _as_columns(stack, of_a=False), out_dtype=torch.float32)
    return product.view(len(product), len(stack), factor.shape[1]).sum(1)


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
