"""Flags from the fields of option dataclasses, and options from flags and a configuration file.

Owns no option: name, type, default, choices and help come from the field. `check_weights` becomes
`--check-weights` and `--no-check-weights`. A flag overrides the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

from drift_fast.options import Options, about_of, check, plain

SOURCE = "file, directory, Hub id (org/name[@revision]) or URL"
# The commands that a configuration file may have a section for.
SECTIONS = ("delta", "inspect", "merge", "protect", "check", "plan")

Given = TypeVar("Given", bound=Options)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the two checkpoints."""
    parser.add_argument("reasoning", help=f"text-only reasoning checkpoint: {SOURCE}")
    parser.add_argument("multimodal", help=f"multimodal checkpoint: {SOURCE}")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the flag for output that programs read."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the flag for a configuration file."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML or JSON with the options below, at its top or in a section with the command's "
        "name; flags override it",
    )


def add_options(
    parser: argparse.ArgumentParser, cls: type[Options], only: Collection[str] = ()
) -> None:
    """Add a flag for each option of `cls`, or for some; a flag that is not given sets nothing."""
    for each in fields(cls):
        if about_of(each).in_file and (not only or each.name in only):
            _add_flag(parser, each)


def from_flags(given: argparse.Namespace, cls: type[Given], command: str) -> Given:
    """Return the options of a command: those of `--config`, overridden by flags.

    Raises:
        ValueError: an invalid configuration file or value.
        FileNotFoundError, ImportError: no such file, or YAML without PyYAML.
    """
    flags = given_flags(given, cls)
    path = getattr(given, "config", None)
    if path is None:
        return cls(**flags)
    return cls.from_dict({**read_section(path, command), **flags}, origin=str(path))


def given_flags(given: argparse.Namespace, cls: type[Options]) -> dict[str, Any]:
    """Return the options that were given as flags."""
    found = {name: value for name, value in vars(given).items() if name in cls.names()}
    repeated = {each.name for each in fields(cls) if _is_repeated(each)}
    return {name: tuple(v) if name in repeated else v for name, v in found.items()}


def words_for(options: Options, names: Iterable[str]) -> list[str]:
    """Return the words that give the named options, as far as they differ from their defaults."""
    words, chosen = [], options.to_dict()
    for name in names:
        if name in chosen:
            value = chosen[name]
            text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return words


def read_section(path: Path, command: str) -> Mapping[str, Any]:
    """Return what a configuration file says about a command.

    A file either has a section for each command that it configures, or the options of one command.

    Raises:
        ValueError: not a mapping, or sections of other commands only.
        FileNotFoundError, ImportError: no such file, or YAML without PyYAML.
    """
    from drift_fast.config_files import read_settings

    content = read_settings(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a mapping of options, got {content!r}")
    sections = {name for name in SECTIONS if name in content and _is_section(content[name])}
    if not sections:
        return content
    others = sorted(str(name) for name in content if name not in sections)
    if others:
        raise ValueError(
            f"{path}: {', '.join(others)} beside the sections {', '.join(sorted(sections))}; put "
            f"options into a section, of which there are {', '.join(SECTIONS)}"
        )
    if command not in sections:
        raise ValueError(
            f"{path}: expected a section {command!r}, found {', '.join(sorted(sections))}"
        )
    section: Mapping[str, Any] = content[command] or {}
    return section


def _is_section(value: object) -> bool:
    # A section with nothing but comments is null.
    return value is None or isinstance(value, Mapping)


def _add_flag(parser: argparse.ArgumentParser, each: Field[Any]) -> None:
    about = about_of(each)
    flag = f"--{each.name.replace('_', '-')}"
    described = _help(each)
    if str(each.type).startswith("bool"):
        parser.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=described
        )
        return
    if _is_repeated(each):
        parser.add_argument(
            flag,
            action="append",
            metavar=about.metavar,
            default=argparse.SUPPRESS,
            help=f"{described}; may be repeated",
        )
        return
    parser.add_argument(
        flag,
        type=_reader(each),
        # For the help only: the reader refuses other values, and knows the retired ones.
        choices=about.choices,
        metavar=about.metavar if about.choices is None else None,
        default=argparse.SUPPRESS,
        help=described,
    )


def _is_repeated(each: Field[Any]) -> bool:
    """Whether a flag adds one name to those given before."""
    return str(each.type) == "tuple[str, ...]"


def _help(each: Field[Any]) -> str:
    default = each.default
    if default is MISSING or default is None or default == ():
        shown = ""
    elif isinstance(default, bool):
        shown = f" (default {'yes' if default else 'no'})"
    elif isinstance(default, tuple):
        shown = f" (default {','.join(map(str, default))})"
    else:
        shown = f" (default {default})"
    return f"{about_of(each).help}{shown}".replace("%", "%%")


def _reader(each: Field[Any]) -> Callable[[str], Any]:
    """Return the function that turns the text of a flag into a value or refuses it."""
    kinds = str(each.type).split(" | ")
    numbers = [] if "str" in kinds else [one for one in (int, float) if one.__name__ in kinds]

    def read(text: str) -> Any:
        value: Any = text
        for number in numbers:
            with suppress(ValueError):
                value = number(text)
                break
        try:
            value = plain(each, value)
            check(each, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return read
