"""Whole decoder layers of the reasoning model."""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method(
    "layer_swap",
    "M in the first `keep_layers` decoder layers and outside of them, R in the others",
    takes_weight=False,
    takes_keep_layers=True,
)
