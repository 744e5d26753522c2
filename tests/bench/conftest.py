"""A tiny pair of the benchmark suite, and a session on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from drift_fast.bench import (
    commands,
)
from drift_fast.bench.options import BenchOptions
from drift_fast.bench.pair import Pair, make_pair
from drift_fast.bench.session import Session
from support.bench_runs import empty_results, quiet


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="session")
def tiny(directory: Path) -> Pair:
    """A tiny pair with the renamed checkpoint; read only."""
    return make_pair(directory, "tiny", renamed=True)


@pytest.fixture
def session(tiny: Pair, directory: Path, tmp_path: Path) -> Session:
    """A session on the tiny pair that has run nothing yet."""
    return Session(
        BenchOptions(size="tiny", repeats=2, cold=True),
        tiny,
        tmp_path,
        empty_results(tiny),
        quiet,
        commands.environment(1),
    )
