"""Options in a message as flags of the command: `rows="index"` becomes `--rows index`.

Messages are written for Python, where they are read too. What no command has a flag for, such as
an argument of `attach`, stays as it is, and so do a call and what a line of a result begins with.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

_OPTION = re.compile(
    r"""\w\((?:[^()]|\([^()]*\))*\)"""
    r"""|(?m:(?!^))(?<![\w/])(?P<name>[a-z]\w*)=(?P<value>"[^"]*"|'[^']*'|\w+(?:\.\w+)*|…)"""
    r"""(?:\ \(--[\w-]+\))?"""
)


def flags_of(
    parser: argparse.ArgumentParser | None, of: str = ""
) -> dict[str, tuple[argparse.Action, str]]:
    """Return the flags of a command by the name of the option, each with `of`, said after it."""
    actions = [] if parser is None else parser._actions
    return {action.dest: (action, of) for action in actions if action.option_strings}


def as_flags(text: str, flags: Mapping[str, tuple[argparse.Action, str]]) -> str:
    """Return a message with options spelled as flags."""

    def spelled(found: re.Match[str]) -> str:
        value = found["value"]
        action, of = flags.get(found["name"], (None, ""))
        if action is None:
            return found[0]
        flag = f"--{found['name'].replace('_', '-')}"
        if isinstance(action, argparse.BooleanOptionalAction):
            spellings = {"True": flag, "False": flag.replace("--", "--no-", 1)}
            return f"{spellings[value]}{of}" if value in spellings else found[0]
        return f"{flag} {'none' if value == 'None' else value.strip(chr(34) + chr(39))}{of}"

    return _OPTION.sub(spelled, text)
