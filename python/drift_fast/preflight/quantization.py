"""Whether a model is stored as quantized codes, and what that means for Δ."""

from __future__ import annotations

from collections.abc import Sequence

from drift_fast.alignment.beside import unquantized_name
from drift_fast.preflight.fact import Fact
from drift_fast.preflight.findings import DescribedSide
from drift_fast.preflight.meanings import Severity


def judge_quantization(
    judged: Sequence[tuple[DescribedSide, Fact]], *, attaches: bool
) -> tuple[Severity, str]:
    """Return how severe the quantization of the sides is, and what it means.

    8-bit floats under block scales can be subtracted, but not trained along Δ (`attaches`).
    """
    scaled, quantized = [], []
    for side, fact in judged:
        if not attaches and _is_block_scaled(side):
            scaled.append(f"{side.model.the} ({fact.value})")
        elif fact.value is not None:
            quantized.append(
                f"{side.model.the} ({fact.value}) is quantized: name its unquantized checkpoint"
                + unquantized_name(side.model.opened.source)
            )
    if quantized:
        use = "trained along Δ" if attaches else "subtracted"
        return (
            "breaks",
            f"{', and '.join(quantized)}, since codes of quantized weights cannot be {use}",
        )
    if scaled:
        verb = "is" if len(scaled) == 1 else "are"
        return "note", (
            f"{' and '.join(scaled)} {verb} stored as 8-bit floats under block scales: Δ is taken "
            "at the values that the model computes with and carries their rounding, which can be "
            "as large as what training changed; take the BF16 checkpoint if there is one"
        )
    return "same", ""


def _is_block_scaled(side: DescribedSide) -> bool:
    """Whether all that is packed are 8-bit floats whose block scales are there and fit."""
    packed = side.headers.packed
    return (
        bool(packed)
        and all(dtype in ("F8_E4M3", "F8_E5M2") for dtype in packed)
        and not side.model.opened.unscaled
    )
