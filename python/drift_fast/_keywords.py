"""Types of keyword arguments, used as `**options: Unpack[DeltaKeywords]`.

Generated from the option dataclasses by `python docs/make_options.py` (`make options`); do not
edit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from drift_fast.alignment.embeddings import Rows
    from drift_fast.alignment.mapping import MappingLike
    from drift_fast.checkpoints.opened import PathLike
    from drift_fast.delta.parallel import Ranks
    from drift_fast.inject.config import CapBy, Log, MissingGradients, Rescale, Residency, ScopeName
    from drift_fast.inject.schedule import ScheduleLike
    from drift_fast.inject.strength.formula import Scale
    from drift_fast.inject.strength.per_module import LayerAlpha, PerModule
    from drift_fast.merging.method_options import Weight
    from drift_fast.progress_bar import ProgressCallback
    from drift_fast.protection.options import Place
    from drift_fast.selection import Layers, Modules


class MatchKeywords(TypedDict, total=False):
    """The keywords of `MatchOptions`."""

    mapping: MappingLike | None
    rows: Rows


class AlignKeywords(MatchKeywords, total=False):
    """The keywords of `AlignOptions`."""

    strict: bool
    check_weights: bool
    reader: str


class ModuleKeywords(TypedDict, total=False):
    """The keywords of `ModuleOptions`."""

    modules: Modules
    layers: Layers


class SelectionKeywords(MatchKeywords, ModuleKeywords, total=False):
    """The keywords of `SelectionOptions`."""


class PairKeywords(AlignKeywords, SelectionKeywords, total=False):
    """The keywords of `PairOptions`."""

    min_coverage: float | None


class ProgressKeywords(TypedDict, total=False):
    """The keywords of `ProgressOptions`."""

    progress_bar: bool | None
    on_progress: ProgressCallback | None


class StreamKeywords(ProgressKeywords, total=False):
    """The keywords of `StreamOptions`."""

    threads: int | None
    memory: int | str
    allow_nonfinite: bool


class OutputKeywords(TypedDict, total=False):
    """The keywords of `OutputOptions`."""

    overwrite: bool
    max_shard_size: int | str


class InspectKeywords(StreamKeywords, PairKeywords, total=False):
    """The keywords of `InspectOptions`."""


class RankKeywords(TypedDict, total=False):
    """The keywords of `RankOptions`."""

    ranks: Ranks


class DeltaKeywords(RankKeywords, OutputKeywords, StreamKeywords, PairKeywords, total=False):
    """The keywords of `DeltaOptions`."""

    dtype: str


class SaveKeywords(RankKeywords, OutputKeywords, ProgressKeywords, total=False):
    """The keywords of `SaveOptions`."""

    memory: int | str | None


class MethodKeywords(TypedDict, total=False):
    """The keywords of `MethodOptions`."""

    weight: Weight | None
    multimodal_weight: float | None
    density: float | None
    seed: int | None
    keep_layers: int | None


class MergeKeywords(OutputKeywords, StreamKeywords, AlignKeywords, MethodKeywords, total=False):
    """The keywords of `MergeConfig`."""

    base: PathLike | None
    modules: Modules | None
    layers: Layers
    base_mapping: MappingLike | None
    dtype: str | None


class CheckKeywords(SelectionKeywords, total=False):
    """The keywords of `CheckOptions`."""

    base: PathLike | None
    dtype: str
    read_rate: int | str


class StrengthKeywords(TypedDict, total=False):
    """The keywords of `StrengthOptions`."""

    alpha: PerModule
    layer_alpha: LayerAlpha
    scale: Scale
    rescale: Rescale
    schedule: ScheduleLike
    total_steps: int | None
    progress_cap: PerModule | None
    cap_by: CapBy
    look_ahead: float
    progress_target: PerModule | None
    max_push: float | None


class ResidencyKeywords(TypedDict, total=False):
    """The keywords of `ResidencyOptions`."""

    residency: Residency
    prefetch: int | str


class TargetKeywords(TypedDict, total=False):
    """The keywords of `TargetOptions`."""

    modules: Modules | None
    layers: Layers
    mapping: MappingLike | None
    strict: bool
    min_coverage: float | None


class InjectionKeywords(TargetKeywords, ResidencyKeywords, StrengthKeywords, total=False):
    """The keywords of `InjectionConfig`."""

    scope: ScopeName
    overlap: bool
    missing_gradients: MissingGradients
    log: Log


class MotionKeywords(TargetKeywords, ResidencyKeywords, total=False):
    """The keywords of `MotionOptions`."""

    schedule: ScheduleLike
    seed: int


class ProtectKeywords(TargetKeywords, OutputKeywords, ProgressKeywords, total=False):
    """The keywords of `ProtectOptions`."""

    directions: int
    gradients: Place
    dtype: str | None


class SettingsKeywords(InjectionKeywords, total=False):
    """The keywords of `Settings`."""

    delta: str
    csv: str | None


class TrainingKeywords(TypedDict, total=False):
    """The keywords of `Training`."""

    steps: int | None
    samples: int | None
    epochs: float
    batch: int
    accumulation: int
    learning_rate: float
    scheduler: str
    warmup: float
    tokens: int
    max_tokens: int | None
    image_tokens: int
    modules: Modules
    layers: str | None
    dtype: str
    precision: str
    trained: str
    lora_rank: int
    gpus: int
    sharding: str
    optimizer: str
    offload: str
    gradient_checkpointing: bool
    residency: str
    alpha: float
    scale: Scale
    schedule: str | None
    progress_cap: float | Mapping[str, float] | None
    progress_target: float | Mapping[str, float] | None
    save_total_limit: int | None
    save_steps: float
    save_strategy: str


class PlanKeywords(TrainingKeywords, total=False):
    """The keywords of `PlanOptions`."""

    delta: PathLike | None
    rms: float | None
    gpu_memory: int | str | None
    utilization: float | None
    peak: float


class BenchKeywords(TypedDict, total=False):
    """The keywords of `BenchOptions`."""

    size: str
    layers: int | None
    threads: int
    repeats: int
    cold: bool
    only: tuple[str, ...]
    without: tuple[str, ...]
    scaling: tuple[int, ...]
    trace: bool
    beside: Path | None
    directory: Path | None
    command: str


class SetupKeywords(SelectionKeywords, total=False):
    """The keywords of `SetupOptions`."""

    tuning: str | None
    lora_rank: int | None
    gpu_memory: int | str | None
    learning_rate: float | None
    data: str
    delta: str
    overwrite: bool
