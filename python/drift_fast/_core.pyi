"""Types of the compiled module; `make lint` compares them with what was built."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict, final, type_check_only

__all__ = [
    "Aligned",
    "AlignmentError",
    "AmbiguousAlignmentError",
    "Checkpoint",
    "CheckpointError",
    "CoverageError",
    "DeltaWriter",
    "DriftError",
    "ModelWriter",
    "NonFiniteError",
    "__version__",
    "align",
    "correlate_samples",
    "debug_build",
    "is_side_file",
    "measure",
    "merge",
    "places_of",
    "shards",
    "side_file_names",
    "stream",
    "subtract_into",
    "subtract_scaled",
]

__version__: str
debug_build: bool

class DriftError(Exception): ...
class CheckpointError(DriftError): ...
class AlignmentError(DriftError): ...
class AmbiguousAlignmentError(AlignmentError): ...
class CoverageError(DriftError): ...
class NonFiniteError(DriftError): ...

# See `layout.Rectangle`.
_Rectangle: TypeAlias = tuple[str, int, int, int, int, int, int, int]
_Source: TypeAlias = str | Sequence[_Rectangle]

@type_check_only
class Moments(TypedDict):
    delta_sq: float
    written_sq: float
    reasoning_sq: float
    multimodal_sq: float
    dot: float
    max_abs: float
    zeros: int
    agreeing: int
    stored_dot: float
    flushed: int
    nonfinite_reasoning: int
    nonfinite_multimodal: int
    overflow: int

@final
class Aligned:
    @property
    def prefixes(self) -> tuple[str, str]: ...
    @property
    def pairs(self) -> list[tuple[str, str]]: ...
    @property
    def unmatched_reasoning(self) -> list[tuple[str, str]]: ...
    @property
    def unmatched_multimodal(self) -> list[tuple[str, str]]: ...
    @property
    def layer_conflict(self) -> str: ...
    @property
    def alternatives(self) -> list[tuple[str, str, int]]: ...

@final
class Checkpoint:
    def __new__(
        cls,
        path: str | os.PathLike[str],
        *,
        reader: str = "auto",
        block: tuple[int, int] | None = None,
    ) -> Checkpoint: ...
    @property
    def path(self) -> os.PathLike[str]: ...
    def tensors(self) -> list[tuple[str, str, list[int], os.PathLike[str]]]: ...
    def scales(self) -> list[tuple[str, str, str]]: ...
    def decode_into(self, name: str, buffer: Any, *, elements: tuple[int, int]) -> None: ...
    def place(self, name: str) -> tuple[os.PathLike[str], int, int]: ...
    def fingerprint(self) -> list[tuple[str, int, str]]: ...
    def read_into(
        self, name: str, buffer: Any, *, elements: tuple[int, int] | None = None
    ) -> None: ...

@final
class DeltaWriter:
    def __new__(
        cls,
        target: str | os.PathLike[str],
        tensors: list[tuple[str, list[int]]],
        dtype: str,
        *,
        max_shard_nbytes: int,
        overwrite: bool,
        description_nbytes: int = 0,
        shards: list[int] | None = None,
        join: bool = False,
    ) -> DeltaWriter: ...
    def write(self, slot: int, buffer: Any, *, offset: int = 0) -> None: ...
    def flush(self) -> None: ...
    def commit(self, description: str) -> None: ...
    def abort(self) -> None: ...

@final
class ModelWriter:
    def __new__(
        cls,
        target: str | os.PathLike[str],
        multimodal: Checkpoint,
        tensors: list[tuple[str, str | None]],
        *,
        max_shard_nbytes: int,
        overwrite: bool,
        description_nbytes: int,
        files: list[tuple[str, int]],
    ) -> ModelWriter: ...
    def add(self, name: str, buffer: Any) -> None: ...
    def commit(self, description: str) -> None: ...
    def abort(self) -> None: ...

# Source in the reasoning checkpoint and in the base, dtype of the result, and both weights.
_Blended: TypeAlias = tuple[_Source, _Source | None, str, float, float]

@type_check_only
class Found(TypedDict):
    merged: int
    nonfinite_reasoning: int
    nonfinite_multimodal: int
    nonfinite_base: int
    overflow: int
    kept_reasoning: int | None
    kept_multimodal: int | None
    cosine: float | None

def merge(
    reasoning: Checkpoint,
    multimodal: Checkpoint,
    base: Checkpoint | None,
    tensors: list[tuple[str, _Blended | None]],
    writer: ModelWriter,
    *,
    method: str,
    density: float | None = None,
    seed: int = 0,
    threads: int,
    memory: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[list[Found | None], int]: ...
def align(
    reasoning: list[tuple[str, list[int]]],
    multimodal: list[tuple[str, list[int]]],
    *,
    prefer_equal_names: bool = False,
) -> Aligned: ...
def side_file_names() -> list[str]: ...
def is_side_file(name: str) -> bool: ...
def shards(
    tensors: list[tuple[str, list[int]]], dtype: str, *, max_shard_nbytes: int
) -> list[tuple[int, int, int]]: ...
def places_of(target: str | os.PathLike[str]) -> tuple[os.PathLike[str], os.PathLike[str]]: ...
def stream(
    reasoning: Checkpoint,
    multimodal: Checkpoint,
    pairs: Sequence[tuple[_Source, str]],
    *,
    threads: int,
    memory: int | None = None,
    writer: DeltaWriter | None = None,
    progress: Callable[[int, int], object] | None = None,
    prefetch: int | None = None,
) -> tuple[list[Moments], int]: ...
def subtract_into(
    reasoning: Checkpoint,
    multimodal: Checkpoint,
    pair: tuple[_Source, str],
    buffer: Any,
    *,
    dtype: str,
    threads: int,
    memory: int | None = None,
    elements: tuple[int, int] | None = None,
) -> Moments: ...
def correlate_samples(
    reasoning: Checkpoint, multimodal: Checkpoint, pairs: list[tuple[_Source, str]]
) -> tuple[list[float], int]: ...
def measure(
    first: list[tuple[Any, str]],
    second: list[tuple[Any, str]],
    *,
    threads: int,
    float64: bool = False,
) -> list[tuple[float, float, float]]: ...
def subtract_scaled(
    tensors: list[tuple[Any, str]],
    deltas: list[tuple[Any, str]],
    coefficients: list[float],
    *,
    threads: int,
) -> None: ...
