"""The options of every step that begins with two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from drift_fast.alignment.embeddings import Rows
from drift_fast.alignment.mapping import MappingLike, parse_mapping
from drift_fast.options import Options, option
from drift_fast.selection import Layers, Modules, Selection

# What is selected unless asked.
_MODULES: Modules = ("attn", "mlp")


def _check_share(value: float | None) -> None:
    if value is not None and not 0.0 <= value <= 1.0:
        raise ValueError(f"min_coverage must be between 0 and 1, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class MatchOptions(Options):
    """How tensors are matched where names do not show it."""

    mapping: MappingLike | None = option(
        None,
        "which tensors match if names do not show it: a map file that `drift-fast align "
        "--out` wrote, or prefix pairs such as model:model.llm",
        parse=parse_mapping,
        metavar="MAP",
    )
    rows: Rows = option(
        None,
        "how rows of embeddings and heads are matched: by token (default) or by index",
        choices=("token", "index"),
    )


@dataclass(frozen=True, kw_only=True)
class AlignOptions(MatchOptions):
    """How two checkpoints are opened, matched and verified."""

    strict: bool = option(True, "refuse when a selected tensor has no match, instead of listing it")
    check_weights: bool = option(
        True, "compare samples of the weights, and refuse shifted or permuted layers"
    )
    reader: str = option(
        "auto",
        "how files are read: auto, pread or mmap; a file that shrinks while it is mapped kills the "
        "process",
        choices=("auto", "mmap", "pread"),
    )


@dataclass(frozen=True, kw_only=True)
class ModuleOptions(Options):
    """Which tensors are selected."""

    modules: Modules = option(
        _MODULES,
        "presets attn, mlp, norm, embed, head, all, or re:<pattern>; separated by commas",
    )
    layers: Layers = option(None, "layer numbers, such as 0-3,8; all by default", metavar="LAYERS")

    def selection(self) -> Selection:
        """Return the selected modules and layers, parsed."""
        return Selection.parse(self.modules, self.layers, named=self.modules is not _MODULES)


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(MatchOptions, ModuleOptions):
    """Which tensors are selected, and how they are matched."""


@dataclass(frozen=True, kw_only=True)
class PairOptions(AlignOptions, SelectionOptions):
    """How a pair of checkpoints is aligned and accounted for."""

    min_coverage: float | None = option(
        None,
        "refuse when less of the selected parameters is covered, such as 0.95; by default all of "
        "them when strict",
        check=_check_share,
        metavar="SHARE",
    )
