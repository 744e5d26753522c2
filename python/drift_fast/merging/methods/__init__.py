"""The merge methods. A new one is a module here and a line in the registry; the core
(`kernel/blend.rs`) has its arithmetic."""

from __future__ import annotations

from drift_fast.merging.methods import (
    dare_linear,
    dare_ties,
    layer_swap,
    linear,
    slerp,
    task_arithmetic,
    ties,
)
from drift_fast.merging.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        linear.METHOD,
        task_arithmetic.METHOD,
        ties.METHOD,
        dare_linear.METHOD,
        dare_ties.METHOD,
        layer_swap.METHOD,
        slerp.METHOD,
    )
}


def methods_that(takes: str) -> str:
    """Return the names of the methods that take something, such as "density"."""
    return ", ".join(name for name, one in METHODS.items() if getattr(one, f"takes_{takes}"))
