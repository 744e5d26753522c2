"""The numbers of a merge method, and the weight of each tensor.

Owns the checks of arguments that need no checkpoint. A number that the method does not take is
refused, and so is a weight that no merged tensor has: nothing is ignored silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from drift_fast.merging.methods import METHODS, methods_that
from drift_fast.merging.methods.base import Method
from drift_fast.names import MODULE_KINDS, kind_of
from drift_fast.options import Options, option

Weight = float | Mapping[str, float]

# The key in a mapping of weights for all kinds that the mapping does not name.
REST = "all"


def parse_weight(text: str) -> float | dict[str, float]:
    """Return a weight from text such as "0.7" or "attn=0.7,mlp=1.25".

    Raises:
        ValueError: not a number, or a module kind that is named twice.
    """
    try:
        if "=" not in text:
            return float(text)
        pairs = [part.partition("=") for part in text.split(",")]
        weights = {kind.strip(): float(value) for kind, _, value in pairs}
    except ValueError as error:
        raise ValueError(
            "weight must be a number, or numbers by module kind such as attn=0.7,mlp=1.25; got "
            f"{text!r}"
        ) from error
    if len(weights) != len(pairs):
        raise ValueError(f"weight names a module kind twice, in {text!r}")
    return weights


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Options):
    """The numbers of a merge method."""

    weight: Weight | None = option(
        None,
        "how much of the reasoning model: a number, or one for each kind of module, such as "
        "attn=0.7,mlp=1.25, with `all` for kinds that are not named; 1 by default, required by "
        "linear and slerp",
        parse=parse_weight,
        metavar="W",
    )
    multimodal_weight: float | None = option(
        None, "weight of multimodal − base, which needs a base; 1 by default", metavar="V"
    )
    density: float | None = option(
        None,
        "share of each task vector that ties and dare_* keep, above 0 and at most 1",
        metavar="SHARE",
    )
    seed: int | None = option(None, "seed of what DARE drops; 0 by default")
    keep_layers: int | None = option(
        None, "how many of the first decoder layers layer_swap does not replace", metavar="N"
    )

    def chosen(self, method: str, *, has_base: bool) -> ChosenMethod:
        """Return the method with these numbers.

        Raises:
            ValueError: an unknown method, or a number that is missing, not taken or out of range.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        known = METHODS[method]
        self._refuse_what_is_not_taken(known, has_base=has_base)
        if self.weight is None and known.weight is None:
            raise ValueError(
                f"{method} needs a weight: how much of the reasoning model, from 0 to 1"
            )
        weight = self.multimodal_weight
        return ChosenMethod(
            method=known,
            weight=_weights(self.weight if self.weight is not None else known.weight or 0.0),
            multimodal_weight=1.0 if weight is None else _number(weight, "multimodal_weight"),
            density=_density(self.density, known),
            seed=_whole(0 if self.seed is None else self.seed, "seed", most=2**64 - 1),
            keep_layers=_keep_layers(self.keep_layers, known),
        )

    def _refuse_what_is_not_taken(self, method: Method, *, has_base: bool) -> None:
        if has_base and not method.takes_base:
            raise ValueError(
                f"{method.name} does not take a base; leave it out, or choose one of "
                f"{methods_that('base')}"
            )
        if self.multimodal_weight is not None and not has_base:
            raise ValueError(
                "multimodal_weight is the weight of multimodal − base, so it needs base=…"
            )
        if self.weight is not None and not method.takes_weight:
            raise ValueError(f"{method.name} replaces whole tensors; leave weight out")
        for name in ("density", "seed", "keep_layers"):
            if getattr(self, name) is not None and not getattr(method, f"takes_{name}"):
                raise ValueError(
                    f"{method.name} does not take {name}, which {methods_that(name)} takes"
                )


@dataclass(frozen=True)
class ChosenMethod:
    """A method with its checked numbers; `weight` has one for each module kind, or one for all."""

    method: Method
    weight: Mapping[str, float]
    multimodal_weight: float
    density: float | None
    seed: int
    keep_layers: int | None

    def weight_of(self, name: str) -> float | None:
        """Return the reasoning model's weight for a tensor; None if there is none."""
        return self.weight.get(kind_of(name), self.weight.get(REST))

    def refuse_unused(self, merged: Iterable[str]) -> None:
        """Refuse a weight that applies to none of the merged tensors.

        Raises:
            ValueError: a kind that has a number, but no merged tensor.
        """
        kinds = {kind_of(name) for name in merged}
        unused = [kind for kind in self.weight if kind != REST and kind not in kinds]
        if unused:
            raise ValueError(
                f"weight has a number for {', '.join(map(repr, unused))}, and no merged tensor is "
                f"of that kind; the merged ones are of {', '.join(sorted(kinds))}. Leave the "
                "number out, or select such tensors with modules=… or layers=…"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the method and its numbers, for `merge.json`."""
        taken = {
            "weight": dict(self.weight) if self.method.takes_weight else None,
            "multimodal_weight": self.multimodal_weight if self.method.takes_base else None,
            "density": self.density,
            "seed": self.seed if self.method.takes_seed else None,
            "keep_layers": self.keep_layers,
        }
        given = {name: value for name, value in taken.items() if value is not None}
        return {"method": self.method.name, **given}


def _weights(weight: Weight) -> Mapping[str, float]:
    if not isinstance(weight, Mapping):
        return {REST: _number(weight, "weight")}
    if not weight:
        raise ValueError("weight is an empty mapping; name a kind of module, such as {'attn': 0.7}")
    unknown = [kind for kind in weight if kind not in (*MODULE_KINDS, REST)]
    if unknown:
        raise ValueError(
            f"weight has a number for {unknown[0]!r}; expected {', '.join(MODULE_KINDS)}, or "
            f"{REST!r} for all that are not named"
        )
    return {kind: _number(value, f"weight[{kind!r}]") for kind, value in weight.items()}


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    return float(value)


def _density(density: float | None, method: Method) -> float | None:
    if not method.takes_density:
        return None
    if density is None:
        raise ValueError(
            f"{method.name} needs a density: the share of each task vector that is kept, such as "
            f"{method.density}"
        )
    value = _number(density, "density")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"density must be above 0 and at most 1, got {density!r}")
    return value


def _whole(value: object, what: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{what} must be a whole number from 0 to {most}, got {value!r}")
    return value


def _keep_layers(keep_layers: int | None, method: Method) -> int | None:
    if not method.takes_keep_layers:
        return None
    if keep_layers is None:
        raise ValueError(
            f"{method.name} needs keep_layers: how many of the first decoder layers stay the "
            "multimodal model's"
        )
    # Far more layers than any model has.
    return _whole(keep_layers, "keep_layers", most=10**6)
