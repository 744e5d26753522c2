"""Task vectors of which a random share is dropped (Yu et al., arXiv 2311.03099)."""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method(
    "dare_linear",
    "B + w·R̃ + v·M̃, of which 1 − `density` is dropped and the rest rescaled",
    takes_base=True,
    takes_seed=True,
    density="0.5",
)
