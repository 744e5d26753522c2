"""The stacks: one row of the matrix each, in the order in which the table shows them.

Owns: the names, how many processes, which tolerance and why. How a stack is driven is in loops.py,
sharded.py and libraries.py.
Invariant: `train` takes one optimizer step from the stack's own entry point and returns every
trained parameter, whole, on the first process at least.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import drift_fast
from parity.world import NONE, SCALES, Gradients, World

# Float32 gradients by another route (order of sums, kernels) differ from float64 by this much.
FLOAT32 = 1e-5
# A bfloat16 forward pass keeps 8 bits, and the gradient of a key's bias is a small difference of
# large terms. The injection itself is as exact as ever, which the row's twin "…, from its own
# gradient" shows.
BFLOAT16 = 0.2
# DeepSpeed holds the gradients that it steps in bfloat16, the injected ones too.
BFLOAT16_GRADIENT = 2.0**-8
# Eight bits for each element of Δ, with one step for every 64: about 1/127/√12 of their largest.
INT8 = 0.02
# Less than this and nothing was rounded to eight bits.
INT8_LEAST = 1e-4
# Less than a step's Δ in the large world, so that buffers are filled anew within the step.
PREFETCH = "1MB"


class Absent:
    """What stands in for an injection in a run without one."""

    def step(self) -> None:
        pass

    def remove(self) -> None:
        pass


@dataclass(frozen=True)
class Cell:
    """One training run: what `train` of a stack is given.

    alpha: None trains without an injection.
    attached: what the run attached, for its end.
    """

    world: World
    scale: str
    accumulation: int
    alpha: float | None
    rank: int = 0
    size: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    attached: list[Any] = field(default_factory=list)

    def model(self) -> Any:
        """Load the model, with the adapter that the stack's options name."""
        adapter = self.options.get("adapter")
        return self.world.model() if adapter is None else self.world.adapted(adapter)

    def injection(self, model: Any, **options: Any) -> Any:
        """Attach to a model, or return what does nothing."""
        return self._attach(drift_fast.Injection, model, options)

    def attach(self, owner: Any, **options: Any) -> Any:
        """Attach to a trainer or an engine, or return what does nothing."""
        return self._attach(drift_fast.attach, owner, options)

    def callback(self, made_by: Any) -> Any:
        """Return a callback that attaches by itself."""
        return self._attach(lambda _, *given, **options: made_by(*given, **options), None, {})

    def _attach(self, how: Any, owner: Any, options: Mapping[str, Any]) -> Any:
        if self.alpha is None:
            return Absent()
        # A frozen bias has no factors that a delta could move.
        weights = {"modules": r"re:\.weight$"} if "adapter" in self.options else {}
        injection = how(
            owner, self.world.delta(), alpha=self.alpha, scale=self.scale, **weights, **options
        )
        self.attached.append(injection)
        return injection

    def micro_batches(self) -> list[dict[str, torch.Tensor]]:
        return self.world.micro_batches(self.accumulation, rank=self.rank, size=self.size)

    @property
    def samples(self) -> list[dict[str, torch.Tensor]]:
        """All sequences one by one, for stacks that batch and distribute them themselves."""
        batch = self.world.batch()
        count = len(batch["input_ids"])
        return [{key: rows[index] for key, rows in batch.items()} for index in range(count)]


@dataclass(frozen=True)
class Stack:
    """A row of the matrix.

    where: module and function that drive it.
    kind: which reference it is compared with: "weights", "lora" or "rslora".
    own_gradient: the expected gradient is restated from the stack's own plain gradient, of a run
        without injection, instead of from float64.
    at_least: the error that an injected cell must have, where the stack rounds by design: less
        shows that the row is not what its name says.
    needs: packages beyond those that the tests need anyway.
    fast: run by every `make test`.
    """

    name: str
    where: str
    processes: int = 1
    shapes: str = "even"
    kind: str = "weights"
    tolerance: float = FLOAT32
    own_gradient: bool = False
    at_least: float = 0.0
    scales: tuple[str, ...] = (NONE, *SCALES)
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    fast: bool = False

    def train(self, cell: Cell) -> Gradients:
        module, _, function = self.where.partition(":")
        weights: Gradients = getattr(importlib.import_module(f"parity.{module}"), function)(cell)
        return weights


def _lossy(name: str, where: str, *, own: float = FLOAT32, **options: Any) -> tuple[Stack, Stack]:
    """A stack that computes in bfloat16, against float64 and against its own gradient.

    own: the tolerance of the latter.
    """
    stack = Stack(name, where, tolerance=BFLOAT16, **options)
    twin = f"{name}, from its own gradient"
    return stack, replace(stack, name=twin, tolerance=own, own_gradient=True, scales=SCALES)


_DEEPSPEED = {"DS_ACCELERATOR": "cpu"}


def _lora(
    name: str,
    where: str,
    processes: int = 1,
    shapes: str = "even",
    *,
    adapter: str = "lora",
    **options: Any,
) -> Stack:
    """A stack that trains the factors of an adapter."""
    zero = not {"stage", "zero"}.isdisjoint(options)
    return Stack(
        name,
        where,
        processes,
        shapes,
        kind=adapter,
        environment=_DEEPSPEED if zero else {},
        options={"adapter": adapter, **options},
        needs=("peft", "deepspeed") if zero else ("peft",),
    )


def _lossy_lora(
    name: str, where: str, *, own: float = FLOAT32, **options: Any
) -> tuple[Stack, Stack]:
    """As `_lossy`, of float32 factors that compute in bfloat16."""
    stack = _lora(f"LoRA (PEFT), {name}", where, 2, mixed=True, **options)
    fields = {key: getattr(stack, key) for key in ("kind", "environment", "options", "needs")}
    return _lossy(stack.name, where, own=own, processes=2, **fields)


def _lightning(name: str, kind: str, **options: Any) -> Stack:
    """A strategy of Lightning's that shards."""
    adapter = {} if kind == "weights" else {"adapter": kind}
    zero = "zero" in options
    return Stack(
        name,
        "libraries:lightning",
        2,
        kind=kind,
        environment=_DEEPSPEED if zero else {},
        options={**adapter, **options},
        needs=("lightning", *(["peft"] if adapter else []), *(["deepspeed"] if zero else [])),
    )


STACKS = (
    Stack("plain loop", "loops:plain", fast=True),
    Stack("plain loop, fused SGD", "loops:plain", options={"fused": True}, fast=True),
    Stack("plain loop, foreach SGD", "loops:plain", options={"foreach": True}, fast=True),
    Stack("optimizer alone (attach)", "loops:optimizer", fast=True),
    *_lossy("torch.autocast bfloat16", "loops:autocast", fast=True),
    Stack("GradScaler, injected before unscale_", "loops:scaled", fast=True),
    Stack(
        "GradScaler, injected after unscale_", "loops:scaled", options={"unscale": True}, fast=True
    ),
    Stack("gradient checkpointing", "loops:checkpointed", options={"reentrant": False}, fast=True),
    Stack(
        "gradient checkpointing, reentrant",
        "loops:checkpointed",
        options={"reentrant": True},
        fast=True,
    ),
    Stack("torch.compile", "loops:compiled"),
    Stack("plain loop, large tensors", "loops:plain", shapes="large", fast=True),
    Stack(
        "Δ resident: device",
        "loops:resident",
        shapes="large",
        options={"residency": "device"},
    ),
    Stack(
        "Δ resident: device-int8",
        "loops:resident",
        shapes="large",
        tolerance=INT8,
        at_least=INT8_LEAST,
        options={"residency": "device-int8", "read_from": "Int8", "prefetch": PREFETCH},
    ),
    Stack(
        "Δ resident: disk",
        "loops:resident",
        shapes="large",
        options={"residency": "disk", "read_from": "OnDisk", "prefetch": PREFETCH},
    ),
    Stack(
        "plain loop, overlapped with backward",
        "loops:overlapped",
        shapes="large",
        options={"overlap": True},
    ),
    Stack("Accelerate", "libraries:accelerate", fast=True),
    Stack("Trainer", "libraries:trainer", fast=True),
    Stack("SFTTrainer (TRL)", "libraries:sft_trainer", needs=("trl", "datasets")),
    Stack("Lightning", "libraries:lightning", needs=("lightning",)),
    *(
        _lightning(f"{adapter}Lightning, {name}, 2 processes", kind, **options)
        for adapter, kind in (("", "weights"), ("LoRA (PEFT), ", "lora"))
        for name, options in (
            ("FSDPStrategy", {"strategy": "fsdp1"}),
            ("ModelParallelStrategy (FSDP2)", {"strategy": "fsdp2"}),
            ("DeepSpeedStrategy ZeRO-2", {"strategy": "deepspeed", "zero": 2}),
            ("DeepSpeedStrategy ZeRO-3", {"strategy": "deepspeed", "zero": 3}),
        )
    ),
    _lora("LoRA (PEFT)", "loops:plain"),
    _lora("LoRA (PEFT), rsLoRA", "loops:plain", adapter="rslora"),
    _lora("LoRA (PEFT), DDP, 2 processes", "sharded:ddp", 2),
    _lora("LoRA (PEFT), FSDP2, 2 processes", "sharded:fsdp2", 2),
    _lora("LoRA (PEFT), FSDP2, 4 processes, uneven shards", "sharded:fsdp2", 4, "uneven"),
    _lora("LoRA (PEFT), rsLoRA, FSDP2, 2 processes", "sharded:fsdp2", 2, adapter="rslora"),
    *(
        _lora(f"LoRA (PEFT), DeepSpeed ZeRO-{stage}, 2 processes", "sharded:zero", 2, stage=stage)
        for stage in (1, 2, 3)
    ),
    _lora(
        "LoRA (PEFT), DeepSpeed ZeRO-3, 2 processes, uneven shards",
        "sharded:zero",
        2,
        "uneven",
        stage=3,
    ),
    *(
        _lora(
            f"LoRA (PEFT), Trainer, DeepSpeed ZeRO-{stage}, 2 processes",
            "libraries:trainer",
            2,
            zero=stage,
        )
        for stage in (2, 3)
    ),
    _lora("LoRA (PEFT), Trainer, FSDP2, 2 processes", "libraries:trainer", 2, fsdp=2),
    _lora("LoRA (PEFT), FSDP1 use_orig_params, 2 processes", "sharded:fsdp1", 2),
    _lora(
        "LoRA (PEFT), FSDP1 use_orig_params, 4 processes, uneven shards",
        "sharded:fsdp1",
        4,
        "uneven",
    ),
    *_lossy_lora("DDP, 2 processes, autocast bfloat16", "sharded:ddp"),
    *_lossy_lora("FSDP2, 2 processes, bfloat16 with float32 reduction", "sharded:fsdp2"),
    *(
        row
        for stage in (1, 2, 3)
        for row in _lossy_lora(
            f"DeepSpeed ZeRO-{stage}, 2 processes, bfloat16 with float32 masters",
            "sharded:zero",
            own=BFLOAT16_GRADIENT,
            stage=stage,
        )
    ),
    *(
        _lora(f"LoRA (PEFT), modules_to_save, {name}", where, 2, adapter="copies", **options)
        for name, where, options in (
            ("FSDP2, 2 processes", "sharded:fsdp2", {}),
            ("FSDP1 use_orig_params, 2 processes", "sharded:fsdp1", {}),
            ("DeepSpeed ZeRO-1, 2 processes", "sharded:zero", {"stage": 1}),
            ("DeepSpeed ZeRO-2, 2 processes", "sharded:zero", {"stage": 2}),
            ("DeepSpeed ZeRO-3, 2 processes", "sharded:zero", {"stage": 3}),
        )
    ),
    _lora("LoRA (PEFT), DoRA", "loops:plain", adapter="dora"),
    _lora("LoRA (PEFT), DoRA, DDP, 2 processes", "sharded:ddp", 2, adapter="dora"),
    *(
        _lora(
            f"LoRA (PEFT), DoRA, DeepSpeed ZeRO-{stage}, 2 processes",
            "sharded:zero",
            2,
            adapter="dora",
            stage=stage,
        )
        for stage in (1, 2, 3)
    ),
    *(
        _lora(f"LoRA (PEFT), DoRA, {name}", where, count, shapes, adapter="dora", **options)
        for name, where, count, shapes, options in (
            (
                "DeepSpeed ZeRO-3, 2 processes, uneven shards",
                "sharded:zero",
                2,
                "uneven",
                {"stage": 3},
            ),
            ("FSDP2, 2 processes", "sharded:fsdp2", 2, "even", {}),
            ("FSDP2, 4 processes, uneven shards", "sharded:fsdp2", 4, "uneven", {}),
            ("FSDP1 use_orig_params, 2 processes", "sharded:fsdp1", 2, "even", {}),
            ("FSDP1 use_orig_params, 4 processes, uneven shards", "sharded:fsdp1", 4, "uneven", {}),
            ("Trainer, DeepSpeed ZeRO-3, 2 processes", "libraries:trainer", 2, "even", {"zero": 3}),
            ("Trainer, FSDP2, 2 processes", "libraries:trainer", 2, "even", {"fsdp": 2}),
        )
    ),
    Stack("DDP, 2 processes", "sharded:ddp", 2),
    Stack("Accelerate, DDP, 2 processes", "libraries:accelerate", 2),
    Stack("Trainer, DDP, 2 processes", "libraries:trainer", 2),
    Stack("FSDP2, 2 processes", "sharded:fsdp2", 2, fast=True),
    Stack("FSDP2, 2 processes, uneven shards", "sharded:fsdp2", 2, shapes="uneven", fast=True),
    Stack("FSDP2, 2 processes, large tensors", "sharded:fsdp2", 2, shapes="large"),
    Stack("FSDP2, 4 processes", "sharded:fsdp2", 4),
    Stack("FSDP2, 4 processes, uneven shards", "sharded:fsdp2", 4, shapes="uneven"),
    *_lossy(
        "FSDP2, 2 processes, bfloat16 with float32 reduction",
        "sharded:fsdp2",
        processes=2,
        options={"mixed": True},
    ),
    Stack("FSDP2, 2 processes, CPU offload", "sharded:fsdp2", 2, options={"offload": True}),
    Stack("Accelerate, FSDP2, 2 processes", "libraries:accelerate", 2, options={"fsdp": 2}),
    Stack("Trainer, FSDP2, 2 processes", "libraries:trainer", 2, options={"fsdp": 2}),
    Stack("FSDP1 use_orig_params, 2 processes", "sharded:fsdp1", 2),
    Stack("FSDP1 use_orig_params, 2 processes, uneven shards", "sharded:fsdp1", 2, "uneven"),
    Stack("FSDP1 use_orig_params, 4 processes, uneven shards", "sharded:fsdp1", 4, "uneven"),
    *(
        Stack(
            f"DeepSpeed ZeRO-{stage}, 2 processes",
            "sharded:zero",
            2,
            environment=_DEEPSPEED,
            needs=("deepspeed",),
            options={"stage": stage},
        )
        for stage in (1, 2, 3)
    ),
    Stack(
        "DeepSpeed ZeRO-3, 2 processes, uneven shards",
        "sharded:zero",
        2,
        "uneven",
        environment=_DEEPSPEED,
        needs=("deepspeed",),
        options={"stage": 3},
    ),
    *(
        Stack(
            f"Trainer, DeepSpeed ZeRO-{stage}, 2 processes",
            "libraries:trainer",
            2,
            environment=_DEEPSPEED,
            needs=("deepspeed",),
            options={"zero": stage},
        )
        for stage in (2, 3)
    ),
)
BY_NAME = {stack.name: stack for stack in STACKS}
