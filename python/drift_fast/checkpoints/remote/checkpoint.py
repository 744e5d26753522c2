"""A checkpoint on a server as a local directory, which grows by the ranges that are asked for.

Owns which of the wanted ranges are still to be downloaded, and the report of it. Invariant: when
`fetch` returns, all wanted ranges are in the directory, and its list of ranges says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from drift_fast.checkpoints.remote.client import Client, Credentials, Range
from drift_fast.checkpoints.remote.shards import is_plain_name
from drift_fast.checkpoints.remote.sparse import (
    SparseShard,
    locked,
    merged,
    missing,
    nbytes_of,
    parts_of,
    require_space,
    write_atomically,
)
from drift_fast.checkpoints.remote.tasks import run_together
from drift_fast.checkpoints.remote.transfer import RangesIgnored, RemoteFile, Sink
from drift_fast.errors import CheckpointError

logger = logging.getLogger(__name__)

# A gap between two ranges that is not larger is read too, in place of a second request.
_GAP_NBYTES = 256 << 10


@dataclass(frozen=True)
class Transfer:
    """The bytes that one fetch wanted, received over the network, and found in the cache.

    `fetched_nbytes` includes gaps between ranges and what was sent twice, but not the headers,
    which come when the checkpoint is opened. `total_nbytes` is the size of all shards.
    """

    wanted_nbytes: int
    fetched_nbytes: int
    cached_nbytes: int
    total_nbytes: int

    @property
    def saved_nbytes(self) -> int:
        """The bytes of the shards that were never downloaded."""
        return max(0, self.total_nbytes - self.fetched_nbytes - self.cached_nbytes)

    def __str__(self) -> str:
        exponent, unit = next(
            (
                step
                for step in ((9, "GB"), (6, "MB"), (3, "kB"))
                if self.total_nbytes >= 10 ** step[0]
            ),
            (0, "bytes"),
        )
        digits = 1 if exponent else 0

        def sized(nbytes: int) -> str:
            return f"{nbytes / 10**exponent:.{digits}f}"

        share = self.wanted_nbytes / self.total_nbytes if self.total_nbytes else 0.0
        return (
            f"{sized(self.wanted_nbytes)} of {sized(self.total_nbytes)} {unit} needed "
            f"({100 * share:.0f} %), {sized(self.fetched_nbytes)} {unit} downloaded, "
            f"{sized(self.cached_nbytes)} {unit} from the cache"
        )


@dataclass(frozen=True, eq=False)
class RemoteCheckpoint:
    """A checkpoint on a server and the local directory that holds parts of it.

    `directory` opens as a checkpoint of full length; what the `.ranges.json` of a shard does not
    list is a hole. `url` is where it comes from, without query. A single file is called
    `model.safetensors` there, whatever its name in the URL.
    """

    directory: Path
    url: str
    files: Mapping[str, RemoteFile] = field(repr=False)
    small_file: Callable[[Client, str], bytes | None] = field(repr=False)
    repo: str | None = None
    revision: str | None = None
    credentials: Callable[[], Credentials | None] = field(default=lambda: None, repr=False)

    @property
    def etags(self) -> dict[str, str | None]:
        """The ETags of the shards, by file name."""
        return {name: file.identity.etag for name, file in self.files.items()}

    def fetch(
        self,
        wanted: Mapping[str, Sequence[Range]],
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> Transfer:
        """Download the byte ranges `[start, end)` of shards that are not there, by file name.

        Ranges that are close together are read as one, and an earlier run is resumed. `progress`
        is called on this thread with the bytes that are there and that will be.

        Raises:
            ValueError: a shard that the checkpoint does not have, or a range outside it.
            CheckpointError: a file that changed on the server, an answer that cannot be used, or
                no progress in several attempts.
            FileNotFoundError: a shard that the server no longer has.
            OSError: the disk is full (checked before anything is written) or fails.
        """
        asked = {name: self._checked(name, ranges) for name, ranges in wanted.items()}
        received_nbytes = 0
        with locked(self.directory), ExitStack() as stack:
            shards = {name: self._local(name) for name in asked}
            for shard in shards.values():
                stack.callback(shard.close)
            lacking = {name: missing(asked[name], shards[name].ranges) for name in asked}
            parts = [
                (name, part)
                for name, ranges in lacking.items()
                for part in parts_of(merged(ranges, _GAP_NBYTES))
            ]
            wanted_nbytes = sum(map(nbytes_of, asked.values()))
            cached_nbytes = wanted_nbytes - sum(map(nbytes_of, lacking.values()))
            needed_nbytes = nbytes_of(part for _, part in parts)
            require_space(self.directory, needed_nbytes)
            counter = _Counter(cached_nbytes, cached_nbytes + needed_nbytes, progress)
            if parts:
                with Client(self.credentials()) as client:
                    self._download(client, shards, parts, counter)
                    self._read_through(client, shards, lacking, counter)
                    received_nbytes = client.received_nbytes
            counter.finish()
        return Transfer(
            wanted_nbytes,
            received_nbytes,
            cached_nbytes,
            sum(file.identity.nbytes for file in self.files.values()),
        )

    def optional_file(self, name: str) -> Path | None:
        """Download a small file such as `tokenizer.json`; None if the server does not have it.

        Raises:
            ValueError: not the plain name of such a file.
            CheckpointError: the server refuses, or its answer cannot be used.
        """
        if not is_plain_name(name) or ".safetensors" in name:
            raise ValueError(f"{name!r}: expected the plain name of a configuration file")
        path = self.directory / name
        with locked(self.directory), Client(self.credentials()) as client:
            data = self.small_file(client, name)
            if data is None:
                path.unlink(missing_ok=True)
                return None
            write_atomically(path, data)
        return path

    def _checked(self, name: str, ranges: Sequence[Range]) -> list[Range]:
        if name not in self.files:
            raise ValueError(f"{self.url}: no shard {name!r}; it has {', '.join(self.files)}")
        nbytes = self.files[name].identity.nbytes
        for start, end in ranges:
            if not 0 <= start <= end <= nbytes:
                raise ValueError(f"{name}: bytes {start} to {end} of a file of {nbytes} bytes")
        return merged(ranges)

    def _local(self, name: str) -> SparseShard:
        shard = SparseShard.load(self.directory / name)
        if shard is None or not shard.identity.is_same(self.files[name].identity):
            raise CheckpointError(
                f"{self.directory / name}: another process replaced it or its list of ranges, "
                "perhaps since the file changed on the server; open the checkpoint again"
            )
        return shard

    def _download(
        self,
        client: Client,
        shards: Mapping[str, SparseShard],
        parts: Sequence[tuple[str, Range]],
        counter: _Counter,
    ) -> None:
        def read(name: str, part: Range) -> None:
            file = self.files[name]
            if file.ranged:
                with shards[name].write_parts() as write:
                    try:
                        file.read(client, *part, counter.counting(write))
                    except RangesIgnored:
                        return

        run_together(
            [partial(read, name, part) for name, part in parts], client.stop, counter.report
        )

    def _read_through(
        self,
        client: Client,
        shards: Mapping[str, SparseShard],
        lacking: Mapping[str, Sequence[Range]],
        counter: _Counter,
    ) -> None:
        def read(name: str, ranges: Sequence[Range]) -> None:
            with shards[name].write_parts() as write:
                self.files[name].read_through(client, ranges, counter.counting(write))

        plan = {
            name: merged(missing(lacking[name], shard.ranges), _GAP_NBYTES)
            for name, shard in shards.items()
        }
        plan = {name: ranges for name, ranges in plan.items() if ranges}
        if not plan:
            return
        logger.info("%s: the server ignores range requests; reading whole files", self.url)
        run_together(
            [partial(read, name, ranges) for name, ranges in plan.items()],
            client.stop,
            counter.report,
        )
        logger.warning(
            "%s: the server ignores range requests, so %d bytes crossed the network for the %d "
            "that were needed of %s",
            self.url,
            client.received_nbytes,
            sum(map(nbytes_of, plan.values())),
            ", ".join(plan),
        )


class _Counter:
    """Bytes written by several threads, reported by one."""

    def __init__(
        self, done: int, total: int, progress: Callable[[int, int], object] | None
    ) -> None:
        self._done = done
        self._total = total
        self._progress = progress
        self._reported = -1

    def counting(self, write: Sink) -> Sink:
        def counted(offset: int, data: bytes) -> None:
            write(offset, data)
            self._done += len(data)

        return counted

    def report(self) -> None:
        done = min(self._done, self._total)
        if self._progress is not None and done != self._reported:
            self._reported = done
            self._progress(done, self._total)

    def finish(self) -> None:
        # Threads add without a lock, which may lose a few counts on the way.
        self._done = self._total
        self.report()
