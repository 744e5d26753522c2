"""The part of Δ in the span of some vectors, tensor by tensor, in float64.

Owns the numerics. The vectors of a tensor are the rows of G [k, n], of which this process may hold
some columns. With a basis T [k, r] of what G·Gᵀ shows to be independent, Q = Tᵀ·G has nearly
orthonormal rows, and P Δ = Qᵀ·(Q·Qᵀ)⁻¹·Q·Δ. Taking Q·Qᵀ of Q itself, in a second pass, makes good
what G·Gᵀ lost where vectors are close to dependent. Sums over processes are of k × k numbers for
each tensor, all tensors at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from drift_fast.inject.shards.reduction import Reduction

# Vectors of length 1 that are closer to the span of others than this count as in it: sums of
# float32 gradients are not known any better.
_INDEPENDENT = 1e-6
# Elements in float64 at a time, over all vectors.
_PIECE = 1 << 23

Vectors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Found:
    """What was found of one tensor: how P Δ is made of the vectors, and what it takes away.

    `rank` is how many of the vectors are independent, `delta_sq` is ‖Δ‖², and `share` is
    ‖P Δ‖² / ‖Δ‖².
    """

    coefficients: torch.Tensor
    rank: int
    delta_sq: float
    share: float


def squares(vectors: Sequence[Vectors], reduction: Reduction) -> torch.Tensor:
    """Return G·Gᵀ of each tensor, [tensors, k, k] in float64 on the CPU, over all processes."""
    return reduction.sum(torch.stack([_gram(_pieces(one)) for one in vectors]))


def project(
    vectors: Sequence[Vectors],
    grams: torch.Tensor,
    read: Callable[[int], torch.Tensor],
    reduction: Reduction,
) -> list[Found]:
    """Return what of Δ is in the span of each tensor's vectors.

    grams: what `squares` returned, finite.
    read: returns this process's part of a tensor's Δ, flat, on the CPU; the tensor by its number.
    """
    bases = [_basis(gram) for gram in grams]
    size = grams.shape[1]
    # Beside Q·Qᵀ, Q·Δ in the last row and column, and ‖Δ‖².
    joint = torch.zeros(len(vectors), size + 1, size + 1, dtype=torch.float64)
    # A process that cannot read its Δ must not leave the others waiting for its sums.
    with reduction.together():
        for at, (one, basis) in enumerate(zip(vectors, bases, strict=True)):
            rank = basis.shape[1]
            joint[at, : rank + 1, : rank + 1] = _gram(_with_delta(one, basis, read(at)))
    joint = reduction.sum(joint)
    return [_found(one, basis) for one, basis in zip(joint, bases, strict=True)]


@torch.no_grad()
def blend(vectors: Vectors, coefficients: torch.Tensor) -> torch.Tensor:
    """Return Σ cⱼ·gⱼ, computed in float64 and rounded once, in the memory of the first vector."""
    weights = coefficients.to(_computing(vectors))
    for start, piece in _pieces(vectors):
        vectors[0][start : start + piece.shape[1]] = weights @ piece
    return vectors[0]


def _basis(gram: torch.Tensor) -> torch.Tensor:
    """Return T [k, r] for which the rows of Tᵀ·G are orthonormal, up to what G·Gᵀ can tell."""
    lengths = gram.diagonal().sqrt()
    scales = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    values, columns = torch.linalg.eigh(scales[:, None] * gram * scales)
    kept = values > _INDEPENDENT**2 * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
    basis: torch.Tensor = scales[:, None] * columns[:, kept] / values[kept].sqrt()
    return basis


def _found(joint: torch.Tensor, basis: torch.Tensor) -> Found:
    rank = basis.shape[1]
    along, total = joint[:rank, rank], float(joint[rank, rank])
    if not rank or not total:
        return Found(torch.zeros(len(basis), dtype=torch.float64), rank, total, 0.0)
    solved = torch.linalg.solve(joint[:rank, :rank], along)
    return Found(basis @ solved, rank, total, float(along @ solved) / total)


def _gram(pieces: Iterator[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Return the products of all rows, summed over the pieces, on the CPU."""
    _, first = next(pieces)
    total = first @ first.T
    for _, piece in pieces:
        total += piece @ piece.T
    return total.cpu()


def _with_delta(
    vectors: Vectors, basis: torch.Tensor, delta: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the rows of Q and, under them, Δ."""
    across = basis.T.to(_computing(vectors))
    for start, piece in _pieces(vectors):
        part = delta[start : start + piece.shape[1]].to(piece.device).to(torch.float64)
        yield start, torch.cat([across @ piece, part[None]])


@torch.no_grad()
def _pieces(vectors: Vectors) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the number of a first element and [k, elements] in float64, at least once."""
    device = _computing(vectors)
    step = max(1, _PIECE // (len(vectors) + 1))
    for start in range(0, max(1, vectors[0].numel()), step):
        parts = [one[start : start + step].to(device, torch.float64) for one in vectors]
        yield start, torch.stack(parts)


def _computing(vectors: Vectors) -> torch.device:
    """Return where the vectors are computed with: Metal has no float64."""
    device = vectors[0].device
    return torch.device("cpu") if device.type == "mps" else device
