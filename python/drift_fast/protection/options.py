"""The options of `protect`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from drift_fast.delta.options import OutputOptions, ProgressOptions
from drift_fast.dtypes import DTYPES
from drift_fast.inject.config import TargetOptions
from drift_fast.options import option

Place = Literal["auto", "device", "host"]


def _check_directions(directions: Any) -> None:
    if isinstance(directions, bool) or not isinstance(directions, int) or directions < 1:
        raise ValueError(
            f"directions must be a whole number of at least 1, got {directions!r}: it is how many "
            "gradients are removed from each tensor"
        )


@dataclass(frozen=True, kw_only=True)
class ProtectOptions(TargetOptions, OutputOptions, ProgressOptions):
    """The options of `protect`."""

    directions: int = option(
        3,
        "how many gradients are removed from each tensor: the batches are dealt out to so many "
        "sums in turn",
        check=_check_directions,
    )
    gradients: Place = option(
        "auto",
        "where those sums are: device (beside the weights), host (in host memory), or auto (the "
        "first of them that has room)",
        choices=get_args(Place),
    )
    dtype: str | None = option(
        None, "dtype of the result; None is what the tensors of Δ come out as", choices=DTYPES
    )
