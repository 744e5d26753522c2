"""Warn of matrices of attention or MLPs that a preset should select, as it seems, and does not."""

from __future__ import annotations

import warnings

from drift_fast.alignment.coverage import modules_in
from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.errors import DriftWarning
from drift_fast.names import may_be_missed
from drift_fast.selection import pattern_of


def missed(pair: AlignedPair) -> list[str]:
    """Return the matrices of paired layers whose names say neither what they are nor are not."""
    presets = pair.selection.presets
    return [name for name in pair.coverage.unclaimed if may_be_missed(name, presets)]


def describe_missed(names: list[str]) -> str:
    """Say which modules are left out and how to select them."""
    return (
        f"{len(names)} matrices in paired layers belong to no preset and are left out: "
        f"{modules_in(names)}. If they are attention or MLP, add a pattern to modules, such as "
        f"{pattern_of(names)!r}"
    )


def warn_of_missed(pair: AlignedPair) -> None:
    """Warn of `missed`."""
    names = missed(pair)
    if names:
        first, second = pair.paths
        warnings.warn(f"{first} and {second}: {describe_missed(names)}", DriftWarning, stacklevel=4)
