"""A server on this machine for tests: it gives ranges, misbehaves on demand, and keeps accounts.

Owns no test and nothing of drift_fast. Invariant: every request is in `requests`, with the headers
it came with and the number of body bytes that were sent for it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

Content = bytes | Path
PIECE_NBYTES = 64 << 10


@dataclass
class Request:
    """What was asked, and what was sent for it."""

    method: str
    target: str
    headers: dict[str, str]
    status: int = 0
    nbytes: int = 0
    # What a POST or PUT sent.
    body: bytes = field(default=b"", repr=False)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


@dataclass
class Reply:
    """What is sent; of the content only the span, if there is one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    content: Content = b""
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Fault:
    """How one answer differs from the right one."""

    status: int | None = None
    # Merged into the headers; None leaves one out.
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: bytes | None = None
    # The connection is closed after so many bytes of the body, 0 and less included.
    drop_after: int | None = None
    # The rest of the body comes when the server is released, after so many bytes.
    stall_after: int | None = None
    # No answer at all.
    silent: bool = False


class RangeServer:
    """Files by path, served with ranges; a context manager.

    Switches: `ranges`; `etags`; `last_modified`; `lengths`, whether Content-Length is sent or the
    connection ends; `accepts`, whether a PUT is kept; `authorization`, the required value;
    `redirects`, path → location; `faults`, one for each coming GET, None for a right answer, and
    `always`, for those after; `head_faults` likewise for HEADs, `write_faults` for POSTs and PUTs;
    `change`, after so many GETs what to do.
    """

    def __init__(self, files: Mapping[str, Content] | Path) -> None:
        if isinstance(files, Path):
            files = {
                f"/{path.relative_to(files)}": path for path in files.rglob("*") if path.is_file()
            }
        self.files: dict[str, Content] = dict(files)
        self.ranges = True
        self.etags = True
        self.lengths = True
        self.accepts = False
        self.last_modified: str | None = None
        self.authorization: str | None = None
        self.redirects: dict[str, str | Callable[[Request], str]] = {}
        self.faults: deque[Fault | None] = deque()
        self.head_faults: deque[Fault | None] = deque()
        self.write_faults: deque[Fault | None] = deque()
        self.always: Fault | None = None
        self.change: tuple[int, Callable[[], object]] | None = None
        self.requests: list[Request] = []
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._gets = 0
        owner = self

        class Handler(_Handler):
            server_of = owner

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RangeServer:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def nbytes(self) -> int:
        """Body bytes sent so far."""
        return sum(request.nbytes for request in list(self.requests))

    def asked(self, path: str | None = None, method: str = "GET") -> list[Request]:
        """Return the requests of a path."""
        return [
            request
            for request in list(self.requests)
            if request.method == method and path in {None, request.path}
        ]

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something that requests bring about."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the server waited in vain"
            time.sleep(0.005)

    def reply(self, request: Request) -> Reply:
        """Return the right answer to a request."""
        path = unquote(request.path)
        if request.method == "PUT" and self.accepts:
            self.files[path] = request.body
            return Reply(200)
        if self.authorization not in {None, request.headers.get("authorization")}:
            return Reply(401, {}, b"no")
        if path in self.redirects:
            place = self.redirects[path]
            return Reply(302, {"Location": place if isinstance(place, str) else place(request)})
        if path not in self.files:
            return Reply(404, {"Content-Type": "text/plain"}, b"no such file")
        return self.file(self.files[path], request)

    def file(self, content: Content, request: Request) -> Reply:
        """Return a file or the range of it that is asked for."""
        total = nbytes_of(content)
        headers = {"Content-Type": "application/octet-stream"}
        if self.etags:
            headers["ETag"] = etag_of(content)
        if self.last_modified is not None:
            headers["Last-Modified"] = self.last_modified
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if not self.ranges or found is None:
            return Reply(200, headers, content)
        start, end = int(found[1]), min(int(found[2]) + 1, total)
        if start >= total:
            return Reply(416, {"Content-Range": f"bytes */{total}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        return Reply(206, headers, content, (start, end))

    def next_fault(self, method: str) -> Fault | None:
        """Count a GET and return what is to be wrong with its answer, or with a HEAD's."""
        with self._lock:
            if method == "HEAD":
                return self.head_faults.popleft() if self.head_faults else None
            if method != "GET":
                return self.write_faults.popleft() if self.write_faults else None
            self._gets += 1
            if self.change is not None and self._gets > self.change[0]:
                change, self.change = self.change, None
                change[1]()
            return self.faults.popleft() if self.faults else self.always


class HubServer(RangeServer):
    """The Hub as huggingface_hub sees it: repositories by id and revision, large files elsewhere.

    `repos` holds commit → file → content by id, `branches` the commit of a branch. `gated` and
    `restricted` ids are refused without and with a token. Files of at least `large_nbytes` are
    redirected to `cdn`, under a signature.
    """

    def __init__(
        self, repos: Mapping[str, Mapping[str, Mapping[str, Content]]], cdn: RangeServer
    ) -> None:
        super().__init__({})
        self.repos = repos
        self.branches: dict[str, str] = {}
        self.gated: set[str] = set()
        self.large_nbytes = 4096
        self.cdn = cdn
        self.signature = "signed-for-one"

    def commit_of(self, repo: str, revision: str) -> str:
        """Return the commit of a branch, or the commit itself."""
        return self.branches.get(revision, revision)

    def reply(self, request: Request) -> Reply:
        listed = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/([^/]+)", request.path)
        if listed is not None and listed[1] in self.repos:
            files = self.repos[listed[1]].get(self.commit_of(listed[1], listed[2]), {})
            rows = [{"type": "file", "path": name, "size": 0, "oid": "0" * 40} for name in files]
            return Reply(200, {"Content-Type": "application/json"}, json.dumps(rows).encode())
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.*)", request.path)
        if found is None:
            return Reply(404, {}, b"the Hub has nothing there")
        repo, revision, name = found[1], unquote(found[2]), unquote(found[3])
        if repo in self.gated:
            return Reply(403, {"X-Error-Code": "GatedRepo"})
        if repo not in self.repos:
            return Reply(401, {"X-Error-Code": "RepoNotFound"})
        commit = self.commit_of(repo, revision)
        if commit not in self.repos[repo]:
            return Reply(404, {"X-Error-Code": "RevisionNotFound"})
        if name not in self.repos[repo][commit]:
            return Reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = self.repos[repo][commit][name]
        if nbytes_of(content) < self.large_nbytes:
            reply = self.file(content, request)
            reply.headers["X-Repo-Commit"] = commit
            return reply
        place = f"/blob/{etag_of(content).strip(chr(34))}"
        self.cdn.files[place] = content
        return Reply(
            302,
            {
                # By another host name: huggingface_hub follows redirects to another port by itself.
                "Location": f"http://localhost:{self.cdn.port}{place}"
                f"?Signature={quote(self.signature)}",
                "X-Repo-Commit": commit,
                "X-Linked-Size": str(nbytes_of(content)),
                "X-Linked-Etag": f'"linked-{etag_of(content)[1:]}',
            },
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    # Of more connections than the queue holds, the rest would come a second later.
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away in the middle is what half of the tests are about.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: RangeServer
    # Headers and body are sent apart, which Nagle's algorithm would delay by 40 ms.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        server = self.server_of
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers)
        request.body = self.rfile.read(int(headers.get("content-length", 0)))
        fault = server.next_fault(self.command) or Fault()
        server.requests.append(request)
        if fault.silent:
            self.close_connection = True
            return
        reply = server.reply(request)
        if fault.status is not None:
            reply = Reply(fault.status, {"Content-Type": "text/plain"})
        if fault.body is not None:
            reply.content, reply.span = fault.body, None
        start, end = reply.span or (0, nbytes_of(reply.content))
        sent: dict[str, str | None] = {**reply.headers, "Content-Length": str(end - start)}
        if not server.lengths:
            sent |= {"Content-Length": None, "Connection": "close"}
        sent |= fault.headers
        request.status = reply.status
        try:
            self.send_response_only(reply.status)
            for name, value in sent.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self._send_body(request, fault, reply.content, start, end)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send_body(
        self, request: Request, fault: Fault, content: Content, start: int, end: int
    ) -> None:
        stop = end if fault.drop_after is None else min(end, start + fault.drop_after)
        position = start
        if fault.stall_after is not None:
            for piece in pieces(content, start, min(stop, start + fault.stall_after)):
                # Counted before: a client may look as soon as it has the last of them.
                request.nbytes += len(piece)
                position += len(piece)
                self.wfile.write(piece)
            self.server_of.released.wait()
        for piece in pieces(content, position, stop):
            request.nbytes += len(piece)
            self.wfile.write(piece)
        if fault.drop_after is not None:
            self.close_connection = True


def nbytes_of(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def etag_of(content: Content) -> str:
    """Return a strong ETag: of the bytes, or of a file's size and time."""
    if isinstance(content, Path):
        found = content.stat()
        return f'"{found.st_size:x}-{found.st_mtime_ns:x}"'
    return f'"{hashlib.sha256(content).hexdigest()}"'


def pieces(content: Content, start: int, end: int) -> Iterator[bytes]:
    """Yield a range in pieces, so that a large file is never in memory."""
    if isinstance(content, bytes):
        for begin in range(start, end, PIECE_NBYTES):
            yield content[begin : min(begin + PIECE_NBYTES, end)]
        return
    with content.open("rb") as file:
        file.seek(start)
        while start < end:
            data = file.read(min(PIECE_NBYTES, end - start))
            if not data:
                return
            start += len(data)
            yield data
