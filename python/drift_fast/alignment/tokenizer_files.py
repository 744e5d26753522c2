"""The vocabulary of a checkpoint, read from its tokenizer files, which are JSON from strangers.

No tokenizer runs. What is read is the id of each token and how tokens are spelled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import Raw, Struct

from drift_fast.config_files import JsonFile, shown

SAVE = "save a tokenizer.json there with AutoTokenizer.from_pretrained(…).save_pretrained(…)"

# Formats that need a library to be read, by the names transformers and mistral-common give them.
_OTHER_FORMATS = (
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
)
_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
# The largest that there is has 262,144 tokens in 33 MB.
_MAX_NBYTES, _MAX_TOKENS = 100_000_000, 1 << 19
_ID = re.compile(r"[0-9]{1,18}").fullmatch


@dataclass(frozen=True)
class Vocabulary:
    """The id of every token, added ones too; how strings are spelled; the file that was read."""

    tokens: dict[str, int]
    scheme: str
    path: Path


_NONE = Raw(b"null")


class _Model(Struct):
    vocab: Raw = _NONE
    type: str | None = None
    byte_fallback: Raw = _NONE
    continuing_subword_prefix: Raw = _NONE
    end_of_word_suffix: Raw = _NONE


class _Tokenizer(Struct):
    # The merges, most of a file, are not named and so never made.
    model: _Model
    added_tokens: Raw = Raw(b"[]")
    normalizer: Raw = _NONE
    pre_tokenizer: Raw = _NONE
    decoder: Raw = _NONE


class _AddedToken(Struct):
    content: Any = None
    id: Any = None


class _TokenizerConfig(Struct):
    added_tokens_decoder: dict[str, _AddedToken] = {}


@dataclass(frozen=True)
class _Entries:
    """A part of a file, and what it holds, as (token, id); neither is checked yet."""

    file: JsonFile
    key: str
    items: Iterable[tuple[Any, Any]]


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """Read `tokenizer.json`, or else `vocab.json` of a byte-level BPE; None without a tokenizer.

    For a file of weights its directory is searched. The scheme is `byte-level` ("Ġthe"),
    `metaspace` ("▁the"), `wordpiece` ("##the") or `plain`, with any other affix that the model
    spells into its tokens. Strings of two schemes must not be compared.

    Raises:
        CheckpointError: not the JSON that was expected, above 100 MB or 524,288 tokens, an id that
            is not a non-negative integer, a token with two ids, an id with two tokens, no token at
            all, or a tokenizer in another format.
    """
    directory = directory.parent if directory.is_file() else directory
    if (path := directory / "tokenizer.json").is_file():
        return _read_tokenizer(_file(path))
    if (path := directory / "vocab.json").is_file():
        return _read_byte_level(_file(path))
    for name in _OTHER_FORMATS:
        if (path := directory / name).is_file():
            raise _file(path).wrong("cannot be read, expected a tokenizer.json")
    return None


def _file(path: Path) -> JsonFile:
    return JsonFile(path, _MAX_NBYTES, SAVE, unique_keys=True)


def _read_tokenizer(file: JsonFile) -> Vocabulary:
    tokenizer = file.read_parts(_Tokenizer)
    kind = tokenizer.model.type
    if kind not in (None, *_MODELS):
        raise file.wrong(f"model.type must be one of {', '.join(_MODELS)}, found {shown(kind)}")
    vocab = file.parse(tokenizer.model.vocab, Any)
    items: Iterable[tuple[Any, Any]]
    if kind == "Unigram" or (kind is None and isinstance(vocab, list)):
        pieces = file.convert(vocab, list[tuple[Any, Any]], "model.vocab")
        items = ((token, row) for row, (token, _) in enumerate(pieces))
    else:
        items = file.convert(vocab, dict[str, Any], "model.vocab").items()
    found = file.parse(tokenizer.added_tokens, list[_AddedToken], "added_tokens")
    added = [(token.content, token.id) for token in found]
    tokens = _collect([_Entries(file, "model.vocab", items), _Entries(file, "added_tokens", added)])
    return Vocabulary(tokens, _scheme(file, tokenizer), file.path)


def _read_byte_level(file: JsonFile) -> Vocabulary:
    """Read the files of GPT-2's and Qwen2's slow tokenizers, which name no scheme."""
    vocab = file.read(dict[str, Any])
    # M2M100 ("▁a") and CLIP ("a</w>") have a vocab.json too; "Ġ" is a byte of every byte-level BPE.
    if "Ġ" not in vocab or "a</w>" in vocab:
        raise file.wrong(
            "expected the tokens of a byte-level BPE, with 'Ġ' and without 'a</w>', found "
            f"{len(vocab):,} others"
        )
    entries = [_Entries(file, "vocab", vocab.items())]
    if (path := file.path.with_name("added_tokens.json")).is_file():
        added = _file(path)
        entries.append(_Entries(added, "added_tokens", added.read(dict[str, Any]).items()))
    if (path := file.path.with_name("tokenizer_config.json")).is_file():
        config = _file(path)
        items = [
            (token.content, int(row) if _ID(row) else row)
            for row, token in config.read(_TokenizerConfig).added_tokens_decoder.items()
        ]
        entries.append(_Entries(config, "added_tokens_decoder", items))
    return Vocabulary(_collect(entries), "byte-level", file.path)


def _collect(parts: list[_Entries]) -> dict[str, int]:
    """Return token → id of all parts; a token that is stated twice must have one id."""
    tokens: dict[str, int] = {}
    owners: dict[int, str] = {}
    for part in parts:
        for token, row in part.items:
            problem = _problem(token, row)
            if not problem:
                other, owner = tokens.setdefault(token, row), owners.setdefault(row, token)
                if other != row or owner != token:
                    known = shown(token if other != row else owner)
                    problem = (
                        f"token {shown(token)} has id {shown(row)}, but {known} has id "
                        f"{shown(other)} already"
                    )
            if problem:
                raise part.file.wrong(f"{part.key}: {problem}")
            if len(tokens) > _MAX_TOKENS:
                raise part.file.wrong(f"{part.key}: expected at most {_MAX_TOKENS:,} tokens")
    if not tokens:
        raise parts[0].file.wrong(f"{parts[0].key}: expected tokens, found none")
    return tokens


def _problem(token: object, row: object) -> str:
    if not isinstance(token, str):
        return f"expected a string as token of id {shown(row)}, found {shown(token)}"
    if type(row) is not int or row < 0:
        return f"expected a non-negative integer as id of {shown(token)}, found {shown(row)}"
    return ""


def _scheme(file: JsonFile, tokenizer: _Tokenizer) -> str:
    def parse(part: Raw) -> Any:
        return file.parse(part, Any)

    model = tokenizer.model
    steps = [parse(tokenizer.normalizer), parse(tokenizer.pre_tokenizer), parse(tokenizer.decoder)]
    kinds: list[Any] = ["Metaspace"] if parse(model.byte_fallback) else []
    while steps:  # not recursive, since the file decides the depth
        step = steps.pop()
        if isinstance(step, dict):
            spaced = step.get("type") == "Replace" and step.get("content") == "▁"
            kinds.append("Metaspace" if spaced else step.get("type"))
        steps += step.values() if isinstance(step, dict) else step if isinstance(step, list) else []
    affixes = [parse(model.continuing_subword_prefix), parse(model.end_of_word_suffix)]
    scheme = "plain"
    if "ByteLevel" in kinds:
        scheme = "byte-level"
    elif "Metaspace" in kinds:
        scheme = "metaspace"
    elif affixes[0] == "##":
        scheme, affixes = "wordpiece", affixes[1:]
    return scheme + "".join(f" with {shown(affix)}" for affix in affixes if affix)
