"""config.json as it lies on disk: read within limits, entered by key, every type checked.

Owns where the language backbone is described in nested and flat configurations. Knows no fact; see
`facts`. A config.json is untrusted input: its size is bounded, and an entry of another type than it
should have is an error that names the key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from drift_fast.errors import CheckpointError

# Where the language backbone is described, if not at the top level.
_SECTIONS = (
    ("text_config",),
    ("language_config",),
    ("llm_config",),
    ("thinker_config", "text_config"),
)
_MAX_NBYTES = 10_000_000
# Beyond this a JSON integer and a float no longer agree, and no dimension of a model lies there.
_MAX_INTEGER = 2**53

# Rows and columns of 8-bit codes that share a scale, unless stated otherwise.
BLOCK = (128, 128)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Configuration:
    """A config.json: the section that describes the language backbone, and those around it.

    Without a file, `found` is False and the sections are empty.
    """

    path: Path
    found: bool
    backbone: Section
    around: tuple[Section, ...]

    @classmethod
    def read(cls, checkpoint: Path) -> Configuration:
        """Read the config.json that lies beside a checkpoint's weights.

        Raises:
            CheckpointError: not a JSON object of at most 10 MB, or a section that is no object.
        """
        directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
        path = directory / "config.json"
        entries = read_entries(path)
        top = Section(path, "", entries or {})
        for keys in _SECTIONS:
            inside = [top]
            for key in keys:
                section = inside[0].section(key)
                if section is None:
                    break
                inside.insert(0, section)
            else:
                return cls(path, entries is not None, inside[0], tuple(inside))
        return cls(path, entries is not None, top, (top,))

    @property
    def is_tied(self) -> bool:
        """Whether head and embedding are one: transformers ties where either level says so.

        Raises:
            CheckpointError: an entry that is neither true nor false.
        """
        return any(part.truth("tie_word_embeddings") for part in self.around)

    def anywhere(self, ask: Callable[[Section], _T | None]) -> _T | None:
        """Return what the innermost section says that says anything."""
        answers = (ask(section) for section in self.around)
        return next((answer for answer in answers if answer is not None), None)


def weight_block(configuration: Configuration) -> tuple[int, int]:
    """Return the rows and columns of 8-bit codes that share a scale, as DeepSeek-V3 states them.

    Raises:
        CheckpointError: an entry that is no pair of positive integers.
    """
    stated = configuration.anywhere(lambda part: part.section("quantization_config"))
    return BLOCK if stated is None else stated.pair("weight_block_size") or BLOCK


class Section:
    """One object of a config.json, whose entries are checked when they are asked for."""

    def __init__(self, path: Path, name: str, entries: Mapping[str, object]) -> None:
        self._path = path
        self.name = name
        self._entries = entries

    def section(self, key: str) -> Section | None:
        value = self._entries.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return Section(self._path, self._dotted(key), value)

    def size(self, *keys: str) -> int | list[int] | None:
        """Return a count; a list with one for each layer is one number where all are equal."""
        for key in keys:
            value = self._entries.get(key)
            if value is None:
                continue
            sizes: list[int] = []
            for item in value if isinstance(value, list) and value else [value]:
                if isinstance(item, bool) or not isinstance(item, int):
                    raise self._wrong(key, "an integer")
                if not 0 <= item <= _MAX_INTEGER:
                    raise self._wrong(key, f"from 0 to {_MAX_INTEGER}", "another integer")
                sizes.append(item)
            return sizes[0] if len(set(sizes)) == 1 else sizes
        return None

    def pair(self, key: str) -> tuple[int, int] | None:
        """Return a list of two positive integers."""
        value = self._entries.get(key)
        if value is None:
            return None
        if isinstance(value, list) and len(value) == 2:
            first, second = value
            whole = type(first) is int and type(second) is int
            if whole and 0 < first <= _MAX_INTEGER and 0 < second <= _MAX_INTEGER:
                return first, second
        raise self._wrong(key, "a list of two positive integers", "something else")

    def number(self, *keys: str) -> int | float | None:
        for key in keys:
            value = self._entries.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self._wrong(key, "a number")
            self._check_range(key, value)
            return value
        return None

    def text(self, *keys: str) -> str | None:
        for key in keys:
            value = self._entries.get(key)
            if value is None:
                continue
            if not isinstance(value, str):
                raise self._wrong(key, "a string")
            return value
        return None

    def truth(self, key: str) -> bool | None:
        value = self._entries.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def names_null(self, key: str) -> bool:
        """Return whether the entry is there and null, which some configurations mean."""
        return key in self._entries and self._entries[key] is None

    def sections(self) -> dict[str, Section]:
        """Return the entries that are objects."""
        found = {}
        for key, value in self._entries.items():
            if isinstance(value, dict):
                found[key] = Section(self._path, self._dotted(key), value)
        return found

    def plain(self, *without: str) -> dict[str, object]:
        """Return the entries that are not null, of which each must be plain or a list of numbers.

        Objects are left to `sections`.
        """
        kept: dict[str, object] = {}
        for key, value in self._entries.items():
            if key in without or value is None or isinstance(value, dict):
                continue
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, int | float):
                    self._check_range(key, item)
                elif isinstance(value, list):
                    raise self._wrong(key, "a list of numbers")
            kept[key] = value
        return kept

    def _check_range(self, key: str, value: float) -> None:
        # NaN fails every comparison, and Python's JSON knows NaN and Infinity.
        if not abs(value) <= _MAX_INTEGER:
            raise self._wrong(key, f"finite and at most {_MAX_INTEGER}", "another number")

    def _dotted(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def _wrong(self, key: str, expected: str, found: str | None = None) -> CheckpointError:
        found = found or _TYPES.get(type(self._entries[key]).__name__, "something else")
        return CheckpointError(
            f"{self._path}: {printable(self._dotted(key), 120)} must be {expected}, found {found}; "
            "correct the entry or download config.json again"
        )


_TYPES = {
    "bool": "true or false",
    "dict": "an object",
    "float": "a number with a fraction",
    "int": "an integer",
    "list": "a list",
    "str": "a string",
}


def read_entries(path: Path) -> dict[str, object] | None:
    """Return what a config.json holds, None where there is none.

    Raises:
        CheckpointError: not a JSON object of at most 10 MB.
    """
    try:
        # Asked before opening: opening a FIFO would wait for a writer.
        if not path.exists():
            return None
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a regular file, found something else")
        with path.open("rb") as file:
            text = file.read(_MAX_NBYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {os.strerror(error.errno or 0)}") from error
    if len(text) > _MAX_NBYTES:
        raise CheckpointError(
            f"{path}: expected at most {_MAX_NBYTES:,} bytes of configuration, found more; "
            "download config.json again"
        )
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(
            f"{path}: the configuration is not valid JSON ({reason}); download config.json again"
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{path}: the configuration must be a JSON object, found "
            f"{_TYPES.get(type(entries).__name__, 'null')}; download config.json again"
        )
    return entries


def printable(text: str, limit: int) -> str:
    """Return text for a terminal: control characters spelled out, cut at `limit`."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
