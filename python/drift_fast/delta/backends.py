"""Where a delta's tensors come from: two checkpoints that are subtracted, or files of a delta.

Owns `Streamed` and `Stored`, which `Delta` reads through; sums of deltas are in `summed`.
Knows nothing of directories of deltas and their descriptions.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from drift_fast._core import Checkpoint, DeltaWriter, StoredDelta, load_differences, stream
from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.checkpoints.opened import Opened
from drift_fast.checkpoints.source import Source
from drift_fast.config_files import refuse_control_characters
from drift_fast.delta.format import AGAIN, DESCRIPTION, INDEX, stored_names
from drift_fast.delta.options import StreamOptions
from drift_fast.delta.protocol import LoadInto, OnLanded, Run
from drift_fast.delta.rounding import warn_of_rounding
from drift_fast.delta.statistics import Statistics, row_from_moments
from drift_fast.dtypes import COMPRESSED, INT8_BLOCK, STORED_DTYPES, share_lost, tensor_dtype
from drift_fast.errors import CheckpointError, DriftWarning, NonFiniteError
from drift_fast.progress_bar import Progress, ProgressCallback, unreported
from drift_fast.sizes import MEMORY, parse_size, thread_count

if TYPE_CHECKING:
    from drift_fast._core import Moments


class Backend(Protocol):
    """Where a delta's tensors come from."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def read_into(self, name: str, buffer: Any, elements: tuple[int, int]) -> None:
        """Fill a buffer with elements [start, stop) of a tensor."""

    def statistics(
        self, on_progress: ProgressCallback = unreported
    ) -> tuple[Statistics, int | None]:
        """Return the statistics, and the most bytes that buffers took; None if nothing was read."""

    def write(
        self,
        writer: DeltaWriter,
        places: Sequence[int],
        on_progress: ProgressCallback,
        memory: int | None,
    ) -> tuple[list[Any], int | None]:
        """Write the tensors of these places, the writer's first to last.

        Returns a row for each, and the most bytes that buffers took, where that is known.
        """

    def conclude(self, rows: Sequence[Mapping[str, Any]], *, written: bool) -> Statistics:
        """Return the statistics that the rows of all tensors make, or refuse what they show.

        `written` says that the rows are those of tensors as they are stored.
        """


class Streamed:
    """A delta that exists as two checkpoints and how they are aligned."""

    def __init__(self, pair: AlignedPair, dtype: str, options: StreamOptions) -> None:
        self._pair = pair
        self._dtype = dtype
        self._threads = thread_count(options.threads)
        self._loading_threads = thread_count(options.threads, together=True)
        self._memory = parse_size(options.memory)
        self._allow_nonfinite = options.allow_nonfinite
        self._pairs = {pair.name: pair for pair in pair.pairs}
        self.shapes = {name: pair.shapes[name] for name in self._pairs}

    def read_into(self, name: str, buffer: Any, elements: tuple[int, int]) -> None:
        self.load([Run(name, *elements)], ([buffer], False))

    def load(
        self, runs: Sequence[Run], into: LoadInto, landed: OnLanded | None = None
    ) -> list[float]:
        """Subtract runs into memory and return their squares, as `Stored.load`."""
        dtype = tensor_dtype(self._dtype)
        found = load_differences(
            self._pair.reasoning.checkpoint,
            self._pair.multimodal.checkpoint,
            [(self._pairs[one.name].source, one.name, (one.start, one.stop)) for one in runs],
            dtype,
            into,
            {"threads": self._loading_threads, "memory": self._memory},
            detail="faults",
            landed=landed,
        )
        self._check([(one.name, row) for one, (_, row) in zip(runs, found, strict=True)], dtype)
        return [square for square, _ in found]

    def write(
        self,
        writer: DeltaWriter,
        places: Sequence[int],
        on_progress: ProgressCallback,
        memory: int | None,
    ) -> tuple[list[Any], int]:
        return self._stream(places, on_progress, writer, memory)

    def statistics(self, on_progress: ProgressCallback = unreported) -> tuple[Statistics, int]:
        rows, peak_nbytes = self._stream(range(len(self._pairs)), on_progress)
        return self.conclude(rows, written=False), peak_nbytes

    def _stream(
        self,
        places: Sequence[int],
        on_progress: ProgressCallback,
        writer: DeltaWriter | None = None,
        memory: int | None = None,
    ) -> tuple[list[Any], int]:
        pairs = [self._pair.pairs[place] for place in places]
        everything = len(pairs) == len(self._pairs)
        total_nbytes = self._pair.nbytes if everything else sum(map(self._pair.nbytes_of, pairs))

        def report(tensors: int, nbytes: int) -> None:
            on_progress(Progress(tensors, len(pairs), nbytes, total_nbytes))

        return stream(
            self._pair.reasoning.checkpoint,
            self._pair.multimodal.checkpoint,
            [(pair.source, pair.name) for pair in pairs],
            {"threads": self._threads, "memory": self._memory if memory is None else memory},
            writer=writer,
            progress=report,
        )

    def conclude(self, rows: Sequence[Any], *, written: bool) -> Statistics:
        named = list(zip(self._pairs, rows, strict=True))
        self._check(named, self._dtype)
        compressed = written and self._dtype in COMPRESSED
        stats = Statistics(
            [row_from_moments(n, self.shapes[n], row, compressed=compressed) for n, row in named]
        )
        if not any(row.delta_sq for row in stats):
            warn_of_zero(self._pair)
        warn_of_rounding(stats, self._pair.paths)
        return stats

    def _check(self, moments: list[tuple[str, Moments]], dtype: str) -> None:
        if self._allow_nonfinite:
            return
        found = []
        first, second = self._pair.paths
        for name, row in moments:
            sides = (
                (row["nonfinite_reasoning"], " and ".join(self._pairs[name].sources[:3]), first),
                (row["nonfinite_multimodal"], name, second),
            )
            for count, there, path in sides:
                if count:
                    found.append(f"{there} has {count} NaN or infinite values in {path}")
            squares = row["delta_sq"] + row["reasoning_sq"] + row["multimodal_sq"]
            if row["overflow"] == 0 and not math.isfinite(squares):
                found.append(f"{name}: the sum of its squares is beyond float64")
            if row["written_sq"] < (1 - share_lost(dtype)) * row["delta_sq"]:
                share = 1 - math.sqrt(row["written_sq"] / row["delta_sq"])
                found.append(
                    f"{name}: {share:.1%} of ‖Δ‖ is below the range of {dtype}; "
                    "choose dtype='bfloat16' or 'float32'"
                )
            if row["overflow"]:
                narrow = dtype == "float16" or dtype in COMPRESSED
                found.append(
                    f"{name}: {row['overflow']} differences are beyond the range of {dtype}"
                    + ("; choose dtype='bfloat16' or 'float32'" if narrow else "")
                )
        refuse_problems(
            found,
            "record them in the statistics; to train, repair the checkpoint, or leave the tensors "
            "out with modules=… or layers=…",
        )


# A few mebibytes; more at a time copies no faster.
_COPY_NBYTES = 1 << 22
# Memory for the pieces that threads compare with their checksums.
_CHECK_NBYTES = 1 << 25
# Bytes of an element of the types that a delta is stored as, and of the widest.
_ITEMSIZES = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1}
_ITEMSIZE = max(_ITEMSIZES.values())


class Stored:
    """A delta on disk, or on a server, of which tensors come to this disk when they are read."""

    def __init__(
        self, source: Source, dtype: str, stats: Statistics, checksums: dict[str, str] | None
    ) -> None:
        directory, index = source.path, source.path / INDEX
        self._dtype = dtype
        self._stats = stats
        self._checksums = checksums
        self._files = StoredDelta(index, checksums)
        self._opened: Opened | None = None
        if source.remote is not None:
            self._opened = Opened(replace(source, path=index), Checkpoint(index), {}, {})
        self._fetched: set[str] = set()
        self._fetching = threading.Lock()
        self.has_checksums = checksums is not None
        found = {name: (kind, tuple(shape)) for name, kind, shape in self._files.tensors()}
        refuse_control_characters(found, directory)
        expected = {row.name: (STORED_DTYPES[dtype], row.shape) for row in stats}
        if dtype == "int8":
            expected |= {
                f"{row.name}.scale": ("F16", (-(-row.numel // INT8_BLOCK),)) for row in stats
            }
        if found != expected:
            names = sorted(
                name for name in found.keys() | expected if found.get(name) != expected.get(name)
            )
            raise CheckpointError(
                f"{directory}: {DESCRIPTION} and the shards disagree on {len(names)} tensors, "
                f"{names[0]} first: expected {_shown(expected.get(names[0]))}, "
                f"found {_shown(found.get(names[0]))}; {AGAIN}"
            )
        self.shapes = {row.name: row.shape for row in stats}

    def read_into(self, name: str, buffer: Any, elements: tuple[int, int]) -> None:
        self.load([Run(name, *elements)], ([buffer], False))

    def load(
        self, runs: Sequence[Run], into: LoadInto, landed: OnLanded | None = None
    ) -> list[float]:
        """Read runs into memory and return their squares, NaN where one is not finite.

        into: buffers of bytes, one for each run, or a ring for all of them, and whether it is one.
        landed: called with (run, first element, end element, offset in the ring) of what came into
            memory, in order; answers how many of its calls concern memory that is free again.
        """
        self.fetch(runs)
        with self._damage_explained():
            threads = thread_count(None, together=True)
            return self._files.load(runs, into, threads=threads, landed=landed)

    @contextlib.contextmanager
    def _damage_explained(self) -> Iterator[None]:
        """Say of what was downloaded and is damaged how it is downloaded again."""
        try:
            yield
        except CheckpointError as error:
            if self._opened is None:
                raise
            raise CheckpointError(
                f"{error}. It was downloaded from {self._opened.source}; to download it again, "
                f"remove {self._opened.directory}"
            ) from None

    def fetch(self, runs: Iterable[Run], on_progress: ProgressCallback = unreported) -> None:
        """Download the tensors of runs that are not on this machine, whole, for their checksums."""

        def report(done: int, total: int) -> None:
            on_progress(Progress(0, len(lacking), done, total, "downloading Δ"))

        with self._fetching:
            if self._opened is None:
                return
            lacking = {
                name
                for one in runs
                for name in ([one.name] if one.as_stored else stored_names(one.name, self._dtype))
                if name not in self._fetched
            }
            if lacking:
                self._opened = self._opened.download(lacking, report)
                self._files = StoredDelta(self._opened.source.path, self._checksums)
                self._fetched |= lacking

    def check(self) -> None:
        """Read everything, and so compare it with its checksums."""
        runs = [Run(name, 0, math.prod(shape), True) for name, _, shape in self._files.tensors()]
        self.load(runs, ([bytearray(_CHECK_NBYTES)], True))

    def statistics(
        self, on_progress: ProgressCallback = unreported
    ) -> tuple[Statistics, int | None]:
        return self._stats, None

    def write(
        self,
        writer: DeltaWriter,
        places: Sequence[int],
        on_progress: ProgressCallback,
        memory: int | None,
    ) -> tuple[list[Any], int]:
        # Bytes are copied as stored: nothing is decoded, so nothing is rounded again.
        rows = [self._stats[place] for place in places]
        names = [stored_names(row.name, self._dtype) for row in rows]
        self.fetch([Run(name, 0, 0, True) for some in names for name in some], on_progress)
        size = {
            name: (_ITEMSIZES[kind], math.prod(shape))
            for name, kind, shape in self._files.tensors()
        }
        total = sum(math.prod(size[name]) for some in names for name in some)
        allowed = parse_size(MEMORY) if memory is None else memory
        if allowed < _ITEMSIZE:
            raise ValueError(f"memory of {allowed} bytes is too small: pass {_ITEMSIZE} or more")
        buffer = memoryview(bytearray(min(max(total, 1), _COPY_NBYTES, allowed)))
        done = slot = 0
        for index, some in enumerate(names):
            for name in some:
                itemsize, numel = size[name]
                step = max(1, len(buffer) // itemsize)
                for start in range(0, max(1, numel), step):
                    stop = min(numel, start + step)
                    piece = buffer[: (stop - start) * itemsize]
                    self._files.copy_into(name, piece, (start, stop))
                    writer.write(slot, piece, offset=start * itemsize)
                    done += len(piece)
                    on_progress(Progress(index, len(rows), done, total))
                slot += 1
            on_progress(Progress(index + 1, len(rows), done, total))
        copied = [name for some in names for name in some]
        with self._damage_explained():
            for name, checksums in zip(copied, writer.checksums(), strict=True):
                self._files.compare(name, checksums)
        return [{} for _ in rows], len(buffer)

    def conclude(self, rows: Sequence[Mapping[str, Any]], *, written: bool) -> Statistics:
        return self._stats


def refuse_problems(found: Sequence[str], instead: str) -> None:
    """Refuse values that are not finite, and say what `allow_nonfinite` does `instead`.

    Raises:
        NonFiniteError: there are some.
    """
    if found:
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise NonFiniteError(
            f"{'; '.join(found[:8])}{more}. Pass allow_nonfinite=True to {instead}"
        )


def warn_of_zero(pair: AlignedPair) -> None:
    """Warn that the selected tensors of two checkpoints are the same."""
    first, second = pair.paths
    warnings.warn(
        f"Δ is zero everywhere: the selected tensors of {first} and {second} are the same; an "
        "injection along it does nothing",
        DriftWarning,
        stacklevel=4,
    )


def _shown(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if entry is None else f"{entry[0]} {list(entry[1])}"


def describe_sources(pair: AlignedPair) -> dict[str, Any]:
    """Return what identifies the two checkpoints, file by file."""
    described = {}
    for side, opened in (("reasoning", pair.reasoning), ("multimodal", pair.multimodal)):
        source, checkpoint = opened.source, opened.checkpoint
        shards = []
        for file, nbytes, digest in checkpoint.fingerprint():
            # A file that was downloaded in part is sure to have only its header.
            partial = (Path(checkpoint.path) / f"{file}.ranges.json").exists()
            digest_of = "sha256_of_header" if partial else "sha256_of_samples"
            shards.append({"file": file, "nbytes": nbytes, digest_of: digest} | source.mark(file))
        described[side] = source.to_dict() | {"shards": shards}
    return described
