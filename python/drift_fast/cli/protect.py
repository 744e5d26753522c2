"""The command `drift-fast protect`."""

from __future__ import annotations

import argparse
from pathlib import Path

from drift_fast.cli.options import add_config, add_json, add_options, from_flags
from drift_fast.cli.output import next_step, print_json, remark, show
from drift_fast.errors import DriftError
from drift_fast.protection.options import ProtectOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Take out of Δ, tensor by tensor, the span of gradients on samples of what must be kept. "
        "The model is loaded by transformers; each sample is a batch. docs/protect.md has the "
        "form of SAMPLES."
    )
    parser.add_argument("model", help="the model that Δ is for, with its processor or tokenizer")
    parser.add_argument("delta", help="directory, Hub id or URL of a delta")
    parser.add_argument("samples", type=Path, help="JSON or JSON lines with texts or conversations")
    parser.add_argument("--out", "-o", required=True, type=Path, help="directory to write")
    parser.add_argument("--device", help="where the model computes; a GPU if there is one")
    add_json(parser)
    add_config(parser)
    add_options(parser, ProtectOptions)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Measure, write and report."""
    options = from_flags(given, ProtectOptions, "protect")
    # Loaded here, since they need torch.
    from drift_fast.protection.protect import protect
    from drift_fast.protection.samples import Samples, load

    samples = Samples(given.samples)
    counts = {"sample": len(samples), "direction": options.directions}
    few, many = (f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items())
    if len(samples) < options.directions:
        raise DriftError(
            f"{given.samples}: {few} for {many}, and each direction is a sum of gradients of "
            f"other samples; add samples, or pass directions={len(samples)}"
        )
    model, samples.processor = load(given.model, given.device)
    remark(f"gradients on {few} in {many}")
    delta = protect(model, given.delta, samples, given.out, **options.to_dict())
    said = delta.sources["protected"]
    if given.json:
        print_json({"out": str(given.out), "protected": said})
        return 0
    show(
        f"took {said['removed_share']:.3%} of ‖Δ‖² out of {len(said['removed_shares'])} tensors, "
        f"in the span of {said['directions']} gradients each; {said['zero_or_dependent']} "
        f"gradients were zero or dependent on others\nwritten to {given.out}"
    )
    next_step(f'drift_fast.attach(trainer, "{given.out}"), before trainer.train()')
    return 0
