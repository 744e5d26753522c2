"""Attempts in a row that brought nothing: how many there may be, and how long to wait between."""

from __future__ import annotations

import logging
import random
import threading

from drift_fast.errors import CheckpointError

logger = logging.getLogger(__name__)

ATTEMPTS = 6
UNREACHED = (
    "Nothing has arrived: check the network, the proxy and HF_ENDPOINT. Without a network give the "
    "path of a copy on this machine, or set HF_HUB_OFFLINE=1 to use the Hub's cache alone"
)
RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_WAIT_LIMIT = 300.0

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


class Patience:
    """How many attempts in a row brought nothing, and how long to wait before the next.

    This is not `urllib3.util.Retry`, which resends requests: an attempt here may be a body that
    broke off, is resumed after its last byte, and counts only if nothing of it arrived.
    """

    def __init__(self, what: str, stop: threading.Event) -> None:
        self._what = what
        self._stop = stop
        self._failures = 0
        self._arrived = False

    def progressed(self) -> None:
        """Reset the count, since bytes arrived; this attempt does not count either."""
        self._failures = -1
        self._arrived = True

    def wait(self, dropped: Dropped) -> None:
        """Wait before the next attempt.

        Raises:
            CheckpointError: the last attempt has failed.
            Stopped: the client was stopped.
        """
        self._failures += 1
        if self._failures >= ATTEMPTS:
            advice = "What has arrived is kept; try again later" if self._arrived else UNREACHED
            raise CheckpointError(
                f"{self._what}: {ATTEMPTS} attempts without progress, the last: {dropped}. {advice}"
            ) from None
        seconds = dropped.retry_after
        if seconds is None:
            seconds = 0.5 * 2.0**self._failures * (0.5 + 0.5 * jitter.random())
        logger.warning(
            "%s: attempt %d of %d failed, %s; the next in %.1f s",
            *(self._what, max(self._failures, 1), ATTEMPTS, dropped, seconds),
        )
        sleep(seconds, self._stop)
        if self._stop.is_set():
            raise Stopped


def retry_after(text: str | None) -> float | None:
    """Return seconds from either form of Retry-After, at most five minutes."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return None if text is None else min(Retry().parse_retry_after(text), _WAIT_LIMIT)
    except (InvalidHeader, ValueError, OverflowError):
        return None
