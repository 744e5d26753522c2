"""The cache directory: sidecars, locks and links, and ranges as sets of bytes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from drift_fast import system
from drift_fast._core import Checkpoint, stream
from drift_fast.checkpoints.remote import RemoteCheckpoint, default_cache, open_url, sparse
from drift_fast.errors import CheckpointError
from support.processes import python
from support.range_server import Fault, RangeServer
from support.remote import FILE, MOMENT, SINGLE, START_NBYTES, check_held, has, held, shard_of
from support.synthetic import refused, stored, write_file


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_told_before_anything_is_asked_for(
    opened: RemoteCheckpoint, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 999_999))
    with pytest.raises(OSError, match="1000000 bytes") as caught:
        opened.fetch({SINGLE: [(1_000_000, 2_000_000)]})
    assert caught.value.errno == errno.ENOSPC
    assert "DRIFT_FAST_CACHE" in str(caught.value)
    assert not server.requests
    opened.fetch({SINGLE: [(1_000_000, 1_999_999)]})


def test_a_full_disk_in_the_middle_names_the_file(
    opened: RemoteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        opened.fetch({SINGLE: [(1_000_000, 2_000_000)]})
    assert caught.value.filename == str(opened.directory / SINGLE)


@pytest.mark.parametrize("nbytes", [2**63 - 1, 9_999_999_999_999_999_999])
def test_a_length_that_no_file_can_have_is_refused(
    server: RangeServer, tmp_path: Path, nbytes: int
) -> None:
    server.always = Fault(headers={"Content-Range": f"bytes 0-{START_NBYTES - 1}/{nbytes}"})
    with refused(CheckpointError, f"{nbytes:,} bytes", "cannot be kept", "DRIFT_FAST_CACHE"):
        open_url(f"{server.url}/m/{SINGLE}", cache=tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*.partial"))


def test_the_length_of_the_holes_needs_no_disk(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, START_NBYTES))
    open_url(f"{server.url}/m", cache=tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, START_NBYTES - 1))
    with pytest.raises(OSError, match="are free"):
        open_url(f"{server.url}/m/{SINGLE}", cache=tmp_path)


def test_directories_are_the_owner_s_alone_and_named_for_people(
    server: RangeServer, tmp_path: Path
) -> None:
    cache = tmp_path / "deep" / "cache"
    first = open_url(f"{server.url}/m", cache=cache)
    assert stat.S_IMODE(first.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert first.directory.parent == cache
    assert re.fullmatch(r"127\.0\.0\.1-m-[0-9a-f]{16}", first.directory.name)
    for path in first.directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server.files[f"/n/{SINGLE}"] = FILE
    assert open_url(f"{server.url}/n", cache=cache).directory != first.directory
    assert open_url(f"{server.url}/m?x=1", cache=cache).directory == first.directory


def test_a_link_in_place_of_the_directory_or_the_lock_is_refused(
    opened: RemoteCheckpoint, server: RangeServer, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (opened.directory / ".lock").unlink()
    (opened.directory / ".lock").symlink_to(elsewhere / "lock")
    with refused(CheckpointError, "link"):
        open_url(f"{server.url}/m", cache=tmp_path / "cache")
    shutil.rmtree(opened.directory)
    opened.directory.symlink_to(elsewhere)
    with refused(CheckpointError, opened.directory, "link"):
        open_url(f"{server.url}/m", cache=tmp_path / "cache")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        SINGLE,
        f"{SINGLE}.ranges.json",
        f".{SINGLE}.partial",
        f".{SINGLE}.ranges.json.partial",
    ],
)
def test_a_link_in_place_of_a_file_is_replaced_and_not_followed(
    opened: RemoteCheckpoint, server: RangeServer, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    path = opened.directory / name
    victim.write_bytes(path.read_bytes() if path.exists() else b"precious")
    before = victim.read_bytes()
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    if name == f".{SINGLE}.partial":
        # So that the shard is written anew.
        (opened.directory / f"{SINGLE}.ranges.json").unlink()
    again = open_url(f"{server.url}/m", cache=tmp_path / "cache")
    again.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert victim.read_bytes() == before
    assert not (opened.directory / SINGLE).is_symlink()
    check_held(opened.directory, {SINGLE: FILE})


def test_a_pipe_in_place_of_a_file_does_not_hang(
    opened: RemoteCheckpoint, server: RangeServer, tmp_path: Path
) -> None:
    for name in [SINGLE, f"{SINGLE}.ranges.json"]:
        (opened.directory / name).unlink()
        os.mkfifo(opened.directory / name)
    open_url(f"{server.url}/m", cache=tmp_path / "cache")
    check_held(opened.directory, {SINGLE: FILE})


def test_what_another_process_adds_to_the_cache_does_not_fail_who_reads_there(
    opened: RemoteCheckpoint, server: RangeServer, tmp_path: Path
) -> None:
    tensors = {"q.w": stored(np.ones((4, 4)))}
    path = write_file(tmp_path / "local.safetensors", tensors)
    server.files[f"/n/{SINGLE}"] = path.read_bytes()
    remote = open_url(f"{server.url}/n", cache=tmp_path / "cache")
    remote.fetch({SINGLE: [(0, path.stat().st_size)]})
    source, local = Checkpoint(remote.directory), Checkpoint(path)
    os.utime(remote.directory / SINGLE, ns=(1, 1))
    assert stream(source, local, [("q.w", "q.w")], {"threads": 1})
    # A file that changed on the server takes its place as a new one.
    shutil.copyfile(remote.directory / SINGLE, tmp_path / "new")
    (tmp_path / "new").rename(remote.directory / SINGLE)
    with refused(CheckpointError, remote.directory / SINGLE, "changed while it was being read"):
        stream(source, local, [("q.w", "q.w")], {"threads": 1})


@pytest.mark.parametrize("name", [".lock", SINGLE])
def test_a_pipe_that_comes_later_does_not_hang_either(
    opened: RemoteCheckpoint, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = sparse.SparseShard.load

    def exchange(path: Path) -> object:
        found = load(path)
        (opened.directory / name).unlink()
        os.mkfifo(opened.directory / name)
        return found

    monkeypatch.setattr(sparse.SparseShard, "load", exchange)

    def fetch_twice() -> None:
        for start in (1_000_000, 2_000_000):
            opened.fetch({SINGLE: [(start, start + 1000)]})

    with pytest.raises((CheckpointError, OSError)):
        fetch_twice()


GOOD = {
    "format_version": 1,
    "nbytes": len(FILE),
    "etag": None,
    "last_modified": None,
    "ranges": [[0, 3_000_000]],
}


@pytest.mark.parametrize(
    "stored",
    [
        None,
        "",
        "{",
        "[]",
        "[" * 100_000,
        {**GOOD, "format_version": 2},
        {**GOOD, "nbytes": len(FILE) - 1},
        {**GOOD, "nbytes": float(len(FILE))},
        {**GOOD, "etag": 3},
        {**GOOD, "last_modified": []},
        {**GOOD, "ranges": None},
        {**GOOD, "ranges": [[0, len(FILE) + 1]]},
        {**GOOD, "ranges": [[-1, 3_000_000]]},
        {**GOOD, "ranges": [[0, 2], [2, 3_000_000]]},
        {**GOOD, "ranges": [[10, 3_000_000], [0, 5]]},
        {**GOOD, "ranges": [[0, 3_000_000], [3_000_001, 3_000_001]]},
        {**GOOD, "ranges": [[0, 3_000_000, 1]]},
        {**GOOD, "ranges": [[0, "3000000"]]},
        {**GOOD, "ranges": [[False, 3_000_000]]},
        {**GOOD, "ranges": [[100, 3_000_000]]},
        {**GOOD, "ranges": []},
        {**GOOD, "etag": '"another"'},
        {key: value for key, value in GOOD.items() if key != "ranges"},
    ],
)
def test_a_list_of_ranges_that_is_not_valid_is_thrown_away_with_its_shard(
    server: RangeServer, tmp_path: Path, stored: Any
) -> None:
    server.etags = False
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    path = opened.directory / f"{SINGLE}.ranges.json"
    path.write_text(json.dumps(GOOD))
    open_url(f"{server.url}/m", cache=tmp_path)
    assert held(opened.directory) == [(0, 3_000_000)], "the list that all others differ from"
    path.unlink()
    if stored is not None:
        path.write_text(stored if isinstance(stored, str) else json.dumps(stored))
    open_url(f"{server.url}/m", cache=tmp_path)
    assert held(opened.directory) == [(0, START_NBYTES)]
    check_held(opened.directory, {SINGLE: FILE})


def test_a_shard_of_another_length_than_its_list_says_is_thrown_away(
    opened: RemoteCheckpoint, server: RangeServer, tmp_path: Path
) -> None:
    opened.fetch({SINGLE: [(1_000_000, 2_000_000)]})
    os.truncate(opened.directory / SINGLE, 2_500_000)
    open_url(f"{server.url}/m", cache=tmp_path / "cache")
    assert held(opened.directory) == [(0, START_NBYTES)]
    check_held(opened.directory, {SINGLE: FILE})


def test_two_runs_do_not_write_in_one_directory_at_once(
    opened: RemoteCheckpoint, server: RangeServer
) -> None:
    thread = threading.Thread(target=lambda: opened.fetch({SINGLE: [(1_000_000, 2_000_000)]}))
    with sparse.locked(opened.directory):
        thread.start()
        time.sleep(MOMENT)
        assert not server.requests
    thread.join(20)
    assert has(opened.directory, 1_000_000, 2_000_000)


def test_a_file_system_without_locks_is_named(
    opened: RemoteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(system.fcntl, "flock", flock)
    with refused(CheckpointError, opened.directory, "not implemented", "DRIFT_FAST_CACHE"):
        opened.fetch({SINGLE: [(1_000_000, 2_000_000)]})


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ["DRIFT_FAST_CACHE", "XDG_CACHE_HOME"]:
        monkeypatch.delenv(name, raising=False)
    assert default_cache() == Path("/home/someone/.cache/drift_fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert default_cache() == Path("/home/someone/.cache/drift_fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert default_cache() == Path("/scratch/drift_fast")
    monkeypatch.setenv("DRIFT_FAST_CACHE", "~/models")
    assert default_cache() == Path("/home/someone/models")


def test_ranges_are_merged_cut_and_taken_from_one_another_as_sets_of_bytes() -> None:
    rng = np.random.default_rng(12)
    for _ in range(300):
        first, second = (
            [(int(start), int(start + length)) for start, length in rng.integers(0, 12, (4, 2))]
            for _ in range(2)
        )
        wanted, there = sparse.merged(first), sparse.merged(second)
        for ranges, given in [(wanted, first), (there, second)]:
            assert bytes_in(ranges) == bytes_in(given)
            assert all(left[1] < right[0] for left, right in pairwise(ranges))
        lacking = sparse.missing(wanted, there)
        assert bytes_in(lacking) == bytes_in(wanted) - bytes_in(there)
        assert lacking == sparse.merged(lacking)


def bytes_in(ranges: list[tuple[int, int]]) -> set[int]:
    return {offset for start, end in ranges for offset in range(start, end)}


BOUNDED = """
import resource, sys, pathlib
from drift_fast.checkpoints.remote import open_url
opened = open_url(sys.argv[1], cache=pathlib.Path(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
opened.fetch({"model.safetensors": [(1_000_000, 201_000_000)]})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("ranges", [True, False])
def test_memory_does_not_grow_with_what_is_downloaded(
    server: RangeServer, tmp_path: Path, ranges: bool
) -> None:
    large = tmp_path / "large"
    large.write_bytes(shard_of(10, a=210_000_000)[:1000])
    os.truncate(large, 8 + int.from_bytes(large.read_bytes()[:8], "little") + 210_000_000)
    server.files[f"/m/{SINGLE}"] = large
    server.ranges = ranges
    done = python(BOUNDED, f"{server.url}/m", tmp_path / "cache")
    grown_kib = int(done.stdout)
    assert grown_kib < 40 << 10
