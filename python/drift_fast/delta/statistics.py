"""Norms and cosines per tensor, module and layer, from the moments that the stream returns.

Owns the arithmetic from sums of squares to norms, and tables, not where the sums come from.
Norms are Frobenius norms of the exact Δ, before it is rounded for storage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, overload

from drift_fast.names import module_of, parsed
from drift_fast.tables import Block, Shown, Table

if TYPE_CHECKING:
    import pyarrow

    from drift_fast._core import Moments
    from drift_fast.delta.description import StoredRow


@dataclass(frozen=True, slots=True)
class Row:
    """Moments of one tensor, or of several taken together.

    `layer` is None outside the layers and for rows over several; `shape` is empty there. `max_abs`
    is the largest |Δ|, `zeros` counts elements that do not differ, `agreeing` those where neither
    side is zero and both have the same sign. `rounding_sq` is the part of `delta_sq` that is
    rounding of the sources, estimated from a sample. A delta written before they were taken has
    None, as has a sum of deltas.

    For a compressed Δ, as decoded: `stored_sq` is ‖stored‖², `stored_dot` its product with the
    exact Δ, and `flushed` counts differences other than zero that are stored as zero. For any other
    Δ they are None.
    """

    name: str
    module: str
    layer: int | None
    kind: str
    shape: tuple[int, ...]
    numel: int
    delta_sq: float
    reasoning_sq: float
    multimodal_sq: float
    dot: float
    nonfinite: int
    overflow: int
    max_abs: float | None = None
    zeros: int | None = None
    agreeing: int | None = None
    rounding_sq: float | None = None
    stored_sq: float | None = None
    stored_dot: float | None = None
    flushed: int | None = None

    @classmethod
    def of(cls, name: str, shape: Sequence[int], *moments: Any, **named: Any) -> Row:
        """Return the row of one tensor, with the columns that follow from its name and shape."""
        found = parsed(name)
        place = module_of(name), found.layer, found.kind
        return cls(name, *place, tuple(shape), math.prod(shape), *moments, **named)

    @property
    def delta_norm(self) -> float:
        """‖Δ‖."""
        return math.sqrt(self.delta_sq)

    @property
    def reasoning_norm(self) -> float:
        """‖W_reason‖."""
        return math.sqrt(self.reasoning_sq)

    @property
    def multimodal_norm(self) -> float:
        """‖W_multimodal‖."""
        return math.sqrt(self.multimodal_sq)

    @property
    def relative(self) -> float:
        """‖Δ‖/‖W_multimodal‖, NaN where both are zero or either is beyond float64."""
        if not math.isfinite(self.delta_sq + self.multimodal_sq):
            return math.nan
        if self.multimodal_sq == 0:
            return math.inf if self.delta_sq > 0 else math.nan
        return self.delta_norm / self.multimodal_norm

    @property
    def cosine(self) -> float:
        """cos(W_reason, W_multimodal), NaN where either is zero."""
        return _cosine(self.dot, self.reasoning_norm * self.multimodal_norm)

    @property
    def zero_share(self) -> float:
        """The share of elements that do not differ; NaN where unknown or there are none."""
        return _share(self.zeros, self.numel)

    @property
    def agreeing_share(self) -> float:
        """The share of elements of one sign on both sides; NaN where unknown or there are none."""
        return _share(self.agreeing, self.numel)

    @property
    def rounding_share(self) -> float:
        """The share of ‖Δ‖ that is rounding of the sources; NaN where unknown, 0 where Δ is."""
        if self.delta_sq == 0:
            return 0.0
        return math.sqrt(_float_or_nan(self.rounding_sq) / self.delta_sq)

    @property
    def stored_norm(self) -> float:
        """‖stored‖ of a compressed Δ, else NaN."""
        return math.sqrt(_float_or_nan(self.stored_sq))

    @property
    def stored_cosine(self) -> float:
        """cos(Δ, stored) of a compressed Δ; NaN elsewhere and where either is zero."""
        return _cosine(_float_or_nan(self.stored_dot), self.delta_norm * self.stored_norm)

    def to_dict(self) -> dict[str, Any]:
        """Return every column, derived ones included; NaN and infinity become None."""
        values = asdict(self) | {column: getattr(self, column) for column in _DERIVED}
        return {key: _finite_or_none(value) for key, value in values.items()}


_DERIVED = (
    "delta_norm",
    "reasoning_norm",
    "multimodal_norm",
    "relative",
    "cosine",
    "zero_share",
    "agreeing_share",
    "rounding_share",
    "stored_norm",
    "stored_cosine",
)
_SUMS = ("delta_sq", "reasoning_sq", "multimodal_sq", "dot")
# What a delta need not have: written by an earlier version, or not compressed.
_OPTIONAL_SUMS = ("max_abs", "rounding_sq", "stored_sq", "stored_dot")
_OPTIONAL_COUNTS = ("zeros", "agreeing", "flushed")
_COUNTS = ("nonfinite", "overflow")


def row_from_moments(
    name: str, shape: Sequence[int], moments: Moments, *, compressed: bool = False
) -> Row:
    """Return the row of one tensor; `compressed` says that it was stored in eight bits."""
    of_stored = moments["written_sq"], moments["stored_dot"], moments["flushed"]
    return Row.of(
        name,
        shape,
        moments["delta_sq"],
        moments["reasoning_sq"],
        moments["multimodal_sq"],
        moments["dot"],
        moments["nonfinite_reasoning"] + moments["nonfinite_multimodal"],
        moments["overflow"],
        moments["max_abs"],
        moments["zeros"],
        moments["agreeing"],
        moments["rounding_sq"],
        *(of_stored if compressed else ()),
    )


@dataclass(frozen=True)
class Compression:
    """How a compressed Δ compares with the exact one, over tensors whose Δ is not zero.

    Mean and least cos(Δ, stored) and the tensor that has the least, ‖stored‖/‖Δ‖ of all together,
    and how many differences other than zero are stored as zero.
    """

    mean_cosine: float
    min_cosine: float
    min_name: str
    norm_ratio: float
    flushed: int

    def __str__(self) -> str:
        return (
            f"stored: cos(Δ, stored) {_number(self.mean_cosine, '.6f')} on average, at least "
            f"{_number(self.min_cosine, '.6f')} ({self.min_name or 'nothing differs'}); "
            f"‖stored‖/‖Δ‖ {_number(self.norm_ratio, '.6f')}; {self.flushed:,} small differences "
            "became zero"
        )


class Statistics(Sequence[Row], Shown):
    """Rows in the multimodal checkpoint's order; `stats["name"]` finds one by name."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)
        self._by_name = {row.name: row for row in self._rows}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @overload
    def __getitem__(self, key: int | str) -> Row: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Row]: ...
    def __getitem__(self, key: int | str | slice) -> Row | Sequence[Row]:
        return self._by_name[key] if isinstance(key, str) else self._rows[key]

    @property
    def total(self) -> Row:
        """All tensors together."""
        return _together("total", "total", None, self._rows)

    def by_module(self) -> Statistics:
        """Return one row for each module (`self_attn.q_proj`), over all layers."""
        return self._grouped(lambda row: (row.module, None))

    def by_layer(self) -> Statistics:
        """Return one row for each layer, over all modules; all outside the layers are one row."""
        return self._grouped(lambda row: ("all", row.layer))

    def by_module_and_layer(self) -> Statistics:
        """Return one row for each module of each layer, weights and biases together."""
        return self._grouped(lambda row: (row.module, row.layer))

    def records(self) -> list[dict[str, Any]]:
        """Return all columns of each row; NaN and infinity are None."""
        return [row.to_dict() for row in self._rows]

    def to_arrow(self) -> pyarrow.Table:
        """Return an Arrow table of all columns.

        Raises:
            ImportError: pyarrow is not installed.
        """
        try:
            import pyarrow
        except ImportError as error:
            raise ImportError("to_arrow() needs pyarrow: pip install pyarrow") from error
        return pyarrow.Table.from_pylist(self.records())

    def to_rows(self) -> list[StoredRow]:
        """Return what `drift.json` stores: names, shapes and sums, from which the rest follows."""
        # Loaded here, so that measuring stays light.
        from drift_fast.delta.description import StoredRow

        stored = attrgetter(*StoredRow.__struct_fields__)
        return [StoredRow(*stored(row)) for row in self._rows]

    @classmethod
    def from_rows(cls, rows: Iterable[StoredRow]) -> Statistics:
        """Restore what `to_rows` returned.

        Raises:
            ValueError: a negative square.
        """
        restored = []
        for row in rows:
            squares = row.delta_sq, row.reasoning_sq, row.multimodal_sq
            optional = row.rounding_sq, row.stored_sq
            if min(square or 0.0 for square in squares + optional) < 0:
                raise ValueError(f"the statistics of {row.name} hold a negative square")
            sums = map(_float_or_nan, (*squares, row.dot))
            counts = row.nonfinite, row.overflow, row.max_abs, row.zeros, row.agreeing
            compressed = row.rounding_sq, row.stored_sq, row.stored_dot, row.flushed
            restored.append(Row.of(row.name, row.shape, *sums, *counts, *compressed))
        return cls(restored)

    def headline(self) -> str:
        """Return how many rows there are, and ‖Δ‖/‖W‖ of all."""
        return f"{len(self)} rows, ‖Δ‖/‖W‖ {_number(self.total.relative, '.4f')}"

    def blocks(self) -> list[Block]:
        """Return the rows as a table, norms with four significant digits."""
        columns = (
            "elements",
            "‖Δ‖",
            "‖W_reason‖",
            "‖W_multimodal‖",
            "‖Δ‖/‖W‖",
            "rounding",
            "cosine",
        )
        rows = [
            (
                row.name,
                f"{row.numel:,}",
                _number(row.delta_norm, ".4g"),
                _number(row.reasoning_norm, ".4g"),
                _number(row.multimodal_norm, ".4g"),
                _number(row.relative, ".4f"),
                _number(row.rounding_share, ".1%"),
                _number(row.cosine, ".6f"),
            )
            for row in self._rows
        ]
        return [Table(("", *columns), rows, "<>>>>>>>")]

    @property
    def compression(self) -> Compression | None:
        """How much of Δ is left in eight bits; None where it was not compressed."""
        if not self._rows or any(row.stored_sq is None for row in self._rows):
            return None
        moved = [row for row in self._rows if row.delta_sq > 0]
        flushed = sum(row.flushed or 0 for row in self._rows)
        if not moved:
            return Compression(math.nan, math.nan, "", math.nan, flushed)
        # What became zero throughout has no direction left.
        cosines = [0.0 if math.isnan(row.stored_cosine) else row.stored_cosine for row in moved]
        at = min(range(len(cosines)), key=cosines.__getitem__)
        together = self.total
        return Compression(
            math.fsum(cosines) / len(cosines),
            cosines[at],
            moved[at].name,
            together.stored_norm / together.delta_norm,
            flushed,
        )

    def _grouped(self, key: Callable[[Row], tuple[str, int | None]]) -> Statistics:
        groups: dict[tuple[str, int | None], list[Row]] = {}
        for row in self._rows:
            groups.setdefault(key(row), []).append(row)
        rows = []
        for (module, layer), members in groups.items():
            if module == "all":
                label = "outside the layers" if layer is None else f"layer {layer}"
            else:
                label = module if layer is None else f"{module} in layer {layer}"
            rows.append(_together(label, module, layer, members))
        return Statistics(rows)


def _cosine(dot: float, norms: float) -> float:
    # min and max below would turn NaN into a direction.
    if norms == 0 or not math.isfinite(norms + dot):
        return math.nan
    return max(-1.0, min(1.0, dot / norms))


def _share(count: int | None, numel: int) -> float:
    return math.nan if count is None or numel == 0 else count / numel


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _float_or_nan(value: Any) -> float:
    return math.nan if value is None else float(value)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _together(name: str, module: str, layer: int | None, rows: Sequence[Row]) -> Row:
    kinds = {row.kind for row in rows}

    def total(column: str, add: Callable[[list[Any]], Any]) -> Any:
        values = [getattr(row, column) for row in rows]
        return None if None in values else add(values)

    return Row(
        name=name,
        module=module,
        layer=layer,
        kind=kinds.pop() if len(kinds) == 1 else "several",
        shape=(),
        numel=sum(row.numel for row in rows),
        max_abs=total("max_abs", lambda values: max(values, default=0.0)),
        **{
            column: total(column, math.fsum)
            for column in (*_SUMS, "rounding_sq", "stored_sq", "stored_dot")
        },
        **{column: total(column, sum) for column in (*_COUNTS, *_OPTIONAL_COUNTS)},
    )
