"""How a model is to be trained: numbers of a run, from flags or from a training configuration.

Owns the names, their checks, and what the Trainer's and LLaMA-Factory's names mean here. Invariant:
a key that says something about the figures is used or refused; every other one is listed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from drift_fast.delta import STORED_DTYPES

SHARDINGS = ("none", "ddp", "fsdp2", "zero1", "zero2", "zero3")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
OFFLOADS = ("none", "optimizer", "all")
PRECISIONS = ("bf16-mixed", "bf16", "fp32")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
RESIDENCIES = ("auto", "device", "device-int8", "host", "host-int8", "disk")
TRAINED = ("language", "all")

_CHOICES = {
    "sharding": SHARDINGS,
    "optimizer": OPTIMIZERS,
    "offload": OFFLOADS,
    "precision": PRECISIONS,
    "scheduler": SCHEDULERS,
    "residency": RESIDENCIES,
    "trained": TRAINED,
    "dtype": STORED_DTYPES,
}
# What the Trainer's arguments and LLaMA-Factory's configuration call the same.
_OTHER_NAMES = {
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "num_train_epochs": "epochs",
    "max_samples": "samples",
    "lr_scheduler_type": "scheduler",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "max_length": "max_tokens",
    "cutoff_len": "max_tokens",
    "activation_checkpointing": "gradient_checkpointing",
}
_OPTIMIZER_NAMES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw8bit",
    "adamw_8bit": "adamw8bit",
    "paged_adamw_8bit": "adamw8bit",
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run, in the planner's own names.

    Args:
        steps: optimizer steps; or `samples` and `epochs`, from which they follow.
        batch: samples of one process in one micro-batch.
        accumulation: micro-batches of one optimizer step.
        warmup: a share of all steps where less than 1, else steps.
        tokens: of one sample on average, image tokens included; time follows from it.
        max_tokens: of the longest sample, from which memory follows; `tokens` where not given.
        image_tokens: of those, what the vision tower makes.
        dtype: that Δ is stored in.
        precision: "bf16-mixed" has float32 weights, or float32 copies under ZeRO; "bf16" has
            none.
        trained: "language" freezes vision tower and projector.
        offload: what ZeRO or FSDP2 keeps in host memory.
        save_total_limit: training checkpoints that stay on disk.

    Raises:
        ValueError: a number out of range, an unknown choice, or two that exclude each other.
    """

    steps: int | None = None
    samples: int | None = None
    epochs: float = 1.0
    batch: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-6
    scheduler: str = "cosine"
    warmup: float = 0.05
    tokens: int = 2048
    max_tokens: int | None = None
    image_tokens: int = 0
    modules: str | tuple[str, ...] = ("attn", "mlp")
    layers: str | None = None
    dtype: str = "bfloat16"
    precision: str = "bf16-mixed"
    trained: str = "language"
    gpus: int = 1
    sharding: str = "none"
    optimizer: str = "adamw"
    offload: str = "none"
    gradient_checkpointing: bool = False
    residency: str = "auto"
    alpha: float = 1.0
    scale: str = "adaptive"
    save_total_limit: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "accumulation", "tokens", "max_tokens", "gpus", "steps", "samples"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("image_tokens", "save_total_limit"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        for name in ("epochs", "learning_rate", "warmup", "alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or (name != "alpha" and value < 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.max_tokens is not None and self.max_tokens < self.tokens:
            raise ValueError(
                f"the longest sample, max_tokens {self.max_tokens}, cannot be shorter than the "
                f"mean, tokens {self.tokens}; give tokens=…"
            )
        if self.image_tokens > self.tokens:
            raise ValueError(
                f"image_tokens ({self.image_tokens}) are part of tokens ({self.tokens}), so they "
                "cannot be more"
            )
        if self.steps is None and self.samples is None:
            raise ValueError("give steps, or samples (and epochs), so that the run has a length")
        if self.sharding == "none" and self.gpus > 1:
            raise ValueError(
                f"{self.gpus} GPUs with sharding 'none' are one run on one GPU; choose ddp, fsdp2, "
                "zero1, zero2 or zero3"
            )
        if self.offload != "none" and self.sharding in ("none", "ddp"):
            raise ValueError(
                f"offload {self.offload!r} is ZeRO's or FSDP2's; with sharding {self.sharding!r} "
                "there is none"
            )
        if self.offload == "optimizer" and self.sharding == "fsdp2":
            raise ValueError("FSDP2 moves weights, gradients and states together: offload 'all'")
        if self.offload == "all" and self.sharding in ("zero1", "zero2"):
            raise ValueError(f"{self.sharding} offloads the optimizer only; 'all' is zero3's")
        if self.precision == "bf16" and self.sharding.startswith("zero"):
            raise ValueError(
                "DeepSpeed keeps float32 copies of bfloat16 weights: that is precision 'bf16-mixed'"
            )

    @property
    def sharded(self) -> bool:
        """Whether each process holds its own part of gradients, and so of Δ."""
        return self.sharding not in ("none", "ddp")

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps, as the Trainer counts them: every epoch ends one."""
        if self.steps is not None:
            return self.steps
        micro = math.ceil((self.samples or 0) / (self.batch * self.gpus))
        return max(1, math.ceil(math.ceil(micro / self.accumulation) * self.epochs))

    @property
    def step_tokens(self) -> int:
        """Tokens of one process in one optimizer step."""
        return self.batch * self.accumulation * self.tokens

    def rates(self) -> list[float]:
        """Return the learning rate of every optimizer step, as transformers' schedules have it."""
        total = self.optimizer_steps
        warm = math.ceil(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        if self.scheduler == "constant":
            warm = 0
        return [self.learning_rate * self._factor(step, warm, total) for step in range(total)]

    def _factor(self, step: int, warm: int, total: int) -> float:
        if step < warm:
            return step / max(1, warm)
        left = (total - step) / max(1, total - warm)
        if self.scheduler == "cosine":
            return max(0.0, 0.5 * (1 + math.cos(math.pi * (1 - left))))
        return max(0.0, left) if self.scheduler == "linear" else 1.0

    def changed(self, **changes: Any) -> Training:
        """Return the same run but for some numbers.

        Raises:
            ValueError: as the class.
        """
        return replace(self, **changes)


NAMES = tuple(field.name for field in fields(Training))


def read_configuration(path: str | Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Read a YAML or JSON file: the run's numbers, the section `drift_fast`, and the keys not used.

    Names are the planner's own, the Trainer's or LLaMA-Factory's. `deepspeed` names a file, from
    which the stage and offloading follow; a name relative to the configuration is found beside it.

    Raises:
        ValueError: no mapping, or a value that has no meaning here.
        ImportError: a YAML file without PyYAML.
        FileNotFoundError: no such file, or no such DeepSpeed file.
    """
    from drift_fast.integrations.settings import parse_file

    file = Path(path)
    content = parse_file(file)
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: expected a mapping of names to values")
    given: dict[str, Any] = {}
    section = content.get("drift_fast") or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{file}: the section drift_fast must be a mapping")
    unused = []
    for key, value in content.items():
        if value is None or key == "drift_fast":
            continue
        name = _OTHER_NAMES.get(key, key)
        if key == "max_steps":
            # The Trainer's −1 stands for none.
            given |= {"steps": value} if value > 0 else {}
        elif key == "optim":
            given["optimizer"] = _OPTIMIZER_NAMES.get(value, value)
        elif key == "bf16":
            given.setdefault("precision", "bf16-mixed" if value else "fp32")
        elif key == "pure_bf16":
            given |= {"precision": "bf16"} if value else {}
        elif key == "deepspeed":
            given |= _deepspeed(file.parent / value)
        elif key in ("freeze_vision_tower", "freeze_multi_modal_projector"):
            given["trained"] = "language" if value else "all"
        elif name in NAMES and name not in ("modules", "layers"):
            given[name] = _number(file, key, name, value)
        else:
            unused.append(key)
    for key in ("modules", "layers", "alpha", "scale", "residency"):
        if section.get(key) is not None:
            given[key] = section[key]
    if isinstance(given.get("modules"), list):
        given["modules"] = tuple(given["modules"])
    if isinstance(given.get("alpha"), Mapping):
        raise ValueError(f"{file}: λ can be predicted for one alpha, not for one by module")
    return given, dict(section), sorted(map(str, unused))


def _number(file: Path, key: str, name: str, value: Any) -> Any:
    """Return a value of the type that a run has; YAML reads 1e-6 as text."""
    kind = next(field.type for field in fields(Training) if field.name == name)
    if isinstance(value, str) and "float" in str(kind):
        try:
            return float(value)
        except ValueError as error:
            raise ValueError(f"{file}: {key} must be a number, got {value!r}") from error
    return value


def _deepspeed(path: Path) -> dict[str, Any]:
    from drift_fast.integrations.settings import parse_file

    found = parse_file(path)
    zero = found.get("zero_optimization", {}) if isinstance(found, Mapping) else None
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    if not isinstance(zero, Mapping) or stage not in (1, 2, 3):
        raise ValueError(f"{path}: expected zero_optimization.stage 1, 2 or 3, got {stage!r}")
    offload = "none"
    for kind, name in (("optimizer", "offload_optimizer"), ("all", "offload_param")):
        where = zero.get(name)
        if isinstance(where, Mapping) and where.get("device", "none") != "none":
            offload = kind
    return {"sharding": f"zero{stage}", "offload": offload}
