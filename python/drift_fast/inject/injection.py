"""When the injection runs: once per optimizer step, or in every backward pass.

Owns the life of an attachment: targets found, Δ resident, gradients changed in place, and the
watchdog that fails a run in which nothing was injected. One attachment per parameter at a time.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from drift_fast.errors import DriftError
from drift_fast.inject.formula import SCALES, Scale, check_alpha, check_scale
from drift_fast.inject.group import Group, load_groups
from drift_fast.inject.targets import (
    DeltaLike,
    Target,
    check_optimized,
    check_trained,
    find_targets,
    opened,
)
from drift_fast.mapping import MappingLike
from drift_fast.select import EVERYTHING, Layers, Modules, Selection

logger = logging.getLogger(__name__)

# Parameters that an attachment holds, so that a second one is refused.
_attached: Any = WeakIdKeyDictionary()

Rescale = Literal["weight"] | None


class Injection:
    """Bias a model's gradients along a delta while it trains.

    With `scope="step"` call `step()` once per optimizer step, after the last backward and before
    clipping:

        loss.backward()
        injection.step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    The gradient of every target becomes g − c·Δ, in place, with c by `drift_fast.inject.formula`.
    On an accelerator no value returns to the host. A copy of Δ, in the delta's dtype, stays beside
    each parameter until `remove()`.

    With `scope="microbatch"` there is nothing to call: a hook changes the gradient of every
    backward pass, as the public code does, so that the push grows with the number of micro-batches.

    Args:
        model: the model that trains; wrapped by DDP or torch.compile is fine, sharded is refused.
        delta: an open `Delta`, one that streams, or the directory of one; its names are matched to
            the model's.
        alpha: strength; positive moves weights towards the reasoning model.
        scale: "absolute", "gradnorm" or "adaptive".
        modules, layers: inject only these of the delta's tensors; None is all of them.
        mapping: which tensor of the delta belongs to which parameter, where names do not tell: in
            the forms that `compute_delta` takes, from delta names to parameter names.
        scope: "step" or "microbatch".
        rescale: "weight" multiplies c by ‖W‖/‖Δ‖ in absolute mode, as the public code does, with
            the norm of the weights as they are now.
        optimizer: the optimizer that will step the model; given, it is checked at once that it
            holds every target. Needed with `scaler` and "absolute".
        scaler: the torch.amp.GradScaler in use; "absolute" follows its scale until
            `scaler.unscale_(optimizer)`. The other scales do not need it.
        strict: refuse when a selected tensor of the delta has no parameter, or a target no
            gradient; otherwise these are listed in `coverage` and counted in `skipped`.
        min_coverage: the share of the selected elements that must have a parameter; None is all of
            them when strict, but for what a mapping leaves out, and any otherwise.

    Raises:
        CoverageError: the delta does not fit the model; names and shapes are listed.
        DriftError: a frozen target, one that the optimizer does not hold, a sharded model, or a
            second attachment.
        NonFiniteError: the delta holds NaN or infinity.
        ValueError: an argument without meaning.
    """

    def __init__(
        self,
        model: nn.Module,
        delta: DeltaLike | str | os.PathLike[str],
        *,
        alpha: float = 1.0,
        scale: str = "adaptive",
        modules: Modules | None = None,
        layers: Layers = None,
        mapping: MappingLike | None = None,
        scope: Literal["step", "microbatch"] = "step",
        rescale: Rescale = None,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        strict: bool = True,
        min_coverage: float | None = None,
    ) -> None:
        self._alpha = check_alpha(alpha)
        self._scale: Scale = check_scale(scale)
        _check_options(scope, scale, rescale, scaler, optimizer, min_coverage)
        self._scope = scope
        self._strict = strict
        self._scaler = scaler
        self._optimizer = None if optimizer is None else unwrap_optimizer(optimizer)
        delta = opened(delta)
        selection = Selection.parse(EVERYTHING if modules is None else modules, layers)
        targets, self.coverage = find_targets(
            model, delta, selection, strict=strict, min_coverage=min_coverage, mapping=mapping
        )
        check_trained(targets)
        if self._optimizer is not None:
            check_optimized(targets, self._optimizer)
        _refuse_second(targets)
        logger.info(
            "injecting into %d parameters, %.1f%% of the delta's selected elements and %.1f%% of "
            "the language backbone; %d tensors of the delta have no parameter",
            len(targets),
            100 * self.coverage.fraction,
            100 * self.coverage.backbone_fraction,
            len(self.coverage.unmatched_reasoning),
        )
        self._groups = load_groups(targets, delta)
        self._targets = [target for group in self._groups for target in group.targets]
        for group in self._groups:
            group.start(rescale=rescale is not None)
        self._record = _Record([target.parameter for target in self._targets])
        self._pending: weakref.ref[torch.Tensor] | None = None
        self._handles: list[Any] = [register_optimizer_step_pre_hook(self._watch)]
        for target in self._targets:
            _attached[target.parameter] = weakref.ref(self)
        if scope == "microbatch":
            self._hook_backward()

    @property
    def alpha(self) -> float:
        """Strength; may be set between steps."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha = check_alpha(value)

    @property
    def targets(self) -> list[str]:
        """Names of the parameters that are injected into."""
        return [target.name for target in self._targets]

    @property
    def injected(self) -> int:
        """Parameters into which the last step, or the last backward pass of each, injected.

        Reading it on an accelerator waits for the device.
        """
        return self._record.injected()

    @property
    def skipped(self) -> int:
        """Parameters that the last step left alone: gradient not finite or, not strict, missing.

        Reading it on an accelerator waits for the device.
        """
        return self._record.skipped()

    @torch.no_grad()
    def step(self) -> None:
        """Inject into the accumulated gradients, once, before clipping and the optimizer's step.

        Raises:
            DriftError: a gradient is missing, this gradient was injected already, or the scope is
                "microbatch".
        """
        if self._scope == "microbatch":
            raise DriftError(
                'scope="microbatch" injects inside backward; do not call step(), or attach with '
                'scope="step"'
            )
        self._require_attached()
        self._refuse_twice()
        missing = self._check_gradients()
        self._record.begin(missing)
        with torch.autocast(device_type=self._groups[0].device.type, enabled=False):
            for group in self._groups:
                self._inject(group)
        # One gradient stands for all: the next backward after zero_grad makes another tensor.
        first = next(t.parameter for t in self._targets if t.parameter.grad is not None)
        self._pending = weakref.ref(_gradient(first))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return progress along Δ and what the last step did; waits for the device.

        `progress` is λ = ⟨θ_t − θ_0, Δ⟩/‖Δ‖² over all targets, θ_0 being the weights at attachment:
        0 at the start, 1 where the weights have moved by all of Δ. `progress/<parameter>` is the
        same for one. `relative_push` is ‖c·Δ‖/‖g‖ over all targets, and `cosine/<parameter>` is
        cos(g, Δ) where the scale asked for it, both of the last step's gradient before injection;
        they are left out where no step has measured them, as in the microbatch scope.
        """
        self._require_attached()
        result = {"alpha": self._alpha}
        moved = total = push = gradient = 0.0
        for group in self._groups:
            rows = zip(group.targets, group.progress(), group.squares(), strict=True)
            for target, value, square in rows:
                result[f"progress/{target.name}"] = value
                moved, total = moved + value * square, total + square
            for name, cosine in group.cosines():
                result[f"cosine/{name}"] = cosine
            pushed, raw = group.push()
            push, gradient = push + pushed, gradient + raw
        result["progress"] = moved / total
        if gradient > 0:
            result["relative_push"] = (push / gradient) ** 0.5
        result["injected"] = float(self.injected)
        result["skipped"] = float(self.skipped)
        return result

    def remove(self) -> None:
        """Detach from the model and free Δ; gradients are left as they are. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for target in self._targets:
            holder = _attached.get(target.parameter)
            if holder is not None and holder() is self:
                del _attached[target.parameter]
        for group in self._groups:
            group.release()
        self._groups = []

    def __enter__(self) -> Injection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return (
            f"Injection({len(self._targets)} parameters, scale={self._scale}, alpha={self._alpha}, "
            f"scope={self._scope})"
        )

    # The step scope.

    def _inject(self, group: Group) -> None:
        group.last = None
        held = [at for at, target in enumerate(group.targets) if target.parameter.grad is not None]
        if not held:
            return
        part = group if len(held) == len(group.targets) else group.part(held)
        self._record.inject([target.parameter for target in part.targets])
        if self._alpha == 0.0:
            # Exactly no injection: not even the sign of a zero changes.
            return
        gradients = [_gradient(target.parameter) for target in part.targets]
        factor = part.factor(self._loss_scale(part.device))
        # Only the adaptive scale asks for the angle.
        sums = part.backend.measure(gradients, dot=self._scale == "adaptive")
        c, skipped = part.backend.coefficients(self._scale, self._alpha, sums, factor)
        part.backend.subtract(gradients, c)
        group.last = (part, sums, c)
        self._record.skip(skipped)

    def _loss_scale(self, device: torch.device) -> torch.Tensor | None:
        """Return the factor that the gradients carry, None where it is one or does not matter."""
        if self._scaler is None or self._scale != "absolute" or not self._scaler.is_enabled():
            return None
        if self._optimizer is not None and _is_unscaled(self._scaler, self._optimizer):
            return None
        return self._scaler.scale(torch.ones((), device=device))

    def _check_gradients(self) -> int:
        """Refuse gradients that cannot be injected into; return how many targets have none."""
        missing = [t.name for t in self._targets if t.parameter.grad is None]
        if len(missing) == len(self._targets):
            raise DriftError(
                "no target has a gradient, so nothing can be injected: call step() after backward "
                "and before zero_grad; an optimizer that steps inside backward cannot be used"
            )
        if missing and self._strict:
            raise DriftError(
                f"{len(missing)} of {len(self._targets)} targets have no gradient, {missing[0]} "
                "first: they took no part in the loss. Leave them out with modules=… or layers=…, "
                "or pass strict=False to skip and count them"
            )
        for target in self._targets:
            gradient = target.parameter.grad
            if gradient is not None and gradient.layout != torch.strided:
                raise DriftError(f"the gradient of {target.name} is sparse, which is not supported")
        return len(missing)

    def _refuse_twice(self) -> None:
        pending = self._pending() if self._pending is not None else None
        # A scaler leaves out the optimizer's step when it finds infinity, which is no mistake; and
        # gradients that zero_grad did not keep are not the ones that were injected.
        if pending is None or self._scaler is not None or self._record.skipped_if_known():
            return
        if any(pending is target.parameter.grad for target in self._targets):
            raise DriftError(
                "step() was called twice without an optimizer step between: call it once, when the "
                "gradient is fully accumulated, just before clipping"
            )

    # The microbatch scope.

    def _hook_backward(self) -> None:
        for group in self._groups:
            for at, target in enumerate(group.targets):
                hook = self._backward_hook(group.part([at]))
                self._handles.append(torch.Tensor.register_hook(target.parameter, hook))  # type: ignore[no-untyped-call]

    def _backward_hook(self, one: Group) -> Any:
        parameter = one.targets[0].parameter

        @torch.no_grad()
        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            if self._alpha == 0.0:
                self._record.inject([parameter])
                return None
            with torch.autocast(device_type=one.device.type, enabled=False):
                # Autograd may share this tensor with other consumers, so it is not changed.
                injected = gradient.clone(memory_format=torch.contiguous_format)
                sums = one.backend.measure([injected], dot=self._scale == "adaptive")
                factor = one.factor(self._loss_scale(one.device))
                c, skipped = one.backend.coefficients(self._scale, self._alpha, sums, factor)
                one.backend.subtract([injected], c)
            self._record.inject([parameter], skipped)
            return injected

        return hook

    # The watchdog.

    def _watch(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Fail an optimizer step that would use gradients without the injection."""
        held, fresh = self._record.consume(optimizer)
        if held == 0:
            return
        if fresh == 0:
            call = (
                "call injection.step() between backward and optimizer.step()"
                if self._scope == "step"
                else "no backward pass reached its hooks (were the parameters replaced or wrapped "
                "after attaching?)"
            )
            raise DriftError(
                f"nothing was injected before this step of {type(optimizer).__name__}: {call}; or "
                "call injection.remove() to train without it"
            )
        if self._scope == "microbatch" and self._strict and fresh < held:
            raise DriftError(
                f"only {fresh} of {held} targets were injected before this step of "
                f"{type(optimizer).__name__}: the others got no gradient"
            )
        self._pending = None

    def _require_attached(self) -> None:
        if not self._groups:
            raise DriftError("this injection was removed; attach a new one")


class _Record:
    """Which parameters were injected when, for the watchdog and the counts.

    An optimizer may hold some of the targets only, and several optimizers may step after one
    injection, so each keeps its own account of what it has used.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._place = {id(parameter): at for at, parameter in enumerate(parameters)}
        self._times = [0] * len(parameters)
        self._used: Any = weakref.WeakKeyDictionary()
        self._current: set[int] = set()
        self._consumed = False
        self._missing = 0
        # Counts stay where they were computed; adding them up is what waits for a device.
        self._skips: list[Any] = []
        self._skip_of: dict[int, Any] = {}

    def begin(self, missing: int) -> None:
        """Start the account of a new step."""
        self._current, self._missing, self._skips, self._skip_of = set(), missing, [], {}
        self._consumed = False

    def inject(self, parameters: Sequence[nn.Parameter], skipped: Any = None) -> None:
        """Note that these were injected; a hook says at once whether its one was skipped."""
        if self._consumed:
            self.begin(0)
        for parameter in parameters:
            at = self._place[id(parameter)]
            self._times[at] += 1
            self._current.add(at)
            if skipped is not None:
                self._skip_of[at] = skipped

    def skip(self, count: Any) -> None:
        """Add a number of parameters that were skipped, an int or a device tensor."""
        self._skips.append(count)

    def consume(self, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """Return how many targets the optimizer holds, and how many were injected for this step."""
        held = [
            self._place[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._place
        ]
        used = self._used.get(optimizer) or [0] * len(self._times)
        fresh = sum(self._times[at] > used[at] for at in held)
        # Of all targets, so that one which joins the optimizer later brings no old injection along.
        self._used[optimizer] = list(self._times)
        self._consumed = self._consumed or bool(held)
        return len(held), fresh

    def has_fresh(self) -> bool:
        """Whether an injection has happened that no optimizer has used."""
        return bool(self._current) and not self._consumed

    def injected(self) -> int:
        return len(self._current) - self._counted()

    def skipped(self) -> int:
        return self._missing + self._counted()

    def skipped_if_known(self) -> int:
        """The count as far as it is on the host, without waiting for a device."""
        return sum(count for count in self._skips if isinstance(count, int))

    def _counted(self) -> int:
        return sum(int(count) for count in [*self._skips, *self._skip_of.values()])


def _check_options(
    scope: str,
    scale: str,
    rescale: str | None,
    scaler: Any,
    optimizer: Any,
    min_coverage: float | None,
) -> None:
    if scope not in ("step", "microbatch"):
        raise ValueError(f"scope must be 'step' or 'microbatch', got {scope!r}")
    if rescale not in (None, "weight"):
        raise ValueError(f"rescale must be None or 'weight', got {rescale!r}")
    if rescale is not None and scale != SCALES[0]:
        raise ValueError(
            f"rescale has no effect with scale={scale!r}, which does not depend on ‖Δ‖; "
            "leave it out, or use scale='absolute'"
        )
    if scaler is not None and scale == "absolute" and optimizer is None:
        raise ValueError(
            "scale='absolute' with a scaler needs the optimizer too, to know whether its gradients "
            "are still scaled: pass optimizer=…"
        )
    if min_coverage is not None and not 0.0 <= min_coverage <= 1.0:
        raise ValueError(f"min_coverage must be between 0 and 1, got {min_coverage!r}")


def _refuse_second(targets: Sequence[Target]) -> None:
    for target in targets:
        holder = _attached.get(target.parameter)
        if holder is not None and holder() is not None:
            raise DriftError(
                f"{target.name} has an injection attached already; call remove() on that one "
                "first, or both would push"
            )


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside Accelerate's wrapper, which is the one that steps."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"expected a torch optimizer, got {type(optimizer).__name__}")
    return optimizer


def _is_unscaled(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether `scaler.unscale_(optimizer)` has run since the last update.

    torch keeps this in a private table; without it an absolute push could be wrong by the loss
    scale, so a torch that has renamed it is an error rather than a guess.
    """
    states = getattr(scaler, "_per_optimizer_states", None)
    if states is None:
        raise DriftError(
            "this torch does not tell whether gradients were unscaled; use scale='gradnorm' or "
            "'adaptive', which do not depend on it"
        )
    stage = states[id(optimizer)]["stage"]
    return bool(stage.name == "UNSCALED")


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    gradient = parameter.grad
    if gradient is None:
        raise DriftError("a gradient disappeared while it was being injected")
    return gradient
