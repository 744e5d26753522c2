"""A checkpoint on a server: only what is needed crosses the network, and nothing is believed."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import formatdate
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from drift_fast import _core
from drift_fast.checkpoints.remote import (
    RemoteCheckpoint,
    Transfer,
    attempts,
    default_cache,
    open_url,
    sparse,
)
from drift_fast.checkpoints.remote.hub import open_hub
from drift_fast.errors import CheckpointError, DriftError
from support.range_server import Content, Fault, HubServer, RangeServer, etag_of
from support.synthetic import refused

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
START_NBYTES = 256 << 10
GAP_NBYTES = 256 << 10
KB = 1000
# A wait long enough for a thread that must not move to have moved.
MOMENT = 0.2


def shard_of(seed: int, header_nbytes: int = 0, **tensors: int) -> bytes:
    """Return a file of random bytes in U8 tensors of these lengths, its header padded."""
    header: dict[str, Any] = {}
    begin = 0
    for name, nbytes in tensors.items():
        header[name] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    text = json.dumps(header).encode().ljust(header_nbytes)
    return len(text).to_bytes(8, "little") + text + np.random.default_rng(seed).bytes(begin)


def index_of(**places: Any) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": places}).encode()


FILE = shard_of(1, a=3_000_000, b=2_000_000)
CHANGED = shard_of(7, a=3_000_000, b=2_000_000)
SHARDS = {
    "model-00001-of-00003.safetensors": shard_of(2, a=900_000),
    "model-00002-of-00003.safetensors": shard_of(3, b=800_000),
    "model-00003-of-00003.safetensors": shard_of(4, c=700_000),
}
SHARDED = {
    **{f"/m/{name}": data for name, data in SHARDS.items()},
    f"/m/{INDEX}": index_of(**dict(zip("abc", SHARDS, strict=True))),
}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited; the spread of waits is seeded."""
    waited: list[float] = []
    monkeypatch.setattr(attempts, "sleep", lambda seconds, stop: waited.append(seconds))
    monkeypatch.setattr(attempts, "jitter", random.Random(0))
    return waited


@pytest.fixture
def server(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """A single file and its configuration under /m, with no proxy in between."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with RangeServer({f"/m/{SINGLE}": FILE, "/m/config.json": b'{"a": 1}'}) as started:
        yield started


@pytest.fixture
def opened(server: RangeServer, tmp_path: Path) -> RemoteCheckpoint:
    """The single file, opened; what the server did for it is forgotten."""
    checkpoint = open_url(f"{server.url}/m", cache=tmp_path / "cache")
    server.requests.clear()
    return checkpoint


def held(directory: Path, name: str = SINGLE) -> list[tuple[int, int]]:
    stored = json.loads((directory / f"{name}.ranges.json").read_text())
    return [(start, end) for start, end in stored["ranges"]]


def check_held(directory: Path, source: Mapping[str, bytes]) -> None:
    """Check that each shard has the source's length, and its bytes where the list says so."""
    for name, data in source.items():
        assert (directory / name).stat().st_size == len(data)
        local = (directory / name).read_bytes()
        for start, end in held(directory, name):
            assert local[start:end] == data[start:end]


def has(directory: Path, start: int, end: int, name: str = SINGLE) -> bool:
    return any(begin <= start and end <= stop for begin, stop in held(directory, name))


# ------------------------------------------------------------------ opening


def test_opening_downloads_the_start_of_the_file_and_opens_as_a_checkpoint(
    server: RangeServer, tmp_path: Path
) -> None:
    opened = open_url(f"{server.url}/m/", cache=tmp_path)
    assert [
        (name, shape) for name, _, shape, _ in _core.Checkpoint(opened.directory).tensors()
    ] == [
        ("a", [3_000_000]),
        ("b", [2_000_000]),
    ]
    assert held(opened.directory) == [(0, START_NBYTES)]
    assert [request.headers["range"] for request in server.requests] == ["bytes=0-262143"]
    assert server.nbytes == START_NBYTES
    check_held(opened.directory, {SINGLE: FILE})


def test_a_shard_is_a_file_of_holes(opened: RemoteCheckpoint) -> None:
    found = (opened.directory / SINGLE).stat()
    assert found.st_size == len(FILE)
    assert found.st_blocks * 512 < 2 * START_NBYTES


def test_the_list_of_ranges_has_its_documented_form(
    opened: RemoteCheckpoint, server: RangeServer
) -> None:
    stored = json.loads((opened.directory / f"{SINGLE}.ranges.json").read_text())
    assert stored == {
        "format_version": 1,
        "nbytes": len(FILE),
        "etag": opened.etags[SINGLE],
        "last_modified": None,
        "ranges": [[0, START_NBYTES]],
    }
    assert opened.etags[SINGLE].startswith('"')


def test_a_file_of_another_name_is_the_single_file_of_its_directory(
    server: RangeServer, tmp_path: Path
) -> None:
    server.files["/m/weights v2.safetensors"] = FILE
    opened = open_url(f"{server.url}/m/weights%20v2.safetensors", cache=tmp_path)
    assert len(_core.Checkpoint(opened.directory).tensors()) == 2
    assert list(opened.etags) == [SINGLE]


@pytest.mark.parametrize("place", ["/m", "/m/", f"/m/{INDEX}", "/m/other.safetensors.index.json"])
def test_an_index_brings_all_shards(server: RangeServer, tmp_path: Path, place: str) -> None:
    server.files = {**SHARDED, "/m/other.safetensors.index.json": SHARDED[f"/m/{INDEX}"]}
    opened = open_url(server.url + place, cache=tmp_path)
    assert sorted(opened.etags) == sorted(SHARDS)
    tensors = _core.Checkpoint(opened.directory).tensors()
    assert sorted(name for name, _, _, _ in tensors) == ["a", "b", "c"]
    check_held(opened.directory, SHARDS)


def test_a_directory_that_becomes_one_of_shards_no_longer_opens_as_the_single_file(
    server: RangeServer, tmp_path: Path
) -> None:
    first = open_url(f"{server.url}/m", cache=tmp_path)
    server.files = dict(SHARDED)
    second = open_url(f"{server.url}/m", cache=tmp_path)
    assert first.directory == second.directory
    assert len(_core.Checkpoint(second.directory).tensors()) == 3
    server.files = {f"/m/{SINGLE}": FILE}
    third = open_url(f"{server.url}/m", cache=tmp_path)
    assert len(_core.Checkpoint(third.directory).tensors()) == 2


def test_a_query_is_sent_but_neither_shown_nor_stored(
    server: RangeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.files = dict(SHARDED)
    opened = open_url(f"{server.url}/m/{INDEX}?key=hush#part", cache=tmp_path)
    opened.fetch({name: [(300_000, 500_000)] for name in SHARDS})
    assert opened.url == f"{server.url}/m/{INDEX}"
    assert {request.target.partition("?")[2] for request in server.requests} == {"key=hush"}
    assert_unseen("hush", tmp_path, caplog.text)
    assert "GET /m/model-00001" in caplog.text


def test_a_directory_without_checkpoint_is_no_such_file(
    server: RangeServer, tmp_path: Path
) -> None:
    with refused(FileNotFoundError, server.url, SINGLE, INDEX, "404"):
        open_url(f"{server.url}/elsewhere", cache=tmp_path)
    with refused(FileNotFoundError, f"{server.url}/m/no.safetensors", "404"):
        open_url(f"{server.url}/m/no.safetensors", cache=tmp_path)


def test_a_storage_service_that_forbids_what_does_not_exist_is_asked_for_the_index(
    server: RangeServer, tmp_path: Path
) -> None:
    server.files = dict(SHARDED)
    server.faults.append(Fault(status=403))
    assert len(open_url(f"{server.url}/m", cache=tmp_path).etags) == 3
    server.always = Fault(status=403)
    with refused(CheckpointError, SINGLE, "403"):
        open_url(f"{server.url}/m", cache=tmp_path)


@pytest.mark.parametrize(
    "url",
    ["ftp://host/model.safetensors", "model.safetensors", "http:///m", "http://[::1", "//h/m"],
)
def test_what_is_no_http_url_is_refused(tmp_path: Path, url: str) -> None:
    with refused(CheckpointError, "http"):
        open_url(url, cache=tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_directory_with_only_a_pickle_says_convert(
    server: RangeServer, tmp_path: Path, name: str
) -> None:
    server.files = {f"/m/{name}": b"x" * 100}
    with refused(CheckpointError, name, "convert it to safetensors"):
        open_url(f"{server.url}/m", cache=tmp_path)
    server.requests.clear()
    with refused(CheckpointError, name, "convert it to safetensors"):
        open_url(f"{server.url}/m/{name}", cache=tmp_path)
    assert not server.requests


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "",
        "..",
        ".hidden.safetensors",
        "weights.h5",
        "http://other/model.safetensors",
        "a\nb.safetensors",
        "a\ud800.safetensors",
        "é" * 120 + ".safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_that_names_anything_but_a_shard_beside_it_is_refused_before_it_is_asked_for(
    server: RangeServer, tmp_path: Path, file: object
) -> None:
    server.files[f"/m/{INDEX}"] = index_of(good="x.safetensors", layer=file)
    with refused(CheckpointError, INDEX, "layer", "plain name"):
        open_url(f"{server.url}/m/{INDEX}", cache=tmp_path)
    assert {request.path for request in server.requests} == {f"/m/{INDEX}"}


def test_a_shard_of_an_odd_but_plain_name_is_asked_for_by_that_name(
    server: RangeServer, tmp_path: Path
) -> None:
    name = "a #1?%41é.safetensors"
    data = shard_of(11, a=10)
    server.files = {f"/m/{INDEX}": index_of(a=name), f"/m/{name}": data}
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    check_held(opened.directory, {name: data})


def test_an_index_of_pickles_says_convert(server: RangeServer, tmp_path: Path) -> None:
    server.files[f"/m/{INDEX}"] = index_of(layer="pytorch_model-00001.bin")
    with refused(CheckpointError, "layer", "convert it to safetensors"):
        open_url(f"{server.url}/m/{INDEX}", cache=tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"not json",
        b"[]",
        b"3",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b"[" * 100_000,
        index_of(a=SINGLE, b="x.safetensors"),
    ],
)
def test_what_is_no_index_is_refused(server: RangeServer, tmp_path: Path, index: bytes) -> None:
    server.files[f"/m/{INDEX}"] = index
    with refused(CheckpointError, INDEX):
        open_url(f"{server.url}/m/{INDEX}", cache=tmp_path)


def test_an_index_without_end_is_given_up(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drift_fast.checkpoints.remote import url

    monkeypatch.setattr(url, "SMALL_NBYTES", 1000)
    server.files[f"/m/{INDEX}"] = b" " * 3_000_000
    with refused(CheckpointError, INDEX, "longer", 1000):
        open_url(f"{server.url}/m/{INDEX}", cache=tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_header_longer_than_the_first_request_is_read_to_its_end(
    server: RangeServer, tmp_path: Path, ranges: bool
) -> None:
    data = shard_of(5, header_nbytes=700_000, a=2_000_000)
    server.files[f"/m/{SINGLE}"] = data
    server.ranges = ranges
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    assert held(opened.directory) == [(0, 700_008)]
    assert len(_core.Checkpoint(opened.directory).tensors()) == 1
    check_held(opened.directory, {SINGLE: data})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (100_000_001).to_bytes(8, "little") + b" " * 1000,
        (2**63).to_bytes(8, "little") + b" " * 1000,
        (1001).to_bytes(8, "little") + b" " * 1000,
    ],
)
def test_a_file_whose_first_bytes_give_no_header_is_refused(
    server: RangeServer, tmp_path: Path, data: bytes
) -> None:
    server.files[f"/m/{SINGLE}"] = data
    with refused(CheckpointError, SINGLE):
        open_url(f"{server.url}/m", cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_header_beyond_what_the_format_allows_is_refused_however_long_the_file(
    server: RangeServer, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(large, 200_000_000)
    server.files[f"/m/{SINGLE}"] = large
    with refused(CheckpointError, SINGLE, "100000001", "the format allows 100000000"):
        open_url(f"{server.url}/m", cache=tmp_path / "cache")
    assert server.nbytes == START_NBYTES


def test_a_file_of_just_a_header_opens(server: RangeServer, tmp_path: Path) -> None:
    data = shard_of(6, a=0)
    server.files[f"/m/{SINGLE}"] = data
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    assert held(opened.directory) == [(0, len(data))]
    assert opened.fetch({SINGLE: [(0, len(data)), (len(data), len(data))]}).fetched_nbytes == 0


# ------------------------------------------------------------------ only what is needed


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
    assert server.nbytes == 8
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
    before = time.monotonic()
    with refused(FileNotFoundError, "404"):
        opened.fetch({SINGLE: [(1_000_000, 4_000_000)]})
    assert time.monotonic() - before < 30
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
print("ready", flush=True)
opened = open_url(sys.argv[1], cache=pathlib.Path(sys.argv[2]))
opened.fetch({"model.safetensors": [(1_000_000, 4_900_000)]})
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_in_the_middle_is_gone_on_with(
    server: RangeServer, tmp_path: Path, how: signal.Signals
) -> None:
    # The start of the file, four parts, and eight that never end.
    server.faults.extend([None] * 5)
    server.always = Fault(stall_after=50_000)
    command = [sys.executable, "-c", KILLED, f"{server.url}/m", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        server.wait_until(
            lambda: (
                sum(request.nbytes == 50_000 for request in list(server.requests)) == 8
                and any(
                    sum(end - start for start, end in held(path.parent)) >= START_NBYTES + 1_200_000
                    for path in tmp_path.rglob(SINGLE)
                )
            )
        )
        child.send_signal(how)
        # Left to itself the child would wait for the server, and the server for this test.
        _, text = child.communicate(timeout=20)
    assert child.returncode != 0
    assert ("KeyboardInterrupt" in text) == (how == signal.SIGINT)
    server.always = None
    directory = next(tmp_path.rglob(SINGLE)).parent
    check_held(directory, {SINGLE: FILE})
    kept = sum(end - start for start, end in held(directory)) - START_NBYTES
    assert kept >= 1_200_000
    server.requests.clear()
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    transfer = opened.fetch({SINGLE: [(1_000_000, 4_900_000)]})
    assert transfer.cached_nbytes == kept
    assert server.nbytes == 8 + transfer.fetched_nbytes
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
    flush = sparse._flush

    def watched(file: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        flushed.append((name, has(opened.directory, *wanted)))
        if name == SINGLE:
            assert (opened.directory / SINGLE).read_bytes()[slice(*wanted)] == FILE[slice(*wanted)]
        flush(file)

    monkeypatch.setattr(sparse, "_flush", watched)
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


# ------------------------------------------------------------------ answers that are not believed


def without(text: str) -> dict[str, str | None]:
    return {text: None}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(headers={"Content-Range": "bytes 0-999/5000150"}), ["Content-Range"]),
        (Fault(headers={"Content-Range": "bytes 1000001-1000999/9999999"}), ["Content-Range"]),
        (Fault(headers={"Content-Range": "bytes 1000000-1001000/9999999"}), ["Content-Range"]),
        (Fault(headers={"Content-Range": "bytes 1000000-999998/9999999"}), ["Content-Range"]),
        (
            Fault(headers={"Content-Range": "bytes 1000000-999999/9999999"}, body=b""),
            ["Content-Range"],
        ),
        (
            Fault(
                headers={"Content-Range": f"bytes 1000000-1001000/{len(FILE)}"},
                body=FILE[1_000_000:1_001_001],
            ),
            ["Content-Range"],
        ),
        (Fault(headers={"Content-Range": "bytes 1000000-1000999/*"}), ["Content-Range"]),
        (Fault(headers={"Content-Range": "garbage"}), ["Content-Range", "garbage"]),
        (Fault(headers=without("Content-Range")), ["Content-Range"]),
        (Fault(headers={"Content-Range": "bytes 1000000-1000999/9999999"}), ["changed"]),
        (Fault(body=FILE[1_000_000:1_001_001]), ["Content-Length 1001"]),
        (Fault(body=FILE[1_000_000:1_000_999]), ["Content-Length 999"]),
        (
            Fault(
                body=FILE[1_000_000:1_001_001],
                headers={"Content-Length": None, "Connection": "close"},
            ),
            ["longer than its range"],
        ),
        (Fault(headers={"Content-Type": "Text/HTML"}), ["web page"]),
        (Fault(headers={"Content-Encoding": "gzip"}), ["gzip"]),
        (Fault(status=416), ["416"]),
        (Fault(status=204), ["204"]),
        (Fault(status=304), ["304"]),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(
    opened: RemoteCheckpoint,
    server: RangeServer,
    waits: list[float],
    fault: Fault,
    words: list[str],
) -> None:
    server.faults.append(fault)
    with refused(CheckpointError, f"{server.url}/m/{SINGLE}", *words):
        opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert len(server.requests) == 1
    assert not waits
    check_held(opened.directory, {SINGLE: FILE})


def test_a_server_may_send_less_than_it_was_asked_for(
    opened: RemoteCheckpoint, server: RangeServer, waits: list[float]
) -> None:
    total = len(FILE)
    server.faults.append(
        Fault(
            body=FILE[1_000_000:1_000_400],
            headers={"Content-Range": f"bytes 1000000-1000399/{total}"},
        )
    )
    assert opened.fetch({SINGLE: [(1_000_000, 1_001_000)]}).fetched_nbytes == 1000
    assert [request.nbytes for request in server.requests] == [400, 600]
    assert not waits
    check_held(opened.directory, {SINGLE: FILE})


def test_a_file_shorter_than_its_first_answer_said_is_refused(
    opened: RemoteCheckpoint, server: RangeServer
) -> None:
    server.files[f"/m/{SINGLE}"] = FILE[:500_000]
    with refused(CheckpointError, "416", "has changed"):
        opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    with refused(CheckpointError, "changed", 500_000):
        opened.fetch({SINGLE: [(400_000, 1_001_000)]})


def change_etag(server: RangeServer) -> None:
    server.files[f"/m/{SINGLE}"] = CHANGED


def drop_etag(server: RangeServer) -> None:
    server.etags = False


def change_time(server: RangeServer) -> None:
    server.last_modified = "Tue, 02 Jan 2029 00:00:00 GMT"


def change_length(server: RangeServer) -> None:
    server.files[f"/m/{SINGLE}"] = FILE + b"1"


@pytest.mark.parametrize(
    ("etags", "change"),
    [(True, change_etag), (True, drop_etag), (False, change_time), (False, change_length)],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changes_in_the_middle_is_an_error_and_opening_again_reads_it_afresh(
    server: RangeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    etags: bool,
    change: Callable[[RangeServer], None],
    ranges: bool,
) -> None:
    monkeypatch.setattr(sparse, "PART_NBYTES", 100_000)
    server.etags, server.ranges = etags, ranges
    server.last_modified = "Mon, 01 Jan 2029 00:00:00 GMT"
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    opened.fetch({SINGLE: [(1_000_000, 1_500_000)]})
    check_held(opened.directory, {SINGLE: FILE})
    change(server)
    with refused(CheckpointError, f"{server.url}/m/{SINGLE}", "the file changed on the server"):
        opened.fetch({SINGLE: [(2_000_000, 3_000_000)]})
    check_held(opened.directory, {SINGLE: FILE})
    now = server.files[f"/m/{SINGLE}"]
    assert isinstance(now, bytes)
    afresh = open_url(f"{server.url}/m", cache=tmp_path)
    assert afresh.directory == opened.directory
    assert held(afresh.directory) == [(0, START_NBYTES)]
    afresh.fetch({SINGLE: [(2_000_000, 3_000_000)]})
    check_held(afresh.directory, {SINGLE: now})
    with refused(CheckpointError, "open the checkpoint again"):
        opened.fetch({SINGLE: [(1_000_000, 1_500_000)]})


def test_a_change_between_two_requests_of_one_fetch_is_seen(
    opened: RemoteCheckpoint, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "PART_NBYTES", 100_000)
    server.change = (5, lambda: change_etag(server))
    with refused(CheckpointError, "the file changed on the server"):
        opened.fetch({SINGLE: [(1_000_000, 4_000_000)]})
    check_held(opened.directory, {SINGLE: FILE})


def test_without_etag_and_time_the_first_bytes_tell_another_file_of_that_length(
    server: RangeServer, tmp_path: Path
) -> None:
    server.etags = False
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    assert opened.etags == {SINGLE: None}
    opened.fetch({SINGLE: [(1_000_000, 1_500_000)]})
    open_url(f"{server.url}/m", cache=tmp_path)
    assert has(opened.directory, 1_000_000, 1_500_000)
    server.files[f"/m/{SINGLE}"] = shard_of(8, header_nbytes=1000, a=len(FILE) - 1008)
    open_url(f"{server.url}/m", cache=tmp_path)
    assert held(opened.directory) == [(0, START_NBYTES)]


# ------------------------------------------------------------------ redirects and secrets


def assert_unseen(secret: str, directory: Path, *texts: str) -> None:
    for text in texts:
        assert secret not in text
    for path in directory.rglob("*"):
        assert secret not in str(path)
        if path.is_file() and not path.is_symlink():
            assert secret.encode() not in path.read_bytes()


@pytest.fixture
def cdn() -> Iterator[RangeServer]:
    """A second server, on another port."""
    with RangeServer({"/blob": FILE}) as started:
        yield started


def test_a_redirect_is_followed_and_remembered_until_its_signature_expires(
    opened: RemoteCheckpoint, server: RangeServer, cdn: RangeServer, waits: list[float]
) -> None:
    server.redirects[f"/m/{SINGLE}"] = lambda request: f"{cdn.url}/blob?sig=n{len(server.requests)}"
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    opened.fetch({SINGLE: [(2_000_000, 2_001_000)]})
    assert [request.target for request in cdn.requests] == ["/blob?sig=n1"] * 2
    cdn.faults.append(Fault(status=403))
    opened.fetch({SINGLE: [(3_000_000, 3_001_000)]})
    assert [request.target for request in cdn.requests][2:] == ["/blob?sig=n1", "/blob?sig=n2"]
    assert not waits
    check_held(opened.directory, {SINGLE: FILE})
    cdn.always = Fault(status=403)
    with refused(CheckpointError, f"{server.url}/m/{SINGLE}", "403"):
        opened.fetch({SINGLE: [(4_000_000, 4_001_000)]})
    assert len(server.requests) == 3


def test_after_trouble_at_the_other_end_of_a_redirect_the_url_itself_is_asked(
    opened: RemoteCheckpoint, server: RangeServer, cdn: RangeServer
) -> None:
    server.redirects[f"/m/{SINGLE}"] = f"{cdn.url}/blob"
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    for fault in [Fault(status=503), Fault(silent=True)]:
        cdn.faults.append(fault)
        server.requests.clear()
        start = 2_000_000 if fault.silent else 3_000_000
        opened.fetch({SINGLE: [(start, start + 1000)]})
        assert len(server.requests) == 1
    check_held(opened.directory, {SINGLE: FILE})


def test_a_redirect_loop_ends(opened: RemoteCheckpoint, server: RangeServer) -> None:
    server.redirects[f"/m/{SINGLE}"] = f"/m/{SINGLE}"
    with refused(CheckpointError, f"{server.url}/m/{SINGLE}", "more than 10 redirects"):
        opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert len(server.requests) == 11


@pytest.mark.parametrize(
    "place",
    ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://u:hush@127.0.0.1/x", "", "http://["],
)
def test_a_redirect_to_what_is_no_plain_http_url_is_refused(
    opened: RemoteCheckpoint, server: RangeServer, place: str
) -> None:
    server.redirects[f"/m/{SINGLE}"] = place
    with refused(CheckpointError, f"{server.url}/m/{SINGLE}", "redirects") as caught:
        opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert caught is None
    assert len(server.requests) == 1


def test_a_redirect_out_of_encryption_is_refused(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests
    from urllib3.response import HTTPResponse

    sent: list[str | None] = []

    def send(adapter: object, request: requests.PreparedRequest, **options: object) -> Any:
        sent.append(request.url)
        headers = {"Location": f"{server.url}/m/{SINGLE}?sig=hush"}
        raw = HTTPResponse(b"", headers=headers, status=302, preload_content=False)
        return requests.adapters.HTTPAdapter().build_response(request, raw)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    with refused(CheckpointError, "from https to", "not encrypted"):
        open_url("https://model.invalid/model.safetensors", cache=tmp_path)
    assert sent == ["https://model.invalid/model.safetensors"]
    assert not server.requests


def test_a_cookie_does_not_go_to_another_port_of_its_host(
    opened: RemoteCheckpoint, server: RangeServer, cdn: RangeServer
) -> None:
    server.redirects[f"/m/{SINGLE}"] = f"{cdn.url}/blob"
    server.always = Fault(headers={"Set-Cookie": "session=hush; Path=/"})
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert "cookie" not in cdn.requests[0].headers


def test_the_body_of_a_redirect_is_not_read(
    opened: RemoteCheckpoint, server: RangeServer, cdn: RangeServer
) -> None:
    server.redirects[f"/m/{SINGLE}"] = f"{cdn.url}/blob"
    server.faults.append(Fault(body=b"x" * 50_000_000))
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert server.nbytes < 50_000_000


def test_a_signature_is_in_no_message_no_log_and_no_file(
    opened: RemoteCheckpoint,
    server: RangeServer,
    cdn: RangeServer,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    caplog.set_level(logging.DEBUG)
    server.redirects[f"/m/{SINGLE}"] = f"{cdn.url}/blob?sig=hush"
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert "sig=hush" in cdn.requests[0].target
    faults = [Fault(silent=True), Fault(status=500), Fault(drop_after=0), Fault(status=404)]
    for fault in [*faults, Fault(headers={"Content-Range": "x"}), Fault(body=b"")]:
        cdn.always = fault
        with pytest.raises((CheckpointError, FileNotFoundError)) as caught:
            opened.fetch({SINGLE: [(2_000_000, 2_001_000)]})
        chain: BaseException | None = caught.value
        while chain is not None:
            assert "hush" not in f"{chain} {chain!r}"
            chain = chain.__cause__ or chain.__context__
    with RangeServer({}) as gone:
        server.redirects[f"/m/{SINGLE}"] = f"{gone.url}/blob?sig=hush"
    # The second attempt is sent there.
    cdn.always = Fault(silent=True)
    with pytest.raises(CheckpointError, match="refused") as refusal:
        opened.fetch({SINGLE: [(2_000_000, 2_001_000)]})
    assert "hush" not in str(refusal.value)
    assert "/blob" in caplog.text
    assert_unseen("hush", tmp_path, caplog.text)


def test_a_user_or_password_in_a_url_is_refused_and_not_repeated(
    server: RangeServer, tmp_path: Path
) -> None:
    url = server.url.replace("//", "//me:hush@") + f"/m/{SINGLE}"
    with pytest.raises(CheckpointError, match="user or password") as caught:
        open_url(url, cache=tmp_path)
    assert "hush" not in str(caught.value)
    assert not server.requests


def test_a_plain_url_gets_no_token_password_or_cookie(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hush\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_hush")
    server.always = Fault(headers={"Set-Cookie": "session=1; Path=/"})
    opened = open_url(f"{server.url}/m", cache=tmp_path / "cache")
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    opened.optional_file("config.json")
    assert len(server.requests) == 3
    for request in server.requests:
        assert not {"authorization", "cookie"} & set(request.headers)
        assert request.headers["accept-encoding"] == "identity"
    server.authorization = "Bearer hf_hush"
    with refused(CheckpointError, "401"):
        opened.fetch({SINGLE: [(2_000_000, 2_001_000)]})


def test_a_proxy_of_the_environment_is_used(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    server.files[f"http://model.invalid/m/{SINGLE}"] = FILE
    opened = open_url("http://model.invalid/m", cache=tmp_path)
    check_held(opened.directory, {SINGLE: FILE})


def test_a_server_whose_certificate_is_not_trusted_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    import ssl

    import requests

    def send(*given: object, **options: object) -> Any:
        raise requests.exceptions.SSLError("?sig=hush") from ssl.SSLCertVerificationError("self")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    with refused(CheckpointError, "https://model.invalid", "certificate", "REQUESTS_CA_BUNDLE"):
        open_url("https://model.invalid/model.safetensors", cache=tmp_path)
    assert not waits


# ------------------------------------------------------------------ the cache


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

    monkeypatch.setattr(sparse.fcntl, "flock", flock)
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
    command = [sys.executable, "-c", BOUNDED, f"{server.url}/m", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    grown_kib = int(done.stdout)
    assert grown_kib < 40 << 10


# ------------------------------------------------------------------ optional packages


def test_without_requests_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "requests", None)
    with refused(DriftError, "requests", "pip install 'drift-fast[hub]'"):
        open_url("http://model.invalid/m", cache=tmp_path)


def test_without_huggingface_hub_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused(DriftError, "org/name", "pip install 'drift-fast[hub]'"):
        open_hub("org/name", None, cache=tmp_path)


def test_importing_is_light() -> None:
    code = (
        "import sys, drift_fast.checkpoints.remote; "
        "heavy = {'torch', 'numpy', 'requests', 'huggingface_hub'}; "
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------ the Hub

FIRST, SECOND = "1" * 40, "2" * 40
TOKEN = "hf_hush_hush"

# Opens and fetches in a process of its own: huggingface_hub reads its environment when imported.
AT_HUB = """
import json, logging, pathlib, sys
from drift_fast.checkpoints.remote import open_hub, attempts
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
waits = []
attempts.sleep = lambda seconds, stop: waits.append(seconds)
results = []
for asked in json.load(sys.stdin):
    del waits[:]
    result = {}
    try:
        opened = open_hub(asked["repo"], asked.get("revision"), cache=pathlib.Path(sys.argv[1]))
        result |= {"directory": str(opened.directory), "url": opened.url, "repo": opened.repo}
        result |= {"revision": opened.revision, "etags": opened.etags}
        for wanted in asked.get("fetch", []):
            result["saved"] = opened.fetch(wanted).saved_nbytes
        result["small"] = {name: str(opened.optional_file(name)) for name in asked.get("small", [])}
    except Exception as error:
        result["error"], result["message"] = type(error).__name__, str(error)
        while error is not None:
            result.setdefault("chain", []).append(f"{error!r}")
            error = error.__cause__
    results.append(result | {"waits": list(waits)})
json.dump(results, sys.stdout)
"""

REPOS: dict[str, dict[str, dict[str, Content]]] = {
    "org/one": {
        FIRST: {SINGLE: FILE, "config.json": b"{}", "tokenizer.json": b"x" * 9000},
        SECOND: {SINGLE: CHANGED},
    },
    "org/many": {
        FIRST: {**SHARDS, INDEX: SHARDED[f"/m/{INDEX}"]},
        SECOND: {**SHARDS, INDEX: SHARDED[f"/m/{INDEX}"]},
    },
    "org/odd": {"..%2Fno-commit": {SINGLE: FILE}},
    "org/pickled": {FIRST: {"pytorch_model.bin": b"x"}},
    "org/empty": {FIRST: {"README.md": b"x"}},
    "org/wrong": {FIRST: {INDEX: index_of(layer="../x.safetensors")}},
}


class Hub:
    """A Hub and its CDN, and calls of `open_hub` in a child process."""

    def __init__(self, server: HubServer, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.log = ""

    def run(self, *asked: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGINGFACE", "HUGGING_FACE"))
        }
        done = subprocess.run(
            [sys.executable, "-c", AT_HUB, str(self.directory / "cache")],
            input=json.dumps(asked),
            env={
                **kept,
                "HF_ENDPOINT": self.server.url,
                "HF_HOME": str(self.directory / "home"),
                "HF_TOKEN": TOKEN,
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "127.0.0.1,localhost",
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        self.log += done.stderr
        results: list[dict[str, Any]] = json.loads(done.stdout)
        return results


@pytest.fixture
def hub(tmp_path: Path, cdn: RangeServer) -> Iterator[Hub]:
    with HubServer(REPOS, cdn) as started:
        started.branches = {"main": FIRST, "next": SECOND}
        yield Hub(started, tmp_path)


def test_a_hub_model_is_read_in_part_at_its_commit_and_the_token_stays_with_the_hub(
    hub: Hub, cdn: RangeServer
) -> None:
    wanted = [(1_000_000, 1_100_000), (3_000_000, 3_100_000)]
    one, many = hub.run(
        {
            "repo": "org/one",
            "fetch": [{SINGLE: wanted}, {SINGLE: [(4_000_000, 4_000_100)]}],
            "small": ["config.json", "tokenizer.json", "merges.txt"],
        },
        {
            "repo": "org/many",
            "revision": "main",
            "fetch": [{name: [(300_000, 400_000)] for name in SHARDS}],
        },
    )
    assert "error" not in one, one
    assert one["repo"] == "org/one"
    assert one["revision"] == many["revision"] == FIRST
    assert one["url"] == f"{hub.server.url}/org/one/resolve/{FIRST}/"
    assert one["saved"] == len(FILE) - 100
    directory = Path(one["directory"])
    assert re.fullmatch(rf"org-one-{FIRST}-[0-9a-f]{{16}}", directory.name)
    assert one["etags"][SINGLE].startswith("linked-")
    stored = json.loads((directory / f"{SINGLE}.ranges.json").read_text())
    assert stored["etag"] == one["etags"][SINGLE]
    for start, end in wanted:
        assert has(directory, start, end)
    check_held(directory, {SINGLE: FILE})
    assert one["small"] == {
        "config.json": str(directory / "config.json"),
        "tokenizer.json": str(directory / "tokenizer.json"),
        "merges.txt": "None",
    }
    assert (directory / "tokenizer.json").read_bytes() == b"x" * 9000
    assert len(_core.Checkpoint(Path(many["directory"])).tensors()) == 3
    check_held(Path(many["directory"]), SHARDS)

    sizes = START_NBYTES + 200_000 + 100 + 3 * (START_NBYTES + 100_000) + 9000
    assert cdn.nbytes == sizes
    # After the first answers, which name the commit, no request names a branch.
    assert {request.path.split("/")[4] for request in hub.server.asked()} == {FIRST}
    assert all(f"Bearer {TOKEN}" == r.headers.get("authorization") for r in hub.server.requests)
    assert len(hub.server.requests) > 10
    assert cdn.requests
    assert not any("authorization" in request.headers for request in cdn.requests)
    assert_unseen(TOKEN, hub.directory, hub.log)
    # What the connections of huggingface_hub itself log at DEBUG is not ours to alter.
    lines = [line for line in hub.log.splitlines() if ":httpcore" not in line]
    assert any("/blob/" in line for line in lines)
    assert not any(hub.server.signature in line for line in lines)


def test_a_hub_model_is_gone_on_with_and_another_commit_is_another_directory(
    hub: Hub, cdn: RangeServer
) -> None:
    wanted = {SINGLE: [(1_000_000, 1_100_000)]}
    (first,) = hub.run({"repo": "org/one", "fetch": [wanted]})
    cdn.requests.clear()
    again, other = hub.run(
        {"repo": "org/one", "revision": FIRST, "fetch": [wanted]},
        {"repo": "org/one", "revision": "next", "fetch": [wanted]},
        HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
    )
    assert again["directory"] == first["directory"]
    assert other["revision"] == SECOND
    assert other["directory"] != first["directory"]
    check_held(Path(other["directory"]), {SINGLE: CHANGED})
    assert cdn.nbytes == START_NBYTES + 100_000
    assert "authorization" not in hub.server.requests[-1].headers


def test_what_the_hub_refuses_says_what_to_do(hub: Hub) -> None:
    hub.server.gated.add("org/gated")
    gated, unknown, revision, pickled, empty, wrong, malformed = hub.run(
        {"repo": "org/gated"},
        {"repo": "org/unknown"},
        {"repo": "org/one", "revision": "nowhere"},
        {"repo": "org/pickled"},
        {"repo": "org/empty"},
        {"repo": "org/wrong"},
        {"repo": "org/../one"},
    )
    expected = [
        (gated, ["org/gated", "restricted", f"{hub.server.url}/org/gated", "hf auth login"]),
        (unknown, ["org/unknown", "no such model", "hf auth login"]),
        (revision, ["org/one@nowhere", "no such branch"]),
        (pickled, ["org/pickled", "pytorch_model.bin", "convert it to safetensors"]),
        (wrong, ["org/wrong", "layer", "../x.safetensors"]),
        (malformed, ["org/../one", "org/name"]),
    ]
    for result, words in expected:
        assert result["error"] == "CheckpointError", result
        assert not result["waits"], result
        for word in words:
            assert word in result["message"]
    assert empty["error"] == "FileNotFoundError"
    assert SINGLE in empty["message"]
    assert not any(name.endswith("x.safetensors") for name in os.listdir(hub.directory))
    assert_unseen(TOKEN, hub.directory, hub.log)


def test_a_hub_that_cannot_be_asked_says_why(hub: Hub) -> None:
    (offline,) = hub.run({"repo": "org/one"}, HF_HUB_OFFLINE="1")
    assert offline["error"] == "CheckpointError"
    assert "HF_HUB_OFFLINE" in offline["message"]
    assert not hub.server.requests
    with RangeServer({}) as other:
        pass
    (gone,) = hub.run({"repo": "org/one"}, HF_ENDPOINT=other.url)
    assert gone["error"] == "CheckpointError"
    assert len(gone["waits"]) == 5


def test_a_server_that_is_no_hub_is_told_by_the_commit_it_does_not_name(hub: Hub) -> None:
    with RangeServer({f"/org/one/resolve/main/{SINGLE}": FILE}) as plain:
        (result,) = hub.run({"repo": "org/one"}, HF_ENDPOINT=plain.url)
    assert result["error"] == "CheckpointError"
    assert "HF_ENDPOINT" in result["message"]
    hub.server.branches["main"] = "..%2Fno-commit"
    (result,) = hub.run({"repo": "org/odd"})
    assert result["error"] == "CheckpointError"
    assert "HF_ENDPOINT" in result["message"]


def test_a_commit_that_the_hub_answers_with_another_is_an_error(hub: Hub) -> None:
    hub.server.branches[FIRST] = SECOND
    (result,) = hub.run({"repo": "org/many"})
    assert result["error"] == "CheckpointError"
    assert "at this commit" in result["message"]


def test_trouble_of_the_hub_and_its_cdn_is_waited_out_and_signatures_stay_unseen(
    hub: Hub, cdn: RangeServer
) -> None:
    # Not 429, which some versions of huggingface_hub wait out themselves.
    hub.server.head_faults.append(Fault(status=503, headers={"Retry-After": "7"}))
    hub.server.head_faults.append(Fault(status=503))
    cdn.faults.append(Fault(status=503, headers={"Retry-After": "9"}))
    cdn.faults.append(Fault(drop_after=1000))
    (result,) = hub.run({"repo": "org/one", "fetch": [{SINGLE: [(1_000_000, 1_100_000)]}]})
    assert "error" not in result, result
    assert result["waits"][0] == 7
    assert result["waits"][2] == 9
    assert len(result["waits"]) == 4
    check_held(Path(result["directory"]), {SINGLE: FILE})

    cdn.always = Fault(status=403)
    (result,) = hub.run(
        {"repo": "org/one", "fetch": [{SINGLE: [(2_000_000, 2_100_000)]}]},
    )
    assert result["error"] == "Forbidden"
    assert "hf auth login" in result["message"]
    assert hub.server.signature not in str(result)
    assert hub.server.asked()
    assert all(f"Bearer {TOKEN}" == r.headers.get("authorization") for r in hub.server.requests)


def test_content_that_changes_behind_the_hub_is_an_error(hub: Hub, cdn: RangeServer) -> None:
    etag = {"ETag": '"another"'}
    cdn.faults.extend([None, Fault(headers=etag)])
    (result,) = hub.run({"repo": "org/one", "fetch": [{SINGLE: [(1_000_000, 1_100_000)]}]})
    assert result["error"] == "CheckpointError"
    assert "the file changed on the server" in result["message"]
    # The first is for the index.
    hub.server.faults.extend([None, Fault(headers={"X-Linked-Etag": '"another"'})])
    (result,) = hub.run({"repo": "org/many"})
    assert result["error"] == "CheckpointError"
    assert "the file changed on the server" in result["message"]
