"""Write what follows from the option dataclasses: keyword types, reference tables and a schema.

Owns the list of the classes and the three files: python/drift_fast/_keywords.py, docs/options.md
and docs/drift.schema.json. `python docs/make_options.py` writes them; tests/test_options.py fails
while one of them differs.
"""

from __future__ import annotations

import ast
import builtins
import collections.abc
import importlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from drift_fast.options import Options, about_of

ROOT = Path(__file__).parent.parent
KEYWORDS = ROOT / "python" / "drift_fast" / "_keywords.py"
REFERENCE = ROOT / "docs" / "options.md"
SCHEMA = ROOT / "docs" / "drift.schema.json"

# Every class of options, a base before what inherits from it.
CLASSES = (
    "drift_fast.alignment.options.MatchOptions",
    "drift_fast.alignment.options.AlignOptions",
    "drift_fast.alignment.options.ModuleOptions",
    "drift_fast.alignment.options.SelectionOptions",
    "drift_fast.alignment.options.PairOptions",
    "drift_fast.delta.options.ProgressOptions",
    "drift_fast.delta.options.StreamOptions",
    "drift_fast.delta.options.OutputOptions",
    "drift_fast.delta.options.InspectOptions",
    "drift_fast.delta.options.RankOptions",
    "drift_fast.delta.options.DeltaOptions",
    "drift_fast.delta.options.SaveOptions",
    "drift_fast.merging.method_options.MethodOptions",
    "drift_fast.merging.config.MergeConfig",
    "drift_fast.preflight.options.CheckOptions",
    "drift_fast.inject.config.StrengthOptions",
    "drift_fast.inject.config.ResidencyOptions",
    "drift_fast.inject.config.TargetOptions",
    "drift_fast.inject.config.InjectionConfig",
    "drift_fast.inject.motion.options.MotionOptions",
    "drift_fast.protection.options.ProtectOptions",
    "drift_fast.integrations.settings.Settings",
    "drift_fast.planner.training.Training",
    "drift_fast.planner.options.PlanOptions",
    "drift_fast.bench.options.BenchOptions",
    "drift_fast.cli.setup.SetupOptions",
)
# What trains: the options of a file that names its delta.
INJECTION = "Settings"
# The sections of a configuration file that are commands, with the class of each.
COMMANDS = {
    "delta": "DeltaOptions",
    "inspect": "InspectOptions",
    "merge": "MergeConfig",
    "protect": "ProtectOptions",
    "check": "CheckOptions",
    "plan": "PlanOptions",
}
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}

LINE_LENGTH = 100

KEYWORDS_HEADER = '''"""Types of keyword arguments, used as `**options: Unpack[DeltaKeywords]`.

Generated from the option dataclasses by `python docs/make_options.py` (`make options`); do not
edit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict
'''
REFERENCE_HEADER = """# Options

Generated from the option dataclasses by `python docs/make_options.py` (`make options`); do not
edit. Each option is a keyword argument of the functions that take its class, a key of a
configuration file, and a flag of the command line: `check_weights=False` is `check_weights: false`
in a file and `--no-check-weights` as a flag.

A configuration file is YAML or JSON. One that trains has a `delta` and options of
[Settings](#settings). One for `--config` has a section for each command, or the options of one
command without a section; flags win. An unknown key is an error. Editors complete and check both by
[the schema](drift.schema.json):

```yaml
# yaml-language-server: $schema=docs/drift.schema.json
delta:
  modules: attn,mlp
  max_shard_size: 2GB
merge:
  density: 0.2
```
"""


def load() -> list[type[Options]]:
    """Return the classes, in order."""
    found = []
    for place in CLASSES:
        module, _, name = place.rpartition(".")
        found.append(getattr(importlib.import_module(module), name))
    return found


def own_fields(cls: type[Options]) -> list[Field[Any]]:
    """Return the fields that the class itself declares."""
    return [each for each in fields(cls) if each.name in inspect.get_annotations(cls)]


def bases_of(cls: type[Options]) -> list[type[Options]]:
    return [base for base in cls.__bases__ if issubclass(base, Options) and base is not Options]


# ---------------------------------------------------------------- keyword types


def keywords() -> str:
    """Return the module of one TypedDict for each class."""
    classes = load()
    imports: dict[str, set[str]] = {}
    blocks = []
    for cls in classes:
        # A TypedDict cannot declare a key of its base anew, so such a class repeats all keys.
        inherited = {each.name for base in bases_of(cls) for each in fields(base)}
        flat = bool(inherited & {each.name for each in own_fields(cls)})
        shown = list(fields(cls)) if flat else own_fields(cls)
        bases = [] if flat else [keywords_name(base) for base in bases_of(cls)]
        for each in shown:
            for module, name in names_in(declarer(cls, each.name), str(each.type)):
                imports.setdefault(module, set()).add(name)
        lines = [f"    {each.name}: {each.type}" for each in shown]
        header = ", ".join([*(bases or ["TypedDict"]), "total=False"])
        body = "\n".join([f'    """The keywords of `{cls.__name__}`."""', "", *lines]).rstrip()
        blocks.append(f"class {keywords_name(cls)}({header}):\n{body}")
    guarded = "\n".join(
        line
        for group in grouped(imports)
        for line in [*(import_line(module, imports[module]) for module in group), ""]
    )
    return f"{KEYWORDS_HEADER}\nif TYPE_CHECKING:\n{guarded}\n\n" + "\n\n\n".join(blocks) + "\n"


def keywords_name(cls: type[Options]) -> str:
    """Return `DeltaKeywords` for `DeltaOptions`, and so for a class that ends in Config."""
    return cls.__name__.removesuffix("Options").removesuffix("Config") + "Keywords"


def declarer(cls: type[Options], name: str) -> type[Options]:
    """Return the class whose annotation a field has."""
    return next(each for each in cls.__mro__ if name in inspect.get_annotations(each))


def names_in(cls: type[Options], annotation: str) -> Iterator[tuple[str, str]]:
    """Yield module and name of everything that an annotation of the class refers to."""
    module = inspect.getmodule(cls)
    assert module is not None
    origins = {}
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and node.module:
            origins |= {alias.asname or alias.name: node.module for alias in node.names}
    for node in ast.walk(ast.parse(annotation)):
        if isinstance(node, ast.Name) and not hasattr(builtins, node.id):
            if node.id in origins:
                yield origins[node.id], node.id
            elif node.id in vars(module):
                yield module.__name__, node.id


def grouped(imports: Iterable[str]) -> Iterator[list[str]]:
    """Yield the modules of Python, of others and of the package, as ruff sorts imports."""
    ordered = sorted(imports)
    own = [module for module in ordered if module.startswith("drift_fast")]
    others = [module for module in ordered if module.partition(".")[0] == "torch"]
    python = [module for module in ordered if module not in own and module not in others]
    yield from (group for group in (python, others, own) if group)


def import_line(module: str, names: Iterable[str]) -> str:
    ordered = sorted(names)
    line = f"    from {module} import {', '.join(ordered)}"
    if len(line) <= LINE_LENGTH:
        return line
    return "\n".join(
        [f"    from {module} import (", *(f"        {name}," for name in ordered), "    )"]
    )


# ---------------------------------------------------------------- reference


def reference() -> str:
    """Return the page of one table for each class."""
    blocks = [REFERENCE_HEADER]
    for cls in load():
        summary = (inspect.getdoc(cls) or "").partition("\n")[0]
        others = ", ".join(f"[{base.__name__}](#{base.__name__.lower()})" for base in bases_of(cls))
        block = f"## {cls.__name__}\n\n{summary}\n"
        if others:
            also = "Also takes" if own_fields(cls) else "Takes"
            block += f"\n{also} the options of {others}.\n"
        if own_fields(cls):
            rows = "\n".join(map(row_of, own_fields(cls)))
            block += f"\n| option | type | default | |\n|---|---|---|---|\n{rows}\n"
        blocks.append(block)
    return "\n".join(blocks)


def row_of(each: Field[Any]) -> str:
    default = "" if each.default is MISSING else f"`{each.default!r}`"
    choices = about_of(each).choices
    text = about_of(each).help
    if choices is not None and not all(choice in text for choice in choices):
        text += f": {', '.join(choices)}"
    cells = [f"`{each.name}`", f"`{each.type}`", default, text]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


# ---------------------------------------------------------------- schema


def schema() -> str:
    """Return the JSON schema of a configuration file, for editors; an option is defined once."""
    classes = {cls.__name__: cls for cls in load()}
    used = [classes[name] for name in dict.fromkeys([*COMMANDS.values(), INJECTION])]
    commands = {command: reference_to(name) for command, name in COMMANDS.items()}
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "Generated by `python docs/make_options.py`; do not edit.",
        "title": "A configuration file of drift-fast",
        "anyOf": [
            {"$ref": "#/$defs/commands"},
            {"$ref": f"#/$defs/{INJECTION}"},
        ],
        "$defs": {
            "commands": object_of("Options of commands, a section for each", commands),
            **{cls.__name__: object_of_options(cls) for cls in used},
            **{key: value for cls in used for key, value in definitions_of(cls).items()},
        },
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def reference_to(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


def object_of(description: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "description": description,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def object_of_options(cls: type[Options]) -> dict[str, Any]:
    """Return the schema of a mapping with the options that a file may set."""
    properties = {each.name: reference_to(definition_name(cls, each)) for each in settable(cls)}
    required = [each.name for each in settable(cls) if each.default is MISSING]
    found = object_of((inspect.getdoc(cls) or "").partition("\n")[0], properties)
    return {**found, "required": required} if required else found


def settable(cls: type[Options]) -> list[Field[Any]]:
    return [each for each in fields(cls) if about_of(each).in_file]


def definitions_of(cls: type[Options]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {definition_name(cls, each): value_of(each, hints[each.name]) for each in settable(cls)}


def definition_name(cls: type[Options], each: Field[Any]) -> str:
    return f"{declarer(cls, each.name).__name__}.{each.name}"


def value_of(each: Field[Any], hint: Any) -> dict[str, Any]:
    """Return the schema of one option's value."""
    about = about_of(each)
    alternatives = unique(alternatives_of(hint))
    if about.choices is not None:
        null = [None] if {"type": "null"} in alternatives else []
        alternatives = [{"enum": [*about.choices, *null]}]
    elif about.parse is not None:
        # A file may write what a flag does.
        alternatives = unique([*alternatives, {"type": "string"}])
    default = {} if each.default is MISSING else {"default": plain(each.default)}
    return {"description": about.help, **any_of(alternatives), **default}


def alternatives_of(hint: Any) -> Iterator[dict[str, Any]]:
    """Yield a schema for each kind of value that a file can write; a function is not one."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in JSON_TYPES:
        yield {"type": JSON_TYPES[hint]}
    elif origin in (Union, UnionType):
        for one in inner:
            yield from alternatives_of(one)
    elif origin is Literal:
        yield {"enum": list(inner)}
    elif origin in (dict, Mapping, collections.abc.Mapping):
        values = unique(alternatives_of(inner[1]))
        yield {"type": "object", "additionalProperties": any_of(values)}
    elif isinstance(origin, type) and issubclass(origin, Iterable):
        items = (one for each in inner if each is not ... for one in alternatives_of(each))
        yield {"type": "array", "items": any_of(unique(items))}


def any_of(alternatives: list[dict[str, Any]]) -> dict[str, Any]:
    return alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}


def unique(alternatives: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for each in alternatives:
        if each not in found:
            found.append(each)
    return found


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def outputs() -> dict[Path, str]:
    """Return the text of each file."""
    return {KEYWORDS: keywords(), REFERENCE: reference(), SCHEMA: schema()}


if __name__ == "__main__":
    for path, text in outputs().items():
        path.write_text(text, encoding="utf-8")
