"""What is written of a delta and where, and how one process writes it, whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from drift_fast._core import DeltaWriter
from drift_fast.config_files import json_text
from drift_fast.delta.backends import Backend
from drift_fast.delta.format import BLOCK_NBYTES
from drift_fast.progress_bar import ProgressCallback

if TYPE_CHECKING:
    from drift_fast._core import Output, Share

# What `drift.json` may take for one tensor beside its names, and for the checksum of each block.
_ROW_NBYTES = 1024
_CHECKSUM_NBYTES = 8
# Of the widest type that a delta is stored as.
_ITEMSIZE = 4

Rows: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True)
class Content:
    """The content of a delta: tensors of a backend, their dtype on disk, and the description.

    `describe` returns `drift.json` as plain values from a row for each tensor, or without any.
    """

    backend: Backend
    stored_dtype: str
    describe: Callable[[Rows | None], dict[str, Any]]

    @property
    def tensors(self) -> list[tuple[str, list[int]]]:
        """Name and shape of each tensor, in order."""
        return [(name, list(shape)) for name, shape in self.backend.shapes.items()]

    def text(self, rows: Rows) -> bytes:
        """Return the text of `drift.json`, and empty `rows`, which may take much memory."""
        described = self.describe(rows)
        rows.clear()
        return json_text(described)

    def description_nbytes(self) -> int:
        """Return what `drift.json` will take at most, before there are statistics to put in."""
        fixed = len(json_text(self.describe(None)))
        names = list(self.backend.shapes)
        rows = 3 * len(json_text(names)) + len(names) * _ROW_NBYTES
        nbytes = _ITEMSIZE * sum(map(math.prod, self.backend.shapes.values()))
        return fixed + rows + nbytes // BLOCK_NBYTES * _CHECKSUM_NBYTES


@dataclass(frozen=True)
class Destination:
    """Where a delta is written, and in what; memory of None is what the backend has."""

    path: Path
    overwrite: bool
    max_shard_nbytes: int
    memory_nbytes: int | None = None

    def writer(self, content: Content, share: Share | None = None) -> DeltaWriter:
        """Reserve the files, or, as one of several processes, those of its share."""
        output: Output = {
            "target": self.path,
            "overwrite": self.overwrite,
            "max_shard_nbytes": self.max_shard_nbytes,
            "description_nbytes": content.description_nbytes(),
        }
        return DeltaWriter(output, content.tensors, content.stored_dtype, share=share)


def write_alone(
    content: Content, destination: Destination, on_progress: ProgressCallback
) -> int | None:
    """Write a delta and return the most bytes that buffers took, where that is known.

    Raises:
        FileExistsError, OSError: an output that is taken, or a full disk; nothing is left behind.
    """
    writer = destination.writer(content)
    try:
        rows, peak_nbytes = content.backend.write(
            writer, range(len(content.tensors)), on_progress, destination.memory_nbytes
        )
        writer.commit(content.text(with_checksums(rows, writer)))
    except BaseException:
        writer.abort()
        raise
    return peak_nbytes


def with_checksums(rows: Rows, writer: DeltaWriter) -> Rows:
    """Add to the rows of a writer's tensors the checksums of what holds each on disk."""
    checksums = writer.checksums()
    each = len(checksums) // max(1, len(rows))
    for at, row in enumerate(rows):
        row["checksums"] = checksums[each * at : each * (at + 1)]
    return rows
