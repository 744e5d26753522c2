"""The point at w on the great circle from M to R, tensor by tensor (Shoemake, 1985)."""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method("slerp", weight=None)
