"""DARE in place of trimming, then the elected signs of TIES."""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method("dare_ties", takes_base=True, takes_seed=True, density="0.5")
