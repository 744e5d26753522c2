"""Does a model hold the weights of the checkpoint that it was just loaded from?

Trainers warn and go on where a checkpoint's names are not the model's, and training would begin
anew. Samples of both show it. What cannot be compared, as adapters and shards, is not judged.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from drift_fast.checkpoints.opened import Opened, open_checkpoint
from drift_fast.errors import AlignmentError, DriftError, DriftWarning
from drift_fast.inject.config import TargetOptions
from drift_fast.inject.target import Target
from drift_fast.inject.targets import find_targets
from drift_fast.names import is_other_modality

# Tensors that are compared at most, and elements of each.
_TENSORS, _ELEMENTS = 64, 256
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Difference:
    """The share of sampled elements that are not those of a checkpoint, in the model's dtype.

    `foreign` counts those alone that are not a rounding of the checkpoint's either, as of a model
    that was loaded from it in 16 bits. `first` is the first parameter with such elements.
    """

    path: Path
    share: float
    foreign: float
    first: str


@torch.no_grad()
def difference(model: nn.Module, path: str | os.PathLike[str]) -> Difference | None:
    """Compare samples of the trained parameters of a model with a checkpoint on this machine.

    Whole parameters that are stored under any name of theirs, as one tensor, are compared, with no
    copy of more than the samples. None where there are none.
    """
    try:
        with warnings.catch_warnings():
            # What other loaders may read is for those who compute from it to hear.
            warnings.simplefilter("ignore", DriftWarning)
            opened = open_checkpoint(path)
        stored, targets = _matched(model, opened)
    except (DriftError, OSError, ValueError):
        # Pickles, adapters, shards of FSDP: what the Trainer alone can read.
        return None
    whole = [one for one in targets if one.trains and one.adapted is None and not one.parts]
    sampled = differing = foreign = 0
    first = ""
    for target in whole[:: max(1, -(-len(whole) // _TENSORS))]:
        numel = target.parameter.numel()
        start = max(0, numel // 2 - _ELEMENTS // 2)
        stop = min(numel, start + _ELEMENTS)
        found = target.parameter.detach().reshape(-1)[start:stop].cpu()
        held = stored.run(target.delta_name, start, stop)
        apart = found != held.to(found.dtype)
        new = apart.clone()
        for dtype in (torch.bfloat16, torch.float16):
            new &= found.double() != held.to(dtype).double()
        first = first or (target.name if apart.any() else "")
        sampled += found.numel()
        differing += int(apart.sum())
        foreign += int(new.sum())
    if not sampled:
        return None
    return Difference(Path(path), differing / sampled, foreign / sampled, first)


def _matched(model: nn.Module, opened: Opened) -> tuple[_Stored, list[Target]]:
    """Match all of a checkpoint, or its backbone where towers have prefixes of another kind.

    Raises:
        AlignmentError: neither matches.
    """
    options = TargetOptions(strict=False)
    stored = _Stored(opened, opened.shapes)
    try:
        return stored, find_targets(model, stored, options)[0]
    except AlignmentError:
        names = [name for name in opened.shapes if not is_other_modality(name)]
        stored = _Stored(opened, names)
        return stored, find_targets(model, stored, options)[0]


class _Stored(Mapping[str, torch.Tensor]):
    """Tensors of a checkpoint on this machine as a mapping, of which elements can be read."""

    def __init__(self, opened: Opened, names: Iterable[str]) -> None:
        self._opened = opened
        self.shapes = {
            name: opened.shapes[name] for name in names if opened.dtypes[name] in _DTYPES
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.run(name, 0, math.prod(self.shapes[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def run(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) of a tensor in row-major order."""
        dtype = _DTYPES[self._opened.dtypes[name]]
        path, begin, _ = self._opened.checkpoint.place(name)
        with open(path, "rb") as file:
            file.seek(begin + start * dtype.itemsize)
            content = bytearray(file.read((stop - start) * dtype.itemsize))
        return torch.frombuffer(content, dtype=dtype)
