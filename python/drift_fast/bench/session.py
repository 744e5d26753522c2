"""A run that is ready to begin: its pair on disk, memory touched, page cache warm.

Refuses a debug build.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from drift_fast._core import debug_build
from drift_fast.bench import commands, hardware, page_cache
from drift_fast.bench.options import BenchOptions, cache_directory
from drift_fast.bench.pair import Pair, make_pair
from drift_fast.bench.results import Results
from drift_fast.errors import DriftError

Say = Callable[[str], object]


@dataclass
class Session:
    """A pair that is ready, a folder for output, and the results so far."""

    options: BenchOptions
    pair: Pair
    work: Path
    results: Results
    say: Say
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """Where the timed command writes its Δ."""
        return self.work / "out"

    def clear(self) -> None:
        """Remove what the last command wrote, and wait until the disk is idle."""
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()


def refuse_debug_build() -> None:
    """Refuse to time a debug build.

    Raises:
        DriftError: this is one.
    """
    if debug_build:
        raise DriftError(
            "this is a debug build of drift_fast, so its timings mean nothing; build it with "
            "cargo build --release, or pip install ."
        )


def open_session(kind: str, options: BenchOptions, say: Say) -> Session:
    """Refuse a debug build, make the pair, touch memory, and warm the page cache.

    Raises:
        DriftError: this is a debug build.
        OSError: not enough space.
    """
    refuse_debug_build()
    directory = options.directory or cache_directory()
    renamed = (
        kind == "delta"
        and not {"delta", "merge"}.isdisjoint(options.parts)
        and "mergekit" not in options.without
        and commands.mergekit() is not None
    )
    say(f"pair {options.size} in {directory}")
    pair = make_pair(directory, options.size, layers=options.layers, renamed=renamed, outputs=1)
    results = Results(
        kind=kind,
        size=pair.label,
        nbytes=pair.nbytes,
        delta_nbytes=pair.delta_nbytes,
        threads=options.threads,
        repeats=options.repeats,
        command=options.command,
        hardware=hardware.describe(directory),
        versions=hardware.versions(),
        date=time.strftime("%Y-%m-%d"),
    )
    work = Path(tempfile.mkdtemp(prefix="work-", dir=directory))
    session = Session(options, pair, work, results, say, commands.environment(options.threads))
    _touch_memory(session)
    warm(session)
    return session


def _touch_memory(session: Session) -> None:
    wanted = session.pair.nbytes + session.pair.delta_nbytes
    available = hardware.available_nbytes()
    if available is not None:
        wanted = min(wanted, int(available * 0.8))
    session.say(f"touching {wanted / 1e9:.1f} GB of memory")
    code = f"from drift_fast.bench.page_cache import touch; touch({wanted})"
    done = subprocess.run([sys.executable, "-c", code], check=False, env=session.environment)
    session.results.notes.append(
        f"Before anything ran, another process wrote to every page of {wanted / 1e9:.1f} GB and "
        "ended, since a virtual machine may get memory only once it is used"
        if done.returncode == 0
        else f"Touching {wanted / 1e9:.1f} GB of memory beforehand failed"
    )


def warm(session: Session) -> None:
    """Read the pair once, if it can fit, and note if it does not stay in memory."""
    available = hardware.available_nbytes()
    if available is not None and session.pair.nbytes > available:
        session.results.notes.append(
            f"**Not warm**: the pair has {session.pair.nbytes / 1e9:.1f} GB, but only "
            f"{available / 1e9:.1f} GB of memory are available"
        )
        return
    page_cache.warm(session.pair.files)
    share = page_cache.resident(session.pair.files)
    if share is not None and share < page_cache.WARM:
        session.results.notes.append(
            f"**Not warm**: only {share:.0%} of the pair is in memory after it was read once"
        )


def pick_way(session: Session, part: str, threads: int) -> str:
    """Return the fastest way of the XOR control with this number of threads."""
    out = session.out if part in ("delta", "merge") else None
    command = commands.control(session.pair, "pick", threads=threads, out=out)
    found: dict[str, float] = json.loads(
        subprocess.run(
            command, check=True, capture_output=True, env=commands.environment(threads)
        ).stdout
    )
    session.clear()
    session.say(f"control of {part}, {threads} threads: {next(iter(found))}")
    return next(iter(found))
