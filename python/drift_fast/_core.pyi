"""Types of the compiled module; `make lint` compares them with what was built."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, final, type_check_only

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
    "StoredDelta",
    "__version__",
    "align",
    "correlate_samples",
    "debug_build",
    "dots",
    "interface",
    "is_side_file",
    "json_memory",
    "load_differences",
    "measure",
    "merge",
    "output_paths",
    "shards",
    "side_file_names",
    "stream",
    "subtract_scaled",
]

__version__: str
debug_build: bool
# Raised with every change of what follows: `INTERFACE` in rust/python/src/lib.rs.
interface: int

# Errors: rust/python/src/errors.rs.

class DriftError(Exception): ...
class CheckpointError(DriftError): ...
class AlignmentError(DriftError): ...
class AmbiguousAlignmentError(AlignmentError): ...
class CoverageError(DriftError): ...
class NonFiniteError(DriftError): ...

# What several verbs take: rust/python/src/convert.rs.

_Path: TypeAlias = str | os.PathLike[str]
_NamesAndShapes: TypeAlias = list[tuple[str, list[int]]]
# See `layout.Rectangle`.
_Rectangle: TypeAlias = tuple[str, int, int, int, int, int, int, int]
_Source: TypeAlias = str | Sequence[_Rectangle]
# A buffer with the bytes of a tensor, and its dtype.
_Tensor: TypeAlias = tuple[Any, str]
# Called with the tensors and the bytes that are done.
_OnProgress: TypeAlias = Callable[[int, int], object]
# Buffers of bytes, one for each run, or one as a ring for all; and whether it is a ring.
_LoadInto: TypeAlias = tuple[Sequence[Any], bool]
# Called with what came into memory: run, first element, end element, offset in the ring.
_OnLanded: TypeAlias = Callable[[list[tuple[int, int, int, int]]], int]

@type_check_only
class Limits(TypedDict):
    threads: int
    memory: NotRequired[int | None]
    prefetch: NotRequired[int | None]

# checkpoint.rs

@final
class Checkpoint:
    def __new__(
        cls, path: _Path, *, reader: str = "auto", block: tuple[int, int] | None = None
    ) -> Checkpoint: ...
    @property
    def path(self) -> os.PathLike[str]: ...
    def notes(self) -> list[str]: ...
    def absent(self) -> list[tuple[str, str]]: ...
    def tensors(self) -> list[tuple[str, str, list[int]]]: ...
    def files(self) -> list[os.PathLike[str]]: ...
    def scales(self) -> list[tuple[str, str, str]]: ...
    def place(self, name: str) -> tuple[str, int, int]: ...
    def fingerprint(self) -> list[tuple[str, int, str]]: ...
    def read_into(
        self, name: str, buffer: Any, *, elements: tuple[int, int] | None = None
    ) -> None: ...

# stored.rs

@final
class StoredDelta:
    def __new__(cls, index: _Path, checksums: dict[str, str] | None) -> StoredDelta: ...
    def tensors(self) -> list[tuple[str, str, list[int]]]: ...
    def load(
        self,
        runs: Sequence[tuple[str, int, int, bool]],
        into: _LoadInto,
        *,
        threads: int,
        landed: _OnLanded | None = None,
    ) -> list[float]: ...
    def copy_into(self, name: str, buffer: Any, elements: tuple[int, int]) -> None: ...
    def compare(self, name: str, checksums: str) -> None: ...

# align.rs

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

def align(
    reasoning: _NamesAndShapes, multimodal: _NamesAndShapes, *, prefer_equal_names: bool = False
) -> Aligned: ...
def correlate_samples(
    reasoning: Checkpoint, multimodal: Checkpoint, pairs: list[tuple[_Source, str]]
) -> tuple[list[float], int]: ...

# json.rs

def json_memory(text: bytes, *, unique: bool = False) -> int: ...

# stream.rs

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
    rounding_sq: float

def stream(
    reasoning: Checkpoint,
    multimodal: Checkpoint,
    pairs: Sequence[tuple[_Source, str]],
    limits: Limits,
    *,
    writer: DeltaWriter | None = None,
    progress: _OnProgress | None = None,
) -> tuple[list[Moments], int]: ...
def load_differences(
    reasoning: Checkpoint,
    multimodal: Checkpoint,
    runs: Sequence[tuple[_Source, str, tuple[int, int] | None]],
    dtype: str,
    into: _LoadInto,
    limits: Limits,
    *,
    detail: Literal["faults", "moments", "rounding"],
    landed: _OnLanded | None = None,
) -> list[tuple[float, Moments]]: ...

# merge.rs

# Reasoning, multimodal and, for a method that needs one, the base.
_Models: TypeAlias = tuple[Checkpoint, Checkpoint, Checkpoint | None]
# Source in the reasoning checkpoint and in the base, dtype of the result, both weights, and whether
# the reasoning checkpoint holds a difference from the multimodal one.
_Blended: TypeAlias = tuple[_Source, _Source | None, str, float, float, bool]

@type_check_only
class Method(TypedDict):
    name: str
    density: float | None
    seed: int

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
    shift_sq: float
    rounding_sq: float

def merge(
    models: _Models,
    tensors: list[tuple[str, _Blended | None]],
    writer: ModelWriter,
    method: Method,
    limits: Limits,
    *,
    progress: _OnProgress | None = None,
) -> tuple[list[Found | None], int]: ...

# in_memory.rs

def measure(
    first: list[_Tensor], second: list[_Tensor], *, threads: int
) -> list[tuple[float, float, float]]: ...
def dots(first: list[_Tensor], second: list[_Tensor], *, threads: int) -> list[float]: ...
def subtract_scaled(
    tensors: list[_Tensor], deltas: list[_Tensor], coefficients: list[float], *, threads: int
) -> None: ...

# writers.rs

@type_check_only
class Output(TypedDict):
    target: _Path
    overwrite: bool
    max_shard_nbytes: int
    description_nbytes: int

@type_check_only
class Share(TypedDict):
    shards: list[int]
    join: bool

@final
class DeltaWriter:
    def __new__(
        cls, output: Output, tensors: _NamesAndShapes, dtype: str, *, share: Share | None = None
    ) -> DeltaWriter: ...
    def write(self, slot: int, buffer: Any, *, offset: int = 0) -> None: ...
    def checksums(self) -> list[str]: ...
    def flush(self) -> None: ...
    def commit(self, description: bytes) -> None: ...
    def abort(self) -> None: ...

@final
class ModelWriter:
    def __new__(
        cls,
        output: Output,
        multimodal: Checkpoint,
        tensors: list[tuple[str, str | None]],
        files: list[tuple[str, int]],
    ) -> ModelWriter: ...
    def add(self, name: str, buffer: Any) -> None: ...
    def commit(self, description: bytes) -> None: ...
    def abort(self) -> None: ...

def shards(
    tensors: _NamesAndShapes, dtype: str, *, max_shard_nbytes: int
) -> list[tuple[int, int, int]]: ...
def output_paths(target: _Path) -> tuple[os.PathLike[str], os.PathLike[str]]: ...
def side_file_names() -> list[str]: ...
def is_side_file(name: str) -> bool: ...
