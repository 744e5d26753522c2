"""What an injection cannot reach: refused at attachment, with a remedy.

A target that stayed out unnoticed would train without Δ.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from drift_fast.delta.protocol import DeltaLike, on_disk
from drift_fast.errors import DriftError
from drift_fast.inject.config import InjectionConfig, ResidencyOptions, TargetOptions
from drift_fast.inject.lora.shard import FactorShard
from drift_fast.inject.shards.base import Shard, Whole
from drift_fast.inject.target import Target
from drift_fast.options import Options
from drift_fast.selection import Selection, pattern_of

# Packages whose parameters hold a weight as codes; one that trains is not among those refused.
_PACKERS = ("bitsandbytes", "torchao", "quanto", "optimum", "hqq")
_PACKED = (
    "packed weights do not train: add LoRA adapters with PEFT to the modules that Δ is for "
    "(target_modules of the LoraConfig), leave these out with modules=… or layers=…, or load the "
    "model without quantization"
)
# How modules of quantized models call what they hold in place of a weight.
_CODES = re.compile(r"(^|\.)(qweight|qzeros|weight_packed|W_q|weight_scale(_inv)?|\w+_blocks)$")


def statement(options: Options, targets: Sequence[Target], delta: DeltaLike) -> list[str]:
    """Return what all processes that train together must attach alike, a line for each thing.

    Each may keep Δ in a place of its own. What is selected shows in the targets. Functions have no
    text that is the same in all processes.
    """
    own = {*ResidencyOptions.names(), *TargetOptions.names()}
    given = {name: getattr(options, name) for name in options.names() if name not in own}
    stored = on_disk(delta)
    rows = [] if stored is None else [row for row in stored.stats if row.name in delta.shapes]
    dtype = getattr(delta, "stored_dtype", None)
    return [
        *(f"{name}={value!r}" for name, value in given.items() if not callable(value)),
        *(f"{one.name} {list(one.shape)} for Δ of {one.delta_name}" for one in targets),
        f"Δ in {dtype}",
        *(f"‖Δ‖² = {row.delta_sq:.6g} of {row.name}" for row in rows),
    ]


def check_trainable(targets: Sequence[Target], model: nn.Module, *, loaded: bool = True) -> None:
    """Refuse parameters that no optimizer can train, whatever requires a gradient.

    loaded: whether weights must be there by now; before a model is sharded they may not be.

    Raises:
        DriftError: packed, complex or without data, or of an embedding with sparse gradients.
    """
    sparse = {
        id(parameter)
        for module in model.modules()
        if getattr(module, "sparse", False) is True
        for parameter in module.parameters(recurse=False)
    }
    reasons: dict[str, str] = {}
    for target in targets:
        for parameter in target.trained:
            reason = _why_untrainable(parameter, model, loaded=loaded)
            if reason is None and id(parameter) in sparse:
                reason = (
                    "its module asks for sparse gradients, and Δ is dense: build the embedding "
                    "with sparse=False, or leave it out with modules=…"
                )
            if reason is not None:
                reasons.setdefault(target.name, reason)
    if reasons:
        name, reason = next(iter(reasons.items()))
        raise DriftError(
            f"{len(reasons)} of {len(targets)} targets cannot be trained, {name} first: {reason}"
        )


def _why_untrainable(parameter: nn.Parameter, model: nn.Module, *, loaded: bool) -> str | None:
    kind, dtype = type(parameter), str(parameter.dtype).removeprefix("torch.")
    if not parameter.requires_grad and kind.__module__.split(".")[0] in _PACKERS:
        return f"it is a {kind.__name__} of {kind.__module__.split('.')[0]}, and {_PACKED}"
    if parameter.is_complex():
        return (
            f"it is {dtype}, and Δ is a real direction: hold it as real numbers "
            "(torch.view_as_real), or leave it out with modules=…"
        )
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        return f"it is {dtype}, and {_PACKED}"
    if parameter.is_inference():
        return (
            "it was made under torch.inference_mode, and such tensors do not train: load the model "
            "outside of it"
        )
    if parameter.is_meta and loaded:
        if _is_offloaded(model):
            return (
                "it is on the meta device, offloaded by Accelerate, so that its weights are there "
                'only while a layer computes: load the model without device_map (or with "cuda" '
                "alone) and without cpu_offload or disk_offload, and train with residency=, FSDP "
                "or ZeRO where memory is short"
            )
        return (
            "it is on the meta device and has no data: load the weights first, with "
            "from_pretrained, or to_empty and load_state_dict, and make adapters without "
            "low_cpu_mem_usage"
        )
    return None


def _is_offloaded(model: nn.Module) -> bool:
    """Whether Accelerate brings weights of a model in for each layer, and takes them out again."""
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    each = [one for hook in hooks for one in getattr(hook, "hooks", (hook,))]
    return any(getattr(hook, "offload", False) for hook in each)


def packing_of(model: nn.Module) -> str:
    """Return what to do with a model whose weights are stored as codes; empty where none are."""
    names = itertools.chain(model.named_parameters(), model.named_buffers())
    found = next((name for name, _ in names if _CODES.search(name)), None)
    return "" if found is None else f"the model is quantized ({found}), and {_PACKED}"


def check_trained(targets: Sequence[Target], model: nn.Module) -> None:
    """Refuse frozen targets.

    Raises:
        DriftError: a target does not require a gradient.
    """
    frozen = [target.name for target in targets if not target.parameter.requires_grad]
    if frozen:
        remedy = "unfreeze it, or leave it out with modules=… or layers=…"
        if prompts := _prompts_of(model):
            remedy = (
                f"PEFT's {prompts} trains prompts and none of the model's weights; train with LoRA "
                "(peft.LoraConfig) instead"
            )
        elif any(target.adapted is not None for target in targets):
            trains = {target.delta_name: target.parameter.requires_grad for target in targets}
            pattern = pattern_of(name for name, does in trains.items() if does)
            selection = Selection.parse(pattern, None)
            fits = all((name in selection) == does for name, does in trains.items())
            told = f'modules="{pattern}" or ' if fits else ""
            remedy = (
                f"inject into what trains only, with {told}strict=False; or add its module to "
                "target_modules of the LoraConfig"
            )
        raise DriftError(
            f"{len(frozen)} of {len(targets)} targets are frozen (requires_grad is False), "
            f"{frozen[0]} first: {remedy}"
        )


def _prompts_of(model: nn.Module) -> str:
    """Return the kind of prompts that PEFT trains in place of weights, or nothing."""
    for module in model.modules():
        config: Any = getattr(module, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            return str(config.peft_type.value)
    return ""


def frozen_since(targets: Sequence[Target], of: int | None = None) -> DriftError | None:
    """Return the refusal of targets that were frozen after attaching, None if there are none.

    of: how many targets there are, if these are not all.
    """
    frozen = [target for target in targets if not target.trains]
    if not frozen:
        return None
    remedy = (
        "unfreeze them; if an adapter has frozen them, attach after the model was wrapped; or call "
        "injection.remove() and attach again to what trains, with modules=… or layers=…; or pass "
        'missing_gradients="skip" where layers are frozen for some steps only, as with LISA'
    )
    if frozen[0].adapted is not None:
        remedy = (
            "Δ is pulled back onto both factors, so train both: freeze no lora_A (as LoRA-FA "
            "does), or call injection.remove()"
        )
    return DriftError(
        f"{len(frozen)} of {of or len(targets)} targets were frozen after attaching "
        f"(requires_grad is False), {frozen[0].name} first: {remedy}"
    )


def check_optimized(targets: Sequence[Target], optimizer: torch.optim.Optimizer) -> None:
    """Refuse targets that the optimizer does not step.

    Raises:
        DriftError: a target is in none of its parameter groups.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    absent = [t.name for t in targets if any(id(p) not in held for p in t.trained)]
    if absent:
        raise DriftError(
            f"{len(absent)} of {len(targets)} targets are not in the optimizer, {absent[0]} first: "
            "build the optimizer from this model's parameters, or leave them out with modules=… "
            "or layers=…"
        )


def check_adapted(targets: Sequence[Target], config: InjectionConfig) -> None:
    """Refuse what has no meaning where weights move through adapters' factors.

    Raises:
        DriftError: such an option, and an adapted target.
    """
    adapted = next((target for target in targets if target.adapted is not None), None)
    if adapted is None:
        return
    reasons = {
        'scope="microbatch"': 'whose own gradient is never formed: use scope="step"',
        "rescale": "whose norm, including a quantized part, is not known: leave it out",
    }
    given = (config.scope == "microbatch", config.rescale is not None)
    for option, reason in itertools.compress(reasons.items(), given):
        raise DriftError(f"{option} is not for {adapted.name}, an adapted weight {reason}")


def check_doras(targets: Sequence[Target], shards: Sequence[Shard]) -> None:
    """Refuse DoRAs whose weights are sharded in a way that PEFT does not train, or by columns.

    Raises:
        DriftError: such a target.
    """
    for target, shard in zip(targets, shards, strict=True):
        if isinstance(shard, FactorShard) and shard.misfit:
            raise DriftError(
                f"{target.name} has a DoRA adapter and is sharded ({shard.misfit}) otherwise than "
                "its factors, or not by rows. Under tensor parallelism PEFT cannot train it: shard "
                "weight, A, B and magnitudes with fully_shard, FSDP1 or ZeRO-3 alone, or train "
                "with use_dora=False"
            )


def check_sharding(
    targets: Sequence[Target], shards: Sequence[Shard], config: InjectionConfig
) -> None:
    """Refuse options that need whole, final gradients inside backward where there are none.

    Raises:
        DriftError: a scope or an overlap that this way of training does not allow.
    """
    if config.scope == "step" and not config.overlap:
        return
    what = "overlap=True" if config.scope == "step" else f'scope="{config.scope}"'
    for target, shard in zip(targets, shards, strict=True):
        if not (shard.is_whole if isinstance(shard, FactorShard) else isinstance(shard, Whole)):
            raise DriftError(
                f"{what} needs whole gradients inside backward, and {target.name} is sharded "
                f"({shard.sharding}): a hook there sees a part, or never runs. Use "
                'scope="step" and overlap=False, or train with DDP or on one device'
            )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    whole_weights = any(target.adapted is None for target in targets)
    several = distributed and torch.distributed.get_world_size() > 1
    if config.overlap and whole_weights and several:
        raise DriftError(
            "overlap=True needs gradients that are final inside backward; with several processes "
            "they are reduced after it. Use overlap=False"
        )
