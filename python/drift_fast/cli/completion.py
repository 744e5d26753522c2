"""The command `drift-fast completion`: what a shell completes of all commands, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

_SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Print a script for a shell that completes commands, options, choices and files. For "
        'bash: eval "$(drift-fast completion bash)"'
    )
    parser.add_argument("shell", choices=_SHELLS, help="the shell to print the script for")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError("completion needs shtab: pip install 'drift-fast[completion]'") from error
    for action in _actions(given.parser):
        if not action.choices and action.nargs != 0:
            # Checkpoints, configurations and outputs are files and directories.
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(given.parser, given.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
