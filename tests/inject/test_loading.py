"""Attaching holds what is kept and small buffers, ends at Ctrl-C, and names what it cannot read."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import drift_fast
from drift_fast import CheckpointError, Injection, _core
from drift_fast.sizes import thread_count
from support.processes import Child, python
from support.synthetic import refused, write_sparse

NAME = "model.layers.0.mlp.up_proj.weight"
MEGABYTE = 10**6

# A model of the delta's shapes, whose weights take no memory where they are expanded.
WORLD = """
import os, sys, torch
from pathlib import Path
import drift_fast
from drift_fast.inject import injection

def shaped(delta, make):
    model = torch.nn.Module()
    for name, shape in delta.shapes.items():
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, torch.nn.Parameter(make(shape)))
    return model

def delta_of(folder, kind):
    if kind == "stored":
        return drift_fast.Delta.open(Path(folder) / "delta")
    return drift_fast.compute_delta(Path(folder) / "a.safetensors", Path(folder) / "b.safetensors")
"""

PEAK = """
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

delta = delta_of(sys.argv[1], sys.argv[2])
model = shaped(delta, lambda shape: torch.full(shape, 0.01, dtype=torch.bfloat16))
original = injection.load_groups

def loaded(*arguments):
    # Before the ring of residency="disk" is filled for the first step.
    groups = original(*arguments)
    print(status("VmHWM") - before)
    return groups

injection.load_groups = loaded
for where in "disk", "device":
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before = status("VmRSS")
    drift_fast.Injection(model, delta, residency=where).remove()
"""

ENDLESS = """
delta = delta_of(sys.argv[1], "streamed")
model = shaped(delta, lambda shape: torch.full((1,), 0.01, dtype=torch.bfloat16).expand(shape))
print("attaching", flush=True)
drift_fast.Injection(model, delta, residency="disk")
print("attached", flush=True)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with one tensor of 134 MB, and its delta."""
    folder = tmp_path_factory.mktemp("large")
    for seed, side in enumerate("ab"):
        write_sparse(folder / f"{side}.safetensors", {NAME: (1 << 13, 1 << 13)}, seed=seed)
    drift_fast.compute_delta(
        folder / "a.safetensors", folder / "b.safetensors", folder / "delta", check_weights=False
    )
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("kind", ["stored", "streamed"])
def test_attaching_takes_small_buffers_beside_what_it_keeps(pair: Path, kind: str) -> None:
    disk, device = map(int, python(WORLD + PEAK, pair, kind).stdout.split())
    one = 2 * (1 << 26)
    # What stays on disk is held while it is measured, one tensor at a time.
    assert one < disk < one + 50 * MEGABYTE
    assert one < device < one + 50 * MEGABYTE


def test_ctrl_c_ends_attaching(tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": (1 << 14, 1 << 14) for n in range(200)}
    for seed, side in enumerate("ab"):
        write_sparse(tmp_path / f"{side}.safetensors", shapes, seed=seed)
    child = Child(sys.executable, "-c", WORLD + ENDLESS, tmp_path)
    child.wait_until(lambda: "attaching" in child.stdout)
    time.sleep(0.5)
    child.send(signal.SIGINT)
    ended = child.finish(20)
    assert ended.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in ended.stderr
    assert "attached" not in ended.stdout


@pytest.mark.parametrize(
    ("mine", "of_launcher", "stated", "together", "expected"),
    [
        (8, 8, "4", True, 2),
        (8, 8, "16", True, 1),
        (8, 8, "4", False, 8),
        (8, 8, None, True, 8),
        (8, 8, "", True, 8),
        (8, 8, "0", True, 8),
        # A launcher that binds each rank has shared the processors already.
        (2, 8, "4", True, 2),
    ],
)
def test_ranks_of_one_host_share_its_processors(
    monkeypatch: pytest.MonkeyPatch,
    mine: int,
    of_launcher: int,
    stated: str | None,
    together: bool,
    expected: int,
) -> None:
    def affinity(process: int) -> set[int]:
        return set(range(of_launcher if process == os.getppid() else mine))

    # A container may have fewer processors than its host.
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", affinity, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if stated is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", stated)
    assert thread_count(None, together=together) == expected
    assert thread_count(3, together=together) == 3


def test_ranks_share_processors_while_they_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * thread_count(None)))
    used: list[int] = []

    def streamed(*arguments: Any, **keywords: Any) -> Any:
        used.append(arguments[5]["threads"])
        return _core.load_differences(*arguments, **keywords)

    def counted(threads: int | None, **keywords: Any) -> int:
        used.append(thread_count(threads, **keywords))
        return used[-1]

    for side in "ab":
        weight = torch.randn(60, 100, generator=torch.Generator().manual_seed(ord(side)))
        save_file({"up_proj.weight": weight}, tmp_path / f"{side}.safetensors")
    pair = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    stored = drift_fast.compute_delta(*pair, tmp_path / "delta", modules="all", check_weights=False)
    both = [stored, drift_fast.compute_delta(*pair, modules="all", check_weights=False)]
    monkeypatch.setattr("drift_fast.delta.backends.load_differences", streamed)
    monkeypatch.setattr("drift_fast.delta.backends.thread_count", counted)
    for delta in both:
        model = torch.nn.Module()
        model.up_proj = torch.nn.Linear(100, 60, bias=False)
        used.clear()
        Injection(model, delta, modules="all").remove()
        assert set(used) == {1}


@pytest.mark.parametrize("where", ["device", "disk", "device-int8"])
def test_bytes_that_are_not_those_that_were_written_are_refused_by_tensor(
    tmp_path: Path, where: drift_fast.inject.config.Residency
) -> None:
    for seed, side in enumerate("ab"):
        write_sparse(tmp_path / f"{side}.safetensors", {NAME: (600, 1000)}, seed=seed)
    delta = drift_fast.compute_delta(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        tmp_path / "delta",
        check_weights=False,
    )
    (file,) = (tmp_path / "delta").glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.seek(-9, 2)
        opened.write(b"\x01")
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.model.layers[0].mlp = torch.nn.Module()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(1000, 600, bias=False)
    with refused(CheckpointError, NAME, "not those that were written"):
        Injection(model, delta, residency=where)
