"""Merge a text reasoning model into a multimodal one, without loading either.

Owns `merge` and `Merged`. The result is a checkpoint of its own: every tensor of the multimodal
one, merged or byte for byte, with its configuration and tokenizer. It appears whole or not at all.
What a method takes is `recipe`'s to check, what it computes the core's; docs/merging.md has the
equations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drift_fast import _core
from drift_fast.alignment.coverage import Coverage
from drift_fast.alignment.embeddings import Rows
from drift_fast.alignment.mapping import MappingLike, resolve
from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.options import PairOptions
from drift_fast.alignment.pairing import align_checkpoints, fetch, verify
from drift_fast.checkpoints.opened import Opened, PathLike, open_checkpoint
from drift_fast.delta.backends import describe_sources
from drift_fast.errors import AlignmentError
from drift_fast.merging.config import Recipe, Weight
from drift_fast.merging.layout import (
    DTYPES,
    LEFT_OUT_AS_TIED,
    MergedTensor,
    Plan,
    refuse_in_place,
    selection_of,
)
from drift_fast.merging.side_files import carried_over, warn_of_what_stays
from drift_fast.preflight.warn import warn_of_configurations
from drift_fast.progress_bar import Progress, ProgressCallback
from drift_fast.selection import Layers, Modules, Selection
from drift_fast.sizes import MEMORY, parse_size, thread_count

FORMAT_VERSION = 1
# What `merge.json` may take for one tensor beside its names.
_ROW_NBYTES = 640


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote, and from what.

    `peak_nbytes` is the most that the stream's buffers took at a time; `files` are those that were
    carried over, and `left_behind` the others that lay beside the multimodal model.
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

    @property
    def merged(self) -> list[str]:
        """Names of the tensors that were merged, in file order."""
        return [tensor.name for tensor in self.tensors if tensor.sources]

    @property
    def carried(self) -> list[str]:
        """Names of the tensors that are the multimodal model's byte for byte, in file order.

        A stored head that is tied to a merged embedding is in `tensors` and in no output.
        """
        return [
            tensor.name
            for tensor in self.tensors
            if not tensor.sources and tensor.reason != LEFT_OUT_AS_TIED
        ]

    def __str__(self) -> str:
        weights = self.parameters.get("weight", {})
        told = ",".join(f"{kind}={value:g}" for kind, value in weights.items())
        return (
            f"{self.method}{f' ({told})' if told else ''}: {len(self.merged)} tensors merged, "
            f"{len(self.carried)} carried over, {len(self.files)} files beside them; "
            f"{self.coverage}"
        )


def merge(
    method: str,
    reasoning: PathLike,
    multimodal: PathLike,
    out: PathLike,
    *,
    base: PathLike | None = None,
    weight: Weight | None = None,
    multimodal_weight: float | None = None,
    density: float | None = None,
    seed: int | None = None,
    keep_layers: int | None = None,
    modules: Modules | None = None,
    layers: Layers = None,
    mapping: MappingLike | None = None,
    base_mapping: MappingLike | None = None,
    rows: Rows = None,
    dtype: str | None = None,
    memory: int | str = MEMORY,
    threads: int | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    strict: bool = True,
    check_weights: bool = True,
    allow_nonfinite: bool = False,
    reader: str = "auto",
    progress: ProgressCallback | None = None,
) -> Merged:
    """Merge a reasoning model into the language backbone of a multimodal one, and write the result.

    Every element is computed in float64 and rounded once. With R, M and B the reasoning model, the
    multimodal model and the base, w the weight and v `multimodal_weight`:

    | method | W = |
    |---|---|
    | `linear` | (1 − w)·M + w·R |
    | `task_arithmetic` | B + w·(R − B) + v·(M − B); without a base M + w·(R − M) |
    | `ties` | B + mean of w·R̂ and v·M̂ where they have the elected sign, trimmed to `density` |
    | `dare_linear` | B + w·R̃ + v·M̃, of which 1 − `density` is dropped and the rest rescaled |
    | `dare_ties` | as `ties`, of what DARE leaves instead of trimming |
    | `layer_swap` | M in the first `keep_layers` decoder layers and outside of them, else R |
    | `slerp` | from M to R along the great circle, at w, tensor by tensor |

    Sources are given and paired as for `compute_delta`, the base with the multimodal model as well.
    `out` becomes a directory that `from_pretrained` loads: all tensors of the multimodal checkpoint
    under their names, its configuration, tokenizer, processor, chat template and generation
    settings, and `merge.json`, which says what was done. Pickles and code are never taken along.

    Args:
        base: the text model that the reasoning model was tuned from. Without one, `ties` and
            `dare_*` have a single task vector, R − M, and no sign to elect.
        weight: one number, or one for each kind of module (`attn`, `mlp`, `norm`, `embed`, `head`,
            and `all` for what is not named). Kinds that a mapping does not name stay the multimodal
            model's. `linear` and `slerp` need one; otherwise None is 1.
        multimodal_weight: v; None is 1. It needs a base.
        density: the share of each task vector that `ties` and `dare_*` keep, above 0 and up to 1.
        seed: of what DARE drops, which depends on it, the tensor's name, the model and the element
            alone; None is 0.
        keep_layers: how many of the first decoder layers `layer_swap` leaves alone.
        modules: which tensors are merged, as for `compute_delta`; None is every language tensor, or
            the kinds that `weight` names; buffers are merged only where a pattern names them.
        layers: which layers are merged, as for `compute_delta`.
        mapping, rows, check_weights, reader: as for `compute_delta`. Rows of embeddings and heads
            without a counterpart stay the multimodal model's.
        base_mapping: as `mapping`, from the base's names; None is `mapping` where it holds for the
            base, which mostly has the reasoning model's names, and else by names and shapes.
        dtype: of the merged tensors, "bfloat16", "float16", "float32" or "float64"; None is the one
            that each has in the multimodal checkpoint.
        memory: bytes, or text such as "64MB", that all buffers may take, as for `compute_delta`.
        threads: None is every core this process may use. The result depends neither on it nor on
            the memory.
        overwrite: replace a merged model at `out`; anything else there is never touched.
        max_shard_size: bytes, or text such as "500MB", of one file of the result.
        strict: refuse when a selected tensor has no partner; otherwise carry it over.
        allow_nonfinite: count NaN, infinities and overflows in the report instead of refusing.
        progress: called on this thread with a `Progress`, about 20 times a second.

    Raises:
        FileNotFoundError, CheckpointError: a source that is missing or not valid, or that cannot be
            merged into, such as 8-bit codes.
        AlignmentError, CoverageError: sources, or a mapping, that do not fit each other.
        NonFiniteError: NaN or infinity in a source, or a result beyond the dtype's range.
        FileExistsError, OSError: an output that is taken, or a full disk or quota; nothing is left
            behind.
        ValueError: an argument without meaning, such as an output inside a source, or memory that
            not even one thread can work in.
    """
    out = Path(out).expanduser()
    recipe = Recipe.parse(
        method,
        has_base=base is not None,
        weight=weight,
        multimodal_weight=multimodal_weight,
        density=density,
        seed=seed,
        keep_layers=keep_layers,
    )
    if base_mapping is not None and base is None:
        raise ValueError("base_mapping says which tensors of the base are which; it needs base=…")
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES.values())}, got {dtype!r}")
    shard_nbytes, memory_nbytes = parse_size(max_shard_size), parse_size(memory)
    threads = thread_count(threads)
    selection = selection_of(recipe, modules, layers)
    right = open_checkpoint(multimodal, reader)
    options = PairOptions(
        mapping=mapping, rows=rows, strict=strict, check_weights=check_weights, reader=reader
    )
    pairings = {"reasoning": align_checkpoints(reasoning, right, options, selection=selection)}
    if base is not None:
        pairings["base"] = _pair_base(
            open_checkpoint(base, reader),
            right,
            selection,
            options,
            base_mapping,
        )
    refuse_in_place(out, [right, *(pairing.reasoning for pairing in pairings.values())])
    first, of_base = pairings["reasoning"], pairings.get("base")
    plan = Plan.of(recipe, first, of_base, dtype=dtype, strict=strict)
    carried = carried_over(right)
    warn_of_what_stays(carried)
    warn_of_configurations(first)
    for role, pairing in pairings.items():
        pairings[role] = verify(_fetched(pairing, plan, progress))
    first, of_base = pairings["reasoning"], pairings.get("base")
    plan.check_tied(first.multimodal.checkpoint, first.multimodal.source.path)
    sources = describe_sources(first)
    if of_base is not None:
        sources["base"] = describe_sources(of_base)["reasoning"]
    described: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "drift_fast_version": _core.__version__,
        **recipe.describe(),
        "dtype": dtype,
        "selection": str(selection),
        "sources": sources,
        "alignment": {role: pairing.to_dict() for role, pairing in pairings.items()},
        "coverage": {role: pairing.coverage.to_dict() for role, pairing in pairings.items()},
        "files": sorted(carried.files),
        "left_behind": carried.left_behind,
    }
    writer = _core.ModelWriter(
        out,
        first.multimodal.checkpoint,
        plan.slots(),
        max_shard_nbytes=shard_nbytes,
        overwrite=overwrite,
        description_nbytes=len(json.dumps(described, indent=1))
        + sum(2 * len(json.dumps(name)) + _ROW_NBYTES for name in plan.names),
        files=[(name, nbytes) for name, (_, nbytes) in carried.files.items()],
    )

    def report(tensors: int, nbytes: int) -> None:
        if progress is not None:
            progress(Progress(tensors, len(plan.written), nbytes, plan.total_nbytes, "merging"))

    try:
        found, peak_nbytes = _core.merge(
            first.reasoning.checkpoint,
            first.multimodal.checkpoint,
            None if of_base is None else of_base.reasoning.checkpoint,
            plan.jobs(),
            writer,
            method=method,
            density=recipe.density,
            seed=recipe.seed,
            threads=threads,
            memory=memory_nbytes,
            progress=report,
        )
        if not allow_nonfinite:
            paths = (first.reasoning.source.path, first.multimodal.source.path)
            path_of_base = None if of_base is None else of_base.reasoning.source.path
            plan.refuse_nonfinite(found, (*paths, path_of_base))
        tensors = plan.tensors(found)
        described["tensors"] = [tensor.to_json() for tensor in tensors]
        for name in carried.files:
            writer.add(name, carried.read(name))
        writer.commit(json.dumps(described, indent=1) + "\n")
    except BaseException:
        writer.abort()
        raise
    return Merged(
        path=out.absolute(),
        method=method,
        parameters=recipe.describe(),
        tensors=tensors,
        coverage=first.coverage,
        files=tuple(sorted(carried.files)),
        left_behind=tuple(carried.left_behind),
        sources=sources,
        peak_nbytes=peak_nbytes,
    )


def _pair_base(
    base: Opened,
    right: Opened,
    selection: Selection,
    options: PairOptions,
    base_mapping: MappingLike | None,
) -> AlignedPair:
    """Pair the base with the multimodal model, as is stated for it or for the reasoning model."""
    stated, why = base_mapping, ""
    if stated is None and options.mapping is not None:
        try:
            if any(resolve(options.mapping, base.shapes, right.shapes).values()):
                stated = options.mapping
        except AlignmentError as error:
            why = f"\nIt was paired by names, since the mapping does not hold for it: {error}"
    try:
        options = replace(options, mapping=stated)
        return align_checkpoints(base, right, options, selection=selection)
    except AlignmentError as error:
        raise AlignmentError(
            f"the base: {error}{why}\nA mapping for the base is given as base_mapping=…"
        ) from error


def _fetched(pairing: AlignedPair, plan: Plan, progress: ProgressCallback | None) -> AlignedPair:
    """Download what the merge needs: of the multimodal checkpoint, everything."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(0, len(plan.names), done, total, "downloading"))

    return fetch(pairing, report, needed=(pairing.needed()[0], set(plan.names)))
