"""A message written for Python names the flags of the command that prints it."""

from __future__ import annotations

import argparse

import pytest

from drift_fast.cli.flags import as_flags, flags_of

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--rows")
PARSER.add_argument("--max-shard-size")
PARSER.add_argument("--strict", action=argparse.BooleanOptionalAction)
PARSER.add_argument("--overwrite", action=argparse.BooleanOptionalAction)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ('or pass rows="index" if', "or pass --rows index if"),
        ("with strict=False, it", "with --no-strict, it"),
        ("pass overwrite=True (--overwrite) to", "pass --overwrite to"),
        ("needs max_shard_size=…", "needs --max-shard-size …"),
        ("attach with residency='host'", "attach with residency='host'"),
        ("θ=10,000 and rows = 3", "θ=10,000 and rows = 3"),
    ],
)
def test_options_become_flags(written: str, shown: str) -> None:
    assert as_flags(written, flags_of(PARSER)) == shown


def test_without_a_command_nothing_changes() -> None:
    assert as_flags('rows="index"', flags_of(None)) == 'rows="index"'
