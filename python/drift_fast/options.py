"""Options: one frozen dataclass a subject, and everything that follows from its fields.

A field made by `option` owns the name, type, default, check and help of one option. Keyword
arguments, command-line flags, keys of a configuration file, their JSON schema and the reference
table of the documentation are all made from the fields, so an option is stated once.
An option that is misspelled or retired raises, since a run would otherwise use the default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields, replace
from types import NoneType
from typing import Any, Self, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

# Keywords that earlier versions had, and what to write now.
RETIRED = {
    "progress": "pass progress_bar=True or False for a bar, or on_progress=… for a function",
    "singular": "it is gone: take torch.linalg.svdvals(delta[name]) of the tensors of interest",
}

# The types of options that a plain value is checked against, and what a message calls them.
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (NoneType,),
}
_NAMES = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "None": "null",
}


@dataclass(frozen=True)
class About:
    """What a field says about an option, beside its name, type and default.

    `check` raises ValueError for a value without meaning. `choices` are all valid values. `parse`
    turns text into a value, in a flag or a file; `metavar` names that text. `in_file` is False for
    an object of the running process, which neither a file nor a flag can set.
    """

    help: str
    check: Callable[[Any], object] | None = None
    choices: tuple[str, ...] | None = None
    parse: Callable[[str], Any] | None = None
    metavar: str | None = None
    in_file: bool = True


def option(
    default: Any,
    help: str,  # noqa: A002
    *,
    check: Callable[[Any], object] | None = None,
    choices: Iterable[str] | None = None,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    in_file: bool = True,
) -> Any:
    """Return the dataclass field of one option; see `About`."""
    known = None if choices is None else tuple(choices)
    about = About(help, check, known, parse, metavar, in_file)
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base of all option dataclasses; groups of options are joined by inheritance.

    Raises:
        ValueError: a value without meaning, when an instance is made.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            check(each, getattr(self, each.name))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of all options, in order."""
        return tuple(each.name for each in fields(cls))

    @classmethod
    def from_keywords(
        cls, keywords: Mapping[str, Any], *, function: str, config: Self | None = None
    ) -> Self:
        """Make options from the keyword arguments of `function`, over those of `config` if given.

        Raises:
            TypeError: an unknown or retired keyword, with what to write in its place.
            ValueError: a value without meaning.
        """
        for name in keywords:
            if name not in cls.names():
                raise TypeError(f"{function}() {unknown(name, cls.names(), 'keyword argument')}")
        return cls(**keywords) if config is None else replace(config, **keywords)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, origin: str) -> Self:
        """Make options from plain values, such as a section of a configuration file.

        origin: what to call the values in an error.

        Raises:
            TypeError: not a mapping.
            ValueError: an unknown or retired key, or a value without meaning.
        """
        keywords = cls.read(values, origin=origin)
        try:
            return cls(**keywords)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error

    @classmethod
    def read(cls, values: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
        """Return keyword arguments from plain values, which may be some of the options.

        Raises:
            TypeError: not a mapping.
            ValueError: an unknown or retired key, or a value of another type.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{origin} must be a mapping of options, got {type(values).__name__}")
        known = {each.name: each for each in fields(cls) if about_of(each).in_file}
        for name in values:
            if name not in known:
                raise ValueError(f"{origin}: {unknown(name, known, 'option')}")
        try:
            return {name: plain(known[name], value) for name, value in values.items()}
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the options that a file may set and that differ from their defaults."""
        values = ((each, getattr(self, each.name)) for each in fields(self))
        return {
            each.name: value
            for each, value in values
            if about_of(each).in_file and value != each.default
        }


def takes(options: type[Options]) -> Callable[[Function], Function]:
    """Show the fields of `options` in the signature and docstring of a function."""

    def document(function: Function) -> Function:
        import inspect

        kind = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.signature(function)
        kept = [each for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD]
        given = [
            inspect.Parameter(each.name, kind, default=each.default, annotation=each.type)
            for each in fields(options)
        ]
        lines = [f"        {each.name}: {about_of(each).help}." for each in fields(options)]
        function.__signature__ = signature.replace(parameters=[*kept, *given])  # type: ignore[attr-defined]
        function.__doc__ = f"{(function.__doc__ or '').rstrip()}\n\n    Options:\n" + "\n".join(
            lines
        )
        return function

    return document


def check(each: Field[Any], value: Any) -> None:
    """Refuse a value without meaning.

    Raises:
        ValueError: it is not true or false, not one of the choices, or the check of the option
            refuses it.
    """
    about = about_of(each)
    # First, since a check may know of a choice that is gone.
    if about.check is not None:
        about.check(value)
    if each.type == "bool" and value not in (True, False):
        # Any text would count as true.
        raise ValueError(f"{each.name} must be True or False, got {value!r}")
    if about.choices is not None and value not in about.choices and value != each.default:
        raise ValueError(f"{each.name} must be one of {', '.join(about.choices)}, got {value!r}")


def plain(each: Field[Any], value: Any, *, called: str | None = None) -> Any:
    """Return the value of an option from a plain one, as a flag or a file gives it.

    called: the name to use in an error, by default that of the option.

    Raises:
        ValueError: a value of another type; types that are more than numbers and text are left to
            the check of the option.
    """
    parse = about_of(each).parse
    if parse is not None and isinstance(value, str):
        return parse(value)
    kinds = str(each.type).split(" | ")
    if not all(kind in _TYPES for kind in kinds):
        return value
    if isinstance(value, str) and "float" in kinds and "str" not in kinds:
        # YAML reads 1e-6 as text.
        with suppress(ValueError):
            return float(value)
    expected = tuple(one for kind in kinds for one in _TYPES[kind])
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        names = " or ".join(_NAMES[kind] for kind in kinds)
        raise ValueError(f"{called or each.name} must be {names}, got {value!r}")
    return value


def about_of(each: Field[Any]) -> About:
    """Return what a field says about its option."""
    about: About = each.metadata["about"]
    return about


def unknown(name: str, known: Iterable[str], what: str) -> str:
    """Return the message for a name that is not an option, with the nearest that is."""
    known = tuple(known)
    if name in RETIRED:
        return f"no longer has the {what} {name!r}: {RETIRED[name]}"
    # Loaded here, since few runs come to this.
    import difflib

    near = difflib.get_close_matches(str(name), known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; expected {', '.join(known)}"
    return f"got an unexpected {what} {name!r}{hint}"
