"""int8 in training is the int8 of a stored delta: the same codes, rounded at most once.

Owns the rounding on loading, the blocks that a shard takes, and the gradients that both give.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import drift_fast
from drift_fast import DriftError, Injection
from drift_fast.dtypes import INT8_BLOCK
from drift_fast.inject.compute.base import SMALL
from drift_fast.inject.placement.int8 import Apart, Int8, quantize
from drift_fast.inject.placement.int8_blocks import Int8Blocks
from drift_fast.inject.placement.load import make_arithmetic
from drift_fast.inject.placement.pipeline import load
from drift_fast.inject.placement.places import Starts
from drift_fast.inject.placement.rounded import Rounded, Rounding
from drift_fast.inject.shards.base import Whole
from drift_fast.inject.target import DeltaReader, Target
from support.injection_models import (
    arithmetic,
    write_checkpoint,
)
from support.residency_runs import (
    INNER,
    LARGE,
    PRECISION,
    TIGHT,
    WIDTH,
    GivenDelta,
    assert_same,
    backbone,
    deltas_in,
    injected,
)


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, drift_fast.Delta]:
    return deltas_in(tmp_path_factory.mktemp("residency"))


@pytest.fixture
def delta(deltas: dict[str, drift_fast.Delta]) -> drift_fast.Delta:
    return deltas["saved"]


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Round as docs/format.md says of int8, in numpy: the least float16 not below |Δ| / 127."""
    flat = torch.nn.functional.pad(tensor.float().reshape(-1), (0, -tensor.numel() % 64))
    blocks = flat.view(-1, 64).numpy()
    exact = np.abs(blocks).max(1).astype(np.float64) / 127
    scale = exact.astype(np.float16)
    scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale)
    scale = scale.astype(np.float32)[:, None]
    steps = np.rint(blocks / np.where(scale == 0, np.float32(1), scale)).clip(-127, 127)
    values = torch.from_numpy(steps * scale).bfloat16()
    return values.reshape(-1)[: tensor.numel()].view(tensor.shape)


@pytest.mark.parametrize("where", ["device-int8", "host-int8"])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_int8_gives_the_gradients_of_a_rounded_delta(
    delta: drift_fast.Delta, where: str, kind: str
) -> None:
    # Small tensors stay exact.
    given = GivenDelta({n: rounded(t) if t.numel() > SMALL else t for n, t in delta.items()})
    with arithmetic(kind):
        expected, told = injected("device", given)
        found, metrics = injected(where, delta)
    for one, other in zip(found, expected, strict=True):
        for name, gradient in other.items():
            difference = (one[name] - gradient).norm()
            assert difference <= PRECISION[kind] * gradient.norm(), name
    for name in ("progress", "relative_push", "cosine", "alpha", "injected"):
        assert metrics[name] == pytest.approx(told[name], rel=PRECISION[kind], abs=1e-9), name
    # And not those of the exact Δ.
    exact, _ = injected("device", delta, 1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert (found[0][name] - exact[0][name]).norm() > 1e-4 * exact[0][name].norm()


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("where", ["device-int8", "host-int8"])
def test_norms_are_those_of_what_is_injected(
    delta: drift_fast.Delta, where: str, kind: str
) -> None:
    with (
        arithmetic(kind),
        Injection(backbone(), delta, residency=where, prefetch=TIGHT) as injection,
    ):
        (group,) = injection._groups
        norms = dict(zip((t.delta_name for t in group.targets), group.norms.tolist(), strict=True))
    apart = 0
    for name, tensor in delta.items():
        used = rounded(tensor) if tensor.numel() > SMALL else tensor
        assert norms[name] == pytest.approx(float(used.double().norm()), rel=PRECISION[kind]), name
        apart += norms[name] != pytest.approx(float(tensor.double().norm()), rel=1e-5)
    # Rounding changes the norm, if little.
    assert kind == "device" or apart >= LARGE // 2


def filled(held: Int8) -> torch.Tensor:
    out = torch.full((held.codes.numel(),), 7.0, dtype=held.dtype)
    held.fill(out)
    return out[held.lead : held.lead + held.numel]


def decoded(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values that are injected for a flat Δ that is rounded on loading."""
    return filled(Int8(*quantize(tensor), slice(0, tensor.numel())))


def stored_as_int8(folder: Path, tensors: dict[str, torch.Tensor]) -> drift_fast.Delta:
    """Write values as an int8 delta: their difference from zero is exact."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return drift_fast.compute_delta(
        write_checkpoint(folder / "values", tensors),
        write_checkpoint(folder / "zeros", zeros),
        folder / "int8",
        dtype="int8",
        modules="all",
    )


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 40_000, 1_000_003])
def test_int8_keeps_the_direction_of_a_gaussian_delta(numel: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    delta = torch.randn(numel, generator=generator) * 1e-3
    found = decoded(delta).double()
    cosine = torch.dot(found, delta.double()) / found.norm() / delta.double().norm()
    assert cosine >= 0.9999
    assert torch.equal(found, rounded(delta).double())


def test_several_decode_alike_joined_and_each_in_its_own_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(numel, generator=generator) for numel in (64, 200, 1)]
    each = []
    for tensor in tensors:
        # As a bucket has them: whole blocks, the last one padded.
        alone = torch.empty(-(-tensor.numel() // INT8_BLOCK) * INT8_BLOCK, dtype=torch.bfloat16)
        Int8(*quantize(tensor)).fill(alone)
        each.append(alone)
    apart = Apart([Int8(*quantize(tensor)) for tensor in tensors])
    joined = Int8.joined([Int8(*quantize(tensor)) for tensor in tensors])
    for several in (apart, joined):
        found = torch.full((several.numel,), torch.nan, dtype=torch.bfloat16)
        several.fill(found)
        assert torch.equal(found, torch.cat(each))


def test_int8_of_nothing_is_nothing() -> None:
    assert decoded(torch.empty(0)).numel() == 0


def test_int8_of_a_zero_block_is_zero_beside_blocks_that_are_not() -> None:
    delta = torch.zeros(3 * INT8_BLOCK)
    delta[INT8_BLOCK : 2 * INT8_BLOCK] = torch.linspace(-1, 1, INT8_BLOCK)
    found = decoded(delta)
    assert not found[:INT8_BLOCK].any()
    assert not found[2 * INT8_BLOCK :].any()
    assert (found - delta)[INT8_BLOCK : 2 * INT8_BLOCK].abs().max() <= 1.01 / 127 / 2 + 2**-8


def test_rounding_on_loading_is_the_rounding_of_an_int8_delta(tmp_path: Path) -> None:
    """Codes and scales bit for bit: subnormal and huge scales, ties, and a last part of a block."""
    generator = torch.Generator().manual_seed(2)
    sizes = 2.0 ** torch.randint(-26, 21, (40_000, 1), generator=generator)
    blocks = torch.randn(40_000, INT8_BLOCK, generator=generator) * sizes
    # A largest value of 127: the scale is 1, and halves are ties.
    blocks[:1000] = (torch.randn(1000, INT8_BLOCK, generator=generator) * 20).round() / 2
    blocks[:1000, 0] = 127.0
    # A largest value that is exactly 127 float16, and the next one, for which it is too small.
    exact = 127 * torch.rand(1000, generator=generator).half().float()
    blocks[1000:3000] = 0.0
    blocks[1000:2000, 0] = exact
    blocks[2000:3000, 5] = torch.nextafter(exact, torch.tensor(torch.inf))
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = blocks.view(-1)[:-19].view(3, -1)
    delta = stored_as_int8(tmp_path, {name: tensor})
    codes, scales = delta.read_codes(name, 0, tensor.numel())
    found_codes, found_scales = quantize(tensor)
    assert torch.equal(found_scales.view(-1), scales)
    assert torch.equal(found_codes.view(-1)[: tensor.numel()], codes)
    assert torch.equal(decoded(tensor), delta[name].view(-1))


@pytest.fixture(scope="module")
def int8_deltas(
    tmp_path_factory: pytest.TempPathFactory, deltas: dict[str, drift_fast.Delta]
) -> dict[str, drift_fast.Delta]:
    """One Δ in bfloat16, and its values stored as int8."""
    folder = tmp_path_factory.mktemp("int8")
    values = dict(deltas["saved"].items())
    return {"bfloat16": deltas["saved"], "int8": stored_as_int8(folder, values)}


@pytest.mark.parametrize("where", ["device-int8", "host-int8"])
def test_a_stored_int8_delta_is_injected_without_another_rounding(
    int8_deltas: dict[str, drift_fast.Delta], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, told = injected("device", int8_deltas["int8"])
    monkeypatch.setattr(
        "drift_fast.inject.placement.rounded.quantize", lambda *a: pytest.fail("rounded")
    )
    found, metrics = injected(where, int8_deltas["int8"])
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert metrics == pytest.approx(told, rel=1e-9)


@pytest.mark.parametrize("where", ["device-int8", "host-int8"])
def test_rounding_on_loading_gives_the_gradients_of_the_values_stored_as_int8(
    int8_deltas: dict[str, drift_fast.Delta], where: str
) -> None:
    # Small tensors stay as the delta has them.
    options = {"modules": "re:proj.weight$"}
    expected, _ = injected(where, int8_deltas["int8"], **options)
    found, _ = injected(where, int8_deltas["bfloat16"], **options)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("where", ["device-int8", "host-int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_targets_that_are_rounded_together_are_rounded_as_one_by_one(
    int8_deltas: dict[str, drift_fast.Delta],
    where: str,
    dtype: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with arithmetic(kind):
        expected, told = injected(where, int8_deltas[dtype])
        round_together(monkeypatch, 100_000)
        found, metrics = injected(where, int8_deltas[dtype])
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert metrics == told


def round_together(monkeypatch: pytest.MonkeyPatch, numel: int) -> None:
    """Measure so many elements at a time, as on a GPU."""
    monkeypatch.setattr("drift_fast.inject.placement.places.together", lambda device: numel)


class Piece:
    """A shard that is a run of elements."""

    process_groups = ("group",)
    gathers = True

    def __init__(self, start: int, stop: int) -> None:
        self.span = (start, stop)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1)[slice(*self.span)]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "span", [(0, 64), (0, 70), (3, 60), (63, 65), (64, 1000), (1001, 5003), (700, 700)]
)
def test_a_shard_that_begins_inside_a_block_holds_the_values_of_the_whole(
    int8_deltas: dict[str, drift_fast.Delta], dtype: str, span: tuple[int, int]
) -> None:
    delta = int8_deltas[dtype]
    name = "model.layers.0.mlp.up_proj.weight"
    parameter = torch.nn.Parameter(torch.empty(delta.shapes[name]))
    target = Target(name, (name,), (), parameter, delta.shapes[name])
    blocks = Int8Blocks.around(target, Piece(*span))  # type: ignore[arg-type]
    stored = blocks.stored(delta)
    assert (stored is None) == (dtype == "bfloat16")
    held = Int8(*(stored or quantize(blocks.values(DeltaReader(delta)))), blocks.run)
    whole = int8_deltas["int8"][name].reshape(-1)
    assert torch.equal(filled(held), whole[slice(*span)])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_shards_that_are_rounded_together_keep_to_their_blocks(
    int8_deltas: dict[str, drift_fast.Delta], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta, device = int8_deltas[dtype], torch.device("cpu")
    spans = [(3, 60), (63, 65), (700, 700), (64, 1000), (1001, 5003), (0, 70)]
    names = [name for name, shape in delta.shapes.items() if math.prod(shape) > SMALL]
    round_together(monkeypatch, 2000)
    on = make_arithmetic(device)
    rounding = Rounding(on, Starts(on), to_host=False)
    places = []
    for name, span in zip(names, spans, strict=False):
        parameter = torch.nn.Parameter(torch.empty(delta.shapes[name]))
        target = Target(name, (name,), (), parameter, delta.shapes[name])
        places.append(Rounded(target, Piece(*span), delta, rounding))  # type: ignore[arg-type]
    wanted = [place.wanted(delta) or [] for place in places]
    Rounded.lay_out(places)
    load(delta, [one for some in wanted for one in some], lambda progress: None)
    for place, some, name, span in zip(places, wanted, names, spans, strict=False):
        loaded, own = place.loaded(some), slice(*span)
        assert isinstance(loaded.delta, Int8)
        values = int8_deltas["int8"][name].reshape(-1)[own]
        assert torch.equal(filled(loaded.delta), values)
        assert loaded.norm == pytest.approx(float(values.double().norm()), rel=1e-6)
        exact = delta[name].reshape(-1)[own].double().norm()
        assert loaded.exact_norm == pytest.approx(float(exact), rel=1e-6)


def joined_target(
    delta: drift_fast.Delta, *, rows: int, columns: int, transposed: bool = False
) -> Target:
    """Two tensors of a delta as one parameter, one above the other."""
    names = tuple(delta.shapes)
    height, width = (columns, rows) if transposed else (rows, columns)
    strides = (1, columns) if transposed else (columns, 1)
    parts = tuple(
        (name, at * height, (at + 1) * height, 0, width, 0, *strides)
        for at, name in enumerate(names)
    )
    shape = (2 * height, width)
    return Target(names[0], names, parts, torch.nn.Parameter(torch.empty(shape)), shape)


def test_int8_tensors_that_are_joined_in_memory_stay_as_they_are_stored(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up")]
    delta = stored_as_int8(tmp_path, {name: torch.randn(6, 192) for name in names})
    target = joined_target(delta, rows=6, columns=192)
    for shard in (Whole(target.parameter), Piece(3, 1500)):
        blocks = Int8Blocks.around(target, shard)  # type: ignore[arg-type]
        stored = blocks.stored(delta)
        assert stored is not None
        found = filled(Int8(*stored, blocks.run))
        values = torch.cat([delta[name].reshape(-1) for name in names])
        assert torch.equal(found, shard.cut(values))


@pytest.mark.parametrize(("rows", "columns", "transposed"), [(64, 192, True), (5, 90, False)])
def test_int8_blocks_that_are_torn_apart_are_rounded_once_more(
    tmp_path: Path, rows: int, columns: int, transposed: bool
) -> None:
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up")]
    delta = stored_as_int8(tmp_path, {name: torch.randn(rows, columns) for name in names})
    target = joined_target(delta, rows=rows, columns=columns, transposed=transposed)
    blocks = Int8Blocks.around(target, Whole(target.parameter))
    assert blocks.stored(delta) is None
    values = blocks.values(DeltaReader(delta))
    assert torch.equal(decoded(values), rounded(values))


@pytest.mark.parametrize("where", ["device-int8", "host-int8"])
@pytest.mark.parametrize("size", [1e-30, 5e-9, 1e8])
def test_values_that_int8_has_no_room_for_are_refused(where: str, size: float) -> None:
    generator = torch.Generator().manual_seed(2)
    tensor = torch.randn(INNER, WIDTH, generator=generator) * size
    delta = GivenDelta({"model.layers.0.mlp.up_proj.weight": tensor})
    with pytest.raises(DriftError, match=r"up_proj.*range of int8.*residency='device'"):
        Injection(backbone(), delta, residency=where, prefetch=TIGHT)
    Injection(backbone(), delta, residency="disk", prefetch=TIGHT).remove()


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e6])
def test_int8_keeps_small_and_large_values(size: float) -> None:
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(10_000, generator=generator) * size
    found = decoded(delta).double() / size
    exact = delta.double() / size
    assert torch.dot(found, exact) / found.norm() / exact.norm() >= 0.9999
