"""A merge that was written, read back from what `merge.json` says of it."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from drift_fast.alignment.coverage import Coverage
from drift_fast.config_files import JsonFile
from drift_fast.merging.merge import FORMAT_VERSION, Merged
from drift_fast.merging.outcome import MergedTensor
from drift_fast.names import kind_of, layer_of
from drift_fast.paths import local_path

DESCRIPTION = "merge.json"
# As that of a delta: 262,144 tensors, the limit of a checkpoint, take about 600 bytes each.
_MAX_NBYTES = 256_000_000
_NUMBERS = ("weight", "multimodal_weight", "density", "seed", "keep_layers")


class _Written(msgspec.Struct):
    """What a report needs of a description; other keys are ignored."""

    format_version: int
    method: str
    tensors: list[dict[str, Any]]
    coverage: dict[str, Any]
    files: list[str]
    left_behind: list[str]
    sources: dict[str, Any]
    rounding_share: float | None = None
    weight: dict[str, float] | None = None
    multimodal_weight: float | None = None
    density: float | None = None
    seed: int | None = None
    keep_layers: int | None = None


def open_merged(path: str | os.PathLike[str]) -> Merged:
    """Return what `merge` said of the directory that it wrote; `peak_nbytes` is 0, not known.

    Raises:
        FileNotFoundError: no merge there.
        CheckpointError: not a description of a merge, or one that another version wrote.
    """
    directory = local_path(path)
    file = JsonFile(directory / DESCRIPTION, _MAX_NBYTES, "merge again")
    found = file.read(_Written)
    if found.format_version != FORMAT_VERSION:
        raise file.wrong(f"format version {found.format_version}, expected {FORMAT_VERSION}")
    names = [file.convert(row.get("name"), str, "tensors.name") for row in found.tensors]
    rows = [
        row | {"kind": kind_of(name), "layer": layer_of(name)}
        for name, row in zip(names, found.tensors, strict=True)
    ]
    try:
        coverage = Coverage.from_dict(found.coverage.get("reasoning"))
    except ValueError as error:
        raise file.wrong(str(error)) from error
    return Merged(
        path=directory.absolute(),
        method=found.method,
        parameters={
            name: value for name in _NUMBERS if (value := getattr(found, name)) is not None
        },
        tensors=file.convert(rows, tuple[MergedTensor, ...], "tensors"),
        coverage=coverage,
        files=tuple(found.files),
        left_behind=tuple(found.left_behind),
        sources=found.sources,
        peak_nbytes=0,
        rounding_share=found.rounding_share,
    )
