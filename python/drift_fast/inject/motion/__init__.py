"""Planned motion: moving weights along Δ beside the optimizer."""
