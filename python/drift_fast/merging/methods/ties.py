"""Task vectors trimmed, with one sign elected for each element (Yadav et al., arXiv 2306.01708)."""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method(
    "ties",
    "B + the mean of w·R̂ and v·M̂ where they have the elected sign, trimmed to `density`",
    takes_base=True,
    density="0.2",
)
