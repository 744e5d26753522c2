"""Which of DeepSpeed's engines and optimizers gradients can be reached in; the others are refused.

Knows the optimizers by their class names, since DeepSpeed itself is never imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from drift_fast.errors import DriftError

PARTITIONED = "DeepSpeedZeroOptimizer"
FULLY_PARTITIONED = "DeepSpeedZeroOptimizer_Stage3"
REPLICATED = "BF16_Optimizer"
_OFFLOADS = ("offload_optimizer", "offload_param")
# How to train float32 weights under DeepSpeed.
WIDER = (
    "Leave bf16_master_weights_and_grads and fp16_master_weights_and_grads out of DeepSpeed's "
    "configuration, so that it keeps float32 copies; without bf16.enabled, set it"
)
STAGE_0 = ("FP16_Optimizer", "FP16_UnfusedOptimizer")


def is_engine(engine: Any) -> bool:
    """Whether this is a DeepSpeed engine."""
    return _is_a(engine, "DeepSpeedEngine")


def _is_a(engine: Any, name: str) -> bool:
    return any(base.__name__ == name for base in type(engine).__mro__)


def optimizer_of(engine: Any) -> Any:
    """Return the engine's optimizer, if its gradients can be reached.

    Raises:
        TypeError: not a DeepSpeed engine.
        DriftError: training or an optimizer that is not supported, with a remedy.
    """
    if not is_engine(engine):
        raise TypeError(f"expected a DeepSpeed engine, got {type(engine).__name__}")
    if _is_a(engine, "PipelineEngine"):
        raise _refused("pipeline parallelism", "train with ZeRO and without pipeline stages")
    if getattr(engine, "has_moe_layers", False):
        raise _refused("its mixture-of-experts layers", "train the experts with ZeRO alone")
    if engine.autotp_size() > 1 or getattr(engine, "mp_world_size", 1) > 1:
        raise _refused("its tensor parallelism", "train with ZeRO alone")
    if engine.is_deepcompile_enabled():
        raise _refused("DeepCompile", "leave compile.deepcompile out of the configuration")
    if getattr(engine, "torch_autocast_z0_gradscaler", None) is not None:
        raise _refused("torch_autocast in float16", "use bfloat16, or fp16.enabled with ZeRO")
    optimizer = engine.optimizer
    if optimizer is None:
        raise DriftError("the DeepSpeed engine has no optimizer; give one to deepspeed.initialize")
    check_optimizer(optimizer)
    return optimizer


def check_configuration(configuration: Mapping[str, Any]) -> None:
    """Refuse what a DeepSpeed configuration asks for and gradients cannot be reached in.

    An engine is looked at by `optimizer_of`; this is for one that is yet to be built.

    Raises:
        DriftError: named, with a remedy.
    """

    def section(*keys: str) -> Mapping[str, Any]:
        found: Any = configuration
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    zero = section("zero_optimization")
    stage = zero.get("stage", 0)
    optimizer = str(section("optimizer").get("type", ""))
    devices = [section("zero_optimization", key).get("device") for key in _OFFLOADS]
    if _more(section("tensor_parallel").get("autotp_size"), 1):
        raise _refused("its tensor parallelism", "train with ZeRO alone")
    if section("compile").get("deepcompile"):
        raise _refused("DeepCompile", "leave compile.deepcompile out of the configuration")
    if "muon" in optimizer.lower():
        raise _refused("Muon, whose buffers hold updates and not gradients", "use Adam or SGD")
    if zero.get("zenflow"):
        raise _refused("ZenFlow", "leave zenflow out of the configuration")
    if zero.get("mics_shard_size") and _more(zero["mics_shard_size"], 0):
        raise _refused("MiCS", "use plain ZeRO-1, 2 or 3")
    if "nvme" in devices:
        raise _refused("offloading to NVMe", 'offload to device "cpu"')
    if _more(zero.get("zero_hpz_partition_size"), 1):
        raise _refused("zero_hpz_partition_size", "leave it out of the configuration")
    if stage == 0 and section("fp16").get("enabled") is True:
        raise _stage_0_in_fp16()


def _more(value: Any, than: int) -> bool:
    """Whether a setting is a number above another; "auto" is none."""
    return isinstance(value, int) and value > than


def check_optimizer(optimizer: Any) -> None:
    """Refuse optimizers whose gradients are elsewhere, or whose buffers hold something else.

    Raises:
        DriftError: named, with a remedy.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return
    kind = type(optimizer).__name__
    if kind not in (PARTITIONED, FULLY_PARTITIONED, REPLICATED, *STAGE_0):
        # ZenFlow, SuperOffload and MiCS are subclasses that keep or reduce gradients differently.
        raise _refused(kind, "use plain ZeRO-1, 2 or 3")
    if getattr(optimizer, "has_moe_layers", False):
        raise _refused("its mixture-of-experts layers", "train the experts with ZeRO alone")
    if "muon" in type(optimizer.optimizer).__name__.lower():
        raise _refused("Muon, whose buffers hold updates and not gradients", "use Adam or SGD")
    if getattr(optimizer, "zenflow", False):
        raise _refused("ZenFlow", "leave zenflow out of the configuration")
    if getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
        # It updates its scale once for each parameter group of a step.
        raise _refused("torch_autocast in float16", "use bfloat16, or fp16.enabled")
    if getattr(optimizer, "swap_optimizer", False) or getattr(
        optimizer, "params_in_nvme_and_cpu", False
    ):
        raise _refused("offloading to NVMe", 'offload to device "cpu"')
    if getattr(optimizer, "zero_hpz_partition_size", 1) > 1:
        raise _refused("zero_hpz_partition_size", "leave it out of the configuration")
    if kind in STAGE_0 and optimizer.loss_scale_config.use_grad_scaling:
        # `DeepSpeedEngine.backward` scales the loss for a ZeROOptimizer only.
        raise _stage_0_in_fp16()


def _refused(what: str, remedy: str) -> DriftError:
    return DriftError(
        f"DeepSpeed runs {what}, where this version cannot reach the gradients: {remedy}"
    )


def _stage_0_in_fp16() -> DriftError:
    return DriftError(
        "at ZeRO stage 0 in fp16 DeepSpeed 0.19 divides gradients by a loss scale that its "
        "backward did not apply, so neither they nor an injection move the weights as they "
        "should: use stage 1, or bf16"
    )
