"""Along the great circle between both tensors (Shoemake, 1985)."""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method("slerp", "from M to R along the great circle, at w, tensor by tensor", weight=None)
