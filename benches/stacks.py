"""How benches train one model: DDP, FSDP2, DeepSpeed ZeRO, or one process alone.

Owns building the backbone, wrapping it for a stack, whole optimizer steps and their times, and the
comparison of what an optimizer received with float64.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import adapters
import torch
import torch.distributed as dist
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import drift_fast
from drift_fast import Delta, Injection
from drift_fast.bench.pair import SIZES

STACKS = ("ddp", "fsdp2", "zero2", "zero3")
# In one process, not wrapped; the other ranks wait.
ALONE = "alone"
SCALES = ("absolute", "gradnorm", "adaptive")
# Large beside the weights, so that their difference is the gradient to float32's precision.
LEARNING_RATE = 1e4


def build(size: str, layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the text backbone with random weights, the same on every rank."""
    shape = SIZES[size]
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.hidden // shape.head,
        num_key_value_heads=shape.keys // shape.head,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


class Stack:
    """A model as one stack trains it: `backward` on a batch, `step` of the optimizer.

    Parameters of float32 beside a model in bfloat16 (the factors of LoRA) compute in bfloat16.
    """

    def __init__(
        self, stack: str, model: nn.Module, device: torch.device, optimizer: Any, accumulation: int
    ) -> None:
        self.stack, self.device, self.accumulation = stack, device, accumulation
        self.zero = stack.startswith("zero")
        dtypes = {p.dtype for p in model.parameters()}
        self.low = torch.bfloat16 in dtypes
        self.mixed = len(dtypes) > 1
        if self.zero:
            self._engine(model, optimizer)
            return
        self.model: Any = model
        if stack == "ddp":
            ids = [device.index] if device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True
            )
        elif stack == "fsdp2":
            self.model = self._sharded(model)
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad])

    def _sharded(self, model: nn.Module) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy: dict[str, Any] = {}
        if self.mixed:
            policy["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        decoder: Any = next(module for module in model.modules() if hasattr(module, "layers"))
        for layer in decoder.layers:
            fully_shard(layer, **policy)
        return fully_shard(model, **policy)

    def _engine(self, model: nn.Module, optimizer: Any) -> None:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.low},
            "zero_optimization": {"stage": int(self.stack[-1])},
            "steps_per_print": 10**9,
        }
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        self.model, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)

    def attach(self, delta: Delta, **options: Any) -> Injection:
        """Attach an injection where this stack wants it."""
        if self.zero:
            return drift_fast.attach(self.model, delta, **options)
        return Injection(self.model, delta, optimizer=self.optimizer, **options)

    def step(self, batches: list[torch.Tensor], injection: Any = None) -> None:
        """Take one optimizer step over some micro-batches of one sequence each.

        injection: what has a `step()` to call before that of the optimizer.
        """
        for number, tokens in enumerate(batches):
            last = number == len(batches) - 1
            if self.zero:
                self.model.backward(self._loss(tokens))
                self.model.step()
                continue
            context: Any = contextlib.nullcontext()
            if self.stack == "fsdp2":
                self.model.set_requires_gradient_sync(last)
            elif self.stack == "ddp" and not last:
                context = self.model.no_sync()
            pause: Any = contextlib.nullcontext()
            if isinstance(injection, Injection) and not last:
                pause = injection.accumulating()
            with context, pause:
                (self._loss(tokens) / len(batches)).backward()
        if not self.zero:
            if injection is not None:
                injection.step()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, tokens: torch.Tensor) -> torch.Tensor:
        casts = self.mixed and not self.zero and self.stack != "fsdp2"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=casts):
            loss: torch.Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def weights(self) -> dict[str, torch.Tensor]:
        """Return every parameter that trains, whole and in float64."""
        module: Any = self.model.module if self.zero or self.stack == "ddp" else self.model
        found = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stack == "fsdp2":
                found[name] = parameter.full_tensor().detach().double()
            elif self.stack == "zero3":
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter]):
                    found[name] = parameter.detach().double().clone()
            else:
                found[name] = parameter.detach().double().clone()
        return found


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # Weights stay where they are, so that every variant times the same numbers.
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=parameters[0].is_cuda)


def restated(
    model: nn.Module, batches: list[torch.Tensor], deltas: dict[str, torch.Tensor], scale: str
) -> dict[str, torch.Tensor]:
    """Return the method's gradients over the whole batch, in one process and in float64."""
    plain = model.double()
    plain.zero_grad()
    for tokens in batches:
        (plain(input_ids=tokens, labels=tokens).loss / len(batches)).backward()
    found = {}
    for name, parameter in plain.named_parameters():
        g = parameter.grad
        assert g is not None, name
        if name in deltas:
            d = deltas[name].to(g.device).double()
            sums = g.square().sum(), (g * d).sum(), d.square().sum()
            g = g - adapters.coefficient(scale, *sums) * d
        found[name] = g
    return found


def check(stack: str, device: torch.device, delta: Delta, *, rank: int) -> dict[str, float]:
    """Return, by scale, the largest relative error of what a stack's optimizer received.

    rank: that of LoRA, 0 for whole weights.

    Steps before the one that counts leave the weights where they are: what an injection records in
    the first steps is replayed in the last one.
    """
    place, world = (0, 1) if stack == ALONE else (dist.get_rank(), dist.get_world_size())
    accumulation = 2
    generator = torch.Generator().manual_seed(1)
    batches = [
        torch.randint(4, SIZES["tiny"].vocab - 8, (1, 24), generator=generator).to(device)
        for _ in range(accumulation * world)
    ]
    deltas = {name.replace("model.language_model.", "model."): delta[name] for name in delta}

    def tiny() -> nn.Module:
        model = build("tiny", SIZES["tiny"].layers, torch.float32, device)
        return adapters.with_lora(model, rank) if rank else model

    overlaps = (False, True) if rank and stack in (ALONE, "ddp") else (False,)
    worst: dict[str, float] = {}
    for scale, overlap in itertools.product(SCALES, overlaps):
        exact = (adapters.restated if rank else restated)(tiny(), batches, deltas, scale)
        trained = Stack(stack, tiny(), device, sgd, accumulation)
        before = trained.weights()
        how = {"scale": scale, "overlap": overlap}
        with trained.attach(delta, residency="device", **how) as injection:
            for rate in (0.0, 0.0, 0.0, LEARNING_RATE):
                for group in trained.optimizer.param_groups:
                    group["lr"] = rate
                trained.step(batches[place::world], injection)
            if not injection.injected:
                raise AssertionError(f"{stack}: nothing was injected")
        after = trained.weights()
        if after.keys() != exact.keys():
            raise AssertionError(f"{stack}: {len(after)} trained, {len(exact)} expected")
        errors = []
        for name, expected in exact.items():
            received = (before[name] - after[name]) / LEARNING_RATE
            errors.append(float((received - expected).norm() / expected.norm()))
        worst[scale] = max(worst.get(scale, 0.0), *errors)
        if not worst[scale] <= 1e-5:
            raise AssertionError(f"{stack}, {scale}: a gradient is off by {worst[scale]:.1e}")
    return worst


@contextlib.contextmanager
def collectives() -> Iterator[list[int]]:
    """Count the numbers in every sum over processes that this library asks for."""
    original, counted = dist.all_reduce, []

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if str(sys._getframe(1).f_globals.get("__name__", "")).startswith("drift_fast"):
            counted.append(tensor.numel())
        return original(tensor, *arguments, **keywords)

    dist.all_reduce = all_reduce
    try:
        yield counted
    finally:
        dist.all_reduce = original


class Clock:
    """Times steps of one stack at full width.

    rank: that of LoRA, 0 for whole weights.
    """

    def __init__(
        self, stack: str, device: torch.device, *, size: str, layers: int, rank: int = 0
    ) -> None:
        self.device, self.cuda, self.layers = device, device.type == "cuda", layers
        self.alone = stack == ALONE
        self._most = SIZES[size].vocab - 8
        model = build(size, layers, torch.bfloat16, device)
        if rank:
            model = adapters.with_lora(model, rank)
        self.module: Any = model
        self.stack = Stack(stack, model, device, adamw, 1)
        self.tokens = torch.zeros(1, 1, dtype=torch.long, device=device)
        # Until the host has launched a step, of the last run.
        self.launching = math.nan

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        if not self.alone:
            dist.barrier()

    def memory(self) -> float:
        return torch.cuda.memory_allocated() / 1e9 if self.cuda else math.nan

    def use(self, tokens: int) -> bool:
        """Choose the length of a sequence; return whether activations are recomputed."""
        recomputed = tokens > 4096
        if recomputed:
            self.module.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.module.gradient_checkpointing_disable()
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.tokens = torch.randint(4, self._most, (1, tokens), generator=generator).to(self.device)
        return recomputed

    def run(self, injection: Any, steps: int) -> float:
        """Return the milliseconds of a step, the mean of several in a row."""
        self.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.stack.step([self.tokens], injection)
        self.launching = (time.perf_counter() - start) * 1e3 / steps
        self.wait()
        return (time.perf_counter() - start) * 1e3 / steps

    def attached(
        self, delta: Delta, *, residency: str = "device", **options: Any
    ) -> tuple[Injection, dict[str, float]]:
        """Attach; return the injection, the seconds that took and the memory it holds."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        self.wait()
        before, start = self.memory(), time.perf_counter()
        injection = self.stack.attach(delta, residency=residency, **options)
        self.wait()
        seconds = time.perf_counter() - start
        return injection, {"seconds": seconds, "memory": self.memory() - before}

    def compare(
        self, delta: Delta, label: str, *, repeats: int, steps: int, **options: Any
    ) -> dict[str, Any]:
        """Time injected steps in turn with those of the same stack without an injection."""
        base, times = [], []
        attaching: dict[str, float] = {}
        sums: list[int] = []
        for round_ in range(repeats):
            for _ in range(3):
                self.stack.step([self.tokens])
            base.append(self.run(None, steps))
            injection, found = self.attached(delta, **options)
            if round_ == 0:
                attaching = found
            # Recordings and the allocator settle.
            for _ in range(3):
                with collectives() as counted:
                    self.stack.step([self.tokens], injection)
                sums = counted
            times.append(self.run(injection, steps))
            if injection.injected != len(injection.targets):
                raise AssertionError(f"{injection.injected} of {len(injection.targets)} injected")
            injection.remove()
        return {"label": label, "base": base, "times": times, "sums": sums, **attaching}
