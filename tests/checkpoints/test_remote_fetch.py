"""Only the ranges that are needed are downloaded, and a download that breaks off is resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from email.utils import formatdate
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from drift_fast import system
from drift_fast.checkpoints.remote import RemoteCheckpoint, Transfer, attempts, open_url, sparse
from drift_fast.errors import CheckpointError
from support.processes import Child
from support.range_server import Fault, RangeServer, etag_of
from support.remote import (
    CHANGED,
    FILE,
    GAP_NBYTES,
    INDEX,
    MOMENT,
    SHARDED,
    SHARDS,
    SINGLE,
    START_NBYTES,
    check_held,
    has,
    held,
)
from support.synthetic import refused


def test_only_the_wanted_bytes_cross_the_network(
    opened: RemoteCheckpoint, server: RangeServer
) -> None:
    wanted = [(1_000_000, 1_200_000), (3_000_000, 3_000_001), (4_900_000, 5_000_000)]
    done: list[tuple[int, int]] = []
    transfer = opened.fetch({SINGLE: wanted}, progress=lambda *counts: done.append(counts))
    assert server.nbytes == 300_001
    assert transfer == Transfer(300_001, 300_001, 0, len(FILE))
    assert done[-1] == (300_001, 300_001)
    assert held(opened.directory) == [(0, START_NBYTES), *wanted]
    check_held(opened.directory, {SINGLE: FILE})


def test_ranges_that_lie_close_are_read_as_one_and_others_are_not(
    opened: RemoteCheckpoint, server: RangeServer
) -> None:
    near, far = 1_100_000 + GAP_NBYTES, 3_000_000
    wanted = [(far, far + 10), (near, near + 10), (1_000_000, 1_100_000), (1_050_000, 1_100_000)]
    transfer = opened.fetch({SINGLE: wanted})
    assert sorted(request.nbytes for request in server.requests) == [10, 100_010 + GAP_NBYTES]
    assert transfer.wanted_nbytes == 100_020
    assert transfer.fetched_nbytes == 100_020 + GAP_NBYTES
    assert held(opened.directory)[1:] == [(1_000_000, near + 10), (far, far + 10)]
    server.requests.clear()
    opened.fetch({SINGLE: [(4_000_000, 4_000_010), (4_000_011 + GAP_NBYTES, 4_500_000)]})
    assert len(server.requests) == 2


def test_long_ranges_are_read_in_parts(
    opened: RemoteCheckpoint, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sparse.PART_NBYTES == 16 << 20
    monkeypatch.setattr(sparse, "PART_NBYTES", 300_000)
    opened.fetch({SINGLE: [(1_000_000, 2_000_000)]})
    assert sorted(request.nbytes for request in server.requests) == [100_000, *[300_000] * 3]
    assert has(opened.directory, 1_000_000, 2_000_000)
    check_held(opened.directory, {SINGLE: FILE})


def test_what_is_there_is_not_asked_for_again(
    opened: RemoteCheckpoint, server: RangeServer, tmp_path: Path
) -> None:
    opened.fetch({SINGLE: [(1_000_000, 2_000_000)]})
    server.requests.clear()
    done: list[tuple[int, int]] = []
    again = opened.fetch(
        {SINGLE: [(1_200_000, 1_900_000)]}, progress=lambda *counts: done.append(counts)
    )
    assert done == [(700_000, 700_000)]
    assert again == Transfer(700_000, 0, 700_000, len(FILE))
    assert not server.requests
    later = open_url(f"{server.url}/m", cache=tmp_path / "cache")
    assert later.directory == opened.directory
    first, index = server.requests
    assert first.nbytes == 8
    assert index.status == 404
    server.requests.clear()
    more = later.fetch({SINGLE: [(500_000, 2_500_000)]})
    assert more == Transfer(2_000_000, 1_000_000, 1_000_000, len(FILE))
    assert more.saved_nbytes == len(FILE) - 2_000_000
    assert server.nbytes == 1_000_000
    check_held(opened.directory, {SINGLE: FILE})


def test_shards_are_fetched_together_over_eight_connections(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = dict(SHARDED)
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    server.requests.clear()
    monkeypatch.setattr(sparse, "PART_NBYTES", 100_000)
    server.always = Fault(stall_after=10)
    transfers: list[Transfer] = []
    wanted = {name: [(300_000, 700_000)] for name in SHARDS}
    thread = threading.Thread(target=lambda: transfers.append(opened.fetch(wanted)))
    thread.start()
    server.wait_until(lambda: len(server.requests) == 8)
    time.sleep(MOMENT)
    assert len(server.requests) == 8
    assert len({request.path for request in server.requests}) > 1
    server.released.set()
    thread.join()
    assert transfers == [Transfer(1_200_000, 1_200_000, 0, sum(map(len, SHARDS.values())))]
    for name in SHARDS:
        assert has(opened.directory, 300_000, 700_000, name)
    check_held(opened.directory, SHARDS)


def test_a_range_outside_the_file_or_of_no_shard_is_refused(opened: RemoteCheckpoint) -> None:
    for wrong in [(0, len(FILE) + 1), (5, 4), (-1, 4)]:
        with refused(ValueError, SINGLE, len(FILE)):
            opened.fetch({SINGLE: [wrong]})
    with refused(ValueError, "no shard 'other.safetensors'", SINGLE):
        opened.fetch({"other.safetensors": []})


def test_a_transfer_reads_as_one_line() -> None:
    transfer = Transfer(3_300_000_000, 3_000_000_000, 300_000_000, 32_000_000_000)
    assert str(transfer) == (
        "3.3 of 32.0 GB needed (10 %), 3.0 GB downloaded, 0.3 GB from the cache"
    )
    assert transfer.saved_nbytes == 28_700_000_000
    assert str(Transfer(5, 5, 0, 10)).startswith("5 of 10 bytes needed (50 %)")
    assert Transfer(5, 20, 0, 10).saved_nbytes == 0


def test_small_files_are_there_when_asked_for(
    opened: RemoteCheckpoint, server: RangeServer
) -> None:
    path = opened.optional_file("config.json")
    assert path == opened.directory / "config.json"
    assert path.read_bytes() == b'{"a": 1}'
    assert opened.optional_file("tokenizer.json") is None
    del server.files["/m/config.json"]
    assert opened.optional_file("config.json") is None
    assert not path.exists()
    server.files["/m/config.json"] = b"{}"
    server.always = Fault(body=b"<html>", headers={"Content-Type": "text/html; charset=utf-8"})
    with refused(CheckpointError, "config.json", "web page"):
        opened.optional_file("config.json")


@pytest.mark.parametrize("name", ["../x.json", "a/b.json", "", ".netrc", SINGLE, INDEX])
def test_only_plain_names_of_small_files_are_asked_for(
    opened: RemoteCheckpoint, server: RangeServer, name: str
) -> None:
    with refused(ValueError, "plain name"):
        opened.optional_file(name)
    assert not server.requests


# ------------------------------------------------------------------ interruptions


def test_a_dropped_connection_goes_on_after_the_last_byte(
    opened: RemoteCheckpoint, server: RangeServer, waits: list[float]
) -> None:
    server.faults.extend([Fault(drop_after=200_000), Fault(silent=True), Fault(drop_after=1)])
    transfer = opened.fetch({SINGLE: [(1_000_000, 1_500_000)]})
    starts = [re.match(r"bytes=(\d+)-", request.headers["range"]) for request in server.requests]
    assert [int(start[1]) for start in starts if start] == [
        1_000_000,
        1_200_000,
        1_200_000,
        1_200_001,
    ]
    assert server.nbytes == transfer.fetched_nbytes == 500_000
    assert len(waits) == 3
    check_held(opened.directory, {SINGLE: FILE})
    assert has(opened.directory, 1_000_000, 1_500_000)


def test_after_six_attempts_without_progress_it_says_where_and_why(
    opened: RemoteCheckpoint, server: RangeServer, waits: list[float]
) -> None:
    server.always = Fault(drop_after=0)
    with refused(CheckpointError, f"{server.url}/m/{SINGLE}", "1000000 to 1500000", "attempts"):
        opened.fetch({SINGLE: [(1_000_000, 1_500_000)]})
    assert len(server.requests) == 6
    assert len(waits) == 5
    for number, (earlier, later) in enumerate(pairwise(waits)):
        assert 0.5 * 2**number <= earlier <= 2**number
        assert earlier < 2 * later
    assert held(opened.directory) == [(0, START_NBYTES)]


def test_a_connection_that_ends_early_without_a_stated_length_is_one_that_dropped(
    opened: RemoteCheckpoint, server: RangeServer, waits: list[float]
) -> None:
    server.lengths = False
    server.faults.append(Fault(drop_after=400))
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert [request.nbytes for request in server.requests] == [400, 600]
    server.always = Fault(drop_after=0)
    with refused(CheckpointError, "attempts", "1000 bytes early"):
        opened.fetch({SINGLE: [(2_000_000, 2_001_000)]})
    check_held(opened.directory, {SINGLE: FILE})


def test_progress_begins_the_count_of_attempts_anew_and_what_came_is_kept(
    opened: RemoteCheckpoint, server: RangeServer
) -> None:
    server.faults.extend([Fault(drop_after=1000)] * 20)
    server.always = Fault(status=500)
    with refused(CheckpointError, "500"):
        opened.fetch({SINGLE: [(1_000_000, 1_500_000)]})
    assert len(server.requests) == 26
    assert held(opened.directory)[1:] == [(1_000_000, 1_020_000)]
    server.always = None
    assert opened.fetch({SINGLE: [(1_000_000, 1_500_000)]}).cached_nbytes == 20_000
    check_held(opened.directory, {SINGLE: FILE})


def test_a_server_that_is_not_there_is_named(waits: list[float], tmp_path: Path) -> None:
    with RangeServer({}) as gone:
        url = f"{gone.url}/m/{SINGLE}"
    with refused(CheckpointError, url, "refused"):
        open_url(url, cache=tmp_path)
    assert len(waits) == 5


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_says_when_is_asked_again_then(
    opened: RemoteCheckpoint, server: RangeServer, waits: list[float], status: int
) -> None:
    date = formatdate(time.time() + 60, usegmt=True)
    for text in ["7", date, "100000", formatdate(time.time() - 60, usegmt=True), "soon", "-3"]:
        server.faults.append(Fault(status=status, headers={"Retry-After": text}))
        server.faults.append(Fault(drop_after=10))
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    asked = waits[::2]
    assert asked[0] == 7
    assert 50 < asked[1] <= 60
    assert asked[2] == 300
    assert asked[3] == 0
    assert all(0.5 <= seconds <= 1 for seconds in asked[4:])


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(
    opened: RemoteCheckpoint, server: RangeServer, waits: list[float], status: int
) -> None:
    server.faults.append(Fault(status=status))
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert len(waits) == 1
    server.always = Fault(status=status)
    with refused(CheckpointError, status, "attempts"):
        opened.fetch({SINGLE: [(2_000_000, 2_001_000)]})


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, CheckpointError),
        (403, CheckpointError),
        (404, FileNotFoundError),
        (400, CheckpointError),
    ],
)
def test_a_refusal_is_final(
    opened: RemoteCheckpoint,
    server: RangeServer,
    waits: list[float],
    status: int,
    error: type[Exception],
) -> None:
    server.always = Fault(status=status, headers={"Retry-After": "1"})
    with refused(error, f"{server.url}/m/{SINGLE}", status):
        opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert len(server.requests) == 1
    assert not waits


def test_a_failure_of_one_part_ends_the_others(
    opened: RemoteCheckpoint, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "PART_NBYTES", 100_000)
    server.faults.extend([None, None, Fault(status=404)])
    server.always = Fault(stall_after=1000)
    with refused(FileNotFoundError, "404"):
        opened.fetch({SINGLE: [(1_000_000, 4_000_000)]})
    server.released.set()
    server.always = None
    check_held(opened.directory, {SINGLE: FILE})
    opened.fetch({SINGLE: [(1_000_000, 4_000_000)]})
    assert has(opened.directory, 1_000_000, 4_000_000)
    check_held(opened.directory, {SINGLE: FILE})


KILLED = """
import sys, pathlib
from drift_fast.checkpoints.remote import open_url, sparse
sparse.PART_NBYTES = 300_000
opened = open_url(sys.argv[1], cache=pathlib.Path(sys.argv[2]))
opened.fetch({"model.safetensors": [(1_000_000, 4_900_000)]})
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_in_the_middle_is_gone_on_with(
    server: RangeServer, tmp_path: Path, how: signal.Signals
) -> None:
    # The start of the file, a look for an index, four parts, and eight that never end.
    server.faults.extend([None] * 6)
    server.always = Fault(stall_after=50_000)
    child = Child(sys.executable, "-c", KILLED, f"{server.url}/m", tmp_path)
    child.wait_until(
        lambda: (
            sum(request.nbytes == 50_000 for request in list(server.requests)) == 8
            and any(
                sum(end - start for start, end in held(path.parent)) >= START_NBYTES + 1_200_000
                for path in tmp_path.rglob(SINGLE)
            )
        )
    )
    child.send(how)
    # Left to itself the child would wait for the server, and the server for this test.
    ended = child.finish(20)
    assert ended.returncode != 0
    assert ("KeyboardInterrupt" in ended.stderr) == (how == signal.SIGINT)
    server.always = None
    directory = next(tmp_path.rglob(SINGLE)).parent
    check_held(directory, {SINGLE: FILE})
    kept = sum(end - start for start, end in held(directory)) - START_NBYTES
    assert kept >= 1_200_000
    server.requests.clear()
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    transfer = opened.fetch({SINGLE: [(1_000_000, 4_900_000)]})
    assert transfer.cached_nbytes == kept
    sent = sum(request.nbytes for request in server.requests if request.status != 404)
    assert sent == 8 + transfer.fetched_nbytes
    assert transfer.fetched_nbytes == 3_900_000 - kept
    assert has(directory, 1_000_000, 4_900_000)
    check_held(directory, {SINGLE: FILE})


def test_an_interrupt_ends_the_threads_and_leaves_a_consistent_cache(
    opened: RemoteCheckpoint, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "PART_NBYTES", 100_000)

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened.fetch({SINGLE: [(1_000_000, 4_000_000)]}, progress=interrupt)
    server.wait_until(
        lambda: not any(thread.name.startswith("drift_fast") for thread in threading.enumerate())
    )
    check_held(opened.directory, {SINGLE: FILE})
    assert opened.fetch({SINGLE: [(1_000_000, 4_000_000)]}).wanted_nbytes == 3_000_000
    check_held(opened.directory, {SINGLE: FILE})


def test_threads_that_hang_do_not_hold_up_an_interrupt_and_list_nothing_after_it(
    opened: RemoteCheckpoint, server: RangeServer
) -> None:
    server.always = Fault(stall_after=100_000)

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened.fetch({SINGLE: [(1_000_000, 4_000_000)]}, progress=interrupt)
    with sparse.locked(opened.directory):
        before = held(opened.directory)
        server.released.set()
        server.wait_until(
            lambda: (
                not any(thread.name.startswith("drift_fast") for thread in threading.enumerate())
            )
        )
        assert held(opened.directory) == before


def test_a_thread_left_behind_writes_nothing_to_a_list_that_is_no_longer_its_own(
    opened: RemoteCheckpoint,
) -> None:
    shard = sparse.SparseShard.load(opened.directory / SINGLE)
    assert shard is not None
    before = held(opened.directory)
    with pytest.raises(attempts.Stopped), shard.write_parts() as write:  # noqa: PT012
        write(1_000_000, FILE[1_000_000:1_000_100])
        shard.close()
    assert held(opened.directory) == before


def test_a_range_is_listed_only_once_its_bytes_are_on_the_disk(
    opened: RemoteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = (1_000_000, 1_100_000)
    flushed: list[tuple[str, bool]] = []
    flush = system.flush

    def watched(file: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        flushed.append((name, has(opened.directory, *wanted)))
        if name == SINGLE:
            assert (opened.directory / SINGLE).read_bytes()[slice(*wanted)] == FILE[slice(*wanted)]
        flush(file)

    monkeypatch.setattr(system, "flush", watched)
    opened.fetch({SINGLE: [wanted]})
    assert flushed == [(SINGLE, False), (f".{SINGLE}.ranges.json.partial", False)]
    assert has(opened.directory, *wanted)


def test_a_shard_never_stands_without_the_list_of_its_own_ranges(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    opened.fetch({SINGLE: [(1_000_000, 2_000_000)]})
    server.files[f"/m/{SINGLE}"] = CHANGED
    seen: list[bytes | None] = []

    def look() -> None:
        stored = json.loads((opened.directory / f"{SINGLE}.ranges.json").read_text())
        standing = (opened.directory / SINGLE).exists()
        content = {etag_of(data): data for data in (FILE, CHANGED)}[stored["etag"]]
        if standing:
            check_held(opened.directory, {SINGLE: content})
        seen.append(content if standing else None)

    for name, original in [("unlink", Path.unlink), ("replace", Path.replace)]:

        def watched(*given: Any, function: Any = original, **named: Any) -> Any:
            look()
            result = function(*given, **named)
            look()
            return result

        monkeypatch.setattr(Path, name, watched)
    open_url(f"{server.url}/m", cache=tmp_path)
    assert [content for content, _ in groupby(seen)] == [FILE, None, CHANGED]


# ------------------------------------------------------------------ servers without ranges


def test_a_server_that_ignores_ranges_is_read_once_and_only_what_is_wanted_is_kept(
    server: RangeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.ranges = False
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    assert held(opened.directory) == [(0, START_NBYTES)]
    server.requests.clear()
    wanted = [(1_000_000, 1_000_010), (2_000_000, 2_300_000), (4_000_000, 4_100_000)]
    done: list[tuple[int, int]] = []
    transfer = opened.fetch({SINGLE: wanted}, progress=lambda *counts: done.append(counts))
    assert len(server.requests) == 1
    assert "range" not in server.requests[0].headers
    assert transfer == Transfer(400_010, 4_100_000, 0, len(FILE))
    assert held(opened.directory) == [(0, START_NBYTES), *wanted]
    assert done[-1] == (400_010, 400_010)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ignores range requests" in caplog.text
    assert "4100000 bytes crossed" in caplog.text
    check_held(opened.directory, {SINGLE: FILE})


def test_a_server_that_stops_giving_ranges_in_the_middle_is_read_from_the_start(
    opened: RemoteCheckpoint, server: RangeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.ranges = False
    opened.fetch({SINGLE: [(1_000_000, 1_100_000), (3_000_000, 3_100_000)]})
    assert "ignores range requests" in caplog.text
    assert held(opened.directory)[1:] == [(1_000_000, 1_100_000), (3_000_000, 3_100_000)]
    check_held(opened.directory, {SINGLE: FILE})


def test_without_ranges_a_drop_begins_again_and_gives_up_only_without_progress(
    opened: RemoteCheckpoint, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "PART_NBYTES", 64 << 10)
    server.ranges = False
    server.faults.append(None)
    server.faults.extend(Fault(drop_after=1_000_000 + 50_000 * number) for number in range(10))
    written: list[int] = []
    write = sparse._write

    def watched(file: int, offset: int, data: bytes) -> None:
        if offset:
            written.append(len(data))
        write(file, offset, data)

    monkeypatch.setattr(sparse, "_write", watched)
    lists: list[Path] = []
    replace = sparse.write_atomically
    monkeypatch.setattr(
        sparse, "write_atomically", lambda path, data: (lists.append(path), replace(path, data))
    )
    opened.fetch({SINGLE: [(1_000_000, 2_000_000)]})
    assert sum(written) == 1_000_000
    # Nor would a kill have lost more than a part.
    assert len(lists) >= 1_000_000 // (128 << 10)
    assert has(opened.directory, 1_000_000, 2_000_000)
    check_held(opened.directory, {SINGLE: FILE})
    server.faults.append(Fault(drop_after=3_500_000))
    server.always = Fault(drop_after=1_000_000)
    with refused(CheckpointError, SINGLE, "attempts"):
        opened.fetch({SINGLE: [(3_000_000, 4_000_000)]})
    assert held(opened.directory)[-1] == (3_000_000, 3_500_000)
    check_held(opened.directory, {SINGLE: FILE})


def test_a_server_that_says_no_length_is_refused(server: RangeServer, tmp_path: Path) -> None:
    server.ranges = server.lengths = False
    with refused(CheckpointError, SINGLE, "how long"):
        open_url(f"{server.url}/m", cache=tmp_path)
