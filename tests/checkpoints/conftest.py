"""Servers of small checkpoints, and waits that are recorded in place of waited."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from drift_fast.checkpoints.remote import RemoteCheckpoint, attempts, open_url
from support.range_server import RangeServer
from support.remote import FILE, SINGLE


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited; the spread of waits is seeded."""
    waited: list[float] = []
    monkeypatch.setattr(attempts, "sleep", lambda seconds, stop: waited.append(seconds))
    monkeypatch.setattr(attempts, "jitter", random.Random(0))
    return waited


@pytest.fixture
def server(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """A single file and its configuration under /m, with no proxy in between."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with RangeServer({f"/m/{SINGLE}": FILE, "/m/config.json": b'{"a": 1}'}) as started:
        yield started


@pytest.fixture
def opened(server: RangeServer, tmp_path: Path) -> RemoteCheckpoint:
    """The single file, opened; what the server did for it is forgotten."""
    checkpoint = open_url(f"{server.url}/m", cache=tmp_path / "cache")
    server.requests.clear()
    return checkpoint


@pytest.fixture
def cdn() -> Iterator[RangeServer]:
    """A second server, on another port."""
    with RangeServer({"/blob": FILE}) as started:
        yield started
