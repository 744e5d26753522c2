"""Δ pulled back to the factors of an adapter."""
