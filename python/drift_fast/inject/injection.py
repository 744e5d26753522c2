"""When the injection runs: once per optimizer step, or in every backward pass.

Owns the life of an attachment: targets found, Δ resident, gradients changed in place, and the
watchdog that fails a run in which nothing was injected. One attachment per parameter at a time.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from drift_fast.errors import DriftError, NonFiniteError
from drift_fast.inject.backend import CpuBackend, DeviceBackend, Measured, make_backend
from drift_fast.inject.formula import SCALES, Scale, check_alpha, check_scale
from drift_fast.inject.targets import (
    DeltaLike,
    Target,
    check_optimized,
    check_trained,
    find_targets,
)
from drift_fast.select import EVERYTHING, Layers, Modules, Selection

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
        delta: an open `Delta`, or one that streams; its names are matched to the model's.
        alpha: strength; positive moves weights towards the reasoning model.
        scale: "absolute", "gradnorm" or "adaptive".
        modules, layers: inject only these of the delta's tensors; None is all of them.
        scope: "step" or "microbatch".
        rescale: "weight" multiplies c by ‖W‖/‖Δ‖ in absolute mode, as the public code does, with
            the norm of the weights as they are now.
        optimizer: the optimizer that will step the model; given, it is checked at once that it
            holds every target. Needed with `scaler` and "absolute".
        scaler: the torch.amp.GradScaler in use; "absolute" follows its scale until
            `scaler.unscale_(optimizer)`. The other scales do not need it.
        strict: refuse when a selected tensor of the delta has no parameter, or a target no
            gradient; otherwise these are listed in `coverage` and counted in `skipped`.
        min_coverage: the share of the selected elements that must have a parameter.

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
        delta: DeltaLike,
        *,
        alpha: float = 1.0,
        scale: str = "adaptive",
        modules: Modules | None = None,
        layers: Layers = None,
        scope: Literal["step", "microbatch"] = "step",
        rescale: Rescale = None,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        strict: bool = True,
        min_coverage: float = 1.0,
    ) -> None:
        self._alpha = check_alpha(alpha)
        self._scale: Scale = check_scale(scale)
        _check_options(scope, scale, rescale, scaler, optimizer, min_coverage)
        self._scope = scope
        self._strict = strict
        self._scaler = scaler
        self._optimizer = optimizer
        selection = Selection.parse(EVERYTHING if modules is None else modules, layers)
        targets, self.coverage = find_targets(
            model, delta, selection, strict=strict, min_coverage=min_coverage
        )
        check_trained(targets)
        if optimizer is not None:
            check_optimized(targets, optimizer)
        _refuse_second(targets)
        self._targets, self._groups = _load(targets, delta)
        self._rescale = rescale
        for group in self._groups:
            group.start(rescale)
        self._injected = 0
        self._missing = 0
        self._device_skipped: list[Any] = []
        self._pending: weakref.ref[torch.Tensor] | None = None
        self._since_step = 0
        self._watched: dict[int, bool] = {}
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
        """Parameters into which the last step injected; counted per micro-batch in that scope."""
        if self._scope == "microbatch":
            return self._since_step or self._injected
        return self._injected - self._skipped_on_device()

    @property
    def skipped(self) -> int:
        """Parameters that the last step left alone: gradient not finite or, not strict, missing.

        Reading it on an accelerator waits for the device.
        """
        return self._missing + self._skipped_on_device()

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
        self._check_gradients()
        self._injected = 0
        self._device_skipped = []
        with torch.autocast(device_type=self._groups[0].device.type, enabled=False):
            for group in self._groups:
                self._inject(group)
        self._since_step = self._injected
        self._pending = weakref.ref(_gradient(self._targets[0].parameter))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return progress along Δ and what the last step did; waits for the device.

        `progress` is λ = ⟨θ_t − θ_0, Δ⟩/‖Δ‖² over all targets, θ_0 being the weights at attachment:
        0 at the start, 1 where the weights have moved by all of Δ. `progress/<parameter>` is the
        same for one. `relative_push` is ‖c·Δ‖/‖g‖ over all targets, and `cosine/<parameter>` is
        cos(g, Δ), both of the last step's gradient before injection.
        """
        self._require_attached()
        result = {"alpha": self._alpha}
        moved = total = push = gradient = 0.0
        for group in self._groups:
            progress, squares = group.progress()
            for target, value, square in zip(group.targets, progress, squares, strict=True):
                result[f"progress/{target.name}"] = value
                moved, total = moved + value * square, total + square
            for name, cosine in group.cosines():
                result[f"cosine/{name}"] = cosine
            pushed, raw = group.push()
            push, gradient = push + pushed, gradient + raw
        result["progress"] = moved / total
        result["relative_push"] = (push / gradient) ** 0.5 if gradient > 0 else 0.0
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

    def _inject(self, group: _Group) -> None:
        held = [at for at, target in enumerate(group.targets) if target.parameter.grad is not None]
        if not held:
            return
        part = group if len(held) == len(group.targets) else group.part(held)
        self._injected += len(held)
        if self._alpha == 0.0:
            # Exactly no injection: not even the sign of a zero changes.
            return
        gradients = [_gradient(target.parameter) for target in part.targets]
        factor = part.factor(self._loss_scale(part.device))
        sums = part.backend.measure(gradients)
        c, skipped = part.backend.coefficients(self._scale, self._alpha, sums, factor)
        part.backend.subtract(gradients, c)
        group.last = (part, sums, c)
        self._device_skipped.append(skipped)

    def _loss_scale(self, device: torch.device) -> torch.Tensor | None:
        """Return the factor that the gradients carry, None where it is one or does not matter."""
        if self._scaler is None or self._scale != "absolute" or not self._scaler.is_enabled():
            return None
        if self._optimizer is not None and _is_unscaled(self._scaler, self._optimizer):
            return None
        return self._scaler.scale(torch.ones((), device=device))

    def _check_gradients(self) -> None:
        missing = [t.name for t in self._targets if t.parameter.grad is None]
        self._missing = len(missing)
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

    def _refuse_twice(self) -> None:
        pending = self._pending() if self._pending is not None else None
        if pending is None or self._skipped_on_device_if_known():
            return
        if pending is self._targets[0].parameter.grad:
            raise DriftError(
                "step() was called twice without an optimizer step between: call it once, when the "
                "gradient is fully accumulated, just before clipping"
            )

    def _skipped_on_device(self) -> int:
        return sum(int(count) for count in self._device_skipped)

    def _skipped_on_device_if_known(self) -> int:
        # A count on a device is not asked for here, since that would wait for it.
        return sum(count for count in self._device_skipped if isinstance(count, int))

    # The microbatch scope.

    def _hook_backward(self) -> None:
        for group in self._groups:
            for at, target in enumerate(group.targets):
                hook = self._backward_hook(group.part([at]))
                self._handles.append(torch.Tensor.register_hook(target.parameter, hook))  # type: ignore[no-untyped-call]

    def _backward_hook(self, one: _Group) -> Any:
        @torch.no_grad()
        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            self._since_step += 1
            if self._alpha == 0.0:
                return None
            with torch.autocast(device_type=one.device.type, enabled=False):
                # Autograd may share this tensor with other consumers, so it is not changed.
                injected = gradient.clone(memory_format=torch.contiguous_format)
                sums = one.backend.measure([injected])
                factor = one.factor(self._loss_scale(one.device))
                c, _ = one.backend.coefficients(self._scale, self._alpha, sums, factor)
                one.backend.subtract([injected], c)
            return injected

        return hook

    # The watchdog.

    def _watch(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Fail the first optimizer step that would use gradients without the injection."""
        if not self._steps_targets(optimizer):
            return
        if self._since_step == 0:
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
        total = len(self._targets)
        if self._scope == "microbatch" and self._strict and self._since_step < total:
            raise DriftError(
                f"only {self._since_step} of {total} targets were injected before this step of "
                f"{type(optimizer).__name__}: the others got no gradient"
            )
        if self._scope == "microbatch":
            self._injected = self._since_step
        self._since_step = 0
        self._pending = None

    def _steps_targets(self, optimizer: torch.optim.Optimizer) -> bool:
        if id(optimizer) not in self._watched:
            mine = {id(target.parameter) for target in self._targets}
            held = any(id(p) in mine for g in optimizer.param_groups for p in g["params"])
            self._watched[id(optimizer)] = held
        return self._watched[id(optimizer)]

    def _require_attached(self) -> None:
        if not self._groups:
            raise DriftError("this injection was removed; attach a new one")


class _Group:
    """The targets on one device: their Δ, and where their weights stood at attachment."""

    def __init__(self, targets: Sequence[Target], backend: CpuBackend | DeviceBackend) -> None:
        self.targets = list(targets)
        self.backend = backend
        self.device = backend.deltas[0].device
        self.last: tuple[_Group, Measured, Any] | None = None
        self._origin: Any = None
        self._factor: Any = None

    def start(self, rescale: Rescale) -> None:
        """Note ⟨θ_0, Δ⟩ and, if asked, ‖W‖/‖Δ‖."""
        sums = self._weights()
        self._origin = sums.gd
        ones = self.backend.vector([1.0] * len(self.targets))
        if rescale is None:
            self._factor = ones
        else:
            norms = self.backend.vector((sums.gg**0.5).tolist())
            self._factor = norms / self.backend.dd**0.5

    def part(self, members: Sequence[int]) -> _Group:
        """Return some of the targets as a group of their own; Δ is shared, not copied."""
        deltas = [self.backend.deltas[at] for at in members]
        index = list(members)
        backend = type(self.backend)(deltas, self.backend.dd[index].tolist())
        part = _Group([self.targets[at] for at in members], backend)
        part._origin, part._factor = self._origin[index], self._factor[index]
        return part

    def factor(self, loss_scale: torch.Tensor | None) -> Any:
        """Return what multiplies α in absolute mode."""
        if loss_scale is None:
            return self._factor
        on_cpu = isinstance(self.backend, CpuBackend)
        return self._factor * (loss_scale.item() if on_cpu else loss_scale)

    def progress(self) -> tuple[list[float], list[float]]:
        """Return λ and ‖Δ‖² of each target."""
        sums = self._weights()
        return ((sums.gd - self._origin) / self.backend.dd).tolist(), self.backend.dd.tolist()

    def _weights(self) -> Measured:
        # Progress is a small difference of two large sums, hence float64.
        weights = [target.parameter.detach() for target in self.targets]
        return self.backend.measure(weights, float64=True)

    def cosines(self) -> list[tuple[str, float]]:
        """Return cos(g, Δ) of the last step, by parameter; zero gradients have none."""
        if self.last is None:
            return []
        part, sums, _ = self.last
        rows = zip(
            part.targets, sums.gg.tolist(), sums.gd.tolist(), part.backend.dd.tolist(), strict=True
        )
        return [(t.name, gd / (gg * dd) ** 0.5) for t, gg, gd, dd in rows if gg > 0]

    def push(self) -> tuple[float, float]:
        """Return Σ‖c·Δ‖² and Σ‖g‖² of the last step."""
        if self.last is None:
            return 0.0, 0.0
        part, sums, c = self.last
        rows = list(zip(sums.gg.tolist(), c.tolist(), part.backend.dd.tolist(), strict=True))
        finite = [(gg, c, dd) for gg, c, dd in rows if gg == gg and gg != float("inf")]
        return sum(c * c * dd for _, c, dd in finite), sum(gg for gg, _, _ in finite)


def _load(targets: Sequence[Target], delta: DeltaLike) -> tuple[list[Target], list[_Group]]:
    """Read Δ beside each parameter, one tensor at a time; a Δ that is zero needs no injection."""
    stats = delta.stats
    by_device: dict[torch.device, list[tuple[Target, torch.Tensor, float]]] = {}
    for target in targets:
        row = stats[target.delta_name]
        if row.nonfinite or row.overflow or not math.isfinite(row.delta_sq):
            raise NonFiniteError(
                f"{target.delta_name}: Δ holds NaN or infinite values ({row.nonfinite} in the "
                f"sources, {row.overflow} beyond the dtype's range), which would spread to every "
                "weight; repair the source checkpoint or leave the tensor out with modules=… or "
                "layers=…"
            )
        if row.delta_sq == 0.0:
            continue
        device = target.parameter.device
        tensor = delta[target.delta_name].to(device)
        by_device.setdefault(device, []).append((target, tensor, row.delta_sq))
    if not by_device:
        raise DriftError(
            "Δ is zero in every target, so an injection would do nothing; was the delta computed "
            "from the same checkpoint twice?"
        )
    groups = []
    for members in by_device.values():
        backend = make_backend([d for _, d, _ in members], [dd for _, _, dd in members])
        groups.append(_Group([target for target, _, _ in members], backend))
    return [target for group in groups for target in group.targets], groups


def _check_options(
    scope: str,
    scale: str,
    rescale: str | None,
    scaler: Any,
    optimizer: Any,
    min_coverage: float,
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
    if not 0.0 < min_coverage <= 1.0:
        raise ValueError(f"min_coverage must be above 0 and at most 1, got {min_coverage!r}")


def _refuse_second(targets: Sequence[Target]) -> None:
    for target in targets:
        holder = _attached.get(target.parameter)
        if holder is not None and holder() is not None:
            raise DriftError(
                f"{target.name} has an injection attached already; call remove() on that one "
                "first, or both would push"
            )


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
