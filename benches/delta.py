"""Time Δ and its statistics on a synthetic pair, beside two PyTorch rivals, as whole processes.

    python benches/delta.py [--layers 24] [--repeats 5] [--directory DIR] [--out results.md]

The pair has the names and shapes of Qwen2.5-0.5B in bfloat16 (seeded random values), saved as one
shard each. Rivals, in turn in the same run: *plain* opens both files with safetensors and subtracts
tensor by tensor in float32; *tuned* maps both files, widens in place, reuses buffers and reduces in
chunks. Control: read both files and XOR them (numpy, one thread per file half). The page cache is
warm. Results are checked against float64 before anything is timed, and a debug build is refused.
Ratios within one run are what to quote.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RIVALS = Path(__file__).with_name("rivals.py")


def shapes(layers: int, hidden: int = 896, inner: int = 4864, keys: int = 128) -> dict:
    """Return the backbone's tensors: name after the prefix → shape."""
    found = {"embed_tokens.weight": (151_936, hidden), "norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"layers.{layer}."
        for name, width in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
            found[f"{prefix}self_attn.{name}.weight"] = (width, hidden)
            found[f"{prefix}self_attn.{name}.bias"] = (width,)
        found[f"{prefix}self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{prefix}mlp.gate_proj.weight"] = (inner, hidden)
        found[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        found[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
    return found


def make_pair(directory: Path, layers: int) -> tuple[Path, Path]:
    """Write the pair once; it is kept for the next run."""
    import torch
    from safetensors.torch import save_file

    paths = []
    for seed, (model, prefix) in enumerate(
        (("text", "model."), ("multimodal", "model.language_model."))
    ):
        path = directory / f"{model}-{layers}" / "model.safetensors"
        paths.append(path.parent)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
        tensors = {}
        for name, shape in shapes(layers).items():
            base = torch.randn(shape, generator=common) * 0.02
            change = torch.randn(shape, generator=own) * 0.002
            tensors[prefix + name] = (base + change).to(torch.bfloat16)
        save_file(tensors, path)
    return paths[0], paths[1]


def run(command: list[str]) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and peak resident megabytes of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{command} failed")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def check(text: Path, multimodal: Path) -> float:
    """Compare norms and cosines with float64 and return the largest error."""
    from safetensors import safe_open

    import drift_fast

    stats = drift_fast.inspect(text, multimodal, modules="all", rows="index").stats
    worst = 0.0
    with (
        safe_open(text / "model.safetensors", "pt") as a,
        safe_open(multimodal / "model.safetensors", "pt") as b,
    ):
        for row in stats:
            left = a.get_tensor(row.name.replace("model.language_model.", "model.")).double()
            right = b.get_tensor(row.name).double()
            exact = math.sqrt(float(((left - right) ** 2).sum()))
            worst = max(worst, abs(row.delta_norm - exact) / exact)
            dot = float((left * right).sum() / left.norm() / right.norm())
            worst = max(worst, abs(row.cosine - dot))
    assert worst < 1e-6, f"statistics are off by {worst}"
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()) / "drift-fast"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    from drift_fast import _core

    if _core.debug_build:
        raise SystemExit("this is a debug build; timings of it mean nothing: make .venv/built")
    if options.prepare:
        text, multimodal = make_pair(options.directory, options.layers)
        print(text, multimodal, check(text, multimodal), sep="\n")
        return
    # In a process of its own: a child's peak memory starts at what its parent held at the fork.
    prepared = subprocess.run(
        [sys.executable, *sys.argv, "--prepare"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    text, multimodal, error = Path(prepared[-3]), Path(prepared[-2]), float(prepared[-1])
    nbytes = sum((p / "model.safetensors").stat().st_size for p in (text, multimodal))
    python, out = sys.executable, options.directory / "out"
    ours = [python, "-m", "drift_fast"]
    rival = [python, str(RIVALS)]
    pair, every = [str(text), str(multimodal)], ["--modules", "all", "--rows", "index"]
    commands = {
        "control: read both files and XOR": [*rival, "xor", *pair],
        "statistics, drift-fast inspect": [*ours, "inspect", *pair, *every],
        "statistics, drift-fast inspect --reader mmap": [
            *ours,
            "inspect",
            *pair,
            *every,
            "--reader",
            "mmap",
        ],
        "statistics, tuned PyTorch": [*rival, "tuned", *pair],
        "statistics, plain safe_open + PyTorch": [*rival, "plain", *pair],
        "Δ written, drift-fast delta": [*ours, "delta", *pair, *every, "--out", str(out)],
        "Δ written, plain safe_open + PyTorch": [*rival, "plain", *pair, "--out", str(out)],
    }
    figures: dict[str, list[tuple[float, float, float]]] = {label: [] for label in commands}
    for repeat in range(options.repeats + 1):
        for label, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            figure = run(command)
            if repeat:  # the first round warms the page cache
                figures[label].append(figure)
    shutil.rmtree(out, ignore_errors=True)

    base = statistics.median(wall for wall, _, _ in figures["statistics, drift-fast inspect"])
    lines = [
        f"# Δ and statistics of a pair of 2 × {nbytes / 2e9:.2f} GB in bfloat16, warm page cache",
        "",
        f"`python benches/delta.py --layers {options.layers} --repeats {options.repeats}`, "
        f"{time.strftime('%Y-%m')}, {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, drift_fast {_core.__version__}. Whole processes, "
        f"median (min to max) of {options.repeats}; largest error against float64 {error:.1e}.",
        "",
        "| | wall s | against inspect | CPU s | peak RSS MB |",
        "|---|---|---|---|---|",
    ]
    for label, rows in figures.items():
        wall, cpu, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        low, high = min(r[0] for r in rows), max(r[0] for r in rows)
        lines.append(
            f"| {label} | {wall:.2f} ({low:.2f} to {high:.2f}) | {wall / base:.1f}× | {cpu:.2f} | "
            f"{peak:,.0f} |"
        )
    lines += [
        "",
        "Resident memory counts pages of the mapped files that the kernel has not taken back yet.",
    ]
    table = "\n".join(lines)
    print(table)
    if options.out:
        options.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
