"""The reasoning delta: kept on disk or as two checkpoints, read as a mapping of tensors.

Owns `Delta`, `open_delta` and `combine`. A delta whose directory holds `drift.json` is whole.
Torch is imported when a tensor is asked for, never before.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

from drift_fast._core import __version__
from drift_fast.alignment.coverage import Coverage
from drift_fast.checkpoints.diagnosis import NoDelta
from drift_fast.checkpoints.opened import PathLike
from drift_fast.checkpoints.source import Source, resolve
from drift_fast.delta.allocation import empty_tensor
from drift_fast.delta.backends import Backend, Stored, Streamed
from drift_fast.delta.combined import Combined
from drift_fast.delta.format import (
    AGAIN,
    BLOCK_NBYTES,
    CHECKSUM,
    DESCRIPTION,
    FORMAT_VERSION,
    INDEX,
    stored_names,
)
from drift_fast.delta.options import SaveOptions
from drift_fast.delta.parallel import together
from drift_fast.delta.protocol import DeltaLike, OnLanded, Run
from drift_fast.delta.statistics import Compression, Statistics
from drift_fast.delta.summed import Summed
from drift_fast.delta.writing import Content, Destination, Rows, write_alone
from drift_fast.dtypes import DTYPES, INT8_BLOCK, tensor_dtype
from drift_fast.errors import CheckpointError
from drift_fast.paths import local_path
from drift_fast.progress_bar import ProgressCallback, reported, unreported
from drift_fast.sizes import parse_size
from drift_fast.tables import Block, Shown

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from drift_fast._keywords import SaveKeywords
    from drift_fast.delta.process_group import ProcessGroup


class Delta(Mapping[str, "torch.Tensor"], Shown):
    """A mapping of tensor name to Δ, layer by layer, read or subtracted when asked for.

    `delta[name]` is a fresh tensor on the CPU each time; nothing is cached. What is read from disk
    is compared with the checksums that were written with it. Names are the multimodal checkpoint's.
    `dtype` is what tensors come out as and `stored_dtype` what is on disk or `save` writes; they
    differ where Δ is compressed. `path` is the directory on disk, and `opened_from` says what it
    was opened from.
    `peak_nbytes` is the most that buffers took at a time when Δ or its statistics were computed;
    None where this process did neither, or summed up deltas.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        stored_dtype: str,
        coverage: Coverage,
        sources: dict[str, Any],
        alignment: dict[str, Any],
        selection: str,
    ) -> None:
        self._backend = backend
        self.stored_dtype = stored_dtype
        self.dtype = tensor_dtype(stored_dtype)
        self.coverage = coverage
        self.sources = sources
        self.alignment = alignment
        self.selection = selection
        self.path: Path | None = None
        self.opened_from: Source | None = None
        self.peak_nbytes: int | None = None
        self._stats: Statistics | None = None

    @classmethod
    def open(cls, path: PathLike) -> Delta:
        """Open a delta that `compute_delta` or `save` wrote; tensors are read when asked for.

        What an earlier version wrote has no checksums (`has_checksums`) and is read as it is.

        Args:
            path: its directory, a Hub id (`org/name`, `org/name@revision`) or an http(s) URL. Of
                those `drift.json`, the index and the headers are downloaded now, and each tensor
                when it is asked for, into the cache that `compute_delta` has for checkpoints.

        Raises:
            FileNotFoundError: no delta there.
            CheckpointError: a directory that is not a whole, valid delta, or a Hub or server that
                refuses or cannot be asked.
            DriftError: a Hub id or URL without the packages that `drift-fast[hub]` installs.
        """
        # Loaded here, so that computing a delta stays light.
        from drift_fast.delta.description import Description

        source = resolve(path, INDEX)
        directory = source.path
        if source.remote is not None and source.remote.optional_file(DESCRIPTION) is None:
            raise NoDelta(f"{source}: not a whole delta: it has {INDEX} and no {DESCRIPTION}")
        found = Description.read(directory)
        try:
            stats = Statistics.from_rows(found.statistics)
            coverage = Coverage.from_dict(found.coverage)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{directory / DESCRIPTION}: {error}; {AGAIN}") from error
        delta = cls(
            Stored(source, found.dtype, stats, found.checksums_of_tensors),
            stored_dtype=found.dtype,
            coverage=coverage,
            sources=found.sources,
            alignment=found.alignment,
            selection=found.selection,
        )
        delta.path = directory
        delta.opened_from = source
        return delta

    def save(self, path: PathLike, **options: Unpack[SaveKeywords]) -> Delta:
        """Write the delta to a directory and return it opened from there.

        The directory appears whole or not at all. It opens with any safetensors reader:
        `delta-0000k-of-0000N.safetensors`, an index, and `drift.json`. The options are those of
        `drift_fast.delta.options.SaveOptions`.

        Raises:
            FileExistsError: `path` is taken.
            OSError: the disk or a quota is full; nothing is left behind.
            NonFiniteError, ValueError, DriftError: as `compute_delta`.
        """
        given = SaveOptions.from_keywords(options, function="save")
        target = local_path(path).absolute()
        destination = Destination(
            target,
            given.overwrite,
            parse_size(given.max_shard_size),
            None if given.memory is None else parse_size(given.memory),
        )
        bar = given.progress_bar if given.is_first() else False
        with (
            reported(bar, given.on_progress) as report,
            together(target, given.ranks) as group,
        ):
            return self.write(destination, report, group)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Put a delta that is on disk on the Hugging Face Hub, and return the commit's URL.

        The repository, of the kind "model", gets the files that `save` wrote, and a model card:
        the sources and their licenses, where these are stated, how Δ was computed, its statistics
        by module, and how to use it. `drift.json` goes without the directories of this machine.
        All of it is one commit. Δ is compared with its checksums first. What an earlier card has in
        its metadata, such as a license, stays; its text does not.

        Args:
            repo_id: `org/name`; created if it is not there.
            private: who sees a new repository; None is what its owner's settings say.
            token: one that may write there; None or True is that of `hf auth login` or HF_TOKEN.
            revision: a branch, created if it is not there; None is the main one.

        Raises:
            ValueError: not a Hub id, or a delta that is not on disk.
            FileExistsError: the repository holds something else.
            CheckpointError: no token, a Hub that refuses or cannot be asked, or a damaged delta.
            DriftError: a repository that is to be private and is public, or no huggingface_hub.
        """
        # Loaded here, so that computing a delta stays light.
        from drift_fast.delta.sharing import MESSAGE, push

        return push(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message or MESSAGE,
        )

    def write(
        self,
        destination: Destination,
        on_progress: ProgressCallback,
        group: ProcessGroup | None,
    ) -> Delta:
        """Write the delta as one process or as one of a group, and return it opened from there."""
        target = destination.path
        if self.path is not None and target.exists() and target.samefile(self.path):
            raise FileExistsError(f"{target}: the delta is there already; choose another path")
        content = Content(self._backend, self.stored_dtype, self._describe)
        if group is None:
            self.peak_nbytes = write_alone(content, destination, on_progress)
        else:
            # Loaded here, since it needs torch, which one process alone does not.
            from drift_fast.delta.shared_writing import write_together

            self.peak_nbytes = write_together(group, content, destination, on_progress)
        saved = Delta.open(target)
        saved.peak_nbytes = self.peak_nbytes
        return saved

    @classmethod
    def combine(
        cls, deltas: Terms, *, missing_as_zero: bool = False, dtype: str | None = None
    ) -> Delta:
        """Return Σ weight·Δ of several deltas as a delta of its own, summed when it is asked for.

        It is `drift_fast.combine` with statistics and `save`, which writes piece by piece, so that
        memory does not grow with the deltas. Each element is the float64 sum rounded once. The
        statistics hold ‖Δ‖ of the exact sum, and ‖W_multimodal‖ where all deltas have the same;
        there is no reasoning checkpoint, so its norm and the cosine are NaN. `sources` holds the
        combined deltas and their weights.

        Arguments and errors are those of `drift_fast.combine`; a delta that shows no elements
        apart, other than a `Delta`, is read whole for each piece.
        """
        combined = combine(deltas, missing_as_zero=missing_as_zero, dtype=dtype)
        return cls(
            Summed(combined),
            stored_dtype=combined.dtype,
            coverage=combined.coverage(),
            sources=combined.to_dict(),
            alignment={},
            selection=combined.selection(),
        )

    @property
    def names(self) -> list[str]:
        """Tensor names, layer by layer."""
        return list(self._backend.shapes)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor: a view, of which `dict(delta.shapes)` is a copy."""
        return MappingProxyType(self._backend.shapes)

    @property
    def stats(self) -> Statistics:
        """Norms and cosines; a delta that is not on disk reads both checkpoints once for them."""
        if self._stats is None:
            self._stats, peak_nbytes = self._backend.statistics()
            # Statistics that are read from disk need no stream.
            self.peak_nbytes = self.peak_nbytes if peak_nbytes is None else peak_nbytes
        return self._stats

    @property
    def compression(self) -> Compression | None:
        """What storing Δ in eight bits cost; None where it is not (yet) stored like that."""
        return self.stats.compression if self._is_measured else None

    @property
    def _is_measured(self) -> bool:
        """Whether the statistics are known without a pass over both checkpoints."""
        return self.path is not None or self._stats is not None

    def headline(self) -> str:
        """Return how many tensors there are, how they are stored, and where."""
        unchecked = "" if self.has_checksums else " without checksums"
        where = f" at {self.opened_from}{unchecked}" if self.path else ""
        return f"{len(self)} tensors, {self.stored_dtype}, {self.selection}{where}"

    def blocks(self) -> list[Block]:
        """Return the statistics by module, where they are known, and the coverage."""
        if not self._is_measured:
            return [self.headline(), str(self.coverage)]
        stored = [] if self.compression is None else [str(self.compression)]
        return [*self.stats.by_module().blocks(), *stored, str(self.coverage)]

    def records(self) -> list[dict[str, Any]]:
        """Return the statistics of each tensor; see `stats`."""
        return self.stats.records()

    def read_into(self, name: str, tensor: torch.Tensor, *, start: int | None = None) -> None:
        """Fill a contiguous CPU tensor of this delta's dtype (pinned or not) with Δ.

        Without `start` the tensor has Δ's shape. With it, the tensor has one dimension and gets as
        many elements of Δ, in row-major order, from element `start` on; no others are read, unless
        Δ is put together from parts.

        Raises:
            KeyError: no such tensor in this delta.
            CheckpointError: bytes on disk that are not those that were written.
            ValueError: another shape, dtype or device, elements that Δ does not have, or memory
                that is not contiguous.
        """
        import torch

        shape = self._backend.shapes[name]
        expected = getattr(torch, self.dtype)
        wanted = shape if start is None else (tensor.numel(),)
        if tuple(tensor.shape) != wanted or tensor.dtype != expected or tensor.device.type != "cpu":
            raise ValueError(
                f"{name}: expected a CPU tensor of shape {list(wanted)} and dtype {expected}, got "
                f"{list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: the tensor to fill must be contiguous")
        first = 0 if start is None else start
        elements = first, first + tensor.numel()
        if not 0 <= first <= elements[1] <= math.prod(shape):
            raise ValueError(f"{name} has {math.prod(shape)} elements, not {elements}")
        self._backend.read_into(name, _window(tensor), elements)

    @property
    def has_runs(self) -> bool:
        """Whether `load` reads it: Δ is on disk or subtracted, and not summed."""
        return isinstance(self._backend, Stored | Streamed)

    def load(
        self,
        runs: Sequence[Run],
        into: Sequence[torch.Tensor] | torch.Tensor,
        landed: OnLanded | None = None,
    ) -> list[float]:
        """Read many runs of elements at once, on all threads, and return ‖Δ‖² of each.

        Args:
            runs: what to read; codes and scales of an int8 delta where `has_codes`.
            into: a flat CPU tensor for each run, or one of uint8 as a ring for all. Nobody else
                may use them until the call returns, but for parts of a ring that have landed.
            landed: called in order with (run, first element, end element, offset in the ring in
                bytes) of what is in memory; answers how many of its calls so far concern memory
                that may be filled again. None: all do.

        Returns:
            Float64 sums of float32 blocks, to a millionth; NaN where Δ is not finite.

        Raises:
            CheckpointError: bytes on disk that are not those that were written, after the call has
                filled what it was given.
            NonFiniteError: as `compute_delta`, of a delta that is not on disk.
        """
        import torch

        assert isinstance(self._backend, Stored | Streamed)
        is_ring = isinstance(into, torch.Tensor)
        buffers = [into] if isinstance(into, torch.Tensor) else into
        memory = [_window(one) for one in buffers], is_ring
        return self._backend.load(runs, memory, landed)

    def fetch(self, runs: Iterable[Run], on_progress: ProgressCallback = unreported) -> None:
        """Download together what `load` will read, where the delta is on a server.

        Raises:
            CheckpointError, OSError: the server fails, or the disk is full.
        """
        if isinstance(self._backend, Stored):
            self._backend.fetch(runs, on_progress)

    @property
    def has_checksums(self) -> bool:
        """Whether Δ is on disk with checksums, with which all that is read of it is compared."""
        return isinstance(self._backend, Stored) and self._backend.has_checksums

    def check(self) -> None:
        """Compare all of a delta on disk with its checksums, if it has any.

        Raises:
            CheckpointError: bytes that are not those that were written.
        """
        if isinstance(self._backend, Stored) and self.has_checksums:
            self._backend.check()

    @property
    def has_codes(self) -> bool:
        """Whether Δ is on disk as int8, which `read_codes` reads."""
        return isinstance(self._backend, Stored) and self.stored_dtype == "int8"

    def read_codes(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int8 codes of elements [start, stop), and the float16 scales of their blocks.

        Both are flat and as they are on disk, where `has_codes`. `start` is a multiple of 64, and
        `stop` is one or the number of elements; docs/format.md says how values come about.
        """
        import torch

        codes = torch.empty(stop - start, dtype=torch.int8)
        blocks = start // INT8_BLOCK, -(-stop // INT8_BLOCK)
        scales = torch.empty(blocks[1] - blocks[0], dtype=torch.float16)
        runs = Run(name, start, stop, True), Run(f"{name}.scale", *blocks, True)
        self.load(runs, (codes, scales))
        return codes, scales

    def plot(self, path: PathLike | None = None) -> Figure:
        """Draw ‖Δ‖/‖W‖ and the cosine over layers × modules, and write the picture to a path.

        A figure of Matplotlib, which a notebook shows.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from drift_fast.delta.plot import plot_statistics

        return plot_statistics(self.stats, path)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._backend.shapes:
            raise KeyError(name)
        tensor = empty_tensor(name, self._backend.shapes[name], self.dtype)
        self.read_into(name, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._backend.shapes)

    def __len__(self) -> int:
        return len(self._backend.shapes)

    def __contains__(self, name: object) -> bool:
        # Mapping's own answer would read the tensor.
        return name in self._backend.shapes

    # Tensors have no single truth value, so a comparison of their mappings has none either.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _describe(self, rows: Rows | None) -> dict[str, Any]:
        """Return `drift.json` as plain values; with rows, they become the statistics."""
        if rows is not None:
            self._stats = self._backend.conclude(rows, written=True)
        return {
            "format_version": FORMAT_VERSION,
            "drift_fast_version": __version__,
            "formula": "delta = reasoning - multimodal; an injection subtracts c * delta from the "
            "gradient, so alpha > 0 moves weights towards the reasoning model",
            "dtype": self.stored_dtype,
            "selection": self.selection,
            "sources": self.sources,
            "alignment": self.alignment,
            "coverage": self.coverage.to_dict(),
            "statistics": [] if rows is None else self.stats.to_rows(),
            "checksums": {
                "algorithm": CHECKSUM,
                "block_nbytes": BLOCK_NBYTES,
                "tensors": {} if rows is None else self._checksums(rows),
            },
        }

    def _checksums(self, rows: Rows) -> dict[str, str]:
        """Return the checksums of every tensor on disk, by its name there."""
        found: dict[str, str] = {}
        for name, row in zip(self._backend.shapes, rows, strict=True):
            stored = stored_names(name, self.stored_dtype)
            found |= zip(stored, row["checksums"], strict=True)
        return found


def _window(tensor: torch.Tensor) -> Any:
    """Return a window of bytes onto a CPU tensor's own memory; numpy has no bfloat16."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def open_delta(delta: DeltaLike | PathLike) -> DeltaLike:
    """Return a delta, opened from its directory, Hub id or URL if that is given.

    Raises:
        FileNotFoundError, CheckpointError: there is no whole delta.
        TypeError: neither a delta nor a path.
    """
    if isinstance(delta, str | os.PathLike):
        return Delta.open(delta)
    if not hasattr(delta, "shapes") or not hasattr(delta, "__getitem__"):
        raise TypeError(
            f"expected a Delta, or the directory or Hub id of one, got {type(delta).__name__}; "
            "compute_delta(…) and Delta.open(…) return one"
        )
    return delta


def delta_at(source: PathLike) -> Delta | None:
    """Return the delta at a path, Hub id or URL; None where something else is.

    Raises:
        As `Delta.open`.
    """
    # Loaded here, since what is on this machine needs none of it.
    from drift_fast.checkpoints.remote.transfer import Forbidden

    try:
        return Delta.open(source)
    except (NoDelta, Forbidden):
        # Storage services refuse what is not there; whoever opens the rest sees if they refuse all.
        return None


Terms: TypeAlias = Mapping[Any, float] | Iterable[tuple[DeltaLike | PathLike, float]]


def combine(deltas: Terms, *, missing_as_zero: bool = False, dtype: str | None = None) -> Combined:
    """Return Σ weight·Δ of several deltas, to inject like any other.

    Each tensor is summed when it is asked for, in float64, and rounded once. Names and their order
    are the first delta's, then what the next one adds.

    Args:
        deltas: {delta: weight, …} or pairs of (delta, weight); a delta is a `Delta`, the directory
            of one, or anything with its shapes and tensors. A weight may be negative.
        missing_as_zero: take a tensor that a delta does not have as zero; if False, refuse it.
        dtype: of the result, "bfloat16", "float16" or "float32"; None is that of the deltas, or
            "float32" where they differ.

    Raises:
        CoverageError: a tensor that not all deltas have, or that has another shape in one.
        FileNotFoundError, CheckpointError: no whole delta at a path.
        TypeError: something that is not a delta.
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
        if not number or not -sys.float_info.max <= weight <= sys.float_info.max:
            raise ValueError(f"the weight of a delta must be a finite number, got {weight!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    terms = [(open_delta(delta), float(weight)) for delta, weight in pairs]
    return Combined(terms, missing_as_zero=missing_as_zero, dtype=dtype)
