"""Task vectors added to the base (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method(
    "task_arithmetic",
    "B + w·(R − B) + v·(M − B); without a base M + w·(R − M)",
    takes_base=True,
)
