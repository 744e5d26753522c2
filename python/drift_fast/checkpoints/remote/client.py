"""The HTTP client: one request, the redirects it may follow, and where a token may go.

Owns sessions and redirects; `transfer` judges what an answer says. Invariant: headers with a token
go only to the origin that they are for, and neither they nor a query, which may hold a signature,
reach a message or a log.
"""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from types import TracebackType
from typing import TYPE_CHECKING, Any

from drift_fast._core import __version__
from drift_fast.checkpoints.remote.attempts import Dropped, Stopped
from drift_fast.checkpoints.remote.logs import hiding_queries, install_filter
from drift_fast.checkpoints.remote.urls import Origin, origin_of, redirected, shown
from drift_fast.errors import CheckpointError, DriftError

if TYPE_CHECKING:
    import requests

Range = tuple[int, int]

_REDIRECTS = 10
_CHUNK_NBYTES = 64 << 10
_TIMEOUT = (10.0, 60.0)
_REDIRECTED = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True)
class Credentials:
    """Headers for one origin (scheme, host, port) and for no other."""

    origin: Origin
    headers: Mapping[str, str] = field(repr=False)


def bare_etag(etag: str | None) -> str | None:
    """Return the ETag as huggingface_hub gives it, without quotes and the mark of a weak one."""
    return None if etag is None else etag.removeprefix("W/").strip('"')


@dataclass
class Answer:
    """A response whose body has not been read, and the URL that gave it after redirects."""

    response: requests.Response
    url: str
    # The ETag that the Hub itself states, wherever it redirects to; without quotes.
    linked_etag: str | None

    @property
    def status(self) -> int:
        return self.response.status_code

    def header(self, name: str) -> str | None:
        value: str | None = self.response.headers.get(name)
        return value

    @property
    def content_nbytes(self) -> int | None:
        """The Content-Length, if it is stated."""
        text = self.header("Content-Length") or ""
        return int(text) if re.fullmatch(r"\d{1,19}", text) else None

    def close(self) -> None:
        self.response.close()


class Client:
    """Sessions, one for each thread, for one open or fetch; `stop` ends everything in them.

    Proxies and certificate bundles come from the environment; passwords and cookies do not.
    """

    def __init__(self, credentials: Credentials | None = None) -> None:
        _import_requests()
        install_filter()
        self.stop = threading.Event()
        self.received_nbytes = 0
        self._credentials = credentials
        self._local = threading.local()
        self._sessions: list[requests.Session] = []
        self._lock = threading.Lock()

    def get(self, url: str, span: Range | None = None) -> Answer:
        """Request a file or its bytes `[start, end)`, following redirects.

        Raises:
            Dropped: no answer came.
            CheckpointError: a redirect that is not followed, or a certificate that is not trusted.
        """
        asked, linked = url, None
        for _ in range(_REDIRECTS + 1):
            if self.stop.is_set():
                raise Stopped
            origin = origin_of(url)
            response = self._send(url, origin, span)
            if self._credentials is not None and origin == self._credentials.origin:
                linked = response.headers.get("X-Linked-Etag", linked)
                if linked is None and response.status_code not in _REDIRECTED:
                    linked = response.headers.get("ETag")
            if response.status_code not in _REDIRECTED:
                return Answer(response, url, bare_etag(linked))
            place = response.headers.get("Location", "")
            response.close()
            url = redirected(asked, url, place)
        raise CheckpointError(f"{shown(asked)}: more than {_REDIRECTS} redirects; check the URL")

    def body(self, answer: Answer, nbytes: int | None) -> Iterator[bytes]:
        """Yield `nbytes` of a body as they arrive, or all of it.

        Raises:
            Dropped: the body ends earlier.
        """
        import urllib3

        left = nbytes
        while left is None or left > 0:
            if self.stop.is_set():
                raise Stopped
            failure: Exception | None = None
            data = b""
            try:
                amount = _CHUNK_NBYTES if left is None else min(left, _CHUNK_NBYTES)
                data = answer.response.raw.read(amount, decode_content=False)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                failure = error
            if failure is not None:
                raise Dropped(_reason(failure))
            if not data:
                if left is None:
                    return
                raise Dropped(f"the connection ended {left} bytes early")
            with self._lock:
                self.received_nbytes += len(data)
            yield data
            left = None if left is None else left - len(data)

    def close(self) -> None:
        """Stop what is still running and close the connections."""
        self.stop.set()
        with self._lock:
            for session in self._sessions:
                session.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, url: str, origin: Origin, span: Range | None) -> requests.Response:
        import requests
        import urllib3

        headers = {
            "User-Agent": f"drift_fast/{__version__}",
            # A compressed body would have other offsets.
            "Accept-Encoding": "identity",
        }
        if self._credentials is not None and origin == self._credentials.origin:
            headers.update(self._credentials.headers)
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        failure: Exception
        try:
            with hiding_queries():
                return self._session().get(
                    url, headers=headers, allow_redirects=False, stream=True, timeout=_TIMEOUT
                )
        # Raised outside of this block: as context, these exceptions would show whole URLs.
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            failure = error
        reason = _reason(failure)
        if isinstance(_innermost(failure), ssl.SSLCertVerificationError):
            raise CheckpointError(
                f"{shown(url)}: the server's certificate is not trusted ({reason}); behind a proxy "
                "that inspects connections, set REQUESTS_CA_BUNDLE to its certificates"
            )
        dropped = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)
        if isinstance(failure, dropped):
            raise Dropped(reason)
        raise CheckpointError(f"{shown(url)}: the request failed ({reason}); check the URL")

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is not None:
            return session
        import requests

        class OneHop(requests.Session):
            def get_redirect_target(self, resp: requests.Response) -> str | None:
                # If this returned a target, the body of the redirect would be read to its end.
                return None

        session = self._local.session = OneHop()
        # Without an auth of its own a session takes passwords from ~/.netrc.
        session.auth = _as_it_is
        # Cookies would go to other ports of the host that set them.
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        with self._lock:
            self._sessions.append(session)
        return session


def _innermost(error: BaseException) -> BaseException:
    cause = error.__cause__ or error.__context__
    return error if cause is None else _innermost(cause)


def _reason(error: BaseException) -> str:
    """Name the failure briefly; the messages of requests and urllib3 hold whole URLs."""
    cause = _innermost(error)
    detail = cause.strerror if isinstance(cause, OSError) else None
    return f"{type(cause).__name__}: {detail}" if detail else type(cause).__name__


def _as_it_is(request: Any) -> Any:
    return request


def _import_requests() -> None:
    try:
        import requests  # noqa: F401
    except ImportError as error:
        raise DriftError(
            "reading over HTTP needs requests: pip install 'drift-fast[hub]'"
        ) from error
