"""What a checkpoint's names, dtypes and shapes say about its language backbone."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from drift_fast.names import Parsed, container_of, containers_of, kind_of, parsed
from drift_fast.shapes import Shape

Shapes = Mapping[str, Shape]

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}

_PROJECTION = re.compile(r"(?:^|\.)((?:q|k|v|o|qkv)_proj|mlp\.down_proj)\.(weight|bias)$")
_QK_NORM = re.compile(r"(?:^|\.)(?:q|k|query|key)_(?:layer)?norm\.weight$")
_EXPERT = re.compile(r"\.experts\.(?:(\d+)\.)?")


@dataclass(frozen=True)
class Headers:
    """What the names, dtypes and shapes of one side's language backbone say.

    A dimension is None if the tensors have several, or none that shows it.
    """

    layers: int
    dtypes: tuple[str, ...]
    packed: tuple[str, ...]
    biases: tuple[str, ...]
    qk_norm: bool
    experts: int
    hidden: int | None
    intermediate: int | None
    attention: int | None
    key_value: int | None
    head_dimension: int | None
    vocabulary: int | None


@dataclass
class _Seen:
    """What was collected of the backbone's tensors: dtypes, and shapes by what has them."""

    layers: set[int | None] = field(default_factory=set)
    # Forms of names with dtype and shape, which repeat in every layer and expert.
    forms: set[tuple[str, str, Shape]] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    biases: set[str] = field(default_factory=set)
    experts: set[int] = field(default_factory=set)
    shapes: dict[str, set[Shape]] = field(default_factory=lambda: defaultdict(set))
    latent: bool = False
    qk_norm: bool = False

    def add(self, name: str, found: Parsed, dtype: str, shape: Shape) -> None:
        self.layers.add(found.layer)
        if (found.form, dtype, shape) not in self.forms:
            self.forms.add((found.form, dtype, shape))
            self._add_form(found.form, dtype, shape)
        if ".experts." in found.form and (expert := _EXPERT.search(name)):
            self.experts.add(int(expert[1]) + 1 if expert[1] else next(iter(shape), 0))

    def _add_form(self, name: str, dtype: str, shape: Shape) -> None:
        # Indices and masks are not what weights are packed into.
        if len(shape) > 1 and dtype not in ("I64", "BOOL"):
            self.stored.add(dtype)
        self.latent = self.latent or "kv_a_proj" in name
        projection = _PROJECTION.search(name)
        if projection and projection[2] == "weight":
            # Weights packed into integers have the packing's shape.
            if dtype in _DTYPES or dtype.startswith("F8"):
                self.shapes[projection[1]].add(shape)
        elif projection and projection[1] != "mlp.down_proj":
            self.biases.update(projection[1].removesuffix("_proj"))
        elif _QK_NORM.search(name):
            self.qk_norm = True
            # Some models keep a row for each head; the last axis is the head's in any case.
            self.shapes["qk_norm"].add(shape[-1:])

    def heads(self) -> tuple[int | None, int | None, int | None]:
        """Return the widths of attention and of keys and values, and the size of a head."""
        if self.latent:
            # Latent attention: o_proj reads value heads, whose size differs from the query's.
            return None, None, None
        attention, key_value = _only(self.shapes["o_proj"], 1), _only(self.shapes["k_proj"], 0)
        head = _only(self.shapes["qk_norm"], 0)
        # A norm over all heads at once says nothing about one of them.
        return attention, key_value, None if head in (attention, key_value) else head


def read_headers(shapes: Shapes, dtypes: Mapping[str, str], matched: Iterable[str] = ()) -> Headers:
    """Read the facts of the backbone from a checkpoint's names, dtypes and shapes.

    `matched` are names known to be in the backbone. If none of them is in a layer, the backbone is
    the container of layers with most elements outside towers and projectors.
    """
    containers = containers_of(matched) or _largest(shapes)
    seen = _Seen()
    for name, shape in shapes.items():
        found = parsed(name)
        if found.container in containers:
            seen.add(name, found, dtypes[name], shape)
    attention, key_value, head_dimension = seen.heads()
    return Headers(
        layers=len(seen.layers),
        dtypes=tuple(sorted(_DTYPES[dtype] for dtype in seen.stored if dtype in _DTYPES)),
        packed=tuple(sorted(dtype for dtype in seen.stored if dtype not in _DTYPES)),
        biases=tuple(part for part in "qkvo" if part in seen.biases),
        qk_norm=seen.qk_norm,
        experts=max(seen.experts, default=0),
        hidden=_only(seen.shapes["o_proj"], 0),
        intermediate=_only(seen.shapes["mlp.down_proj"], 1),
        attention=attention,
        key_value=key_value,
        head_dimension=head_dimension,
        vocabulary=_only({s for n, s in shapes.items() if kind_of(n) == "embed"}, 0),
    )


def _largest(shapes: Shapes) -> set[str | None]:
    numel: dict[str | None, int] = defaultdict(int)
    for name, shape in shapes.items():
        if kind_of(name) in ("attn", "mlp") and container_of(name) is not None:
            numel[container_of(name)] += math.prod(shape)
    return {max(numel, key=lambda container: numel[container])} if numel else set()


def _only(shapes: set[tuple[int, ...]], axis: int) -> int | None:
    """Return the one size that all shapes have along `axis`."""
    sizes = {shape[axis] if axis < len(shape) else None for shape in shapes}
    return sizes.pop() if len(sizes) == 1 else None
