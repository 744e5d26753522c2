"""Files that configure: JSON of unknown origin, and the YAML or JSON that a user writes.

Owns how such a file is refused: the error names file and key, what was expected and found, and what
to do. Python parses, since it sees a key that occurs twice; msgspec checks the types.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

from drift_fast.errors import CheckpointError, DriftError
from drift_fast.paths import local_path

T = TypeVar("T")

# How msgspec names the types of JSON, and how a message does.
_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "an integer",
    "null": "null",
    "object": "an object",
    "str": "a string",
}
# Types of which nothing inside is checked: JSON has no keys but text.
_PLAIN = (bool, int, str, dict[str, Any])
_LFS = b"version https://git-lfs"
_LFS_REMEDY = (
    "this is a git-lfs pointer, which stands for a file that was not downloaded: run "
    "`git lfs pull` in its repository"
)
_MISMATCH = re.compile(r"Expected (?P<expected>.+?)(?:, got `(?P<found>.+?)`)?$")


@dataclass(frozen=True)
class JsonFile:
    """One JSON file, the limits it is held to, and what to do about one that is not valid.

    `remedy` ends every message. `unique_keys` refuses an object in which a key occurs twice, where
    JSON parsers keep the last value. `error` is what is raised.
    """

    path: Path
    limit_nbytes: int
    remedy: str
    unique_keys: bool = False
    error: type[DriftError] = CheckpointError

    def read(self, kind: type[T]) -> T:
        """Return the content of the file as `kind`: a builtin, a generic, or a `msgspec.Struct`.

        Raises:
            FileNotFoundError: there is no such file.
            DriftError: of the type `error`: not a regular file, larger than the limit, not JSON, or
                of another type.
        """
        text = self._read_bytes()
        try:
            content = parse_json(text, unique_keys=self.unique_keys)
        except ValueError as error:
            if text.startswith(_LFS):
                raise self.wrong(_LFS_REMEDY) from error
            raise self.wrong(f"not valid JSON ({error})") from error
        return self.convert(content, kind)

    def convert(self, value: object, kind: type[T], key: str = "") -> T:
        """Return a value of this file as `kind`; `key` is where the file has it.

        Raises:
            DriftError: of the type `error`: a value of another type.
        """
        try:
            return convert(value, kind, key)
        except ValueError as error:
            raise self.wrong(str(error)) from error

    def wrong(self, problem: str) -> DriftError:
        """Return the error to raise for a problem with this file."""
        return self.error(f"{self.path}: {problem}; {self.remedy}")

    def _read_bytes(self) -> bytes:
        try:
            # Asked before opening: opening a FIFO would wait for a writer.
            if self.path.exists() and not self.path.is_file():
                raise self.wrong("expected a regular file, found something else")
            with self.path.open("rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                text = file.read(min(nbytes, self.limit_nbytes) + 1)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self.wrong(f"cannot be read: {os.strerror(error.errno or 0)}") from error
        nbytes = max(nbytes, len(text))
        if nbytes > self.limit_nbytes:
            raise self.wrong(f"expected at most {self.limit_nbytes:,} bytes, found {nbytes:,}")
        return text


def read_settings(path: str | os.PathLike[str]) -> Any:
    """Return the content of a JSON or, where PyYAML is installed, a YAML file of a user.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending than .json, .yaml or .yml, or not readable as that.
        ImportError: a YAML file without PyYAML.
    """
    file = local_path(path)
    if file.suffix == ".json":
        try:
            return parse_json(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
    if file.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"{file}: expected a file that ends in .json, .yaml or .yml, got {file.suffix!r}"
        )
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            f"{file} is YAML, which needs PyYAML: pip install pyyaml, or write it as JSON"
        ) from error
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error


def parse_json(text: bytes, *, unique_keys: bool = False) -> Any:
    """Parse JSON.

    Raises:
        ValueError: not JSON, nested too deeply, or, with `unique_keys`, a key that occurs twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def convert(value: object, kind: type[T], key: str = "") -> T:
    """Return a value as `kind`, without coercion; `key` is what the value is called.

    Raises:
        ValueError: a value of another type; the message names the key inside `value`.
    """
    # What is of its type already needs no library, which takes 9 ms to load.
    if kind in _PLAIN and type(value) is (get_origin(kind) or kind):
        return cast(T, value)
    import msgspec

    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")
        # msgspec writes `key` in `$.place` of a key that is not of its type.
        _, inside, place = where.rpartition(" in ")
        path = f"{key}{(place if inside else where).strip('`').removeprefix('$')}".lstrip(".")
        name = printable(f"a key of {path}" if inside else path, 120)
        found = "" if where else shown(value)
        raise ValueError(f"{name or 'the document'} {_in_words(problem, found)}") from error


def _in_words(problem: str, value: str) -> str:
    mismatch = _MISMATCH.match(problem)
    if mismatch is None:
        return f"is wrong: {problem[:1].lower()}{problem[1:]}"
    expected = re.sub(r"`(.+?)`", lambda word: _type_in_words(word[1]), mismatch["expected"])
    found = _WORDS.get(mismatch["found"] or "", mismatch["found"]) or value
    return f"must be {expected}, found {found}" if found else f"must be {expected}"


def _type_in_words(name: str) -> str:
    kinds = name.replace("int | float", "float").split(" | ")
    return " or ".join(_WORDS.get(kind, kind) for kind in kinds)


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        twice = Counter(key for key, _ in items).most_common(1)[0][0]
        raise ValueError(f"key {shown(twice)} occurs twice in an object")
    return found


def shown(value: object) -> str:
    """Return a value of a file for a message: short, and of a container only its size."""
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    return printable(repr(value), 80)


def printable(text: str, limit: int) -> str:
    """Return text for a terminal: control characters spelled out, cut at `limit`."""
    spelled = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return spelled if len(spelled) <= limit else spelled[: limit - 1] + "…"
