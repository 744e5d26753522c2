"""Which tensors a merge changes, by how much, and what is to be said of each.

Owns the way from two pairings to a list of tensors for the core; opens nothing and writes nothing.
Every tensor of the multimodal checkpoint is in it once, merged or with the reason that it is not.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drift_fast import _core
from drift_fast.alignment.coverage import listed
from drift_fast.alignment.embeddings import TIED
from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.name_alignment import Pair
from drift_fast.checkpoints.opened import Opened, PathLike
from drift_fast.errors import AlignmentError, CheckpointError, DriftWarning, NonFiniteError
from drift_fast.merging.config import OTHERWISE, Recipe
from drift_fast.names import kind_of, layer_of
from drift_fast.selection import Layers, Modules, Selection
from drift_fast.shapes import Shape

# Whole numbers and truth values, as the format names them.
_WHOLE = re.compile(r"[IU]\d+|BOOL")
_POSITIONS = ("inv_freq", "original_inv_freq")

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
LEFT_OUT_AS_TIED = "left out: tied to the embedding by the configuration, which is merged"
_COMPARED_NBYTES = 8 << 20


@dataclass(frozen=True)
class MergedTensor:
    """What became of one tensor.

    `sources` are the reasoning checkpoint's names, none where the tensor was carried over, and then
    `reason` says why. `merged` counts elements with a counterpart. `kept_reasoning` and
    `kept_multimodal` count what trimming or dropping left of each task vector, and `cosine` is that
    of both tensors, each where the method has it. `nonfinite` counts NaN and infinities of the
    sources, `overflow` results beyond the dtype.
    """

    name: str
    kind: str
    layer: int | None
    sources: tuple[str, ...] = ()
    weight: float | None = None
    reason: str = ""
    merged: int = 0
    kept_reasoning: int | None = None
    kept_multimodal: int | None = None
    cosine: float | None = None
    nonfinite: int = 0
    overflow: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return what is known of it for `merge.json`; its name tells the kind and the layer."""
        derived = {"kind", "layer"}
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in derived and value not in (None, "", (), 0)
        }


@dataclass(frozen=True)
class _Later(Selection):
    """A selection of decoder layers from a number on."""

    first: int = 0

    def __contains__(self, name: str) -> bool:
        layer = layer_of(name)
        return layer is not None and layer >= self.first and super().__contains__(name)

    def __str__(self) -> str:
        return f"{super().__str__()}, layers from {self.first} on"


def selection_of(recipe: Recipe, modules: Modules | None, layers: Layers) -> Selection:
    """Return which tensors are merged: what was asked for, or the kinds that have a weight.

    Raises:
        ValueError: modules or layers that `Selection` refuses.
    """
    if modules is None:
        modules = [OTHERWISE] if OTHERWISE in recipe.weight else list(recipe.weight)
    found = Selection.parse(modules, layers)
    if recipe.keep_layers is None:
        return found
    return _Later(found.modules, found.layers, recipe.keep_layers)


@dataclass(frozen=True)
class Blended:
    """A tensor that is merged: where its values come from, and with which weight."""

    pair: Pair
    of_base: Pair | None
    weight: float
    dtype: str


def _buffer(pair: Pair, left: Opened, right: Opened, selection: Selection) -> str:
    """Return why a pair is no weight to be merged, or nothing; what a pattern names is meant."""
    name = pair.name
    if any(one.startswith("re:") and name in Selection((one,), None) for one in selection.modules):
        return ""
    if name.rpartition(".")[2] in _POSITIONS:
        return "a buffer of position frequencies, no weight"
    stored = [right.dtypes[name], *(left.dtypes[source] for source in pair.sources)]
    whole = next((dtype for dtype in stored if _WHOLE.fullmatch(dtype)), None)
    if whole is None or _is_packed(name):
        return ""
    return f"a buffer of {whole}, no weight"


def _is_packed(name: str) -> bool:
    """Whether whole numbers of this name are a quantised weight, such as `q_proj.qweight`."""
    module = name.rpartition(".")[0]
    unpacked = (name, f"{module}.weight", re.sub(r"_(blocks|scales)$", "", name))
    return any(kind_of(one) != "other" for one in unpacked)


def _warn_of_routers(blended: Mapping[str, Blended], shapes: Mapping[str, Shape]) -> None:
    """Warn of routers that stay the multimodal model's while the experts they choose are merged."""
    blocks = {name.partition(".experts.")[0] for name in blended if ".experts." in name}
    routers = [
        name
        for name in shapes
        if name not in blended
        and kind_of(name) == "other"
        and any(name.startswith(f"{block}.") for block in blocks)
    ]
    if routers:
        warnings.warn(
            f"{len(routers)} tensors that choose among experts stay the multimodal model's while "
            f"those experts are merged: {', '.join(routers[:8])}"
            f"{f' and {len(routers) - 8} more' if len(routers) > 8 else ''}. Merge them too with "
            "modules=[…] and a pattern such as r're:\\.(gate|router)\\.', and, where weight is a "
            f"mapping, a number for {OTHERWISE!r}",
            DriftWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class Plan:
    """Every tensor of the multimodal checkpoint in file order: merged, or why it is not.

    `tied` are heads that are stored beside the merged embedding which they are tied to, each with
    that embedding's name. They are not written, or the loaded model would have an old head.
    """

    recipe: Recipe
    names: list[str]
    nbytes: Mapping[str, int]
    blended: Mapping[str, Blended]
    reasons: Mapping[str, str]
    tied: Mapping[str, str]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        pairing: AlignedPair,
        of_base: AlignedPair | None,
        *,
        dtype: str | None,
        strict: bool,
    ) -> Plan:
        """Put together what the pairings found.

        Raises:
            AlignmentError: when strict, a tensor that the base has no counterpart for.
            CheckpointError: a tensor that cannot be merged into, such as 8-bit codes.
            ValueError: a selected tensor that the weights name no number for, or a number for a
                kind that nothing merged is of.
        """
        right = pairing.multimodal
        bases = {} if of_base is None else {pair.name: pair for pair in of_base.pairs}
        reasons = dict(pairing.coverage.unmatched_multimodal)
        blended: dict[str, Blended] = {}
        missing = []
        for pair in pairing.pairs:
            name = pair.name
            if buffer := _buffer(pair, pairing.reasoning, pairing.multimodal, pairing.selection):
                reasons[name] = buffer
                continue
            weight = recipe.weight_of(name)
            if weight is None:
                raise ValueError(
                    f"{name} is selected and weight has no number for {kind_of(name)!r}; add one, "
                    f"or one for {OTHERWISE!r}, or leave modules out to merge what weight names"
                )
            if of_base is not None and name not in bases:
                reasons[name] = "the base has no counterpart"
                missing.append((name, reasons[name]))
                continue
            stored = right.dtypes[name]
            if stored not in DTYPES:
                raise CheckpointError(
                    f"{right.source.path}: {name} is stored as {stored}, which cannot be merged "
                    f"into; merge into a checkpoint of {', '.join(DTYPES)}, or leave it out with "
                    "modules=… or layers=…"
                )
            blended[name] = Blended(pair, bases.get(name), weight, dtype or DTYPES[stored])
        if of_base is not None and missing and (strict or not blended):
            raise AlignmentError(
                f"{len(missing)} tensors have no counterpart in the base "
                f"{of_base.paths[0]}:{listed(missing)}\nChoose the base that the reasoning "
                "model was tuned from, or pass strict=False to carry them over"
            )
        tied = _tied(reasons, blended, right)
        reasons |= dict.fromkeys(tied, LEFT_OUT_AS_TIED)
        recipe.refuse_unused(blended)
        _warn_of_routers(blended, right.shapes)
        names = [name for name, *_ in right.checkpoint.tensors()]
        places = {name: right.checkpoint.place(name) for name in names}
        nbytes = {name: end - start for name, (_, start, end) in places.items()}
        return cls(recipe, names, nbytes, blended, reasons, tied)

    def slots(self) -> list[tuple[str, str | None]]:
        """Return each tensor and the dtype of its result, None for its own."""
        return [
            (name, self.blended[name].dtype if name in self.blended else None)
            for name in self.written
        ]

    @property
    def written(self) -> list[str]:
        """Names of the tensors of the output."""
        return [name for name in self.names if name not in self.tied]

    def check_tied(self, checkpoint: _core.Checkpoint, path: Path) -> None:
        """Refuse a head that is tied by the configuration and is not the embedding's copy.

        Raises:
            CheckpointError: there is one.
        """
        for head, embedding in self.tied.items():
            if not _equal(checkpoint, head, embedding):
                raise CheckpointError(
                    f"{path}: the configuration ties {head} to {embedding}, and they "
                    "differ; set tie_word_embeddings to false in its config.json to merge both, or "
                    "leave the embedding as it is with modules=('attn', 'mlp', 'norm')"
                )

    def jobs(self) -> list[tuple[str, _core._Blended | None]]:
        """Return each tensor as the core takes it."""
        return [(name, self._job(name)) for name in self.written]

    def _job(self, name: str) -> _core._Blended | None:
        one = self.blended.get(name)
        if one is None:
            return None
        return (
            one.pair.source,
            None if one.of_base is None else one.of_base.source,
            one.dtype,
            one.weight,
            self.recipe.multimodal_weight,
        )

    @property
    def total_nbytes(self) -> int:
        """Bytes as the core counts its progress: for each model that is read, the tensor's own."""
        return sum(self.nbytes[name] * self._models(name) for name in self.written)

    def _models(self, name: str) -> int:
        one = self.blended.get(name)
        return 1 if one is None else 2 if one.of_base is None else 3

    def tensors(self, found: list[_core.Found | None]) -> tuple[MergedTensor, ...]:
        """Return what became of each tensor."""
        rows = dict(zip(self.written, found, strict=True))
        return tuple(self._tensor(name, rows.get(name)) for name in self.names)

    def _tensor(self, name: str, row: _core.Found | None) -> MergedTensor:
        one = self.blended.get(name)
        if one is None or row is None:
            reason = self.reasons.get(name, "block scales of a tensor that is carried over")
            return MergedTensor(name, kind_of(name), layer_of(name), reason=reason)
        return MergedTensor(
            name,
            kind_of(name),
            layer_of(name),
            tuple(one.pair.sources),
            one.weight,
            merged=row["merged"],
            kept_reasoning=row["kept_reasoning"],
            kept_multimodal=row["kept_multimodal"],
            cosine=row["cosine"],
            nonfinite=row["nonfinite_reasoning"]
            + row["nonfinite_multimodal"]
            + row["nonfinite_base"],
            overflow=row["overflow"],
        )

    def refuse_nonfinite(
        self, found: list[_core.Found | None], paths: tuple[Path, Path, Path | None]
    ) -> None:
        """Refuse NaN and infinities, in sources or in results; `paths` are R's, M's and B's.

        Raises:
            NonFiniteError: there are some.
        """
        problems = list(self._problems(found, paths))
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise NonFiniteError(
                "; ".join(problems[:8])
                + more
                + ". Pass allow_nonfinite=True to count them in the report instead"
            )

    def _problems(
        self, found: list[_core.Found | None], paths: tuple[Path, Path, Path | None]
    ) -> Iterator[str]:
        for name, row in zip(self.written, found, strict=True):
            if row is None:
                continue
            one = self.blended[name]
            sources = " and ".join(one.pair.sources[:3])
            bases = " and ".join(one.of_base.sources[:3]) if one.of_base else ""
            for count, there, path in (
                (row["nonfinite_reasoning"], sources, paths[0]),
                (row["nonfinite_multimodal"], name, paths[1]),
                (row["nonfinite_base"], bases, paths[2]),
            ):
                if count:
                    yield f"{there} has {count} NaN or infinite values in {path}"
            if row["overflow"]:
                remedy = "; choose dtype='float32'" if one.dtype == "float16" else ""
                yield (
                    f"{name}: {row['overflow']} results are beyond the range of {one.dtype}{remedy}"
                )


def _tied(
    reasons: Mapping[str, str], blended: Mapping[str, Blended], right: Opened
) -> dict[str, str]:
    """Return stored heads that are one parameter with a merged embedding, and that embedding."""
    shapes = {name: tuple(shape) for name, _, shape, _ in right.checkpoint.tensors()}
    embeddings = [name for name in blended if kind_of(name) == "embed"]
    return {
        head: embedding
        for head, reason in reasons.items()
        if reason == TIED and head in shapes
        for embedding in embeddings
        if shapes[head] == shapes[embedding]
    }


def _equal(checkpoint: _core.Checkpoint, first: str, second: str) -> bool:
    """Tell whether two tensors of a checkpoint have the same dtype and bytes."""
    dtypes = {name: dtype for name, dtype, *_ in checkpoint.tensors()}
    if dtypes[first] != dtypes[second]:
        return False
    places = [checkpoint.place(name) for name in (first, second)]
    with contextlib.ExitStack() as stack:
        files = []
        for path, start, _ in places:
            files.append(stack.enter_context(Path(path).open("rb")))
            files[-1].seek(start)
        rest = places[0][2] - places[0][1]
        while rest:
            a, b = (file.read(min(rest, _COMPARED_NBYTES)) for file in files)
            if a != b or not a:
                return False
            rest -= len(a)
    return True


def refuse_in_place(out: PathLike, sources: list[Opened]) -> None:
    """Refuse an output that is a source, or lies inside one.

    Raises:
        ValueError: it is or does.
    """
    target = Path(out).resolve()
    for opened in sources:
        path = opened.source.path.resolve()
        directory = opened.directory.resolve()
        # Beside a single file there is room for other things.
        within = path.is_dir() and path in target.parents
        if within or target in (path, directory):
            raise ValueError(
                f"{out}: the output is{' inside' if within else ''} {opened.source.path}, a source "
                "of this merge, which it must not change; choose another directory"
            )
