"""The projection on the span of some vectors, against numpy's QR in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drift_fast.inject.shards.reduction import Reduction
from drift_fast.protection.span import Found, blend, project, squares

ALONE = Reduction(())


def found_for(rows: torch.Tensor, delta: torch.Tensor) -> tuple[Found, torch.Tensor]:
    """Return what is found of one tensor, and P Δ."""
    vectors = list(rows.clone())
    grams = squares([vectors], ALONE)
    (found,) = project([vectors], grams, lambda _: delta, ALONE)
    return found, blend(vectors, found.coefficients)


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_what_is_close_to_dependent_is_as_accurate_as_the_rest() -> None:
    """In G·Gᵀ alone the second direction would be lost in its fifth digit."""
    first, second, delta = (random(1000, seed=seed) for seed in (1, 2, 3))
    rows = torch.stack([first, first + 5e-6 * second])
    found, part = found_for(rows, delta + 10 * second)
    basis, _ = np.linalg.qr(rows.numpy().T)
    whole = (delta + 10 * second).numpy()
    expected = basis @ (basis.T @ whole)
    assert found.rank == 2
    assert np.linalg.norm(part.numpy() - expected) < 1e-8 * np.linalg.norm(expected)
    assert found.delta_sq == pytest.approx(whole @ whole, rel=1e-12)
    assert found.share == pytest.approx(expected @ expected / (whole @ whole), rel=1e-8)


@pytest.mark.parametrize(
    ("rows", "rank"),
    [
        (torch.zeros(3, 5), 0),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0], [-2.0, -4.0]]), 1),
        (torch.tensor([[3.0], [1.0], [1e-30]]), 1),
        (torch.tensor([[1e30, 0.0], [0.0, 1e-30]]), 2),
        (torch.empty(3, 0), 0),
    ],
    ids=["zero", "dependent", "more than elements", "far apart in size", "no elements"],
)
def test_how_many_are_independent(rows: torch.Tensor, rank: int) -> None:
    delta = torch.arange(1.0, 1.0 + rows.shape[1])
    found, part = found_for(rows, delta)
    assert found.rank == rank
    if rank == rows.shape[1]:
        assert torch.allclose(part, delta, rtol=1e-6)
    if rank == 0:
        assert not part.any()
        assert found.share == 0.0


def test_a_delta_of_zero() -> None:
    found, part = found_for(random(2, 4, seed=1), torch.zeros(4))
    assert (found.rank, found.delta_sq, found.share) == (2, 0.0, 0.0)
    assert not part.any()
