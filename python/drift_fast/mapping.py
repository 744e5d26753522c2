"""A pairing that the user states: prefix pairs, a dictionary, a callable or a map file.

Owns turning each form into one answer per name. What is stated is checked like what is found: every
name must exist, shapes must agree, and nothing is paired twice; see `matching`.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from drift_fast.errors import AlignmentError

PathLike = str | os.PathLike[str]

# Prefix pairs, name → name (None leaves it out), a function that does the same, or a map file.
MappingLike = (
    Sequence[tuple[str, str]] | Mapping[str, str | None] | Callable[[str], str | None] | PathLike
)

FORMAT_VERSION = 1
# A map of the largest checkpoints, of some 50,000 tensors, takes a tenth of this.
_MAX_NBYTES = 100 << 20


def resolve(mapping: MappingLike, left: Iterable[str], right: Iterable[str]) -> dict[str, str]:
    """Return the stated partner of each name on the left that has one.

    Raises:
        AlignmentError: a name that the models do not have, or a prefix that matches nothing.
        FileNotFoundError, AlignmentError: a map file that is missing or not valid.
        TypeError: a mapping of another kind.
    """
    left, right = list(left), set(right)
    if isinstance(mapping, str | os.PathLike):
        mapping = read_map(mapping)
    if isinstance(mapping, Mapping):
        _refuse_unknown(mapping, left, "reasoning")
        stated = {name: partner for name, partner in mapping.items() if partner is not None}
    elif callable(mapping):
        answers = {name: mapping(name) for name in left}
        stated = {name: partner for name, partner in answers.items() if partner is not None}
    else:
        stated = _by_prefix(mapping, left)
        # A prefix says where a module lies, not that all of it has a counterpart.
        return {name: partner for name, partner in stated.items() if partner in right}
    for name, partner in stated.items():
        if not isinstance(partner, str):
            raise TypeError(f"the mapping gives {partner!r} for {name}, expected a name or None")
    _refuse_unknown(stated.values(), right, "multimodal")
    return stated


def read_map(path: PathLike) -> dict[str, str | None]:
    """Read a map file, as `drift-fast align … --out` writes it.

    Raises:
        FileNotFoundError: no such file.
        AlignmentError: a file that is not a map.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such map file; `drift-fast align REASONING MULTIMODAL --out {path}` "
            "writes one to edit"
        )
    if path.stat().st_size > _MAX_NBYTES:
        raise AlignmentError(f"{path}: a map file is at most {_MAX_NBYTES} bytes")
    try:
        stored = json.loads(path.read_bytes(), object_pairs_hook=_once)
        version, pairs = stored["format_version"], stored["pairs"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version!r}, expected {FORMAT_VERSION}")
        for name, partner in pairs.items():
            if partner is not None and not isinstance(partner, str):
                raise ValueError(f"{name}: expected a name or null, got {partner!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AlignmentError(
            f"{path}: not a map file ({type(error).__name__}: {error}); expected "
            '{"format_version": 1, "pairs": {reasoning name: multimodal name or null}}'
        ) from error
    return dict(pairs)


def write_map(
    path: PathLike, pairs: Sequence[tuple[str, str]], left_out: Iterable[str], **notes: object
) -> None:
    """Write a map file: what is paired, and null for what is not.

    Raises:
        FileExistsError: the file is there; a map that was edited is not overwritten.
    """
    stored = {
        "format_version": FORMAT_VERSION,
        **notes,
        "pairs": dict(pairs) | dict.fromkeys(left_out),
    }
    with Path(path).open("x", encoding="utf-8") as file:
        json.dump(stored, file, indent=1)
        file.write("\n")


def _by_prefix(pairs: Sequence[tuple[str, str]], names: Sequence[str]) -> dict[str, str]:
    given = []
    for pair in pairs:
        try:
            first, second = pair
        except (TypeError, ValueError) as error:
            raise TypeError(
                "mapping must be pairs of prefixes, a dictionary of names, a function or the path "
                f"of a map file, got {mapping_kind(pairs)}"
            ) from error
        given.append((str(first).rstrip("."), str(second).rstrip(".")))
    # The longest prefix that fits decides, so that a part can be placed apart from the rest.
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
            f"no tensor of the reasoning model begins with {unused[0]!r}; its names are such as "
            f"{names[0] if names else 'none'}"
        )
    return stated


def mapping_kind(mapping: object) -> str:
    """Return the type's name, for a message."""
    return type(mapping).__name__


def _refuse_unknown(names: Iterable[str], known: Iterable[str], side: str) -> None:
    known = set(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise AlignmentError(
            f"the mapping names {len(unknown)} tensors that the {side} model does not have, "
            f"{unknown[0]!r} first{hint}"
        )


def _once(items: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(items)
    if len(names) != len(items):
        seen: set[str] = set()
        twice = next(name for name, _ in items if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is named twice")
    return names
