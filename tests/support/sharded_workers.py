"""What runs inside the processes of the sharded tests: a tiny language model under ZeRO and FSDP1.

Owns the processes, the training they do and the measurements they report; expectations are in the
tests. Results travel as JSON. Every process also trains a plain copy of the model on the whole
batch, in one piece, which is what the shards are compared with.
"""

from __future__ import annotations

import copy
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

LEARNING_RATE = 0.1


# --- the model and its batches -----------------------------------------------------------------


class Scaled(nn.Module):
    """A tiny Qwen2 whose loss is scaled by a parameter with fewer elements than most shards."""

    def __init__(self) -> None:
        from support.injection_models import tiny_qwen2

        super().__init__()
        self.language = tiny_qwen2()
        self.gain = nn.Parameter(torch.tensor([0.5, 1.0, 1.5, 1.0]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.language(input_ids=tokens, labels=tokens).loss
        return loss.float() * self.gain.float().mean()


def micro_batches(count: int, *, step: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(40 + step)
    return [torch.randint(4, 64, (1, 8), generator=generator) for _ in range(count)]


def pattern_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return what is added to a gradient: as large as typical ones, different for each name."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return 0.01 * torch.randn(shape, generator=generator)


class Wholes(dict[str, torch.Tensor]):
    """Mean gradients over all micro-batches, and in `sizes` the mean of their norms.

    Where micro-batches disagree the mean is small, but the rounding of its sum is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, float] = {}


def whole_gradients(model: nn.Module, batches: list[torch.Tensor]) -> Wholes:
    """Return the mean gradient of one process over all micro-batches, added up in float64."""
    total = Wholes()
    for batch in batches:
        model.zero_grad()
        model(batch).backward()
        for name, parameter in model.named_parameters():
            share = parameter.grad.double() / len(batches)
            total[name] = total[name] + share if name in total else share
            total.sizes[name] = total.sizes.get(name, 0.0) + float(share.norm())
    return total


# --- what is measured --------------------------------------------------------------------------


def gathered(shard: Any, local: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Put the local parts of all processes together, in float64."""
    whole = torch.zeros(shape, dtype=torch.float64)
    shard.cut(whole).view(-1).copy_(local.detach().reshape(-1))
    for group in shard.process_groups:
        dist.all_reduce(whole, group=group)
    return whole


def owners(shard: Any, shape: tuple[int, ...]) -> bool:
    """Whether every element is held by exactly one process of the shard's groups."""
    count = gathered(shard, torch.ones_like(shard.weight()), shape)
    return bool((count == 1).all())


class Errors(dict[str, Any]):
    """The largest relative error of each kind over all parameters."""

    def note(
        self, kind: str, found: torch.Tensor, expected: torch.Tensor, size: float | None = None
    ) -> None:
        error = float((found.double() - expected).norm() / (size or expected.norm()))
        self[kind] = max(self.get(kind, 0.0), error)

    def note_step(
        self, kind: str, before: torch.Tensor, found: torch.Tensor, change: torch.Tensor
    ) -> None:
        """As `note`, of a change of float32 weights beyond what these can resolve."""
        error = (found.double() - before - change).norm() - 2.0**-23 * found.norm()
        self[kind] = max(self.get(kind, 0.0), float(error / change.norm()))


class Training(ABC):
    """How one stack takes a step: what the check below needs of it."""

    shards: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    # The same model on one process, in the dtype that computes.
    plain: nn.Module
    micro_batches: int

    @abstractmethod
    def step(self, batches: list[torch.Tensor], moment: Callable[[float], None]) -> None:
        """Train on this rank's share; call moment(factor of the gradients) before clipping."""

    @abstractmethod
    def computing(self) -> dict[str, torch.Tensor]:
        """Return what the model computes with, whole, in float64."""

    @abstractmethod
    def publish(self) -> None:
        """Bring moved master weights to those that compute."""


def follow(training: Training, clip: float) -> Errors:
    """Take one changed step, move the weights, take a step more; return the errors.

    The change is `pattern_of`, added to the local gradients where an injection would run. `clip`
    is the norm that the stack clips to, 0 where it does not.
    """
    shards, shapes, plain = training.shards, training.shapes, training.plain
    low = next(plain.parameters()).dtype
    errors = Errors(
        kinds=sorted({type(shard).__name__.strip("_") for shard in shards.values()}),
        tiled=all(owners(shard, shapes[name]) for name, shard in shards.items()),
        empty=sum(p.span is not None and p.span[0] == p.span[1] for p in shards.values()),
        shapes=shapes == {n: tuple(p.shape) for n, p in plain.named_parameters()},
    )
    weights = {name: p.detach().double() for name, p in plain.named_parameters()}
    count = training.micro_batches * dist.get_world_size()
    changed: dict[str, torch.Tensor] = {}

    def compare(wholes: Wholes, change: float) -> Callable[[float], None]:
        def moment(factor: float) -> None:
            errors["factor"] = factor
            for name, shard in shards.items():
                gradient = shard.gradient()
                assert gradient is not None, name
                found = gathered(shard, gradient, shapes[name]) / factor
                errors.note("gradient", found, wholes[name], wholes.sizes[name])
                with torch.no_grad():
                    part = shard.cut(pattern_of(name, shapes[name])).view(gradient.shape)
                    gradient.add_(part * (factor * change))
                shard.write_gradient(gradient)
                changed[name] = gathered(shard, gradient, shapes[name]) / factor

        return moment

    for step, change in enumerate((1.0, 0.0)):
        batches = micro_batches(count, step=step)
        training.step(batches, compare(whole_gradients(plain, batches), change))
        norm = float(torch.stack([g.norm() for g in changed.values()]).norm())
        share = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        errors["clipped"] = share < 1.0
        computing = training.computing()
        for name, shard in shards.items():
            master = gathered(shard, shard.weight(), shapes[name])
            motion = -LEARNING_RATE * share * changed[name]
            errors.note_step("step", weights[name], master, motion)
            errors.note("working", computing[name], master.to(low).double())
            # Planned motion: less than a low-precision copy can tell.
            part = shard.cut(pattern_of(name, shapes[name])).view(shard.weight().shape)
            shard.write_weight(shard.weight() + 0.01 * part)
            weights[name] = master + 0.01 * pattern_of(name, shapes[name]).double()
        training.publish()
        computing = training.computing()
        for name, parameter in plain.named_parameters():
            master = gathered(shards[name], shards[name].weight(), shapes[name])
            errors.note("moved", master, weights[name])
            errors.note("working moved", computing[name], master.to(low).double())
            weights[name] = master
            # What the shards compute from here on is compared with the moved weights.
            parameter.data.copy_(master)
    return errors


# --- DeepSpeed ---------------------------------------------------------------------------------


def quiet_deepspeed() -> Any:
    """Import DeepSpeed with no output, no compiling of its kernels, and float16 on the CPU."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    type(get_accelerator()).is_fp16_supported = lambda self: True
    deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed


def make_engine(options: dict[str, Any], *, left_out: bool = False) -> tuple[Any, nn.Module]:
    """Return an engine, and a plain copy of its model in the dtype that it computes in.

    options: `zero` is the zero_optimization section; `groups` gives biases a parameter group of
    their own; the others are sections of the configuration.
    """
    deepspeed = quiet_deepspeed()
    options = dict(options)
    model = Scaled()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((dtypes[key] for key in dtypes if key in options), torch.float32)
    plain = copy.deepcopy(model).to(dtype)
    missing = model.get_parameter("language.model.layers.1.mlp.up_proj.weight")
    trained = [p for p in model.parameters() if not left_out or p is not missing]
    grouped: list[dict[str, Any]] = [{"params": trained}]
    if options.pop("groups", False):
        grouped = [
            {"params": [p for p in trained if p.ndim == 1]},
            {"params": [p for p in trained if p.ndim > 1]},
        ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "zero_optimization": {"reduce_bucket_size": 20_000, **options.pop("zero")},
        **options,
    }
    made = torch.optim.SGD(grouped, lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=config)
    return engine, plain


class Engine(Training):
    """A DeepSpeed engine, whose own optimizer step is where an injection would run."""

    def __init__(self, options: dict[str, Any]) -> None:
        from drift_fast.inject.shards import zero
        from drift_fast.inject.shards.find import parameters_of
        from drift_fast.inject.shards.zero_support import optimizer_of

        self.micro_batches = options.get("gradient_accumulation_steps", 1)
        self.engine, self.plain = make_engine(options)
        self.optimizer = optimizer_of(self.engine)
        names, parameters = zip(*self.engine.module.named_parameters(), strict=True)
        self.shapes = {name: shape for name, _, shape in parameters_of(self.engine.module)}
        shards = zero.shards(names, parameters, self.optimizer)
        self.shards = dict(zip(names, shards, strict=True))

    def step(self, batches: list[torch.Tensor], moment: Callable[[float], None]) -> None:
        from drift_fast.inject.shards import zero

        original = self.optimizer.step

        def step(*arguments: Any, **keywords: Any) -> Any:
            zero.settle(self.optimizer)
            moment(zero.gradient_factor(self.optimizer))
            return original(*arguments, **keywords)

        self.optimizer.step = step
        engine_step(self.engine, batches)
        self.optimizer.step = original

    def computing(self) -> dict[str, torch.Tensor]:
        import deepspeed

        result = {}
        for name, parameter in self.engine.module.named_parameters():
            # Leaving the context would release a parameter that ZeRO-3 keeps gathered.
            status = getattr(parameter, "ds_status", None)
            apart = status is not None and status.name != "AVAILABLE"
            with deepspeed.zero.GatheredParameters([parameter], enabled=apart):
                result[name] = parameter.detach().double().clone()
        return result

    def publish(self) -> None:
        from drift_fast.inject.shards import zero

        zero.publish(self.optimizer)


def engine_step(engine: Any, batches: list[torch.Tensor]) -> None:
    """Run the micro-batches of this rank, the last of which is an accumulation boundary."""
    for batch in batches[dist.get_rank() :: dist.get_world_size()]:
        engine.backward(engine(batch))
        engine.step()


def deepspeed_variants(variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train in every variant and report how it went."""
    report = {}
    for name, options in variants.items():
        training = Engine(options)
        report[name] = follow(training, options.get("gradient_clipping", 0.0))
        report[name]["optimizer"] = type(training.optimizer).__name__
        training.engine.destroy()
    return report


# --- FSDP1 -------------------------------------------------------------------------------------


class Fsdp(Training):
    """FSDP1 around every decoder layer and around the rest, with original parameters."""

    def __init__(self, options: dict[str, Any]) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy
        from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

        from drift_fast.inject.shards import fsdp1

        options = dict(options)
        self.micro_batches = options.pop("accumulate", 1)
        self.no_sync = options.pop("no_sync", False)
        self.clip = options.pop("clip", 0.0)
        model = Scaled().to(getattr(torch, options.pop("dtype", "float32")))
        self.plain = copy.deepcopy(model)
        # What FSDP1 ignores, its user reduces.
        self.ignored = [model.gain] if options.pop("ignore_gain", False) else []
        names = [name for name, _ in model.named_parameters()]
        self.model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Qwen2DecoderLayer}),
            use_orig_params=options.pop("use_orig_params", True),
            device_id=torch.device("cpu"),
            ignored_states=self.ignored or None,
            **fsdp_options(options),
        )
        wrapped = dict(self.model.named_parameters())
        shapes = fsdp1.full_shapes(self.model)
        self.shapes = {
            name: shapes.get(long, tuple(wrapped[long].shape))
            for name, long in zip(names, wrapped, strict=True)
        }
        shards = fsdp1.shards(list(wrapped), list(wrapped.values()), self.model)
        self.shards = dict(zip(names, shards, strict=True))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def publish(self) -> None:
        """There is one copy of the weights, so nothing is behind."""

    def step(self, batches: list[torch.Tensor], moment: Callable[[float], None]) -> None:
        mine = batches[dist.get_rank() :: dist.get_world_size()]
        self.optimizer.zero_grad()
        for at, batch in enumerate(mine):
            last = at + 1 == len(mine)
            with nullcontext() if last or not self.no_sync else self.model.no_sync():
                (self.model(batch) / len(mine)).backward()
        for parameter in self.ignored:
            dist.all_reduce(parameter.grad.div_(dist.get_world_size()))
        moment(1.0)
        if self.clip:
            self.model.clip_grad_norm_(self.clip)
        self.optimizer.step()

    def computing(self) -> dict[str, torch.Tensor]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
            return {
                name: parameter.detach().double().clone()
                for name, parameter in self.model.named_parameters()
            }


def fsdp_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of FSDP1 from names."""
    from torch.distributed.fsdp import CPUOffload, MixedPrecision, ShardingStrategy

    result = dict(options)
    if "strategy" in result:
        result["sharding_strategy"] = ShardingStrategy[result.pop("strategy")]
    if result.pop("hybrid", False):
        half = dist.get_world_size() // 2
        shard, _ = dist.new_subgroups(half)
        replicate, _ = dist.new_subgroups_by_enumeration(
            [[rank, rank + half] for rank in range(half)]
        )
        result["process_group"] = (shard, replicate)
        result["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
    if "reduce_dtype" in result:
        keep = result.pop("keep_low_precision", False)
        result["mixed_precision"] = MixedPrecision(
            param_dtype=torch.bfloat16,
            reduce_dtype=getattr(torch, result.pop("reduce_dtype")),
            keep_low_precision_grads=keep,
        )
    if result.pop("offload", False):
        result["cpu_offload"] = CPUOffload(offload_params=True)
    return result


def fsdp_variants(variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train in every variant and report how it went."""
    return {
        name: follow(Fsdp(options), options.get("clip", 0.0)) for name, options in variants.items()
    }


# --- injections ----------------------------------------------------------------------------------


class Given(dict[str, torch.Tensor]):
    """A delta for every attention and MLP tensor of the tiny model, as large as its gradients."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.items()}


def given_delta(plain: nn.Module) -> Given:
    language: Any = plain.get_submodule("language")
    return Given(
        {
            name: pattern_of(name, tuple(parameter.shape))
            for name, parameter in language.named_parameters()
            if "self_attn" in name or "mlp" in name
        }
    )


def injected_step(training: Training, injection: Any, scale: str, take: Callable[..., None]) -> Any:
    """Take a step with an injection of α = 0.5 and compare it with the restated formula."""
    from support import reference

    delta = given_delta(training.plain)
    batches = micro_batches(training.micro_batches * dist.get_world_size())
    wholes = whole_gradients(training.plain, batches)
    before = {name: p.detach().double() for name, p in training.plain.named_parameters()}
    take(batches)
    errors = Errors(
        targets=len(injection.targets), injected=injection.injected, steps=injection.steps
    )
    for name, shard in training.shards.items():
        expected = wholes[name].numpy()
        if name.removeprefix("language.") in delta:
            push = delta[name.removeprefix("language.")]
            expected = reference.inject(expected, push, alpha=0.5, scale=scale)
        after = gathered(shard, shard.weight(), training.shapes[name])
        motion = -LEARNING_RATE * torch.from_numpy(expected)
        errors.note_step("step", before[name], after, motion)
    return errors


def engine_injections(variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Attach to an engine, take a step, and detach."""
    from drift_fast.integrations.deepspeed_engine import attach_engine

    report = {}
    for name, options in variants.items():
        options = dict(options)
        scale = options.pop("scale")
        training = Engine(options)
        delta = given_delta(training.plain)
        choices = {"alpha": 0.5, "scale": scale}
        injection = attach_engine(training.engine, delta, **choices)
        step = partial(engine_step, training.engine)
        report[name] = dict(injected_step(training, injection, scale, step))
        report[name]["by hand"] = _refusal(injection.step)
        report[name]["second"] = _refusal(partial(attach_engine, training.engine, delta, **choices))
        if not isinstance(training.optimizer, torch.optim.Optimizer):
            wrapper = training.optimizer.step
            training.optimizer.step = MethodType(type(training.optimizer).step, training.optimizer)
            batches = micro_batches(dist.get_world_size() * training.micro_batches)
            report[name]["bypassed"] = _refusal(step, batches)
            training.optimizer.step = wrapper
        injection.remove()
        report[name]["restored"] = "step" not in vars(training.optimizer)
        training.engine.destroy()
    return report


def lost_steps(variants: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Attach to an engine and report what it says of steps that its weights lose."""
    from drift_fast.inject.motion.motion import PlannedMotion
    from drift_fast.integrations.deepspeed_engine import attach_engine

    report = {}
    for name, options in variants.items():
        options = dict(options)
        narrow = options.pop("narrow", False)
        training = Engine(options)
        if narrow:
            copies = training.optimizer.single_partition_of_fp32_groups
            copies[:] = [one.bfloat16() for one in copies]
        delta = given_delta(training.plain)
        with attach_engine(training.engine, delta) as injection:
            report[name] = injection.lost_steps.cause
        moved = PlannedMotion(
            training.engine.module, delta, progress=0.5, steps=2, optimizer=training.engine
        )
        with moved as motion:
            assert motion._lost_steps.cause == report[name]
        training.engine.destroy()
    return report


def fsdp_lost_steps() -> dict[str, str]:
    """Attach to FSDP1 of bfloat16 weights, and of float32 weights that compute in bfloat16."""
    from drift_fast import Injection

    report = {}
    for name, options in {"bfloat16": {}, "float32": {"reduce_dtype": "float32"}}.items():
        training = Fsdp({"dtype": name, **options})
        delta = given_delta(training.plain)
        optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Injection(training.model, delta, optimizer=optimizer).remove()
        report[name] = " ".join(str(one.message) for one in caught if "weights" in str(one.message))
    return report


def fsdp_injections(variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Attach to a model under FSDP1, take a step, and detach."""
    from drift_fast import Injection

    report = {}
    for name, options in variants.items():
        options = dict(options)
        scale = options.pop("scale")
        training = Fsdp(options)
        delta = given_delta(training.plain)
        injection = Injection(
            training.model, delta, alpha=0.5, scale=scale, optimizer=training.optimizer
        )

        def step(
            batches: list[torch.Tensor], training: Any = training, act: Any = injection
        ) -> None:
            training.step(batches, lambda factor: act.step())

        report[name] = dict(injected_step(training, injection, scale, step))
        injection.remove()
    return report


def overflow(stage: int) -> dict[str, Any]:
    """Take steps whose float16 gradients overflow, until the loss scale is low enough."""
    from drift_fast.integrations.deepspeed_engine import attach_engine

    scaling = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}
    training = Engine({"zero": {"stage": stage}, "fp16": scaling})
    options = {"alpha": 0.5, "scale": "absolute"}
    injection = attach_engine(training.engine, given_delta(training.plain), **options)
    name = "language.model.layers.0.mlp.up_proj.weight"
    shard, shape = training.shards[name], training.shapes[name]
    rows = []
    for _ in range(12):
        before = gathered(shard, shard.weight(), shape)
        engine_step(training.engine, micro_batches(dist.get_world_size()))
        rows.append(
            {
                "overflow": bool(training.optimizer.overflow),
                "moved": not torch.equal(before, gathered(shard, shard.weight(), shape)),
                "steps": injection.steps,
                "injected": injection.injected,
            }
        )
    injection.remove()
    return {"rows": rows, "targets": len(injection.targets)}


def unused(stage: int, offload: bool) -> dict[str, Any]:
    """Train without the last layer's MLP taking part, and say what its gradients are."""
    section: dict[str, Any] = {"stage": stage}
    if offload:
        section["offload_optimizer"] = {"device": "cpu"}
    training = Engine({"zero": section})
    layers = training.engine.module.get_submodule("language.model.layers")
    layers[-1].mlp.forward = lambda hidden: torch.zeros_like(hidden)
    report: dict[str, Any] = {}

    def moment(factor: float) -> None:
        for name, shard in training.shards.items():
            gradient = shard.gradient()
            held = shard.span[1] > shard.span[0]
            if not held:
                assert gradient is not None, name
                assert gradient.numel() == 0, name
            elif ".layers.1.mlp." in name or "layers.1.post_attention" in name:
                report[name] = "none" if gradient is None else float(gradient.abs().max())
            else:
                assert gradient is not None, name

    training.step(micro_batches(dist.get_world_size()), moment)
    training.engine.destroy()
    return report


def _refusal(call: Callable[..., Any], *arguments: Any) -> str:
    try:
        call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def engine_refusals(variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return how attaching is refused."""
    from drift_fast.integrations.deepspeed_engine import attach_engine

    report = {}
    for name, options in variants.items():
        options = dict(options)
        choices = options.pop("choices", {})
        spoiled = options.pop("spoiled", {})
        frozen = options.pop("left_out", False)
        engine, plain = make_engine(options, left_out=frozen)
        for attribute, value in spoiled.items():
            setattr(engine.optimizer, attribute, value)
        report[name] = _refusal(partial(attach_engine, engine, given_delta(plain), **choices))
        engine.destroy()
    return report


def fsdp_late_backward() -> dict[str, Any]:
    """Return what is said of optimizer steps on what backward wrote after the injection."""
    from drift_fast import Injection

    report = {}
    for set_to_none in (True, False):
        training = Fsdp({})
        optimizer = training.optimizer
        injection = Injection(training.model, given_delta(training.plain), optimizer=optimizer)
        training.model(micro_batches(1)[0]).backward()
        injection.step()
        training.model.clip_grad_norm_(0.1)
        report[f"{set_to_none}, clipped"] = _refusal(optimizer.step)
        for zeroed in (True, False):
            if zeroed:
                optimizer.zero_grad(set_to_none=set_to_none)
            training.model(micro_batches(1)[0]).backward()
            report[f"{set_to_none}, {zeroed}, late"] = _refusal(optimizer.step)
            injection.step()
            report[f"{set_to_none}, {zeroed}, injected"] = _refusal(optimizer.step)
        injection.remove()
    return report


def fsdp_refusals() -> dict[str, Any]:
    """Return how FSDP1 without original parameters, and a step inside no_sync(), are refused."""
    from drift_fast import Injection

    training = Fsdp({})
    injection = Injection(training.model, given_delta(training.plain))
    with training.model.no_sync():
        training.model(micro_batches(1)[0]).backward()
    flat = _refusal(Fsdp, {"use_orig_params": False})
    return {"no_sync": _refusal(injection.step), "flat": flat}
