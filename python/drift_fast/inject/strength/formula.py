"""The one formula: from three numbers per parameter to one coefficient, g' = g − c·Δ.

Sign convention, stated here and used everywhere: Δ = W_reason − W_multimodal, and an optimizer
steps along −g', so α > 0 moves W towards the reasoning model. The paper (arXiv 2510.15050) writes
g + α·… with α = −1, which is the same.

    absolute   c = α                              optionally · ‖W‖/‖Δ‖, as the public code does
    gradnorm   c = α · ‖g‖/‖Δ‖
    adaptive   c = α · (1 + cos(g, Δ))/2 · ‖g‖/‖Δ‖
    project    c = α · max(⟨g, Δ⟩, 0)/‖Δ‖²        only where the task pulls away from the expert;
                                                  α = 1 takes that part of the gradient away

With gd = ⟨g, Δ⟩, adaptive is α · (‖g‖ + gd/‖Δ‖) / (2‖Δ‖), which has no division by ‖g‖ and so
needs no special case for a gradient that is zero. Norms rather than their squares are passed
around, since a square leaves float32 where its root does not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

Scale = Literal["absolute", "gradnorm", "adaptive", "project"]
SCALES: tuple[str, ...] = get_args(Scale)
# These ask for the angle between gradient and Δ, two more passes over memory.
NEED_DOT = ("adaptive", "project")
# A target λ multiplies α by a factor between these: it never reverses, and does not drown the
# task's gradient if the target is out of reach.
LEAST, MOST = 0.0, 4.0


def check_alpha(alpha: float) -> float:
    """Return `alpha` as a float.

    Raises:
        ValueError: α is not a finite number.
    """
    try:
        value = float(alpha)
    except (TypeError, ValueError) as error:
        raise ValueError(f"alpha must be a number, got {alpha!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"alpha must be finite, got {alpha!r}")
    return value


def coefficients(
    scale: Scale,
    alpha: torch.Tensor,
    norm: torch.Tensor,
    dot: torch.Tensor,
    delta: torch.Tensor,
    factor: torch.Tensor,
) -> torch.Tensor:
    """Return c for every parameter, before anything is skipped.

    All are vectors of shape [parameters], float64 on the CPU and float32 on an accelerator, which
    they do not leave: `alpha` is α, `norm` is ‖g‖, `dot` is ⟨g, Δ⟩, and `delta` is ‖Δ‖, which is
    positive, since parameters whose Δ is zero are not injected. `factor` multiplies α in absolute
    mode only, where ‖W‖/‖Δ‖ and a gradient scaler's scale enter; the other modes are free of scale.
    """
    if scale == "absolute":
        return alpha * factor
    if scale == "gradnorm":
        return alpha * (norm / delta)
    if scale == "project":
        return alpha * ((dot / delta).clamp(min=0.0) / delta)
    return alpha * ((norm + dot / delta) / (2.0 * delta))
