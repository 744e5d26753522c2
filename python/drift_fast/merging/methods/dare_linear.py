"""Task vectors that keep `density` of their elements at random, rescaled (Yu et al., arXiv
2311.03099).
"""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method("dare_linear", takes_base=True, takes_seed=True, density="0.5")
