"""Several deltas as one: Σ weight·Δ, tensor by tensor, when it is asked for.

Owns the sum; what `Delta` writes of it is `summed`'s. Nothing is cached. Every element is the
float64 sum rounded once. Torch is imported when a tensor is asked for, never before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from drift_fast.alignment.coverage import Coverage, listed
from drift_fast.delta.allocation import empty_tensor
from drift_fast.delta.protocol import DeltaLike, StoredDelta, label_of, on_disk
from drift_fast.dtypes import DTYPES
from drift_fast.errors import CoverageError, DriftError, NonFiniteError

if TYPE_CHECKING:
    import torch

# Elements summed in float64 at a time, so that memory grows by 32 MiB and not by 8 bytes for each.
_PIECE = 1 << 22


class Combined(Mapping[str, "torch.Tensor"]):
    """A mapping of tensor name to Σ weight·Δ; `combined[name]` is a fresh tensor on the CPU."""

    # It is not on disk.
    path: None = None

    def __init__(
        self, terms: list[tuple[DeltaLike, float]], *, missing_as_zero: bool, dtype: str | None
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

    def to_dict(self) -> dict[str, Any]:
        """Return what was combined, for JSON."""
        return {
            "dtype": self.dtype,
            "combined": [
                {
                    "delta": label_of(delta),
                    "sources": getattr(delta, "sources", None),
                    "weight": weight,
                    "tensors": len(held),
                }
                for (delta, weight), held in zip(self._terms, self._held, strict=True)
            ],
        }

    def coverage(self) -> Coverage:
        """Return the deltas' coverage where all have the same, or one of the names in here."""
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
        found = dict.fromkeys(str(getattr(delta, "selection", "")) for delta, _ in self._terms)
        return " and ".join(one for one in found if one)

    def multimodal_sq(self, name: str) -> float:
        """Return ‖W_multimodal‖² of a tensor where all deltas are on disk and agree on it, or NaN.

        A delta that is not on disk would have to read its checkpoints for it.
        """
        deltas = [delta for delta, _ in self._terms]
        found = {
            math.nan if stored is None else stored.stats[name].multimodal_sq
            for stored, held in zip(map(on_disk, deltas), self._held, strict=True)
            if name in held
        }
        return found.pop() if len(found) == 1 else math.nan

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        result = empty_tensor(name, (math.prod(shape),), self.dtype)
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
        self, delta: DeltaLike, name: str, shape: tuple[int, ...]
    ) -> Callable[[int, int], torch.Tensor]:
        """Return how to get elements of a delta: from disk, or from the whole tensor."""
        stored = on_disk(delta)
        if stored is not None:
            return lambda start, stop: _stored_part(stored, name, start, stop)
        tensor = delta[name].detach()
        if tuple(tensor.shape) != shape:
            raise DriftError(
                f"{name}: {label_of(delta)} has a tensor of shape {list(tensor.shape)} but said "
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
        terms = ", ".join(f"{weight:g}·{label_of(delta)}" for delta, weight in self._terms)
        return f"Combined({len(self)} tensors, {self.dtype}, {terms})"


def _stored_part(delta: StoredDelta, name: str, start: int, stop: int) -> torch.Tensor:
    import torch

    tensor = torch.empty(stop - start, dtype=getattr(torch, delta.dtype))
    delta.read_into(name, tensor, start=start)
    return tensor


def _union(
    terms: list[tuple[DeltaLike, float]],
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
            f"{len(unequal)} tensors do not have the same shape in every delta:{listed(unequal)}\n"
            "Combine deltas of one architecture, computed with the same rows=…"
        )
    for (delta, _), shapes in zip(terms, held, strict=True):
        missing += [(name, f"not in {label_of(delta)}") for name in union if name not in shapes]
    if missing and not missing_as_zero:
        raise CoverageError(
            f"{len(missing)} tensors are not in every delta:{listed(missing)}\n"
            "Compute the deltas with the same modules=… and layers=…, or pass "
            "missing_as_zero=True to take missing tensors as zero"
        )
    if not union:
        raise CoverageError("none of the deltas has a tensor")
    return union


def _common_dtype(terms: list[tuple[DeltaLike, float]]) -> str:
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
