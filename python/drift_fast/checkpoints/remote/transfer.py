"""Parts of one file on a server: which answers are accepted, and resuming where one broke off.

Knows neither checkpoints nor the disk. Invariant: a sink is given each byte of the file that the
identity names in order and once; an answer for which this cannot be shown raises.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from drift_fast.checkpoints.remote.attempts import RETRIED, Dropped, Patience, retry_after
from drift_fast.checkpoints.remote.client import Answer, Client, Range
from drift_fast.checkpoints.remote.urls import Origin, origin_of, shown
from drift_fast.errors import CheckpointError

Sink = Callable[[int, bytes], object]

_EXPIRED = frozenset({401, 403, 404, 410})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


class RangesIgnored(Exception):
    """The server answered a range request with the whole file."""


class Forbidden(CheckpointError):
    """A 401 or 403, which storage services also answer for a file that does not exist."""


@dataclass(frozen=True)
class Identity:
    """What two answers have in common if they come from one file."""

    nbytes: int
    etag: str | None
    last_modified: str | None

    def is_same(self, other: Identity) -> bool:
        """Compare lengths and ETags, or times if neither has an ETag."""
        if self.nbytes != other.nbytes:
            return False
        if self.etag is not None or other.etag is not None:
            return self.etag == other.etag
        return self.last_modified == other.last_modified


class RemoteFile:
    """One file on a server, held to the identity given, or to that of its first answer.

    A given identity is the Hub's. Its ETag is compared with the Hub's own answers; the ETag of a
    server that the Hub redirects to is compared with earlier answers of that server.
    """

    def __init__(self, url: str, identity: Identity | None = None) -> None:
        self.url = url
        self.shown = shown(url)
        self.ranged = True
        self._identity = identity
        self._of_hub = identity is not None
        # Where the URL redirected to: a signed URL, used until it expires and never shown.
        self._target: str | None = None
        self._served: dict[Origin, Identity] = {}

    @property
    def identity(self) -> Identity:
        """The identity that the file is held to, known after the first answer at the latest."""
        if self._identity is None:
            raise ValueError(f"{self.shown}: nothing has been read yet")
        return self._identity

    @property
    def is_identified(self) -> bool:
        return self._identity is not None

    def read(self, client: Client, start: int, end: int, sink: Sink) -> None:
        """Give the sink bytes `[start, end)`, at most to the end of the file, by range requests.

        Raises:
            RangesIgnored: the server sends the whole file instead; the sink got nothing.
            FileNotFoundError: a 404.
            CheckpointError: the file changed, an answer that is not what was asked for, a
                refusal, or no progress in several attempts.
        """
        patience = Patience(f"{self.shown}, bytes {start} to {end}", client.stop)
        while start < end:
            try:
                with closing(self._ask(client, (start, end))) as answer:
                    if answer.status == 200:
                        self.ranged = False
                        raise RangesIgnored
                    stop = self._check_range(answer, start, end)
                    end = min(end, self.identity.nbytes)
                    for data in client.body(answer, stop - start):
                        sink(start, data)
                        start += len(data)
                        patience.progressed()
                    # Reading on also hands the connection back to the pool.
                    for _ in client.body(answer, None):
                        raise CheckpointError(f"{self.shown}: the answer is longer than its range")
            except Dropped as dropped:
                patience.wait(dropped)

    def read_through(self, client: Client, ranges: Sequence[Range], sink: Sink) -> None:
        """Give the sink sorted, disjoint ranges from a server that ignores range requests.

        The file is read from its start to the last of them; they end at the end of the file.

        Raises: as `read`, without RangesIgnored.
        """
        patience = Patience(f"{self.shown}, from its start", client.stop)
        ends = [end for _, end in ranges]
        passed, last = 0, ends[-1]
        while passed < last:
            try:
                with closing(self._ask(client, None)) as answer:
                    self._check_identity(answer, answer.content_nbytes)
                    last = min(last, self.identity.nbytes)
                    position = 0
                    for data in client.body(answer, last):
                        after = position + len(data)
                        for start, end in ranges[bisect_right(ends, max(position, passed)) :]:
                            if start >= after:
                                break
                            begin, stop = max(start, position, passed), min(end, after)
                            if begin < stop:
                                sink(begin, data[begin - position : stop - position])
                        position = after
                        if position > passed:
                            passed = position
                            patience.progressed()
            except Dropped as dropped:
                patience.wait(dropped)

    def read_whole(self, client: Client, limit_nbytes: int) -> bytes:
        """Return a small file.

        Raises: as `read`, and CheckpointError for a file longer than the limit.
        """
        patience = Patience(self.shown, client.stop)
        while True:
            try:
                with closing(self._ask(client, None)) as answer:
                    data = bytearray()
                    for part in client.body(answer, answer.content_nbytes):
                        data += part
                        if len(data) > limit_nbytes:
                            raise CheckpointError(
                                f"{self.shown}: longer than {limit_nbytes} bytes, the limit for a "
                                "file of its kind; check the URL"
                            )
                    return bytes(data)
            except Dropped as dropped:
                patience.wait(dropped)

    def exists(self, client: Client) -> bool:
        """Return whether the server has the file; False if that cannot be found out."""
        try:
            self._ask(client, (0, 1)).close()
        except (Dropped, CheckpointError, FileNotFoundError):
            return False
        return True

    def _ask(self, client: Client, span: Range | None) -> Answer:
        target = self._target
        try:
            answer = client.get(target or self.url, span)
            if target is not None and answer.status in _EXPIRED:
                answer.close()
                self._target = None
                answer = client.get(self.url, span)
        except Dropped:
            self._target = None
            raise
        status = answer.status
        if status == 200 or (status == 206 and span is not None):
            try:
                self._check_content(answer)
            except CheckpointError:
                answer.close()
                raise
            self._target = answer.url if answer.url != self.url else None
            return answer
        self._target = None
        wait = retry_after(answer.header("Retry-After"))
        answer.close()
        if status in RETRIED:
            raise Dropped(f"the server answered {status}", wait)
        raise self._refusal(status, span)

    def _refusal(self, status: int, span: Range | None) -> Exception:
        if status in {404, 410}:
            return FileNotFoundError(f"{self.shown}: no such file on the server ({status})")
        if status in {401, 403}:
            remedy = (
                "log in with `hf auth login` and ask for access on the model's page"
                if self._of_hub
                else "check the URL; one with a signature may have expired, so get a new one"
            )
            return Forbidden(f"{self.shown}: the server refuses access ({status}); {remedy}")
        if status == 416 and span is not None:
            return CheckpointError(
                f"{self.shown}: the server has no bytes {span[0]} to {span[1]} (416), so the file "
                "is empty, truncated or has changed; open it again"
            )
        return CheckpointError(
            f"{self.shown}: expected the file, the server answered {status}; check the URL"
        )

    def _check_content(self, answer: Answer) -> None:
        if (answer.header("Content-Type") or "").lower().startswith("text/html"):
            raise CheckpointError(
                f"{self.shown}: expected a file, the server sent a web page; check that the URL "
                "downloads without a login or a consent page"
            )
        encoding = (answer.header("Content-Encoding") or "identity").lower()
        if encoding != "identity":
            raise CheckpointError(
                f"{self.shown}: asked for plain bytes, the server sent them encoded as "
                f"{encoding[:40]!r}; download the file another way and open the copy"
            )

    def _check_range(self, answer: Answer, start: int, end: int) -> int:
        """Return where the answer ends: a server may send less than was asked for."""
        stated = answer.header("Content-Range") or "none"
        found = _CONTENT_RANGE.fullmatch(stated)
        if found is not None:
            begin, stop, total = int(found[1]), int(found[2]) + 1, int(found[3])
            nbytes = answer.content_nbytes
            if begin == start < stop <= min(end, total) and nbytes in {None, stop - start}:
                self._check_identity(answer, total)
                return stop
        raise CheckpointError(
            f"{self.shown}: asked for bytes {start} to {end - 1}, the server answered with "
            f"Content-Range {stated[:80]!r} and Content-Length {answer.content_nbytes}; "
            "download the file another way and open the copy"
        )

    def _check_identity(self, answer: Answer, total: int | None) -> None:
        if total is None and self._identity is not None:
            total = self._identity.nbytes
        if total is None:
            raise CheckpointError(
                f"{self.shown}: the server does not say how long the file is; download it "
                "another way and open the copy"
            )
        found = Identity(total, answer.header("ETag"), answer.header("Last-Modified"))
        if self._identity is None:
            self._identity = found
        expected = self._identity
        if self._of_hub:
            linked = answer.linked_etag
            if linked is not None and linked != expected.etag:
                raise self._changed(expected, Identity(total, linked, None))
            expected = Identity(expected.nbytes, found.etag, found.last_modified)
            expected = self._served.setdefault(origin_of(answer.url), expected)
        if not expected.is_same(found):
            raise self._changed(expected, found)

    def _changed(self, expected: Identity, found: Identity) -> CheckpointError:
        def stated(identity: Identity) -> str:
            mark = identity.etag or identity.last_modified
            return f"{identity.nbytes} bytes, {mark[:80]!r}" if mark else f"{identity.nbytes} bytes"

        return CheckpointError(
            f"{self.shown}: the file changed on the server while it was read (expected "
            f"{stated(expected)}; found {stated(found)}); open it again to read it afresh"
        )
