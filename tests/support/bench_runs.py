"""Helpers of the tests of the benchmark suite."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from drift_fast.bench.commands import Entry
from drift_fast.bench.options import RIVALS
from drift_fast.bench.pair import Pair
from drift_fast.bench.results import Results

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
NO_RIVALS = tuple(f"--without={name}" for name in RIVALS)


def quiet(line: str) -> None:
    """Say nothing."""


def empty_results(pair: Pair, kind: str = "delta") -> Results:
    return Results(
        kind=kind,
        size=pair.label,
        nbytes=pair.nbytes,
        delta_nbytes=pair.delta_nbytes,
        threads=2,
        repeats=2,
        command="drift-fast bench",
        hardware={
            "processor": "a processor",
            "machine": "x86_64",
            "cores": 2,
            "memory_nbytes": 2**34,
            "system": "Linux",
            "file_system": "ext4",
        },
        versions={"drift_fast": "0.1.0", "python": "3.11"},
        date="2026-11-24",
    )


def planted_rival(tmp_path: Path, results: Mapping[str, Any]) -> Entry:
    """Return a rival whose statistics are these."""
    path = tmp_path / "planted.json"
    code = f"import pathlib; pathlib.Path({str(path)!r}).write_text({json.dumps(results)!r})"
    command = (sys.executable, "-c", code)
    return Entry("statistics", "planted", "a planted rival", command, command, results=path)
