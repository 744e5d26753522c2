"""The machine and the software of a run: processor, memory, file system, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from drift_fast._core import __version__

_LIBRARIES = ("numpy", "torch", "transformers", "safetensors", "mergekit", "matplotlib")
_MEMORY = "/proc/meminfo"


def describe(directory: Path) -> dict[str, Any]:
    """Return the machine, and the file system of `directory`."""
    return {
        "processor": _processor(),
        "machine": platform.machine(),
        "cores": cores(),
        "memory_nbytes": next(iter(proc_nbytes(_MEMORY, "MemTotal")), None),
        "system": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(directory),
    }


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_nbytes() -> int | None:
    """Return the memory that is free without swapping; None if the system does not say."""
    return next(iter(proc_nbytes(_MEMORY, "MemAvailable")), None)


def versions() -> dict[str, str]:
    """Return the versions of the timed packages, and the commit if there is one."""
    found = {"drift_fast": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def proc_nbytes(path: str, *fields: str) -> list[int]:
    """Return kB fields of a file under /proc, as bytes; nothing if one of them is missing."""
    try:
        lines = [line.partition(":") for line in Path(path).read_text().splitlines()]
        found = {name: int(value.split()[0]) * 1024 for name, _, value in lines if name in fields}
        return [found[name] for name in fields]
    except (OSError, ValueError, LookupError):
        return []


def _file_system(directory: Path) -> str:
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    home = directory.resolve()
    above = [
        (len(fields[1]), fields[2])
        for fields in mounts
        if len(fields) > 2 and home.is_relative_to(fields[1])
    ]
    return max(above)[1] if above else "unknown"


def _commit() -> str | None:
    """Return the checkout's commit, with a + if files differ from it; None for a wheel."""
    here = Path(__file__).parent
    try:
        tracked = _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(here, "rev-parse", "--short=10", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "") if tracked else None


def _git(directory: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(directory), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()
