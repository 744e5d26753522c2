"""A delta put on the Hugging Face Hub, with a model card.

All files arrive in one commit, or none does. Directories of this machine, which the sources in
`drift.json` name, stay here. The calls are those that every huggingface_hub since 0.34 has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_fast._core import __version__
from drift_fast.checkpoints.place import SHARD
from drift_fast.checkpoints.remote.client import Client
from drift_fast.checkpoints.remote.hub import Hub
from drift_fast.checkpoints.remote.shards import shard_names
from drift_fast.checkpoints.source import hub_id
from drift_fast.config_files import json_text, printable
from drift_fast.delta.card import CARD, Model, models_of, published, read_card, write_card
from drift_fast.delta.format import AGAIN, DESCRIPTION, INDEX
from drift_fast.errors import CheckpointError, DriftError

if TYPE_CHECKING:
    from drift_fast.delta.delta import Delta

MESSAGE = "Upload Δ with drift_fast"
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write there"


def push(
    delta: Delta,
    repo: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Do what `Delta.push_to_hub` says."""
    if delta.path is None:
        raise ValueError(
            "the delta to push is not on disk: write it with delta.save(path), and push that"
        )
    if hub_id(repo) != (repo, None):
        raise ValueError(f"{repo!r}: expected a Hub id of the form org/name")
    target = _Target(repo, revision, token)
    described, version = _described(delta)
    try:
        # A stranger's file may state anything, and nothing is created for what makes no card.
        write_card(delta, repo, version, list(models_of(delta.sources)), {})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{delta.path / DESCRIPTION}: the sources are not what drift_fast writes ({error}); "
            f"{AGAIN}"
        ) from error
    with Client() as client:
        held = target.create(client, private)
        delta.check()
        models = [target.with_card(client, model) for model in models_of(delta.sources)]
        card = write_card(delta, str(target.hub), version, models, target.card(client, target.hub))
        commit = target.call(
            client,
            target.api.create_commit,
            repo,
            list(_operations(delta.path, {CARD: card.encode(), DESCRIPTION: described}, held)),
            commit_message=commit_message,
            revision=revision,
        )
    return str(commit.commit_url)


class _Target:
    """The repository that a delta is pushed to."""

    def __init__(self, repo: str, revision: str | None, token: str | bool | None) -> None:
        self.hub = Hub(repo, revision, _LOG_IN)
        from huggingface_hub import HfApi, get_token

        if token in (None, True) and get_token() is None:
            raise CheckpointError(f"{self.hub}: there is no token; {_LOG_IN}")
        self.api = HfApi(token=token, library_name="drift_fast", library_version=__version__)

    def call(self, client: Client, call: Any, *given: Any, **named: Any) -> Any:
        try:
            return self.hub.call(client, partial(call, *given, **named))
        except RuntimeError as error:
            # What huggingface_hub makes of any failure while it sends a large file.
            cause = type(error.__cause__ or error).__name__
            raise CheckpointError(
                f"{self.hub}: the upload broke off ({cause}); push again, which sends the rest"
            ) from None

    def create(self, client: Client, private: bool | None) -> list[str]:
        """Make sure that the repository and the branch are there, and return its files."""
        repo, revision = self.hub.repo, self.hub.revision
        self.call(client, self.api.create_repo, repo, private=private, exist_ok=True)
        if private and not self.call(client, self.api.model_info, repo).private:
            raise DriftError(
                f"{repo}: is there already and public; make it private in its settings, or push "
                "to another name"
            )
        if revision is not None:
            self.call(client, self.api.create_branch, repo, branch=revision, exist_ok=True)
        held: list[str] = self.call(client, self.api.list_repo_files, repo, revision=revision)
        others = set(held) - {CARD, ".gitattributes"}
        if others and DESCRIPTION not in held:
            raise FileExistsError(
                f"{self.hub}: holds {len(others)} files of something that is not a delta, such as "
                f"{printable(min(others), 80)}; push to another name"
            )
        return held

    def card(self, client: Client, hub: Hub) -> dict[str, Any]:
        """Return the metadata of a repository's card, where it can be read."""
        find = partial(self.api.hf_hub_download, hub.repo, CARD, revision=hub.revision)
        try:
            path = hub.call(client, find)
        except CheckpointError:
            return {}
        return {} if path is None else read_card(Path(path))

    def with_card(self, client: Client, model: Model) -> Model:
        """Return a source with what its card states, on the Hub or beside its files."""
        stated = {} if model.repo is None else self.card(client, Hub(model.repo, model.revision))
        folder = model.path if model.path.is_dir() else model.path.parent
        return replace(model, stated=stated or read_card(folder / CARD))


def _described(delta: Delta) -> tuple[bytes, str]:
    """Return `drift.json` without paths of this machine, and the version that wrote it."""
    import msgspec

    assert delta.path is not None
    text = (delta.path / DESCRIPTION).read_bytes()
    parts: dict[str, Any] = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    version = msgspec.json.decode(parts["drift_fast_version"])
    return json_text({**parts, "sources": published(delta.sources)}), str(version)


def _operations(path: Path, texts: dict[str, bytes], held: Sequence[str]) -> Iterator[Any]:
    """Yield what a commit consists of; shards of an earlier delta are removed."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    shards = shard_names((path / INDEX).read_bytes(), str(path / INDEX))
    for name, text in texts.items():
        yield CommitOperationAdd(name, text)
    for name in [INDEX, *shards]:
        yield CommitOperationAdd(name, path / name)
    for name in held:
        if name.startswith("delta-") and SHARD.fullmatch(name) and name not in shards:
            yield CommitOperationDelete(name)
