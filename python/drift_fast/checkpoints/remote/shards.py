"""Which files a checkpoint on a server has, and the local shards with their headers.

Invariant: a name is requested or written only after it was found to be a plain one, since an index
comes from a stranger. The checkpoint reader judges what a header says; here only its length counts.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct

from drift_fast.checkpoints.diagnosis import CONVERT, PICKLE
from drift_fast.checkpoints.place import INDEX, SINGLE
from drift_fast.checkpoints.remote.client import Client
from drift_fast.checkpoints.remote.sparse import SparseShard, require_space, write_atomically
from drift_fast.checkpoints.remote.tasks import run_together
from drift_fast.checkpoints.remote.transfer import RangesIgnored, RemoteFile, Sink
from drift_fast.config_files import convert, parse_json
from drift_fast.errors import CheckpointError, DriftWarning

logger = logging.getLogger(__name__)

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# The limit that the safetensors format sets for a header; other small files are held to it too.
SMALL_NBYTES = 100_000_000
# As the reader has it for an index; see docs/reliability.md.
INDEX_NBYTES = 64 << 20
# Far more than any checkpoint is cut into.
_SHARDS = 4096
# The size of the first request; most headers are shorter.
_START_NBYTES = 256 << 10
_LENGTH_NBYTES = 8
_PLAIN_NAME = re.compile(r"[^./\\][^/\\]*")
# A file system allows 255, and the lists of ranges have longer names.
_NAME_LIMIT_NBYTES = 200


class _Index(Struct):
    weight_map: dict[str, Any]


def is_pickle(name: str) -> bool:
    """Whether a file is a pickled checkpoint, or the index of one, by its name."""
    return PICKLE.search(name) is not None


def is_plain_name(name: str) -> bool:
    """Whether it names a file in a directory that is not hidden, in printable characters."""
    return (
        name.isprintable()
        and _PLAIN_NAME.fullmatch(name) is not None
        and len(name.encode()) <= _NAME_LIMIT_NBYTES
    )


def open_single(client: Client, directory: Path, file: RemoteFile) -> dict[str, RemoteFile]:
    """Put the header of a single file in the directory; it wins over an older index."""
    _open_shard(client, directory / SINGLE, file)
    (directory / INDEX).unlink(missing_ok=True)
    return {SINGLE: file}


def single_wins(index: bytes | None, place: str) -> bool:
    """Whether a single file is read where a server has an index too, by the rule for a directory.

    It does unless the index names it. A warning says so where the index may be the one to read.
    """
    if index is None:
        return True
    try:
        if SINGLE in shard_names(index, place):
            return False
    except CheckpointError:
        pass
    warnings.warn(
        f"{place} is beside {SINGLE}: the single file is read, as transformers does. If that one "
        "is stale, give the URL of the index to read its shards",
        DriftWarning,
        stacklevel=2,
    )
    return True


def open_indexed(
    client: Client,
    directory: Path,
    index: bytes,
    place: str,
    file_named: Callable[[str], RemoteFile],
    name: str = INDEX,
) -> dict[str, RemoteFile]:
    """Put an index and the headers of its shards in the directory."""
    files = {shard: file_named(shard) for shard in shard_names(index, place)}
    run_together(
        [partial(_open_shard, client, directory / shard, file) for shard, file in files.items()],
        client.stop,
    )
    write_atomically(directory / name, index)
    if name == INDEX and SINGLE not in files:
        # A single file would win over the index.
        (directory / SINGLE).unlink(missing_ok=True)
    return files


def shard_names(index: bytes, place: str) -> list[str]:
    """Return the files that an index names, each a plain name, in order.

    Raises:
        CheckpointError: not an index, or one that names something else.
    """
    try:
        if len(index) > INDEX_NBYTES:
            raise ValueError(f"expected at most {INDEX_NBYTES:,} bytes, found {len(index):,}")
        weight_map = convert(parse_json(index), _Index).weight_map
    except ValueError as error:
        raise CheckpointError(
            f"{place}: expected an index with a weight_map, found something else ({error}); check "
            "the URL"
        ) from None
    # As some tools write it; what else is not plain is refused.
    entries = [
        (tensor, file.removeprefix("./") if isinstance(file, str) else file)
        for tensor, file in weight_map.items()
    ]
    for tensor, file in entries:
        if isinstance(file, str) and is_pickle(file):
            raise CheckpointError(f"{place}: tensor {tensor!r} is in {file!r}: {CONVERT}")
        if (
            not isinstance(file, str)
            or not is_plain_name(file)
            or not file.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{place}: tensor {tensor!r}: the index places it in {str(file)[:80]!r}, expected "
                "the plain name of a .safetensors file beside the index; nothing else is requested"
            )
    names = sorted({file for _, file in entries})
    if not names:
        raise CheckpointError(f"{place}: the index names no tensor; check the URL")
    if len(names) > _SHARDS:
        raise CheckpointError(
            f"{place}: the index names {len(names):,} shards, expected at most {_SHARDS:,}; check "
            "the URL"
        )
    return names


def _open_shard(client: Client, path: Path, file: RemoteFile) -> None:
    """Make sure that there is a local shard with this identity and its header."""
    shard = SparseShard.load(path)
    if shard is not None:
        if not file.is_identified:
            start = bytearray()
            _read(client, file, 0, _LENGTH_NBYTES, lambda _, data: start.extend(data))
            kept = file.identity.is_same(shard.identity) and shard.starts_with(bytes(start))
        else:
            kept = file.identity.is_same(shard.identity)
        if kept:
            return
        logger.info("%s: changed on the server; what was downloaded is discarded", file.shown)
    start = bytearray()
    _read(client, file, 0, _START_NBYTES, lambda _, data: start.extend(data))
    nbytes = file.identity.nbytes
    header_nbytes = int.from_bytes(start[:_LENGTH_NBYTES], "little")
    if nbytes < _LENGTH_NBYTES or not header_nbytes <= min(SMALL_NBYTES, nbytes - _LENGTH_NBYTES):
        raise CheckpointError(
            f"{file.shown}: not a safetensors file: its first bytes give a header of "
            f"{header_nbytes} bytes, the file has {nbytes} and the format allows {SMALL_NBYTES}; "
            "check the URL"
        )
    end = _LENGTH_NBYTES + header_nbytes
    require_space(path.parent, max(end, len(start)))
    shard = SparseShard.create(path, file.identity, bytes(start))
    if len(start) < end:
        with shard.write_parts() as write:
            _read(client, file, len(start), end, write)


def _read(client: Client, file: RemoteFile, start: int, end: int, sink: Sink) -> None:
    try:
        file.read(client, start, end, sink)
    except RangesIgnored:
        file.read_through(client, [(start, end)], sink)
