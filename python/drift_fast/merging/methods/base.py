"""What a merge method is: a name that the core knows, and the numbers it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One way to merge R and M, or what both changed of a base B, with weights w and v.

    `weight` is the default of w; None if it must be given. `density` is an example for the message
    that asks for one; it is empty if the method takes none.
    """

    name: str
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
