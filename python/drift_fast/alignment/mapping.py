"""A pairing that the user states: prefix pairs, a dictionary, a callable or a map file.

Owns turning each form into one answer per name. What is stated is checked like what is found: every
name must exist, shapes must agree, and nothing is paired twice; see `matching`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from drift_fast.errors import AlignmentError

PathLike = str | os.PathLike[str]

# What one name is paired with: a name, several where it is split on the other side, or nothing.
Partner = str | Sequence[str] | None
# Prefix pairs, name → partner, a function that does the same, or a map file.
MappingLike = (
    Sequence[tuple[str, str]] | Mapping[str, Partner] | Callable[[str], Partner] | PathLike
)

FORMAT_VERSION = 1
# A map of the largest checkpoints, of some 50,000 tensors, takes a tenth of this.
_MAX_NBYTES = 100 << 20


# What the two sides are called in messages.
CHECKPOINTS = ("reasoning checkpoint", "multimodal checkpoint")
RUNTIME = ("delta", "model")


def resolve(
    mapping: MappingLike,
    left: Iterable[str],
    right: Iterable[str],
    sides: tuple[str, str] = CHECKPOINTS,
) -> dict[str, list[str]]:
    """Return the stated partners of each name on the left, none where it is stated to have none.

    Raises:
        AlignmentError: a name that the models do not have, or a prefix that matches nothing.
        FileNotFoundError, AlignmentError: a map file that is missing or not valid.
        TypeError: a mapping of another kind.
    """
    left, right = list(left), set(right)
    if isinstance(mapping, str | os.PathLike):
        mapping = read_map(mapping)
    if isinstance(mapping, Mapping):
        _refuse_unknown(mapping, left, sides[0])
        stated = {name: _partners(name, partner) for name, partner in mapping.items()}
    elif callable(mapping):
        stated = {name: _partners(name, mapping(name)) for name in left}
    elif isinstance(mapping, Sequence) and not isinstance(mapping, str):
        # A prefix says where a module lies, not that all of it has a counterpart.
        return {
            name: [partner]
            for name, partner in _by_prefix(mapping, left, sides[0]).items()
            if partner in right
        }
    else:
        raise _another_kind(mapping)
    _refuse_unknown((name for names in stated.values() for name in names), right, sides[1])
    return stated


def _partners(name: str, partner: Partner) -> list[str]:
    if partner is None:
        return []
    partners = [partner] if isinstance(partner, str) else partner
    if not isinstance(partners, list | tuple) or not all(isinstance(one, str) for one in partners):
        raise TypeError(
            f"the mapping gives {partner!r} for {name}; expected None, a name or several"
        )
    return list(partners)


def read_map(path: PathLike) -> dict[str, Partner]:
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
            _partners(name, partner)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AlignmentError(
            f"{path}: not a map file ({type(error).__name__}: {error}); expected "
            '{"format_version": 1, "pairs": {reasoning name: multimodal name, several, or null}}'
        ) from error
    return dict(pairs)


def write_map(
    path: PathLike, pairs: Sequence[tuple[str, str]], left_out: Iterable[str], **notes: object
) -> None:
    """Write a map file: what is paired, and null for what is not.

    Raises:
        FileExistsError: the file is there.
    """
    partners: dict[str, list[str]] = {}
    for name, partner in pairs:
        partners.setdefault(name, []).append(partner)
    stated: dict[str, Partner] = {
        name: found[0] if len(found) == 1 else found for name, found in partners.items()
    }
    stored = {
        "format_version": FORMAT_VERSION,
        **notes,
        "pairs": stated | dict.fromkeys(left_out),
    }
    try:
        with Path(path).open("x", encoding="utf-8") as file:
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
            raise _another_kind(pairs) from error
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
            f"no tensor of the {side} begins with {unused[0]!r}; its names are such as "
            f"{names[0] if names else 'none'}"
        )
    return stated


def _another_kind(mapping: object) -> TypeError:
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


def _once(items: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(items)
    if len(names) != len(items):
        seen: set[str] = set()
        twice = next(name for name, _ in items if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is named twice")
    return names


def parse_mapping(text: str | None) -> str | list[tuple[str, str]] | None:
    """Return prefix pairs, written first:second and parted by commas, or the path of a map file."""
    if text is None or ":" not in text or Path(text).exists():
        return text
    pairs = [pair.partition(":") for pair in text.split(",")]
    return [(first, second) for first, _, second in pairs]
