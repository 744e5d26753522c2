"""The options of `check`."""

from __future__ import annotations

from dataclasses import dataclass

from drift_fast.alignment.options import SelectionOptions
from drift_fast.checkpoints.opened import PathLike
from drift_fast.dtypes import STORED_DTYPES, check_stored_dtype
from drift_fast.options import option
from drift_fast.sizes import parse_size


def parse_rate(given: int | str) -> int:
    """Return bytes a second from a number or from text such as "500MB" or "1GB/s".

    Raises:
        ValueError: neither, or not positive.
    """
    try:
        return parse_size(str(given).removesuffix("/s"))
    except ValueError as error:
        raise ValueError(
            f"a rate must be bytes a second such as 500000000, '500MB' or '1GB', got {given!r}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class CheckOptions(SelectionOptions):
    """The options of `check`."""

    base: PathLike | None = option(
        None,
        "the text model that both may come from: compare samples of the weights of all three, and "
        "say which Δ to take, reasoning − base or reasoning − multimodal",
        metavar="BASE",
    )
    dtype: str = option(
        "bfloat16",
        "dtype that Δ would be stored as",
        choices=STORED_DTYPES,
        check=check_stored_dtype,
    )
    read_rate: int | str = option(
        "1GB",
        "bytes read and written in a second, to estimate the time",
        check=parse_rate,
        metavar="SIZE",
    )
