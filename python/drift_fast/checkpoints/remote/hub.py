"""A checkpoint on the Hugging Face Hub, pinned to a commit.

Owns the calls of huggingface_hub, limited to what every version since 0.34 has, and what its errors
mean for a user. The token is huggingface_hub's own and goes only to its endpoint.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from drift_fast._core import __version__
from drift_fast.checkpoints.diagnosis import CONVERT, NoDelta, explain, explain_no_delta
from drift_fast.checkpoints.place import INDEX, SINGLE, Place
from drift_fast.checkpoints.remote.attempts import RETRIED, Dropped, Patience, retry_after
from drift_fast.checkpoints.remote.checkpoint import RemoteCheckpoint
from drift_fast.checkpoints.remote.client import Client, Credentials
from drift_fast.checkpoints.remote.logs import hiding_queries
from drift_fast.checkpoints.remote.shards import (
    INDEX_NBYTES,
    PICKLES,
    SMALL_NBYTES,
    open_indexed,
    open_single,
    shard_names,
    single_wins,
)
from drift_fast.checkpoints.remote.sparse import locked, make_directory
from drift_fast.checkpoints.remote.tasks import run_together
from drift_fast.checkpoints.remote.transfer import Identity, RemoteFile
from drift_fast.checkpoints.remote.urls import origin_of, shown
from drift_fast.config_files import read_regular
from drift_fast.errors import CheckpointError, DriftError

_COMMIT = re.compile(r"[0-9a-f]{40}")
# The packages that send the requests of huggingface_hub, depending on its version.
_HTTP_PACKAGES = frozenset({"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2"})

Found = TypeVar("Found")


def open_hub(
    repo: str, revision: str | None, *, index: str = INDEX, cache: Path | None = None
) -> RemoteCheckpoint:
    """Open a model repository of the Hub; only headers and the index are downloaded.

    `revision` is a branch, tag or commit; None is the main branch. It is resolved to a commit once,
    and all later requests name that commit. The endpoint is huggingface_hub's, `HF_ENDPOINT`.
    `index` is the name of a delta's index where a delta is asked for.

    Raises:
        FileNotFoundError: the repository has no safetensors; NoDelta where it has no delta.
        CheckpointError: a repository or revision that is not there or not accessible, a pickled
            checkpoint, an index or answer that cannot be used, or no progress in several attempts.
        DriftError: `huggingface_hub` or `requests` is not installed.
    """
    hub = Hub(repo, revision)
    with Client(hub.credentials()) as client:
        single = hub.metadata(client, SINGLE) if index == INDEX else None
        first = single or hub.metadata(client, index)
        if first is None:
            raise hub.without(client, index)
        hub.pin(first.commit_hash)
        readable = f"{repo}-{hub.revision}"
        directory = make_directory(cache, readable, hub.url_of(""))
        with locked(directory):
            text = hub.small_file(client, index)
            if single is not None and single_wins(text, shown(hub.url_of(index))):
                files = open_single(client, directory, hub.file(SINGLE, single))
            else:
                if text is None:
                    raise CheckpointError(f"{hub}: {index} has disappeared; try again")
                place = f"{hub}/{index}"
                found = hub.files(client, shard_names(text, place))
                files = open_indexed(client, directory, text, place, found.__getitem__, index)
    return RemoteCheckpoint(
        directory,
        shown(hub.url_of("")),
        files,
        small_file=hub.small_file,
        repo=repo,
        revision=hub.revision,
        credentials=hub.credentials,
    )


class Hub:
    """A repository, at a commit once it is pinned, and what the Hub says about its files.

    `log_in` is what helps where the Hub refuses.
    """

    def __init__(
        self,
        repo: str,
        revision: str | None,
        log_in: str = "log in with `hf auth login` or set HF_TOKEN",
    ) -> None:
        try:
            import huggingface_hub  # noqa: F401
        except ImportError as error:
            raise DriftError(
                f"the Hub, for {repo}, needs huggingface_hub: pip install 'drift-fast[hub]'"
            ) from error
        self.repo = repo
        self.revision = revision
        self._log_in = log_in

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    def url_of(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        try:
            return str(hf_hub_url(self.repo, name, revision=self.revision))
        except ValueError:
            raise CheckpointError(
                f"{self.repo!r}: expected a Hub id of the form org/name"
            ) from None

    def credentials(self) -> Credentials:
        """Return huggingface_hub's headers, with the token if there is one, for its endpoint."""
        # By name: the type hints do not export it, though all versions have it.
        utils = importlib.import_module("huggingface_hub.utils")
        headers = utils.build_hf_headers(library_name="drift_fast", library_version=__version__)
        return Credentials(origin_of(self.url_of("")), headers)

    def metadata(self, client: Client, name: str) -> Any:
        """Return commit, ETag and size of a file; None if there is no such file."""
        from huggingface_hub import get_hf_file_metadata

        return self.call(
            client,
            partial(
                get_hf_file_metadata,
                self.url_of(name),
                library_name="drift_fast",
                library_version=__version__,
            ),
        )

    def pin(self, commit: str | None) -> None:
        """Use this commit from now on."""
        if commit is None or not _COMMIT.fullmatch(commit):
            raise CheckpointError(
                f"{self}: the server states no commit, so it does not answer like a Hub; check "
                "HF_ENDPOINT and the proxy"
            )
        self.revision = commit

    def file(self, name: str, metadata: Any) -> RemoteFile:
        """Return a file of the pinned commit, held to the identity that the Hub states."""
        if metadata.commit_hash != self.revision or metadata.size is None or not metadata.etag:
            raise CheckpointError(
                f"{self}: the Hub does not give length and ETag of {name} at this commit; try again"
            )
        return RemoteFile(self.url_of(name), Identity(metadata.size, metadata.etag, None))

    def files(self, client: Client, names: list[str]) -> dict[str, RemoteFile]:
        """Return shards of the pinned commit."""
        found: dict[str, RemoteFile] = {}

        def ask(name: str) -> None:
            metadata = self.metadata(client, name)
            if metadata is None:
                raise FileNotFoundError(f"{self}: the index names {name}, which is missing")
            found[name] = self.file(name, metadata)

        run_together([partial(ask, name) for name in names], client.stop)
        return found

    def small_file(self, client: Client, name: str) -> bytes | None:
        """Return a small file of the pinned commit, through huggingface_hub's own cache."""
        from huggingface_hub import hf_hub_download

        metadata = self.metadata(client, name)
        if metadata is None:
            return None
        limit_nbytes = INDEX_NBYTES if name == INDEX else SMALL_NBYTES
        if metadata.size is None or metadata.size > limit_nbytes:
            raise CheckpointError(
                f"{self}: {name} has {metadata.size} bytes, expected at most {limit_nbytes}"
            )
        path = self.call(
            client,
            partial(
                hf_hub_download,
                self.repo,
                name,
                revision=self.revision,
                library_name="drift_fast",
                library_version=__version__,
            ),
        )
        try:
            return None if path is None else read_regular(Path(path), limit_nbytes)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}; remove it from the Hub's cache") from None

    def without(self, client: Client, index: str) -> Exception:
        """Return the error for a repository that has no checkpoint at its root: what it is."""
        from huggingface_hub import list_repo_files

        try:
            names = self.call(client, partial(list_repo_files, self.repo, revision=self.revision))
        except CheckpointError:
            # A mirror may have files and no list of them.
            names = None
        if names is not None:
            place = Place.on_the_hub(self.repo, names)
            return explain(place) if index == INDEX else explain_no_delta(place)
        if index != INDEX:
            return NoDelta(f"{self}: not a delta: the repository has no {index}")
        for name in PICKLES:
            if self.metadata(client, name) is not None:
                return CheckpointError(f"{self}: found {name} and no safetensors: {CONVERT}")
        return FileNotFoundError(f"{self}: the repository has neither {SINGLE} nor {INDEX}")

    def call(self, client: Client, call: Callable[[], Found]) -> Found | None:
        """Return what a call of huggingface_hub does, tried again where that may help.

        None where there is no such file.

        Raises:
            CheckpointError: the Hub refuses or cannot be asked.
        """
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        patience = Patience(str(self), client.stop)
        while True:
            try:
                with hiding_queries():
                    return call()
            # Judged outside of this block: messages of huggingface_hub may hold signed URLs.
            except Exception as error:
                failure = error
            if isinstance(failure, EntryNotFoundError) and not isinstance(
                failure, LocalEntryNotFoundError
            ):
                return None
            dropped = _transient(failure)
            if dropped is None:
                raise self._refusal(failure)
            patience.wait(dropped)

    def _refusal(self, failure: Exception) -> Exception:
        from huggingface_hub import errors

        page = self.url_of("").partition("/resolve/")[0]
        if isinstance(failure, errors.GatedRepoError):
            what = f"access to the model is restricted; ask for it at {page} and {self._log_in}"
        elif isinstance(failure, errors.RepositoryNotFoundError):
            what = f"no such model at {page}, or a private one; check the id, or {self._log_in}"
        elif isinstance(failure, errors.RevisionNotFoundError):
            what = f"no such branch, tag or commit; choose one that {page} lists"
        elif any(
            isinstance(error, errors.OfflineModeIsEnabled) for error in (failure, failure.__cause__)
        ):
            what = "HF_HUB_OFFLINE is set; unset it to ask the Hub, or use a copy on this machine"
        elif isinstance(failure, errors.HfHubHTTPError):
            status = getattr(failure.response, "status_code", None)
            what = f"the Hub refuses ({status}); check the id and {self._log_in}"
        elif isinstance(failure, errors.LocalEntryNotFoundError):
            what = "the Hub cannot be asked; check the connection, HF_ENDPOINT and the proxy"
        else:
            return failure
        return CheckpointError(f"{self}: {what}")


def _transient(failure: Exception) -> Dropped | None:
    """Return why another attempt may succeed, None if it cannot."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # hf_hub_download raises this if the request failed and its cache has nothing; see the cause.
    error = failure.__cause__ if isinstance(failure, LocalEntryNotFoundError) else failure
    if isinstance(error, HfHubHTTPError):
        response = error.response
        status = getattr(response, "status_code", None)
        if status in RETRIED:
            wait = retry_after(response.headers.get("Retry-After"))
            return Dropped(f"the Hub answered {status}", wait)
    elif type(error).__module__.partition(".")[0] in _HTTP_PACKAGES:
        return Dropped(type(error).__name__)
    return None
