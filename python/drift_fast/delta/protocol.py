"""What a delta must have for those who read it: shapes and tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, cast

if TYPE_CHECKING:
    from pathlib import Path

    import torch


class Run(NamedTuple):
    """Elements [start, stop) of a tensor in row-major order, by its name in the delta.

    as_stored: the codes of an int8 delta as they are; `<name>.scale` are then their scales.
    """

    name: str
    start: int
    stop: int
    as_stored: bool = False


# What `_core.StoredDelta.load` takes.
LoadInto: TypeAlias = tuple[Sequence[Any], bool]
OnLanded: TypeAlias = Callable[[list[tuple[int, int, int, int]]], int]


class DeltaLike(Protocol):
    """A mapping of tensor name to Δ; each tensor that is read is a fresh one, of any device."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def __getitem__(self, name: str, /) -> torch.Tensor: ...


class StoredDelta(Protocol):
    """A delta on disk, of which elements can be read without their tensor."""

    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def stats(self) -> Any: ...
    def read_into(self, name: str, tensor: torch.Tensor, *, start: int | None = None) -> None: ...


def on_disk(delta: DeltaLike) -> StoredDelta | None:
    """Return a delta as one whose elements can be read from disk, or None."""
    if getattr(delta, "path", None) is not None and hasattr(delta, "read_into"):
        return cast(StoredDelta, delta)
    return None


def label_of(delta: DeltaLike) -> str:
    """Return what to call a delta in a message: its path, Hub id or URL, or what it is."""
    path = getattr(delta, "path", None)
    if path is not None:
        return str(getattr(delta, "opened_from", None) or path)
    # The representation of a foreign mapping may spell out its tensors.
    return repr(delta) if type(delta).__module__.startswith("drift_fast.") else type(delta).__name__
