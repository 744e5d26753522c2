"""Files that configure: JSON of unknown origin, and the YAML or JSON that a user writes.

Owns how such a file is read and refused: within limits of bytes and memory, and with an error that
names file and key, what was expected and found, and what to do. msgspec checks the types.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_origin

from drift_fast import system
from drift_fast._core import json_memory
from drift_fast.errors import CheckpointError, DriftError
from drift_fast.paths import local_path

if TYPE_CHECKING:
    from msgspec import Raw

T = TypeVar("T")

# Bytes that a JSON text and the objects made of it may take.
_MEMORY_NBYTES = 400_000_000

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
# What a file is that is not JSON, by its first bytes.
_KINDS = {
    b"version https://git-lfs": (
        "this is a git-lfs pointer, which stands for a file that was not downloaded: run "
        "`git lfs pull` in its repository"
    ),
    b"<": "this is a web page, as a server answers in place of a file",
}
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
        return self.parse(self._read_bytes(), kind)

    def read_parts(self, kind: type[T]) -> T:
        """Return the content as a `msgspec.Struct`, without making what it does not name.

        Fields of type `msgspec.Raw` are for `parse`. Others are to be of types that take little
        more memory than their text.

        Raises: as `read`.
        """
        import msgspec

        text = self._read_bytes()
        try:
            json_memory(text, unique=self.unique_keys)
            return msgspec.json.decode(text, type=kind)
        except msgspec.ValidationError as error:
            raise self.wrong(_named(error, "", "")) from error
        # What msgspec raises for text that is not JSON is a ValueError too.
        except (ValueError, RecursionError) as error:
            raise self._not_json(text, error) from error

    def parse(self, text: bytes | Raw, kind: type[T], key: str = "") -> T:
        """Return JSON text of this file as `kind`; `key` is where the file has it.

        Raises: as `read`.
        """
        try:
            content = parse_json(bytes(text), unique_keys=self.unique_keys)
        except ValueError as error:
            raise self._not_json(bytes(text), error) from error
        return self.convert(content, kind, key)

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

    def _not_json(self, text: bytes, problem: Exception) -> DriftError:
        for start, told in _KINDS.items():
            if text.lstrip().startswith(start):
                return self.wrong(told)
        return self.wrong(f"not valid JSON ({problem})" if text.strip() else "the file is empty")

    def _read_bytes(self) -> bytes:
        try:
            return read_regular(self.path, self.limit_nbytes)
        except FileNotFoundError:
            # A copy without what it links to is not a directory without the file.
            if not self.path.is_symlink():
                raise
            raise self.wrong(f"a link to {self.path.readlink()}, which is not there") from None
        except OSError as error:
            raise self.wrong(f"cannot be read: {os.strerror(error.errno or 0)}") from error
        except ValueError as error:
            raise self.wrong(str(error)) from error


def read_regular(path: Path, limit_nbytes: int) -> bytes:
    """Return the bytes of a regular file, without ever waiting for a FIFO or a device.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be opened or read.
        ValueError: not a regular file, or one of more bytes than the limit.
    """
    # Asked before opening too, since opening a device may already do something.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("expected a regular file, found something else")
    with open(path, "rb", opener=_open_at_once) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("expected a regular file, found something else")
        nbytes = found.st_size
        if nbytes <= limit_nbytes:
            text = file.read(nbytes + 1)
            nbytes = len(text)
    if nbytes > limit_nbytes:
        raise ValueError(f"expected at most {limit_nbytes:,} bytes, found {nbytes:,}")
    return text


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | system.AT_ONCE)


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
        ValueError: not JSON, nested too deeply, of so many parts that they would take hundreds of
            megabytes, or, with `unique_keys`, an object in which a key occurs twice.
    """
    nbytes = json_memory(text, unique=unique_keys)
    if nbytes > _MEMORY_NBYTES:
        raise ValueError(
            f"would take {nbytes >> 20:,} MiB of memory, expected at most {_MEMORY_NBYTES >> 20:,}"
        )
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_text(value: object) -> bytes:
    """Return JSON to be kept in a file, with a line for each entry and for each item of a list.

    What an item of a list holds, and objects in more than two others, are on one line. NaN and
    infinity become null.
    """
    import msgspec

    encode = msgspec.json.Encoder().encode
    text = BytesIO()

    def write(value: object, indent: bytes) -> None:
        inner = b"\n " + indent
        if isinstance(value, dict) and value and len(indent) < 3:
            for at, (key, part) in enumerate(value.items()):
                text.write(b"%b%b%b: " % (b"," if at else b"{", inner, encode(key)))
                write(part, indent + b" ")
            text.write(b"\n%b}" % indent)
        elif isinstance(value, list) and value:
            for at, item in enumerate(value):
                text.write(b"%b%b%b" % (b"," if at else b"[", inner, encode(item)))
            text.write(b"\n%b]" % indent)
        else:
            text.write(encode(value))

    write(value, b"")
    text.write(b"\n")
    return text.getvalue()


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
        raise ValueError(_named(error, key, shown(value))) from error


def _named(error: Exception, key: str, value: str) -> str:
    """Return in words what msgspec found wrong, with the place, or `value` where it is all."""
    problem, _, where = str(error).partition(" - at ")
    # msgspec writes `key` in `$.place` of a key that is not of its type.
    _, inside, place = where.rpartition(" in ")
    path = f"{key}{(place if inside else where).strip('`').removeprefix('$')}".lstrip(".")
    name = printable(f"a key of {path}" if inside else path, 120)
    return f"{name or 'the document'} {_in_words(problem, '' if where else value)}"


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


def shown(value: object) -> str:
    """Return a value of a file for a message: short, and of a container only its size."""
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    return printable(repr(value), 80)


def printable(text: str, limit: int) -> str:
    """Return text for a terminal: control characters spelled out, cut at `limit`."""
    spelled = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return spelled if len(spelled) <= limit else spelled[: limit - 1] + "…"


# Characters that move a terminal's cursor, begin its commands, or turn the direction of text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def refuse_control_characters(names: Iterable[str], place: object) -> None:
    """Refuse names that would change what a terminal or a page shows.

    Raises:
        CheckpointError: such a name.
    """
    for name in names:
        if _CONTROL.search(name):
            raise CheckpointError(
                f"{place}: a tensor's name has control characters, {printable(name, 120)}, which "
                "no model has; write the file again without them"
            )
