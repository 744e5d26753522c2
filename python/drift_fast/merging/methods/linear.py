"""(1 − w)·M + w·R, a weighted mean of the two models."""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method("linear", weight=None)
