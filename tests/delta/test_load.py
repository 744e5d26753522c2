"""Many runs of Δ at once: the same bytes whatever the memory, and the bits of sums taken alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import drift_fast
from drift_fast import Delta
from drift_fast.delta.protocol import Run
from drift_fast.inject.compute.host import norm_of
from support.synthetic import refused, stored, write_file

NAMES = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(3)]
SHAPES = [(1031, 601), (3, 7), (700, 999)]


@pytest.fixture(scope="module", params=["bfloat16", "float32", "int8", "streamed"])
def delta(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Delta:
    folder = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(3)
    first, second = (
        write_file(
            folder / f"{side}.safetensors",
            {n: stored(rng.normal(0, 1, s)) for n, s in zip(NAMES, SHAPES, strict=True)},
        )
        for side in "ab"
    )
    if request.param == "streamed":
        return drift_fast.compute_delta(first, second, check_weights=False)
    out = folder / "delta"
    return drift_fast.compute_delta(first, second, out, dtype=request.param, check_weights=False)


def runs_of(delta: Delta) -> list[Run]:
    """Whole tensors, runs that begin and end anywhere, and none at all."""
    whole = [Run(name, 0, math.prod(delta.shapes[name])) for name in delta]
    return [
        *whole,
        *(Run(run.name, run.stop // 7, run.stop - run.stop // 11) for run in whole),
        Run(NAMES[0], 65, 65),
        Run(NAMES[0], 262_145, 262_147),
        Run(NAMES[2], 63, 600_001),
    ]


def through_a_ring(delta: Delta, runs: list[Run], nbytes: int) -> tuple[list[torch.Tensor], int]:
    """Return what came through a ring, and in how many calls."""
    dtype = getattr(torch, delta.dtype)
    ring = torch.empty(nbytes, dtype=torch.uint8)
    found = [torch.empty(run.stop - run.start, dtype=dtype) for run in runs]
    calls = 0

    def landed(parts: list[tuple[int, int, int, int]]) -> int:
        nonlocal calls
        for number, start, stop, offset in parts:
            nbytes = (stop - start) * dtype.itemsize
            found[number][start:stop] = ring[offset : offset + nbytes].view(dtype)
        calls += 1
        # Of the newest call the memory is not given back yet.
        return calls - 1

    delta.load(runs, ring, landed)
    return found, calls


def test_runs_are_those_of_the_tensors_with_the_bits_of_their_norms(delta: Delta) -> None:
    runs = runs_of(delta)
    flat = {name: tensor.reshape(-1) for name, tensor in delta.items()}
    dtype = getattr(torch, delta.dtype)
    into = [torch.full((run.stop - run.start,), 9.0, dtype=dtype) for run in runs]
    squares = delta.load(runs, into)
    for run, found, square in zip(runs, into, squares, strict=True):
        expected = flat[run.name][run.start : run.stop]
        assert torch.equal(found, expected), run
        assert square**0.5 == norm_of(expected), run


@pytest.mark.parametrize("nbytes", [1 << 20, 5 << 20])
def test_a_ring_brings_the_same(delta: Delta, nbytes: int) -> None:
    runs = runs_of(delta)
    dtype = getattr(torch, delta.dtype)
    into = [torch.empty(run.stop - run.start, dtype=dtype) for run in runs]
    squares = delta.load(runs, into)
    found, calls = through_a_ring(delta, runs, nbytes)
    assert calls > 1
    for one, other in zip(found, into, strict=True):
        assert torch.equal(one, other)
    assert delta.load(runs, torch.empty(nbytes, dtype=torch.uint8)) == squares


def test_what_the_caller_raises_ends_it(delta: Delta) -> None:
    def landed(parts: object) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        delta.load(runs_of(delta), torch.empty(1 << 20, dtype=torch.uint8), landed)


def test_memory_of_another_size_and_elements_that_are_not_there_are_refused(delta: Delta) -> None:
    run = Run(NAMES[1], 0, 21)
    with refused(ValueError, "memory to load into"):
        delta.load([run], [torch.empty(20, dtype=getattr(torch, delta.dtype))])
    with refused(ValueError, "memory to load into"):
        delta.load([run], torch.empty(16, dtype=torch.uint8))
    with refused(ValueError, NAMES[1], "21 elements"):
        delta.load([run._replace(stop=22)], torch.empty(1 << 20, dtype=torch.uint8))


def test_a_value_that_is_not_finite_makes_the_square_nan(tmp_path: Path) -> None:
    values = np.zeros(SHAPES[0])
    values[1000, 600] = math.inf
    first = write_file(tmp_path / "a.safetensors", {NAMES[0]: stored(values)})
    second = write_file(tmp_path / "b.safetensors", {NAMES[0]: stored(np.ones(SHAPES[0]))})
    delta = drift_fast.compute_delta(
        first, second, tmp_path / "delta", check_weights=False, allow_nonfinite=True
    )
    numel = values.size
    runs = [Run(NAMES[0], 0, numel), Run(NAMES[0], 0, numel // 2)]
    squares = delta.load(runs, torch.empty(1 << 20, dtype=torch.uint8))
    assert math.isnan(squares[0])
    assert squares[1] == numel // 2
