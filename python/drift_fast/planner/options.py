"""The options of `plan`: a training run, the GPU, and how large Δ is."""

from __future__ import annotations

from dataclasses import dataclass

from drift_fast.checkpoints.opened import PathLike
from drift_fast.options import option
from drift_fast.planner import rates
from drift_fast.planner.training import Training
from drift_fast.sizes import parse_size


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Training):
    """The options of `plan`."""

    delta: PathLike | None = option(
        None,
        "directory, Hub id or URL of a delta; λ is predicted from its statistics",
        metavar="DIR",
    )
    rms: float | None = option(
        None, "root mean square of the elements of Δ, instead of a delta", metavar="X"
    )
    gpu_memory: int | str | None = option(
        None,
        "memory of one GPU, such as 80GB",
        check=lambda value: value is None or _gpu_nbytes(value),
        metavar="SIZE",
    )
    utilization: float | None = option(
        None,
        "share of its peak that a GPU reaches; by default as measured on an H100",
        metavar="SHARE",
    )
    peak: float = option(
        rates.H100_FLOPS,
        "operations of one GPU per second; by default those of an H100 in bfloat16",
        in_file=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.speed.share
        if not 0 < share <= 1 or not 0 < self.peak < float("inf"):
            raise ValueError(
                f"utilization must be in (0, 1] and peak positive, got {share}, {self.peak}"
            )

    @property
    def speed(self) -> rates.Speed:
        """How fast one GPU computes."""
        if self.utilization is None:
            return rates.Speed(self.peak, *rates.utilization(lora=self.lora_rank > 0))
        return rates.Speed(self.peak, self.utilization, "given")

    @property
    def gpu_nbytes(self) -> int | None:
        """Memory of one GPU."""
        return None if self.gpu_memory is None else _gpu_nbytes(self.gpu_memory)


def _gpu_nbytes(size: int | str) -> int:
    """Return bytes; a small number without a unit is meant in another one.

    Raises:
        ValueError: not a size, or a number below a million.
    """
    nbytes = parse_size(size)
    if nbytes < 10**6 and not str(size).strip()[-1].isalpha():
        raise ValueError(f"{size!r} is {nbytes} bytes; write a unit, such as {nbytes}GB")
    return nbytes
