"""Options in a message as flags of the command: `rows="index"` becomes `--rows index`.

Messages are written for Python, where they are read too. What the command has no flag for, such as
an argument of `attach`, stays as it is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

_OPTION = re.compile(
    r"""\b(?P<name>[a-z]\w*)=(?P<value>"[^"]*"|'[^']*'|\w[\w.]*|…)(?:\ \(--[\w-]+\))?"""
)


def flags_of(parser: argparse.ArgumentParser | None) -> dict[str, argparse.Action]:
    """Return the flags of a command by the name of the option."""
    actions = [] if parser is None else parser._actions
    return {action.dest: action for action in actions if action.option_strings}


def as_flags(text: str, flags: Mapping[str, argparse.Action]) -> str:
    """Return a message with options spelled as the flags of a command."""

    def spelled(found: re.Match[str]) -> str:
        action, value = flags.get(found["name"]), found["value"]
        if action is None:
            return found[0]
        flag = f"--{found['name'].replace('_', '-')}"
        if isinstance(action, argparse.BooleanOptionalAction):
            return {"True": flag, "False": flag.replace("--", "--no-", 1)}.get(value, found[0])
        return f"{flag} {value.strip(chr(34) + chr(39))}"

    return _OPTION.sub(spelled, text)
