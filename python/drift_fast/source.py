"""Where a checkpoint comes from: a path on disk, or a Hub id resolved to its local snapshot.

Owns no reading of weights. A source is a directory or file that exists when `resolve` returns.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_fast.errors import CheckpointError, DriftError

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json"]


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, and the Hub id and commit it stands for if it has one."""

    path: Path
    repo: str | None = None
    revision: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return what identifies the source in `drift.json`."""
        return {"path": str(self.path), "repo": self.repo, "revision": self.revision}


def resolve(source: str | os.PathLike[str]) -> Source:
    """Find a checkpoint on disk, or the snapshot of a Hub id, `org/name` or `org/name@revision`.

    A path that exists wins. Weights are taken from the Hub cache where they are, and downloaded
    otherwise unless `HF_HUB_OFFLINE` is set; only safetensors, their index and the configuration
    are asked for.

    Raises:
        FileNotFoundError: neither a path nor something that reads as a Hub id.
        DriftError: a Hub id without `huggingface_hub` installed.
        CheckpointError: a Hub id that cannot be resolved.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.exists():
        return Source(path.absolute())
    found = _HUB_ID.fullmatch(text)
    if found is None or text.startswith((".", "/", "~")) or text.endswith((".safetensors", ".bin")):
        raise FileNotFoundError(
            f"{text}: no such file or directory, and not a Hub id of the form org/name"
        )
    repo, revision = found["repo"], found["revision"]
    snapshot = _snapshot(repo, revision)
    return Source(snapshot, repo, snapshot.name)


def _snapshot(repo: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DriftError(
            f"{repo} is no path on this machine, and resolving it as a Hub id needs "
            "huggingface_hub: pip install 'drift-fast[hub]'"
        ) from error
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{repo}{at}: no such path, and the Hub cannot resolve it ({type(error).__name__}: "
            f"{_first_line(error)}). Check the id, log in for a gated model, or download it first "
            "if HF_HUB_OFFLINE is set"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no details")
