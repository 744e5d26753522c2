"""A checkpoint at a URL is opened by its headers; what is not a checkpoint is refused."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import pytest

from drift_fast._core import Checkpoint
from drift_fast.checkpoints.remote import RemoteCheckpoint, open_url
from drift_fast.checkpoints.remote.hub import open_hub
from drift_fast.errors import CheckpointError, DriftError, DriftWarning
from support.processes import python
from support.range_server import Fault, RangeServer
from support.remote import (
    FILE,
    INDEX,
    SHARDED,
    SHARDS,
    SINGLE,
    START_NBYTES,
    assert_unseen,
    check_held,
    held,
    index_of,
    shard_of,
)
from support.synthetic import refused


def test_opening_downloads_the_start_of_the_file_and_opens_as_a_checkpoint(
    server: RangeServer, tmp_path: Path
) -> None:
    opened = open_url(f"{server.url}/m/", cache=tmp_path)
    assert [(name, shape) for name, _, shape in Checkpoint(opened.directory).tensors()] == [
        ("a", [3_000_000]),
        ("b", [2_000_000]),
    ]
    assert held(opened.directory) == [(0, START_NBYTES)]
    first, index = server.requests
    assert first.headers["range"] == "bytes=0-262143"
    assert first.nbytes == START_NBYTES
    assert (index.path, index.status) == (f"/m/{INDEX}", 404)
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
    assert len(Checkpoint(opened.directory).tensors()) == 2
    assert list(opened.etags) == [SINGLE]


@pytest.mark.parametrize("place", ["/m", "/m/", f"/m/{INDEX}", "/m/other.safetensors.index.json"])
def test_an_index_brings_all_shards(server: RangeServer, tmp_path: Path, place: str) -> None:
    server.files = {**SHARDED, "/m/other.safetensors.index.json": SHARDED[f"/m/{INDEX}"]}
    opened = open_url(server.url + place, cache=tmp_path)
    assert sorted(opened.etags) == sorted(SHARDS)
    tensors = Checkpoint(opened.directory).tensors()
    assert sorted(name for name, *_ in tensors) == ["a", "b", "c"]
    check_held(opened.directory, SHARDS)


def test_a_directory_that_becomes_one_of_shards_no_longer_opens_as_the_single_file(
    server: RangeServer, tmp_path: Path
) -> None:
    first = open_url(f"{server.url}/m", cache=tmp_path)
    server.files = dict(SHARDED)
    second = open_url(f"{server.url}/m", cache=tmp_path)
    assert first.directory == second.directory
    assert len(Checkpoint(second.directory).tensors()) == 3
    server.files = {f"/m/{SINGLE}": FILE}
    third = open_url(f"{server.url}/m", cache=tmp_path)
    assert len(Checkpoint(third.directory).tensors()) == 2


def test_a_single_file_beside_an_index_is_read_with_a_warning_as_on_a_disk(
    server: RangeServer, tmp_path: Path
) -> None:
    server.files = {**SHARDED, f"/m/{SINGLE}": FILE}
    with pytest.warns(DriftWarning, match=f"{server.url}/m/{INDEX} is beside {SINGLE}: the single"):
        opened = open_url(f"{server.url}/m", cache=tmp_path)
    assert len(Checkpoint(opened.directory).tensors()) == 2
    # As the warning advises.
    opened = open_url(f"{server.url}/m/{INDEX}", cache=tmp_path)
    assert len(Checkpoint(opened.directory).tensors()) == 3
    server.files[f"/m/{INDEX}"] = b"<html>"
    with pytest.warns(DriftWarning, match="the single file is read"):
        open_url(f"{server.url}/m", cache=tmp_path)


@pytest.mark.parametrize("place", ["/m", f"/m/{INDEX}"])
def test_an_index_that_names_the_single_file_among_others_is_read_as_on_a_disk(
    server: RangeServer, tmp_path: Path, place: str
) -> None:
    other = shard_of(5, z=10)
    server.files = {
        f"/m/{SINGLE}": FILE,
        "/m/x.safetensors": other,
        f"/m/{INDEX}": index_of(a=SINGLE, b=SINGLE, z="x.safetensors"),
    }
    opened = open_url(server.url + place, cache=tmp_path)
    assert len(Checkpoint(opened.directory).tensors()) == 3
    check_held(opened.directory, {SINGLE: FILE, "x.safetensors": other})


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

    monkeypatch.setattr(url, "INDEX_NBYTES", 1000)
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
    assert len(Checkpoint(opened.directory).tensors()) == 1
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
    assert python(code).stdout.strip() == "set()"
