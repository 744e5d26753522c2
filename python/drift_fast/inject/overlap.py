"""Inject while backward still runs: bucket after bucket, as soon as its gradients are final.

Owns the hooks and the side stream, not the arithmetic. Buckets are injected in the order in which
backward finishes them; the step does the rest. For low-rank factors Δ̃ is computed beside backward,
which needs no gradient, and the step injects it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import nn

from drift_fast.errors import DriftError
from drift_fast.inject.compute.base import SMALL
from drift_fast.inject.compute.device import DeviceArithmetic
from drift_fast.inject.compute.streams import new_stream
from drift_fast.inject.compute.vectors import plain_arithmetic
from drift_fast.inject.lora.group import FactorGroup
from drift_fast.inject.pushes import Pushes
from drift_fast.inject.step_records import Push
from drift_fast.inject.target_group import TargetGroup

# Kernels of an injection are short and wait for each other, those of backward are long: behind them
# each would wait its turn.
_PRIORITY = -1
_STREAMS = 1
# What is noted of a gradient: the step in which a hook was called with it.
_MARK = "_drift_fast_ready"
_serials = itertools.count()


class Overlap:
    """Hooks on the targets of groups, and what they launch."""

    def __init__(self, groups: Sequence[TargetGroup], pushes: Pushes) -> None:
        self._groups = list(groups)
        self._all_pushes = pushes
        self._pushes: list[Push] | None = None
        # Each device's gradients come from a thread of their own.
        self._beginning = threading.Lock()
        self._paused = False
        self._lanes = [
            new_stream(group.device, _PRIORITY) if group.device.type == "cuda" else None
            for group in self._groups
        ]
        self._arithmetics = [
            DeviceArithmetic(group.device, streams=_STREAMS, priority=_PRIORITY)
            if group.device.type == "cuda"
            else group.arithmetic
            for group in self._groups
        ]
        # Launching takes the host as long as the kernels take the device. In a hook it would delay
        # backward's own launches.
        cuda = any(lane is not None for lane in self._lanes)
        self._launcher = ThreadPoolExecutor(1, "drift-fast-overlap") if cuda else None
        self._launched: list[Future[None]] = []
        self._kept: list[torch.Tensor] = []
        self.handles: list[Any] = []
        self.reset()
        for which, group in enumerate(self._groups):
            if isinstance(group, FactorGroup):
                first: Any = group.targets[0].trained[0]
                ahead = self._hook_ahead(which, group)
                self.handles.append(first.register_post_accumulate_grad_hook(ahead))
                continue
            for bucket, (start, stop) in enumerate(group.store.buckets):
                # Small tensors cost more to launch than to inject; the step does them together.
                if all(t.parameter.numel() <= SMALL for t in group.targets[start:stop]):
                    continue
                for at in range(start, stop):
                    hook = self._hook(which, bucket, at)
                    parameter: Any = group.targets[at].parameter
                    self.handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def close(self) -> None:
        """End the launching thread, and make the device wait for what it launched."""
        if self._launcher is not None:
            self._launcher.shutdown(cancel_futures=True)
        self.let_go()
        for lane in self._lanes:
            if lane is not None:
                # What was allocated on a lane is freed for its use while others may still read it.
                lane.wait_stream(torch.cuda.current_stream(lane.device))

    def settle(self) -> None:
        """Wait until what backward began is launched; `join` raises what went wrong."""
        wait(self._launched)

    def let_go(self) -> None:
        """Make the current streams wait for what was launched, and release its gradients."""
        for lane in self._lanes:
            if lane is not None:
                torch.cuda.current_stream(lane.device).wait_stream(lane)
        self._kept.clear()

    def reset(self) -> None:
        """Start over; the next backward pass is the first of a step."""
        self._wait()
        self.let_go()
        for group in self._groups:
            # What a step that was given up was about to capture.
            group.finish()
        self._pushes = None
        self._next = [0] * len(self._groups)
        # Targets whose gradient is final, and those that were injected. After a step that was given
        # up, a parameter has another gradient, without this step's mark.
        self._serial = next(_serials)
        self._ready: list[set[int]] = [set() for _ in self._groups]
        self._injected: list[set[int]] = [set() for _ in self._groups]
        self._latest: tuple[int, int] | None = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore backward passes, whose gradients are not final yet."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @torch.no_grad()
    def finish(self, which: int, push: Push) -> None:
        """Inject the buckets that backward did not, on the stream of the caller."""
        group, lane = self._groups[which], self._lanes[which]
        if lane is not None:
            torch.cuda.current_stream(group.device).wait_stream(lane)
        if isinstance(group, FactorGroup):
            group.inject(push)
            return
        for bucket in range(self._next[which], len(group.store.buckets)):
            group.inject_bucket(bucket, push)

    def join(self) -> list[Push] | None:
        """Wait until every bucket that backward made ready is launched; return this step's pushes.

        They are None if no bucket was.

        Raises:
            The error of a launch.
            DriftError: gradients are not those that were injected.
        """
        try:
            self._wait()
        except BaseException:
            self.reset()
            raise
        if self._latest is not None and self._is_given_up():
            target = self._groups[self._latest[0]].targets[self._latest[1]]
            self.reset()
            if target.parameter.grad is not None:
                raise DriftError(
                    f"the gradient of {target.name} is not the one that was injected inside "
                    "backward: with overlap=True the last backward pass before step() runs outside "
                    "injection.accumulating(), and gradients are changed in place after it"
                )
        return self._pushes

    def _wait(self) -> None:
        launched, self._launched = self._launched, []
        wait(launched)
        for one in launched:
            one.result()

    def _is_given_up(self) -> bool:
        """Whether the injected gradients belong to a step that was not completed."""
        return self._latest is not None and not self._is_final(*self._latest)

    def _is_final(self, which: int, at: int) -> bool:
        """Whether a parameter's gradient is the one that its hook was called with."""
        gradient = self._groups[which].targets[at].parameter.grad
        return at in self._ready[which] and getattr(gradient, _MARK, None) == self._serial

    def _hook(self, which: int, bucket: int, at: int) -> Callable[[nn.Parameter], None]:
        @torch.no_grad()
        def hook(parameter: nn.Parameter) -> None:
            if self._paused:
                return
            if self._is_given_up():
                self.reset()
            if at in self._injected[which]:
                raise DriftError(
                    f"the gradient of {self._groups[which].targets[at].name} was added to after it "
                    "was injected: with overlap=True run all backward passes but the last before "
                    "step() inside injection.accumulating(), and clear gradients with "
                    "zero_grad(set_to_none=True)"
                )
            setattr(parameter.grad, _MARK, self._serial)
            self._ready[which].add(at)
            self._inject_ready(which)

        return hook

    def _hook_ahead(self, which: int, group: FactorGroup) -> Callable[[nn.Parameter], None]:
        def hook(parameter: nn.Parameter) -> None:
            # Δ̃ is not needed without a push.
            if self._paused or self._all_pushes.rest or not group.pulls_back_ahead:
                return
            if getattr(parameter.grad, _MARK, None) == self._serial:
                # A later micro-batch of the same step.
                return
            setattr(parameter.grad, _MARK, self._serial)
            now, arithmetic = group.factors_now(), self._arithmetics[which]
            self._submit(which, functools.partial(group.pull_back_ahead, now, arithmetic))

        return hook

    def _inject_ready(self, which: int) -> None:
        group = self._groups[which]
        while self._next[which] < len(group.store.buckets):
            bucket = self._next[which]
            start, stop = group.store.buckets[bucket]
            if not all(self._is_final(which, at) for at in range(start, stop)):
                return
            for at in range(start, stop):
                gradient: Any = group.targets[at].parameter.grad
                # If a step is given up, its gradients are freed early, and their memory would be
                # used again while the lane still writes to it.
                self._kept.append(gradient)
                self._injected[which].add(at)
            self._latest = which, start
            self._next[which] += 1
            self._submit(which, functools.partial(self._inject, which, bucket))

    def _submit(self, which: int, work: Callable[[], None]) -> None:
        """Do work on a group's lane, after what backward has launched by now."""
        device, lane = self._groups[which].device, self._lanes[which]
        final = None if lane is None else torch.cuda.current_stream(device).record_event()

        @torch.no_grad()
        def on_lane() -> None:
            with _on(lane, final, device):
                work()

        if lane is None or self._launcher is None:
            on_lane()
        else:
            self._launched.append(self._launcher.submit(on_lane))

    def _inject(self, which: int, bucket: int) -> None:
        """Inject one bucket, whose gradients are final."""
        with self._beginning:
            if self._pushes is None:
                self._pushes = self._all_pushes.begin()
                for other in self._lanes:
                    if other is not None:
                        # A step begins on the current stream of each device.
                        other.wait_stream(torch.cuda.current_stream(other.device))
        if self._pushes:
            push, arithmetic = self._pushes[which], self._arithmetics[which]
            self._groups[which].inject_bucket(bucket, push, arithmetic)


@contextlib.contextmanager
def _on(lane: torch.cuda.Stream | None, final: Any, device: torch.device) -> Iterator[None]:
    """Work on a side stream, after an event on the stream of backward."""
    with plain_arithmetic(device):
        if lane is None:
            yield
            return
        lane.wait_event(final)
        with torch.cuda.stream(lane):
            yield
