"""Δ pulled back onto a DoRA: its factors, and the magnitude of each row.

A layer computes with W = diag(m/n)·V, where V = W₀ + s·B·A and n holds the norms of V's rows, which
PEFT takes as constants in backward (section 4.3 of the paper, arXiv 2402.09353). So with k = m/n

    Δ̃_A = s·Bᵀ·diag(k)·Δ    Δ̃_B = s·diag(k)·Δ·Aᵀ    Δ̃_m = (row sums of Δ∘V)/n

and ⟨W, Δ⟩ = ⟨m, Δ̃_m⟩. V is as large as Δ and is made in blocks of rows, as PEFT does in each pass.
All of it is linear in Δ, so a process needs those elements of V that it holds of Δ; and n, of which
every process may hold a part.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from drift_fast.inject.lora.adapters import Adapted
from drift_fast.inject.lora.precision import full_precision

# Elements of Δ, and of V, that are widened at a time.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Base:
    """The elements of W₀, a run in row-major order, that a process holds, as it holds those of Δ.

    held: flat, of any dtype; the first is element `start` of W₀. norms: those of V's rows [out],
    where other processes may hold parts of these rows.
    """

    held: torch.Tensor
    start: int = 0
    norms: torch.Tensor | None = None

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + self.held.numel()


def pull_back(
    delta: torch.Tensor, adapted: Adapted, weights: Sequence[torch.Tensor], base: Base
) -> list[torch.Tensor]:
    """Return Δ̃ of every trained parameter, as `lora.pull_back.pull_back` does."""
    return adapted.of_trained(_parts(delta, adapted, weights, base))


def along(
    delta: torch.Tensor, adapted: Adapted, weights: Sequence[torch.Tensor], base: Base
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two flat tensors whose dot product is ⟨W, Δ⟩, over the elements of Δ that are held."""
    *_, onto_m = _parts(delta, adapted, weights, base)
    return weights[2].to(onto_m.dtype), onto_m


def squares(adapted: Adapted, weights: Sequence[torch.Tensor], base: Base) -> torch.Tensor:
    """Return what the held elements add to the square of n [out], at least float32."""
    a, b, m = _wide(weights)
    found = torch.zeros_like(m)
    with full_precision(a.device):
        for rows, v in _blocks(adapted, a, b, base):
            found[rows] = v.square().sum(1)
    return found


def _parts(
    delta: torch.Tensor, adapted: Adapted, weights: Sequence[torch.Tensor], base: Base
) -> list[torch.Tensor]:
    """Return what the held elements of Δ add to Δ̃ of A, B and m."""
    a, b, m = _wide(weights)
    (one,) = adapted.factors
    parts = [torch.zeros_like(weight) for weight in (a, b, m)]
    onto_a, onto_b, onto_m = parts
    flat = delta.view(-1)
    with full_precision(delta.device):
        for rows, v in _blocks(adapted, a, b, base):
            part = _rows(flat, base.start, rows, v.shape[1]).to(v)
            norms = torch.linalg.vector_norm(v, dim=1) if base.norms is None else base.norms[rows]
            k = (one.scaling * m[rows] / norms).unsqueeze(1)
            onto_a.addmm_((k * b[rows]).mT, part)
            onto_b[rows] = k * (part @ a.mT)
            onto_m[rows] = (part * v).sum(1) / norms
    return parts


def _wide(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    dtype = functools.reduce(torch.promote_types, (w.dtype for w in weights), torch.float32)
    return [weight.to(dtype) for weight in weights]


def _blocks(
    adapted: Adapted, a: torch.Tensor, b: torch.Tensor, base: Base
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the rows that are held, wholly or in part, with V there; zero where it is not held."""
    (one,) = adapted.factors
    width = adapted.shape[-1]
    stop, step = -(-base.stop // width), max(1, _BLOCK // width)
    for first in range(base.start // width, stop, step):
        rows = slice(first, min(first + step, stop))
        held = _rows(base.held, base.start, rows, width).to(a)
        v = torch.addmm(held, b[rows], a, alpha=one.scaling)
        before, after = _lacking(base.start, base.stop, rows, width)
        v.view(-1)[:before] = 0
        v.view(-1)[v.numel() - after :] = 0
        yield rows, v


def _rows(flat: torch.Tensor, start: int, rows: slice, width: int) -> torch.Tensor:
    """Return rows of a matrix whose elements from `start` on are given, zero outside of them."""
    before, after = _lacking(start, start + flat.numel(), rows, width)
    first, last = rows.start * width + before - start, rows.stop * width - after - start
    inside = flat[first:last]
    return (pad(inside, (before, after)) if before or after else inside).view(-1, width)


def _lacking(start: int, stop: int, rows: slice, width: int) -> tuple[int, int]:
    """Return how many elements of these rows lie before and after [start, stop)."""
    return max(start - rows.start * width, 0), max(rows.stop * width - stop, 0)
