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

from drift_fast.config_files import read_settings
from drift_fast.dtypes import STORED_DTYPES
from drift_fast.inject.schedule import parse_schedule

SHARDINGS = ("none", "ddp", "fsdp2", "zero1", "zero2", "zero3")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
OFFLOADS = ("none", "optimizer", "all")
PRECISIONS = ("bf16-mixed", "bf16", "fp32")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
RESIDENCIES = ("auto", "device", "device-int8", "host", "host-int8", "disk")
TRAINED = ("language", "all")
SAVING = ("no", "steps", "epoch")
# More than any run has; beyond it sums of products would leave what a float holds.
_MOST = 10**12
_MOST_EPOCHS = 10**6

_CHOICES = {
    "sharding": SHARDINGS,
    "optimizer": OPTIMIZERS,
    "offload": OFFLOADS,
    "precision": PRECISIONS,
    "scheduler": SCHEDULERS,
    "residency": RESIDENCIES,
    "trained": TRAINED,
    "dtype": STORED_DTYPES,
    "save_strategy": SAVING,
}
# What the Trainer's arguments and LLaMA-Factory's configuration call the same.
_OTHER_NAMES = {
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "num_train_epochs": "epochs",
    "max_samples": "samples",
    "lr_scheduler_type": "scheduler",
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
# What has other figures than all weights trained in bfloat16 or float32, where it is asked for.
_NOT_PLANNED = (
    *("use_peft", "use_lora", "lora_rank", "lora_r", "lora_target", "lora_target_modules"),
    *("peft_config", "adapter", "adapter_name_or_path", "freeze_language_model"),
    *("quantization_bit", "quantization_config", "load_in_4bit", "load_in_8bit"),
    *("fp16", "pure_fp16", "fp8", "use_galore", "use_apollo", "use_badam", "use_adam_mini"),
)
_FREEZING = ("freeze_vision", "freeze_vision_tower", "freeze_multi_modal_projector")
_OF_SECTION = (
    *("modules", "layers", "alpha", "scale", "residency"),
    *("schedule", "progress_cap", "progress_target"),
)


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
        schedule: of α, as `Injection` takes it as text; λ follows from it.
        progress_cap, progress_target: as `Injection` has them; λ is bounded by a cap of one number
            and cannot be predicted otherwise.
        save_total_limit: training checkpoints that stay on disk; None or 0 keeps all, as
            transformers does.
        save_steps: optimizer steps from one to the next, or a share of all where less than 1.

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
    schedule: str | None = None
    progress_cap: float | Mapping[str, float] | None = None
    progress_target: float | Mapping[str, float] | None = None
    save_total_limit: int | None = 1
    save_steps: float = 500
    save_strategy: str = "steps"

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_injection()
        self._check_sharding()

    def _check_numbers(self) -> None:
        for name in ("batch", "accumulation", "tokens", "max_tokens", "gpus", "steps", "samples"):
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "steps", "samples"):
                continue
            if type(value) is not int or not 1 <= value <= _MOST:
                raise ValueError(
                    f"{name} must be a positive integer of at most {_MOST:,}, got {value!r}"
                )
        for name in ("image_tokens", "save_total_limit"):
            value = getattr(self, name)
            if value is None and name == "save_total_limit":
                continue
            if type(value) is not int or not 0 <= value <= _MOST:
                raise ValueError(f"{name} must be an integer from 0 to {_MOST:,}, got {value!r}")
        if type(self.gradient_checkpointing) is not bool:
            raise ValueError(
                f"gradient_checkpointing must be true or false, got {self.gradient_checkpointing!r}"
            )
        for name in ("epochs", "learning_rate", "warmup", "alpha", "save_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or (name != "alpha" and value < 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
        if not 0 < self.epochs <= _MOST_EPOCHS:
            raise ValueError(
                f"epochs must be above 0 and at most {_MOST_EPOCHS:,}, got {self.epochs!r}"
            )
        if self.save_steps == 0:
            raise ValueError("save_steps must be above 0, or save_strategy 'no'")
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

    def _check_injection(self) -> None:
        modules = self.modules if isinstance(self.modules, tuple) else (self.modules,)
        if not all(isinstance(name, str) for name in modules):
            raise ValueError(f"modules must be names such as attn,mlp, got {self.modules!r}")
        for name in ("layers", "schedule"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be text, got {value!r}")
        parse_schedule(self.schedule)
        for name in ("progress_cap", "progress_target"):
            value = getattr(self, name)
            for one in value.values() if isinstance(value, Mapping) else [value]:
                # An infinite cap of a module is none.
                if one is not None and (isinstance(one, bool) or not isinstance(one, int | float)):
                    raise ValueError(f"{name} must be a number or one by module, got {value!r}")
                if one is not None and not one > 0:
                    raise ValueError(f"{name} must be a λ above 0, got {value!r}")

    def _check_sharding(self) -> None:
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

    @property
    def checkpoints(self) -> int:
        """Training checkpoints that lie on disk at most, one more while it is written."""
        if self.save_strategy == "no":
            return 0
        if self.save_strategy == "epoch":
            written = math.ceil(self.epochs)
        else:
            # The Trainer's last step saves, too.
            steps = self.optimizer_steps
            each = math.ceil(self.save_steps * (steps if self.save_steps < 1 else 1))
            written = math.ceil(steps / each)
        return min(written, self.save_total_limit + 1) if self.save_total_limit else written

    def rates(self) -> list[float]:
        """Return the learning rate of every optimizer step, as transformers' schedules have it."""
        total, warm = self.optimizer_steps, self._warm_steps()
        return [self.learning_rate * self._factor(step, warm, total) for step in range(total)]

    def sum_of_rates(self) -> float:
        """Return the sum of `rates`, in closed form: a run may have any number of steps."""
        total, warm = self.optimizer_steps, self._warm_steps()
        rising = min(warm, total)
        left = total - rising
        # Σcos(πk/m) over k = 0 … m−1 is 1, and so a cosine's sum is a straight line's.
        falling = left if self.scheduler.startswith("constant") else (left + 1) / 2 * (left > 0)
        return self.learning_rate * (rising * (rising - 1) / 2 / max(1, warm) + falling)

    def _warm_steps(self) -> int:
        if self.scheduler == "constant":
            return 0
        return (
            math.ceil(self.warmup * self.optimizer_steps) if self.warmup < 1 else int(self.warmup)
        )

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

    Names are the planner's own, the Trainer's or LLaMA-Factory's; without a save_total_limit all
    checkpoints are kept, as both do. `deepspeed` is what DeepSpeed is to be told, or names a file
    of it, from which the stage and offloading follow; a name relative to the configuration is found
    beside it. A key of the section that is not used is listed as `drift_fast.key`.

    Raises:
        ValueError: no mapping, or a value that has no meaning here or that is not planned for.
        ImportError: a YAML file without PyYAML.
        FileNotFoundError: no such file, or no such DeepSpeed file.
    """
    file = Path(path)
    content = read_settings(file)
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
            steps = _number(file, key, "steps", value)
            given |= {"steps": steps} if steps > 0 else {}
        elif key == "optim":
            text = _number(file, key, "optimizer", value)
            given["optimizer"] = _OPTIMIZER_NAMES.get(text, text)
        elif key == "bf16":
            given.setdefault("precision", "bf16-mixed" if _truth(file, key, value) else "fp32")
        elif key == "pure_bf16":
            given |= {"precision": "bf16"} if _truth(file, key, value) else {}
        elif key == "deepspeed":
            given |= _deepspeed(file, value)
        elif key == "save_strategy":
            # YAML's `no` is false.
            given[key] = _number(file, key, key, "no" if value is False else value)
        elif key in _FREEZING or key in ("warmup_ratio", "warmup_steps"):
            continue
        elif key == "finetuning_type" or key in _NOT_PLANNED:
            if value not in ("full", False, 0, "", [], {}):
                raise ValueError(
                    f"{file}: {key}: {value!r} is not planned for, since every figure is of all "
                    "weights trained in bfloat16 or float32; leave it out to plan that"
                )
            unused.append(key)
        elif name in NAMES and name not in _OF_SECTION:
            given[name] = _number(file, key, name, value)
        else:
            unused.append(key)
    given.setdefault("save_total_limit", None)
    frozen = [_truth(file, key, content[key]) for key in _FREEZING if content.get(key) is not None]
    if frozen:
        given.setdefault("trained", "language" if all(frozen) else "all")
    warmup = _warmup(file, content)
    if warmup is not None:
        given.setdefault("warmup", warmup)
    for key in _OF_SECTION:
        if section.get(key) is not None:
            given[key] = section[key]
    if isinstance(given.get("modules"), list):
        given["modules"] = tuple(given["modules"])
    if isinstance(given.get("alpha"), Mapping):
        raise ValueError(f"{file}: λ can be predicted for one alpha, not for one by module")
    unused += [f"drift_fast.{key}" for key in section if key not in (*_OF_SECTION, "delta")]
    return given, dict(section), sorted(map(str, unused))


def _warmup(file: Path, content: Mapping[str, Any]) -> float | None:
    """Return the warm-up as the Trainer chooses: a number of steps above 0 before a share."""
    steps, share = (
        None if content.get(key) is None else float(_number(file, key, "warmup", content[key]))
        for key in ("warmup_steps", "warmup_ratio")
    )
    return steps if steps or share is None else share


def _number(file: Path, key: str, name: str, value: Any) -> Any:
    """Return a value of the type that a run has; YAML reads 1e-6 as text."""
    kind = str(next(field.type for field in fields(Training) if field.name == name))
    if "float" in kind:
        expected = "a number"
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError as error:
                raise ValueError(f"{file}: {key} must be a number, got {value!r}") from error
        right = isinstance(value, int | float) and not isinstance(value, bool)
    elif "int" in kind:
        expected, right = "an integer", type(value) is int
    elif kind == "bool":
        return _truth(file, key, value)
    else:
        expected, right = "text", isinstance(value, str)
    if not right:
        raise ValueError(f"{file}: {key} must be {expected}, got {value!r}")
    return value


def _truth(file: Path, key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{file}: {key} must be true or false, got {value!r}")
    return value


def _deepspeed(file: Path, value: Any) -> dict[str, Any]:
    """Return sharding and offloading, from what DeepSpeed is told or a file of it."""
    if isinstance(value, str):
        place, found = str(file.parent / value), read_settings(file.parent / value)
    elif isinstance(value, Mapping):
        place, found = f"{file}: deepspeed", value
    else:
        raise ValueError(
            f"{file}: deepspeed must be the path of a file or what stands in one, got {value!r}"
        )
    zero = found.get("zero_optimization", {}) if isinstance(found, Mapping) else None
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    if not isinstance(zero, Mapping) or type(stage) is not int or stage not in (1, 2, 3):
        raise ValueError(f"{place}: expected zero_optimization.stage 1, 2 or 3, got {stage!r}")
    half = found.get("fp16")
    if isinstance(half, Mapping) and half.get("enabled") is True:
        raise ValueError(f"{place}: fp16 is not planned for; train in bfloat16")
    offload = "none"
    for kind, name in (("optimizer", "offload_optimizer"), ("all", "offload_param")):
        where = zero.get(name)
        if isinstance(where, Mapping) and where.get("device", "none") != "none":
            offload = kind
    return {"sharding": f"zero{stage}", "offload": offload}
