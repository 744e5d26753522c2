"""Time every merge method beside mergekit, as whole processes.

    python benches/merging.py [--size 1.5B] [--repeats 3] [--directory DIR] [--out results.md]

The pair is that of `drift-fast bench`. Each row takes its turn in every round, after a round that
only warms the page cache; what a command wrote is removed outside the clock. mergekit matches by
name, so it gets the multimodal weights with the text model's names, and they are its base model
where a method needs one: the same task vector, R − M, as ours without a base. Ours flushes what it
writes, mergekit does not. The suite (`--only merge`) compares a linear merge with float64 bit for
bit, the tests every method. CPU seconds say more than wall seconds on a machine that others use
too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from drift_fast.bench import commands, hardware, page_cache
from drift_fast.bench.pair import SIZES, Pair, make_pair
from drift_fast.bench.session import refuse_debug_build

WEIGHT = "0.3141592653"
OURS = {
    "linear": ("--weight", WEIGHT),
    "task_arithmetic": ("--weight", WEIGHT),
    "ties, density 0.2": ("--weight", WEIGHT, "--density", "0.2"),
    "ties, density 0.5": ("--weight", WEIGHT, "--density", "0.5"),
    "dare_linear, density 0.5": ("--weight", WEIGHT, "--density", "0.5"),
    "dare_ties, density 0.5": ("--weight", WEIGHT, "--density", "0.5"),
    "slerp": ("--weight", WEIGHT),
    "layer_swap": (),
}
# mergekit has no layer swap of two models but by slices, whose embedding and head it leaves out.
RIVALS = (*list(OURS)[:3], *list(OURS)[4:7])


def configuration(label: str, pair: Pair) -> str:
    """Return mergekit's configuration, which is JSON and so YAML."""
    method, _, density = label.partition(", density ")
    text, base = {"model": str(pair.reasoning)}, {"model": str(pair.renamed)}
    weights = {"weight": float(WEIGHT)} | ({"density": float(density)} if density else {})
    found = {"merge_method": method, "dtype": "float32", "out_dtype": "bfloat16"}
    if method == "linear":
        other = {**base, "parameters": {"weight": 1 - float(WEIGHT)}}
        models = [{**text, "parameters": weights}, other]
        return json.dumps({**found, "models": models, "parameters": {"normalize": False}})
    found["base_model"] = base["model"]
    if method == "slerp":
        return json.dumps({**found, "models": [base, text], "parameters": {"t": float(WEIGHT)}})
    models = [{**text, "parameters": weights}]
    return json.dumps({**found, "models": models, "parameters": {"normalize": False}})


def all_commands(
    pair: Pair, work: Path, threads: int, mergekit: str | None
) -> dict[str, list[str]]:
    """Return the command of every row."""
    out = str(work / "out")
    found = {}
    for label, options in OURS.items():
        command = [sys.executable, "-m", "drift_fast", "merge", label.partition(",")[0]]
        command += [str(pair.reasoning), str(pair.multimodal), "--rows", "index", "--out", out]
        if label == "layer_swap":
            command += ["--keep-layers", str(min(5, pair.layers - 1))]
        found[f"**{label}**"] = [*command, "--threads", str(threads), *options]
    for number, label in enumerate(RIVALS if mergekit else ()):
        path = work / f"{number}.yaml"
        path.write_text(configuration(label, pair))
        command = [str(mergekit), str(path), out, "--lazy-unpickle", "--quiet"]
        command += ["--no-copy-tokenizer", "--no-write-model-card"]
        found[f"mergekit, {label}"] = [*command, "--num-threads", str(threads)]
    return found


def run(command: list[str], threads: int, out: Path) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and peak resident megabytes of a process."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=commands.environment(threads),
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status != 0:
            errors.seek(0)
            raise SystemExit(f"{command} failed:\n{errors.read().decode()[-2000:]}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1.5B")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=hardware.cores())
    parser.add_argument("--mergekit", default=commands.mergekit(), help="its command, if elsewhere")
    default = Path(tempfile.gettempdir()) / "drift-fast"
    parser.add_argument("--directory", type=Path, default=default)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    refuse_debug_build()
    has_rival = options.mergekit is not None
    pair = make_pair(options.directory, options.size, renamed=has_rival, outputs=1)
    page_cache.warm([*pair.files, *(pair.renamed.glob("*.safetensors") if pair.renamed else ())])
    work = Path(tempfile.mkdtemp(prefix="work-", dir=options.directory))
    figures: dict[str, list[tuple[float, float, float]]] = {}
    try:
        rows = all_commands(pair, work, options.threads, options.mergekit)
        for repeat in range(options.repeats + 1):
            for label, command in rows.items():
                figure = run(command, options.threads, work / "out")
                print(f"round {repeat}, {label}: {figure[0]:.2f} s", file=sys.stderr)
                if repeat:
                    figures.setdefault(label, []).append(figure)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    table = report(pair, options, figures)
    print(table)
    if options.out:
        options.out.write_text(table + "\n")


def report(
    pair: Pair, options: argparse.Namespace, figures: dict[str, list[tuple[float, float, float]]]
) -> str:
    """Return the table; ratios are to our linear merge."""
    machine = hardware.describe(options.directory)
    versions = ", ".join(f"{name} {version}" for name, version in hardware.versions().items())
    lines = [
        f"# Merges of a pair of 2 × {pair.nbytes / 2e9:.2f} GB in bfloat16 ({pair.label}), "
        "warm page cache, whole processes",
        "",
        f"`python benches/merging.py --size {options.size} --repeats {options.repeats}`, "
        f"{time.strftime('%Y-%m-%d')}. {machine['processor']}, {options.threads} threads of "
        f"{machine['cores']} cores, {machine['system']}, {machine['file_system']}; {versions}. "
        f"Median (min to max) of {options.repeats}; rows ran in turn.",
        "",
        "| | wall s | against linear | CPU s | against linear | peak RSS MB |",
        "|---|---|---|---|---|---|",
    ]
    medians = {
        label: [statistics.median(column) for column in zip(*rows, strict=True)]
        for label, rows in figures.items()
    }
    base = medians["**linear**"]
    for label, (wall, cpu, peak) in medians.items():
        walls = [row[0] for row in figures[label]]
        lines.append(
            f"| {label} | {wall:.2f} ({min(walls):.2f} to {max(walls):.2f}) | "
            f"{wall / base[0]:.1f}× | {cpu:.2f} | {cpu / base[1]:.1f}× | {peak:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
