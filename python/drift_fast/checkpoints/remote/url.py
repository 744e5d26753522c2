"""A checkpoint at an http(s) URL: a file, an index, or a directory of either."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from drift_fast.checkpoints.diagnosis import CONVERT, NoDelta
from drift_fast.checkpoints.place import INDEX, SINGLE
from drift_fast.checkpoints.remote.checkpoint import RemoteCheckpoint
from drift_fast.checkpoints.remote.client import Client
from drift_fast.checkpoints.remote.shards import (
    INDEX_NBYTES,
    PICKLES,
    SMALL_NBYTES,
    is_pickle,
    open_indexed,
    open_single,
    single_wins,
)
from drift_fast.checkpoints.remote.sparse import locked, make_directory
from drift_fast.checkpoints.remote.transfer import Forbidden, RemoteFile
from drift_fast.checkpoints.remote.urls import origin_of, shown
from drift_fast.errors import CheckpointError


def open_url(url: str, *, index: str = INDEX, cache: Path | None = None) -> RemoteCheckpoint:
    """Open a checkpoint at an http(s) URL; only headers and the index are downloaded.

    The URL is that of a `.safetensors` file, a `*.safetensors.index.json`, or a directory that
    holds `model.safetensors` or `model.safetensors.index.json`. Its query is sent with every
    request but neither shown nor stored. No token is sent.

    `index` is the name of a delta's index where a delta is asked for.

    Raises:
        FileNotFoundError: the server has no such checkpoint; NoDelta where that is a delta.
        CheckpointError: not an http(s) URL, a pickled checkpoint, an index or answer that cannot
            be used, or no progress in several attempts.
        DriftError: `requests` is not installed.
    """
    origin = origin_of(url)
    path = urlsplit(url).path
    folder, _, last = path.rpartition("/")
    name = unquote(last)
    if is_pickle(name):
        raise CheckpointError(f"{shown(url)}: {CONVERT}")
    indexed = name.endswith(".safetensors.index.json")
    if index != INDEX and name != index and name.endswith((".safetensors", ".index.json")):
        raise NoDelta(f"{shown(url)}: not a delta; give the URL of its directory or its {index}")
    if not indexed and not name.endswith(".safetensors"):
        folder = path.rstrip("/")

    def file_named(name: str) -> RemoteFile:
        parts = urlsplit(url)
        return RemoteFile(urlunsplit((*parts[:2], f"{folder}/{quote(name)}", parts.query, "")))

    def small_file(client: Client, name: str) -> bytes | None:
        try:
            return file_named(name).read_whole(client, SMALL_NBYTES)
        except FileNotFoundError:
            return None

    asked = RemoteFile(urlunsplit((*urlsplit(url)[:4], "")))
    key = f"{origin[0]}://{origin[1]}:{origin[2]}{path}"
    readable = "-".join([origin[1], *path.strip("/").split("/")[-2:]])
    directory = make_directory(cache, readable, key)
    with locked(directory), Client() as client:
        if indexed or index != INDEX:
            listing = asked if indexed else file_named(index)
            text = _read_index(client, listing, index)
            files = open_indexed(client, directory, text, listing.shown, file_named, index)
        elif name.endswith(".safetensors"):
            files = open_single(client, directory, asked)
        else:
            files = _open_directory(client, directory, file_named, shown(url))
    return RemoteCheckpoint(directory, shown(url), files, small_file=small_file)


def _read_index(client: Client, file: RemoteFile, index: str) -> bytes:
    try:
        return file.read_whole(client, INDEX_NBYTES)
    except FileNotFoundError as error:
        raise error if index == INDEX else NoDelta(f"{error}, so there is no delta") from None


def _open_directory(
    client: Client, directory: Path, file_named: Callable[[str], RemoteFile], place: str
) -> dict[str, RemoteFile]:
    refused: Forbidden | None = None
    single = None
    try:
        single = open_single(client, directory, file_named(SINGLE))
    except FileNotFoundError:
        pass
    except Forbidden as error:
        refused = error
    index = file_named(INDEX)
    text = None
    with contextlib.suppress(FileNotFoundError, Forbidden):
        text = index.read_whole(client, INDEX_NBYTES)
    if single is not None and single_wins(text, index.shown):
        return single
    if text is not None:
        return open_indexed(client, directory, text, index.shown, file_named)
    if refused is not None:
        raise refused
    for pickled in PICKLES:
        if file_named(pickled).exists(client):
            raise CheckpointError(f"{place}: found {pickled} and no safetensors: {CONVERT}")
    raise FileNotFoundError(f"{place}: the server has neither {SINGLE} nor {INDEX} there (404)")
