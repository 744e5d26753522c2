"""A checkpoint whose headers were read: names, shapes, dtypes, and the scales of 8-bit codes."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from drift_fast._core import Checkpoint
from drift_fast.checkpoints.config_json import BLOCK, Configuration
from drift_fast.checkpoints.diagnosis import explain
from drift_fast.checkpoints.place import Place
from drift_fast.checkpoints.source import Source, resolve
from drift_fast.checkpoints.unloaded import find_unloaded
from drift_fast.config_files import refuse_control_characters
from drift_fast.errors import DriftWarning
from drift_fast.shapes import Shape

PathLike = str | os.PathLike[str]

# Bytes of one element of each dtype that can be subtracted, under the names of safetensors.
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers were read.

    `scales` are the tensors that hold the block scales of 8-bit codes, by the name of the codes;
    they are not weights, so `shapes` and `dtypes` leave them out. `unscaled` says, by the name of
    the codes, what is wrong with scales that do not fit. `block` is its rows and columns. `absent`
    are tensors that the index names and no shard holds, with the shard that it names.
    `unloaded` are tensors that no model loads and why; `shapes` and `dtypes` leave them out too.
    """

    source: Source
    checkpoint: Checkpoint
    shapes: dict[str, Shape]
    dtypes: dict[str, str]
    scales: dict[str, str] = field(default_factory=dict)
    unscaled: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    block: tuple[int, int] = BLOCK
    reader: str = "auto"
    unloaded: dict[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """Where the configuration and the tokenizer are."""
        path = self.source.path
        return path if path.is_dir() else path.parent

    @property
    def is_local(self) -> bool:
        """Whether all of it is on this machine."""
        return self.source.remote is None

    @cached_property
    def configuration(self) -> Configuration:
        """The config.json beside the weights.

        Raises:
            CheckpointError: it is not valid.
        """
        return Configuration.read(self.directory)

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

    def without(self, reasons: Mapping[str, str]) -> Opened:
        """Return the checkpoint with these tensors as ones that no model loads, and why."""
        if not reasons:
            return self
        return replace(
            self,
            shapes={name: shape for name, shape in self.shapes.items() if name not in reasons},
            dtypes={name: dtype for name, dtype in self.dtypes.items() if name not in reasons},
            unloaded=self.unloaded | dict(reasons),
        )

    def with_loaded(self, names: Set[str]) -> Opened:
        """Return the checkpoint with tensors that no model loads, but the user names, as others."""
        restored = names & self.unloaded.keys()
        if not restored:
            return self
        tensors = {
            name: (dtype, tuple(shape))
            for name, dtype, shape in self.checkpoint.tensors()
            if name in self.shapes or name in restored
        }
        return replace(
            self,
            shapes={name: shape for name, (_, shape) in tensors.items()},
            dtypes={name: dtype for name, (dtype, _) in tensors.items()},
            unloaded={name: why for name, why in self.unloaded.items() if name not in restored},
        )

    def download_files(self, names: Iterable[str]) -> None:
        """Download small files that are beside the weights, those that are there and not here."""
        if self.source.remote is not None:
            for name in names:
                self.source.remote.optional_file(name)

    def download(
        self, names: Iterable[str], on_progress: Callable[[int, int], object] | None = None
    ) -> Opened:
        """Return the checkpoint with these stored tensors on this machine.

        on_progress: called with the bytes that are here and that will be.

        Raises:
            CheckpointError: a server that fails, or a file that changed there.
            OSError: the disk is full.
        """
        return self if self.is_local else self._with_ranges(self._places(names), on_progress)

    def download_elements(self, spans: Mapping[str, Sequence[tuple[int, int]]]) -> Opened:
        """Return the checkpoint with spans of elements of stored tensors on this machine.

        Raises:
            CheckpointError, OSError: as `download`.
        """
        if self.is_local:
            return self
        ranges: dict[str, list[tuple[int, int]]] = {}
        for name, elements in spans.items():
            path, begin, end = self.checkpoint.place(name)
            itemsize = (end - begin) // max(math.prod(self.shapes[name]), 1)
            ranges.setdefault(path, []).extend(
                (begin + start * itemsize, begin + stop * itemsize) for start, stop in elements
            )
        return self._with_ranges(ranges, None)

    def _with_ranges(
        self,
        ranges: Mapping[str, list[tuple[int, int]]],
        on_progress: Callable[[int, int], object] | None,
    ) -> Opened:
        assert self.source.remote is not None
        wanted = {os.path.basename(path): sorted(places) for path, places in ranges.items()}
        self.source.transfers.append(self.source.remote.fetch(wanted, progress=on_progress))
        checkpoint = Checkpoint(self.source.path, reader=self.reader, block=self.block)
        return replace(self, checkpoint=checkpoint)

    def download_nbytes(self, names: Iterable[str]) -> int:
        """Return how many bytes of these stored tensors are not on this machine yet."""
        if self.source.remote is None:
            return 0
        from drift_fast.checkpoints.remote.sparse import missing_nbytes

        ranges = self._places(names).items()
        return sum(missing_nbytes(Path(path), places) for path, places in ranges)

    def _places(self, names: Iterable[str]) -> dict[str, list[tuple[int, int]]]:
        """Return the byte ranges of stored tensors in each shard."""
        ranges: dict[str, list[tuple[int, int]]] = {}
        for name in sorted(names):
            path, start, end = self.checkpoint.place(name)
            ranges.setdefault(path, []).append((start, end))
        return ranges


def open_checkpoint(source: PathLike, reader: str = "auto", *, is_delta: bool = False) -> Opened:
    """Find a checkpoint and read its headers; warn where other loaders may read something else.

    is_delta: whether the files of a delta are wanted, which are no model.

    Raises:
        FileNotFoundError, CheckpointError: a checkpoint that is not there or not valid.
    """
    found = resolve(source)
    if found.remote is not None:
        found.remote.optional_file("config.json")
    if not is_delta:
        _refuse_delta(found.path)
    checkpoint = _open(found.path, reader)
    block = BLOCK
    if checkpoint.scales():
        block = Configuration.read(found.path).weight_block
        checkpoint = Checkpoint(found.path, reader=reader, block=block)
    codes = checkpoint.scales()
    # Tensors of the same dtype and shape share them.
    kinds: dict[tuple[str, Shape], tuple[str, Shape]] = {}
    tensors = {}
    for name, dtype, shape in checkpoint.tensors():
        kind = (dtype, tuple(shape))
        tensors[name] = kinds.setdefault(kind, kind)
    refuse_control_characters(tensors, found)
    scales = {name: scale for name, scale, _ in codes if scale in tensors}
    held = set(scales.values())
    opened = Opened(
        source=found,
        checkpoint=checkpoint,
        shapes={name: shape for name, (_, shape) in tensors.items() if name not in held},
        dtypes={name: dtype for name, (dtype, _) in tensors.items() if name not in held},
        scales=scales,
        unscaled={name: problem for name, _, problem in codes if problem},
        absent=dict(checkpoint.absent()),
        block=block,
        reader=reader,
    )
    return opened.without(find_unloaded(tensors, opened.directory))


def _refuse_delta(path: Path) -> None:
    # The files of a delta are named so; a model may lie beside them.
    directory = path.parent if path.name.startswith("delta") and path.is_file() else path
    if all((directory / name).is_file() for name in ("drift.json", "delta.safetensors.index.json")):
        raise explain(Place.on_disk(directory))


def _open(path: Path, reader: str) -> Checkpoint:
    """Open what is at a path; a directory that does not open is explained."""
    try:
        checkpoint = Checkpoint(path, reader=reader)
    except FileNotFoundError as error:
        raise (_explained(path) or error) from None
    notes = checkpoint.notes()
    if path.is_dir() and (path / "adapter_config.json").exists():
        notes.append(
            f"{path} holds an adapter of PEFT beside the weights, which transformers adds when it "
            "loads them and drift_fast does not: merge it first if it is not merged yet, or remove "
            "its files"
        )
    for note in notes:
        warnings.warn(note, DriftWarning, stacklevel=4)
    return checkpoint


def _explained(path: Path) -> Exception | None:
    """Return what a directory without a checkpoint is; None where a file of one is missing."""
    if not path.is_dir():
        return None
    place = Place.on_disk(path)
    return None if place.holds_checkpoint else explain(place)
