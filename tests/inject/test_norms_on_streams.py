"""Norms that several streams take are those of one launch, each at its own place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from drift_fast.inject.compute import device
from drift_fast.inject.compute.device import DeviceArithmetic


@pytest.mark.parametrize("count", [1, 3, 11])
def test_each_norm_is_at_the_place_of_its_tensor_however_streams_share_them(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    shares: list[int] = []

    def spread(members: Sequence[int]) -> Iterator[int]:
        # Streams end in any order.
        for member in reversed(members):
            shares.append(member)
            yield member

    arithmetic = DeviceArithmetic(torch.device("cpu"))
    monkeypatch.setattr(arithmetic, "_streams", [None] * 4)
    monkeypatch.setattr(arithmetic, "spread", spread)
    monkeypatch.setattr(device, "has_joint_norm", lambda tensor: True)
    monkeypatch.setattr(device, "CHUNK", 8)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(10 + at, generator=generator) for at in range(count)]
    # What has no elements has no norm, and shifts the others' places.
    tensors.insert(1, torch.empty(0))
    found = arithmetic.measure(tensors, None).norm
    expected = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    assert torch.allclose(found, expected, rtol=1e-6)
    assert shares == list(reversed(range(min(count, 4))))
