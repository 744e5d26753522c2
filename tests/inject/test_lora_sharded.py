"""LoRA whose factors are sharded: each process pulls its own rows of Δ back, as one would all.

Four processes, so that a factor of three rows leaves one of them nothing. Each check runs on every
rank, beside a copy of the model that trains on the whole batch in one piece; what it found travels
to the tests as JSON. tests/parity compares the same ways of training with float64.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from drift_fast import Delta, DriftError, Injection, compute_delta
from drift_fast.inject.compute.cuda_graphs import CudaGraphs, Launch
from support import reference
from support.injection_models import (
    ATTENTION,
    MLP,
    Backbone,
    delta_towards,
    perturbed,
    regression_batch,
    regression_loss,
    saved,
    text_batch,
    tiny_qwen2,
    with_experts,
)
from support.joined import Joined, Report, launch
from support.sharded_workers import gathered

peft = pytest.importorskip("peft")

SCALES = ("absolute", "gradnorm", "adaptive", "project")
SHAPES: dict[str, dict[str, int]] = {
    "even": {"width": 8, "inner": 12},
    "uneven": {"width": 7, "inner": 5},
    "empty": {"width": 6, "inner": 1},
}
WEIGHTS = r"re:\.weight$"
PATIENCE = timedelta(seconds=60)
COUNT, LEARNING_RATE = 8, 0.1

Wrap = Callable[[Any], Any]


def adapted(shape: str, **options: Any) -> Any:
    """A model with adapters whose factors are not zero; `experts` in place of its MLPs if asked."""
    experts = options.pop("experts", False)
    options = {"r": 3, "lora_alpha": 6, "target_modules": [*ATTENTION, *MLP]} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = peft.LoraConfig(init_lora_weights=False, **options)
        return peft.get_peft_model(base(shape, experts=experts), config)


def base(shape: str, *, experts: bool = False) -> Backbone:
    model = Backbone(**SHAPES[shape])
    return with_experts(model) if experts else model


def mesh_of(*sizes: int, names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def fsdp2(model: Any, mesh: Any = None, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(dist.get_world_size()) if mesh is None else mesh
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp1(model: Any) -> Any:
    """Wrap as PEFT advises: what trains apart from what is frozen."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy

    def trains(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return weight is not None and weight.requires_grad and not list(module.children())

    policy = functools.partial(
        _or_policy, policies=[functools.partial(lambda_auto_wrap_policy, lambda_fn=trains)]
    )
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def in_layers(model: Any) -> Any:
    """Wrap whole decoder layers with FSDP1, adapters and all."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.base_model.model.model.layers[0])})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def bases_apart(model: Any) -> Any:
    """Apply fully_shard to every adapted weight on its own."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(dist.get_world_size())
    for module in list(model.modules()):
        if hasattr(module, "base_layer"):
            fully_shard(module.base_layer, mesh=mesh)
    return fsdp2(model, mesh)


def both(model: Any) -> Any:
    """Tensor parallelism of two with FSDP2 of two: the thin factors are whole or sharded."""
    mesh = mesh_of(2, 2, names=("data", "model"))
    return fsdp2(tensor_parallel(model, mesh["model"]), mesh["data"])


def tensor_parallel(model: Any, mesh: Any) -> Any:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", *_UP):
        plan |= {
            f"{name}.base_layer": ColwiseParallel(),
            f"{name}.lora_B.default": ColwiseParallel(),
        }
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan |= {
            f"{name}.base_layer": RowwiseParallel(),
            f"{name}.lora_A.default": RowwiseParallel(),
        }
    for layer in model.base_model.model.model.layers:
        parallelize_module(layer, mesh, plan)
    return model


_UP = ("mlp.gate_proj", "mlp.up_proj")


class Twins:
    """A sharded model and one that is not, each with an injection of the same options."""

    def __init__(
        self,
        folder: Path,
        shape: str,
        wrap: Wrap = fsdp2,
        *,
        change: Callable[[Any], None] | None = None,
        dtype: torch.dtype = torch.float32,
        adapter: dict[str, Any] | None = None,
        delta: str = "delta",
        **options: Any,
    ) -> None:
        self.plain = adapted(shape, **(adapter or {})).to(dtype)
        if change is not None:
            change(self.plain)
        self.model = wrap(copy.deepcopy(self.plain))
        self.shape = shape
        given = Delta.open(folder / shape / delta)
        options = {"modules": WEIGHTS} | options
        elsewhere = {"residency", "prefetch"} if options.get("residency") == "disk" else set()
        self.alone = Injection(
            self.plain, given, **{key: v for key, v in options.items() if key not in elsewhere}
        )
        self.injection = Injection(self.model, given, **options)
        self.optimizers = [
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
            for model in (self.plain, self.model)
        ]

    def backward(
        self,
        step: int = 0,
        *,
        share: int | None = None,
        shares: int = 0,
        in_place: bool = False,
    ) -> None:
        share = dist.get_rank() if share is None else share
        width = SHAPES[self.shape]["width"]
        batch = regression_batch(COUNT, width=width, seed=30 + step)
        for model, parts in ((self.model, shares or dist.get_world_size()), (self.plain, 1)):
            model.zero_grad(set_to_none=not in_place)
            which = share if parts > 1 else 0
            regression_loss(model, tuple(t.chunk(parts)[which] for t in batch)).backward()

    def inject(self) -> None:
        self.injection.step()
        self.alone.step()

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def remove(self) -> None:
        self.injection.remove()
        self.alone.remove()

    def error(self) -> float:
        """The largest relative error of a trained weight; every process must call it."""
        worst = 0.0
        wanted = dict(self.plain.named_parameters())
        for name, found in wholes(self.model).items():
            if wanted[name].requires_grad:
                error = float((found.double() - wanted[name].double()).norm() / wanted[name].norm())
                # NaN is no smaller than anything.
                worst = worst if error <= worst else error
        return worst

    def nbytes(self) -> tuple[int, int]:
        """Bytes of Δ on this process, and without sharding."""
        here, alone = (
            sum(group.store.nbytes for group in injection._groups)
            for injection in (self.injection, self.alone)
        )
        return here, alone


def wholes(model: Any) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for name, p in model.named_parameters()
            }
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def followed(twins: Twins, steps: int = 2, **share: int) -> Report:
    """Train with both for some steps; return how far apart they end, and what they tell."""
    for step in range(steps):
        twins.backward(step, **share)
        twins.inject()
        twins.update()
    report = {
        "error": twins.error(),
        "metrics": [twins.injection.metrics(), twins.alone.metrics()],
        "counts": [[one.injected, one.skipped] for one in (twins.injection, twins.alone)],
        "nbytes": twins.nbytes(),
        "groups": sorted(len(group.shards[0].process_groups) for group in twins.injection._groups),
    }
    twins.remove()
    return report


BF16 = {"bf16": {"enabled": True}}
FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
ZERO: dict[str, dict[str, Any]] = {
    "stage 1, accumulation 4": {"stage": 1, "config": {"gradient_accumulation_steps": 4}},
    "stage 2, bfloat16": {"stage": 2, "config": BF16},
    "stage 1, bfloat16, float32 sums": {"stage": 1, "config": BF16 | FLOAT32_SUMS},
    "stage 2, float16": {"stage": 2, "config": {"fp16": {"enabled": True, "loss_scale": 128}}},
    "stage 2, offloaded": {"stage": 2, "section": {"offload_optimizer": {"device": "cpu"}}},
    "stage 3": {"stage": 3, "section": {"stage3_param_persistence_threshold": 0}},
    "stage 3, small parameters kept, bfloat16": {"stage": 3, "config": BF16},
    "stage 3, frozen A": {"stage": 3, "frozen": "lora_A"},
    "stage 3, DoRA": {"stage": 3, "section": {"stage3_param_persistence_threshold": 0}},
    "stage 3, DoRA, small parameters kept, bfloat16": {"stage": 3, "config": BF16},
    "stage 2, frozen B": {"stage": 2, "frozen": "lora_B"},
    "stage 0, bfloat16": {"stage": 0, "config": BF16},
}


# --- what every rank does ----------------------------------------------------------------------


def check_scales(folder: Path) -> Report:
    cells = [("even", "adaptive"), ("empty", "adaptive")] + [("uneven", s) for s in SCALES]
    return {
        f"{shape}, {scale}": followed(Twins(folder, shape, scale=scale, alpha=0.5))
        for shape, scale in cells
    }


def check_ways(folder: Path) -> Report:
    hybrid = functools.partial(fsdp2, mesh=mesh_of(2, 2, names=("replicate", "shard")))
    return {
        "FSDP1": followed(Twins(folder, "uneven", fsdp1)),
        "hybrid": followed(Twins(folder, "uneven", hybrid)),
        "tensor parallel": followed(
            Twins(folder, "even", both), share=dist.get_rank() // 2, shares=2
        ),
    }


def check_variants(folder: Path) -> Report:
    """Few factors at a time, Δ on disk, one frozen factor, 16 bits, copies of whole modules."""

    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)

    report: Report = {}
    with mock.patch("drift_fast.inject.lora.group._ROOM", 40):
        report["in parts"] = followed(Twins(folder, "uneven"))
    with mock.patch("drift_fast.inject.placement.load.SMALL", 1):
        report["on disk"] = followed(Twins(folder, "uneven", residency="disk", prefetch=1), 3)
    report["frozen"] = followed(Twins(folder, "uneven", change=freeze))
    report["frozen, FSDP1"] = followed(Twins(folder, "uneven", fsdp1, change=freeze))
    report["bfloat16"] = followed(Twins(folder, "uneven", dtype=torch.bfloat16), 1)
    report["float16"] = followed(Twins(folder, "uneven", dtype=torch.float16), 1)
    mixed = {"target_modules": list(ATTENTION), "modules_to_save": ["up_proj"]}
    report["copies"] = followed(Twins(folder, "even", adapter=mixed, strict=False), 2)
    for where in ("even", "uneven"):
        report[f"experts, {where}"] = followed(
            Twins(folder, where, adapter=EXPERTS, delta="experts", modules="re:experts")
        )
    return report


EXPERTS = {
    "experts": True,
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


def check_replayed(folder: Path) -> Report:
    """What is launched between sums, as one from the third step on."""
    mixed = {"target_modules": list(ATTENTION), "modules_to_save": ["up_proj"]}
    ways: dict[str, tuple[Wrap, dict[str, Any]]] = {
        "FSDP2": (fsdp2, {}),
        "FSDP1": (fsdp1, {}),
        "copies": (fsdp2, {"adapter": mixed, "strict": False}),
    }
    report: Report = {}
    for name, (wrap, options) in ways.items():
        few = mock.patch("drift_fast.inject.lora.group._ROOM", 40)
        with few, as_tapes():
            twins = Twins(folder, "even", wrap, **options)
            groups = twins.injection._groups
            for group in groups:
                group._graphs = CudaGraphs(torch.device("cpu"))
            counts = []
            for step in range(6):
                twins.backward(step, in_place=True)
                twins.inject()
                twins.update()
                counts.append([group._graphs.replayed for group in groups])
            runs = [len(getattr(group, "_runs", ())) for group in groups]
            report[name] = {"error": twins.error(), "counts": counts, "runs": runs}
            twins.remove()
    return report


@contextlib.contextmanager
def as_tapes() -> Iterator[None]:
    """Let the CPU capture: a tape launches again what was launched then, on the same tensors."""

    def captured(self: CudaGraphs, launch: Launch) -> Any:
        return mock.Mock(replay=launch.capture)

    always = mock.patch("drift_fast.inject.target_group.may_capture", return_value=True)
    with always, mock.patch.object(CudaGraphs, "_captured", captured):
        yield


def check_faults(folder: Path) -> Report:
    """A gradient that one process lacks, and one that is not finite there alone."""
    twins = Twins(folder, "even")
    twins.backward()
    name = "base_model.model.model.layers.0.mlp.gate_proj.lora_B.default.weight"
    if dist.get_rank() == 1:
        twins.model.get_parameter(name).grad = None
    report: Report = {"lacking": refusal(twins.injection.step)}
    twins.backward()
    shard = twins.injection._groups[0].shards[0]
    odd = mock.patch.object(shard, "gradients", side_effect=DriftError("not reduced yet"))
    with odd if dist.get_rank() == 1 else contextlib.nullcontext():
        report["not reduced"] = refusal(twins.injection.step)
    twins.backward()
    if dist.get_rank() == 1:
        twins.model.get_parameter(name).grad.to_local()[0, 0] = torch.nan
    twins.plain.get_parameter(name).grad.fill_(torch.nan)
    twins.inject()
    report["not finite"] = [twins.injection.skipped, twins.injection.injected]
    twins.remove()
    return report


def check_doras(folder: Path) -> Report:
    """DoRAs of sharded weights, and those that PEFT itself does not train."""

    def magnify(model: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    # Other than the norms of rows, from which they start.
                    parameter *= torch.linspace(0.5, 1.5, len(parameter))

    hybrid = functools.partial(fsdp2, mesh=mesh_of(2, 2, names=("replicate", "shard")))
    twins = functools.partial(Twins, folder, adapter={"use_dora": True}, change=magnify)
    report: Report = {f"FSDP2, {shape}": followed(twins(shape)) for shape in SHAPES}
    report |= {f"FSDP1, {shape}": followed(twins(shape, in_layers)) for shape in SHAPES}
    report["hybrid"] = followed(twins("uneven", hybrid))
    with mock.patch("drift_fast.inject.lora.dora._BLOCK", 15):
        # Blocks of two rows, which processes hold parts of.
        report["in blocks"] = followed(twins("uneven", in_layers))
    apart: dict[str, Wrap] = {
        "A": fsdp1,
        "weight": bases_apart,
        "tensor parallel": lambda model: tensor_parallel(model, mesh_of(dist.get_world_size())),
        "and FSDP2": both,
    }
    batch = regression_batch(COUNT, width=SHAPES["even"]["width"], seed=30)
    for way, wrap in apart.items():
        model = wrap(adapted("even", use_dora=True))
        attach = functools.partial(Injection, model, Delta.open(folder / "even" / "delta"))
        report[way] = [
            refusal(functools.partial(attach, modules=WEIGHTS)),
            refusal(functools.partial(regression_loss, model, batch)),
        ]
    return report


def check_state(folder: Path) -> Report:
    """A run that goes on from a saved state."""
    twins = Twins(folder, "uneven")
    twins.backward()
    twins.inject()
    twins.update()
    state, before = twins.injection.state_dict(), twins.injection.metrics()["progress"]
    twins.injection.remove()
    again = Injection(twins.model, Delta.open(folder / "uneven" / "delta"), modules=WEIGHTS)
    zero = again.metrics()["progress"]
    again.load_state_dict(state)
    report = {"before": before, "zero": zero, "after": again.metrics()["progress"]}
    again.remove()
    twins.alone.remove()
    return report


def check_zero(folder: Path) -> Report:
    """The gradients that DeepSpeed steps, against the equations with the master weights."""
    from drift_fast import attach
    from support.sharded_workers import quiet_deepspeed

    deepspeed = quiet_deepspeed()
    delta = Delta.open(folder / "uneven" / "delta")
    report: Report = {}
    for name, options in ZERO.items():
        model = adapted("uneven", use_dora="DoRA" in name)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(
                parameter.requires_grad and options.get("frozen", "-") not in key
            )
        trained = [p for p in model.parameters() if p.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": options["stage"]} | options.get("section", {}),
        } | options.get("config", {})
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(trained, lr=LEARNING_RATE), config=config
        )
        report[name] = {"error": 0.0}
        for scale in SCALES:
            injection = attach(engine, delta, modules=WEIGHTS, alpha=0.5, scale=scale)
            report[name]["lost"] = injection.lost_steps.cause
            report[name]["nbytes"] = sum(group.store.nbytes for group in injection._groups)
            error = _zero_step(engine, injection, delta, scale)
            report[name]["error"] = max(report[name]["error"], error)
            injection.remove()
        engine.destroy()
    return report


def check_quantized(folder: Path) -> Report:
    """A base in 4 bits under FSDP2 and ZeRO-2, beside one process; the movement of every factor."""
    from drift_fast import attach
    from support.sharded_workers import quiet_deepspeed

    deepspeed = quiet_deepspeed()
    batch, rank, size = text_batch(8), dist.get_rank(), dist.get_world_size()
    share = {key: rows.chunk(size)[rank] for key, rows in batch.items()}
    options: dict[str, Any] = {"modules": r"re:_proj\.weight$", "scale": "gradnorm"}
    delta = Delta.open(folder / "quantized" / "delta")

    def in_four_bits() -> tuple[Any, torch.optim.Optimizer]:
        model = _in_four_bits(folder / "quantized" / "base")
        # Far enough that float32 weights tell how far.
        return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)

    plain, optimizer = in_four_bits()
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    with Injection(plain, delta, **options) as injection:
        plain(**batch).loss.backward()
        injection.step()
        optimizer.step()

    def error(model: Any) -> float:
        found = wholes(model)
        moved = {n: p.detach() - start[n] for n, p in plain.named_parameters() if p.requires_grad}
        return max(float((found[n] - start[n] - m).norm() / m.norm()) for n, m in moved.items())

    model = fsdp2(in_four_bits()[0])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    with Injection(model, delta, **options) as injection:
        model(**share).loss.backward()
        injection.step()
        optimizer.step()
    report: Report = {"FSDP2": error(model)}
    model, optimizer = in_four_bits()
    config = {
        "train_micro_batch_size_per_gpu": len(share["labels"]),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # It would clip otherwise.
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    attach(engine, delta, **options)
    engine.backward(engine(**share).loss)
    engine.step()
    report["ZeRO-2"] = error(engine.module)
    return report


def _in_four_bits(base: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        targets = [*ATTENTION, *MLP]
        config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model, config)


def _zero_step(engine: Any, injection: Any, delta: Delta, scale: str) -> float:
    """Take a step of two micro-batches; return the largest error of what was injected."""
    inject, errors = injection._scope.step, []

    def watched() -> None:
        targets = [
            (target, shard)
            for group in injection._groups
            for target, shard in zip(group.targets, group.shards, strict=True)
        ]
        before = [_joint(shard) for _, shard in targets]
        factor = injection._driver.loss_scale(torch.device("cpu")) or 1.0
        inject()
        for (target, shard), start in zip(targets, before, strict=True):
            pulled = _pulled_back(shard, delta[target.delta_name].double())
            expected = reference.inject(start / factor, pulled, alpha=0.5, scale=scale)
            found = _joint(shard) / factor
            size = start.norm() / factor + (start / factor - torch.from_numpy(expected)).norm()
            errors.append(float((found - torch.from_numpy(expected)).norm() / size))

    with mock.patch.object(injection._scope, "step", watched):
        for step in range(int(engine.gradient_accumulation_steps())):
            batch = regression_batch(COUNT, width=7, seed=60 + step)
            share = tuple(part.chunk(dist.get_world_size())[dist.get_rank()] for part in batch)
            engine.backward(regression_loss(engine.module, share))
            engine.step()
    assert errors
    return max(errors)


def _joint(shard: Any) -> torch.Tensor:
    """The gradients of a weight's trained factors, whole, as one vector."""
    whole = []
    for at in shard._trained:
        own, shape = shard._shards[at], shard.adapted.shapes[at]
        gradient = own.gradient()
        assert gradient is not None
        whole.append(gathered(own, gradient, shape).reshape(-1))
    return torch.cat(whole)


def _pulled_back(shard: Any, delta: torch.Tensor) -> torch.Tensor:
    a, b, *magnitudes = (
        gathered(own, own.weight(), shape)
        for own, shape in zip(shard._shards, shard.adapted.shapes, strict=True)
    )
    parts, scaled = [], 2.0 * delta
    for m in magnitudes:
        v = gathered(shard._base, shard._base.weight(), delta.shape) + 2.0 * b @ a
        norms = v.norm(dim=1)
        parts, scaled = [(delta * v).sum(1) / norms], (m / norms)[:, None] * scaled
    parts = [b.T @ scaled, scaled @ a.T, *parts]
    return torch.cat([parts[at].reshape(-1) for at in shard._trained])


CHECKS = [
    check_scales,
    check_ways,
    check_variants,
    check_replayed,
    check_faults,
    check_doras,
    check_state,
]


# --- what is expected of it --------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Report]]:
    return run(tmp_path_factory.mktemp("four"), CHECKS)


@pytest.fixture(scope="module")
def of_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    return run(tmp_path_factory.mktemp("zero"), [check_zero])["check_zero"]


@pytest.fixture(scope="module")
def in_four_bits(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    folder = tmp_path_factory.mktemp("four-bits")
    text, moved = (tiny_qwen2(hidden_size=64, intermediate_size=128) for _ in range(2))
    moved.load_state_dict(perturbed(dict(text.state_dict()), seed=11))
    base = saved(text, folder / "quantized" / "base")
    compute_delta(saved(moved, folder / "expert"), base, folder / "quantized" / "delta")
    return run(folder, [check_quantized])["check_quantized"]


def run(folder: Path, checks: Sequence[Callable[[Path], Report]]) -> dict[str, list[Report]]:
    """Run checks in joined processes; return what each rank reports, by check."""
    for name in SHAPES:
        for experts, kept in ((False, "delta"), (True, "experts")):
            where = folder / name
            delta_towards(where / f"of {kept}", base(name, experts=experts)).save(where / kept)
    jobs = {check.__name__: (check, (folder,)) for check in checks}
    found = launch(folder, jobs, Joined(4, patience=PATIENCE))
    return {name: [report[name] for report in found] for name in jobs}


def assert_followed(row: Report, bound: float = 1e-6) -> None:
    assert row["error"] <= bound
    (injected, skipped), alone = row["counts"]
    assert [injected, skipped] == alone
    assert injected > 0
    here, one = row["metrics"]
    here = {name.replace("_fsdp_wrapped_module.", ""): value for name, value in here.items()}
    assert here.keys() == one.keys()
    for name, value in one.items():
        assert here[name] == pytest.approx(value, rel=max(1e-4, bound), abs=max(1e-6, bound)), name


def test_factors_move_as_those_of_one_process(reports: dict[str, list[Report]]) -> None:
    for report in reports["check_scales"]:
        for key, row in report.items():
            assert_followed(row), key
            assert row["groups"] == [1]


def assert_replayed(reports: Sequence[Report]) -> None:
    for report in reports:
        for name, row in report.items():
            assert row["error"] <= 1e-6, name
            counts = row["counts"]
            for which, runs in enumerate(row["runs"]):
                assert runs == 0 or runs > 2
                # Factors are put together, pulled back and kept, run by run; measured; changed.
                each = 3 * runs + 2
                assert counts[0][which] == counts[1][which] == 0
                assert all(counts[at][which] - counts[at - 1][which] >= each for at in (4, 5))


def test_what_is_launched_between_sums_is_replayed(reports: dict[str, list[Report]]) -> None:
    assert_replayed(reports["check_replayed"])


def test_each_process_holds_its_share_of_delta(reports: dict[str, list[Report]]) -> None:
    found = reports["check_scales"]
    alone = found[0]["even, adaptive"]["nbytes"][1]
    held = [report["even, adaptive"]["nbytes"][0] for report in found]
    assert sum(held) == alone
    assert max(held) <= 1.05 * alone / 4
    for shape in SHAPES:
        held = [report[f"{shape}, adaptive"]["nbytes"][0] for report in found]
        assert sum(held) == found[0][f"{shape}, adaptive"]["nbytes"][1]


@pytest.mark.parametrize(
    ("way", "groups"), [("FSDP1", [1]), ("hybrid", [1]), ("tensor parallel", [2])]
)
def test_other_ways_of_sharding_are_followed(
    reports: dict[str, list[Report]], way: str, groups: Sequence[int]
) -> None:
    for report in reports["check_ways"]:
        assert_followed(report[way])
        assert report[way]["groups"] == groups
    held = [report[way]["nbytes"] for report in reports["check_ways"]]
    # Of a hybrid's two replicas each has all of it.
    assert sum(here for here, _ in held) == held[0][1] * (2 if way == "hybrid" else 1)


@pytest.mark.parametrize(
    ("variant", "bound"),
    [
        ("in parts", 1e-6),
        ("on disk", 1e-6),
        ("frozen", 1e-6),
        ("frozen, FSDP1", 1e-6),
        # Gradients of half a batch each, rounded before they are added up.
        ("bfloat16", 2.0**-7),
        ("float16", 2.0**-10),
        ("copies", 1e-6),
        ("experts, even", 1e-6),
        ("experts, uneven", 1e-6),
    ],
)
def test_variants_of_sharded_factors_are_followed(
    reports: dict[str, list[Report]], variant: str, bound: float
) -> None:
    for report in reports["check_variants"]:
        if bound < 1e-3:
            assert_followed(report[variant], bound)
        else:
            assert report[variant]["error"] <= bound
            assert report[variant]["counts"][0] == report[variant]["counts"][1]


def test_what_one_process_lacks_stops_all(reports: dict[str, list[Report]]) -> None:
    for rank, report in enumerate(reports["check_faults"]):
        reason = "1 of 14 targets have no gradient" if rank == 1 else "another process"
        assert reason in report["lacking"]
        assert ("not reduced yet" if rank == 1 else "another process") in report["not reduced"]
        skipped, injected = report["not finite"]
        assert (skipped, injected) == (1, 13)


@pytest.mark.parametrize(
    "way",
    [*(f"{way}, {shape}" for way in ("FSDP2", "FSDP1") for shape in SHAPES), "hybrid", "in blocks"],
)
def test_doras_of_sharded_weights_are_followed(reports: dict[str, list[Report]], way: str) -> None:
    for report in reports["check_doras"]:
        assert_followed(report[way])
        # torch may take an equal mesh, with other groups of the same processes, from a cache.
        assert set(report[way]["groups"]) == {1}
    held = [report[way]["nbytes"] for report in reports["check_doras"]]
    # Of a hybrid's two replicas each has all of it.
    assert sum(here for here, _ in held) == held[0][1] * (2 if way == "hybrid" else 1)
    if way.endswith(", even"):
        assert max(here for here, _ in held) <= held[0][1] / 3


@pytest.mark.parametrize(
    ("way", "remedy"),
    [
        ("A", "wrap whole decoder layers"),
        ("weight", "wrap whole decoder layers"),
        ("tensor parallel", "FSDP1 or ZeRO-3 alone, or train with use_dora=False"),
        ("and FSDP2", "FSDP1 or ZeRO-3 alone, or train with use_dora=False"),
    ],
)
def test_a_dora_is_refused_where_peft_itself_does_not_train_it(
    reports: dict[str, list[Report]], way: str, remedy: str
) -> None:
    for report in reports["check_doras"]:
        refused, of_peft = report[way]
        assert refused.startswith("DriftError")
        assert "q_proj" in refused
        assert remedy in refused
        assert of_peft.startswith(("IndexError", "RuntimeError"))


def test_progress_goes_on_from_a_saved_state(reports: dict[str, list[Report]]) -> None:
    for report in reports["check_state"]:
        assert report["zero"] == 0.0
        assert report["before"] != 0.0
        assert report["after"] == pytest.approx(report["before"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("variant", ZERO)
def test_what_deepspeed_steps_follows_the_equations(
    of_deepspeed: list[Report], variant: str
) -> None:
    rows = [report[variant] for report in of_deepspeed]
    rounds = "16" in variant and "float32" not in variant
    assert max(row["error"] for row in rows) <= (2.0**-8 if rounds else 1e-6)
    # There are float32 masters.
    assert {row["lost"] for row in rows} == {""}
    held = [row["nbytes"] for row in rows]
    if "stage 0" in variant or "float32 sums" in variant:
        # Gradients are whole on every process, and so is Δ.
        assert min(held) == max(held)
    else:
        whole = of_deepspeed[0]["stage 0, bfloat16"]["nbytes"]
        assert sum(held) == whole
        # Parts differ by a row of each weight at most.
        assert max(held) <= whole / 4 + 4 * 7 * 14


@pytest.mark.slow
@pytest.mark.parametrize("way", ["FSDP2", "ZeRO-2"])
def test_adapters_of_a_base_in_four_bits_are_followed(
    request: pytest.FixtureRequest, way: str
) -> None:
    for package in ("bitsandbytes", "deepspeed"):
        pytest.importorskip(package)
    for report in request.getfixturevalue("in_four_bits"):
        assert report[way] < 1e-5
