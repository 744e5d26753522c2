"""Numbers stated for α and λ, one or by module or by layer, resolved for every target.

Names alone decide, in the vocabulary of `drift_fast.names`. An entry that decides nothing is
refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

from drift_fast.inject.strength.formula import check_alpha
from drift_fast.names import layer_of
from drift_fast.selection import Selection

PerModule: TypeAlias = float | Mapping[str, float]
LayerAlpha: TypeAlias = (
    Mapping[int | str | None, float] | Iterable[float] | Callable[[int | None], float] | None
)


def per_target(
    names: Sequence[str], given: PerModule, what: str, *, infinite: bool = False
) -> tuple[list[float], list[str]]:
    """Return a number for each name, and the entry that it comes from ("" for one number).

    If several entries match, the most specific one decides: `re:…`, then a preset, then `all`; of
    several patterns, the first.

    Raises:
        ValueError: a name that no entry matches, an entry that decides none, an unknown preset, or
            a value that is not a (finite) number.
    """
    if not isinstance(given, Mapping):
        # `alpha` has had its own message from the start.
        value = check_alpha(given) if what == "alpha" else number(given, what, infinite=infinite)
        return [value] * len(names), [""] * len(names)
    if not given:
        raise ValueError(f"{what} is empty; give a number, or one for each module")
    for entry in given:
        if not isinstance(entry, str):
            raise ValueError(f"a module of {what} must be a preset or re:…, got {entry!r}")
    values = {
        entry: number(value, f"{what}[{entry!r}]", infinite=infinite)
        for entry, value in given.items()
    }
    selections = {entry: Selection.parse(entry, None) for entry in values}
    # Sorting keeps the order of entries that are equally specific.
    ordered = sorted(values, key=lambda entry: _generality(selections[entry]))
    chosen = [
        next((entry for entry in ordered if name in selections[entry]), None) for name in names
    ]
    absent = [name for name, entry in zip(names, chosen, strict=True) if entry is None]
    if absent:
        raise ValueError(
            f"{what} has no entry for {len(absent)} of {len(names)} targets, {absent[0]} first: "
            "add one, such as 'all', or leave these targets out with modules=…"
        )
    entries = [entry for entry in chosen if entry is not None]
    idle = [entry for entry in values if entry not in set(entries)]
    if idle:
        raise ValueError(
            f"{what}[{idle[0]!r}] decides no target: none matches it, or more specific entries "
            "match first (re:… before a preset before all); remove it"
        )
    return [values[entry] for entry in entries], entries


def _generality(selection: Selection) -> int:
    if any(module.startswith("re:") for module in selection.modules):
        return 0
    return 2 if "all" in selection.modules else 1


def layer_factors(names: Sequence[str], given: LayerAlpha) -> list[float]:
    """Return the depth mask's factor for each name."""
    if given is None:
        return [1.0] * len(names)
    layers = [layer_of(name) for name in names]
    present = sorted({layer for layer in layers if layer is not None})
    if callable(given):
        of_layer = {layer: _mask(layer, given(layer)) for layer in dict.fromkeys(layers)}
        return [of_layer[layer] for layer in layers]
    if isinstance(given, Mapping):
        factors = _mapped_layers(given)
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes):
        factors = {layer: _mask(layer, value) for layer, value in enumerate(given)}
    else:
        raise ValueError(
            "layer_alpha must be a mapping of layer to factor, a sequence of factors, or a "
            f"function of the layer, got {given!r}"
        )
    named = {layer for layer in factors if layer is not None}
    unnamed = [layer for layer in present if layer not in named]
    unknown = sorted(named - set(present))
    if unnamed or unknown:
        which = (
            f"has no entry for layer {unnamed[0]}"
            if unnamed
            else f"has a layer {unknown[0]} too many"
        )
        raise ValueError(
            f"layer_alpha {which}: the {len(present)} layers of the targets are "
            f"{min(present, default=0)} to {max(present, default=0)}; give one factor for each"
        )
    return [factors.get(layer, 1.0) for layer in layers]


def _mapped_layers(given: Mapping[int | str | None, float]) -> dict[int | None, float]:
    factors: dict[int | None, float] = {}
    for key, value in given.items():
        if key is None:
            layers: Iterable[int | None] = [None]
        else:
            spans = Selection.parse("all", key).layers or ()
            if sum(len(span) for span in spans) > 10**6:
                raise ValueError(f"layer_alpha[{key!r}] names more layers than any model has")
            layers = (layer for span in spans for layer in span)
        for layer in layers:
            if layer in factors:
                raise ValueError(f"layer_alpha names layer {layer} twice")
            factors[layer] = _mask(layer, value)
    return factors


def _mask(layer: int | None, value: Any) -> float:
    return number(value, f"layer_alpha of layer {layer}")


def number(value: Any, what: str, *, least: float = -math.inf, infinite: bool = False) -> float:
    """Return a number that a user gave, or refuse it."""
    given = isinstance(value, Real) and not isinstance(value, bool)
    result = float(value) if given else math.nan
    if math.isnan(result) or (math.isinf(result) and not infinite) or result < least:
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{what} must be a finite number{bound}, got {value!r}")
    return result


def positive(value: Any, what: str) -> float:
    """Return a number that a user gave and that must be above zero."""
    result = number(value, what)
    if result <= 0:
        raise ValueError(f"{what} must be above 0, got {value!r}")
    return result


def plain(given: PerModule | None) -> Any:
    """Return what JSON can hold; it has no infinity."""
    if isinstance(given, Mapping):
        return {entry: plain(value) for entry, value in given.items()}
    return given if given is None else float(given) if math.isfinite(given) else str(given)
