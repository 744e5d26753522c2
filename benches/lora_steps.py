"""What LoRA's injection adds to a step of one stack, and what attaching takes.

Runs on every rank of benches/multi_gpu.py --lora.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import adapters
import torch
from stacks import ALONE, Clock, collectives

from drift_fast import Delta

RESIDENCIES = ("device", "host", "device-int8")


def time_lora(
    clock: Clock,
    delta: Delta,
    options: Any,
    note: Callable[[str, dict[str, Any]], None],
    late: Callable[[], bool],
) -> None:
    """Time one stack; `note` takes each row as soon as it is there.

    Steps without an injection are timed before it is attached and after it is removed, and steps
    at α = 0, which measure nothing, in turn with injected ones.
    """
    clock.use(options.tokens[0])
    steps = options.steps
    for _ in range(4):
        clock.stack.step([clock.tokens])
    base, launching_base = [], []

    def without() -> None:
        for _ in range(2):
            base.append(clock.run(None, steps))
            launching_base.append(clock.launching)

    without()
    variants = [("drift_fast, adaptive", False)]
    if clock.stack.stack in (ALONE, "ddp"):
        variants.append(("drift_fast, adaptive, overlap", True))
    for label, overlap in variants:
        row = _row(clock, delta, options, note, label=label, overlap=overlap)
        without()
        row |= {"base": list(base), "launching_base": statistics.median(launching_base)}
        note("steps", row)
    if clock.stack.stack in (ALONE, "ddp") and not late():
        note("steps", _rival(clock, options))
    if clock.stack.stack not in (ALONE, "fsdp2"):
        return
    some = range(min(clock.layers, options.attach_layers))
    for residency in RESIDENCIES:
        if late():
            return
        injection, found = clock.attached(delta, residency=residency, layers=some)
        injection.remove()
        note("attach", {"label": f"{residency}, {len(some)} layers", **found})


def _row(
    clock: Clock,
    delta: Delta,
    options: Any,
    note: Callable[[str, dict[str, Any]], None],
    *,
    label: str,
    overlap: bool,
) -> dict[str, Any]:
    """Attach to all layers, time steps and remove; `note` takes what attaching took."""
    layers = range(clock.layers)
    injection, found = clock.attached(delta, scale="adaptive", layers=layers, overlap=overlap)
    note("attach", {"label": f"device, all layers{', overlap' if overlap else ''}", **found})
    # Recordings and the allocator settle.
    for _ in range(4):
        with collectives() as sums:
            clock.stack.step([clock.tokens], injection)
    still, times, launching = [], [], []
    for _ in range(options.repeats):
        injection.alpha = 0.0
        clock.stack.step([clock.tokens], injection)
        still.append(clock.run(injection, options.steps))
        injection.alpha = 1.0
        clock.stack.step([clock.tokens], injection)
        times.append(clock.run(injection, options.steps))
        launching.append(clock.launching)
    if injection.injected != len(injection.targets):
        raise AssertionError(f"{injection.injected} of {len(injection.targets)} injected")
    injection.remove()
    clock.stack.step([clock.tokens])
    return {
        "label": label,
        "still": still,
        "times": times,
        "launching": statistics.median(launching),
        "sums": sums,
        "targets": len(injection.targets),
    }


def _rival(clock: Clock, options: Any) -> dict[str, Any]:
    """Time the same formula in plain PyTorch, in turn with steps without it."""
    # Any Δ of the right shapes takes as long.
    deltas = {
        name: torch.randn(b.shape[0], a.shape[1], device=a.device, dtype=torch.bfloat16)
        for name, a, b, _ in adapters.pairs(clock.module)
    }
    rival = adapters.PlainPullBack(clock.module, deltas)
    del deltas
    for _ in range(3):
        clock.stack.step([clock.tokens], rival)
    base, times, launching = [], [], []
    for _ in range(options.repeats):
        base.append(clock.run(None, options.steps))
        times.append(clock.run(rival, options.steps))
        launching.append(clock.launching)
    found = {"label": "plain PyTorch, adaptive", "base": base, "times": times}
    return {**found, "launching": statistics.median(launching)}


def render_lora(reports: list[dict[str, Any]], options: Any) -> list[str]:
    """Return the results as lines of Markdown."""
    lines = [
        "## What an injection adds to an optimizer step",
        "",
        f"{options.size} in bfloat16, LoRA r = {options.rank} on all linear layers, factors in "
        f"float32 (ZeRO: bfloat16 with masters in float32), one sequence of {options.tokens[0]} "
        "tokens for each process, forward, backward and AdamW. Medians (min to max) of runs of "
        f"{options.steps} steps. *Without*: before attaching and after removing. *α = 0*: "
        "attached, in turn with injected steps. *Launched*: until the host had launched a step. "
        "*Summed*: numbers in the library's own sums over processes in a step, in how many sums.",
        "",
        "| | processes | layers | variant | step ms | without | added | α = 0 | launched, ms "
        "| without | summed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        start = f"| {report['stack']} | {report['world']} | {report.get('layers')} "
        for row in report.get("steps", []):
            time_, base = statistics.median(row["times"]), statistics.median(row["base"])
            spread = f"{time_:.1f} ({min(row['times']):.1f} to {max(row['times']):.1f})"
            around = f"{base:.1f} ({min(row['base']):.1f} to {max(row['base']):.1f})"
            still = f"{statistics.median(row['still']):.1f}" if "still" in row else ""
            sums = f"{sum(row['sums'])} in {len(row['sums'])}" if "sums" in row else ""
            launched = f"{row['launching']:.1f} | "
            launched += f"{row['launching_base']:.1f}" if "launching_base" in row else ""
            lines.append(
                f"{start}| {row['label']} | {spread} | {around} | {time_ / base - 1:+.1%} "
                f"| {still} | {launched} | {sums} |"
            )
    lines += [
        "",
        "## Attaching",
        "",
        "| | processes | what | s | Δ on the device, GB a rank |",
        "|---|---|---|---|---|",
    ]
    for report in reports:
        for row in report.get("attach", []):
            lines.append(
                f"| {report['stack']} | {report['world']} | {row['label']} "
                f"| {row['seconds']:.2f} | {row['memory']:.2f} |"
            )
    return lines
