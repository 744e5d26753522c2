"""A combination of deltas as what a `Delta` reads, measures and writes its tensors from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from drift_fast._core import DeltaWriter, measure
from drift_fast.delta.combined import Combined
from drift_fast.delta.statistics import Row, Statistics
from drift_fast.dtypes import share_lost
from drift_fast.errors import NonFiniteError
from drift_fast.progress_bar import Progress, ProgressCallback, unreported

if TYPE_CHECKING:
    import torch


class Summed:
    """A combination as what a `Delta` reads its tensors from."""

    def __init__(self, combined: Combined) -> None:
        self._combined = combined
        self.shapes = combined.shapes

    def read_into(self, name: str, buffer: Any, elements: tuple[int, int]) -> None:
        import torch

        begin, _ = elements
        for start, _, piece in self._combined.pieces(name, elements):
            window = torch.frombuffer(buffer, dtype=piece.dtype)
            window[start - begin : start - begin + piece.numel()] = piece

    def write(
        self,
        writer: DeltaWriter,
        places: Sequence[int],
        on_progress: ProgressCallback,
        memory: int | None,
    ) -> tuple[list[Mapping[str, Any]], int | None]:
        # Pieces are of one size, so there is nothing that less memory could change.
        return self._measure(places, on_progress, writer), None

    def statistics(
        self, on_progress: ProgressCallback = unreported
    ) -> tuple[Statistics, int | None]:
        rows = self._measure(range(len(self.shapes)), on_progress, None)
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
                Row.of(
                    name,
                    shape,
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
        on_progress: ProgressCallback,
        writer: DeltaWriter | None,
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
                (sums,) = measure(
                    [(_bytes(total), "float64")], [(window, self._combined.dtype)], threads=1
                )
                squares.append(sums[:2])
                if writer is not None:
                    writer.write(slot, window, offset=start * itemsize)
                done += len(window)
                on_progress(Progress(slot, len(places), done, total_nbytes))
            exact, written = (
                math.fsum(column) for column in zip((0.0, 0.0), *squares, strict=True)
            )
            rows.append({"delta_sq": exact, "written_sq": written})
        on_progress(Progress(len(places), len(places), done, total_nbytes))
        return rows


def _bytes(tensor: torch.Tensor) -> Any:
    """Return a window of bytes onto a tensor's own memory; numpy has no bfloat16."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy()
