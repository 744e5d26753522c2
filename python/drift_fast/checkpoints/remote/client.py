"""The HTTP client: one request, the redirects it may follow, and where a token may go.

Owns sessions, redirects, waiting between attempts and which part of a URL is shown; `transfer`
judges what an answer says. Invariant: headers with a token go only to the origin that they are for,
and neither they nor a query, which may hold a signature, reach a message or a log.
"""

from __future__ import annotations

import logging
import random
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit, urlunsplit

from drift_fast import _core
from drift_fast.errors import CheckpointError, DriftError

if TYPE_CHECKING:
    import requests

logger = logging.getLogger(__name__)

Range = tuple[int, int]

ATTEMPTS = 6
RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_REDIRECTS = 10
_CHUNK_NBYTES = 64 << 10
_TIMEOUT = (10.0, 60.0)
_WAIT_LIMIT = 300.0
_REDIRECTED = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}

# Replaced by tests: the spread of waits, and waiting itself.
jitter = random.Random()


def sleep(seconds: float, stop: threading.Event) -> None:
    """Wait that long, or until stopped."""
    stop.wait(seconds)


class Stopped(Exception):
    """Another thread failed or the caller was interrupted, so this one stops."""


class Dropped(Exception):
    """No answer, or a shorter one than was promised: worth another attempt."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Credentials:
    """Headers for one origin (scheme, host, port) and for no other."""

    origin: tuple[str, str, int]
    headers: Mapping[str, str] = field(repr=False)


def shown(url: str) -> str:
    """Return the URL without what may be secret: user, password, query and fragment."""
    parts = urlsplit(url)
    bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return "".join(character if character.isprintable() else "?" for character in bare)


def origin_of(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port.

    Raises:
        CheckpointError: not an http(s) URL with a host, or one with a user or password.
    """
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
    except ValueError:
        raise CheckpointError("a malformed URL; expected https://host/path") from None
    if scheme not in _PORTS or not host:
        raise CheckpointError(f"{shown(url)}: expected an http or https URL with a host")
    if "@" in parts.netloc:
        raise CheckpointError(
            f"{shown(url)}: a user or password in a URL is refused, since URLs are shown and "
            "stored; use a signed URL, or a Hub id, for which the Hub's token is used"
        )
    return scheme, host.lower(), _PORTS[scheme] if port is None else port


def bare_etag(etag: str | None) -> str | None:
    """Return the ETag as huggingface_hub gives it, without quotes and the mark of a weak one."""
    return None if etag is None else etag.removeprefix("W/").strip('"')


class Patience:
    """How many attempts in a row brought nothing, and how long to wait before the next.

    This is not `urllib3.util.Retry`, which resends requests: an attempt here may be a body that
    broke off, is resumed after its last byte, and counts only if nothing of it arrived.
    """

    def __init__(self, what: str, stop: threading.Event) -> None:
        self._what = what
        self._stop = stop
        self._failures = 0

    def progressed(self) -> None:
        """Reset the count, since bytes arrived; this attempt does not count either."""
        self._failures = -1

    def wait(self, dropped: Dropped) -> None:
        """Wait before the next attempt.

        Raises:
            CheckpointError: the last attempt has failed.
            Stopped: the client was stopped.
        """
        self._failures += 1
        if self._failures >= ATTEMPTS:
            raise CheckpointError(
                f"{self._what}: {ATTEMPTS} attempts without progress, the last: {dropped}. What "
                "has arrived is kept; try again later"
            ) from None
        seconds = dropped.retry_after
        if seconds is None:
            seconds = 0.5 * 2.0**self._failures * (0.5 + 0.5 * jitter.random())
        logger.info("%s: %s; asking again in %.1f s", self._what, dropped, seconds)
        sleep(seconds, self._stop)
        if self._stop.is_set():
            raise Stopped


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
        _install_filter()
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
            url = _redirected(asked, url, place)
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

    def _send(
        self, url: str, origin: tuple[str, str, int], span: Range | None
    ) -> requests.Response:
        import requests
        import urllib3

        headers = {
            "User-Agent": f"drift_fast/{_core.__version__}",
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


def _redirected(asked: str, url: str, place: str) -> str:
    """Return where a redirect leads.

    Raises:
        CheckpointError: nowhere, from https to http, or not to an http(s) URL.
    """
    if not place:
        raise CheckpointError(f"{shown(asked)}: the server redirects without saying where")
    try:
        target = urljoin(url, place)
        scheme = origin_of(target)[0]
    except (ValueError, CheckpointError):
        raise CheckpointError(
            f"{shown(asked)}: the server redirects to something that is not an http(s) URL, or to "
            "one with a user or password, which is refused"
        ) from None
    if origin_of(url)[0] == "https" and scheme != "https":
        raise CheckpointError(
            f"{shown(asked)}: the server redirects from https to {shown(target)}, which is not "
            "encrypted and is refused"
        )
    return target


def retry_after(text: str | None) -> float | None:
    """Return seconds from either form of Retry-After, at most five minutes."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return None if text is None else min(Retry().parse_retry_after(text), _WAIT_LIMIT)
    except (InvalidHeader, ValueError, OverflowError):
        return None


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


_own = threading.local()


@contextmanager
def hiding_queries() -> Iterator[None]:
    """Remove queries, which may hold signatures, from what HTTP packages log in this thread."""
    _own.hiding = True
    try:
        yield
    finally:
        _own.hiding = False


class _WithoutQueries(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(_own, "hiding", False) and isinstance(record.args, tuple):
            record.args = tuple(
                str(argument).partition("?")[0] if "?" in str(argument) else argument
                for argument in record.args
            )
        return True


_WITHOUT_QUERIES = _WithoutQueries()


def _install_filter() -> None:
    for name in ("urllib3.connectionpool", "httpx", "httpx2"):
        logging.getLogger(name).addFilter(_WITHOUT_QUERIES)
