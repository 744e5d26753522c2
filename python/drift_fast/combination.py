"""Several deltas as one: Σ weight·Δ, tensor by tensor, when it is asked for.

Nothing is written or cached. Every element is the float64 sum rounded once. Torch is imported when
a tensor is asked for, never before.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from drift_fast.coverage import listed
from drift_fast.delta import DTYPES, Delta
from drift_fast.errors import CoverageError, DriftError, NonFiniteError

if TYPE_CHECKING:
    import torch

_LARGEST = sys.float_info.max


class Summand(Protocol):
    """What a delta must have to be combined."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def __getitem__(self, name: str, /) -> torch.Tensor: ...


Summands: TypeAlias = Mapping[Any, float] | Iterable[tuple[Summand | str | os.PathLike[str], float]]

# Elements summed in float64 at a time, so that memory grows by 128 MiB and not by 8 bytes for each.
_PIECE = 1 << 24


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

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        shape = self._shapes[name]
        dtype = getattr(torch, self.dtype)
        parts = [
            (self._read(delta, name, shape), weight)
            for (delta, weight), held in zip(self._terms, self._held, strict=True)
            if name in held
        ]
        result = torch.empty(math.prod(shape), dtype=dtype)
        for start in range(0, result.numel(), _PIECE):
            piece = result[start : start + _PIECE]
            (first, weight), *rest = parts
            total = first[start : start + _PIECE].to(torch.float64) * weight
            for tensor, weight in rest:
                total.add_(tensor[start : start + _PIECE].to(torch.float64), alpha=weight)
            piece.copy_(_rounded(total, dtype))
            if not torch.isfinite(piece).all():
                raise NonFiniteError(
                    f"{name}: the combined Δ is not finite in {self.dtype}: a delta holds NaN or "
                    "infinity there, or the sum is beyond the dtype's range; choose smaller "
                    "weights or dtype='float32'"
                )
        return result.reshape(shape)

    def _read(self, delta: Summand, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = delta[name].detach()
        if tuple(tensor.shape) != shape:
            raise DriftError(
                f"{name}: {_called(delta)} has a tensor of shape {list(tensor.shape)} but said "
                f"{list(shape)}; a delta must not change while it is combined"
            )
        return tensor.to("cpu").reshape(-1)

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
