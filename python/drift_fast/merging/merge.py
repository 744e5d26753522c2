"""Merge a text reasoning model into a multimodal one, without loading either.

Owns `merge` and `Merged`. The result is a complete checkpoint: every tensor of the multimodal model
is merged or copied byte for byte, its configuration and tokenizer too. It appears whole or not at
all. `methods` says what each method takes, the core computes it; docs/merging.md has the equations.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from drift_fast._core import ModelWriter, __version__
from drift_fast._core import merge as merge_tensors
from drift_fast.alignment.coverage import Coverage
from drift_fast.alignment.mapping import MappingLike, resolve
from drift_fast.alignment.model_pair import SAME, AlignedPair, is_same_source
from drift_fast.alignment.pairing import align_checkpoints, fetch, verify
from drift_fast.checkpoints.opened import Opened, PathLike, open_checkpoint
from drift_fast.config_files import json_text
from drift_fast.delta.backends import describe_sources
from drift_fast.delta.delta import Delta
from drift_fast.errors import AlignmentError, DriftWarning
from drift_fast.merging.config import MergeConfig
from drift_fast.merging.exclusions import LEFT_OUT_AS_TIED
from drift_fast.merging.given_delta import align_delta, given_delta
from drift_fast.merging.layout import Alignments, MergeLayout
from drift_fast.merging.method_options import ChosenMethod
from drift_fast.merging.outcome import (
    MergedTensor,
    outcome_of,
    refuse_nonfinite,
    rounding_share,
    warn_of_rounding,
)
from drift_fast.merging.selected import selection_of
from drift_fast.merging.side_files import SideFiles, find_side_files, warn_of_what_stays
from drift_fast.options import takes
from drift_fast.paths import local_path
from drift_fast.preflight.warn import warn_of_configurations
from drift_fast.progress_bar import Progress, ProgressCallback, reported
from drift_fast.selection import Selection
from drift_fast.sizes import parse_size, thread_count
from drift_fast.tables import Block, Shown, Table

if TYPE_CHECKING:
    from drift_fast._core import Found
    from drift_fast._keywords import MergeKeywords

FORMAT_VERSION = 1
# The most bytes that one tensor takes in `merge.json`, without its names.
_ROW_NBYTES = 640


@dataclass(frozen=True, repr=False)
class Merged(Shown):
    """What `merge` wrote, and from what.

    `peak_nbytes` is the most that buffers took at any time. `files` are the side files that were
    copied, `left_behind` the other files beside the multimodal model. `rounding_share` is how large
    rounding to the output's dtype is beside the shift from the multimodal model, over all tensors.
    """

    path: Path
    method: str
    parameters: Mapping[str, Any]
    tensors: tuple[MergedTensor, ...]
    coverage: Coverage
    files: tuple[str, ...]
    left_behind: tuple[str, ...]
    sources: Mapping[str, Any]
    peak_nbytes: int
    rounding_share: float | None = None

    @property
    def merged(self) -> list[str]:
        """Names of the merged tensors, in file order."""
        return [tensor.name for tensor in self.tensors if tensor.sources]

    @property
    def copied(self) -> list[str]:
        """Names of the tensors that were copied byte for byte, in file order.

        A stored head that is tied to a merged embedding is in `tensors`, but is not written.
        """
        return [
            tensor.name
            for tensor in self.tensors
            if not tensor.sources and tensor.reason != LEFT_OUT_AS_TIED
        ]

    def headline(self) -> str:
        """Return the method, and how many tensors were merged and copied, and where they are."""
        return f"{self.method}, {len(self.merged)} merged, {len(self.copied)} copied, {self.path}"

    def blocks(self) -> list[Block]:
        """Return what was done, and what became of tensors of each kind."""
        counts = Counter((row.kind, row.reason or "merged") for row in self.tensors)
        rows = [(kind, fate, f"{count:,}") for (kind, fate), count in counts.items()]
        return [str(self), Table(("kind", "", "tensors"), rows, "<<>")]

    def records(self) -> list[dict[str, Any]]:
        """Return what became of each tensor."""
        return [asdict(row) for row in self.tensors]

    def __str__(self) -> str:
        weights = self.parameters.get("weight", {})
        weighted = ",".join(f"{kind}={value:g}" for kind, value in weights.items())
        method = f"{self.method} ({weighted})" if weighted else self.method
        return (
            f"{method}: {len(self.merged)} tensors merged, "
            f"{len(self.copied)} copied, {len(self.files)} files beside them; "
            f"{self.coverage}"
        )


@takes(MergeConfig)
def merge(
    method: str,
    reasoning: PathLike | Delta,
    multimodal: PathLike,
    out: PathLike,
    **options: Unpack[MergeKeywords],
) -> Merged:
    """Merge a reasoning model into the language backbone of a multimodal one, and write the result.

    Every element is computed in float64 and rounded once. R, M and B are the reasoning model, the
    multimodal model and the base; w is `weight`, and v `multimodal_weight`:

    | method | W = |
    |---|---|
    | `linear` | (1 − w)·M + w·R |
    | `task_arithmetic` | B + w·(R − B) + v·(M − B); without a base M + w·(R − M) |
    | `ties` | B + the mean of w·R̂ and v·M̂ where they have the elected sign |
    | `dare_linear` | B + w·R̃ + v·M̃ |
    | `dare_ties` | as `ties`, with R̃ and M̃ in place of R̂ and M̂ |
    | `layer_swap` | R in the decoder layers after the first `keep_layers`, M elsewhere |
    | `slerp` | the point at w on the great circle from M to R, for each tensor |

    R̂ and M̂ are the task vectors R − B and M − B, trimmed to the share `density` of their largest
    elements. R̃ and M̃ keep that share at random, rescaled. The elected sign of an element is that of
    w·R̂ + v·M̂.

    A delta, or its directory, in place of the reasoning model stands for R = M + Δ, added in
    float64: `task_arithmetic` is then M + w·Δ. Tensors that it does not have are copied.

    Sources are given and aligned as for `compute_delta`; the base, too, is aligned with the
    multimodal model. `out` becomes a directory that `from_pretrained` loads: all tensors of the
    multimodal checkpoint under their names, its configuration, tokenizer, processor, chat template
    and generation settings, and `merge.json`, which says what was done. Pickles and code are never
    copied. With `strict=False` a selected tensor without a match is copied. Rows of embeddings and
    heads without a match keep the multimodal model's values. Buffers are merged only if a pattern
    in `modules` names them.

    Raises:
        FileNotFoundError, CheckpointError: a source that is missing or invalid, or that cannot be
            merged into, such as one with 8-bit codes.
        AlignmentError, CoverageError: sources, or a mapping, that do not fit each other.
        NonFiniteError: NaN or infinity in a source, or a result beyond the dtype's range.
        FileExistsError, OSError: an output that already exists, or a full disk or quota; nothing is
            left behind.
        TypeError: an unknown option.
        ValueError: an invalid argument, such as an output inside a source or less memory than one
            thread needs.
    """
    given = MergeConfig.from_keywords(options, function="merge")
    chosen = given.chosen(method, has_base=given.base is not None)
    delta = given_delta(reasoning)
    if delta is not None and given.base is not None:
        raise ValueError(
            f"{delta.path} is a delta, the task vector itself, so there is nothing to subtract a "
            "base from; leave base out"
        )
    if given.base_mapping is not None and given.base is None:
        raise ValueError("base_mapping is about the tensors of the base, so it needs base=…")
    if not isinstance(reasoning, Delta):
        if given.base is None and is_same_source(reasoning, multimodal):
            raise AlignmentError(SAME)
        if given.base is not None and is_same_source(reasoning, given.base):
            warnings.warn(
                "the base is the reasoning model, so its task vector is zero and nothing of it is "
                "merged: give the model that both were trained from, or no base",
                DriftWarning,
                stacklevel=2,
            )
    target = local_path(out)
    with reported(given.progress_bar, given.on_progress) as report:
        found = _align(chosen, reasoning if delta is None else delta, multimodal, given)
        others = [pair.reasoning for pair in found.by_role.values()]
        _refuse_in_place(target, [found.reasoning.multimodal, *others])
        layout = MergeLayout.of(chosen, found, dtype=given.dtype, strict=given.strict)
        side_files = find_side_files(found.reasoning.multimodal)
        warn_of_what_stays(side_files)
        warn_of_configurations(found.reasoning)
        verified = {
            role: verify(_fetched(pair, layout, report)) for role, pair in found.by_role.items()
        }
        found = Alignments(**verified, delta=found.delta)
        return _Run(layout, found, side_files, given).write(target, report)


def _align(
    chosen: ChosenMethod,
    reasoning: PathLike | Delta,
    multimodal: PathLike,
    given: MergeConfig,
) -> Alignments:
    """Align the multimodal model with the reasoning model, and with the base if there is one."""
    selection = selection_of(chosen, given.modules, given.layers)
    opened = open_checkpoint(multimodal, given.reader)
    options = given.pair_options(given.mapping)
    if isinstance(reasoning, Delta):
        return Alignments(align_delta(reasoning, opened, options, selection), delta=reasoning)
    first = align_checkpoints(reasoning, opened, options, selection=selection)
    if given.base is None:
        return Alignments(first)
    base = open_checkpoint(given.base, given.reader)
    return Alignments(first, _align_base(base, opened, selection, given))


def _align_base(
    base: Opened, multimodal: Opened, selection: Selection, given: MergeConfig
) -> AlignedPair:
    """Align the base by its own mapping or, if that one holds for it, the reasoning model's."""
    stated: MappingLike | None = given.base_mapping
    why = ""
    if stated is None and given.mapping is not None:
        try:
            here, there = ([*side.shapes, *side.unloaded] for side in (base, multimodal))
            if any(resolve(given.mapping, here, there).values()):
                stated = given.mapping
        except AlignmentError as error:
            why = f"\nIt was matched by names, since the mapping does not hold for it: {error}"
    try:
        options = given.pair_options(stated)
        return align_checkpoints(base, multimodal, options, selection=selection)
    except AlignmentError as error:
        raise AlignmentError(
            f"the base: {error}{why}\nTo state a mapping for the base, pass base_mapping=…"
        ) from error


def _fetched(pair: AlignedPair, layout: MergeLayout, on_progress: ProgressCallback) -> AlignedPair:
    """Download what the merge needs: all of the multimodal checkpoint, and selected tensors."""

    def report(done: int, total: int) -> None:
        on_progress(Progress(0, len(layout.names), done, total, "downloading"))

    return fetch(pair, report, needed=(pair.needed()[0], set(layout.names)))


@dataclass(frozen=True)
class _Run:
    """A merge that is ready to be read and written."""

    layout: MergeLayout
    found: Alignments
    side_files: SideFiles
    given: MergeConfig

    def write(self, out: Path, on_progress: ProgressCallback) -> Merged:
        """Merge every tensor, copy the side files, and give the directory its name."""
        description = self._description()
        with self._writer(out, description) as writer:
            found, peak_nbytes = self._merge(writer, on_progress)
            if not self.given.allow_nonfinite:
                self._refuse_nonfinite(found)
            tensors = self._outcomes(found)
            for name in self.side_files.files:
                writer.add(name, self.side_files.read(name))
            description["tensors"] = [tensor.to_dict() for tensor in tensors]
            share = description["rounding_share"] = rounding_share(found)
            writer.commit(json_text(description))
        warn_of_rounding(
            share, tensors, {blended.dtype for blended in self.layout.blended.values()}
        )
        return Merged(
            path=out.absolute(),
            method=self.layout.chosen.method.name,
            parameters=self.layout.chosen.to_dict(),
            tensors=tensors,
            coverage=self.found.reasoning.coverage,
            files=tuple(sorted(self.side_files.files)),
            left_behind=tuple(self.side_files.left_behind),
            sources=description["sources"],
            peak_nbytes=peak_nbytes,
            rounding_share=share,
        )

    def _description(self) -> dict[str, Any]:
        sources = describe_sources(self.found.reasoning)
        if self.found.delta is not None:
            sources["reasoning"]["delta"] = self.found.delta.sources
        if self.found.base is not None:
            sources["base"] = describe_sources(self.found.base)["reasoning"]
        pairs = self.found.by_role
        return {
            "format_version": FORMAT_VERSION,
            "drift_fast_version": __version__,
            **self.layout.chosen.to_dict(),
            "dtype": self.given.dtype,
            "selection": str(self.found.reasoning.selection),
            "sources": sources,
            "alignment": {role: pair.to_dict() for role, pair in pairs.items()},
            "coverage": {role: pair.coverage.to_dict() for role, pair in pairs.items()},
            "files": sorted(self.side_files.files),
            "left_behind": self.side_files.left_behind,
        }

    @contextmanager
    def _writer(self, out: Path, description: Mapping[str, Any]) -> Iterator[ModelWriter]:
        """Reserve the files of the result, and remove them if anything fails."""
        names = self.layout.names
        rows = 2 * len(json_text(names)) + len(names) * _ROW_NBYTES
        writer = ModelWriter(
            {
                "target": out,
                "overwrite": self.given.overwrite,
                "max_shard_nbytes": parse_size(self.given.max_shard_size),
                "description_nbytes": len(json_text(description)) + rows,
            },
            self.found.reasoning.multimodal.checkpoint,
            self.layout.slots(),
            [(name, nbytes) for name, (_, nbytes) in self.side_files.files.items()],
        )
        try:
            yield writer
        except BaseException:
            writer.abort()
            raise

    def _merge(
        self, writer: ModelWriter, on_progress: ProgressCallback
    ) -> tuple[list[Found | None], int]:
        chosen, base = self.layout.chosen, self.found.base
        total, total_nbytes = len(self.layout.written), self.layout.total_nbytes

        def report(tensors: int, nbytes: int) -> None:
            on_progress(Progress(tensors, total, nbytes, total_nbytes, "merging"))

        return merge_tensors(
            (
                self.found.reasoning.reasoning.checkpoint,
                self.found.reasoning.multimodal.checkpoint,
                None if base is None else base.reasoning.checkpoint,
            ),
            self.layout.jobs(),
            writer,
            {"name": chosen.method.name, "density": chosen.density, "seed": chosen.seed},
            {
                "threads": thread_count(self.given.threads),
                "memory": parse_size(self.given.memory),
            },
            progress=report,
        )

    def _refuse_nonfinite(self, found: Sequence[Found | None]) -> None:
        paths = {role: pair.reasoning.source.path for role, pair in self.found.by_role.items()}
        paths["multimodal"] = self.found.reasoning.multimodal.source.path
        rows = zip(self.layout.written, found, strict=True)
        blended = self.layout.blended
        refuse_nonfinite(((blended[name], row) for name, row in rows if row is not None), paths)

    def _outcomes(self, found: Sequence[Found | None]) -> tuple[MergedTensor, ...]:
        rows = dict(zip(self.layout.written, found, strict=True))
        return tuple(
            outcome_of(
                name,
                self.layout.blended.get(name),
                rows.get(name),
                self.layout.reasons.get(name, ""),
            )
            for name in self.layout.names
        )


def _refuse_in_place(out: Path, sources: Sequence[Opened]) -> None:
    """Refuse an output that is a source, or is inside one.

    Raises:
        ValueError: it is.
    """
    target = out.resolve()
    for opened in sources:
        path = opened.source.path.resolve()
        directory = opened.directory.resolve()
        # The output may be beside a source that is a single file.
        within = path.is_dir() and path in target.parents
        if within or target in (path, directory):
            raise ValueError(
                f"{out}: the output is{' inside' if within else ''} {opened.source.path}, a source "
                "of this merge; choose another directory"
            )
