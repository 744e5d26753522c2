"""The scope "microbatch": a hook injects into the gradient of every backward pass.

Owns also the refusal of gradients that arrive in parts within one pass, each of which would be
injected: tiled layers, as Liger's and DeepSpeed's, run one backward pass for each tile inside
that of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from drift_fast.errors import DriftError
from drift_fast.inject.compute.vectors import plain_arithmetic
from drift_fast.inject.pushes import Pushes
from drift_fast.inject.scope import Scope
from drift_fast.inject.step_records import Push
from drift_fast.inject.target_group import TargetGroup
from drift_fast.inject.watchdog import Watchdog


class MicrobatchScope(Scope):
    """Changes gradients inside backward, as the method's public code does."""

    def __init__(self, groups: Sequence[TargetGroup], pushes: Pushes, watchdog: Watchdog) -> None:
        super().__init__(groups, pushes, watchdog)
        # One step's pushes serve all of its backward passes.
        self._current: list[Push] | None = None
        self._stepped = False
        # By name, the backward pass (torch: graph task) in which a target was last injected.
        self._passes: dict[str, int] = {}
        for group in groups:
            for at, target in enumerate(group.targets):
                hook = self._hook(group, at)
                self.handles.append(torch.Tensor.register_hook(target.parameter, hook))  # type: ignore[no-untyped-call]

    def step(self) -> None:
        raise DriftError(
            'scope="microbatch" injects inside backward; do not call step(), or attach with '
            'scope="step"'
        )

    def before_use(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.watchdog.check(optimizer):
            return
        # Several optimizers may step after one backward pass, which is one step.
        if not self._stepped:
            self.pushes.finish()
            self._current = None
        self._stepped = True

    def restate(self) -> None:
        self._current = None

    def close(self) -> None:
        self._current = None

    def _hook(self, group: TargetGroup, at: int) -> Callable[[torch.Tensor], torch.Tensor | None]:
        which = list(self.groups).index(group)
        parameter, name = group.targets[at].parameter, group.targets[at].name

        @torch.no_grad()
        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            self._stepped = False
            current = torch._C._current_graph_task_id()
            # Between two passes that are checkpoints of one layer, that of the model began.
            if self._passes.get(name) == current - 1 and _runs_inside_another():
                raise DriftError(
                    f"the gradient of {name} comes in parts within one backward pass, as tiled "
                    'layers give it, and scope="microbatch" would inject into each: attach with '
                    'scope="step"'
                )
            self._passes[name] = current
            if self._current is None:
                self._current = self.pushes.begin()
            if not self._current:
                self.watchdog.note([parameter])
                return None
            with plain_arithmetic(group.device):
                # Autograd may share this tensor with other consumers, so it is not changed.
                injected = gradient.clone(memory_format=torch.contiguous_format)
                skipped = group.inject_one(at, injected, self._current[which])
            self.watchdog.note([parameter], skipped)
            return injected

        return hook


def _runs_inside_another() -> bool:
    """Whether this backward pass was started by the backward of a custom autograd function."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is _BACKWARD:
            return True
    return False


# What autograd calls for a torch.autograd.Function in Python.
_BACKWARD = torch.autograd.function.BackwardCFunction.apply.__code__
