"""Δ pulled back onto a DoRA: its factors, and the magnitude of each row.

A layer computes with W = diag(m/n)·V, where V = W₀ + s·B·A and n holds the norms of V's rows, which
PEFT takes as constants in backward (section 4.3 of the paper, arXiv 2402.09353). So with k = m/n

    Δ̃_A = s·Bᵀ·diag(k)·Δ    Δ̃_B = s·diag(k)·Δ·Aᵀ    Δ̃_m = (row sums of Δ∘V)/n

and ⟨W, Δ⟩ = ⟨m, Δ̃_m⟩. V is as large as Δ and is made in blocks of rows, as PEFT does in each pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from drift_fast.inject.lora.adapters import Adapted
from drift_fast.inject.lora.precision import full_precision

# Elements of Δ, and of V, that are widened at a time.
_BLOCK = 1 << 24


def pull_back(
    delta: torch.Tensor,
    adapted: Adapted,
    weights: Sequence[torch.Tensor],
    rows: tuple[int, int] | None,
) -> list[torch.Tensor]:
    """Return Δ̃ of every trained parameter, as `lora.pull_back.pull_back` does."""
    return adapted.of_trained(_parts(delta, adapted, weights, rows))


def along(
    delta: torch.Tensor,
    adapted: Adapted,
    weights: Sequence[torch.Tensor],
    rows: tuple[int, int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two flat tensors whose dot product is ⟨W, Δ⟩, over the given rows of Δ."""
    *_, onto_m = _parts(delta, adapted, weights, rows)
    return weights[2].to(onto_m.dtype), onto_m


def _parts(
    delta: torch.Tensor,
    adapted: Adapted,
    weights: Sequence[torch.Tensor],
    rows: tuple[int, int] | None,
) -> list[torch.Tensor]:
    """Return what rows [start, stop) of Δ add to Δ̃ of A, B and m."""
    dtype = functools.reduce(torch.promote_types, (w.dtype for w in weights), torch.float32)
    a, b, m = (weight.to(dtype) for weight in weights)
    height, width = adapted.shape
    start, stop = (0, height) if rows is None else rows
    (one,) = adapted.factors
    base, matrix = adapted.base(), delta.view(-1, width)
    parts = [torch.zeros_like(weight) for weight in (a, b, m)]
    onto_a, onto_b, onto_m = parts
    step = max(1, _BLOCK // width)
    with full_precision(delta.device):
        for first in range(start, stop, step):
            some = slice(first, min(first + step, stop))
            part = matrix[some.start - start : some.stop - start].to(dtype)
            v = torch.addmm(base[some].to(dtype), b[some], a, alpha=one.scaling)
            norms = torch.linalg.vector_norm(v, dim=1)
            k = (one.scaling * m[some] / norms).unsqueeze(1)
            onto_a.addmm_((k * b[some]).mT, part)
            onto_b[some] = k * (part @ a.mT)
            onto_m[some] = (part * v).sum(1) / norms
    return parts
