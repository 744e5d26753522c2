"""Warn of a Δ that is mostly rounding; docs/format.md says how that is estimated."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

from drift_fast.errors import DriftWarning

if TYPE_CHECKING:
    from drift_fast.delta.statistics import Statistics

# The share of ‖Δ‖ above which Δ is mostly rounding: its cosine to the true one is below .87.
_MOSTLY = 0.5


def warn_of_rounding(stats: Statistics, paths: tuple[str, str]) -> None:
    """Warn if more of ‖Δ‖ than a half is rounding, and say of which modules most."""
    share = stats.total.rounding_share
    if not share > _MOSTLY:
        return
    modules = [row for row in stats.by_module() if row.rounding_share > 0]
    worst = sorted(modules, key=lambda row: row.rounding_share, reverse=True)[:3]
    shown = ", ".join(f"{row.name} {row.rounding_share:.0%}" for row in worst)
    warnings.warn(
        f"about {share:.0%} of ‖Δ‖ between {paths[0]} and {paths[1]} is rounding of the weights to "
        f"the precision they are stored in ({shown}), so that the cosine of Δ to what the models "
        f"learned is about {math.sqrt(1 - share**2):.2f}. Take checkpoints that are less rounded "
        "(float32, where it was published and not converted), or models that training moved "
        "further apart; or leave these modules out with modules=",
        DriftWarning,
        stacklevel=5,
    )
