"""How the suite measures time and memory, and which commands and controls it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drift_fast.bench import (
    commands,
    controls,
    hardware,
    measure,
    page_cache,
    timing,
)
from drift_fast.bench import pair as pairs
from drift_fast.bench.pair import Pair
from drift_fast.bench.results import Row
from drift_fast.bench.session import Session
from support.bench_runs import LINUX
from support.synthetic import refused


def test_a_run_has_its_times_and_a_failed_one_its_last_line() -> None:
    environment = commands.environment(1)
    timing = measure.run([sys.executable, "-c", "sum(range(10**6))"], environment=environment)
    assert 0 < timing.cpu < 60
    assert timing.wall > 0
    with refused(measure.CommandError, "ValueError: of what it died"):
        measure.run(
            [sys.executable, "-c", "raise ValueError('of what it died')"], environment=environment
        )
    with refused(measure.CommandError, "signal 9"):
        measure.run(
            [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], environment=environment
        )


@LINUX
def test_memory_that_a_process_takes_is_seen_as_anonymous_or_mapped(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(40_000_000))
    wait = "import time; time.sleep(0.3)"
    code = {
        "nothing": wait,
        "anonymous": f"held = bytearray(b'1') * 40_000_000; {wait}",
        "mapped": f"import mmap; f = open({str(file)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, "
        f"prot=mmap.PROT_READ); sum(m[::4096]); {wait}",
    }
    seen = {
        what: measure.watch([sys.executable, "-c", text], environment=commands.environment(1))
        for what, text in code.items()
    }
    base = seen["nothing"]
    assert base.anonymous is not None
    for what, anonymous in (("anonymous", 40_000_000), ("mapped", 0)):
        found = seen[what]
        assert found.anonymous is not None
        assert found.nbytes - base.nbytes == pytest.approx(40_000_000, abs=4_000_000)
        assert found.anonymous - base.anonymous == pytest.approx(anonymous, abs=4_000_000)
        assert [sample.seconds for sample in found.samples] == sorted(
            sample.seconds for sample in found.samples
        )


@LINUX
def test_a_file_is_evicted_and_warmed(tmp_path: Path) -> None:
    if hardware.describe(tmp_path)["file_system"] not in ("ext4", "xfs", "btrfs"):
        pytest.skip("only a file system on a disk gives its pages up")
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3_000_001))
    (tmp_path / "empty").touch()
    files = [file, tmp_path / "empty"]

    page_cache.evict(files)
    assert page_cache.resident(files) == 0
    page_cache.warm(files)
    assert page_cache.resident(files) == 1


def test_every_cold_run_begins_with_an_empty_cache_and_no_warm_one_does(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(page_cache, "can_evict", lambda: True)
    monkeypatch.setattr(page_cache, "evict", lambda files: done.append(f"evict {len(files)}"))
    monkeypatch.setattr(page_cache, "resident", lambda _: 0.0)

    def run(command: list[str], **_: Any) -> measure.Timing:
        done.append(" ".join(command[:6]))
        return measure.Timing(1.0, 1.0)

    monkeypatch.setattr(measure, "run", run)
    entries = commands.statistics_entries(
        session.pair, session.work, threads=2, way="pread, 1 MiB"
    )[:2]
    rows = [(Row(f"process/statistics/{entry.who}", entry.label), entry) for entry in entries]

    timing.time_rounds(session, rows)
    assert len(done) == 4
    assert not any(line.startswith("evict") for line in done)

    done.clear()
    timing.time_cold(session, entries)
    # Both sides and the renamed one, before each of two reads and two commands, twice.
    assert done[::2] == ["evict 3"] * 8
    assert [line.startswith("evict") for line in done] == [True, False] * 8
    assert sum("controls.py read" in line for line in done) == 4
    assert sum("drift_fast inspect" in line for line in done) == 2


def test_a_slow_row_is_timed_in_the_first_half_of_the_rounds() -> None:
    slow = Row("process/delta/plain", "plain", walls=[timing.SLOW_SECONDS + 1])
    fast = Row("process/delta/ours", "ours", walls=[timing.SLOW_SECONDS - 1])
    assert [timing.sits_out(slow, repeat, 3) for repeat in range(3)] == [False, False, True]
    assert not any(timing.sits_out(fast, repeat, 3) for repeat in range(3))


def test_our_commands_are_the_ones_a_user_would_type(tiny: Pair, tmp_path: Path) -> None:
    command = commands.ours(tiny, "delta", threads=3, out=tmp_path / "out")
    assert command[1:3] == ["-m", "drift_fast"]
    assert command[3:] == [
        "delta",
        str(tiny.reasoning),
        str(tiny.multimodal),
        *("--modules", "all", "--rows", "index", "--threads", "3"),
        *("--out", str(tmp_path / "out")),
    ]


def test_every_process_gets_the_same_number_of_threads() -> None:
    environment = commands.environment(7)
    assert [environment[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")] == ["7"] * 3


def test_a_rival_that_is_not_installed_or_does_not_fit_says_so(
    tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reasons() -> dict[str, str]:
        entries = commands.statistics_entries(tiny, tmp_path, threads=2, way="")
        entries += commands.delta_entries(tiny, tmp_path, threads=2, way="")
        return {f"{entry.part}/{entry.who}": entry.absent for entry in entries}

    monkeypatch.setattr(commands, "mergekit", lambda: None)
    monkeypatch.setattr(
        commands.importlib.util, "find_spec", lambda name: None if name == "transformers" else name
    )
    found = reasons()
    assert found.pop("delta/mergekit") == "mergekit is not installed"
    assert found.pop("delta/public") == "transformers not installed"
    assert set(found.values()) == {""}

    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda _: None)
    found = reasons()
    assert (
        found["statistics/tuned"] == found["delta/plain"] == "torch and safetensors not installed"
    )
    assert found["statistics/ours"] == found["statistics/xor"] == found["delta/ours"] == ""

    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(commands.hardware, "available_nbytes", lambda: 1)
    assert "of memory" in reasons()["delta/public"]


@pytest.mark.parametrize("way", controls.WRITE_WAYS)
def test_the_control_writes_the_xor_of_both_files(tiny: Pair, tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    try:
        controls.Xor(tiny.reasoning, tiny.multimodal, threads=3, way=way, out=out).run()
    except OSError:
        if "direct" not in way:
            raise
        pytest.skip("this file system has no direct writing")

    spans = controls.spans(tiny.reasoning, tiny.multimodal)
    assert [nbytes for _, _, nbytes in spans] == [pairs.shards(tiny.reasoning)[0].stat().st_size]
    for number, (left, right, nbytes) in enumerate(spans):
        a, b = (np.frombuffer(path.read_bytes()[:nbytes], np.uint8) for path in (left, right))
        assert (out / f"xor-{number}").read_bytes() == (a ^ b).tobytes()


@pytest.mark.parametrize("way", controls.XOR_WAYS)
def test_the_control_reads_every_byte_of_both_files_whatever_its_way(
    tiny: Pair, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    covered: list[tuple[int, int]] = []
    real = controls._Files.xor

    def xor(self: Any, start: int, nbytes: int, buffers: Any) -> None:
        covered.append((start, nbytes))
        real(self, start, nbytes, buffers)

    monkeypatch.setattr(controls._Files, "xor", xor)
    if controls.XOR_WAYS[way].forked:
        # In this process, so that it can be seen.
        monkeypatch.setattr(controls.Xor, "_fork", in_turn)
    controls.Xor(tiny.reasoning, tiny.multimodal, threads=2, way=way).run()
    end = 0
    for start, nbytes in sorted(covered):
        assert start == end
        end += nbytes
    assert end == controls.spans(tiny.reasoning, tiny.multimodal)[0][2]


def in_turn(self: Any, files: list[Any], chunks: list[tuple[int, int, int]]) -> None:
    for index, start, nbytes in chunks:
        files[index].xor(start, nbytes, self._buffers[0])
