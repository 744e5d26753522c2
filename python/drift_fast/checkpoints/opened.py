"""A checkpoint whose headers were read: names, shapes, dtypes, and the scales of 8-bit codes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from drift_fast import _core
from drift_fast.checkpoints.config_json import BLOCK, Configuration
from drift_fast.checkpoints.source import Source, resolve

PathLike = str | os.PathLike[str]
Shape = tuple[int, ...]

# Bytes of one element of each dtype that can be subtracted, under the names of safetensors.
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers were read.

    `scales` are the tensors that hold the block scales of 8-bit codes, by the name of the codes;
    they are no weights, so `shapes` and `dtypes` do not have them. `unscaled` says of each tensor
    of codes that has none that fit what is wrong. `block` is the rows and columns of a block.
    """

    source: Source
    checkpoint: _core.Checkpoint
    shapes: dict[str, Shape]
    dtypes: dict[str, str]
    scales: dict[str, str] = field(default_factory=dict)
    unscaled: dict[str, str] = field(default_factory=dict)
    block: tuple[int, int] = BLOCK

    @property
    def directory(self) -> Path:
        """Where the configuration and the tokenizer lie."""
        path = self.source.path
        return path if path.is_dir() else path.parent

    def nbytes(self, name: str) -> int:
        """Return the size of a stored tensor."""
        return math.prod(self.shapes[name]) * ITEMSIZE.get(self.dtypes[name], 1)

    def stored_names(self, names: Iterable[str]) -> set[str]:
        """Return names with those of the scales that they need."""
        found = set(names)
        return found | {self.scales[name] for name in found if name in self.scales}

    def has_values(self, name: str) -> bool:
        """Whether the elements of a tensor can be read as numbers."""
        return name not in self.unscaled and self.dtypes[name] in ITEMSIZE


def open_checkpoint(source: PathLike, reader: str = "auto") -> Opened:
    """Find a checkpoint and read its headers.

    Raises:
        FileNotFoundError, CheckpointError: a checkpoint that is not there or not valid.
    """
    found = resolve(source)
    if found.remote is not None:
        found.remote.optional_file("config.json")
    checkpoint = _core.Checkpoint(found.path, reader=reader)
    block = BLOCK
    if checkpoint.scales():
        block = Configuration.read(found.path).weight_block
        checkpoint = _core.Checkpoint(found.path, reader=reader, block=block)
    codes = checkpoint.scales()
    tensors = {name: (dtype, tuple(shape)) for name, dtype, shape, _ in checkpoint.tensors()}
    scales = {name: scale for name, scale, _ in codes if scale in tensors}
    held = set(scales.values())
    return Opened(
        found,
        checkpoint,
        {name: shape for name, (_, shape) in tensors.items() if name not in held},
        {name: dtype for name, (dtype, _) in tensors.items() if name not in held},
        scales,
        {name: problem for name, _, problem in codes if problem},
        block,
    )
