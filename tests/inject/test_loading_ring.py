"""Runs of Δ through the ring of host memory, on a CPU: many targets at a time, in any sizes.

What a stream would reorder is not seen here; `test_injection_cuda.py` has a GPU.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from drift_fast.dtypes import INT8_BLOCK
from drift_fast.inject.compute.device import DeviceArithmetic
from drift_fast.inject.placement import pipeline, places
from drift_fast.inject.placement.int8 import Int8, quantize
from drift_fast.inject.placement.places import Beside, Place, Starts, Unread
from drift_fast.inject.placement.rounded import Rounded, Rounding
from drift_fast.inject.target import DeltaReader, Target
from support.injection_models import write_checkpoint

CPU = torch.device("cpu")
COUNT = 10
# No size is a multiple of a block.
SHAPES = {
    f"model.layers.{at}.self_attn.q_proj.weight": (191 + 7 * at, 203 + 9 * at)
    for at in range(COUNT)
}


class Piece:
    """A shard that is a run of elements, with its part of the weight."""

    process_groups = ("group",)
    gathers = False

    def __init__(self, span: tuple[int, int]) -> None:
        self.span = span
        self._weight = torch.randn(span[1] - span[0], generator=torch.Generator().manual_seed(5))

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1)[slice(*self.span)]

    def weight(self) -> torch.Tensor:
        return self._weight


class Quiet:
    """Progress that nobody sees."""

    def see(self, *args: Any) -> None: ...

    def end(self) -> None: ...


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, drift_fast.Delta]:
    folder = tmp_path_factory.mktemp("ring")
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    moved = {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in base.items()}
    sides = write_checkpoint(folder / "a", moved), write_checkpoint(folder / "b", base)
    found = {}
    for dtype in ("bfloat16", "float32", "int8"):
        streamed = drift_fast.compute_delta(*sides, dtype=dtype)
        found[f"streamed {dtype}"] = streamed
        found[dtype] = streamed.save(folder / dtype)
    return found


def some_span(numel: int, draw: random.Random) -> tuple[int, int]:
    kind = draw.random()
    start = draw.randrange(numel)
    if kind < 0.25:
        return start, start
    return (0, numel) if kind < 0.5 else (start, draw.randint(start + 1, numel))


@pytest.fixture
def rubbish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not asked to be zero holds something, as on a GPU."""
    empty = torch.empty

    def filled(*args: Any, **options: Any) -> torch.Tensor:
        return empty(*args, **options).fill_(77)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("source", ["bfloat16", "float32", "int8", "streamed bfloat16"])
@pytest.mark.usefixtures("rubbish")
def test_all_that_passes_through_the_ring_is_right(
    deltas: dict[str, drift_fast.Delta],
    source: str,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw, delta = random.Random(seed), deltas[source]
    together = draw.choice([1, 2_000, 100_000, 10**9])
    monkeypatch.setattr(places, "together", lambda device: together)
    monkeypatch.setattr(pipeline, "_RING_NBYTES", draw.choice([1 << 20, 1 << 22]))
    monkeypatch.setattr(pipeline, "_LEAST_NBYTES", 1 << 20)
    monkeypatch.setattr(pipeline, "_AHEAD", draw.choice([0, 1, 3, 7]))
    on = DeviceArithmetic(CPU)
    starts = Starts(on)
    rounding = Rounding(on, starts, to_host=False)
    every: list[Any] = []
    for name, shape in SHAPES.items():
        target = Target(name, (name,), (), torch.nn.Parameter(torch.zeros(shape)), shape)
        shard: Any = Piece(some_span(math.prod(shape), draw))
        kinds: list[Any] = [
            Rounded(target, shard, delta, rounding),
            Beside(target, shard, CPU, starts),
            Unread(target, shard, CPU, starts, DeltaReader(delta)),
        ]
        (kind,) = draw.choices(kinds, [3, 1, 1])
        every.append((kind, shard, name))
    wanted = load_through_the_ring(delta, [kind for kind, *_ in every])
    starts.measure()
    for (place, shard, name), runs in zip(every, wanted, strict=True):
        loaded = place.loaded(runs)
        exact = delta[name].reshape(-1)[slice(*shard.span)]
        values = exact
        if isinstance(place, Rounded):
            assert isinstance(loaded.delta, Int8)
            if source != "int8":
                values = as_int8(delta[name])[slice(*shard.span)]
            assert torch.equal(filled(loaded.delta), values)
        elif isinstance(place, Beside):
            assert torch.equal(loaded.delta, exact)
        assert loaded.norm == pytest.approx(float(values.double().norm()), rel=1e-5, abs=1e-12)
        norm = float(exact.double().norm())
        assert loaded.exact_norm == pytest.approx(norm, rel=1e-5, abs=1e-12)
        products = shard.weight().double() * values.double()
        assert loaded.start is not None
        off = abs(loaded.start.item() - products.sum().item())
        assert off <= 1e-7 * products.abs().sum().item()


def load_through_the_ring(
    delta: drift_fast.Delta, those: list[Place]
) -> list[list[pipeline.Wanted]]:
    wanted = [place.wanted(delta) or [] for place in those]
    Rounded.lay_out([place for place in those if isinstance(place, Rounded)])
    with torch.no_grad():
        ring = pipeline._Ring([one for some in wanted for one in some], Quiet())  # type: ignore[arg-type]
        ring.load(delta)
    assert not ring._made
    return wanted


def as_int8(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of a Δ that is rounded whole."""
    codes, scales = quantize(tensor.reshape(-1))
    return (codes * scales.float()).bfloat16().view(-1)[: tensor.numel()]


def filled(held: Int8) -> torch.Tensor:
    numel = -(-(held.lead + held.numel) // INT8_BLOCK) * INT8_BLOCK
    out = torch.zeros(numel, dtype=held.dtype)
    held.fill(out)
    return out[held.lead : held.lead + held.numel]


NARROW, WIDE = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)


@pytest.mark.parametrize("room", [1 << 16, 1 << 17, 1 << 24])
@pytest.mark.parametrize("seed", range(4))
def test_dots_on_a_device_are_those_of_float64(room: int, seed: int) -> None:
    draw, on = random.Random(seed), DeviceArithmetic(CPU)
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(30):
        numel = draw.choice([0, 1, 63, 64, 4_096, 32_769, 65_536, 131_079, 200_000])
        left, right = (torch.randn(numel, generator=generator) for _ in range(2))
        pairs.append((left.to(draw.choice(NARROW + WIDE)), right.to(draw.choice(NARROW + WIDE))))
    found = on.dots(*zip(*pairs, strict=True), room=room)
    assert found.dtype == torch.float64
    for value, (left, right) in zip(found.tolist(), pairs, strict=True):
        products = left.double() * right.double()
        narrow = left.dtype in NARROW and right.dtype in NARROW
        # Small tensors are packed in float32.
        bound = 1e-7 if narrow or left.numel() <= 1 << 15 else 1e-14
        off = abs(value - products.sum().item())
        assert off <= bound * products.abs().sum().item(), (left.dtype, right.dtype, len(left))


def test_room_bounds_what_is_widened_at_a_time(tmp_path: Path) -> None:
    on, most = DeviceArithmetic(CPU), 0
    real = torch.Tensor.to

    def seen(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, tensor.numel())
        return real(tensor, *args, **options)

    values = [torch.ones(numel, dtype=torch.bfloat16) for numel in (300_000, 40_000, 50_048)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", seen)
        found = on.dots(values, values, room=1 << 16)
    assert found.tolist() == [300_000, 40_000, 50_048]
    assert most <= 1 << 16
