"""One fact of a model: a value, and where it comes from. Nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from drift_fast.config_files import printable

STATED = ""
NOT_STATED = "not stated"
HEADERS = "from the headers"
DEFAULT = "default"
NAMES = "in the names"

Value = int | float | str | bool | list[int] | Mapping[str, object] | None


@dataclass(frozen=True)
class Fact:
    """A value and where it comes from; None where it is stated as none or not stated."""

    value: Value = None
    origin: str = NOT_STATED

    @property
    def known(self) -> bool:
        """Whether there is a value to compare, "none" included."""
        return self.origin != NOT_STATED

    def __str__(self) -> str:
        if not self.known:
            return NOT_STATED
        return shown(self.value) + (f" ({self.origin})" if self.origin else "")


def fact(stated: Value, from_headers: int | None = None) -> Fact:
    """Return a fact that is stated, or else read off the headers, or else unknown."""
    if stated is not None:
        return Fact(stated, STATED)
    return Fact() if from_headers is None else Fact(from_headers, HEADERS)


def shown(value: object) -> str:
    """Return a value as the table shows it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{int(value):,}" if value == int(value) else repr(value)
    if isinstance(value, list):
        return printable("[" + ", ".join(map(shown, value[:8])) + "]", 48)
    if isinstance(value, dict):
        if "rope_type" in value:
            rest = [f"{key} {shown(item)}" for key, item in value.items() if key != "rope_type"]
            return printable(", ".join([str(value["rope_type"]), *rest]), 120)
        return printable("; ".join(f"{key} {shown(item)}" for key, item in value.items()), 120)
    return printable(str(value), 48)
