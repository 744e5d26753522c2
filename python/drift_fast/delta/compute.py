"""Compute Δ or its statistics from two checkpoints, streamed: `compute_delta` and `inspect`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Unpack

from drift_fast.alignment.coverage import Coverage
from drift_fast.alignment.model_pair import SAME, AlignedPair
from drift_fast.alignment.pairing import align_checkpoints, fetch, verify
from drift_fast.checkpoints.opened import PathLike
from drift_fast.delta.backends import Streamed, describe_sources, warn_of_zero
from drift_fast.delta.delta import Delta
from drift_fast.delta.options import DeltaOptions, InspectOptions
from drift_fast.delta.parallel import agree, first, together
from drift_fast.delta.plot import heat_map
from drift_fast.delta.statistics import Statistics
from drift_fast.delta.writing import Destination
from drift_fast.errors import AlignmentError
from drift_fast.options import takes
from drift_fast.paths import local_path
from drift_fast.preflight.warn import warn_of_configurations
from drift_fast.progress_bar import Progress, ProgressCallback, reported
from drift_fast.sizes import parse_size
from drift_fast.tables import Block, Shown

if TYPE_CHECKING:
    from drift_fast._keywords import DeltaKeywords, InspectKeywords
    from drift_fast.delta.process_group import ProcessGroup


@takes(DeltaOptions)
def compute_delta(
    reasoning: PathLike,
    multimodal: PathLike,
    out: PathLike | None = None,
    **options: Unpack[DeltaKeywords],
) -> Delta:
    """Compute Δ = W_reason − W_multimodal for every selected tensor of the language backbone.

    Either checkpoint is a `.safetensors` file, a directory that holds one or an index of shards, a
    Hub id (`org/name`, `org/name@revision`) or an http(s) URL. For Hub ids and URLs, only headers
    and the bytes of the selected tensors are downloaded. Both are streamed: memory does not grow
    with their size. Each Δ equals the float64 subtraction rounded once to `dtype`, and carries the
    multimodal checkpoint's tensor name. Weights of 8-bit floats under block scales
    (`X.weight_scale_inv`, as DeepSeek-V3 has them) are taken at the float32 values that the model
    computes with, so Δ carries the rounding that they went through.
    `compute_delta(expert, reference)` on two text models gives the difference of those, to be
    attached to a third.

    `dtype="int8"` stores Δ in half of bfloat16's bytes: tensors come out as bfloat16, and
    `Delta.compression` says what that costs. A `mapping` is checked like what is found by
    names, but may leave out tensors that only the multimodal model has. Rows of embeddings without
    a match get a Δ of zero. `memory` bounds all buffers and mapped windows; names and statistics
    come on top, and `Delta.peak_nbytes` says what was taken. The result depends on none of
    `threads`, `memory`, `reader` and `ranks`. Under a launcher (torchrun, Slurm, Open MPI) all
    processes must make the same call; each writes its own shards, and all return the delta.

    Args:
        out: a directory to write; None writes nothing, and tensors are subtracted when asked for.

    Raises:
        FileNotFoundError, CheckpointError: a source that is missing or not valid.
        AlignmentError, CoverageError: sources, or a mapping, that do not fit each other; one model
            given twice, where it is to be written.
        NonFiniteError: NaN or infinity in a source, or a Δ beyond `dtype`'s range.
        FileExistsError, OSError: an output that is taken, or a full disk or quota, where the
            message says how much is needed in all; nothing is left behind.
        DriftError: a rank that did not come within 60 seconds (or `DRIFT_FAST_RANK_TIMEOUT`), that
            ended, or that sees other files.
        TypeError: an unknown option.
        ValueError: an argument without meaning, or memory that not even one thread can work in,
            where the message says the least.
    """
    given = DeltaOptions.from_keywords(options, function="compute_delta")
    target = None if out is None else local_path(out).absolute()
    meeting = nullcontext() if target is None else together(target, given.ranks)
    bar = given.progress_bar if given.is_first() else False
    with reported(bar, given.on_progress) as report, meeting as group:
        pair = _ready(align_checkpoints(reasoning, multimodal, given), report, group)
        sources = describe_sources(pair)
        if _is_one_model(sources):
            if target is not None:
                raise AlignmentError(SAME)
            # No statistics will show it.
            warn_of_zero(pair)
        if group is not None:
            seen = {side: sources[side]["shards"] for side in ("reasoning", "multimodal")}
            pairs = {"pairs": [[one.name, one.source] for one in pair.pairs]}
            agree(group, seen | pairs | {"allow_nonfinite": given.allow_nonfinite})
        delta = Delta(
            Streamed(pair, given.dtype, given),
            stored_dtype=given.dtype,
            coverage=pair.coverage,
            sources=sources,
            alignment=pair.to_dict(),
            selection=str(pair.selection),
        )
        if target is None:
            return delta
        destination = Destination(target, given.overwrite, parse_size(given.max_shard_size))
        return delta.write(destination, report, group)


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """What `inspect` found: statistics and coverage; nothing was written.

    `peak_nbytes` is the most that the stream's buffers took at a time.
    """

    stats: Statistics
    coverage: Coverage
    sources: dict[str, Any]
    nbytes: int
    alignment: dict[str, Any]
    peak_nbytes: int

    def headline(self) -> str:
        """Return how many tensors were measured, and ‖Δ‖/‖W‖."""
        return self.stats.headline()

    def blocks(self, by: Literal["module", "layer", "tensor"] = "module") -> list[Block]:
        """Return the statistics, one row for each module, layer or tensor, and the coverage.

        With rows for modules there is a heat map of ‖Δ‖/‖W‖ over their layers too.
        """
        rows = self.stats
        if by != "tensor":
            rows = rows.by_module() if by == "module" else rows.by_layer()
        drawn = heat_map(self.stats) if by == "module" else []
        return [*Statistics([*rows, self.stats.total]).blocks(), *drawn, str(self.coverage)]

    def records(self) -> list[dict[str, Any]]:
        """Return the statistics of each tensor."""
        return self.stats.records()


@takes(InspectOptions)
def inspect(
    reasoning: PathLike, multimodal: PathLike, **options: Unpack[InspectKeywords]
) -> Report:
    """Measure norms and cosines between two checkpoints in one pass; nothing is written.

    Sources, options and errors are those of `compute_delta`. Under a launcher each process that
    calls this reads everything for itself.
    """
    given = InspectOptions.from_keywords(options, function="inspect")
    with reported(given.progress_bar, given.on_progress) as report:
        pair = _ready(align_checkpoints(reasoning, multimodal, given), report)
        stats, peak_nbytes = Streamed(pair, "float32", given).statistics(report)
    return Report(
        stats, pair.coverage, describe_sources(pair), pair.nbytes, pair.to_dict(), peak_nbytes
    )


def _ready(
    pair: AlignedPair, on_progress: ProgressCallback, group: ProcessGroup | None = None
) -> AlignedPair:
    """Download what is needed and check that the weights belong together.

    With several ranks, rank 0 downloads first, since the others may share its cache, and only
    rank 0 looks at the weights.
    """

    def report(done: int, total: int) -> None:
        on_progress(Progress(0, len(pair.pairs), done, total, "downloading"))

    warn_of_configurations(pair)
    pair = first(group, lambda: fetch(pair, report))
    return verify(pair) if group is None or group.rank == 0 else pair


def _is_one_model(sources: dict[str, Any]) -> bool:
    """Whether one checkpoint was given twice, or a copy of it."""
    shards = sources["reasoning"]["shards"]
    whole = all("sha256_of_samples" in shard for shard in shards)
    return bool(whole and shards == sources["multimodal"]["shards"])
