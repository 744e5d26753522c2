"""The weights of one target group, moved along Δ step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from drift_fast.inject.compute.base import flattened
from drift_fast.inject.compute.vectors import plain_arithmetic
from drift_fast.inject.motion.rounding import Thresholds, add_narrow, is_narrow
from drift_fast.inject.target import Target
from drift_fast.inject.target_group import TargetGroup


class MovedGroup:
    """A target group, and λ of each of its targets at the end of the motion."""

    def __init__(
        self, group: TargetGroup, progress: Sequence[float], thresholds: Thresholds
    ) -> None:
        self.group = group
        self.progress = list(progress)
        self._factors = group.vector(progress)
        self._thresholds = thresholds
        group.start(rescale=False)
        # On the host: a state may be asked for at every step.
        self._origin = group.origin
        if any(is_narrow(shard.weight().dtype) for shard in group.shards):
            thresholds.prepare(group.device)

    @property
    def origin(self) -> dict[str, float]:
        """⟨θ_0, Δ⟩ by target."""
        names = [target.name for target in self.group.targets]
        return dict(zip(names, self._origin, strict=True))

    @origin.setter
    def origin(self, values: dict[str, float]) -> None:
        self._origin = [values[target.name] for target in self.group.targets]
        self.group.origin = self._origin

    def targets(self) -> Iterator[tuple[Target, float, float]]:
        """Yield each target with its λ at the end and its ‖Δ‖²."""
        yield from zip(self.group.targets, self.progress, self.group.squares(), strict=True)

    def move(self, before: float, after: float) -> None:
        """Move every weight from the share `before` of its motion to the share `after`."""
        with plain_arithmetic(self.group.device):
            for start, stop, deltas in self.group.store.batches():
                weights = [self.group.shards[at].weight() for at in range(start, stop)]
                with flattened(weights) as flats:
                    self._move_wide(start, flats, deltas, after - before)
                    self._move_narrow(start, flats, deltas, (before, after))
                for at, weight in enumerate(weights, start):
                    self.group.shards[at].write_weight(weight)

    def _move_wide(
        self,
        start: int,
        flats: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        share: float,
    ) -> None:
        """Move float32 weights of the targets from `start` on, by plain addition."""
        wide = [at for at, flat in enumerate(flats) if not is_narrow(flat.dtype)]
        if not wide:
            return
        factors = self._factors[start : start + len(flats)]
        if len(wide) < len(flats):
            # A list as index would be copied to the device.
            factors = torch.stack([factors[at] for at in wide])
        self.group.arithmetic.subtract(
            [flats[at] for at in wide], [deltas[at] for at in wide], factors * -share
        )

    def _move_narrow(
        self,
        start: int,
        flats: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        shares: tuple[float, float],
    ) -> None:
        """Move 16-bit weights of the targets from `start` on, losing nothing on average."""
        before, after = shares
        for at, (flat, delta) in enumerate(zip(flats, deltas, strict=True), start):
            if is_narrow(flat.dtype):
                span, value = self.group.shards[at].span, self.progress[at]
                first = 0 if span is None else span[0]
                runs = self._thresholds.runs(self.group.targets[at].delta_name, first, flat)
                add_narrow(flat, delta, value * before, value * after, runs)
