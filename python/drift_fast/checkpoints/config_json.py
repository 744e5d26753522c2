"""config.json as it is on disk: read within limits, entered by key, every type checked.

Owns where nested and flat configurations describe the language backbone. It knows no fact; see
`preflight.facts`. A config.json is untrusted input: its size is bounded, and a key may occur only
once. An entry of another type than expected is read as that type where its meaning is plain, and
otherwise taken as not stated, with a warning that names it; one that is needed is an error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from msgspec import Meta

from drift_fast.checkpoints.tied_by_default import TIED_BY_DEFAULT
from drift_fast.config_files import JsonFile, convert, shown
from drift_fast.errors import DriftWarning

# Where the language backbone is described, if not at the top level.
_SECTIONS = (
    ("text_config",),
    ("language_config",),
    ("llm_config",),
    ("thinker_config", "text_config"),
)
# Beyond this a JSON integer and a float no longer agree, and no dimension of a model is as large.
_MAX_INTEGER = 2**53
_Size = Annotated[int, Meta(ge=0, le=_MAX_INTEGER)]
_Positive = Annotated[int, Meta(ge=1, le=_MAX_INTEGER)]
# Both ends are given, since NaN is never between two numbers.
_Number = (
    Annotated[int, Meta(ge=-_MAX_INTEGER, le=_MAX_INTEGER)]
    | Annotated[float, Meta(ge=-_MAX_INTEGER, le=_MAX_INTEGER)]
)
_Plain = _Number | str | bool

# Rows and columns of 8-bit codes that share a scale, unless stated otherwise.
BLOCK = (128, 128)

_NUMERAL = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*", re.I)
_NUMERAL_LENGTH = 40

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
        """Read the config.json beside a checkpoint's weights.

        Raises:
            CheckpointError: not a JSON object of at most 10 MB, or one with a key twice.
        """
        directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
        file = _file(directory)
        entries = read_entries(directory)
        top = Section(file, "", entries or {})
        for keys in _SECTIONS:
            inside = [top]
            for key in keys:
                section = inside[0].section(key)
                if section is None:
                    break
                inside.insert(0, section)
            else:
                return cls(file.path, entries is not None, inside[0], tuple(inside))
        return cls(file.path, entries is not None, top, (top,))

    @property
    def states_ties(self) -> bool:
        """Whether either level says that head and embedding are one.

        Raises:
            CheckpointError: an entry that is neither true nor false.
        """
        return True in self._ties

    @property
    def is_tied(self) -> bool:
        """Whether head and embedding are one, as is stated or by the default of the model's class.

        Raises:
            CheckpointError: an entry of a wrong type.
        """
        if self.states_ties:
            return True
        for part, ties in zip(reversed(self.around), reversed(self._ties), strict=True):
            if ties is not None:
                return False
            if part.text("model_type") in TIED_BY_DEFAULT:
                return True
        return False

    @property
    def _ties(self) -> list[bool | None]:
        return [part.truth("tie_word_embeddings", needed=True) for part in self.around]

    @property
    def weight_block(self) -> tuple[int, int]:
        """Rows and columns of 8-bit codes that share a scale, as DeepSeek-V3 states them.

        Raises:
            CheckpointError: an entry that is not a pair of positive integers.
        """
        stated = self.anywhere(lambda part: part.section("quantization_config", needed=True))
        return BLOCK if stated is None else stated.pair("weight_block_size") or BLOCK

    def anywhere(self, ask: Callable[[Section], _T | None]) -> _T | None:
        """Return what the innermost section says that says anything."""
        answers = (ask(section) for section in self.around)
        return next((answer for answer in answers if answer is not None), None)


class Section:
    """One object of a config.json, whose entries are checked when they are asked for.

    Several keys are spellings of one entry: the first that is there and not null counts. A needed
    entry of another type raises a CheckpointError; any other one is warned of.
    """

    def __init__(self, file: JsonFile, name: str, entries: Mapping[str, Any]) -> None:
        self._file = file
        self.name = name
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def section(self, key: str, *, needed: bool = False) -> Section | None:
        """Return an object inside this one."""
        entries: dict[str, Any] | None = self._entry(dict[str, Any], key, needed=needed)
        return None if entries is None else Section(self._file, self._dotted(key), entries)

    def size(self, *keys: str, needed: bool = False) -> int | list[int] | None:
        """Return a count; a list with one for each layer is one number where all are equal."""
        listed = any(isinstance(self._entries.get(key), list) for key in keys)
        kind = list[_Size] if listed else _Size
        sizes: int | list[int] | None = self._entry(kind, *keys, needed=needed)
        if isinstance(sizes, list) and len(set(sizes)) == 1:
            return sizes[0]
        return sizes

    def pair(self, key: str) -> tuple[int, int] | None:
        """Return a list of two positive integers, which are needed."""
        found: tuple[int, int] | None = self._entry(tuple[_Positive, _Positive], key, needed=True)
        return found

    def number(self, *keys: str) -> int | float | None:
        """Return a finite number."""
        found: int | float | None = self._entry(_Number, *keys)
        return found

    def text(self, *keys: str) -> str | None:
        """Return a string."""
        found: str | None = self._entry(str, *keys)
        return found

    def truth(self, key: str, *, needed: bool = False) -> bool | None:
        """Return true or false."""
        found: bool | None = self._entry(bool, key, needed=needed)
        return found

    def names_null(self, key: str) -> bool:
        """Return whether the entry is there and null, which some configurations mean."""
        return key in self._entries and self._entries[key] is None

    def sections(self) -> dict[str, Section]:
        """Return the entries that are objects."""
        return {
            key: Section(self._file, self._dotted(key), value)
            for key, value in self._entries.items()
            if isinstance(value, dict)
        }

    def plain(self, *without: str) -> dict[str, object]:
        """Return the entries that are plain or a list of numbers; objects are in `sections`."""
        found = {
            key: self._entry(list[_Number] if isinstance(value, list) else _Plain, key)
            for key, value in self._entries.items()
            if key not in without and not isinstance(value, dict)
        }
        return {key: value for key, value in found.items() if value is not None}

    def _entry(self, kind: Any, *keys: str, needed: bool = False) -> Any:
        for key in keys:
            value = self._entries.get(key)
            if value is None:
                continue
            try:
                return convert(value, kind, self._dotted(key))
            except ValueError as error:
                found = next(_meant(value, kind), None)
                if found is None and needed:
                    raise self._file.wrong(str(error)) from error
                taken = "not stated" if found is None else shown(found)
                warnings.warn(
                    f"{self._file.path}: {error}; it is taken as {taken}",
                    DriftWarning,
                    stacklevel=3,
                )
                return found
        return None

    def _dotted(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def _meant(value: object, kind: Any) -> Iterator[Any]:
    """Yield what an entry of another type plainly means, if that is of the type."""
    readings: list[object] = []
    if isinstance(value, float) and value.is_integer():
        readings = [int(value)]
    elif isinstance(value, int) and value in (0, 1):
        readings = [bool(value)]
    elif isinstance(value, str) and len(value) <= _NUMERAL_LENGTH and _NUMERAL.fullmatch(value):
        number = float(value)
        readings = [int(number), number] if number.is_integer() else [number]
    elif isinstance(value, str):
        readings = [value.lower() == "true"] if value.lower() in ("true", "false") else []
    for reading in readings:
        try:
            yield convert(reading, kind)
        except ValueError:
            continue


def read_entries(directory: Path) -> dict[str, Any] | None:
    """Return what the config.json in a directory holds, None where there is none.

    Raises:
        CheckpointError: not a JSON object of at most 10 MB, or one with a key twice.
    """
    try:
        return _file(directory).read(dict[str, Any])
    except FileNotFoundError:
        return None


def _file(directory: Path) -> JsonFile:
    remedy = "correct the entry or download config.json again"
    return JsonFile(directory / "config.json", 10_000_000, remedy, unique_keys=True)
