"""What a merge is asked to do: the method, its numbers, and the weight of each tensor.

Owns the checks of arguments that need no checkpoint. A number that the method has no use for is
refused, and so is a weight that no merged tensor has, so that nothing is ignored in silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from drift_fast.names import kind_of
from drift_fast.selection import PRESETS

Weight = float | Mapping[str, float]

KINDS = tuple(preset for preset in PRESETS if preset != "all")
OTHERWISE = "all"


@dataclass(frozen=True)
class _Method:
    """Which numbers a method takes; `weight` is the default, None where it must be given."""

    weight: float | None = None
    takes_weight: bool = True
    takes_base: bool = False
    takes_density: bool = False
    takes_seed: bool = False


METHODS = {
    "linear": _Method(),
    "task_arithmetic": _Method(weight=1.0, takes_base=True),
    "ties": _Method(weight=1.0, takes_base=True, takes_density=True),
    "dare_linear": _Method(weight=1.0, takes_base=True, takes_density=True, takes_seed=True),
    "dare_ties": _Method(weight=1.0, takes_base=True, takes_density=True, takes_seed=True),
    "layer_swap": _Method(weight=1.0, takes_weight=False),
    "slerp": _Method(),
}


@dataclass(frozen=True)
class Recipe:
    """A checked method with its numbers; `weight` has one for each kind of module, or for all."""

    method: str
    weight: Mapping[str, float]
    multimodal_weight: float
    density: float | None
    seed: int
    keep_layers: int | None

    @classmethod
    def parse(
        cls,
        method: str,
        *,
        has_base: bool,
        weight: Weight | None,
        multimodal_weight: float | None,
        density: float | None,
        seed: int | None,
        keep_layers: int | None,
    ) -> Recipe:
        """Check the arguments of a merge.

        Raises:
            ValueError: an unknown method, a number that it needs or has no use for, or one out of
                range.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        known = METHODS[method]
        if has_base and not known.takes_base:
            raise ValueError(
                f"{method} has no use for a base; leave it out, or choose task_arithmetic, ties, "
                "dare_linear or dare_ties"
            )
        if multimodal_weight is not None and not has_base:
            raise ValueError(
                "multimodal_weight is the weight of multimodal − base, so it needs base=…"
            )
        if weight is not None and not known.takes_weight:
            raise ValueError(f"{method} takes tensors as they are; leave weight out")
        if weight is None and known.weight is None:
            raise ValueError(
                f"{method} needs a weight: how much of the reasoning model, from 0 to 1"
            )
        for given, taken, name in (
            (density, known.takes_density, "density"),
            (seed, known.takes_seed, "seed"),
            (keep_layers, method == "layer_swap", "keep_layers"),
        ):
            if given is not None and not taken:
                takers = [
                    other for other, one in METHODS.items() if getattr(one, f"takes_{name}", 0)
                ]
                raise ValueError(
                    f"{method} has no use for {name}, which "
                    f"{', '.join(takers) or 'layer_swap'} takes"
                )
        if known.takes_density:
            density = _density(density, method)
        return cls(
            method,
            _weights(weight if weight is not None else known.weight or 0.0),
            1.0 if multimodal_weight is None else _number(multimodal_weight, "multimodal_weight"),
            density,
            _whole(0 if seed is None else seed, "seed", most=2**64 - 1),
            _keep_layers(keep_layers) if method == "layer_swap" else None,
        )

    def weight_of(self, name: str) -> float | None:
        """Return the reasoning model's weight of a tensor; None where there is no number for it."""
        return self.weight.get(kind_of(name), self.weight.get(OTHERWISE))

    def refuse_unused(self, merged: Iterable[str]) -> None:
        """Refuse a weight that none of the tensors that are merged has.

        Raises:
            ValueError: a kind with a number that no name is of.
        """
        kinds = {kind_of(name) for name in merged}
        unused = [kind for kind in self.weight if kind != OTHERWISE and kind not in kinds]
        if unused:
            raise ValueError(
                f"weight has a number for {', '.join(map(repr, unused))}, and nothing that is "
                f"merged is of that kind; what is merged is of {', '.join(sorted(kinds))}. Leave "
                "the number out, or select such tensors with modules=… or layers=…"
            )

    def describe(self) -> dict[str, Any]:
        """Return what was asked for, for `merge.json`."""
        known = METHODS[self.method]
        described: dict[str, Any] = {"method": self.method}
        if known.takes_weight:
            described["weight"] = dict(self.weight)
        if known.takes_base:
            described["multimodal_weight"] = self.multimodal_weight
        if known.takes_density:
            described["density"] = self.density
        if known.takes_seed:
            described["seed"] = self.seed
        if self.keep_layers is not None:
            described["keep_layers"] = self.keep_layers
        return described


def _weights(weight: Weight) -> Mapping[str, float]:
    if not isinstance(weight, Mapping):
        return {OTHERWISE: _number(weight, "weight")}
    if not weight:
        raise ValueError("weight is an empty mapping; name a kind of module, such as {'attn': 0.7}")
    unknown = [kind for kind in weight if kind not in (*KINDS, OTHERWISE)]
    if unknown:
        raise ValueError(
            f"weight has a number for {unknown[0]!r}; expected {', '.join(KINDS)}, or "
            f"{OTHERWISE!r} for all that are not named"
        )
    return {kind: _number(value, f"weight[{kind!r}]") for kind, value in weight.items()}


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    return float(value)


def _density(density: float | None, method: str) -> float:
    if density is None:
        raise ValueError(
            f"{method} needs a density: the share of each task vector that is kept, such as "
            f"{'0.2' if method == 'ties' else '0.5'}"
        )
    value = _number(density, "density")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"density must be above 0 and at most 1, got {density!r}")
    return value


def _whole(value: object, what: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{what} must be a whole number from 0 to {most}, got {value!r}")
    return value


def _keep_layers(keep_layers: int | None) -> int:
    if keep_layers is None:
        raise ValueError(
            "layer_swap needs keep_layers: how many of the first decoder layers stay the "
            "multimodal model's"
        )
    # More layers than any model has.
    return _whole(keep_layers, "keep_layers", most=10**6)
