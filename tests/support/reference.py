"""An independent float64 restatement of gradient injection, for parity tests only.

Owns: the published equations and the per-micro-batch formulae of the public code, in NumPy
float64, and the bounds within which the library must agree with them. Does not own: anything the
library computes; it imports nothing from drift_fast.
Invariant: every formula returns a new array and rounds nothing further, so the only difference
between its result and the library's is the library's own arithmetic.

Sign: an optimizer steps along -g, so subtracting a positive multiple of the delta from the
gradient moves the weights towards the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

SCALES = ("absolute", "gradnorm", "adaptive")
# And the one that the public code does not have.
ALL_SCALES = (*SCALES, "project")

# The public code clamps every norm from below with this value before it divides or multiplies.
PUBLIC_FLOOR = 1e-12

FLOAT32_RELATIVE = 1e-6
# bfloat16 keeps 8 significant bits: one rounding is at most 2**-9 relative to the next power of
# two, so at most 2**-8 relative to the value.
BFLOAT16_RELATIVE = 2.0**-8


def exact(values: torch.Tensor | npt.ArrayLike) -> Array:
    """Widen a tensor of any dtype to float64 without rounding."""
    if isinstance(values, torch.Tensor):
        return values.detach().to("cpu", torch.float64, copy=True).numpy()
    return np.array(values, dtype=np.float64)


def norm(values: Array) -> float:
    """Frobenius norm, rescaled by the largest entry so that no square over- or underflows."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest == 0.0:
        return 0.0
    return largest * float(np.sqrt(np.sum(np.square(values / largest))))


def cosine(first: Array, second: Array) -> float:
    """Cosine of the angle between two tensors; 0 where either has no direction."""
    first_norm, second_norm = norm(first), norm(second)
    if first_norm == 0.0 or second_norm == 0.0:
        return 0.0
    value = float(np.sum((first / first_norm) * (second / second_norm)))
    return min(1.0, max(-1.0, value))


def coefficient(
    gradient: Any,
    delta: Any,
    *,
    alpha: float,
    scale: str,
    weight: Any | None = None,
) -> float:
    """Return c in g' = g - c * delta.

    weight: given only where the absolute scale first stretches the delta to the parameter's norm.
    A zero delta has no direction and a zero gradient no length: both give a zero push.
    """
    g, d = exact(gradient), exact(delta)
    length = norm(d)
    if length == 0.0:
        return 0.0
    if scale == "absolute":
        return alpha if weight is None else alpha * norm(exact(weight)) / length
    if scale == "gradnorm":
        return alpha * norm(g) / length
    if scale == "adaptive":
        return alpha * (1.0 + cosine(g, d)) / 2.0 * norm(g) / length
    if scale == "project":
        return alpha * max(cosine(g, d), 0.0) * norm(g) / length
    raise ValueError(f"no such scale: {scale}")


def inject(
    gradient: Any,
    delta: Any,
    *,
    alpha: float,
    scale: str,
    weight: Any | None = None,
) -> Array:
    """Return the injected gradient g' as float64."""
    c = coefficient(gradient, delta, alpha=alpha, scale=scale, weight=weight)
    return exact(gradient) - c * exact(delta)


def public_inject(
    gradient: Any,
    delta: Any,
    *,
    alpha: float,
    scale: str,
    weight: Any | None = None,
) -> Array:
    """Return what the public code makes of the gradient of one micro-batch, as float64.

    It works on each backward pass's own gradient. weight, where given, is the parameter at
    attachment: the delta is stretched to its norm beforehand, which only the absolute scale
    notices. Norms are clamped from below by PUBLIC_FLOOR, the cosine to [-1, 1].
    """
    g, d = exact(gradient), exact(delta)
    if weight is not None:
        d = d * (max(norm(exact(weight)), PUBLIC_FLOOR) / max(norm(d), PUBLIC_FLOOR))
    if scale == "absolute":
        return g - alpha * d
    g_norm, d_norm = max(norm(g), PUBLIC_FLOOR), max(norm(d), PUBLIC_FLOOR)
    direction = d / d_norm
    if scale == "gradnorm":
        return g - alpha * g_norm * direction
    if scale == "adaptive":
        angle = min(1.0, max(-1.0, float(np.sum((g / g_norm) * direction))))
        return g - alpha * 0.5 * (angle + 1.0) * g_norm * direction
    raise ValueError(f"no such scale: {scale}")


def progress(
    now: Mapping[str, Any], start: Mapping[str, Any], deltas: Mapping[str, Any]
) -> tuple[float, dict[str, float]]:
    """Return lambda = <now - start, delta> / |delta|^2, overall and per parameter."""
    along: dict[str, float] = {}
    squares: dict[str, float] = {}
    for name, delta in deltas.items():
        d = exact(delta)
        along[name] = float(np.sum((exact(now[name]) - exact(start[name])) * d))
        squares[name] = float(np.sum(np.square(d)))
    each = {name: along[name] / squares[name] for name in along if squares[name] > 0.0}
    return sum(along.values()) / sum(squares.values()), each


def clip(gradients: Mapping[str, Any], maximum: float) -> tuple[float, dict[str, Array]]:
    """Return the total norm and the gradients scaled down to it, as torch's norm clipping does."""
    arrays = {name: exact(gradient) for name, gradient in gradients.items()}
    total = norm(np.array([norm(array) for array in arrays.values()]))
    factor = min(1.0, maximum / (total + 1e-6))
    return total, {name: array * factor for name, array in arrays.items()}


def assert_follows_reference(
    found: torch.Tensor,
    gradient: torch.Tensor,
    delta: torch.Tensor,
    *,
    alpha: float,
    scale: str,
    label: str = "",
    **weight: Any,
) -> None:
    """Compare element by element, against the sizes of the two terms of the subtraction.

    The adaptive coefficient is a difference of like numbers when the gradient opposes the delta,
    so its rounding is measured against the full push it is a share of.
    """
    expected = inject(gradient, delta, alpha=alpha, scale=scale, **weight)
    g, d = np.abs(exact(gradient)), np.abs(exact(delta))
    full = "gradnorm" if scale in ("adaptive", "project") else scale
    largest_push = coefficient(gradient, delta, alpha=abs(alpha), scale=full, **weight)
    error = np.abs(exact(found) - expected)
    if found.dtype is torch.bfloat16:
        # The delta's multiple may be rounded once before it is subtracted; the result is, always.
        c = abs(coefficient(gradient, delta, alpha=alpha, scale=scale, **weight))
        allowed = 1.01 * BFLOAT16_RELATIVE * (np.abs(expected) + c * d)
        allowed += FLOAT32_RELATIVE * largest_push * d
    else:
        allowed = FLOAT32_RELATIVE * (g + largest_push * d)
    worst = float(np.max(error - allowed, initial=-1.0))
    assert worst <= 1e-38, f"{label} {scale}: beyond the bound by {worst:.3e}"
