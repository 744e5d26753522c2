"""Which rows of two embeddings or heads stand for the same token.

Owns the reading of tokenizer files, as plain JSON from strangers, and the matching of rows; no
weight is read and no tokenizer runs. A row is matched only where both sides are known to mean the
same token: by its string in one spelling, or by its index because the caller says so.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from drift_fast.errors import CheckpointError, CoverageError

_LIMIT_NBYTES = 200_000_000
# Formats that need a library to be read, by the names transformers and mistral-common give them.
_OTHERS = "tokenizer.model tokenizer.model.v3 tekken.json tiktoken.model qwen.tiktoken spiece.model"
_OTHERS += " sentencepiece.bpe.model vocab.txt"
_SAVE = "Save a tokenizer.json there with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
_ID = re.compile(r"[0-9]{1,18}").fullmatch
_BY_INDEX = 'pass rows="index" if row i of both means the same token'

# A file, the part of it, and what that holds, as (token, id); neither is checked yet.
_Part = tuple[Path, str, Iterable[tuple[Any, Any]]]


@dataclass(frozen=True)
class Vocabulary:
    """The id of every token, added ones too; how strings are spelled; the file that was read."""

    tokens: dict[str, int]
    scheme: str
    path: Path


@dataclass(frozen=True)
class RowMap:
    """Matched rows as maximal runs (left row, right row, count), by right row, and what is left.

    `only_left` and `only_right` count rows whose token, or by index whose number, has no row on
    the other side; padding rows, which have no token, are in neither. `beyond_left` and
    `beyond_right` count tokens whose id is not below the number of rows.
    """

    runs: list[tuple[int, int, int]]
    left_rows: int
    right_rows: int
    matched: int
    only_left: int
    only_right: int
    how: Literal["token", "index"]
    beyond_left: int = 0
    beyond_right: int = 0

    def __str__(self) -> str:
        way, what = ("token string", "tokens") if self.how == "token" else ("index", "rows")
        beyond = f"; ids beyond the rows: {self.beyond_left:,} and {self.beyond_right:,}"
        return (
            f"{self.matched:,} of {self.right_rows:,} rows matched by {way}; {self.only_left:,} "
            f"{what} only in the reasoning checkpoint, {self.only_right:,} only in the multimodal "
            f"one{beyond if self.beyond_left or self.beyond_right else ''}"
        )


def match_rows(
    left: Path,
    right: Path,
    left_rows: int,
    right_rows: int,
    *,
    by: Literal["token", "index"] | None,
) -> RowMap:
    """Match the rows of two embeddings or heads, by token unless the caller says by index.

    By token, the tokenizers beside both checkpoints are read and equal strings match. By index,
    row i matches row i up to the smaller size and no tokenizer is read.

    Raises:
        CheckpointError: a tokenizer that `read_vocabulary` refuses.
        CoverageError: a tokenizer that is missing, two that spell tokens differently, or no match.
        ValueError: another `by`.
    """
    if by not in (None, "token", "index"):
        raise ValueError(f"rows must be 'token' or 'index', got {by!r}")
    if by == "index":
        count = min(left_rows, right_rows)
        runs = [(0, 0, count)] if count else []
        held, beyond, against = (left_rows, right_rows), (0, 0), "index"
    else:
        a, b = _comparable(left, right)
        pairs = [
            (row, other)
            for token, row in a.tokens.items()
            if row < left_rows and (other := b.tokens.get(token, right_rows)) < right_rows
        ]
        pairs.sort(key=lambda pair: pair[1])
        count, runs = len(pairs), _runs(pairs)
        held = (
            sum(row < left_rows for row in a.tokens.values()),
            sum(row < right_rows for row in b.tokens.values()),
        )
        beyond = len(a.tokens) - held[0], len(b.tokens) - held[1]
        against = f"token between {a.path} ({len(a.tokens):,}) and {b.path} ({len(b.tokens):,})"
    if not count:
        raise CoverageError(
            f"no row of the {left_rows:,} of {left} matches one of the {right_rows:,} of {right} "
            f"by {against}; leave embeddings and heads out"
        )
    only = held[0] - count, held[1] - count
    return RowMap(runs, left_rows, right_rows, count, *only, by or "token", *beyond)


def _comparable(left: Path, right: Path) -> tuple[Vocabulary, Vocabulary]:
    first, second = read_vocabulary(left), read_vocabulary(right)
    if first is None or second is None:
        missing = [str(path) for path, v in ((left, first), (right, second)) if v is None]
        raise CoverageError(
            f"no tokenizer in {' nor in '.join(missing)}, so rows cannot be matched by token. "
            f"{_SAVE}, or {_BY_INDEX}"
        )
    if first.scheme != second.scheme:
        raise CoverageError(
            f"{first.path} spells tokens as {first.scheme} and {second.path} as {second.scheme}, "
            "so equal strings are not equal tokens; choose a reasoning model with the same "
            f"tokenizer, or {_BY_INDEX}"
        )
    return first, second


def _runs(pairs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    def start(item: tuple[int, tuple[int, int]]) -> tuple[int, int]:
        index, (left, right) = item
        return left - index, right - index

    groups = (list(group) for _, group in groupby(enumerate(pairs), start))
    return [(*group[0][1], len(group)) for group in groups]


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """Read `tokenizer.json`, or else `vocab.json` of a byte-level BPE; None without a tokenizer.

    For a file of weights its directory is searched. The scheme is `byte-level` ("Ġthe"),
    `metaspace` ("▁the"), `wordpiece` ("##the") or `plain`, with any other affix that the model
    spells into its tokens. Strings of two schemes must not be compared.

    Raises:
        CheckpointError: not the JSON that was expected, above 200 MB, an id that is no non-negative
            integer, a token with two ids, an id with two tokens, no token at all, or a tokenizer in
            another format.
    """
    directory = directory.parent if directory.is_file() else directory
    if (path := directory / "tokenizer.json").is_file():
        return _read_tokenizer(path)
    if (path := directory / "vocab.json").is_file():
        return _read_parts(path)
    for name in _OTHERS.split():
        if (path := directory / name).is_file():
            raise CheckpointError(f"{path}: cannot be read, expected a tokenizer.json. {_SAVE}")
    return None


def _read_tokenizer(path: Path) -> Vocabulary:
    document = _load(path)
    model = _expect(dict, document.get("model"), path, "model")
    vocab, kind = model.get("vocab"), model.get("type")
    if kind not in (None, "BPE", "Unigram", "WordLevel", "WordPiece"):
        raise _wrong(path, "model.type", "BPE, Unigram, WordLevel or WordPiece", kind)
    if kind == "Unigram" or (kind is None and isinstance(vocab, list)):
        entries = _scored(_expect(list, vocab, path, "model.vocab"), path)
    else:
        entries = iter(_expect(dict, vocab, path, "model.vocab").items())
    added = _expect(list, document.get("added_tokens", []), path, "added_tokens")
    items = [_expect(dict, item, path, f"added_tokens[{i}]") for i, item in enumerate(added)]
    contents = [(item.get("content"), item.get("id")) for item in items]
    tokens = _collect([(path, "model.vocab", entries), (path, "added_tokens", contents)])
    return Vocabulary(tokens, _scheme(document, model), path)


def _read_parts(path: Path) -> Vocabulary:
    """Read the files of GPT-2's and Qwen2's slow tokenizers, which name no scheme."""
    vocab = _load(path)
    # M2M100 ("▁a") and CLIP ("a</w>") have a vocab.json too; "Ġ" is a byte of every byte-level BPE.
    if "Ġ" not in vocab or "a</w>" in vocab:
        raise _wrong(path, "tokens", "those of a byte-level BPE, with 'Ġ', without 'a</w>'", vocab)
    parts: list[_Part] = [(path, "vocab", vocab.items())]
    if (file := path.with_name("added_tokens.json")).is_file():
        parts.append((file, "added_tokens", _load(file).items()))
    if (file := path.with_name("tokenizer_config.json")).is_file():
        key = "added_tokens_decoder"
        added = _expect(dict, _load(file).get(key, {}), file, key)
        items = [(_expect(dict, item, file, key), text) for text, item in added.items()]
        contents = [(item.get("content"), int(text) if _ID(text) else text) for item, text in items]
        parts.append((file, key, contents))
    return Vocabulary(_collect(parts), "byte-level", path)


def _scored(vocab: list[Any], path: Path) -> Iterator[tuple[Any, int]]:
    for row, item in enumerate(vocab):
        if not isinstance(item, list) or len(item) != 2:
            raise _wrong(path, f"model.vocab[{row}]", "[token, score]", item)
        yield item[0], row


def _collect(parts: list[_Part]) -> dict[str, int]:
    """Return token → id of all parts; what is said twice must agree."""
    tokens: dict[str, int] = {}
    owners: dict[int, str] = {}
    for path, key, entries in parts:
        for token, row in entries:
            if not isinstance(token, str):
                raise _wrong(path, key, f"a string as token of id {_shown(row)}", token)
            if type(row) is not int or row < 0:
                raise _wrong(path, key, f"a non-negative integer as id of {_shown(token)}", row)
            other, owner = tokens.setdefault(token, row), owners.setdefault(row, token)
            if other != row or owner != token:
                known = _shown(token if other != row else owner)
                raise CheckpointError(
                    f"{path}: {key}: token {_shown(token)} has id {_shown(row)}, but {known} has "
                    f"id {_shown(other)} already. {_SAVE}"
                )
    if not tokens:
        raise CheckpointError(f"{parts[0][0]}: {parts[0][1]}: expected tokens, found none. {_SAVE}")
    return tokens


def _scheme(document: dict[str, Any], model: dict[str, Any]) -> str:
    steps = [document.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    kinds: list[Any] = ["Metaspace"] if model.get("byte_fallback") else []
    while steps:  # not recursive, for the depth is the file's
        step = steps.pop()
        if isinstance(step, dict):
            spaced = step.get("type") == "Replace" and step.get("content") == "▁"
            kinds.append("Metaspace" if spaced else step.get("type"))
        steps += step.values() if isinstance(step, dict) else step if isinstance(step, list) else []
    affixes = [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    scheme = "plain"
    if "ByteLevel" in kinds:
        scheme = "byte-level"
    elif "Metaspace" in kinds:
        scheme = "metaspace"
    elif affixes[0] == "##":
        scheme, affixes = "wordpiece", affixes[1:]
    return scheme + "".join(f" with {_shown(affix)}" for affix in affixes if affix)


def _load(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LIMIT_NBYTES:
            raise _wrong(path, "size", f"at most {_LIMIT_NBYTES:,} bytes", size)
        data = file.read(size)
    try:
        document = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}). {_SAVE}") from error
    checked: dict[str, Any] = _expect(dict, document, path, "the document")
    return checked


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; json would keep the last of two equal keys and hide a token."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {_shown(twice)} occurs twice in an object")
    return found


def _expect(kind: type, value: Any, path: Path, key: str) -> Any:
    if not isinstance(value, kind):
        raise _wrong(path, key, "an object" if kind is dict else "a list", value)
    return value


def _wrong(path: Path, key: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(f"{path}: {key}: expected {expected}, found {_shown(found)}. {_SAVE}")


def _shown(value: object) -> str:
    """Return a value of the file for a message: short, and never what it holds."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
