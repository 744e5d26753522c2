"""What every stack is checked for, from records of what its optimizer was given.

Owns the float64 restatement of the first step, for whole weights and for factors of adapters, and
the comparison of runs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

import drift_fast
from support import reference

# ‖found − expected‖ / ‖expected‖ of any trained parameter.
TOLERANCE = 1e-5
# lora_alpha / r of the configurations.
SCALING = 2.0
_FACTOR = re.compile(r"\.lora_(A|B)\.(?:default\.)?weight$")


def same(whole: Path, other: Path, *, steps: int, start: int = 0) -> bool:
    """Whether two runs of `steps` steps had the same gradients and weights, from `start` on."""
    first, second = (json.loads((each / "steps.json").read_text()) for each in (whole, other))
    assert len(first) == steps, first
    return bool(first[start:] == second)


def parity(plain: Path, injected: Path, delta: Path, *, clip: float) -> float:
    """Return the largest error of the first gradient, which is that of a run without, injected.

    The adaptive coefficient is proportional to the gradient, so that one that was clipped stands
    for what it was before: the restatement is clipped to the same norm in the end.
    """
    gradients, found = (load_file(place / "gradients.safetensors") for place in (plain, injected))
    weights = load_file(injected / "weights.safetensors")
    assert gradients.keys() == found.keys()
    expected = {name: reference.exact(gradient) for name, gradient in gradients.items()}
    changes = {_place(name): reference.exact(change) for name, change in _opened(delta)}
    reached = set()
    for place, names in _weights_by_place(gradients).items():
        if place not in changes:
            continue
        reached.add(place)
        directions = _directions(names, changes[place], weights)
        g = np.concatenate([expected[name].ravel() for name in directions])
        d = np.concatenate([part.ravel() for part in directions.values()])
        c = reference.coefficient(g, d, alpha=1.0, scale="adaptive")
        for name, part in directions.items():
            expected[name] = expected[name] - c * part
    missed = [place for place in changes if place not in reached and place.endswith(".weight")]
    assert not missed, f"the optimizer got no gradient of {missed}"
    total = reference.norm(np.array([reference.norm(part) for part in expected.values()]))
    errors = {}
    for name, part in expected.items():
        error = reference.norm(reference.exact(found[name]) - part * (clip / total))
        errors[name] = error / (reference.norm(part) * clip / total or 1.0)
    changed = reference.norm(
        np.array([reference.norm(reference.exact(found[n] - gradients[n])) for n in found])
    )
    assert changed > 0.05 * clip, "nothing was injected"
    return max(errors.values())


def _opened(delta: Path) -> list[tuple[str, Any]]:
    return list(drift_fast.Delta.open(delta).items())


def _place(name: str) -> str:
    """Return a weight's name from its layer on, which a model on disk and in memory share."""
    return name[name.index("layers.") :].replace(".base_layer", "")


def _weights_by_place(gradients: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the parameters that each weight of the language model is made of, by A, B or whole."""
    found: dict[str, dict[str, str]] = {}
    for name in gradients:
        if "layers." not in name or "visual" in name:
            continue
        factor = _FACTOR.search(name)
        place = _place(_FACTOR.sub(".weight", name))
        found.setdefault(place, {})[factor[1] if factor else "whole"] = name
    return found


def _directions(names: dict[str, str], change: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Return Δ, or what ∂W/∂(A, B) makes of it for W = W₀ + s·B·A."""
    if "whole" in names:
        return {names["whole"]: change}
    a, b = (reference.exact(weights[names[kind]]) for kind in "AB")
    return {names["A"]: SCALING * b.T @ change, names["B"]: SCALING * change @ a.T}
