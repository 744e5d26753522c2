"""How a model trains: the numbers of a run, and what follows from them.

Owns their names, defaults and checks, the steps and the learning rates. `configuration` reads them
from a training configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from drift_fast.dtypes import STORED_DTYPES, check_stored_dtype
from drift_fast.inject.config import RESIDENCIES
from drift_fast.inject.schedule import parse_schedule
from drift_fast.inject.strength.formula import SCALES, Scale
from drift_fast.options import Options, option
from drift_fast.selection import Modules

SHARDINGS = ("none", "ddp", "fsdp2", "zero1", "zero2", "zero3")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
OFFLOADS = ("none", "optimizer", "all")
PRECISIONS = ("bf16-mixed", "bf16", "fp32")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
TRAINED = ("language", "all")
SAVING = ("no", "steps", "epoch")
# More than any run has; sums of larger products would exceed the range of a float.
_MOST = 10**12
_MOST_EPOCHS = 10**6


def _count(name: str, *, least: int = 1, optional: bool = False) -> Callable[[Any], None]:
    """Return a check for an integer from `least` on."""

    def check(value: Any) -> None:
        if optional and value is None:
            return
        if type(value) is not int or not least <= value <= _MOST:
            raise ValueError(f"{name} must be an integer from {least} to {_MOST:,}, got {value!r}")

    return check


def _number(name: str, *, signed: bool = False) -> Callable[[Any], None]:
    """Return a check for a finite number, at least 0 unless `signed`."""

    def check(value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value) or (value < 0 and not signed):
            raise ValueError(
                f"{name} must be finite{'' if signed else ' and at least 0'}, got {value!r}"
            )

    return check


def _text(name: str) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {value!r}")

    return check


def _check_epochs(value: Any) -> None:
    _number("epochs")(value)
    if not 0 < value <= _MOST_EPOCHS:
        raise ValueError(f"epochs must be above 0 and at most {_MOST_EPOCHS:,}, got {value!r}")


def _check_save_steps(value: Any) -> None:
    _number("save_steps")(value)
    if value == 0:
        raise ValueError("save_steps must be above 0, or save_strategy 'no'")


def _check_checkpointing(value: Any) -> None:
    if type(value) is not bool:
        raise ValueError(f"gradient_checkpointing must be true or false, got {value!r}")


def _check_modules(value: Any) -> None:
    names = value if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"modules must be names such as attn,mlp, got {value!r}")


def _check_schedule(value: Any) -> None:
    _text("schedule")(value)
    parse_schedule(value)


def _progress(name: str) -> Callable[[Any], None]:
    """Return a check for a λ, or for one by module."""

    def check(value: Any) -> None:
        for one in value.values() if isinstance(value, Mapping) else [value]:
            # A module without a cap has an infinite one.
            if one is not None and (isinstance(one, bool) or not isinstance(one, int | float)):
                raise ValueError(f"{name} must be a number or one by module, got {value!r}")
            if one is not None and not one > 0:
                raise ValueError(f"{name} must be a λ above 0, got {value!r}")

    return check


@dataclass(frozen=True, kw_only=True)
class Training(Options):
    """A training run with an injection."""

    steps: int | None = option(
        None,
        "optimizer steps; they also follow from samples and epochs",
        check=_count("steps", optional=True),
        metavar="N",
    )
    samples: int | None = option(
        None,
        "samples of the training set",
        check=_count("samples", optional=True),
        metavar="N",
    )
    epochs: float = option(
        1.0, "how often the run sees each sample", check=_check_epochs, metavar="X"
    )
    batch: int = option(
        1, "samples of one micro-batch in one process", check=_count("batch"), metavar="N"
    )
    accumulation: int = option(
        1, "micro-batches of one optimizer step", check=_count("accumulation"), metavar="N"
    )
    learning_rate: float = option(
        1e-6, "largest learning rate", check=_number("learning_rate"), metavar="X"
    )
    scheduler: str = option("cosine", "schedule of the learning rate", choices=SCHEDULERS)
    warmup: float = option(
        0.05,
        "warm-up: a share of all steps if below 1, a number of steps from 1 on",
        check=_number("warmup"),
        metavar="X",
    )
    tokens: int = option(
        2048,
        "tokens of one sample on average, image tokens included; time follows from it",
        check=_count("tokens"),
        metavar="N",
    )
    max_tokens: int | None = option(
        None,
        "tokens of the longest sample, from which memory follows; by default those of tokens",
        check=_count("max_tokens", optional=True),
        metavar="N",
    )
    image_tokens: int = option(
        0,
        "how many of the tokens come from the vision tower",
        check=_count("image_tokens", least=0),
        metavar="N",
    )
    modules: Modules = option(
        ("attn", "mlp"),
        "modules of Δ: presets attn, mlp, norm, embed, head, all, or re:<pattern>; separated by "
        "commas",
        check=_check_modules,
    )
    layers: str | None = option(
        None, "layers of Δ, such as 0-3,8; all by default", check=_text("layers"), metavar="LAYERS"
    )
    dtype: str = option(
        "bfloat16", "dtype that Δ is stored as", choices=STORED_DTYPES, check=check_stored_dtype
    )
    precision: str = option(
        "bf16-mixed",
        "bf16-mixed has float32 weights, or float32 copies under ZeRO; bf16 has neither",
        choices=PRECISIONS,
    )
    trained: str = option(
        "language",
        "what trains; language freezes the vision tower and the projector",
        choices=TRAINED,
    )
    lora_rank: int = option(
        0,
        "rank of LoRA on all matrices of attention and MLP, all else frozen; 0 trains all weights",
        check=_count("lora_rank", least=0),
        metavar="N",
    )
    gpus: int = option(1, "number of GPUs", check=_count("gpus"), metavar="N")
    sharding: str = option("none", "how the run is distributed over GPUs", choices=SHARDINGS)
    optimizer: str = option("adamw", "optimizer", choices=OPTIMIZERS)
    offload: str = option("none", "what ZeRO or FSDP2 keeps in host memory", choices=OFFLOADS)
    gradient_checkpointing: bool = option(
        False, "compute activations again in backward", check=_check_checkpointing
    )
    residency: str = option("auto", "where Δ lives while the model trains", choices=RESIDENCIES)
    alpha: float = option(
        1.0, "strength of the injection", check=_number("alpha", signed=True), metavar="X"
    )
    scale: Scale = option("adaptive", "what alpha is multiplied by", choices=SCALES)
    schedule: str | None = option(
        None,
        "a factor on alpha by step, such as linear or window(0,0.3); λ follows from it",
        check=_check_schedule,
        metavar="TEXT",
    )
    progress_cap: float | Mapping[str, float] | None = option(
        None,
        "λ at which the injection stops; λ can be predicted for a single number only",
        check=_progress("progress_cap"),
        metavar="X",
    )
    progress_target: float | Mapping[str, float] | None = option(
        None,
        "λ that alpha is steered to, as far as that is in reach",
        check=_progress("progress_target"),
        metavar="X",
    )
    save_total_limit: int | None = option(
        1,
        "training checkpoints that stay on disk; 0 keeps all",
        check=_count("save_total_limit", least=0, optional=True),
        metavar="N",
    )
    save_steps: float = option(
        500,
        "optimizer steps between training checkpoints, or a share of all steps if below 1",
        check=_check_save_steps,
        metavar="X",
    )
    save_strategy: str = option("steps", "when training checkpoints are written", choices=SAVING)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tokens()
        if self.steps is None and self.samples is None:
            raise ValueError("give steps, or samples (and epochs), so that the run has a length")
        self._check_sharding()
        if self.lora_rank and self.trained == "all":
            raise ValueError(
                "lora_rank plans adapters in the language model alone: leave out trained='all' "
                "(in a file freeze_vision, freeze_vision_tower or freeze_multi_modal_projector)"
            )

    def _check_tokens(self) -> None:
        if self.max_tokens is not None and self.max_tokens < self.tokens:
            raise ValueError(
                f"max_tokens ({self.max_tokens}), the longest sample, cannot be below tokens "
                f"({self.tokens}), the mean; give tokens=…"
            )
        if self.image_tokens > self.tokens:
            raise ValueError(
                f"image_tokens ({self.image_tokens}) are part of tokens ({self.tokens}), so they "
                "cannot be more"
            )

    def _check_sharding(self) -> None:
        if self.sharding == "none" and self.gpus > 1:
            raise ValueError(
                f"{self.gpus} GPUs with sharding 'none' are one run on one GPU; choose ddp, fsdp2, "
                "zero1, zero2 or zero3"
            )
        if self.offload != "none" and self.sharding in ("none", "ddp"):
            raise ValueError(
                f"offload {self.offload!r} needs ZeRO or FSDP2, got sharding {self.sharding!r}"
            )
        if self.offload == "optimizer" and self.sharding == "fsdp2":
            raise ValueError("FSDP2 moves weights, gradients and states together: offload 'all'")
        if self.offload == "all" and self.sharding in ("zero1", "zero2"):
            raise ValueError(f"{self.sharding} offloads the optimizer only; 'all' needs zero3")
        if self.precision == "bf16" and self.sharding.startswith("zero"):
            raise ValueError(
                "DeepSpeed keeps float32 copies of bfloat16 weights: that is precision 'bf16-mixed'"
            )

    @property
    def sharded(self) -> bool:
        """Whether each process holds its own share of gradients, and of Δ."""
        return self.sharding not in ("none", "ddp")

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps as the Trainer counts them: the end of an epoch ends a step."""
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
        """The most training checkpoints on disk, including one that is being written."""
        if self.save_strategy == "no":
            return 0
        if self.save_strategy == "epoch":
            written = math.ceil(self.epochs)
        else:
            # The Trainer also saves at the last step.
            steps = self.optimizer_steps
            each = math.ceil(self.save_steps * (steps if self.save_steps < 1 else 1))
            written = math.ceil(steps / each)
        return min(written, self.save_total_limit + 1) if self.save_total_limit else written

    def rates(self) -> list[float]:
        """Return the learning rate of every optimizer step, as in transformers' schedules."""
        total, warm = self.optimizer_steps, self._warm_steps()
        return [self.learning_rate * self._factor(step, warm, total) for step in range(total)]

    def sum_of_rates(self) -> float:
        """Return the sum of `rates` in closed form, since a run may have any number of steps."""
        total, warm = self.optimizer_steps, self._warm_steps()
        rising = min(warm, total)
        left = total - rising
        # Σcos(πk/m) over k = 0 … m−1 is 1, so a cosine adds up to what a straight line does.
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
        """Return the same run with some numbers changed.

        Raises:
            ValueError: as in the constructor.
        """
        return replace(self, **changes)
