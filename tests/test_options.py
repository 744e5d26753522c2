"""What follows from the option dataclasses is written, and a wrong option names the right one."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from drift_fast.alignment.options import PairOptions
from drift_fast.delta.options import DeltaOptions, StreamOptions
from drift_fast.options import RETIRED, Options, about_of, check

PLACE = Path(__file__).parent.parent / "docs" / "make_options.py"


def load(path: Path) -> Any:
    """Import a file by its path, since the documentation is not a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


generator = load(PLACE)
CLASSES: list[type[Options]] = generator.load()


@pytest.mark.parametrize("path", generator.outputs(), ids=lambda path: path.name)
def test_a_generated_file_is_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == generator.outputs()[path], (
        f"{path.name} is out of date; run `make options`"
    )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_has_a_help_that_fits_into_a_sentence(cls: type[Options]) -> None:
    for each in fields(cls):
        text = about_of(each).help
        assert text, each.name
        assert text[-1] not in ".;,", each.name
        assert "\n" not in text, each.name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_default_is_a_value_that_a_file_may_have(cls: type[Options]) -> None:
    defaults = {
        each.name: each.default
        for each in fields(cls)
        if about_of(each).in_file and each.default is not MISSING
    }
    assert cls.read(defaults, origin="defaults") == defaults
    for each in fields(cls):
        if each.default is not MISSING:
            check(each, each.default)


def conforms(value: Any, schema: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
    """Say whether a value is valid, as far as the words that the generator writes go."""
    if "$ref" in schema:
        return conforms(value, document["$defs"][schema["$ref"].rpartition("/")[2]], document)
    if "anyOf" in schema:
        return any(conforms(value, one, document) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "object":
        properties, more = schema.get("properties", {}), schema["additionalProperties"]
        return isinstance(value, dict) and all(
            conforms(one, properties[key], document)
            if key in properties
            else more is not False and conforms(one, more, document)
            for key, one in value.items()
        )
    if schema["type"] == "array":
        return isinstance(value, list) and all(
            conforms(one, schema["items"], document) for one in value
        )
    types = {"boolean": bool, "integer": int, "number": (int, float), "string": str}
    if isinstance(value, bool) or value is None:
        return schema["type"] == ("null" if value is None else "boolean")
    return schema["type"] != "null" and isinstance(value, types[schema["type"]])


DOCUMENT = json.loads(generator.schema())


@pytest.mark.parametrize(("name", "schema"), DOCUMENT["$defs"].items())
def test_a_default_conforms_to_the_schema(name: str, schema: Mapping[str, Any]) -> None:
    assert schema["description"]
    if "default" in schema:
        assert conforms(schema["default"], schema, DOCUMENT), name


def test_the_schema_takes_sections_of_commands_and_no_unknown_key() -> None:
    good = {"delta": {"modules": ["attn"], "layers": "0-3", "dtype": "float32", "strict": False}}
    assert conforms(good, DOCUMENT, DOCUMENT)
    assert not conforms({"delta": {"module": "attn"}}, DOCUMENT, DOCUMENT)
    assert not conforms({"delta": {"strict": "no"}}, DOCUMENT, DOCUMENT)


# ------------------------------------------------------------------ wrong options


@pytest.mark.parametrize(("name", "successor"), RETIRED.items())
def test_a_retired_option_names_its_successor(name: str, successor: str) -> None:
    with pytest.raises(TypeError, match=rf"^compute_delta\(\) no longer has .*'{name}'") as error:
        DeltaOptions.from_keywords({name: 1}, function="compute_delta")
    assert successor in str(error.value)
    with pytest.raises(ValueError, match=rf"drift\.yaml: .*'{name}'"):
        DeltaOptions.from_dict({name: 1}, origin="drift.yaml")


def test_a_dtype_that_is_gone_names_its_successor() -> None:
    with pytest.raises(ValueError, match=r"storing Δ as float8_e4m3 is gone.*int8"):
        DeltaOptions(dtype="float8_e4m3")


def test_a_misspelled_option_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"inspect\(\) .*'module'; did you mean 'modules'\?"):
        PairOptions.from_keywords({"module": "attn"}, function="inspect")
    with pytest.raises(ValueError, match=r"file: .*'xyz'; expected progress_bar, threads, memory"):
        StreamOptions.from_dict({"xyz": 1}, origin="file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strict": "no"}, "strict must be true or false, got 'no'"),
        ({"threads": 2.5}, "threads must be an integer or null, got 2.5"),
        ({"threads": True}, "threads must be an integer or null, got True"),
        ({"min_coverage": "most"}, "min_coverage must be a number or null, got 'most'"),
        ({"min_coverage": 2}, "min_coverage must be between 0 and 1, got 2"),
        ({"reader": "read"}, "reader must be one of auto, mmap, pread, got 'read'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_a_value_of_a_file_is_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"drift\.yaml") as error:
        DeltaOptions.from_dict(values, origin="drift.yaml")
    assert str(error.value) == f"drift.yaml: {message}"


def test_a_file_may_write_what_a_flag_does() -> None:
    found = DeltaOptions.from_dict(
        {"ranks": "1/4", "mapping": "model:model.llm", "min_coverage": "5e-1"}, origin="file"
    )
    assert found.ranks == (1, 4)
    assert found.mapping == [("model", "model.llm")]
    assert found.min_coverage == 0.5


def test_keywords_come_before_a_configuration() -> None:
    config = DeltaOptions(threads=2, dtype="float32")
    found = DeltaOptions.from_keywords({"threads": 3}, function="compute_delta", config=config)
    assert (found.threads, found.dtype) == (3, "float32")
    assert found.to_dict() == {"threads": 3, "dtype": "float32"}
