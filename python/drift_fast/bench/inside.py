"""One pass after another in one process, with imports and buffers ready.

    python -m drift_fast.bench.inside WHAT REASONING MULTIMODAL --threads N [--way W] [--out DIR]

For each line on standard input it does one pass and prints its seconds as JSON. They include
opening the files, matching and checking, but neither imports nor removing what was written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

WHATS = ("ours", "xor", "tuned", "lean")


def prepare(
    what: str, reasoning: Path, multimodal: Path, *, threads: int, way: str, out: Path | None
) -> Callable[[], object]:
    """Import what a pass needs, allocate and touch its buffers, and return it as a function."""
    if what == "xor":
        from drift_fast.bench.controls import Xor

        return Xor(reasoning, multimodal, threads=threads, way=way, out=out).run
    if what in ("tuned", "lean"):
        from drift_fast.bench.rivals import Tuned

        measure = what == "tuned"
        return Tuned(reasoning, multimodal, threads=threads, out=out, measure=measure).run
    from drift_fast.delta.compute import compute_delta, inspect

    if out is None:
        return lambda: inspect(reasoning, multimodal, modules="all", rows="index", threads=threads)
    return lambda: compute_delta(
        reasoning, multimodal, out, modules="all", rows="index", threads=threads
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=WHATS)
    parser.add_argument("reasoning", type=Path)
    parser.add_argument("multimodal", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--way", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    one_pass = prepare(
        options.what,
        options.reasoning,
        options.multimodal,
        threads=options.threads,
        way=options.way,
        out=options.out,
    )
    for _ in sys.stdin:
        cpu, start = time.process_time(), time.perf_counter()
        one_pass()
        found = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        if options.out is not None:
            shutil.rmtree(options.out)
        json.dump(found, sys.stdout)
        sys.stdout.write("\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
