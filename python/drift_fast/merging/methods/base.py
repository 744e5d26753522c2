"""What a merge method is: a name that the core knows, its equation, and the numbers it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One way to merge R and M, or what both changed of a base B, with weights w and v.

    `weight` is the default of w, None where it must be given. `density` is an example of one, for
    the message that asks for it; empty where the method takes none.
    """

    name: str
    equation: str
    weight: float | None = 1.0
    takes_weight: bool = True
    takes_base: bool = False
    takes_seed: bool = False
    takes_keep_layers: bool = False
    density: str = ""

    @property
    def takes_density(self) -> bool:
        """Whether the method keeps a share of each task vector."""
        return bool(self.density)
