"""The command `drift-fast`: its parser, its errors and its exit status.

Results go to standard output, progress and messages to standard error. Exit status: 0 done,
1 refused or failed, 2 wrong usage, 130 interrupted, 141 if nobody reads on. Torch is imported only
by `demo` and `protect`, by `plan` for a model without weights or a cap beside a target, and for
pairs whose tensors are laid out differently.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import TextIO

from drift_fast import __version__
from drift_fast.cli.flags import as_flags, flags_of
from drift_fast.cli.output import remark
from drift_fast.errors import DriftError, DriftWarning

# Each is a module of this folder, loaded when its command is given.
_COMMANDS = {
    "delta": "compute reasoning − multimodal and write it",
    "inspect": "measure norms and cosines between two checkpoints; writes nothing",
    "align": "show which tensor of one checkpoint matches which of the other, and how surely",
    "check": "say whether two models fit and what Δ will cost; of weights it reads samples at most",
    "merge": "merge a reasoning model into a multimodal one and write the result",
    "protect": "take gradients on samples of what must be kept out of a delta",
    "push": "put a delta on the Hugging Face Hub, with a model card",
    "report": "write a page to look at: of a delta, a pair, a merge or training runs",
    "plan": "estimate memory, disk, hours and λ of a training run; reads no weights",
    "setup": "print or write a ready configuration of a training stack for a model pair",
    "demo": "run all steps on two tiny trained models: delta, fine-tuning, comparison, pictures",
    "bench": "time statistics and Δ of a synthetic pair, beside rivals and the machine's limit",
    "completion": "print a script with which bash, zsh or fish completes commands and options",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser, command = _parser(arguments)
    given = parser.parse_args(arguments)
    given.arguments = arguments
    flags = flags_of(command)
    if given.advice_for is not None:
        other = argparse.ArgumentParser()
        import_module(f"drift_fast.cli.{given.advice_for}").add_arguments(other)
        flags = flags_of(other, f" of drift-fast {given.advice_for}") | flags
    spelled = given.spelled = partial(as_flags, flags=flags)
    warnings.showwarning = partial(_show_warning, spelled)
    for stream in (sys.stdout, sys.stderr):
        # A name or symbol that the terminal cannot show must not make the command fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = int(given.run(given))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever reads has enough, as `head` has; nothing more is written, at the exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        remark("interrupted; nothing was left behind")
        return 130
    except (DriftError, OSError, ImportError, MemoryError) as error:
        remark(spelled(_message(error)))
        return 1
    except ValueError as error:
        remark(spelled(_message(error)))
        return int(given.value_error_status)


def _parser(
    arguments: Sequence[str],
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    """Return the parser, and that of the command that `arguments` name.

    It alone is filled, unless a shell is to complete all of them.
    """
    parser = argparse.ArgumentParser(
        prog="drift-fast",
        description="Stream the reasoning delta between two checkpoints, and inject it.",
    )
    parser.add_argument("--version", action="version", version=f"drift-fast {__version__}")
    # `advice_for`: the command whose flags advice is for where this one has none.
    parser.set_defaults(value_error_status=1, parser=parser, advice_for=None)
    commands = parser.add_subparsers(required=True, metavar="command")
    named = next((each for each in arguments if not each.startswith("-")), None)
    chosen = None
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if named in (name, "completion"):
            import_module(f"drift_fast.cli.{name}").add_arguments(command)
        if name == named:
            chosen = command
    return parser, chosen


def _show_warning(
    spelled: Callable[[str], str],
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    label = "warning" if issubclass(category, DriftWarning) else category.__name__
    remark(f"{label}: {spelled(str(message))}")


def _message(error: Exception) -> str:
    # str(OSError) would show the error's number too.
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if not error.filename else f"{error.filename}: {error.strerror}"
    return str(error)
