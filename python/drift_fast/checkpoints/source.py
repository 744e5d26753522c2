"""Where a checkpoint comes from: a path on disk, a Hub id, or an http(s) URL.

Reads no weights. A source is a directory or file that exists when `resolve` returns. If the
checkpoint is not on this machine, the directory holds its headers, and `remote` fetches the rest.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_fast._core import Checkpoint
from drift_fast.checkpoints.place import INDEX
from drift_fast.errors import CheckpointError, DriftError
from drift_fast.paths import local_path

if TYPE_CHECKING:
    from drift_fast.checkpoints.remote import RemoteCheckpoint, Transfer

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_URL = re.compile(r"https?://", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, its Hub id and commit, and how to fetch more of it."""

    path: Path
    repo: str | None = None
    revision: str | None = None
    remote: RemoteCheckpoint | None = None
    transfers: list[Transfer] = field(default_factory=list, compare=False)

    def __str__(self) -> str:
        if self.repo is not None:
            return f"{self.repo}@{self.revision}"
        return str(self.path) if self.remote is None else self.remote.url

    def to_dict(self) -> dict[str, Any]:
        """Return what identifies the source in `drift.json`."""
        described: dict[str, Any] = {
            "path": str(self.path),
            "repo": self.repo,
            "revision": self.revision,
        }
        if self.remote is not None:
            described["url"] = self.remote.url
            described["transfer"] = self._transfer()
        return described

    def _transfer(self) -> dict[str, Any] | None:
        """Return the bytes of the last fetch, which are all that a delta needed."""
        if not self.transfers:
            return None
        last = self.transfers[-1]
        return {
            "needed_nbytes": last.wanted_nbytes,
            "downloaded_nbytes": last.fetched_nbytes,
            "cached_nbytes": last.cached_nbytes,
            "total_nbytes": last.total_nbytes,
            "report": str(last),
        }

    def mark(self, file: str) -> dict[str, str | None]:
        """Return the server's mark of a shard's content."""
        return {} if self.remote is None else {"etag": self.remote.etags.get(file)}


def located(source: str, folder: Path) -> str:
    """Return what a file in a folder names: a path from there on, a Hub id or URL as it is."""
    path, here = folder / local_path(source), local_path(source)
    if _URL.match(source):
        return source
    # What is there in the working directory would win over the Hub, and is not what is named.
    is_remote = hub_id(source) is not None and not path.exists() and not here.exists()
    return source if is_remote else str(path)


def hub_id(text: str) -> tuple[str, str | None] | None:
    """Return the repository and the revision of a text that can be a Hub id, else None."""
    found = _HUB_ID.fullmatch(text)
    if found is None or text.startswith((".", "/", "~")) or text.endswith((".safetensors", ".bin")):
        return None
    return found["repo"], found["revision"]


def resolve(source: str | os.PathLike[str], index: str = INDEX) -> Source:
    """Find a checkpoint by its path, Hub id (`org/name`, `org/name@revision`) or URL.

    `index` is the file that says which shards there are; another name than a model's is a delta's.

    A path that exists wins. For a Hub id, a complete snapshot in the Hub's cache is used; without
    one only headers are read, and `Source.remote` fetches ranges of the files. With
    `HF_HUB_OFFLINE` the network is not used.

    Raises:
        FileNotFoundError: neither a path nor a possible Hub id, or a URL that leads nowhere.
        NoDelta: a Hub id or URL of something else, where a delta was asked for.
        DriftError: a Hub id or URL without the packages that `drift-fast[hub]` installs.
        CheckpointError: a Hub id that cannot be resolved, or a server's answer that is not valid.
    """
    path, text = local_path(source), os.fspath(source)
    if not text:
        raise FileNotFoundError("an empty path names no checkpoint")
    if _URL.match(text):
        from drift_fast.checkpoints.remote import open_url

        remote = open_url(text, index=index)
        return Source(remote.directory, remote=remote)
    if path.exists():
        return Source(path.absolute())
    if path.is_symlink():
        raise FileNotFoundError(f"{path}: a link to {path.readlink()}, which is not there")
    found = hub_id(text)
    # What is given as a path of Python is meant as one; a text may be either.
    if found is None or (index != INDEX and isinstance(source, os.PathLike)):
        raise FileNotFoundError(
            f"{text}: no such file or directory, and neither a Hub id of the form org/name "
            "nor an http(s) URL"
        )
    if path.parent.is_dir():
        logger.warning("%s does not exist on this machine; asking the Hub for it", text)
    return _from_hub(*found, index)


def _from_hub(repo: str, revision: str | None, index: str) -> Source:
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise DriftError(
            f"{repo} is not a path on this machine, and resolving it as a Hub id needs "
            "huggingface_hub: pip install 'drift-fast[hub]'"
        ) from error
    if constants.HF_HUB_OFFLINE:
        snapshot = _snapshot(repo, revision)
        return Source(snapshot, repo, snapshot.name)
    from drift_fast.checkpoints.remote import open_hub

    try:
        remote = open_hub(repo, revision, index=index)
    except CheckpointError as error:
        # As huggingface_hub does: if the Hub does not answer, what is here can still be used.
        cached = _whole_snapshot(repo, revision, index)
        if cached is None:
            raise
        logger.warning("%s; using the snapshot in the Hub's cache, %s", error, cached)
        return Source(cached, repo, cached.name)
    cached = _whole_snapshot(repo, remote.revision, index)
    if cached is not None:
        return Source(cached, repo, cached.name)
    return Source(remote.directory, repo, remote.revision, remote)


def _whole_snapshot(repo: str, revision: str | None, index: str) -> Path | None:
    """Return the snapshot in the Hub's cache if all of its shards are there."""
    try:
        snapshot = _snapshot(repo, revision)
        Checkpoint(snapshot if index == INDEX else snapshot / index)
    except (CheckpointError, FileNotFoundError):
        return None
    # A delta is whole with its description.
    return snapshot if index == INDEX or (snapshot / "drift.json").exists() else None


def _snapshot(repo: str, revision: str | None) -> Path:
    """Return the snapshot of a Hub id in the Hub's cache, without using the network.

    Raises:
        CheckpointError: there is none.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{repo}{at}: no such path, and not in the Hub's cache, while HF_HUB_OFFLINE forbids "
            f"asking the Hub ({type(error).__name__}: {_first_line(error)}). Check the id, or "
            "download it first"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no details")
