"""A stated mapping: prefix pairs, a dictionary, a function or a map file.

Turns each form into one answer per name. A stated pair is checked like a pair that is found: every
name must exist, shapes must agree, and nothing is paired twice; see `stated`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from msgspec import Struct

from drift_fast.config_files import JsonFile
from drift_fast.errors import AlignmentError
from drift_fast.paths import local_path

PathLike = str | os.PathLike[str]

# What one name matches: a name, several where it is split on the other side, or nothing.
Stated = str | Sequence[str] | None
# Prefix pairs, name → match, a function that does the same, or a map file.
MappingLike = Sequence[tuple[str, str]] | Mapping[str, Stated] | Callable[[str], Stated] | PathLike

FORMAT_VERSION = 1
# A map of the largest checkpoints, with some 50,000 tensors, takes a tenth of this.
_MAX_NBYTES = 100 << 20

# What the two sides are called in messages.
CHECKPOINTS = ("reasoning checkpoint", "multimodal checkpoint")
RUNTIME = ("delta", "model")


class _MapFile(Struct):
    format_version: int
    pairs: dict[str, Any]


def resolve(
    mapping: MappingLike,
    reasoning: Iterable[str],
    multimodal: Iterable[str],
    called: tuple[str, str] = CHECKPOINTS,
) -> dict[str, list[str]]:
    """Return the stated multimodal names of each reasoning name; none where it has no match.

    Raises:
        AlignmentError: a name that the models do not have, or a prefix that matches nothing.
        FileNotFoundError, AlignmentError: a map file that is missing or not valid.
        TypeError: a mapping of another type.
    """
    names, targets = list(reasoning), set(multimodal)
    if isinstance(mapping, str):
        mapping = parse_mapping(mapping)
    if isinstance(mapping, str | os.PathLike):
        mapping = read_map(mapping)
    if isinstance(mapping, Mapping):
        _refuse_unknown(mapping, names, called[0])
        stated = {name: _targets(name, found) for name, found in mapping.items()}
    elif callable(mapping):
        stated = {name: _targets(name, mapping(name)) for name in names}
    elif isinstance(mapping, Sequence) and not isinstance(mapping, str):
        # A prefix says where a module is, not that all of it has a match.
        return {
            name: [target]
            for name, target in _by_prefix(mapping, names, called[0]).items()
            if target in targets
        }
    else:
        raise _wrong_type(mapping)
    _refuse_unknown((name for found in stated.values() for name in found), targets, called[1])
    return stated


def _targets(name: str, stated: Stated) -> list[str]:
    if stated is None:
        return []
    targets = [stated] if isinstance(stated, str) else stated
    if not isinstance(targets, list | tuple) or not all(isinstance(one, str) for one in targets):
        raise TypeError(
            f"the mapping gives {stated!r} for {name}; expected None, a name or several"
        )
    return list(targets)


def read_map(path: PathLike) -> dict[str, Stated]:
    """Read a map file, as `drift-fast align … --out` writes it.

    Raises:
        FileNotFoundError: no such file.
        AlignmentError: a file that is not a map.
    """
    path = local_path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such map file; `drift-fast align REASONING MULTIMODAL --out {path}` "
            "writes one to edit"
        )
    expected = (
        'expected a map file, {"format_version": 1, "pairs": {reasoning name: multimodal name, '
        "several, or null}}"
    )
    file = JsonFile(path, _MAX_NBYTES, expected, unique_keys=True, error=AlignmentError)
    stored = file.read(_MapFile)
    if stored.format_version != FORMAT_VERSION:
        raise file.wrong(f"format version {stored.format_version}, expected {FORMAT_VERSION}")
    # One by one, so that an error names the tensor.
    return {
        name: file.convert(found, cast(Any, str | list[str] | None), f"pairs.{name}")
        for name, found in stored.pairs.items()
    }


def write_map(
    path: PathLike, pairs: Sequence[tuple[str, str]], left_out: Iterable[str], **notes: object
) -> None:
    """Write a map file: the match of each name, or null.

    Raises:
        FileExistsError: the file is there.
    """
    matches: dict[str, list[str]] = {}
    for name, match in pairs:
        matches.setdefault(name, []).append(match)
    stated: dict[str, Stated] = {
        name: found[0] if len(found) == 1 else found for name, found in matches.items()
    }
    stored = {
        "format_version": FORMAT_VERSION,
        **notes,
        "pairs": stated | dict.fromkeys(left_out),
    }
    try:
        with local_path(path).open("x", encoding="utf-8") as file:
            json.dump(stored, file, indent=1)
            file.write("\n")
    except FileExistsError:
        raise FileExistsError(
            f"{path}: the file exists; choose another name, since a map may have been edited and "
            "is never overwritten"
        ) from None


def _by_prefix(pairs: Sequence[tuple[str, str]], names: Sequence[str], side: str) -> dict[str, str]:
    given = []
    for pair in pairs:
        try:
            first, second = pair
        except (TypeError, ValueError) as error:
            raise _wrong_type(pairs) from error
        given.append((str(first).rstrip("."), str(second).rstrip(".")))
    # The longest prefix that fits decides, so that a part can be placed elsewhere than the rest.
    given.sort(key=lambda pair: -len(pair[0]))
    used, stated = set(), {}
    for name in names:
        for first, second in given:
            rest = name if not first else name.removeprefix(f"{first}.")
            if first and rest == name:
                continue
            used.add(first)
            stated[name] = f"{second}.{rest}" if second else rest
            break
    unused = [first for first, _ in given if first not in used]
    if unused:
        raise AlignmentError(
            f"no tensor of the {side} begins with {unused[0]!r}; an example "
            f"of its names is {names[0] if names else 'none'}"
        )
    return stated


def _wrong_type(mapping: object) -> TypeError:
    return TypeError(
        "mapping must be pairs of prefixes, a dictionary of names, a function or the path of a map "
        f"file, got {type(mapping).__name__}"
    )


def _refuse_unknown(names: Iterable[str], known: Iterable[str], side: str) -> None:
    known = set(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        # Loaded here, since few runs come to this.
        import difflib

        near = difflib.get_close_matches(str(unknown[0]), known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise AlignmentError(
            f"the mapping names {len(unknown)} tensors that the {side} does not have, "
            f"{unknown[0]!r} first{hint}"
        )


def parse_mapping(text: str) -> str | list[tuple[str, str]]:
    """Return prefix pairs from text such as `a:b,c:d`, or the path of a map file."""
    # No prefix looks like a path.
    if ":" not in text or text.endswith(".json") or "/" in text or "\\" in text:
        return text
    pairs = [pair.partition(":") for pair in text.split(",")]
    return [(first.strip(), second.strip()) for first, _, second in pairs]
