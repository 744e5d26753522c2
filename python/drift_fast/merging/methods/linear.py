"""A weighted mean of both models."""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method("linear", "(1 − w)·M + w·R", weight=None)
