"""The command `drift-fast push`."""

from __future__ import annotations

import argparse

from drift_fast.cli.output import next_step
from drift_fast.delta.delta import Delta
from drift_fast.delta.sharing import MESSAGE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Put a delta on the Hugging Face Hub, with a model card that has its sources, their "
        "licenses and its statistics. The token is that of `hf auth login` or HF_TOKEN."
    )
    parser.add_argument("delta", help="directory, Hub id or URL of a delta")
    parser.add_argument("repo", metavar="ORG/NAME", help="Hub id; created if it is not there")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="who sees a new repository; as its owner's settings have it by default",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch, created if it is not there")
    parser.add_argument("--message", default=MESSAGE, help=f"of the commit (default {MESSAGE})")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Push and report."""
    url = Delta.open(given.delta).push_to_hub(
        given.repo,
        private=given.private,
        revision=given.revision,
        commit_message=given.message,
    )
    print(f"pushed to {url}")
    place = given.repo if given.revision is None else f"{given.repo}@{given.revision}"
    next_step(f'drift_fast.attach(trainer, "{place}"), before trainer.train()')
    return 0
