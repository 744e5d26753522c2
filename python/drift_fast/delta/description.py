"""What `drift.json` says of a delta, read typed and within limits; docs/format.md describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from drift_fast.checkpoints.diagnosis import NoDelta, explain_no_delta
from drift_fast.checkpoints.place import Place
from drift_fast.config_files import JsonFile, shown
from drift_fast.delta.format import AGAIN, DESCRIPTION, FORMAT_VERSION
from drift_fast.dtypes import RETIRED, check_stored_dtype
from drift_fast.errors import CheckpointError

# 262,144 tensors, the limit of a checkpoint, take about 600 bytes each.
_MAX_NBYTES = 256_000_000


class StoredRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """The statistics of one tensor: sums of squares and counts, from which the rest follows.

    The columns of `Row` that do not follow from the name and the shape, in the same order.
    """

    name: str
    shape: tuple[int, ...]
    delta_sq: float | None
    reasoning_sq: float | None
    multimodal_sq: float | None
    dot: float | None
    nonfinite: int
    overflow: int
    max_abs: float | None = None
    zeros: int | None = None
    agreeing: int | None = None
    rounding_sq: float | None = None
    stored_sq: float | None = None
    stored_dot: float | None = None
    flushed: int | None = None


class StoredChecksums(msgspec.Struct, frozen=True):
    """The checksums of every tensor on disk: eight hexadecimal digits for each block of bytes."""

    algorithm: Literal["crc32"]
    block_nbytes: Literal[1048576]
    tensors: dict[str, str]


class _Written(msgspec.Struct):
    """Which version wrote a delta, and what that called its dtype."""

    format_version: msgspec.Raw = msgspec.Raw(b"null")
    dtype: msgspec.Raw = msgspec.Raw(b"null")
    drift_fast_version: msgspec.Raw = msgspec.Raw(b'"of an unknown version"')


class _Stored(msgspec.Struct):
    """A description as it is stored; the statistics, most of it, are made at once."""

    dtype: str
    selection: str
    sources: msgspec.Raw
    alignment: msgspec.Raw
    coverage: msgspec.Raw
    statistics: list[StoredRow]
    checksums: msgspec.Raw = msgspec.Raw(b"null")


class Description(msgspec.Struct, frozen=True):
    """What `drift.json` says of a delta; other keys are ignored."""

    dtype: str
    selection: str
    sources: dict[str, Any]
    alignment: dict[str, Any]
    coverage: dict[str, Any]
    statistics: list[StoredRow]
    # A delta of an earlier version has none.
    checksums: StoredChecksums | None = None

    @property
    def checksums_of_tensors(self) -> dict[str, str] | None:
        """The checksums of every tensor on disk, where there are any."""
        return None if self.checksums is None else self.checksums.tensors

    @classmethod
    def read(cls, directory: Path) -> Description:
        """Read the description of a delta.

        Raises:
            NoDelta: there is none.
            CheckpointError: not a description, or one that another version wrote.
        """
        path = directory / DESCRIPTION
        if not path.is_file():
            if directory.is_dir():
                raise explain_no_delta(Place.on_disk(directory))
            raise NoDelta(f"{directory}: not a delta; give the directory that has {DESCRIPTION}")
        file = JsonFile(path, _MAX_NBYTES, AGAIN)
        written = file.read_parts(_Written)
        version: Any = file.parse(written.format_version, Any)
        dtype: Any = file.parse(written.dtype, Any)
        author = f"drift_fast {shown(file.parse(written.drift_fast_version, Any))}".replace("'", "")
        if version != FORMAT_VERSION:
            raise file.wrong(
                f"format version {shown(version)}, which {author} wrote, expected {FORMAT_VERSION}"
            )
        if isinstance(dtype, str) and dtype in RETIRED:
            raise CheckpointError(
                f"{directory}: {author} stored this delta as {dtype}, which this version does not "
                "read; compute the delta again with dtype='bfloat16' or 'int8'"
            )
        stored = file.read_parts(_Stored)
        has_none = bytes(stored.checksums) == b"null"
        description = cls(
            stored.dtype,
            stored.selection,
            file.parse(stored.sources, dict[str, Any], "sources"),
            file.parse(stored.alignment, dict[str, Any], "alignment"),
            file.parse(stored.coverage, dict[str, Any], "coverage"),
            stored.statistics,
            None if has_none else file.parse(stored.checksums, StoredChecksums, "checksums"),
        )
        try:
            check_stored_dtype(description.dtype)
        except ValueError as error:
            raise file.wrong(str(error)) from error
        return description
