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
    """Time one stack; `note` takes what was found.

    A host may become slower or faster while it is timed, so each round compares steps with those
    right before, without an injection and at α = 0, which measures nothing.
    """
    clock.use(options.tokens[0])
    for _ in range(4):
        clock.stack.step([clock.tokens])
    compared = clock.stack.stack in (ALONE, "ddp")
    rows = [_Row("drift_fast, adaptive")]
    if compared:
        rows.append(_Row("drift_fast, adaptive, overlap", overlap=True))
    for _ in range(options.repeats):
        for row in rows:
            row.round(clock, delta, options)
    for row in rows:
        note("steps", row.found())
        note("attach", {"label": f"device, all layers{', overlap' * row.overlap}", **row.attaching})
    if compared and not late():
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


class _Row:
    """Rounds of one variant: steps without an injection, then attached at α = 0 and injected."""

    def __init__(self, label: str, *, overlap: bool = False) -> None:
        self.label, self.overlap = label, overlap
        self.attaching: dict[str, float] = {}
        self._base: list[float] = []
        self._still: list[float] = []
        self._times: list[float] = []
        self._launching: list[float] = []
        self._launching_base: list[float] = []
        self._sums: list[int] = []

    def round(self, clock: Clock, delta: Delta, options: Any) -> None:
        clock.stack.step([clock.tokens])
        self._base.append(clock.run(None, options.steps))
        self._launching_base.append(clock.launching)
        how = {"scale": "adaptive", "layers": range(clock.layers), "overlap": self.overlap}
        injection, found = clock.attached(delta, **how)
        self.attaching = self.attaching or found
        # Recordings and the allocator settle.
        for _ in range(4):
            with collectives() as self._sums:
                clock.stack.step([clock.tokens], injection)
        self._times.append(clock.run(injection, options.steps))
        self._launching.append(clock.launching)
        if injection.injected != len(injection.targets):
            raise AssertionError(f"{injection.injected} of {len(injection.targets)} injected")
        injection.alpha = 0.0
        clock.stack.step([clock.tokens], injection)
        self._still.append(clock.run(injection, options.steps))
        injection.remove()

    def found(self) -> dict[str, Any]:
        """Return the rounds."""
        return {
            "label": self.label,
            "base": self._base,
            "still": self._still,
            "times": self._times,
            "launching": statistics.median(self._launching),
            "launching_base": statistics.median(self._launching_base),
            "sums": self._sums,
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


def _added(row: dict[str, Any], to: str) -> str:
    """Return what a round's injected steps add to its others: the median, and all rounds."""
    if to not in row:
        return ""
    each = sorted(time / base - 1 for time, base in zip(row["times"], row[to], strict=True))
    return f"{statistics.median(each):+.1%} ({each[0]:+.1%} to {each[-1]:+.1%})"


def render_lora(reports: list[dict[str, Any]], options: Any) -> list[str]:
    """Return the results as lines of Markdown."""
    lines = [
        "## What an injection adds to an optimizer step",
        "",
        f"{options.size} in bfloat16, LoRA r = {options.rank} on all linear layers, factors in "
        f"float32 (ZeRO: bfloat16 with masters in float32), one sequence of {options.tokens[0]} "
        "tokens for each process, forward, backward and AdamW. Medians (min to max) of "
        f"{options.repeats} rounds, each of {options.steps} steps without an injection, as many "
        "injected ones and as many at α = 0, attached. *Added* compares steps of one round. "
        "*Launched*: until the host had launched a step. *Summed*: numbers in the library's own "
        "sums over processes in a step, in how many sums.",
        "",
        "| | processes | variant | step ms | without | added | added to α = 0 | launched, ms "
        "| without | summed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        start = f"| {report['stack']} | {report['world']} "
        for row in report.get("steps", []):
            time_, base = statistics.median(row["times"]), statistics.median(row["base"])
            spread = f"{time_:.1f} ({min(row['times']):.1f} to {max(row['times']):.1f})"
            around = f"{base:.1f} ({min(row['base']):.1f} to {max(row['base']):.1f})"
            sums = f"{sum(row['sums'])} in {len(row['sums'])}" if "sums" in row else ""
            launched = f"{row['launching']:.1f} | "
            launched += f"{row['launching_base']:.1f}" if "launching_base" in row else ""
            lines.append(
                f"{start}| {row['label']} | {spread} | {around} | {_added(row, 'base')} "
                f"| {_added(row, 'still')} | {launched} | {sums} |"
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
