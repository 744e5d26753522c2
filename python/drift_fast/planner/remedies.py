"""Changes that would make a run fit into the memory of its GPUs, tried one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from drift_fast.planner.counts import ADAPTED
from drift_fast.planner.memory import estimate
from drift_fast.planner.report import sized
from drift_fast.planner.scenario import Scenario

# A change of the run in a user's words, and the options that it sets.
_CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("with residency host", {"residency": "host"}),
    ("under ZeRO-2", {"sharding": "zero2"}),
    ("under ZeRO-3", {"sharding": "zero3"}),
    ("under FSDP2", {"sharding": "fsdp2"}),
    ("under ZeRO-2 with the optimizer offloaded", {"sharding": "zero2", "offload": "optimizer"}),
    ("under ZeRO-3, offloaded", {"sharding": "zero3", "offload": "all"}),
    ("with 8-bit AdamW", {"optimizer": "adamw8bit"}),
    ("with LoRA of rank 64", {"lora_rank": 64}),
)
_MOST_GPUS = 64
NONE = (
    f"none of the changes tried makes the run fit, up to {_MOST_GPUS} GPUs; choose a smaller "
    "model, or read its weights in 4 bits (QLoRA), which is not planned here"
)


@dataclass(frozen=True)
class Remedies:
    """The changes to a run that does not fit into `gpu_nbytes`."""

    planned: Scenario
    gpu_nbytes: int

    def found(self) -> list[str]:
        """Return the changes that make the run fit."""
        return list(self._fitting())

    def _fitting(self) -> Iterator[str]:
        """Yield changes that make the run fit: one alone, or one with gradient checkpointing."""
        saving = self._try("with gradient checkpointing", gradient_checkpointing=True)
        if saving is not None:
            yield saving
        for label, changes in _CHANGES:
            fits = self._try(label, **changes)
            if fits is None and saving is None:
                both = {**changes, "gradient_checkpointing": True}
                fits = self._try(f"{label} and gradient checkpointing", **both)
            if fits is not None:
                yield fits
        shorter = self._tokens_that_fit()
        if shorter is not None:
            yield f"with samples of at most {shorter:,} tokens (max_tokens)"
        run = self.planned.run
        sharding, gpus = run.sharding if run.sharded else "zero2", 2 * run.gpus
        while gpus <= _MOST_GPUS:
            label = f"on {gpus} GPUs under {sharding}"
            more: dict[str, Any] = {"sharding": sharding, "gpus": gpus}
            fits = self._try(label, **more) or self._try(
                f"{label} and gradient checkpointing", **more, gradient_checkpointing=True
            )
            if fits is not None:
                yield fits
                return
            gpus *= 2

    def _try(self, label: str, **changes: Any) -> str | None:
        """Return the change with what it needs, or None if it changes nothing or too little."""
        run = self.planned.run
        if all(getattr(run, name) == value for name, value in changes.items()):
            return None
        if run.lora_rank and "lora_rank" in changes:
            return None
        covered = any(self.planned.multimodal.kind(one) in ADAPTED for one in self.planned.names)
        if "lora_rank" in changes and not covered:
            return None
        try:
            nbytes = self._nbytes(**changes)
        except ValueError:
            return None
        return None if nbytes > self.gpu_nbytes else f"{label}: {sized(nbytes)} on each GPU"

    def _tokens_that_fit(self) -> int | None:
        """Return the longest sample that fits, in steps of 256 tokens; None if 256 do not."""
        most = (self.planned.run.max_tokens or self.planned.run.tokens) // 256
        fitting = [
            steps
            for steps in range(1, min(most, 4096) + 1)
            if self._nbytes(tokens=256 * steps, max_tokens=None, image_tokens=0) <= self.gpu_nbytes
        ]
        return 256 * fitting[-1] if fitting else None

    def _nbytes(self, **changes: Any) -> int:
        planned = self.planned
        changed = planned.run.changed(**changes)
        found = estimate(changed, planned.multimodal, planned.delta_numel, self.gpu_nbytes)
        return found.device_nbytes
