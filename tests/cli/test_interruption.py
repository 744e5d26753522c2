"""A run that is interrupted or killed stops at once, and leaves nothing or what was there before.

Everything runs in a process of its own, whose end is what is tested.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import drift_fast
from drift_fast import Delta
from support.commands import PROGRAM, run, succeeds
from support.synthetic import Pair, contents, everything_under, write_sparse


def wait_for(condition: Any, seconds: float, process: subprocess.Popen[Any]) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the program ended before it could be interrupted"
        assert time.monotonic() < limit, "the program never got that far"
        time.sleep(0.005)


def interrupt(process: subprocess.Popen[Any]) -> float:
    """Send Ctrl-C and return the seconds until the process is gone."""
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    finally:
        if process.poll() is None:
            process.kill()
    return time.monotonic() - begin


def test_ctrl_c_stops_inspect_within_a_second(endless: tuple[Path, Path]) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "inspect", *map(str, endless)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    statm = Path(f"/proc/{process.pid}/maps")
    wait_for(
        lambda: "a.safetensors" in statm.read_text() or cpu_seconds(process.pid) > 0.6, 30, process
    )
    time.sleep(0.3)
    seconds = interrupt(process)
    output, errors = process.communicate()
    assert process.returncode == 130
    assert seconds < 1.5
    assert output == ""
    assert "Traceback" not in errors


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


def start_delta(pair: tuple[Path, Path], out: Path, *options: str) -> subprocess.Popen[str]:
    """Start a run of many seconds and return it in the middle of its writing."""
    command = [*PROGRAM, "delta", *map(str, pair), "--out", str(out), *options]
    before = everything_under(out.parent)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: everything_under(out.parent) != before, 60, process)
    time.sleep(0.5)
    assert process.poll() is None, "the run was over before it could be interrupted"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_an_interrupted_delta_leaves_nothing_and_says_so_by_its_status(
    writable: tuple[Path, Path], out: Path
) -> None:
    process = start_delta(writable, out, "--max-shard-size", "100MB")
    seconds = interrupt(process)
    output, errors = process.communicate()
    assert process.returncode == 130, errors
    assert everything_under(out.parent) == set()
    assert seconds < 1.5
    assert output == ""
    assert "Traceback" not in errors


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
    process = start_delta(writable, out, "--overwrite")
    interrupt(process)
    process.communicate()
    assert process.returncode == 130
    assert contents(out) == before
    assert everything_under(out.parent) == {
        "delta",
        *(f"delta/{path.name}" for path in out.iterdir()),
    }
    assert len(Delta.open(out)) == 14


def test_two_runs_into_one_directory_do_not_mix(pair: Pair, sharded_pair: Pair, out: Path) -> None:
    commands = [
        [*PROGRAM, "delta", str(each.reasoning), str(each.multimodal), "--out", str(out)]
        for each in (pair, sharded_pair)
    ]
    processes = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    statuses = [process.returncode for process in processes]
    assert sorted(statuses) in ([0, 0], [0, 1]), errors
    delta = Delta.open(out)
    candidates = []
    for each in (pair, sharded_pair):
        alone = drift_fast.compute_delta(each.reasoning, each.multimodal)
        candidates.append(all(bool((delta[name] == alone[name]).all()) for name in alone))
    assert any(candidates)
    assert everything_under(out) == {*contents(out), "drift.json"}


def test_a_signal_handler_of_the_caller_stops_the_library_too(endless: tuple[Path, Path]) -> None:
    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    begin = time.monotonic()
    try:
        with pytest.raises(Alarm):
            drift_fast.inspect(*endless)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert time.monotonic() - begin < 2.0


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
    import threading

    beats = 0
    done = threading.Event()

    def beat() -> None:
        nonlocal beats
        while not done.wait(0.01):
            beats += 1

    thread = threading.Thread(target=beat)

    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.7)
    thread.start()
    try:
        with pytest.raises(Alarm):
            drift_fast.inspect(*endless, threads=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        done.set()
        thread.join()
    assert beats > 15, "the interpreter was held while Rust was reading"
