"""What tests of deltas compare: bits, statistics, and one delta with another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from support.synthetic import Bits, Stored


def bits_of(tensor: torch.Tensor) -> Bits:
    """Return the bits of a tensor, flat."""
    kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return (
        tensor.reshape(-1)
        .view(kind)
        .numpy()
        .view({2: np.uint16, 4: np.uint32}[tensor.element_size()])
    )


def layer(number: int) -> str:
    return f"model.layers.{number}.self_attn.q_proj.weight"


def assert_same_bits(found: Bits, expected: Bits, a: Stored, b: Stored) -> None:
    wrong = np.flatnonzero(found != expected)
    if wrong.size:
        at = int(wrong[0])
        pytest.fail(
            f"{wrong.size} of {expected.size} differ, first at {at}: "
            f"{a.values[at]!r} - {b.values[at]!r} is {int(expected[at]):#x}, "
            f"found {int(found[at]):#x}"
        )


def assert_same_delta(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    assert found.dtype == expected.dtype
    assert found.names == expected.names
    for name in expected:
        assert torch.equal(found[name], expected[name])
        assert tuple(found.shapes[name]) == tuple(expected[name].shape)
    assert list(found.stats) == list(expected.stats)
    assert found.coverage.matched == expected.coverage.matched
    assert found.coverage.unmatched_multimodal == expected.coverage.unmatched_multimodal
    assert found.coverage.unmatched_reasoning == expected.coverage.unmatched_reasoning
    assert found.coverage.fraction == expected.coverage.fraction
