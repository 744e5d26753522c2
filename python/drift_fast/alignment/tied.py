"""Whether a checkpoint's head is its embedding: one decision, which every verb takes.

It comes from three sources: config.json, the default of the model's class where that says nothing,
and the tensors. A head that is not stored is the embedding if the model ties it, and unknown if
not. One that is stored although the model ties it is the embedding if its values are the same; if
they differ, loaders disagree: transformers 5 takes both, transformers 4 and vLLM the embedding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

from drift_fast.alignment.name_alignment import Pair
from drift_fast.checkpoints.opened import Opened
from drift_fast.errors import CheckpointError, DriftWarning
from drift_fast.names import kind_of
from drift_fast.selection import Selection

# A sample is so many spans of elements, fewer where each is a request to a server.
_SPAN, _LOCAL_SPANS, _REMOTE_SPANS = 4096, 64, 8
# Elements that are compared at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Ties:
    """Whether head and embedding of a checkpoint are one parameter.

    `stored` are heads that are stored although they are tied, with the embedding that each is;
    `differ` those among them whose values differ, as far as they were compared. `unknown` says that
    there is no head, neither stored nor tied.
    """

    tied: bool
    unknown: bool = False
    stored: dict[str, str] = field(default_factory=dict)
    differ: dict[str, str] = field(default_factory=dict)


def find_ties(side: Opened, selection: Selection | set[str]) -> Ties:
    """Decide from headers, and from samples of head and embedding where both are stored and matter.

    They matter where one of them is selected and the model ties them. Without a config.json a head
    that is not stored is presumed to be the embedding, which `warn_if_presumed` says.

    Raises:
        CheckpointError: a config.json that is not valid.
    """
    configuration = side.configuration
    matrices = {name: kind_of(name) for name, shape in side.shapes.items() if len(shape) == 2}
    heads, embeddings = (
        [name for name, kind in matrices.items() if kind == wanted] for wanted in ("head", "embed")
    )
    if not heads:
        tied = configuration.is_tied or not configuration.found
        return Ties(tied, unknown=not tied)
    if not configuration.is_tied:
        return Ties(tied=False)
    if not any(name in selection for name in (*heads, *embeddings)):
        return Ties(tied=True)
    stored = {
        head: embedding
        for head in heads
        for embedding in reversed(embeddings)
        if side.shapes[head] == side.shapes[embedding]
    }
    differ = {
        head: embedding
        for head, embedding in stored.items()
        if not _equal(side, head, embedding, sampled=True)
    }
    if differ and not configuration.states_ties:
        return Ties(tied=False)
    return Ties(tied=True, stored=stored, differ=differ)


def check_ties(side: Opened, ties: Ties) -> None:
    """Compare every element of heads that are stored although they are tied.

    Raises:
        CheckpointError: one that differs from its embedding.
    """
    for head, embedding in ties.stored.items():
        if not _equal(side, head, embedding, sampled=False):
            raise differing(side, head, embedding)


def warn_if_presumed(side: Opened, pairs: Iterable[Pair]) -> None:
    """Warn of heads paired with the embedding of a model that does not say that it ties them."""
    if side.configuration.found:
        return
    for pair in pairs:
        source = pair.sources[0]
        if kind_of(pair.name) == "head" and kind_of(source) == "embed":
            warnings.warn(
                f"{side.source.path} stores no head and has no config.json, so its embedding "
                f"{source} is taken for its head, {pair.name} of the other model; put config.json "
                "beside the weights to have this checked",
                DriftWarning,
                stacklevel=4,
            )


def differing(side: Opened, head: str, embedding: str) -> CheckpointError:
    """Return the error for a head that is tied and differs from its embedding."""
    return CheckpointError(
        f"{side.source.path}: its configuration ties {head} to {embedding}, and they differ: "
        "transformers 5 takes both, transformers 4 and vLLM take the embedding for both. Set "
        f"tie_word_embeddings to false in its config.json to take both, or remove {head} to take "
        "the embedding; without embeddings and head, modules=('attn', 'mlp', 'norm'), it makes no "
        "difference"
    )


def _equal(side: Opened, first: str, second: str, *, sampled: bool) -> bool:
    """Whether two tensors of one shape have the same dtype and bytes, in samples or everywhere."""
    if side.dtypes[first] != side.dtypes[second]:
        return False
    numel = math.prod(side.shapes[first])
    _, start, end = side.checkpoint.place(first)
    itemsize = (end - start) // max(numel, 1)
    spans = _everything(numel)
    if sampled:
        spans = _sample(numel, _LOCAL_SPANS if side.is_local else _REMOTE_SPANS)
        side = side.download_elements({first: spans, second: spans})
    for begin, stop in spans:
        a, b = (bytearray((stop - begin) * itemsize) for _ in range(2))
        side.checkpoint.read_into(first, a, elements=(begin, stop))
        side.checkpoint.read_into(second, b, elements=(begin, stop))
        if a != b:
            return False
    return True


def _everything(numel: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + _CHUNK, numel)) for begin in range(0, numel, _CHUNK)]


def _sample(numel: int, count: int) -> list[tuple[int, int]]:
    """Return spans of elements from the first to the last, or everything if that is as little."""
    if numel <= _SPAN * count:
        return _everything(numel)
    begins = ((numel - _SPAN) * at // (count - 1) for at in range(count))
    return [(begin, begin + _SPAN) for begin in begins]
