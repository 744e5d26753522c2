"""Tensors that lie at equal distances in one memory, and vectors of one number for each of them."""

from __future__ import annotations

import torch

from drift_fast.inject.compute.device import DeviceArithmetic
from drift_fast.inject.compute.spaced import spaced
from drift_fast.inject.compute.vectors import pick, put


def test_runs_end_where_the_distance_or_the_memory_changes() -> None:
    memory, other = torch.arange(40.0), torch.arange(40.0)
    cuts = [memory[at : at + 4] for at in (0, 5, 10, 20, 30, 26, 27)] + [
        other[at : at + 4] for at in (0, 4)
    ]
    found = list(spaced(cuts))
    assert [list(run) for run, _ in found] == [[0, 1, 2], [3, 4], [5], [6], [7, 8]]
    for run, together in found:
        assert torch.equal(together, torch.stack([cuts[at] for at in run]))
        assert together.untyped_storage().data_ptr() == cuts[run[0]].untyped_storage().data_ptr()


def test_numbers_go_to_members_in_their_order() -> None:
    for members in ([1, 2, 3], [2, 1, 3], [0, 2, 3], [3, 2, 1]):
        vector, values = torch.zeros(5), torch.tensor([1.0, 2.0, 3.0])
        put(vector, members, values)
        assert vector[members].tolist() == values.tolist()
        assert pick(vector, members).tolist() == values.tolist()


def test_rows_of_two_matrices_in_turn_are_measured_and_changed_each_by_its_own() -> None:
    torch.manual_seed(0)
    large, small = torch.randn(6, 50_000), torch.randn(6, 40_000)
    deltas = [row for pair in zip(large, small, strict=True) for row in pair]
    tensors = [torch.randn_like(delta) for delta in deltas]
    arithmetic = DeviceArithmetic(torch.device("cpu"))
    sums = arithmetic.measure(tensors, deltas)
    dots = [float(t.double() @ d.double()) for t, d in zip(tensors, deltas, strict=True)]
    norms = [float(t.double().norm()) for t in tensors]
    torch.testing.assert_close(sums.dot.double(), torch.tensor(dots).double(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(sums.norm.double(), torch.tensor(norms).double(), rtol=1e-5, atol=0)
    c = torch.arange(12.0)
    expected = [t - at * d for at, (t, d) in enumerate(zip(tensors, deltas, strict=True))]
    arithmetic.subtract(tensors, deltas, c)
    for one, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(one, other)
