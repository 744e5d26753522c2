"""Δ gives the same injection wherever it lives: beside the gradients, rounded, or read anew.

Every large tensor here is above `SMALL`, and what is allowed on the device so little that the ring
of buffers turns several times in each step. There is no accelerator: what a stream would reorder
is not seen here.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import drift_fast
from drift_fast import DriftError, Injection, NonFiniteError
from drift_fast.dtypes import INT8_BLOCK
from drift_fast.inject.compute.base import SMALL
from drift_fast.inject.compute.host import HostArithmetic
from drift_fast.inject.placement import residency
from drift_fast.inject.placement.held import InHostMemory, OnDisk
from drift_fast.inject.placement.int8 import Int8, quantize
from drift_fast.inject.placement.int8_blocks import Int8Blocks
from drift_fast.inject.placement.residency import choose
from drift_fast.inject.placement.stores import Ring
from drift_fast.inject.shards.base import Whole
from drift_fast.inject.target import DeltaReader, Target
from support.injection_models import (
    Backbone,
    arithmetic,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
    write_checkpoint,
)

WIDTH, INNER = 192, 200
LARGE = 14
ELSEWHERE = ("device-int8", "host-int8", "disk")
# One tensor to a buffer.
TIGHT = 1
# torch's float32 norm of a CPU tensor, in which the device's arithmetic is tried, is not exact.
PRECISION = {"host": 1e-6, "device": 1e-4}


def backbone() -> Backbone:
    model = Backbone(layers=2, width=WIDTH, inner=INNER)
    sizes = [p.numel() for p in model.model.parameters()]
    assert sum(size > SMALL for size in sizes) == LARGE
    return model


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, drift_fast.Delta]:
    """One Δ, as a file and as the difference of two checkpoints."""
    folder = tmp_path_factory.mktemp("residency")
    streamed = delta_towards(folder, backbone(), dtype="bfloat16", modules=("attn", "mlp"))
    return {"streamed": streamed, "saved": streamed.save(folder / "delta")}


@pytest.fixture
def delta(deltas: dict[str, drift_fast.Delta]) -> drift_fast.Delta:
    return deltas["saved"]


def backward(model: torch.nn.Module, *, seed: int) -> None:
    model.zero_grad()
    regression_loss(model, regression_batch(width=WIDTH, seed=seed)).backward()


def injected(
    where: str, delta: Any, steps: int = 3, *, lr: float = 0.1, **options: Any
) -> tuple[list[dict[str, torch.Tensor]], dict[str, float]]:
    """Train, and return the gradients that the optimizer got, and the metrics at the end."""
    model = backbone()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    gradients = []
    with Injection(model, delta, residency=where, prefetch=TIGHT, **options) as injection:
        assert injection.residency == where
        for step in range(steps):
            backward(model, seed=step)
            injection.step()
            gradients.append(gradients_of(model))
            optimizer.step()
        return gradients, injection.metrics()


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, label: str = ""
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), f"{label} {name}"


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


# --- parity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["saved", "streamed"])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_disk_gives_the_gradients_of_a_resident_delta_bit_for_bit(
    deltas: dict[str, drift_fast.Delta], source: str, kind: str
) -> None:
    with arithmetic(kind):
        expected, told = injected("device", deltas[source])
        found, metrics = injected("disk", deltas[source])
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_same(one, other, label=f"step {step}")
    # Overall sums are added up in another order.
    assert metrics == pytest.approx(told, rel=1e-9)


@pytest.mark.parametrize("scale", ["absolute", "gradnorm", "project"])
def test_disk_is_exact_in_every_scale(delta: drift_fast.Delta, scale: str) -> None:
    expected, _ = injected("device", delta, 2, scale=scale)
    found, _ = injected("disk", delta, 2, scale=scale)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, label=scale)


def test_a_cap_on_progress_asks_the_ring_once_more_in_a_step(delta: drift_fast.Delta) -> None:
    options = {"progress_cap": 1e-4, "look_ahead": 0.0, "alpha": 0.5, "lr": 1e-3}
    expected, told = injected("device", delta, 4, **options)
    found, metrics = injected("disk", delta, 4, **options)
    assert told["stopped"] > 0
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert metrics == pytest.approx(told, rel=1e-9)


@pytest.mark.parametrize("where", ["device-int8", "host-int8"])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_int8_gives_the_gradients_of_a_rounded_delta(
    delta: drift_fast.Delta, where: str, kind: str
) -> None:
    class Given(dict[str, torch.Tensor]):
        @property
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {name: tuple(tensor.shape) for name, tensor in self.items()}

    # Small tensors stay exact.
    given = Given({n: rounded(t) if t.numel() > SMALL else t for n, t in delta.items()})
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


def test_the_ring_is_filled_again_and_again_within_a_step(
    delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []
    fill = OnDisk.fill

    def counted(self: OnDisk, out: torch.Tensor) -> None:
        filled.append(self.numel)
        fill(self, out)

    monkeypatch.setattr(OnDisk, "fill", counted)
    model = backbone()
    with Injection(model, delta, residency="disk", prefetch=TIGHT) as injection:
        store = injection._groups[0].store
        assert isinstance(store, Ring)
        assert len(store._slots) == 4
        # Every large tensor is a bucket, and all small ones are one.
        assert len(store.buckets) == LARGE + 1
        for step in range(3):
            backward(model, seed=step)
            injection.step()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        # Once for where the weights start, once for each step, and four that are under way.
        store._reader.submit(lambda: None).result()
    assert len(filled) == 4 * LARGE + 4


@pytest.mark.parametrize("where", ELSEWHERE)
def test_what_fits_is_filled_once(
    delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    kind = OnDisk if where == "disk" else Int8
    model = backbone()
    injection = Injection(model, delta, residency=where, prefetch="100MB")

    def refused(self: Any, out: torch.Tensor) -> None:
        raise AssertionError("filled once more")

    with injection:
        monkeypatch.setattr(kind, "fill", refused)
        backward(model, seed=0)
        injection.step()
        monkeypatch.undo()
        expected, _ = injected(where, delta, 1)
        assert_same(gradients_of(model), expected[0])


# --- memory ------------------------------------------------------------------------------------


def tensor_nbytes() -> int:
    """Return the bytes of all tensors that Python can reach, shared memory counted once."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        # Tensors of torch.compile's own kinds have no memory.
        if type(one) in (torch.Tensor, torch.nn.Parameter):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("where", ["device", *ELSEWHERE])
@pytest.mark.parametrize("source", ["saved", "streamed"])
def test_no_more_of_delta_is_held_than_the_store_says(
    deltas: dict[str, drift_fast.Delta], where: str, source: str
) -> None:
    model = backbone()
    before = tensor_nbytes()
    with Injection(model, deltas[source], residency=where, prefetch=TIGHT) as injection:
        held = tensor_nbytes() - before
        store = injection._groups[0].store
        numels = {name: p.numel() for name, p in model.model.named_parameters()}
        whole = 2 * sum(numels.values())
        ring = 4 * 2 * (-(-max(numels.values()) // INT8_BLOCK) * INT8_BLOCK)
        small = 2 * sum(numel for numel in numels.values() if numel <= SMALL)
        rounds = sum(
            -(-numel // INT8_BLOCK) * (INT8_BLOCK + 2) for numel in numels.values() if numel > SMALL
        )
        expected = {
            "device": whole,
            "disk": ring + small,
            "device-int8": rounds + ring + small,
            "host-int8": rounds + ring + small,
        }[where]
        assert store.nbytes == expected
        # What else an injection holds is a few numbers for each target.
        assert expected <= held <= expected + 16_000
    del injection, store
    assert tensor_nbytes() <= before + 1_000


def test_no_buffer_is_wider_than_what_goes_into_it(delta: drift_fast.Delta) -> None:
    with Injection(backbone(), delta, residency="disk", prefetch="10GB") as injection:
        assert (
            injection._groups[0].store.nbytes <= 2 * sum(map(_numel, delta.shapes.values())) + 4096
        )


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def test_removal_ends_the_reader_and_frees_its_buffers(delta: drift_fast.Delta) -> None:
    model = backbone()
    injection = Injection(model, delta, residency="disk", prefetch=TIGHT)
    store: Any = injection._groups[0].store
    (reader,) = store._reader._threads
    assert reader.is_alive()
    slots = [weakref.ref(slot) for slot in store._slots]
    backward(model, seed=0)
    injection.step()
    injection.remove()
    injection.remove()
    gc.collect()
    assert not reader.is_alive()
    assert not any(slot() is not None for slot in slots)
    assert not store._held
    with pytest.raises(DriftError, match="removed"):
        injection.step()


# --- recovery ----------------------------------------------------------------------------------


@contextlib.contextmanager
def failing(owner: type, name: str, *, call: int, error: Exception) -> Iterator[None]:
    """Let one call of a method fail, and the others work."""
    original = getattr(owner, name)
    calls = 0

    def sometimes(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(owner, name, sometimes)
        yield
    assert calls >= call


@pytest.mark.parametrize("where", ["device", *ELSEWHERE])
# After the first tensor, in the middle of the ring's second turn, and at the end.
@pytest.mark.parametrize("call", [1, 7, LARGE + 1])
def test_a_step_that_fails_half_way_leaves_the_next_one_right(
    delta: drift_fast.Delta, where: str, call: int
) -> None:
    expected, _ = injected(where, delta, 1, alpha=2.0)
    model = backbone()
    call = 1 if where == "device" else call
    with Injection(model, delta, residency=where, prefetch=TIGHT) as injection:
        backward(model, seed=5)
        with (
            failing(HostArithmetic, "subtract", call=call, error=MemoryError("full")),
            pytest.raises(MemoryError, match="full"),
        ):
            injection.step()
        # What was to hold in that step does no longer.
        injection.alpha = 2.0
        for again in range(2):
            backward(model, seed=0)
            injection.step()
            assert_same(gradients_of(model), expected[0], label=f"{again}")
            assert injection.skipped == 0
            assert injection.injected == len(injection.targets)
            assert injection.metrics()["alpha"] == 2.0
            torch.optim.SGD(model.parameters(), lr=0.0).step()


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_missing_gradient_leaves_the_next_step_right(delta: drift_fast.Delta, where: str) -> None:
    expected, _ = injected(where, delta, 1)
    model = backbone()
    with Injection(model, delta, residency=where, prefetch=TIGHT) as injection:
        backward(model, seed=5)
        model.model.layers[1].mlp.up_proj.weight.grad = None
        with pytest.raises(DriftError, match=r"have no gradient, \S*up_proj"):
            injection.step()
        backward(model, seed=0)
        injection.step()
        assert_same(gradients_of(model), expected[0])


@pytest.mark.parametrize("where", ["device", *ELSEWHERE])
def test_targets_without_a_gradient_are_skipped_and_counted(
    delta: drift_fast.Delta, where: str
) -> None:
    expected, _ = injected(where, delta, 1)
    model = backbone()
    # The first and the last of the ring, one in the middle, and a small one.
    left_out = [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ]
    with Injection(model, delta, residency=where, prefetch=TIGHT, strict=False) as injection:
        for _ in range(2):
            backward(model, seed=0)
            for name in left_out:
                model.get_parameter(name).grad = None
            injection.step()
            wanted = {n: g for n, g in expected[0].items() if n not in left_out}
            assert_same(gradients_of(model), wanted)
            assert injection.skipped == len(left_out)
            assert injection.injected == len(injection.targets) - len(left_out)
            torch.optim.SGD(model.parameters(), lr=0.0).step()


def take_two_steps(model: torch.nn.Module, injection: Injection) -> None:
    """What is read ahead is of this step or of the next one."""
    for _ in range(2):
        injection.step()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        backward(model, seed=1)


# Of the first bucket of the next step, too, which is read ahead.
@pytest.mark.parametrize("call", [1, 6, LARGE - 3])
def test_a_read_that_fails_once_is_tried_anew_in_the_next_step(
    delta: drift_fast.Delta, call: int
) -> None:
    expected, _ = injected("device", delta, 1)
    model = backbone()
    with Injection(model, delta, residency="disk", prefetch=TIGHT) as injection:
        backward(model, seed=5)
        injection.step()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        backward(model, seed=5)
        with (
            failing(drift_fast.Delta, "read_into", call=call, error=OSError("stale handle")),
            pytest.raises(DriftError, match=r"read again.*stale handle.*residency='host'"),
        ):
            take_two_steps(model, injection)
        for _ in range(2):
            backward(model, seed=0)
            injection.step()
            assert_same(gradients_of(model), expected[0])
            torch.optim.SGD(model.parameters(), lr=0.0).step()


def cut_short(path: Path) -> None:
    os.truncate(path, 100_000)


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("source", "which", "spoil"),
    [
        ("saved", "delta/*.safetensors", cut_short),
        ("streamed", "expert/*.safetensors", cut_short),
        ("streamed", "multimodal/*.safetensors", delete),
    ],
)
def test_files_that_disappear_between_steps_are_named_with_a_remedy(
    tmp_path: Path, source: str, which: str, spoil: Callable[[Path], None]
) -> None:
    model = backbone()
    delta = delta_towards(tmp_path, model, dtype="bfloat16", modules=("attn", "mlp"))
    if source == "saved":
        delta = delta.save(tmp_path / "delta")
    with Injection(model, delta, residency="disk", prefetch=TIGHT) as injection:
        backward(model, seed=0)
        injection.step()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        for path in tmp_path.glob(which):
            spoil(path)
        backward(model, seed=1)
        with pytest.raises(
            DriftError, match=r"in every step: .*safetensors.*Keep the files"
        ) as told:
            take_two_steps(model, injection)
        assert "proj" in str(told.value)
        assert isinstance(told.value.__cause__, OSError | drift_fast.CheckpointError)


# --- which residency -------------------------------------------------------------------------


def test_an_unknown_residency_is_refused(delta: drift_fast.Delta) -> None:
    with pytest.raises(ValueError, match=r"residency must be one of auto, device, .*'gpu'"):
        Injection(backbone(), delta, residency="gpu")


@pytest.mark.parametrize(
    ("where", "modules", "reason"),
    [
        ("host", None, "beside the gradients"),
        ("disk", r"re:\.bias$", f"at most {SMALL} elements"),
        ("device-int8", r"re:\.bias$", f"at most {SMALL} elements"),
    ],
)
def test_residency_says_where_delta_really_is(
    delta: drift_fast.Delta,
    caplog: pytest.LogCaptureFixture,
    where: str,
    modules: str | None,
    reason: str,
) -> None:
    caplog.set_level(logging.INFO, "drift_fast")
    with Injection(backbone(), delta, residency=where, modules=modules) as injection:
        assert injection.residency == "device"
        assert "residency=device" in repr(injection)
    assert f"residency device instead of {where}" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(("room", "chosen"), [(2.1, "device"), (1.9, "disk")])
def test_auto_on_a_cpu_keeps_half_of_the_free_memory(
    delta: drift_fast.Delta,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room: float,
    chosen: str,
) -> None:
    nbytes = 2 * sum(map(_numel, delta.shapes.values()))
    monkeypatch.setattr(residency, "_free_host_memory", lambda: int(room * nbytes))
    caplog.set_level(logging.INFO, "drift_fast")
    with Injection(backbone(), delta, residency="auto", prefetch=TIGHT) as injection:
        assert injection.residency == chosen
        assert isinstance(injection._groups[0].store, Ring) == (chosen == "disk")
    assert f"residency {chosen}: 0.00 GB of Δ" in caplog.text


GB = 10**9
CUDA = torch.device("cuda", 0)


def trained(nbytes: int, *, grad: object = None, device: torch.device = CUDA) -> Any:
    return SimpleNamespace(requires_grad=True, device=device, nbytes=nbytes, grad=grad)


@pytest.mark.parametrize(
    ("free", "host", "parameters", "chosen", "why"),
    [
        (80, 500, [trained(10 * GB)], "device", "14.00 GB of Δ on cuda:0, 66.0 GB stay free"),
        # Gradients and two states are to come: 3 · 19 and a tenth of 80.
        (78, 500, [trained(19 * GB)], "host", "65.0 GB on cuda:0"),
        # Gradients are there already.
        (78, 500, [trained(19 * GB, grad=object())], "device", "64.0 GB stay free"),
        # What lives elsewhere needs nothing here.
        (78, 500, [trained(99 * GB, device=torch.device("cpu"))], "device", "stay free"),
        (10, 23, [], "disk", "23.0 GB free: read anew each step"),
        (10, 24, [], "host", "pinned host memory"),
        (10, None, [], "host", "pinned host memory"),
    ],
)
def test_auto_on_a_gpu_leaves_room_for_training(
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    host: int | None,
    parameters: list[Any],
    chosen: str,
    why: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GB, 80 * GB))
    monkeypatch.setattr(residency, "_free_host_memory", lambda: host and host * GB)
    found, line = choose(14 * GB, CUDA, parameters)
    assert found == chosen
    assert why in line


def test_auto_counts_only_this_process_s_part_of_a_sharded_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GB, 80 * GB))
    whole = trained(60 * GB)
    assert choose(GB, CUDA, [whole])[0] == "host"
    whole.to_local = lambda: SimpleNamespace(nbytes=60 * GB // 8)
    assert choose(GB, CUDA, [whole])[0] == "device"


def test_free_host_memory_is_known_here() -> None:
    free = residency._free_host_memory()
    assert free is not None
    assert 10**7 < free < 10**14


# --- int8 --------------------------------------------------------------------------------------


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
        "drift_fast.inject.placement.load.quantize", lambda *a: pytest.fail("rounded")
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


class Piece:
    """A shard that is a run of elements."""

    process_groups = ("group",)

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


def scaled_delta(size: float) -> Any:
    class Given(dict[str, torch.Tensor]):
        dtype = "float32"

        @property
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {name: tuple(tensor.shape) for name, tensor in self.items()}

    return Given({"model.layers.0.mlp.up_proj.weight": torch.randn(INNER, WIDTH) * size})


@pytest.mark.parametrize("where", ["device-int8", "host-int8"])
@pytest.mark.parametrize("size", [1e-30, 5e-9, 1e8])
def test_values_that_int8_has_no_room_for_are_refused(where: str, size: float) -> None:
    delta = scaled_delta(size)
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


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["device", "device-int8", "host-int8", "disk"])
def test_a_delta_that_is_not_finite_is_refused_wherever_it_would_live(
    spoiled: float, where: str
) -> None:
    class Given(dict[str, torch.Tensor]):
        dtype = "float32"

        @property
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {name: tuple(tensor.shape) for name, tensor in self.items()}

    name = "model.layers.0.mlp.up_proj.weight"
    model = backbone()
    given = Given({name: torch.ones(INNER, WIDTH)})
    with Injection(model, given, residency=where, prefetch=TIGHT) as injection:
        assert injection.targets == [name]
    given[name][3, 4] = spoiled
    with pytest.raises(NonFiniteError, match="up_proj"):
        Injection(model, given, residency=where, prefetch=TIGHT)


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


# --- the ring by itself ------------------------------------------------------------------------


def plain_ring(count: int = 7, *, dtype: torch.dtype = torch.bfloat16) -> tuple[Ring, list[Any]]:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(100 + 31 * at, generator=generator).to(dtype) for at in range(count)]
    ring = Ring([InHostMemory(tensor) for tensor in tensors], [], torch.device("cpu"), 0)
    return ring, tensors


def walk(ring: Ring, tensors: list[torch.Tensor], *, buckets: int | None = None) -> None:
    for at in range(len(ring.buckets) if buckets is None else buckets):
        with ring.bucket(at) as found:
            start, stop = ring.buckets[at]
            for one, other in zip(found, tensors[start:stop], strict=True):
                assert torch.equal(one, other), at


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_a_ring_of_host_tensors_turns_for_ever(count: int) -> None:
    ring, tensors = plain_ring(count)
    for _ in range(5):
        walk(ring, tensors)


@pytest.mark.parametrize("count", [3, 5, 9])
def test_a_ring_starts_anew_wherever_it_was_left(count: int) -> None:
    ring, tensors = plain_ring(count)
    count = len(ring.buckets)
    assert count >= 2
    for buckets in (*range(count + 1), *reversed(range(count))):
        walk(ring, tensors, buckets=buckets)
        # Given up inside a bucket.
        with pytest.raises(KeyError), ring.bucket(min(buckets, count - 1)):
            raise KeyError
        walk(ring, tensors)
    walk(ring, tensors)


def test_what_is_kept_in_several_types_stays_exact() -> None:
    tensors = [torch.randn(70), torch.randn(200).bfloat16(), torch.randn(300).half()]
    for order in (tensors, tensors[::-1]):
        ring = Ring([InHostMemory(tensor) for tensor in order], [], torch.device("cpu"), 0)
        for start, stop, found in ring.batches():
            for one, other in zip(found, order[start:stop], strict=True):
                assert torch.equal(one, other.float())
