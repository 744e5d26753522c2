"""Read a run from a training configuration, in the names of the Trainer or of LLaMA-Factory.

Invariant: a key that the figures depend on is used or refused; every other key is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from drift_fast.config_files import read_settings
from drift_fast.options import plain
from drift_fast.planner.options import PlanOptions
from drift_fast.planner.training import Training

# Names that the Trainer's arguments and LLaMA-Factory's configuration share.
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
# What turns LoRA on, and the rank without one that is stated: LLaMA-Factory's, TRL's, Axolotl's and
# ms-swift's.
_LORA: dict[str, tuple[Any, int]] = {
    "finetuning_type": ("lora", 8),
    "use_peft": (True, 16),
    "adapter": ("lora", 0),
    "train_type": ("lora", 8),
    "tuner_type": ("lora", 8),
}
_RANKS = ("lora_rank", "lora_r")
# Which of these adapt some matrices only where nothing says which, and what says it.
_SOME = ("use_peft", "adapter")
_ADAPTED = ("lora_target", "lora_target_modules", "lora_target_linear", "target_modules")
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Keys that would change the figures, which are for weights in bfloat16 or float32.
_NOT_PLANNED = (
    *("use_lora", "peft_config", "adapter_name_or_path", "use_dora", "peft_use_dora"),
    *("lora_modules_to_save", "modules_to_save", "additional_target"),
    *("freeze_language_model", "quantization_bit", "quantization_config", "load_in_4bit"),
    *("load_in_8bit", "fp16", "pure_fp16", "fp8"),
    *("use_galore", "use_apollo", "use_badam", "use_adam_mini"),
)
_FREEZING = ("freeze_vision", "freeze_vision_tower", "freeze_multi_modal_projector")
_WARMUP = ("warmup_steps", "warmup_ratio")
# Options of the injection, from the section drift_fast.
_OF_SECTION = (
    *("modules", "layers", "alpha", "scale", "residency"),
    *("schedule", "progress_cap", "progress_target"),
)
_FIELDS = {each.name: each for each in fields(Training)}


@dataclass
class Configuration:
    """The numbers of a run as a file states them.

    `delta` is the one that the section drift_fast names. `unused` are the keys that no figure
    depends on; one of that section is listed as `drift_fast.key`.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    delta: Path | None = None
    unused: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Configuration:
        """Read a YAML or JSON file.

        A section `plan` has options of `plan`, and then the rest of the file is not read. Without
        one, names are the planner's, the Trainer's or LLaMA-Factory's. Without save_total_limit all
        checkpoints are kept, as both do. `deepspeed` is a DeepSpeed
        configuration or the path of one, relative to the file; stage and offloading follow from it.

        Raises:
            ValueError: not a mapping, an invalid value, or one that is not planned for.
            ImportError: a YAML file without PyYAML.
            FileNotFoundError: no such file, or no such DeepSpeed file.
        """
        content = read_settings(path)
        if not isinstance(content, Mapping):
            raise ValueError(f"{path}: expected a mapping of names to values")
        if isinstance(content.get("plan"), Mapping):
            return cls(PlanOptions.read(content["plan"], origin=f"{path}: plan"))
        section = content.get("drift_fast") or {}
        if not isinstance(section, Mapping):
            raise ValueError(f"{path}: the section drift_fast must be a mapping")
        found = cls()
        for key, value in content.items():
            if value is not None and key != "drift_fast":
                found._take(path, key, value)
        found.numbers.setdefault("save_total_limit", None)
        found._take_several(path, content)
        found._take_section(path, section)
        found.unused.sort()
        return found

    def _take(self, path: Path, key: str, value: Any) -> None:
        """Use a key whose meaning is known, or list it."""
        name = _OTHER_NAMES.get(key, key)
        if key == "max_steps":
            # With the Trainer's −1, epochs decide.
            steps = _number(path, key, "steps", value)
            self.numbers |= {"steps": steps} if steps > 0 else {}
        elif key == "optim":
            text = _number(path, key, "optimizer", value)
            self.numbers["optimizer"] = _OPTIMIZER_NAMES.get(text, text)
        elif key == "bf16":
            self.numbers.setdefault(
                "precision", "bf16-mixed" if _truth(path, key, value) else "fp32"
            )
        elif key == "pure_bf16":
            self.numbers |= {"precision": "bf16"} if _truth(path, key, value) else {}
        elif key == "deepspeed":
            self.numbers |= _deepspeed(path, value)
        elif key == "save_strategy":
            # YAML reads `no` as false.
            self.numbers[key] = _number(path, key, key, "no" if value is False else value)
        elif key in _NOT_PLANNED:
            if value not in (False, 0, "", [], {}):
                raise _not_planned(path, key, value)
            self.unused.append(key)
        elif name in _FIELDS and name not in (*_OF_SECTION, *_RANKS):
            self.numbers[name] = _number(path, key, name, value)
        elif key not in (*_FREEZING, *_WARMUP, *_LORA, *_RANKS, *_ADAPTED):
            self.unused.append(str(key))

    def _take_several(self, path: Path, content: Mapping[str, Any]) -> None:
        """Use keys that depend on each other: what is frozen, and the warm-up."""
        given = {
            key: content[key] for key in (*_FREEZING, *_WARMUP) if content.get(key) is not None
        }
        frozen = [_truth(path, key, given[key]) for key in _FREEZING if key in given]
        if frozen:
            self.numbers.setdefault("trained", "language" if all(frozen) else "all")
        steps, share = (
            float(_number(path, key, "warmup", given[key])) if key in given else None
            for key in _WARMUP
        )
        # As in the Trainer, a number of steps above 0 overrides a share.
        warmup = steps if steps or share is None else share
        if warmup is not None:
            self.numbers.setdefault("warmup", warmup)
        self._take_lora(path, content)

    def _take_lora(self, path: Path, content: Mapping[str, Any]) -> None:
        """Use LoRA's rank, where a key turns LoRA on or none turns it off."""
        said = {key: content[key] for key in _LORA if content.get(key) is not None}
        for key, value in said.items():
            if value not in (_LORA[key][0], "full", False, ""):
                raise _not_planned(path, key, value)
        on = [key for key, value in said.items() if value == _LORA[key][0]]
        if said and not on:
            self.unused += [key for key in (*said, *_RANKS, *_ADAPTED) if content.get(key)]
            return
        targets = {key: content[key] for key in _ADAPTED if content.get(key) not in (None, "", [])}
        for key, value in targets.items():
            if not _is_every_matrix(value):
                raise _not_planned(path, key, value)
        given = {key: content[key] for key in _RANKS if content.get(key) is not None}
        ranks = {_number(path, key, "lora_rank", value) for key, value in given.items()}
        if len(ranks) > 1:
            raise ValueError(f"{path}: lora_rank and lora_r differ: {sorted(ranks)}; leave one out")
        rank = ranks.pop() if ranks else max((_LORA[key][1] for key in on), default=0)
        if on and not rank:
            raise ValueError(f"{path}: {on[0]}: {content[on[0]]!r} needs lora_r, LoRA's rank")
        if not targets and any(key in _SOME for key in on):
            raise ValueError(
                f"{path}: {on[0]} without lora_target_modules adapts some projections only, which "
                "is not planned for: give lora_target_modules: all-linear"
            )
        self.numbers |= {"lora_rank": rank} if rank else {}

    def _take_section(self, path: Path, section: Mapping[str, Any]) -> None:
        """Use the options of the injection."""
        for key in _OF_SECTION:
            if section.get(key) is not None:
                value = section[key]
                self.numbers[key] = tuple(value) if isinstance(value, list) else value
        if isinstance(self.numbers.get("alpha"), Mapping):
            raise ValueError(f"{path}: λ can be predicted for one alpha, not for one by module")
        self.unused += [
            f"drift_fast.{key}" for key in section if key not in (*_OF_SECTION, "delta")
        ]
        if isinstance(section.get("delta"), str):
            self.delta = path.parent / section["delta"]


def _number(path: Path, key: str, name: str, value: Any) -> Any:
    """Return the value of the file's `key` in the type of the option `name`."""
    try:
        return plain(_FIELDS[name], value, called=key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_every_matrix(value: Any) -> bool:
    """Whether LoRA's targets are all projections of the layers."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list):
        return value is True
    stated = {str(name).strip() for name in names}
    return stated in ({"all"}, {"all-linear"}) or stated >= _PROJECTIONS


def _not_planned(path: Path, key: str, value: Any) -> ValueError:
    return ValueError(
        f"{path}: {key}: {value!r} is not planned for: every figure is for weights in bfloat16 or "
        "float32, all of them trained or LoRA on every matrix of attention and MLP; leave it out "
        "to plan that"
    )


def _truth(path: Path, key: str, value: Any) -> bool:
    return bool(_number(path, key, "gradient_checkpointing", value))


def _deepspeed(path: Path, value: Any) -> dict[str, Any]:
    """Return sharding and offloading, from a DeepSpeed configuration or the path of one."""
    if isinstance(value, str):
        place, found = str(path.parent / value), read_settings(path.parent / value)
    elif isinstance(value, Mapping):
        place, found = f"{path}: deepspeed", value
    else:
        raise ValueError(
            f"{path}: deepspeed must be the path of a file or its content, got {value!r}"
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
        place_of = zero.get(name)
        if isinstance(place_of, Mapping) and place_of.get("device", "none") != "none":
            offload = kind
    return {"sharding": f"zero{stage}", "offload": offload}
