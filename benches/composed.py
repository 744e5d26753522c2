"""Time Δ between experts that one checkpoint stores apart and the other fused, as whole processes.

    python benches/composed.py [--layers 3] [--repeats 5] [--directory DIR] [--out results.md]

The experts have the shapes of a 30B mixture (hidden 2048, inner 768), 32 of them a layer, in
bfloat16 with seeded random values. The same weights are stored apart, fused, and fused and
transposed. The rival maps both files and, expert by expert, stacks or transposes and subtracts in
float32, as a script by hand would. Results are checked against each other before anything is timed,
and a debug build is refused. Ratios within one run are what to quote.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXPERTS, HIDDEN, INNER = 32, 2048, 768
FORMS = ("apart", "fused", "transposed")


def run(command: list[str]) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and peak resident megabytes of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{command} failed")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def make(directory: Path, layers: int) -> dict[str, dict[str, Path]]:
    """Write the text model and the multimodal one in every form, once."""
    import torch
    from safetensors.torch import save_file

    paths: dict[str, dict[str, Path]] = {}
    for seed, (model, prefix) in enumerate(
        (("text", "model."), ("multimodal", "model.language_model."))
    ):
        paths[model] = {form: directory / f"{model}-{form}-{layers}" for form in FORMS}
        if all((path / "model.safetensors").exists() for path in paths[model].values()):
            continue
        forms: dict[str, dict[str, torch.Tensor]] = {form: {} for form in FORMS}
        common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
        for layer in range(layers):
            at = f"{prefix}layers.{layer}.mlp.experts"
            parts = {}
            for name, shape in (
                ("gate", (INNER, HIDDEN)),
                ("up", (INNER, HIDDEN)),
                ("down", (HIDDEN, INNER)),
            ):
                shape = (EXPERTS, *shape)
                change = 0.002 * torch.randn(shape, generator=own)
                parts[name] = (0.02 * torch.randn(shape, generator=common) + change).bfloat16()
                for expert in range(EXPERTS):
                    key = f"{at}.{expert}.{name}_proj.weight"
                    forms["apart"][key] = parts[name][expert].clone()
            fused = {"gate_up_proj": torch.cat([parts["gate"], parts["up"]], 1)}
            fused["down_proj"] = parts["down"]
            for name, tensor in fused.items():
                forms["fused"][f"{at}.{name}"] = tensor
                forms["transposed"][f"{at}.{name}"] = tensor.mT.contiguous()
        for form, path in paths[model].items():
            path.mkdir(parents=True, exist_ok=True)
            save_file(forms[form], path / "model.safetensors")
    return paths


def check(paths: dict[str, dict[str, Path]]) -> None:
    """Every form of either side must give the same norms."""
    import drift_fast

    norms = {}
    for left in FORMS:
        stats = drift_fast.inspect(paths["text"][left], paths["multimodal"]["fused"]).stats
        norms[left] = [row.delta_norm for row in stats]
    for form in FORMS[1:]:
        pairs = zip(norms[FORMS[0]], norms[form], strict=True)
        assert all(abs(a - b) <= 1e-6 * a for a, b in pairs), form


def by_hand(text: Path, multimodal: Path, form: str) -> None:
    """What a script would do: join an expert's parts, turn them if need be, subtract in float32."""
    import torch
    from safetensors import safe_open

    with (
        safe_open(text / "model.safetensors", "pt") as a,
        safe_open(multimodal / "model.safetensors", "pt") as b,
    ):
        for name in b.keys():  # noqa: SIM118 - the file is no dictionary
            right = b.get_tensor(name)
            at = name.replace("model.language_model.", "model.").rpartition(".")[0]
            kinds = ("gate", "up") if "gate_up" in name else ("down",)
            total = 0.0
            for expert in range(EXPERTS):
                left = torch.cat([a.get_tensor(f"{at}.{expert}.{k}_proj.weight") for k in kinds])
                left = left.mT if form == "transposed" else left
                delta = left.float() - right[expert].float()
                total += float(delta.square().sum(dtype=torch.float64))
            print(name, total**0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()) / "drift-fast"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--by-hand", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.by_hand:
        by_hand(Path(options.by_hand[0]), Path(options.by_hand[1]), options.by_hand[2])
        return
    from drift_fast import _core

    if _core.debug_build:
        raise SystemExit("this is a debug build; timings of it mean nothing: make .venv/built")
    if options.prepare:
        check(make(options.directory, options.layers))
        return
    # In a process of its own: a child's peak memory starts at what its parent held at the fork.
    subprocess.run([sys.executable, *sys.argv, "--prepare"], check=True)
    paths = {
        model: {form: str(options.directory / f"{model}-{form}-{options.layers}") for form in FORMS}
        for model in ("text", "multimodal")
    }
    nbytes = sum(
        (Path(paths[model]["fused"]) / "model.safetensors").stat().st_size for model in paths
    )
    ours = [sys.executable, "-m", "drift_fast", "inspect"]
    rival = [sys.executable, __file__, "--by-hand"]
    text, multimodal = paths["text"], paths["multimodal"]
    commands = {
        "both fused": [*ours, text["fused"], multimodal["fused"]],
        "both apart": [*ours, text["apart"], multimodal["apart"]],
        "text apart, multimodal fused": [*ours, text["apart"], multimodal["fused"]],
        "text apart, multimodal fused and transposed": [
            *ours, text["apart"], multimodal["transposed"],
        ],
        "text fused and transposed, multimodal apart": [
            *ours, text["transposed"], multimodal["apart"],
        ],
        "PyTorch by hand, text apart, multimodal fused": [
            *rival, text["apart"], multimodal["fused"], "fused",
        ],
        "PyTorch by hand, text apart, multimodal fused and transposed": [
            *rival, text["apart"], multimodal["transposed"], "transposed",
        ],
    }  # fmt: skip
    figures: dict[str, list[tuple[float, float, float]]] = {label: [] for label in commands}
    for repeat in range(options.repeats + 1):
        for label, command in commands.items():
            figure = run(command)
            if repeat:  # the first round warms the page cache
                figures[label].append(figure)
    base = statistics.median(wall for wall, _, _ in figures["both fused"])
    lines = [
        f"# Statistics of experts stored apart and fused, 2 × {nbytes / 2e9:.2f} GB in bfloat16, "
        "warm page cache",
        "",
        f"`python benches/composed.py --layers {options.layers} --repeats {options.repeats}`, "
        f"{time.strftime('%Y-%m')}, {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, drift_fast {_core.__version__}. Whole processes, "
        f"median (min to max) of {options.repeats}.",
        "",
        "| | wall s | against both fused | peak RSS MB |",
        "|---|---|---|---|",
    ]
    for label, rows in figures.items():
        wall, _, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        low, high = min(r[0] for r in rows), max(r[0] for r in rows)
        lines.append(
            f"| {label} | {wall:.2f} ({low:.2f} to {high:.2f}) | {wall / base:.1f}× | {peak:,.0f} |"
        )
    table = "\n".join(lines)
    print(table)
    if options.out:
        options.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
