"""The options of an injection: how hard Δ pushes, where it lives, and what it reaches.

Owns their names, types, defaults and checks. Objects of the running process, such as an optimizer
or a gradient scaler, are not options: no file can name them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, get_args

from drift_fast.alignment.mapping import MappingLike, parse_mapping
from drift_fast.config_files import read_settings
from drift_fast.inject.schedule import ScheduleLike
from drift_fast.inject.strength.formula import SCALES, Scale, check_alpha
from drift_fast.inject.strength.per_module import LayerAlpha, PerModule, number, positive
from drift_fast.options import Options, option
from drift_fast.paths import local_path
from drift_fast.selection import EVERYTHING, Layers, Modules, Selection
from drift_fast.sizes import parse_size

CapBy = Literal["parameter", "module", "overall"]
Residency = Literal["auto", "device", "device-int8", "host", "host-int8", "disk"]
RESIDENCIES: tuple[str, ...] = get_args(Residency)
ScopeName = Literal["step", "microbatch"]
Rescale = Literal["weight"] | None
MissingGradients = Literal["auto", "skip", "raise"]
Log = Literal["brief", "all"]

# What a configuration in the directory of a delta is called.
_FILES = ("injection.yaml", "injection.json")


def _check_total(total: Any) -> None:
    if total is not None and (isinstance(total, bool) or not isinstance(total, int) or total < 1):
        raise ValueError(f"total_steps must be a number of optimizer steps from 1, got {total!r}")


def _check_share(value: float | None) -> None:
    if value is not None and not 0.0 <= value <= 1.0:
        raise ValueError(f"min_coverage must be between 0 and 1, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class StrengthOptions(Options):
    """How hard Δ pushes, step by step."""

    alpha: PerModule = option(
        1.0,
        "strength, one number or one by module, such as {attn: 1.0, mlp: 0.5}; positive moves "
        "weights towards the reasoning model",
        check=lambda value: isinstance(value, Mapping) or check_alpha(value),
    )
    layer_alpha: LayerAlpha = option(
        None,
        "a factor on alpha by layer: a mapping of layer (or text such as 0-7) to factor, which "
        "names every layer of the targets, a sequence with one for each layer from 0, or a "
        "function of the layer, which is None for tensors outside the layers; those have 1 unless "
        "a mapping has an entry for None",
    )
    scale: Scale = option(
        "adaptive",
        "what alpha is multiplied by: ‖g‖/‖Δ‖ (gradnorm), that times (1 + cos(g, Δ))/2 "
        "(adaptive), nothing (absolute), or ⟨g, Δ⟩/‖Δ‖² where it is positive (project)",
        choices=SCALES,
    )
    rescale: Rescale = option(
        None,
        "weight multiplies alpha by ‖W‖/‖Δ‖ with scale absolute, as the public code does, with the "
        "norm of the weights at attachment",
        choices=("weight",),
    )
    schedule: ScheduleLike = option(
        None, "a factor on alpha by step: linear, cosine, or see `drift_fast.schedule`"
    )
    total_steps: int | None = option(
        None,
        "optimizer steps of the run, for schedules and targets that need them",
        check=_check_total,
    )
    progress_cap: PerModule | None = option(
        None,
        "stop at this progress λ, one number or one by module (infinity for none); a cap or a "
        "target costs one more pass over weights and Δ in each step",
    )
    cap_by: CapBy = option(
        "parameter",
        "whose λ the cap is compared with: that of each parameter; of each module kind, or of the "
        "targets of each entry where the cap is by module; or of all targets, overall. λ of "
        "several targets is weighted by ‖Δ‖²",
        choices=get_args(CapBy),
    )
    look_ahead: float = option(
        9.0,
        "how many times its last change λ still moves after a stop: β/(1 − β) of the optimizer's "
        "momentum β, 0 for none",
        check=lambda value: number(value, "look_ahead", least=0.0),
    )
    progress_target: PerModule | None = option(
        None,
        "a progress λ, one number or one by module, that alpha is steered to; needs total_steps",
    )
    max_push: float | None = option(
        None,
        "the largest ‖c·Δ‖/‖g‖ of any parameter",
        check=lambda value: value is None or positive(value, "max_push"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale is not None and self.scale != "absolute":
            raise ValueError(
                f"rescale has no effect with scale={self.scale!r}, which does not depend on ‖Δ‖; "
                "leave it out, or use scale='absolute'"
            )
        if self.progress_cap is None and self.cap_by != "parameter":
            raise ValueError(f"cap_by={self.cap_by!r} has no effect without progress_cap=…")

    @property
    def needs_total_steps(self) -> bool:
        """Whether the length of the run may matter and is not given."""
        relative = self.schedule is not None or self.progress_target is not None
        return relative and self.total_steps is None


@dataclass(frozen=True, kw_only=True)
class ResidencyOptions(Options):
    """Where Δ lives while a model trains."""

    residency: Residency = option(
        "auto",
        "where Δ lives: device (beside the gradients, exact), device-int8 (there, in half the "
        "memory, rounded to int8 in blocks of 64), host (in page-locked host memory, copied "
        "ahead), host-int8, disk (read in every step from the delta, or from both checkpoints), "
        "or auto (the first of device, host and disk that has room, with a line in the log)",
        choices=RESIDENCIES,
    )
    prefetch: int | str = option(
        "1GB",
        "bytes on the device for Δ that lives elsewhere; with overlap, 4GB keeps copies going "
        "during most of the forward pass of a 7B model",
        check=parse_size,
        metavar="SIZE",
    )


@dataclass(frozen=True, kw_only=True)
class TargetOptions(Options):
    """Which parameters of the model a delta reaches."""

    modules: Modules | None = option(
        None,
        "use only these tensors of the delta: presets attn, mlp, norm, embed, head, all, or "
        "re:<pattern>; None is all of them",
    )
    layers: Layers = option(None, "layer numbers, such as 0-3,8; None is all", metavar="LAYERS")
    mapping: MappingLike | None = option(
        None,
        "which tensor of the delta belongs to which parameter, where names do not show it: from "
        "delta names to parameter names, in the forms that `compute_delta` takes",
        parse=parse_mapping,
        metavar="MAP",
    )
    strict: bool = option(
        True,
        "refuse when a selected tensor of the delta has no parameter, instead of listing it in "
        "`coverage`",
    )
    min_coverage: float | None = option(
        None,
        "the share of the selected elements that must have a parameter; None is all of them when "
        "strict, except for what a mapping leaves out, and any share when not",
        check=_check_share,
        metavar="SHARE",
    )

    def selection(self) -> Selection:
        """Return the selected modules and layers, parsed."""
        return Selection.parse(EVERYTHING if self.modules is None else self.modules, self.layers)


@dataclass(frozen=True, kw_only=True)
class InjectionConfig(TargetOptions, ResidencyOptions, StrengthOptions):
    """The options of `Injection` and `attach`, which read them from keywords or from a file."""

    scope: ScopeName = option(
        "step",
        "step injects into the accumulated gradient, once for each optimizer step; microbatch "
        "into that of every backward pass, as the public code does",
        choices=get_args(ScopeName),
    )
    overlap: bool = option(
        False,
        "inject while backward still runs, where gradients are final; every backward pass then "
        "counts as the last before `step()`, unless it runs in `accumulating()`. With LoRA, Δ is "
        "pulled back beside the first backward pass of a step instead, which takes memory as large "
        "as the factors in float32 and 0.13 GB; factors must not be written through `.data` before "
        "the step. A GPU does so for a bfloat16 Δ and plain LoRA; all else waits for the step",
    )
    missing_gradients: MissingGradients = option(
        "auto",
        "what follows where a target has no gradient in a step: skip leaves it out of the step and "
        "counts it in `skipped`, raise ends the run, and auto skips experts, to which a step may "
        "send no token, and raises for all others",
        choices=get_args(MissingGradients),
    )
    log: Log = option(
        "brief",
        "what the log of a training library shows of `summary()`: brief is eight metrics at most, "
        "all has λ and cosines by module too, as a CSV file has in any case",
        choices=get_args(Log),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "microbatch":
            return
        # Δ must be at hand in every backward pass, and only a whole step can be steered.
        for name, given in (
            ("overlap", self.overlap),
            ("progress_cap", self.progress_cap is not None),
            ("progress_target", self.progress_target is not None),
        ):
            if given:
                raise ValueError(f'{name} is for scope="step", got scope="microbatch"')
        if self.residency not in ("auto", "device"):
            raise ValueError(
                'scope="microbatch" needs Δ beside the gradients: residency="device", got '
                f"{self.residency!r}"
            )

    @classmethod
    def resolve(
        cls, config: ConfigLike, keywords: Mapping[str, Any], *, function: str
    ) -> InjectionConfig:
        """Return the options of a call: those of `config`, over which keywords win.

        Raises:
            TypeError: an unknown or retired keyword, or a config of another type.
            ValueError: a value without meaning.
            Exception: as `from_file`.
        """
        if isinstance(config, str | os.PathLike):
            config = cls.from_file(config)
        if config is not None and not isinstance(config, InjectionConfig):
            raise TypeError(
                f"config must be an InjectionConfig or the path of a file, got "
                f"{type(config).__name__}"
            )
        return InjectionConfig.from_keywords(keywords, function=function, config=config)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a YAML or JSON file, or `injection.yaml` or `injection.json` of a directory.

        Raises:
            FileNotFoundError: no such file.
            TypeError: the file does not hold a mapping.
            ValueError: not readable, an unknown option, or a value without meaning.
        """
        file = local_path(path)
        if file.is_dir():
            files = [file / name for name in _FILES]
            file = next((one for one in files if one.exists()), files[0])
        return cls.from_dict(read_settings(file), origin=str(file))


ConfigLike: TypeAlias = InjectionConfig | str | os.PathLike[str] | None
