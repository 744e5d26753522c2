"""Gradient injection: the formula, what it reaches, where Δ lives, and when it runs."""
