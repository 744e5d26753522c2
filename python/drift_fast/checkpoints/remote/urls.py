"""URLs: what of one may be shown, the origin that a token is for, and where a redirect leads."""

from __future__ import annotations

from urllib.parse import urljoin, urlsplit, urlunsplit

from drift_fast.errors import CheckpointError

Origin = tuple[str, str, int]

_PORTS = {"http": 80, "https": 443}


def shown(url: str) -> str:
    """Return the URL without what may be secret: user, password, query and fragment."""
    parts = urlsplit(url)
    bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return "".join(character if character.isprintable() else "?" for character in bare)


def origin_of(url: str) -> Origin:
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


def redirected(asked: str, url: str, place: str) -> str:
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
