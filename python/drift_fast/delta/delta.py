"""The reasoning delta: computed from two checkpoints, kept on disk, read as a mapping of tensors.

Owns `compute_delta`, `inspect` and `Delta`. A delta whose directory holds `drift.json` is whole.
Torch is imported when a tensor is asked for, never before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_fast import _core
from drift_fast.alignment.coverage import Coverage
from drift_fast.alignment.embeddings import Rows
from drift_fast.alignment.mapping import MappingLike
from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.options import PairOptions
from drift_fast.alignment.pairing import align_checkpoints, fetch, verify
from drift_fast.checkpoints.opened import PathLike
from drift_fast.delta.backends import Backend, Stored, Streamed, describe_sources, warn_of_zero
from drift_fast.delta.format import DESCRIPTION, FORMAT_VERSION
from drift_fast.delta.options import DeltaOptions
from drift_fast.delta.parallel import Ranks, agree, first, together
from drift_fast.delta.statistics import Compression, Statistics
from drift_fast.dtypes import INT8_BLOCK, RETIRED, check_stored_dtype, tensor_dtype
from drift_fast.errors import CheckpointError
from drift_fast.options import unknown
from drift_fast.preflight.warn import warn_of_configurations
from drift_fast.progress_bar import Progress, ProgressCallback
from drift_fast.selection import Layers, Modules
from drift_fast.sizes import MEMORY, parse_size, thread_count

if TYPE_CHECKING:
    import torch

    from drift_fast.delta.combine import Summands
    from drift_fast.delta.process_group import ProcessGroup

# What `drift.json` may take for one tensor beside its name.
_ROW_NBYTES = 1024


def compute_delta(
    reasoning: PathLike,
    multimodal: PathLike,
    out: PathLike | None = None,
    *,
    modules: Modules = ("attn", "mlp"),
    layers: Layers = None,
    dtype: str = "bfloat16",
    mapping: MappingLike | None = None,
    rows: Rows = None,
    strict: bool = True,
    min_coverage: float | None = None,
    check_weights: bool = True,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    threads: int | None = None,
    memory: int | str = MEMORY,
    progress: ProgressCallback | None = None,
    allow_nonfinite: bool = False,
    reader: str = "auto",
    ranks: Ranks = "auto",
    **gone: Any,
) -> Delta:
    """Compute Δ = W_reason − W_multimodal for every selected tensor of the language backbone.

    Either checkpoint is a `.safetensors` file, a directory that holds one or an index of shards, a
    Hub id (`org/name`, `org/name@revision`) or an http(s) URL; of the last two, only headers and
    the bytes of the selected tensors are downloaded. Both are streamed: memory does not grow with
    their size. Each Δ equals the float64 subtraction rounded once to `dtype`, and carries the
    multimodal checkpoint's tensor name. Weights of 8-bit floats under block scales
    (`X.weight_scale_inv`, as DeepSeek-V3 has them) are taken at the float32 values that the model
    computes with, so Δ carries the rounding that they went through.
    `compute_delta(expert, reference)` on two text models gives the difference of those, to be
    attached to a third.

    Args:
        out: a directory to write; None writes nothing, and tensors are subtracted when asked for.
        modules: presets `attn`, `mlp`, `norm`, `embed`, `head`, `all`, or `re:<pattern>`.
        layers: a range or other iterable of layer numbers, or text such as "0-3,8"; None is all.
        dtype: of Δ: "bfloat16", "float16" or "float32"; or, in half of the first's bytes, "int8" (a
            float16 scale for every 64 elements). That is what is written: tensors come out as
            bfloat16, rounded from what is stored, or exactly from the checkpoints where nothing is
            (`out=None`). `Delta.compression` says what it costs; docs/format.md describes it.
        mapping: which tensor belongs to which, where names do not tell: pairs of prefixes, a
            dictionary of reasoning name → multimodal name (None leaves one out), a function that
            does the same, or the path of a map file that `drift-fast align` wrote. It is checked
            like what is found, but may leave out tensors that only the multimodal model has.
        rows: how rows of selected embeddings and heads are matched: None or "token", by the token
            strings of both tokenizers; "index", row i with row i. Rows without a counterpart
            get a Δ of zero.
        strict: refuse when a selected tensor has no partner; otherwise list it in the coverage.
        min_coverage: the share of the selected parameters that must have a partner; None is all of
            them when strict, and any otherwise.
        check_weights: compare samples of the weights, and refuse layers that are shifted or
            permuted.
        overwrite: replace a delta at `out`; anything else there is never touched.
        max_shard_size: bytes, or text such as "500MB", of one file of the delta.
        threads: worker threads; None is every core this process may use. The result does not
            depend on it.
        memory: bytes, or text such as "64MB", that all buffers of the stream and what is mapped
            at a time may take, whatever the size of the models; where it is short, fewer threads
            work. What grows with the number of tensors, names and statistics, comes on top, and
            files that the system keeps in its page cache are not counted. The result does not
            depend on it, and `Delta.peak_nbytes` says what was taken.
        progress: called on this thread with a `Progress`, about 20 times a second.
        allow_nonfinite: record NaN and infinity in the statistics instead of refusing.
        reader: "pread", "mmap", or "auto": "pread" on network file systems, and elsewhere what
            measured better, so far "pread" too. A file that shrinks while it is mapped kills the
            process; read, it is an error.
        ranks: who writes to `out`: "auto", all processes that a launcher (torchrun, Slurm, Open
            MPI) started or that torch.distributed joined, each its own shards, with the same bytes
            as one; None, this process alone; or (rank, size). All of them must call this with the
            same arguments, and all return the delta. `progress` tells of this rank's share.

    Raises:
        FileNotFoundError, CheckpointError: a source that is missing or not valid.
        AlignmentError, CoverageError: sources, or a mapping, that do not fit each other.
        NonFiniteError: NaN or infinity in a source, or a Δ beyond `dtype`'s range.
        FileExistsError, OSError: an output that is taken, or a full disk or quota, where the
            message says how much is needed in all; nothing is left behind.
        DriftError: of several ranks, one that did not come or give a sign of life for 60 seconds
            (or `DRIFT_FAST_RANK_TIMEOUT`), or that sees other files.
        ValueError: an argument without meaning, or memory that not even one thread can work in,
            where the message says the least.
    """
    _refuse_unknown("compute_delta", gone)
    check_stored_dtype(dtype)
    shard_nbytes = parse_size(max_shard_size)
    memory_nbytes = parse_size(memory)
    options = PairOptions(
        modules=modules,
        layers=layers,
        mapping=mapping,
        rows=rows,
        strict=strict,
        min_coverage=min_coverage,
        check_weights=check_weights,
        reader=reader,
    )
    threads = thread_count(threads)
    with nullcontext() if out is None else together(out, ranks) as group:
        pair = align_checkpoints(reasoning, multimodal, options)
        pair = _ready(pair, progress, group)
        sources = describe_sources(pair)
        shards = sources["reasoning"]["shards"]
        whole = all("sha256_of_samples" in shard for shard in shards)
        if out is None and whole and shards == sources["multimodal"]["shards"]:
            # With an output, or once statistics are asked for, the numbers themselves tell.
            warn_of_zero(pair)
        if group is not None:
            seen = {side: sources[side]["shards"] for side in ("reasoning", "multimodal")}
            pairs = {"pairs": [[one.name, one.source] for one in pair.pairs]}
            agree(group, seen | pairs | {"allow_nonfinite": allow_nonfinite})
        delta = Delta(
            Streamed(pair, dtype, threads, memory_nbytes, allow_nonfinite),
            stored_dtype=dtype,
            coverage=pair.coverage,
            sources=sources,
            alignment=pair.to_dict(),
            selection=str(pair.selection),
        )
        if out is None:
            return delta
        return delta._write(
            out,
            group,
            overwrite=overwrite,
            max_shard_nbytes=shard_nbytes,
            memory_nbytes=None,
            progress=progress,
        )


def _refuse_unknown(function: str, keywords: Mapping[str, object]) -> None:
    for name in keywords:
        known = DeltaOptions.names()
        raise TypeError(f"{function}() {unknown(name, known, 'keyword argument')}")


@dataclass(frozen=True)
class Report:
    """What `inspect` found: statistics and coverage; nothing was written.

    `peak_nbytes` is the most that the stream's buffers took at a time.
    """

    stats: Statistics
    coverage: Coverage
    sources: dict[str, Any]
    nbytes: int
    alignment: dict[str, Any]
    peak_nbytes: int


def inspect(
    reasoning: PathLike,
    multimodal: PathLike,
    *,
    modules: Modules = ("attn", "mlp"),
    layers: Layers = None,
    mapping: MappingLike | None = None,
    rows: Rows = None,
    strict: bool = True,
    min_coverage: float | None = None,
    check_weights: bool = True,
    threads: int | None = None,
    memory: int | str = MEMORY,
    progress: ProgressCallback | None = None,
    allow_nonfinite: bool = False,
    reader: str = "auto",
    **gone: Any,
) -> Report:
    """Measure norms and cosines between two checkpoints in one pass; nothing is written.

    Arguments and errors are those of `compute_delta`. Under a launcher each process that calls
    this reads everything for itself.
    """
    _refuse_unknown("inspect", gone)
    options = PairOptions(
        modules=modules,
        layers=layers,
        mapping=mapping,
        rows=rows,
        strict=strict,
        min_coverage=min_coverage,
        check_weights=check_weights,
        reader=reader,
    )
    threads = thread_count(threads)
    memory_nbytes = parse_size(memory)
    pair = align_checkpoints(reasoning, multimodal, options)
    pair = _ready(pair, progress)
    streamed = Streamed(pair, "float32", threads, memory_nbytes, allow_nonfinite)
    stats, peak_nbytes = streamed.statistics(progress)
    return Report(
        stats,
        pair.coverage,
        describe_sources(pair),
        pair.nbytes,
        pair.to_dict(),
        peak_nbytes,
    )


def _ready(
    pair: AlignedPair,
    progress: ProgressCallback | None,
    group: ProcessGroup | None = None,
) -> AlignedPair:
    """Bring what is needed to this machine and look whether the weights belong together.

    Of several ranks, the first one downloads before the others, which may share its cache, and
    alone looks at the weights.
    """

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(0, len(pair.pairs), done, total, "downloading"))

    warn_of_configurations(pair)
    pair = first(group, lambda: fetch(pair, report))
    if group is None or group.rank == 0:
        return verify(pair)
    return pair


class Delta(Mapping[str, "torch.Tensor"]):
    """A mapping of tensor name to Δ, layer by layer, read or subtracted when asked for.

    `delta[name]` is a fresh tensor on the CPU each time; nothing is cached. Names are the
    multimodal checkpoint's, on disk. `dtype` is what tensors come out as and `stored_dtype` what is
    on disk or `save` writes; they differ where Δ is compressed.
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
        path: Path | None = None,
    ) -> None:
        self._backend = backend
        self.stored_dtype = stored_dtype
        self.dtype = tensor_dtype(stored_dtype)
        self.coverage = coverage
        self.sources = sources
        self.alignment = alignment
        self.selection = selection
        self.path = path
        self.peak_nbytes: int | None = None
        self._stats: Statistics | None = None

    @classmethod
    def open(cls, path: PathLike) -> Delta:
        """Open a delta that `compute_delta` or `save` wrote; tensors are read when asked for.

        Raises:
            FileNotFoundError: no delta there.
            CheckpointError: a directory that is not a whole, valid delta.
        """
        directory = Path(path)
        description = directory / DESCRIPTION
        if not description.is_file():
            raise FileNotFoundError(
                f"{directory}: not a delta: expected a directory with {DESCRIPTION}, which "
                "compute_delta(reasoning, multimodal, out) writes"
            )
        try:
            stored = json.loads(description.read_bytes())
            version = stored["format_version"]
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"{description}: format version {version!r}, expected {FORMAT_VERSION}; "
                    "compute the delta again with this version of drift_fast"
                )
            if stored["dtype"] in RETIRED:
                raise CheckpointError(
                    f"{directory}: drift_fast {stored['drift_fast_version']} stored this delta as "
                    f"{stored['dtype']}, which this version does not read; compute the delta again "
                    "with dtype='bfloat16' or 'int8'"
                )
            stats = Statistics.from_json(stored["statistics"])
            coverage = Coverage.from_dict(stored["coverage"])
            dtype = check_stored_dtype(stored["dtype"])
            fields = {key: stored[key] for key in ("sources", "alignment", "selection")}
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise CheckpointError(
                f"{description}: not a valid description of a delta "
                f"({type(error).__name__}: {error}); compute the delta again"
            ) from error
        backend = Stored(directory, dtype, stats)
        return cls(backend, stored_dtype=dtype, coverage=coverage, path=directory, **fields)

    def save(
        self,
        path: PathLike,
        *,
        overwrite: bool = False,
        max_shard_size: int | str = "5GB",
        memory: int | str | None = None,
        progress: ProgressCallback | None = None,
        ranks: Ranks = "auto",
    ) -> Delta:
        """Write the delta to a directory and return it opened from there.

        The directory appears whole or not at all. It opens with any safetensors reader:
        `delta-0000k-of-0000N.safetensors`, an index, and `drift.json`. `memory` is as for
        `compute_delta`; None is what was given there, and "64MB" for a delta from disk. `ranks` is
        that of `compute_delta`.

        Raises:
            FileExistsError: `path` is taken.
            OSError: the disk or a quota is full; nothing is left behind.
            NonFiniteError, ValueError, DriftError: as `compute_delta`.
        """
        shard_nbytes = parse_size(max_shard_size)
        memory_nbytes = None if memory is None else parse_size(memory)
        with together(path, ranks) as group:
            return self._write(
                path,
                group,
                overwrite=overwrite,
                max_shard_nbytes=shard_nbytes,
                memory_nbytes=memory_nbytes,
                progress=progress,
            )

    def _write(
        self,
        path: PathLike,
        group: ProcessGroup | None,
        *,
        overwrite: bool,
        max_shard_nbytes: int,
        memory_nbytes: int | None,
        progress: ProgressCallback | None,
    ) -> Delta:
        target = Path(path).absolute()
        if self.path is not None and target.exists() and target.samefile(self.path):
            raise FileExistsError(f"{target}: the delta is there already; choose another path")
        tensors = [(name, list(shape)) for name, shape in self._backend.shapes.items()]

        def describe(rows: Sequence[Mapping[str, Any]]) -> str:
            self._stats = self._backend.conclude(rows, written=True)
            return json.dumps(self._describe(self._stats), indent=1) + "\n"

        if group is not None:
            from drift_fast.delta.parallel import write

            def fill(
                writer: _core.DeltaWriter, places: Sequence[int]
            ) -> Sequence[Mapping[str, Any]]:
                def watched(state: Progress) -> None:
                    group.check()
                    if progress is not None:
                        progress(state)

                rows, self.peak_nbytes = self._backend.write(writer, places, watched, memory_nbytes)
                return rows

            write(
                group,
                target,
                tensors,
                self.stored_dtype,
                max_shard_nbytes=max_shard_nbytes,
                overwrite=overwrite,
                description_nbytes=self._description_nbytes(),
                fill=fill,
                describe=describe,
            )
            saved = Delta.open(target)
            saved.peak_nbytes = self.peak_nbytes
            return saved
        writer = _core.DeltaWriter(
            target,
            tensors,
            self.stored_dtype,
            max_shard_nbytes=max_shard_nbytes,
            overwrite=overwrite,
            description_nbytes=self._description_nbytes(),
        )
        try:
            rows, peak_nbytes = self._backend.write(
                writer, range(len(tensors)), progress, memory_nbytes
            )
            writer.commit(describe(rows))
        except BaseException:
            writer.abort()
            raise
        saved = Delta.open(target)
        self.peak_nbytes = saved.peak_nbytes = peak_nbytes
        return saved

    @classmethod
    def combine(
        cls, deltas: Summands, *, missing_as_zero: bool = False, dtype: str | None = None
    ) -> Delta:
        """Return Σ weight·Δ of several deltas as a delta of its own, summed when it is asked for.

        It is `drift_fast.combine` with statistics and `save`, which writes piece by piece, so that
        memory does not grow with the deltas. Each element is the float64 sum rounded once. The
        statistics hold ‖Δ‖ of the exact sum, and ‖W_multimodal‖ where all deltas have the same;
        there is no reasoning checkpoint, so its norm and the cosine are NaN. What was combined, and
        with which weights, is in `sources`.

        Arguments and errors are those of `drift_fast.combine`; a delta that shows no elements
        apart, other than a `Delta`, is read whole for each piece.
        """
        # Loaded here, since it needs this module.
        from drift_fast.delta.combine import Summed, combine

        combined = combine(deltas, missing_as_zero=missing_as_zero, dtype=dtype)
        return cls(
            Summed(combined),
            stored_dtype=combined.dtype,
            coverage=combined.coverage(),
            sources=combined.describe(),
            alignment={},
            selection=combined.selection(),
        )

    @property
    def names(self) -> list[str]:
        """Tensor names, layer by layer."""
        return list(self._backend.shapes)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return dict(self._backend.shapes)

    @property
    def stats(self) -> Statistics:
        """Norms and cosines; a delta that is not on disk reads both checkpoints once for them."""
        if self._stats is None:
            self._stats, peak_nbytes = self._backend.statistics()
            # Statistics that lay on disk took no stream.
            self.peak_nbytes = self.peak_nbytes if peak_nbytes is None else peak_nbytes
        return self._stats

    @property
    def compression(self) -> Compression | None:
        """What storing Δ in eight bits cost; None where it is not, or not yet, stored so."""
        if self.path is None and self._stats is None:
            return None
        return self.stats.compression

    def read_into(self, name: str, tensor: torch.Tensor, *, start: int | None = None) -> None:
        """Fill a contiguous CPU tensor of this delta's dtype (pinned or not) with Δ.

        Without `start` the tensor has Δ's shape. With it, the tensor has one dimension and gets as
        many elements of Δ, in row-major order, from element `start` on; no others are read, unless
        Δ is put together from parts.

        Raises:
            KeyError: no such tensor in this delta.
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
        elements = None if start is None else (start, start + tensor.numel())
        if elements is not None and not 0 <= elements[0] <= elements[1] <= math.prod(shape):
            raise ValueError(f"{name} has {math.prod(shape)} elements, not {elements}")
        # numpy has no bfloat16, so Rust gets a window of bytes onto the tensor's own memory.
        window = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        self._backend.read_into(name, window, elements)

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

        assert isinstance(self._backend, Stored)
        blocks = start // INT8_BLOCK, -(-stop // INT8_BLOCK)
        codes = torch.empty(stop - start, dtype=torch.int8)
        scales = torch.empty(blocks[1] - blocks[0], dtype=torch.float16)
        if codes.numel():
            self._backend.read_codes(name, codes.view(torch.uint8).numpy(), (start, stop))
            self._backend.read_scales(name, scales.view(torch.uint8).numpy(), blocks)
        return codes, scales

    def plot(self, path: PathLike) -> Path:
        """Draw ‖Δ‖/‖W‖ and the cosine over layers × modules as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from drift_fast.delta.plot import plot_statistics

        return plot_statistics(self.stats, path)

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        if name not in self._backend.shapes:
            raise KeyError(name)
        tensor = torch.empty(self._backend.shapes[name], dtype=getattr(torch, self.dtype))
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

    def __repr__(self) -> str:
        where = f" at {self.path}" if self.path else ""
        return f"Delta({len(self)} tensors, {self.stored_dtype}, {self.selection}{where})"

    def _description_nbytes(self) -> int:
        """Return what the description will take at most, before there are statistics to put in."""
        fixed = len(json.dumps(self._describe(Statistics([])), indent=1))
        return fixed + sum(len(json.dumps(name)) + _ROW_NBYTES for name in self._backend.shapes)

    def _describe(self, stats: Statistics) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "drift_fast_version": _core.__version__,
            "formula": "delta = reasoning - multimodal; an injection subtracts c * delta from the "
            "gradient, so alpha > 0 moves weights towards the reasoning model",
            "dtype": self.stored_dtype,
            "selection": self.selection,
            "sources": self.sources,
            "alignment": self.alignment,
            "coverage": self.coverage.to_dict(),
            "statistics": stats.to_json(),
        }
