"""The command `drift-fast plan`.

Exit status: 0 planned, with or without warnings; 1 refused, or the run does not fit into the memory
that was given; 2 an invalid option.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from drift_fast.cli.options import add_json, add_options, given_flags, words_for
from drift_fast.cli.output import next_step, print_json, show
from drift_fast.planner.options import PlanOptions
from drift_fast.planner.planning import plan

# What `setup` takes of a plan.
_FOR_SETUP = ("modules", "layers", "delta", "lora_rank", "learning_rate", "gpu_memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Estimate what Δ and a training run with it will take, and how far the run will move. "
        "Every figure says where it comes from. A directory with a config.json is enough."
    )
    parser.add_argument("reasoning", help="text-only reasoning checkpoint, or its config.json")
    parser.add_argument("multimodal", help="multimodal checkpoint, or its config.json")
    add_json(parser)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a training configuration in YAML or JSON, with the names of the Trainer, of "
        "LLaMA-Factory or of the flags below; flags override it",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="teraflops of one GPU; by default those of an H100 in bfloat16 (989.4)",
    )
    add_options(parser, PlanOptions)
    parser.set_defaults(run=run, value_error_status=2)


def run(given: argparse.Namespace) -> int:
    """Plan and report."""
    options = given_flags(given, PlanOptions)
    if given.peak_tflops is not None:
        options["peak"] = given.peak_tflops * 1e12
    found = plan(given.reasoning, given.multimodal, config=given.config, **options)
    if given.json:
        print_json(found.to_dict())
    else:
        show(*found.blocks(), spelled=given.spelled)
        if found.fits is not False:
            words = ["drift-fast", "setup", "trainer", given.reasoning, given.multimodal]
            words += words_for(found.run, _FOR_SETUP)
            next_step(shlex.join([*words, "--out", "run"]))
    return 1 if found.fits is False else 0
