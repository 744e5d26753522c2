"""The model card of a shared delta: its sources, their licenses, how it came about, how to use it.

Owns the text. Names and licenses come from files of unknown origin, so they are shown as code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from drift_fast.checkpoints.source import hub_id
from drift_fast.config_files import printable, read_regular
from drift_fast.delta.statistics import Statistics

if TYPE_CHECKING:
    from drift_fast.delta.delta import Delta

CARD = "README.md"
_MAX_NBYTES = 1_000_000
_LINK = re.compile(r"https?://[^\s()<>|]+")
_TEXT = """
# {name}

Δ = W_reasoning − W_multimodal, tensor by tensor, of the models below. This is not a model: with
[drift_fast](https://github.com/drift-fast/drift_fast) it steers the gradients of a multimodal model
that is fine-tuned, by the method DRIFT ([arXiv 2510.15050](https://arxiv.org/abs/2510.15050)).

## How to use it

```python
import drift_fast  # pip install 'drift-fast[hub]'

delta = drift_fast.Delta.open("{place}")
drift_fast.attach(trainer, delta)  # before trainer.train()
```

Only tensors that are attached or asked for are downloaded. What is read is compared with checksums.

## Sources

| | model | revision | license |
|---|---|---|---|
{models}

Δ is made of the weights of all of them, so the license of each applies to it. Where one is unknown,
check it before you use or share this delta. Whoever shares it states its own license, as `license`
in the metadata of this card, where it stays when the delta is pushed again.

## How it was computed

{facts}

## Statistics

```text
{statistics}
```
"""


@dataclass(frozen=True)
class Model:
    """A checkpoint that a delta was computed from, and what its card states, if it was found."""

    role: str
    path: Path
    repo: str | None
    revision: str | None
    stated: Mapping[str, Any]

    def row(self) -> str:
        """Return its row of the table of sources."""
        called = _code(self.repo or self.path.name)
        if self.repo is not None:
            called = f"[{called}](https://huggingface.co/{self.repo})"
        revision = "unknown" if self.revision is None else _code(self.revision)
        role = self.role if not self.role or self.role.isidentifier() else _code(self.role)
        return f"| {role} | {called} | {revision} | {self._license()} |"

    def _license(self) -> str:
        named = self.stated.get("license")
        if named is None:
            return "unknown"
        other = self.stated.get("license_name") if named == "other" else None
        text, link = _code(str(other or named)), str(self.stated.get("license_link"))
        return f"[{text}]({link})" if _LINK.fullmatch(link) else text


def models_of(sources: Any, role: str = "") -> Iterator[Model]:
    """Yield the checkpoints that `sources` of a `drift.json` name, those of summed deltas too."""
    if isinstance(sources, Mapping) and isinstance(sources.get("path"), str):
        repo = str(sources.get("repo"))
        is_of_hub = hub_id(repo) == (repo, None)
        revision = sources.get("revision")
        yield Model(
            role,
            Path(sources["path"]),
            repo if is_of_hub else None,
            str(revision) if is_of_hub and revision is not None else None,
            {},
        )
    elif isinstance(sources, Mapping):
        for key, part in sources.items():
            yield from models_of(part, key)
    elif isinstance(sources, list):
        for part in sources:
            yield from models_of(part, role)


def published(value: Any) -> Any:
    """Return plain values without directories of this machine: the last name of a path stays."""
    if isinstance(value, Mapping):
        return {key: published(part) for key, part in value.items()}
    if isinstance(value, list):
        return [published(part) for part in value]
    if not isinstance(value, str):
        return value
    # Another system may have written it.
    kinds = (PurePosixPath(value), PureWindowsPath(value))
    return next((path.name for path in kinds if path.is_absolute()), value)


def read_card(path: Path) -> dict[str, Any]:
    """Return the metadata of a model card; none where there is no card that can be read."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        text = read_regular(path, _MAX_NBYTES).decode()
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
        return dict(data.to_dict())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def write_card(
    delta: Delta, place: str, version: str, models: Sequence[Model], kept: Mapping[str, Any]
) -> str:
    """Return the model card of a delta.

    Args:
        place: the Hub id that opens it, with `@revision` if it is not on the main branch.
        version: of drift_fast, that the delta was computed with.
        models: what it was computed from.
        kept: metadata of an earlier card, of which stays what is not stated anew.
    """
    from huggingface_hub import ModelCard, ModelCardData

    repos = list(dict.fromkeys(model.repo for model in models if model.repo is not None))
    relation = {"base_model": repos, "base_model_relation": "merge"} if repos else {}
    stated = {"library_name": "drift_fast", "tags": ["drift", "delta", "task-vector"], **relation}
    data = ModelCardData(**{**kept, **stated})
    table = Statistics([*delta.stats.by_module(), delta.stats.total]).blocks()[0]
    text = _TEXT.format(
        name=place.partition("@")[0].partition("/")[2],
        place=place,
        models="\n".join(dict.fromkeys(model.row() for model in models)),
        facts="\n".join(f"- {fact}" for fact in _facts(delta, version)),
        # A name must not end the block of code.
        statistics=str(table).replace("`", "'"),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def _facts(delta: Delta, version: str) -> Iterator[str]:
    yield f"drift_fast {_code(version)}"
    yield f"stored as {_code(delta.stored_dtype)}"
    yield f"selected: {_code(delta.selection)}"
    yield str(delta.coverage)
    if (by := delta.alignment.get("by")) is not None:
        yield f"matched by {_code(str(by))}"
    if delta.compression is not None:
        yield str(delta.compression)
    for term in delta.sources.get("combined", ()):
        yield f"a sum, with {term['weight']:g} × the delta {_code(str(published(term['delta'])))}"
    if (taken := delta.sources.get("protected")) is not None:
        yield (
            f"{taken['removed_share']:.3%} of ‖Δ‖² was taken out, in the span of "
            f"{taken['directions']} gradients on samples of what must be kept"
        )


def _code(text: str) -> str:
    """Return text of unknown origin for a cell of a table, so that it is shown as it is."""
    return f"`{printable(text, 120).translate({ord('`'): chr(39), ord('|'): '/'})}`"
