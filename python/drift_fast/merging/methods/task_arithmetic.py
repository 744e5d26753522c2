"""B + w·(R − B) + v·(M − B), or M + w·(R − M) without a base (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method("task_arithmetic", takes_base=True)
