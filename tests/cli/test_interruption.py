"""A run that is interrupted or killed stops, and leaves nothing or what was there before.

Everything runs in a process of its own, whose end is what is tested. That it stops soon is tested
on a pair that takes minutes to read, not with a clock.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import drift_fast
from drift_fast import Delta
from support.commands import PROGRAM, run, succeeds
from support.processes import Child, Ended, finish
from support.synthetic import Pair, contents, everything_under, write_sparse


def interrupt(child: Child) -> Ended:
    """Send Ctrl-C; return how the process ended."""
    child.send(signal.SIGINT)
    return child.finish(20)


def test_ctrl_c_stops_inspect(endless: tuple[Path, Path]) -> None:
    child = Child(*PROGRAM, "inspect", *endless)
    maps = Path(f"/proc/{child.pid}/maps")
    child.wait_until(
        lambda: "a.safetensors" in maps.read_text() or cpu_seconds(child.pid) > 0.6, limit=30
    )
    time.sleep(0.3)
    ended = interrupt(child)
    assert ended.returncode == 130
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def writable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair whose delta of 6 GB fits on the disk and takes seconds to write."""
    directory = tmp_path_factory.mktemp("writable")
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": (1 << 13, 1 << 13) for n in range(48)}
    pair = (
        write_sparse(directory / "a.safetensors", shapes),
        write_sparse(directory / "b.safetensors", shapes),
    )
    if os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize < 8 << 30:
        pytest.skip("needs 8 GB of free disk")
    return pair


def start_delta(pair: tuple[Path, Path], out: Path, *options: str) -> Child:
    """Start a run of many seconds and return it in the middle of its writing."""
    before = everything_under(out.parent)
    child = Child(*PROGRAM, "delta", *pair, "--out", out, *options)
    child.wait_until(lambda: everything_under(out.parent) != before)
    time.sleep(0.5)
    assert child.running, "the run was over before it could be interrupted"
    return child


def kill(child: Child) -> None:
    child.send(signal.SIGKILL)
    child.finish()


def test_an_interrupted_delta_leaves_nothing_and_says_so_by_its_status(
    writable: tuple[Path, Path], out: Path
) -> None:
    ended = interrupt(start_delta(writable, out, "--max-shard-size", "100MB"))
    assert ended.returncode == 130, ended.stderr
    assert everything_under(out.parent) == set()
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr


def test_a_killed_run_can_be_started_again_and_leaves_no_remains(
    writable: tuple[Path, Path], out: Path
) -> None:
    kill(start_delta(writable, out))
    assert not (out / "drift.json").exists()
    with pytest.raises((drift_fast.DriftError, OSError)):
        Delta.open(out)
    succeeds("delta", *writable, "--out", out, "--layers", "0-0")
    assert len(Delta.open(out)) == 1
    assert everything_under(out.parent) == {
        "delta",
        "delta/drift.json",
        "delta/delta.safetensors.index.json",
        "delta/delta-00001-of-00001.safetensors",
    }


def test_a_link_in_place_of_what_a_killed_run_left_is_not_followed(
    writable: tuple[Path, Path], pair: Pair, tmp_path: Path, out: Path
) -> None:
    # In a directory that others may write to, cleaning up must not reach anywhere else.
    kill(start_delta(writable, out))
    remains = [path for path in out.parent.iterdir() if path != out]
    assert remains, "nothing to replace; this test needs another way to find the temporary name"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("three years of work")
    for path in remains:
        shutil.rmtree(path)
        path.symlink_to(precious)
    run("delta", pair.reasoning, pair.multimodal, "--out", out)
    assert everything_under(precious) == {"thesis.txt"}


def test_an_interrupted_overwrite_keeps_the_former_delta(
    writable: tuple[Path, Path], pair: Pair, out: Path
) -> None:
    drift_fast.compute_delta(pair.reasoning, pair.multimodal, out)
    before = contents(out)
    ended = interrupt(start_delta(writable, out, "--overwrite"))
    assert ended.returncode == 130
    assert contents(out) == before
    assert everything_under(out.parent) == {
        "delta",
        *(f"delta/{path.name}" for path in out.iterdir()),
    }
    assert len(Delta.open(out)) == 14


def test_two_runs_into_one_directory_do_not_mix(pair: Pair, sharded_pair: Pair, out: Path) -> None:
    children = [
        Child(*PROGRAM, "delta", each.reasoning, each.multimodal, "--out", out)
        for each in (pair, sharded_pair)
    ]
    ended = finish(children, 60)
    assert sorted(each.returncode for each in ended) in ([0, 0], [0, 1]), ended
    delta = Delta.open(out)
    candidates = []
    for each in (pair, sharded_pair):
        alone = drift_fast.compute_delta(each.reasoning, each.multimodal)
        candidates.append(all(bool((delta[name] == alone[name]).all()) for name in alone))
    assert any(candidates)
    assert everything_under(out) == {*contents(out), "drift.json"}


class Alarm(Exception):
    pass


@contextlib.contextmanager
def alarm_after(seconds: float) -> Iterator[None]:
    """Raise `Alarm` from a signal handler in the middle of what runs then."""

    def ring(*_: object) -> None:
        raise Alarm

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def test_a_signal_handler_of_the_caller_stops_the_library_too(endless: tuple[Path, Path]) -> None:
    with alarm_after(0.5), pytest.raises(Alarm):
        drift_fast.inspect(*endless)


def test_an_exception_in_the_progress_callback_stops_the_run_and_is_raised(
    brief: tuple[Path, Path], out: Path
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Enough(Exception):
        pass

    def progress(*arguments: Any, **named: Any) -> None:
        calls.append((*arguments, *named.values()))
        if len(calls) == 2:
            raise Enough

    with pytest.raises(Enough):
        drift_fast.compute_delta(*brief, out, on_progress=progress)
    assert len(calls) == 2
    assert everything_under(out.parent) == set()


def test_python_threads_run_while_a_delta_is_computed(endless: tuple[Path, Path]) -> None:
    beats = 0
    done = threading.Event()

    def beat() -> None:
        nonlocal beats
        while not done.wait(0.01):
            beats += 1

    thread = threading.Thread(target=beat)

    thread.start()
    try:
        with alarm_after(0.7), pytest.raises(Alarm):
            drift_fast.inspect(*endless, threads=1)
    finally:
        done.set()
        thread.join()
    assert beats > 15, "the interpreter was held while Rust was reading"
