"""Write docs/parity.md: how far each training stack is from the float64 gradient, measured here.

Owns the table only; the problem, the stacks and their tolerances are those of tests/parity.
`python docs/make_parity.py` fills every cell and writes; it fails when a cell is beyond its row's
tolerance or has no number. `--only PATTERN` measures the rows that match and prints them instead.
"""

from __future__ import annotations

import argparse
import logging
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE / "parity.md"
sys.path.insert(0, str(HERE.parent / "tests"))

from parity.run import Result, build_worlds, entries, measure  # noqa: E402
from parity.stacks import INT8_LEAST, STACKS, Stack  # noqa: E402
from parity.world import ACCUMULATIONS, LENGTH, NONE, SCALES, SEQUENCES  # noqa: E402

logger = logging.getLogger("parity")

PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft", "lightning", "deepspeed")
ABOUT = """# Parity

What `python docs/make_parity.py` found with {versions}, on the CPU with gloo.

A tiny Qwen2 in float32 takes one optimizer step on {sequences} sequences of {length} tokens, from
each stack's own entry point: plain SGD, so that the weights afterwards tell the gradient that the
optimizer was given. Expected is the gradient of the whole batch, by one process in float64,
injected in float64 parameter by parameter. A cell is the largest relative error, ‖found −
expected‖ / ‖expected‖, of any trained parameter, those outside the delta included.
×{accumulations} is the number of micro-batches that a process accumulates; the batch is the same.
*{none}* trains without an injection: what is left there is the stack's own rounding.

{table}

*Uneven shards*: the model's width and that of its feed-forward are odd, and the last of four
processes holds nothing of the keys' biases. *From its own gradient*: the row above it computes in
bfloat16, so its distance from float64 is that of bfloat16; here the injection alone is restated in
float64, from the gradient of a run without one. DeepSpeed holds bfloat16 gradients, and so rounds
the injected one. *LoRA*: the gradients of the factors, with the
delta pulled back to them. *Large tensors*, and the rows of
residency: a model whose weights are not among the small tensors, which stay beside the gradients
whatever is asked for; int8 must be off by at least {int8:.0e}, and both int8 and disk must be read
within the step. There is no row for pinned host memory, which on the CPU is the device's, and
*CPU offload* moves nothing there either: it shows that the policy is accepted, no more.
Accelerate, Trainer and Lightning keep FSDP for accelerators, Lightning DeepSpeed too; that rule is
lifted for their rows. Lightning 2.6 and DeepSpeed both divide the loss by the number of
micro-batches, which the rows of DeepSpeedStrategy take back.
"""


def cell(result: Result) -> str:
    if result.error is None:
        return "**fails**"
    text = f"{result.error:.0e}"
    return text if result.passed else f"**{text}**"


def row(stack: Stack, results: Sequence[Result]) -> list[str]:
    """Return a row's name, tolerance and cells, a dash where nothing is measured."""
    by_place = {(r.entry.scale, r.entry.accumulation): cell(r) for r in results}
    places = [(scale, count) for scale in (NONE, *SCALES) for count in ACCUMULATIONS]
    return [stack.name, f"{stack.tolerance:.0e}", *(by_place.get(place, "–") for place in places)]


def table(rows: Sequence[Sequence[str]]) -> str:
    header = ["stack", "tolerance"]
    header += [f"{scale} ×{count}" for scale in (NONE, *SCALES) for count in ACCUMULATIONS]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def failures(results: Sequence[Result]) -> Iterator[str]:
    """Yield one line for each reason of a row for not having passed."""
    reasons: dict[tuple[str, str], int] = {}
    for result in results:
        if not result.passed:
            key = result.entry.stack, result.fault
            reasons[key] = reasons.get(key, 0) + 1
    for (stack, reason), count in reasons.items():
        text = reason.replace("|", "\\|")
        yield f"* {stack}, {count} cell{'s' if count > 1 else ''}: {text}"


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package).partition('+')[0]}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def write(rows: Sequence[Sequence[str]], results: Sequence[Result]) -> None:
    text = ABOUT.format(
        versions=versions(),
        sequences=SEQUENCES,
        length=LENGTH,
        accumulations=" or ×".join(map(str, ACCUMULATIONS)),
        none=NONE,
        int8=INT8_LEAST,
        table=table(rows),
    )
    failed = list(failures(results))
    if failed:
        text += "\n## What fails\n\n" + "\n".join(failed) + "\n"
    TABLE.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", metavar="PATTERN", help="a regular expression; prints, not writes"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    chosen = [s for s in STACKS if arguments.only is None or re.search(arguments.only, s.name)]
    if not chosen:
        parser.error(f"no stack matches {arguments.only}")
    results: list[Result] = []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        worlds = build_worlds(Path(folder), chosen)
        for stack in chosen:
            # Processes of its own for each row: one that hangs takes no other with it.
            found = measure(entries(stack), worlds)
            results += found
            rows.append(row(stack, found))
            failed = [result for result in found if not result.passed]
            logger.info("%s: %d of %d cells", stack.name, len(found) - len(failed), len(found))
            for result in failed:
                logger.info("  %s", result)
            for output in dict.fromkeys(result.output for result in failed):
                logger.info("%s", output)
    if arguments.only is None:
        write(rows, results)
    else:
        sys.stdout.write(table(rows) + "\n")
    return int(not all(result.passed for result in results))


if __name__ == "__main__":
    sys.exit(main())
