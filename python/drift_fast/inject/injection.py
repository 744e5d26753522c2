"""When the injection runs: once per optimizer step, inside backward, or in every backward pass.

Owns the life of an attachment: targets found, Δ in its place, gradients changed in place, and the
watchdog that fails a run in which nothing was injected. One attachment per parameter at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from drift_fast.errors import DriftError
from drift_fast.inject.attachment import Attachment
from drift_fast.inject.config import InjectionConfig, Rescale
from drift_fast.inject.overlap import Overlap
from drift_fast.inject.placement.load import Loading, load_groups
from drift_fast.inject.saved_state import is_number
from drift_fast.inject.shards.base import Shard, Whole
from drift_fast.inject.shards.find import process_groups_of, shards_of
from drift_fast.inject.shards.reduction import Reduction
from drift_fast.inject.strength.control import Control
from drift_fast.inject.strength.per_module import PerModule
from drift_fast.inject.target_group import Push, TargetGroup, beside
from drift_fast.inject.targets import (
    DeltaLike,
    Target,
    check_optimized,
    check_trained,
    find_targets,
    opened,
)
from drift_fast.inject.telemetry import append_rows
from drift_fast.inject.telemetry import measure as measure_progress
from drift_fast.inject.telemetry import summary as summarise
from drift_fast.inject.watchdog import Record, claim, disclaim, refuse_second
from drift_fast.options import takes
from drift_fast.sizes import parse_size

logger = logging.getLogger(__name__)

_STATE_VERSION = 1


@takes(InjectionConfig)
class Injection(Attachment):
    """Bias a model's gradients along a delta while it trains.

    With `scope="step"` call `step()` once per optimizer step, after the last backward and before
    clipping:

        loss.backward()
        injection.step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    The gradient of every target becomes g − c·Δ, in place, with c by `inject.strength.formula`.
    On an accelerator no value returns to the host. Under FSDP2, tensor parallelism, FSDP1 or ZeRO,
    attach after the model was wrapped: each process then reads and holds its own part of Δ, and one
    sum over the processes makes the result that of a single one.

    With `scope="microbatch"` there is nothing to call: a hook changes the gradient of every
    backward pass, as the public code does, so that the push grows with the number of micro-batches.

    Args:
        model: the model that trains, as it trains: wrapped by DDP, FSDP or torch.compile.
        delta: an open `Delta`, one that streams, or the directory of one; its names are matched to
            the model's.
        config: an `InjectionConfig`; options given as keywords win over those of it.
        optimizer: the optimizer that will step the model; given, it is checked at once that it
            holds every target. Needed with `scaler` and "absolute".
        scaler: the torch.amp.GradScaler in use; "absolute" follows its scale until
            `scaler.unscale_(optimizer)`. The other scales do not need it.
        options: those of `InjectionConfig`, listed below.

    Raises:
        CoverageError: the delta does not fit the model; names and shapes are listed.
        DriftError: a frozen target, one that the optimizer does not hold, a way of sharding that is
            not supported, or a second attachment.
        NonFiniteError: the delta holds NaN or infinity.
        ValueError: an argument without meaning.
    """

    def __init__(
        self,
        model: nn.Module,
        delta: DeltaLike | str | os.PathLike[str],
        config: InjectionConfig | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        config = InjectionConfig.resolve(config, options, function="Injection")
        if scaler is not None and config.scale == "absolute" and optimizer is None:
            raise ValueError(
                "scale='absolute' with a scaler needs the optimizer too, to know whether its "
                "gradients are still scaled: pass optimizer=…"
            )
        trained = tuple(model.parameters()) if isinstance(model, nn.Module) else ()
        residency = "device" if config.scope == "microbatch" else config.residency
        loading = Loading(residency, parse_size(config.prefetch), trained)
        self._scale = config.scale
        self._scope = config.scope
        self._strict = config.strict
        self._scaler = scaler
        self._optimizer = None if optimizer is None else unwrap_optimizer(optimizer)
        with Reduction(process_groups_of(model)).together():
            delta = opened(delta)
            targets, self.coverage = find_targets(model, delta, config)
            check_trained(targets)
            self._refuse_adapted(targets, overlap=config.overlap, rescale=config.rescale)
            if self._optimizer is not None:
                check_optimized(targets, self._optimizer)
            refuse_second(targets)
            shards = self._shards(model, targets)
            self._refuse_sharding(targets, shards, config.overlap)
        logger.info(
            "injecting into %d parameters, %.1f%% of the delta's selected elements and %.1f%% of "
            "the language backbone; %d tensors of the delta have no parameter",
            len(targets),
            100 * self.coverage.fraction,
            100 * self.coverage.backbone_fraction,
            len(self.coverage.unmatched_reasoning),
        )
        self._groups, self.residency = load_groups(
            list(zip(targets, shards, strict=True)), delta, loading
        )
        self._targets = [target for group in self._groups for target in group.targets]
        held = {id(target) for target in self._targets}
        self._named = [target.name for target in targets if id(target) in held]
        for group in self._groups:
            group.start(rescale=config.rescale is not None)
        self._control = Control(
            [target.delta_name for target in self._targets],
            config,
            squares=[square for group in self._groups for square in group.squares()],
        )
        home = self._groups[0]
        self._control.place(home.device, home.norms.dtype)
        self._record = Record(self._targets)
        self._pending: weakref.ref[torch.Tensor] | None = None
        self._pushes: list[Push] | None = None
        self._stepped = False
        self._model = weakref.ref(model)
        # Optimizers that hold no target, and were found to be none of this injection's business.
        self._foreign: Any = weakref.WeakSet()
        self._handles: list[Any] = [register_optimizer_step_pre_hook(self._watch)]
        claim(self._targets, self)
        self._overlap: Overlap | None = None
        if config.scope == "microbatch":
            self._hook_backward()
        elif config.overlap:
            self._overlap = Overlap(self._groups, self._begin)
            self._handles += self._overlap.handles

    @property
    def alpha(self) -> float | dict[str, float]:
        """Strength as stated, before schedules and caps; may be set between steps."""
        return self._control.alpha

    @alpha.setter
    def alpha(self, value: PerModule) -> None:
        self._control.alpha = value
        if self._scope == "microbatch":
            self._pushes = None

    @property
    def targets(self) -> list[str]:
        """Names of the parameters that are injected into."""
        return list(self._named)

    @property
    def steps(self) -> int:
        """Steps that were injected, with those that a gradient scaler then left out."""
        return self._control.step

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
        # What was injected inside backward has begun this step already.
        pushes = self._overlap.join() if self._overlap is not None else None
        try:
            missing, refusal = self._check_gradients()
            if refusal is not None and not any(group.sharded for group in self._groups):
                raise refusal
            present = [t.parameter for t in self._targets if t.name not in missing]
            if pushes is None:
                pushes = self._begin()
            self._record.begin(len(missing))
            with self._plain_arithmetic():
                groups = self._groups if pushes else []
                for at, (group, push) in enumerate(zip(groups, pushes, strict=True)):
                    if self._overlap is not None:
                        self._overlap.finish(at, push)
                    else:
                        group.inject(push)
                    self._record.skip(group.skipped())
                    group.capture()
        finally:
            for group in self._groups:
                group.finish()
            if self._overlap is not None:
                self._overlap.let_go()
        if refusal is not None:
            # Only now: the other processes wait for this one in the sum over all of them.
            raise refusal
        self._record.inject(present)
        if self._overlap is not None:
            self._overlap.reset()
        self._control.finish()
        # One gradient stands for all: the next backward after zero_grad makes another tensor.
        self._pending = self._any_gradient()

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Mark backward passes whose gradients are not final yet, with `overlap=True`.

        with injection.accumulating():
            loss(model, first_half).backward()
        loss(model, second_half).backward()
        injection.step()
        """
        if self._overlap is None:
            yield
            return
        with self._overlap.paused():
            yield

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return progress along Δ and what the last step did; waits for the device.

        `progress` is λ = ⟨θ_t − θ_0, Δ⟩/‖Δ‖² over all targets, θ_0 being the weights at attachment:
        0 at the start, 1 where the weights have moved by all of Δ. `progress/<parameter>` is the
        same for one. `relative_push` is ‖c·Δ‖/‖g‖ over all targets, and `cosine/<parameter>` is
        cos(g, Δ) where the scale asked for it, both of the last step's gradient before injection;
        they are left out where no step has measured them, as in the microbatch scope. `alpha` is α
        as it was in force in the last step, its mean over the targets, `stopped` how many of them a
        cap has switched off. Under sharding every process must call this.
        """
        self._require_attached()
        return measure_progress(self._groups, self._control) | {
            "injected": float(self.injected),
            "skipped": float(self.skipped),
        }

    def summary(self) -> dict[str, float]:
        """Return what is worth a line in a log; waits for the device, as `metrics` does.

        Overall, by kind and by module (`progress/attn`, `progress/q_proj`, …): λ, cos(g, Δ),
        `relative_push`, α in force, and what was skipped or stopped.
        """
        return summarise(self.metrics(), self._groups)

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Append the summary to a CSV file of the columns step, metric and value."""
        append_rows(path, self.steps, self.summary())

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON has it; waits for the device.

        It holds the number of steps, where the weights started along Δ, and the state of schedules,
        caps and targets. Δ itself is not in it.
        """
        self._require_attached()
        origin = {
            target.name: value
            for group in self._groups
            for target, value in zip(group.targets, group.origin, strict=True)
        }
        return {
            "version": _STATE_VERSION,
            "control": self._control.state_dict(),
            "origin": origin,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned, on the weights that were saved with it.

        Raises:
            DriftError: not such a state, or one of other targets; nothing is changed.
        """
        self._require_attached()
        origin = _stored_origin(state, [target.name for target in self._targets])
        self._control.load_state_dict(state["control"])
        self._pushes = None
        for group in self._groups:
            group.origin = [origin[target.name] for target in group.targets]

    def remove(self) -> None:
        """Detach from the model and free Δ; gradients are left as they are. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        disclaim(self._targets, self)
        if self._overlap is not None:
            self._overlap.close()
        self._overlap = None
        for group in self._groups:
            group.release()
        self._groups = []

    def __repr__(self) -> str:
        return (
            f"Injection({len(self._targets)} parameters, scale={self._scale}, alpha={self.alpha}, "
            f"scope={self._scope}, residency={self.residency})"
        )

    # What an integration may do in its own way.

    def _shards(self, model: nn.Module, targets: Sequence[Target]) -> list[Shard]:
        """Return how the local gradient and weights of each target are reached."""
        names = [target.name for target in targets]
        return shards_of(names, [target.parameter for target in targets], model)

    def _loss_scale(self, device: torch.device) -> torch.Tensor | float | None:
        """Return the factor that the gradients carry, None where it is one."""
        if self._scaler is None or not self._scaler.is_enabled():
            return None
        if self._optimizer is not None and _is_unscaled(self._scaler, self._optimizer):
            return None
        scale: torch.Tensor = self._scaler.scale(torch.ones((), device=device))
        return scale

    # The step scope.

    def _begin(self) -> list[Push]:
        """Start the account of a step, and return how each group is pushed; none if α is zero."""
        for group in self._groups:
            group.begin()
        self._pushes = []
        if not self._control.constant_zero:
            alphas = self._alphas()
            self._pushes = [self._push(group, alphas) for group in self._groups]
        else:
            for group in self._groups:
                group.rest()
        return self._pushes

    def _alphas(self) -> torch.Tensor:
        """Return α of every target, on the first group's device."""
        home = self._groups[0]
        if not self._control.needs_progress:
            return self._control.alphas(device=home.device, dtype=home.norms.dtype)
        with self._plain_arithmetic():
            parts = [group.progress(wide=False).to(home.norms.dtype) for group in self._groups]
        return self._control.alphas(torch.cat([beside(part, home.device) for part in parts]))

    def _push(self, group: TargetGroup, alphas: torch.Tensor) -> Push:
        start = 0
        for other in self._groups:
            if other is group:
                break
            start += len(other.targets)
        alpha = alphas[start : start + len(group.targets)]
        return Push(
            self._scale,
            beside(alpha, group.device).to(group.norms.dtype),
            # The other scales are free of it.
            self._loss_scale(group.device) if self._scale == "absolute" else None,
            self._control.max_push,
        )

    def _plain_arithmetic(self) -> Any:
        return torch.autocast(device_type=self._groups[0].device.type, enabled=False)

    def _check_gradients(self) -> tuple[set[str], DriftError | None]:
        """Return the targets that have no gradient, and the refusal of what cannot be injected."""
        missing = [group.targets[at].name for group in self._groups for at in group.missing()]
        refusal = None
        if len(missing) == len(self._targets):
            refusal = DriftError(
                "no target has a gradient, so nothing can be injected: call step() after backward "
                "and before zero_grad; an optimizer that steps inside backward cannot be used"
            )
        elif missing and self._strict:
            refusal = DriftError(
                f"{len(missing)} of {len(self._targets)} targets have no gradient, {missing[0]} "
                "first: they took no part in the loss. Leave them out with modules=… or layers=…, "
                "or pass strict=False to skip and count them"
            )
        for target in self._targets:
            gradients = [p.grad for p in target.trained if p.grad is not None]
            if any(gradient.layout != torch.strided for gradient in gradients):
                raise DriftError(f"the gradient of {target.name} is sparse, which is not supported")
        return set(missing), refusal

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

    def _any_gradient(self) -> weakref.ref[torch.Tensor] | None:
        for target in self._targets:
            if target.parameter.grad is not None:
                return weakref.ref(target.parameter.grad)
        return None

    def _refuse_sharding(
        self, targets: Sequence[Target], shards: Sequence[Shard], overlap: bool
    ) -> None:
        """Refuse what needs whole, final gradients inside backward where there are none.

        Raises:
            DriftError: a scope or an overlap that this way of training does not allow.
        """
        if self._scope == "step" and not overlap:
            return
        what = f'scope="{self._scope}"' if self._scope != "step" else "overlap=True"
        for target, shard in zip(targets, shards, strict=True):
            if not isinstance(shard, Whole):
                raise DriftError(
                    f"{what} needs whole gradients inside backward, and {target.name} is sharded "
                    f"({shard.sharding}): a hook there sees a part, or never runs. Use "
                    'scope="step" and overlap=False, or train with DDP or on one device'
                )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if overlap and distributed and torch.distributed.get_world_size() > 1:
            raise DriftError(
                "overlap=True needs gradients that are final inside backward; with several "
                "processes they are reduced after it. Use overlap=False"
            )

    def _refuse_adapted(
        self, targets: Sequence[Target], *, overlap: bool, rescale: Rescale
    ) -> None:
        """Refuse what has no meaning where weights move through adapters' factors.

        Raises:
            DriftError: such an option, and an adapted target.
        """
        adapted = next((target for target in targets if target.adapted is not None), None)
        if adapted is None:
            return
        reasons = {
            'scope="microbatch"': 'whose own gradient is never formed: use scope="step"',
            "overlap=True": "whose factors are injected into together: use overlap=False",
            "rescale": "whose norm, a quantised part included, is not at hand: leave it out",
        }
        given = (self._scope == "microbatch", overlap, rescale is not None)
        for option, reason in itertools.compress(reasons.items(), given):
            raise DriftError(f"{option} is not for {adapted.name}, an adapted weight {reason}")

    # The microbatch scope.

    def _hook_backward(self) -> None:
        for which, group in enumerate(self._groups):
            for at, target in enumerate(group.targets):
                hook = self._backward_hook(which, at)
                self._handles.append(torch.Tensor.register_hook(target.parameter, hook))  # type: ignore[no-untyped-call]

    def _backward_hook(self, which: int, at: int) -> Any:
        parameter = self._groups[which].targets[at].parameter

        @torch.no_grad()
        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            self._stepped = False
            pushes = self._begin() if self._pushes is None else self._pushes
            if not pushes:
                self._record.inject([parameter])
                return None
            with self._plain_arithmetic():
                # Autograd may share this tensor with other consumers, so it is not changed.
                injected = gradient.clone(memory_format=torch.contiguous_format)
                skipped = self._groups[which].inject_one(at, injected, pushes[which])
            self._record.inject([parameter], skipped)
            return injected

        return hook

    # The watchdog.

    def _watch(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Fail an optimizer step that would use gradients without the injection."""
        held, fresh = self._record.consume(optimizer)
        if held == 0:
            self._refuse_replaced(optimizer)
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
        if self._scope == "microbatch" and not self._stepped:
            # Several optimizers may step after one backward pass, which is one step.
            self._control.finish()
            self._pushes = None
        self._stepped = True

    def _refuse_replaced(self, optimizer: torch.optim.Optimizer) -> None:
        """Fail where an optimizer trains the model, and none of the targets can train any more."""
        model = self._model()
        if model is None or optimizer in self._foreign:
            return
        self._foreign.add(optimizer)
        present = {id(parameter) for parameter in model.parameters()}
        if any(id(p) in present and p.requires_grad for t in self._targets for p in t.trained):
            return
        if any(id(p) in present for group in optimizer.param_groups for p in group["params"]):
            raise DriftError(
                f"nothing can be injected before this step of {type(optimizer).__name__}: all "
                f"{len(self._targets)} targets were replaced or frozen after attaching, as by "
                "fully_shard or an adapter; attach after the model was wrapped"
            )

    def _require_attached(self) -> None:
        if not self._groups:
            raise DriftError("this injection was removed; attach a new one")


def _stored_origin(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Return ⟨θ_0, Δ⟩ by target from a state that came from a file.

    Raises:
        DriftError: not such a state, or one of other targets.
    """
    remedy = "resume from what state_dict() gave, with the same model, delta, modules and layers"
    if not isinstance(state, Mapping) or state.get("version") != _STATE_VERSION:
        raise DriftError(f"not the state of an injection of this version: {remedy}")
    origin = state.get("origin")
    if not isinstance(origin, Mapping) or not isinstance(state.get("control"), Mapping):
        raise DriftError(f"the state of an injection is incomplete: {remedy}")
    odd = sorted(map(str, origin.keys() ^ set(names)))
    if odd:
        raise DriftError(
            f"the saved injection and this one differ in {len(odd)} targets, {odd[0]} first: "
            f"{remedy}"
        )
    values = list(origin.values())
    if not all(is_number(value) for value in values):
        raise DriftError(f"the saved injection holds what is no finite number: {remedy}")
    return {name: float(value) for name, value in origin.items()}


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
