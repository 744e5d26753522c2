"""Warn, before weights are read, of what configurations say against a pair of checkpoints."""

from __future__ import annotations

import warnings

from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.errors import DriftWarning


def warn_of_configurations(pair: AlignedPair) -> None:
    """Warn of what `check` calls breaking, which names and shapes do not show."""
    if not all(side.configuration.found for side in (pair.reasoning, pair.multimodal)):
        return
    # Loaded here, so that importing the package stays light.
    from drift_fast.preflight.fact import HEADERS
    from drift_fast.preflight.findings import ModelSide
    from drift_fast.preflight.rules import compare

    found = compare(
        ModelSide("reasoning", pair.reasoning),
        ModelSide("multimodal", pair.multimodal),
        pair,
    )
    broken = [
        f"{one.subject}: {one.message}"
        for one in found
        # What is stored in a type that cannot be subtracted is the reader's to refuse.
        if one.severity == "breaks" and HEADERS not in (one.reasoning.origin, one.multimodal.origin)
    ]
    if broken:
        first, second = pair.paths
        warnings.warn(
            f"the configurations of {first} and {second} do not fit each other; drift-fast check "
            f"shows every difference. {'; '.join(broken)}",
            DriftWarning,
            stacklevel=4,
        )
