"""The command `drift-fast check`."""

from __future__ import annotations

import argparse
import shlex

from drift_fast.alignment.options import SelectionOptions
from drift_fast.cli.options import SOURCE, add_config, add_json, add_options, from_flags, words_for
from drift_fast.cli.output import next_step, print_json, show
from drift_fast.preflight.check import Preflight, check
from drift_fast.preflight.options import CheckOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Compare the configurations and headers of two models, and samples of their weights where "
        "both are on this machine or --base is given. With MODEL, the first two are an expert and "
        "its reference, and their Δ is meant for MODEL. Exit status: 0 they fit, with "
        "or without notes; 1 something breaks the method; 2 wrong usage."
    )
    parser.add_argument("reasoning", help=f"text-only reasoning checkpoint, or expert: {SOURCE}")
    parser.add_argument("multimodal", help="multimodal checkpoint, or reference")
    parser.add_argument("model", nargs="?", help="third model, for a Δ of two text models")
    add_json(parser)
    add_config(parser)
    add_options(parser, CheckOptions)
    # Status 1 means that the models do not fit.
    parser.set_defaults(run=run, value_error_status=2, advice_for="delta")


def run(given: argparse.Namespace) -> int:
    """Compare and report."""
    options = from_flags(given, CheckOptions, "check")
    report = check(given.reasoning, given.multimodal, given.model, **options.to_dict())
    if given.json:
        print_json(report.to_dict())
    else:
        show(*report.blocks(), spelled=given.spelled)
        if report.ok and (report.lineage is None or report.lineage.subtract):
            next_step(*_next_commands(given, options, report))
        elif any(each.subject == "alignment" and each.message for each in report.findings):
            words = ["drift-fast", "align", given.reasoning, given.multimodal]
            next_step(f"{shlex.join(words)}, to see which tensors fit")
    return 0 if report.ok else 1


def _next_commands(
    given: argparse.Namespace, options: CheckOptions, report: Preflight
) -> list[str]:
    """Return the command that computes the Δ to take, and the one that would choose it."""
    lineage = report.lineage
    from_base = lineage is not None and lineage.subtract == "base"
    second = str(options.base) if from_base else given.multimodal
    # A mapping is between the names of the first two.
    names = [name for name in SelectionOptions.names() if name != "mapping" or not from_base]
    chosen = words_for(options, names)
    delta = ["drift-fast", "delta", given.reasoning, second, *chosen, "--out", "delta"]
    commands = [shlex.join(delta)]
    if lineage is None and given.model is None:
        again = ["drift-fast", "check", given.reasoning, given.multimodal, *chosen, "--base"]
        commands.insert(
            0,
            f"{shlex.join(again)} TEXT_BASE, if you know the text model that both come from: "
            "it may be the one to subtract",
        )
    return commands
