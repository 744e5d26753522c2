"""Task vectors trimmed to `density`, with one sign elected for each element (Yadav et al., arXiv
2306.01708).
"""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method("ties", takes_base=True, density="0.2")
