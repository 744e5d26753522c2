"""The targets of one device, with their Δ and where their weights stood at attachment.

Owns what is resident. A group's vectors are all of shape [targets], in the order of `targets`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from drift_fast.errors import DriftError, NonFiniteError
from drift_fast.inject.backend import (
    CpuBackend,
    DeviceBackend,
    Measured,
    make_backend,
    norm_of,
)
from drift_fast.inject.targets import DeltaLike, Recent, Target


class Group:
    """Targets on one device; `last` is what the last injection measured and subtracted."""

    def __init__(self, targets: Sequence[Target], backend: CpuBackend | DeviceBackend) -> None:
        self.targets = list(targets)
        self.backend = backend
        self.device = backend.deltas[0].device
        self.last: tuple[Group, Measured, Any] | None = None
        self._origin: Any = None
        self._factor: Any = None

    def start(self, *, rescale: bool) -> None:
        """Note ⟨θ_0, Δ⟩ and, if asked, ‖W‖/‖Δ‖."""
        sums = self._weights()
        self._origin = sums.dot
        if rescale:
            self._factor = self.backend.vector(sums.norm.tolist()) / self.backend.norms
        else:
            self._factor = self.backend.vector([1.0] * len(self.targets))

    def part(self, members: Sequence[int]) -> Group:
        """Return some of the targets as a group of their own; Δ is shared, not copied."""
        part = Group([self.targets[at] for at in members], self.backend.part(members))
        part._origin = self.backend.pick(self._origin, members)
        part._factor = self.backend.pick(self._factor, members)
        return part

    def release(self) -> None:
        """Let go of Δ now; `last` may refer back to this group, which would keep it for a while."""
        self.last = None
        self.backend.deltas.clear()

    def factor(self, loss_scale: torch.Tensor | None) -> Any:
        """Return what multiplies α in absolute mode."""
        if loss_scale is None:
            return self._factor
        on_cpu = isinstance(self.backend, CpuBackend)
        return self._factor * (loss_scale.item() if on_cpu else loss_scale)

    def squares(self) -> list[float]:
        """Return ‖Δ‖² of each target."""
        return [norm * norm for norm in self.backend.norms.tolist()]

    def progress(self) -> list[float]:
        """Return λ of each target."""
        moved = (self._weights().dot - self._origin).tolist()
        norms = self.backend.norms.tolist()
        return [value / norm / norm for value, norm in zip(moved, norms, strict=True)]

    def cosines(self) -> list[tuple[str, float]]:
        """Return cos(g, Δ) of the last injection, by parameter; zero gradients have none."""
        if self.last is None:
            return []
        part, sums, _ = self.last
        norms = part.backend.norms.tolist()
        rows = zip(part.targets, sums.norm.tolist(), sums.dot.tolist(), norms, strict=True)
        return [
            (t.name, dot / norm / delta)
            for t, norm, dot, delta in rows
            if norm > 0 and math.isfinite(norm + dot)
        ]

    def push(self) -> tuple[float, float]:
        """Return Σ‖c·Δ‖² and Σ‖g‖² of the last injection, over finite gradients."""
        if self.last is None:
            return 0.0, 0.0
        part, sums, c = self.last
        norms = part.backend.norms.tolist()
        rows = list(zip(sums.norm.tolist(), c.tolist(), norms, strict=True))
        finite = [row for row in rows if math.isfinite(row[0])]
        return sum((c * d) ** 2 for _, c, d in finite), sum(norm**2 for norm, _, _ in finite)

    def _weights(self) -> Measured:
        # Progress is a small difference of two large sums, hence float64.
        weights = [target.parameter.detach() for target in self.targets]
        return self.backend.measure(weights, float64=True)


def load_groups(targets: Sequence[Target], delta: DeltaLike) -> list[Group]:
    """Read Δ beside each parameter, one tensor at a time; a Δ that is zero needs no injection.

    Its norm is taken once, here, of the values that will be injected. The delta's statistics know
    the norm before rounding, which for a bias of a few elements differs in the third digit; and a
    delta that streams would have to read both checkpoints once more for them.

    Raises:
        NonFiniteError: Δ holds NaN or infinity.
        DriftError: Δ is zero in every target, or a float64 parameter on an accelerator.
    """
    by_device: dict[torch.device, list[tuple[Target, torch.Tensor, float]]] = {}
    recent = Recent(delta)
    for target in targets:
        tensor = target.read(recent)
        norm = norm_of(tensor)
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"{target.delta_name}: Δ holds NaN or infinite values, which would spread to every "
                "weight; repair the source checkpoint or leave the tensor out with modules=… or "
                "layers=…"
            )
        if norm == 0.0:
            continue
        device = target.parameter.device
        if device.type != "cpu" and target.parameter.dtype == torch.float64:
            raise DriftError(
                f"{target.name} is float64 on {device}, where norms are taken in float32; train in "
                "float32 or bfloat16, or on the CPU"
            )
        by_device.setdefault(device, []).append((target, tensor.to(device), norm))
    if not by_device:
        raise DriftError(
            "Δ is zero in every target, so an injection would do nothing; was the delta computed "
            "from the same checkpoint twice?"
        )
    groups = []
    for members in by_device.values():
        backend = make_backend([d for _, d, _ in members], [norm for _, _, norm in members])
        groups.append(Group([target for target, _, _ in members], backend))
    return groups
