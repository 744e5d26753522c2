"""A saved state, read back from a file of unknown origin.

Owns the checks of single fields: each is what it should be, or refused with its path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drift_fast.errors import DriftError

# Whatever a state holds fits a float32, and an int a float64, exactly.
_LARGEST, _LARGEST_INT = 1e30, 2**53


INJECTION_VERSION = 1


def stored_origin(state: Any, names: Sequence[str]) -> dict[str, float]:
    """Return ⟨θ_0, Δ⟩ by target from an injection's state.

    Raises:
        DriftError: not such a state, or one of other targets.
    """
    remedy = "resume from what state_dict() gave, with the same model, delta, modules and layers"
    if not isinstance(state, Mapping) or state.get("version") != INJECTION_VERSION:
        raise DriftError(f"not the state of an injection of this version: {remedy}")
    origin = state.get("origin")
    if not isinstance(origin, Mapping) or not isinstance(state.get("control"), Mapping):
        raise DriftError(f"the state of an injection is incomplete: {remedy}")
    odd = sorted(map(str, origin.keys() ^ set(names)))
    if odd:
        raise DriftError(
            f"the saved injection and this one differ in {len(odd)} targets, {odd[0]} first: "
            f"{remedy}"
        )
    if not all(is_number(value) for value in origin.values()):
        raise DriftError(f"the saved injection holds a value that is not a finite number: {remedy}")
    return {name: float(value) for name, value in origin.items()}


class Saved:
    """A state of unknown origin, whose fields are what they should be or are refused."""

    def __init__(self, state: Any, path: str = "") -> None:
        if not isinstance(state, Mapping):
            raise DriftError(
                f"expected a control's state as a dictionary, got {type(state).__name__}; pass "
                "what state_dict() returned"
            )
        self._state = state
        self._path = path

    def refuse(self, key: str, expected: str, found: Any) -> DriftError:
        """Return the error of one field."""
        return DriftError(
            f"a control's state is damaged: {self._path}{key} must be {expected}, got "
            f"{shown(found)}; resume from another checkpoint, or start without it"
        )

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Return a dictionary."""
        value = self._get(key)
        if not isinstance(value, Mapping):
            raise self.refuse(key, "a dictionary", value)
        return value

    def child(self, key: str) -> Saved | None:
        """Return a state inside this one, None where there is none."""
        if not self.has(key):
            return None
        return Saved(self.mapping(key), f"{self._path}{key}.")

    def integer(self, key: str) -> int:
        """Return a count."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_INT:
            raise self.refuse(key, "an integer from 0", value)
        return value

    def strings(self, key: str) -> list[str]:
        """Return a list of text."""
        value = self._get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refuse(key, "a list of text", value)
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        """Return finite numbers."""
        value = self._get(key)
        right = isinstance(value, list) and len(value) == count
        if not right or not all(is_number(item) for item in value):
            raise self.refuse(key, f"{count} finite numbers", value)
        return [float(item) for item in value]

    def flags(self, key: str, count: int) -> list[bool] | None:
        """Return truth values, None where there are none."""
        value = self._get(key)
        if value is None:
            return None
        right = isinstance(value, list) and len(value) == count
        if not right or not all(isinstance(item, bool) for item in value):
            raise self.refuse(key, f"{count} of true and false", value)
        return list(value)

    def has(self, key: str) -> bool:
        """Tell whether a field that must be there is not None."""
        return self._get(key) is not None

    def _get(self, key: str) -> Any:
        if key not in self._state:
            raise self.refuse(key, "there", None)
        return self._state[key]


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number of a size that a state may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _LARGEST


def shown(value: Any) -> str:
    """Return a value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def first_difference(left: Sequence[str], right: Sequence[str]) -> str:
    """Return where two lists first differ, for a message; empty where one goes on."""
    pairs = enumerate(zip(left, right, strict=False))
    found = next(((at, a, b) for at, (a, b) in pairs if a != b), None)
    return "" if found is None else f" at {found[0]}: {shown(found[1])} and {shown(found[2])}"
