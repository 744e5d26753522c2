"""JSON files of unknown origin are read within limits, and refused by file and key."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from drift_fast.config_files import JsonFile, convert
from drift_fast.errors import AlignmentError, CheckpointError, DriftError
from support.synthetic import refused


class Item(msgspec.Struct):
    name: str
    sizes: list[int] = []


class Document(msgspec.Struct):
    version: int
    items: dict[str, Item] = {}


def json_file(directory: Path, text: bytes, **options: object) -> JsonFile:
    path = directory / "file.json"
    path.write_bytes(text)
    return JsonFile(path, 1_000_000, "write it again", **options)  # type: ignore[arg-type]


def test_a_file_is_read_as_the_type_asked_for(tmp_path: Path) -> None:
    text = b'{"version": 1, "items": {"a": {"name": "b", "sizes": [1, 2]}}, "new": null}'
    found = json_file(tmp_path, text).read(Document)
    assert found == Document(1, {"a": Item("b", [1, 2])})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{}", ("version",)),
        (b"[]", ("the document", "an object", "a list")),
        (b'{"version": "1"}', ("version must be an integer", "a string")),
        (b'{"version": 1.5}', ("version must be an integer", "a number")),
        (b'{"version": true}', ("version must be an integer", "true or false")),
        (
            b'{"version": 1, "items": {"a": {"name": "b", "sizes": [1, null]}}}',
            ("sizes[1]", "null"),
        ),
        (b'{"version": 1', ("not valid JSON",)),
        (b'{"version": ' + b"9" * 900 + b"]", ("not valid JSON",)),
        (b"[" * 900_000, ("nested too deeply",)),
        (b" " * 1_000_001, ("at most 1,000,000 bytes", "1,000,001")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_anything_else_names_file_key_and_remedy(
    tmp_path: Path, text: bytes, words: tuple[str, ...]
) -> None:
    with refused(CheckpointError, tmp_path / "file.json", "write it again", *words):
        json_file(tmp_path, text).read(Document)


def test_a_key_that_occurs_twice_is_refused_where_that_matters(tmp_path: Path) -> None:
    text = b'{"version": 1, "version": 2}'
    assert json_file(tmp_path, text).read(Document).version == 2
    with refused(CheckpointError, "'version' occurs twice"):
        json_file(tmp_path, text, unique_keys=True).read(Document)


def test_the_type_of_the_error_is_the_callers(tmp_path: Path) -> None:
    error: type[DriftError] = AlignmentError
    with refused(error, "version"):
        json_file(tmp_path, b"{}", error=error).read(Document)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with refused(CheckpointError, "regular file"):
        JsonFile(tmp_path / "pipe", 1000, "").read(Document)


def test_what_a_stranger_wrote_cannot_steer_the_terminal() -> None:
    with pytest.raises(ValueError, match="found") as caught:
        convert("\x1b[2J" * 1000, int, "\x1b[31m")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250
