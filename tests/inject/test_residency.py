"""Δ gives the same injection wherever it is kept: beside the gradients, or read in every step."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import drift_fast
from drift_fast import DriftError, Injection, NonFiniteError
from drift_fast.dtypes import INT8_BLOCK
from drift_fast.inject.compute.base import SMALL
from drift_fast.inject.compute.host import HostArithmetic
from drift_fast.inject.placement import load, residency
from drift_fast.inject.placement.held import OnDisk
from drift_fast.inject.placement.int8 import Int8
from drift_fast.inject.placement.residency import choose
from drift_fast.inject.placement.stores import Ring
from drift_fast.inject.shards.base import Whole
from support.injection_models import (
    arithmetic,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
)
from support.residency_runs import (
    INNER,
    LARGE,
    TIGHT,
    WIDTH,
    GivenDelta,
    assert_same,
    backbone,
    backward,
    deltas_in,
    injected,
)

ELSEWHERE = ("device-int8", "host-int8", "disk")


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, drift_fast.Delta]:
    return deltas_in(tmp_path_factory.mktemp("residency"))


@pytest.fixture
def delta(deltas: dict[str, drift_fast.Delta]) -> drift_fast.Delta:
    return deltas["saved"]


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


@pytest.mark.parametrize("where", ["device", "disk", "device-int8"])
def test_a_weight_that_is_gathered_is_asked_for_when_delta_is_loaded(
    delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Gathering is a collective, and processes may load in other orders, or fail."""
    with Injection(backbone(), delta, residency=where) as injection:
        expected = injection._groups[0].origin
    original = load.load

    def refuse(self: Whole) -> torch.Tensor:
        raise AssertionError("gathered while Δ is loaded")

    def guarded(*given: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Whole, "weight", refuse)
            original(*given)

    monkeypatch.setattr(load, "load", guarded)
    with pytest.raises(AssertionError, match="gathered"):
        Injection(backbone(), delta, residency=where)
    monkeypatch.setattr(Whole, "gathers", True)
    with Injection(backbone(), delta, residency=where) as injection:
        assert injection._groups[0].origin == pytest.approx(expected, rel=1e-12)


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
        # Once for each step, and four that are under way.
        store._reader.submit(lambda: None).result()
    assert len(filled) == 3 * LARGE + 4


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
        backward(model, seed=0)
        injection.step()
        model.zero_grad()
        monkeypatch.setattr(kind, "fill", refused)
        backward(model, seed=0)
        injection.step()
        monkeypatch.undo()
        expected, _ = injected(where, delta, 1)
        assert_same(gradients_of(model), expected[0])


PAGE_NBYTES = 4096


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
        # What else an injection holds is a few numbers for each target, and where there is an
        # accelerator, the rest of the last page of each page-locked tensor.
        pages = 2 * PAGE_NBYTES * len(numels) if torch.cuda.is_available() else 0
        assert expected <= held <= expected + 16_000 + pages
    del injection, store
    assert tensor_nbytes() <= before + 1_000


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Nothing is freed by the garbage collector, which in training may not run for hours."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def large_tensors() -> dict[int, torch.Tensor]:
    """Return what Python can reach of the size of a large Δ, by identity."""
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    return {id(one): one for one in tensors if one.numel() > SMALL}


@pytest.mark.parametrize("where", ["host", "device", *ELSEWHERE])
@pytest.mark.parametrize("source", ["saved", "streamed"])
@pytest.mark.usefixtures("no_collector")
def test_removal_frees_delta_at_once(
    deltas: dict[str, drift_fast.Delta], where: str, source: str
) -> None:
    model = backbone()
    before = large_tensors()
    injection = Injection(model, deltas[source], residency=where, prefetch=TIGHT)
    backward(model, seed=0)
    injection.step()
    held = large_tensors().keys() - before.keys()
    model.zero_grad(set_to_none=True)
    injection.remove()
    assert held
    assert not large_tensors().keys() - before.keys()


@pytest.mark.parametrize("where", ["host", "device", *ELSEWHERE])
@pytest.mark.usefixtures("no_collector")
def test_an_attachment_that_fails_leaves_no_delta_behind(
    delta: drift_fast.Delta, where: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(delta.path, tmp_path / "delta")
    damage(next(folder.glob("*.safetensors")))
    model, damaged = backbone(), drift_fast.Delta.open(folder)
    before = large_tensors()
    with pytest.raises(DriftError, match="not those that were written"):
        Injection(model, damaged, residency=where, prefetch=TIGHT)
    assert not large_tensors().keys() - before.keys()


def damage(shard: Path) -> None:
    """Change the last byte of a file."""
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def test_no_buffer_is_wider_than_what_goes_into_it(delta: drift_fast.Delta) -> None:
    with Injection(backbone(), delta, residency="disk", prefetch="10GB") as injection:
        assert (
            injection._groups[0].store.nbytes <= 2 * sum(map(_numel, delta.shapes.values())) + 4096
        )


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("again", ["step", "backward"])
def test_an_injection_that_was_cut_off_is_not_repeated(
    delta: drift_fast.Delta, monkeypatch: pytest.MonkeyPatch, again: str, overlap: bool
) -> None:
    expected, _ = injected("disk", delta, 1)
    model = backbone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fill, filled = OnDisk.fill, []

    def cut_off(self: OnDisk, out: torch.Tensor) -> None:
        filled.append(out)
        if len(filled) == 6:
            raise KeyboardInterrupt
        fill(self, out)

    with Injection(model, delta, residency="disk", prefetch=TIGHT, overlap=overlap) as injection:

        def once() -> None:
            backward(model, seed=0)
            injection.step()

        monkeypatch.setattr(OnDisk, "fill", cut_off)
        with pytest.raises(KeyboardInterrupt):
            once()
        monkeypatch.undo()
        if not overlap:
            if again == "backward":
                regression_loss(model, regression_batch(width=WIDTH, seed=1)).backward()
            with pytest.raises(DriftError, match=r"cut off.*call zero_grad\(\)"):
                injection.step()
            if again == "step":
                with pytest.raises(DriftError, match=r"SGD steps.*cut off"):
                    optimizer.step()
        once()
        assert_same(gradients_of(model), expected[0])
        optimizer.step()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_what_is_read_in_every_step_is_read_after_a_fork_too(delta: drift_fast.Delta) -> None:
    with Injection(backbone(), delta, residency="disk", prefetch=TIGHT) as injection:
        store = injection._groups[0].store
        list(store.batches())
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(sum(1 for _ in store.batches()))
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == len(store.buckets)


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
    with Injection(
        model, delta, residency=where, prefetch=TIGHT, missing_gradients="skip"
    ) as injection:
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


def edit(path: Path) -> None:
    """Change a bit of every tensor, however few bytes it takes."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for tensor in json.loads(data[8 : 8 + length]).values():
        if "data_offsets" in tensor:
            data[8 + length + tensor["data_offsets"][0]] ^= 1
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize(
    ("source", "which", "spoil"),
    [
        ("saved", "delta/*.safetensors", cut_short),
        ("saved", "delta/*.safetensors", edit),
        ("streamed", "expert/*.safetensors", cut_short),
        ("streamed", "multimodal/*.safetensors", delete),
    ],
)
def test_files_that_disappear_or_change_between_steps_are_named_with_a_remedy(
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


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize("where", ["device", "host", *ELSEWHERE])
def test_a_delta_that_was_edited_is_refused_wherever_it_would_live(
    tmp_path: Path, where: str, stored: str
) -> None:
    model = backbone()
    delta_towards(tmp_path, model, dtype=stored, modules="mlp").save(tmp_path / "delta")
    for path in (tmp_path / "delta").glob("*.safetensors"):
        edit(path)
    with pytest.raises(drift_fast.CheckpointError, match=r"_proj.*damaged or edited"):
        Injection(model, tmp_path / "delta", residency=where, prefetch=TIGHT)


# --- values that are refused, wherever Δ would be


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["device", "device-int8", "host-int8", "disk"])
def test_a_delta_that_is_not_finite_is_refused_wherever_it_would_live(
    spoiled: float, where: str
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    model = backbone()
    given = GivenDelta({name: torch.ones(INNER, WIDTH)})
    with Injection(model, given, residency=where, prefetch=TIGHT) as injection:
        assert injection.targets == [name]
    given[name][3, 4] = spoiled
    with pytest.raises(NonFiniteError, match="up_proj"):
        Injection(model, given, residency=where, prefetch=TIGHT)


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
    monkeypatch.setattr(residency, "free_host_memory", lambda: int(room * nbytes))
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
        (10, 23, [], "disk", "23.0 GB free: read in every step"),
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
    monkeypatch.setattr(residency, "free_host_memory", lambda: host and host * GB)
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


def testfree_host_memory_is_known_here() -> None:
    free = residency.free_host_memory()
    assert free is not None
    assert 10**7 < free < 10**14
