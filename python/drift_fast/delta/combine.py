"""Several deltas as one: Σ weight·Δ, tensor by tensor, when it is asked for.

Owns the sum, `combine` and what `Delta.combine` writes of it. Nothing is cached. Every element is
the float64 sum rounded once. Torch is imported when a tensor is asked for, never before.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from drift_fast import _core
from drift_fast.alignment.coverage import Coverage, listed
from drift_fast.delta.delta import Delta
from drift_fast.delta.statistics import Row, Statistics
from drift_fast.dtypes import DTYPES, share_lost
from drift_fast.errors import CoverageError, DriftError, NonFiniteError
from drift_fast.names import kind_of, layer_of, module_of
from drift_fast.progress_bar import Progress, ProgressCallback

if TYPE_CHECKING:
    import torch

_LARGEST = sys.float_info.max


class Summand(Protocol):
    """What a delta must have to be combined."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def __getitem__(self, name: str, /) -> torch.Tensor: ...


Summands: TypeAlias = Mapping[Any, float] | Iterable[tuple[Summand | str | os.PathLike[str], float]]

# Elements summed in float64 at a time, so that memory grows by 32 MiB and not by 8 bytes for each.
_PIECE = 1 << 22


def combine(
    deltas: Summands, *, missing_as_zero: bool = False, dtype: str | None = None
) -> Combined:
    """Return Σ weight·Δ of several deltas, to inject like any other.

    Each tensor is summed when it is asked for, in float64, and rounded once. Names and their order
    are the first delta's, then what the next one adds.

    Args:
        deltas: {delta: weight, …} or pairs of (delta, weight); a delta is a `Delta`, the directory
            of one, or anything with its shapes and tensors. A weight may be negative.
        missing_as_zero: take a tensor that a delta does not have as zero there; otherwise refuse.
        dtype: of the result, "bfloat16", "float16" or "float32"; None is that of the deltas, or
            "float32" where they differ.

    Raises:
        CoverageError: a tensor that not all deltas have, or that has another shape in one.
        FileNotFoundError, CheckpointError: no whole delta at a path.
        TypeError: something that is no delta.
        ValueError: no delta, a weight that is not finite, an unknown dtype.
    """
    if hasattr(deltas, "shapes"):
        raise TypeError("expected {delta: weight, …} or pairs of (delta, weight), got one delta")
    pairs = list(deltas.items() if isinstance(deltas, Mapping) else deltas)
    if not pairs:
        raise ValueError("there is no delta to combine; pass {delta: weight, …}")
    for _, weight in pairs:
        # An int may be larger than a float can be, which float() refuses with an error of its own.
        number = isinstance(weight, int | float | Real) and not isinstance(weight, bool)
        if not number or not -_LARGEST <= weight <= _LARGEST:
            raise ValueError(f"the weight of a delta must be a finite number, got {weight!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    terms = [(_opened(delta), float(weight)) for delta, weight in pairs]
    return Combined(terms, missing_as_zero=missing_as_zero, dtype=dtype)


class Combined(Mapping[str, "torch.Tensor"]):
    """A mapping of tensor name to Σ weight·Δ; `combined[name]` is a fresh tensor on the CPU."""

    # It lies nowhere on disk.
    path: None = None

    def __init__(
        self, terms: list[tuple[Summand, float]], *, missing_as_zero: bool, dtype: str | None
    ) -> None:
        self._terms = terms
        self._held = [dict(delta.shapes) for delta, _ in terms]
        self._shapes = _union(terms, self._held, missing_as_zero)
        self.dtype = _common_dtype(terms) if dtype is None else dtype

    @property
    def names(self) -> list[str]:
        """Tensor names, in the order of the first delta."""
        return list(self._shapes)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return dict(self._shapes)

    def describe(self) -> dict[str, Any]:
        """Return what was combined, for JSON."""
        return {
            "dtype": self.dtype,
            "combined": [
                {
                    "delta": _called(delta),
                    "sources": getattr(delta, "sources", None),
                    "weight": weight,
                    "tensors": len(held),
                }
                for (delta, weight), held in zip(self._terms, self._held, strict=True)
            ],
        }

    def coverage(self) -> Coverage:
        """Return the deltas' coverage where all have the same, and otherwise the names in here."""
        held = [getattr(delta, "coverage", None) for delta, _ in self._terms]
        if isinstance(held[0], Coverage) and all(one == held[0] for one in held):
            return held[0]
        numel = sum(math.prod(shape) for shape in self._shapes.values())
        return Coverage(
            matched=[(name, name) for name in self._shapes],
            matched_numel=numel,
            selected_numel=numel,
        )

    def selection(self) -> str:
        """Return what the deltas select, each selection once."""
        told = dict.fromkeys(str(getattr(delta, "selection", "")) for delta, _ in self._terms)
        return " and ".join(one for one in told if one)

    def multimodal_sq(self, name: str) -> float:
        """Return ‖W_multimodal‖² of a tensor where all deltas are stored and tell the same, or NaN.

        A delta that is not on disk would have to read its checkpoints for it.
        """
        found = {
            delta.stats[name].multimodal_sq
            if isinstance(delta, Delta) and delta.path is not None
            else math.nan
            for (delta, _), held in zip(self._terms, self._held, strict=True)
            if name in held
        }
        return found.pop() if len(found) == 1 else math.nan

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        shape = self._shapes[name]
        result = torch.empty(math.prod(shape), dtype=getattr(torch, self.dtype))
        for start, _, piece in self.pieces(name):
            result[start : start + piece.numel()] = piece
        return result.reshape(shape)

    def pieces(
        self, name: str, elements: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield a tensor, or elements [start, stop) of it, flat and piece by piece.

        Each piece is the number of its first element, the sum in float64, and the sum rounded.

        Raises:
            NonFiniteError: a sum that is not finite.
            DriftError: a delta whose tensor has another shape than it said.
        """
        import torch

        dtype = getattr(torch, self.dtype)
        shape = self._shapes[name]
        begin, end = (0, math.prod(shape)) if elements is None else elements
        parts = [
            (self._reader(delta, name, shape), weight)
            for (delta, weight), held in zip(self._terms, self._held, strict=True)
            if name in held
        ]
        for start in range(begin, end, _PIECE):
            stop = min(end, start + _PIECE)
            (first, weight), *rest = parts
            total = first(start, stop).to(torch.float64) * weight
            for read, weight in rest:
                total.add_(read(start, stop).to(torch.float64), alpha=weight)
            piece = _rounded(total, dtype)
            if not torch.isfinite(piece).all():
                raise NonFiniteError(
                    f"{name}: the combined Δ is not finite in {self.dtype}: a delta holds NaN or "
                    "infinity there, or the sum is beyond the dtype's range; choose smaller "
                    "weights or dtype='float32'"
                )
            yield start, total, piece

    def _reader(
        self, delta: Summand, name: str, shape: tuple[int, ...]
    ) -> Callable[[int, int], torch.Tensor]:
        """Return how to get elements of a delta: from disk part by part, or of the whole tensor."""
        if isinstance(delta, Delta) and delta.path is not None:
            return lambda start, stop: _stored_part(delta, name, start, stop)
        tensor = delta[name].detach()
        if tuple(tensor.shape) != shape:
            raise DriftError(
                f"{name}: {_called(delta)} has a tensor of shape {list(tensor.shape)} but said "
                f"{list(shape)}; a delta must not change while it is combined"
            )
        flat = tensor.to("cpu").reshape(-1)
        return lambda start, stop: flat[start:stop]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        # Mapping's own answer would read the tensors.
        return name in self._shapes

    # Tensors have no single truth value, so a comparison of their mappings has none either.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        terms = ", ".join(f"{weight:g}·{_called(delta)}" for delta, weight in self._terms)
        return f"Combined({len(self)} tensors, {self.dtype}, {terms})"


class Summed:
    """A combination as what a `Delta` reads its tensors from."""

    def __init__(self, combined: Combined) -> None:
        self._combined = combined
        self.shapes = combined.shapes

    def read_into(self, name: str, buffer: Any, elements: tuple[int, int] | None = None) -> None:
        import torch

        begin = 0 if elements is None else elements[0]
        for start, _, piece in self._combined.pieces(name, elements):
            window = torch.frombuffer(buffer, dtype=piece.dtype)
            window[start - begin : start - begin + piece.numel()] = piece

    def write(
        self,
        writer: _core.DeltaWriter,
        places: Sequence[int],
        progress: ProgressCallback | None,
        memory: int | None,
    ) -> tuple[list[Mapping[str, Any]], int | None]:
        # Pieces are of one size, so there is nothing that less memory could change.
        return self._measure(places, progress, writer), None

    def statistics(self, progress: ProgressCallback | None = None) -> tuple[Statistics, int | None]:
        rows = self._measure(range(len(self.shapes)), progress, None)
        return self.conclude(rows, written=False), None

    def conclude(self, rows: Sequence[Mapping[str, Any]], *, written: bool) -> Statistics:
        found = []
        for (name, shape), row in zip(self.shapes.items(), rows, strict=True):
            if row["written_sq"] < (1 - share_lost(self._combined.dtype)) * row["delta_sq"]:
                raise NonFiniteError(
                    f"{name}: part of the combined Δ is below the range of {self._combined.dtype}; "
                    "choose dtype='bfloat16' or 'float32'"
                )
            found.append(
                Row(
                    name=name,
                    module=module_of(name),
                    layer=layer_of(name),
                    kind=kind_of(name),
                    shape=shape,
                    numel=math.prod(shape),
                    delta_sq=row["delta_sq"],
                    reasoning_sq=math.nan,
                    multimodal_sq=self._combined.multimodal_sq(name),
                    dot=math.nan,
                    nonfinite=0,
                    overflow=0,
                )
            )
        return Statistics(found)

    def _measure(
        self,
        places: Sequence[int],
        progress: ProgressCallback | None,
        writer: _core.DeltaWriter | None,
    ) -> list[Mapping[str, Any]]:
        names = list(self.shapes)
        itemsize = 4 if self._combined.dtype == "float32" else 2
        total_nbytes = itemsize * sum(math.prod(self.shapes[names[place]]) for place in places)
        rows: list[Mapping[str, Any]] = []
        done = 0
        for slot, place in enumerate(places):
            squares = []
            for start, total, piece in self._combined.pieces(names[place]):
                window = _bytes(piece)
                # In float64 and in one order, whatever torch's threads do.
                (sums,) = _core.measure(
                    [(_bytes(total), "float64")],
                    [(window, self._combined.dtype)],
                    threads=1,
                    float64=True,
                )
                squares.append(sums[:2])
                if writer is not None:
                    writer.write(slot, window, offset=start * itemsize)
                done += len(window)
                if progress is not None:
                    progress(Progress(slot, len(places), done, total_nbytes))
            exact, written = (
                math.fsum(column) for column in zip((0.0, 0.0), *squares, strict=True)
            )
            rows.append({"delta_sq": exact, "written_sq": written})
        if progress is not None:
            progress(Progress(len(places), len(places), done, total_nbytes))
        return rows


def _bytes(tensor: torch.Tensor) -> Any:
    """Return a window of bytes onto a tensor's own memory; numpy has no bfloat16."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy()


def _stored_part(delta: Delta, name: str, start: int, stop: int) -> torch.Tensor:
    import torch

    tensor = torch.empty(stop - start, dtype=getattr(torch, delta.dtype))
    delta.read_into(name, tensor, start=start)
    return tensor


def _opened(delta: Any) -> Summand:
    if isinstance(delta, str | os.PathLike):
        return Delta.open(delta)
    if not hasattr(delta, "shapes") or not hasattr(delta, "__getitem__"):
        raise TypeError(
            f"expected a Delta or the directory of one, got {type(delta).__name__}; "
            "compute_delta(…) and Delta.open(…) return one"
        )
    return delta  # type: ignore[no-any-return]


def _called(delta: Summand) -> str:
    path = getattr(delta, "path", None)
    if path is not None:
        return str(path)
    # The representation of another mapping may spell out its tensors.
    return repr(delta) if isinstance(delta, Delta | Combined) else type(delta).__name__


def _union(
    terms: list[tuple[Summand, float]],
    held: list[dict[str, tuple[int, ...]]],
    missing_as_zero: bool,
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors, or refuse those that the deltas do not agree on."""
    union: dict[str, tuple[int, ...]] = {}
    unequal, missing = [], []
    for shapes in held:
        for name, shape in shapes.items():
            expected = union.setdefault(name, tuple(shape))
            if tuple(shape) != expected:
                unequal.append((name, f"shape {list(expected)} and {list(shape)}"))
    if unequal:
        raise CoverageError(
            f"{len(unequal)} tensors have another shape in another delta:{listed(unequal)}\n"
            "Combine deltas of one architecture, computed with the same rows=…"
        )
    for (delta, _), shapes in zip(terms, held, strict=True):
        missing += [(name, f"not in {_called(delta)}") for name in union if name not in shapes]
    if missing and not missing_as_zero:
        raise CoverageError(
            f"{len(missing)} tensors are not in every delta:{listed(missing)}\n"
            "Compute the deltas with the same modules=… and layers=…, or pass "
            "missing_as_zero=True to take what is missing as zero"
        )
    if not union:
        raise CoverageError("none of the deltas has a tensor")
    return union


def _common_dtype(terms: list[tuple[Summand, float]]) -> str:
    found = {str(getattr(delta, "dtype", "")).removeprefix("torch.") for delta, _ in terms}
    only = found.pop() if len(found) == 1 else ""
    return only if only in DTYPES else "float32"


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float64 values rounded to the nearest of `dtype`, ties to even.

    torch goes to 16 bits by way of float32, which rounds twice. Rounded to odd on the way (towards
    zero, the last bit set where anything was lost), the second rounding sees the first's remainder.
    """
    import torch

    if dtype == torch.float32:
        return values.to(dtype)
    single = values.to(torch.float32)
    away = single.abs().to(torch.float64) > values.abs()
    lost = single.to(torch.float64) != values
    odd = (single.view(torch.int32) - away.to(torch.int32)) | lost.to(torch.int32)
    return odd.view(torch.float32).to(dtype)
