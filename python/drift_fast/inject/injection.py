"""An injection: attached to a model that trains, it changes gradients along a delta.

Owns the life of an attachment: targets found, Δ in its place, the scope that runs it, and removal.
One attachment per parameter at a time.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drift_fast.delta.delta import open_delta
from drift_fast.delta.protocol import DeltaLike
from drift_fast.errors import DriftError
from drift_fast.inject.attachment import Attachment
from drift_fast.inject.claims import Claim, refuse_second
from drift_fast.inject.config import ConfigLike, InjectionConfig
from drift_fast.inject.driver import Driver
from drift_fast.inject.forecast import look_ahead
from drift_fast.inject.lost_steps import LostSteps
from drift_fast.inject.microbatch_scope import MicrobatchScope
from drift_fast.inject.missing import MissingAccount
from drift_fast.inject.placement.load import Loading, Member, load_groups
from drift_fast.inject.predict import Outlook
from drift_fast.inject.presence import lost_from
from drift_fast.inject.pushes import Pushes
from drift_fast.inject.refusals import (
    check_adapted,
    check_doras,
    check_optimized,
    check_sharding,
    check_trainable,
    check_trained,
    statement,
)
from drift_fast.inject.saved_state import (
    InjectionState,
    check_targets,
    check_version,
    read_state,
)
from drift_fast.inject.scope import Scope
from drift_fast.inject.shards.reduction import Reduction
from drift_fast.inject.step_scope import StepScope
from drift_fast.inject.strength.control import Control
from drift_fast.inject.strength.per_module import PerModule
from drift_fast.inject.targets import find_targets
from drift_fast.inject.telemetry import (
    AngleHint,
    append_rows,
    keep,
    measure,
    module_table,
    summarize,
)
from drift_fast.inject.watchdog import Watchdog
from drift_fast.options import takes
from drift_fast.sizes import parse_size
from drift_fast.tables import Block, Shown

if TYPE_CHECKING:
    from typing import Unpack

    from matplotlib.figure import Figure

    from drift_fast._keywords import InjectionKeywords

logger = logging.getLogger(__name__)

_STATE_VERSION = 1


@takes(InjectionConfig)
class Injection(Attachment, Shown):
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
        delta: an open `Delta`, one that streams, or the directory, Hub id or URL of one; its names
            are matched to the model's.
        config: an `InjectionConfig`, or the path of a YAML or JSON file of its options, such as
            `delta/injection.yaml`; options given as keywords win over it.
        optimizer: the optimizer that will step the model; given, it is checked at once that it
            holds every target. Needed with `scaler` and "absolute".
        scaler: the torch.amp.GradScaler in use; "absolute" follows its scale until
            `scaler.unscale_(optimizer)`. The other scales do not need it.
        driver: what a training library does differently, for integrations; it has an optimizer and
            a scaler of its own.
        options: those of `InjectionConfig`, listed below.

    Where several processes train the model, all of them raise if one does, or if they differ.

    Raises:
        CoverageError: the delta does not fit the model; names and shapes are listed.
        DriftError: a target that is frozen or cannot be trained, one that the optimizer does not
            hold, a way of sharding that is not supported, a second attachment, or another
            process that failed, with its rank and message.
        NonFiniteError: the delta holds NaN or infinity.
        ValueError: an argument without meaning.
    """

    def __init__(
        self,
        model: nn.Module,
        delta: DeltaLike | str | os.PathLike[str],
        config: ConfigLike = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        driver: Driver | None = None,
        **options: Unpack[InjectionKeywords],
    ) -> None:
        self._undo = contextlib.ExitStack()
        everyone = Reduction((driver or Driver()).processes(model))
        with everyone.together(self._undo.close):
            self._config = InjectionConfig.resolve(config, options, function="Injection")
            if driver is None:
                driver = Driver(optimizer, scaler)
            elif optimizer is not None or scaler is not None:
                raise ValueError("a driver has its own optimizer and scaler; leave them out")
            self._driver = driver
            driver.check(self._config)
            with everyone.together():
                delta = open_delta(delta)
                members = self._find(model, delta)
                stated = statement(self._config, [target for target, _ in members], delta)
            everyone.refuse_different(stated)
            self._load(members, delta, model, everyone)
            for group in self._groups:
                group.start(rescale=self._config.rescale is not None)
            self._control = Control(
                [target.delta_name for target in self._targets],
                self._config,
                squares=[square for group in self._groups for square in group.squares()],
            )
            home = self._groups[0]
            self._control.place(home.device, home.norms.dtype)
            self._missing = MissingAccount(self._targets, self._config.missing_gradients)
            self._hint = AngleHint(self._config.scale)
            self.history: dict[int, dict[str, float]] = {}
            self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        """Put hooks on parameters and optimizers; what undoes it refers to all but this object."""
        self._lost_steps = LostSteps(self._groups, self._driver.wider)
        if self._driver.stepping is not None:
            self._lost_steps.see(self._driver.stepping)
        self._claim = Claim(self._targets, self, self._undo)
        written = [accumulated for group in self._groups for accumulated in group.accumulated()]
        self._watchdog = Watchdog(
            model,
            self._targets,
            written,
            self._claim,
            scope=self._config.scope,
            missing=self._missing,
            remedy=self._driver.missed,
            optimizer_is_given=self._driver.optimizer is not None,
        )
        self._scope = self._make_scope()
        self._undo.callback(self._lost_steps.remove)
        for group in self._groups:
            self._undo.callback(group.release)
        self._undo.callback(self._scope.close)
        handles = [*self._driver.start(self._scope), *self._watchdog.handles, *self._scope.handles]
        for handle in handles:
            self._undo.callback(handle.remove)
        self._undo.callback(self._claim.take(model).release)

    def _find(self, model: nn.Module, delta: DeltaLike) -> list[Member]:
        """Return the targets and how they are reached, in the order of the model.

        Raises:
            CoverageError, DriftError: a target is missing, or cannot be injected into.
        """
        targets, self.coverage = find_targets(model, delta, self._config)
        check_trainable(targets, model)
        check_trained(targets, model)
        check_adapted(targets, self._config)
        if self._driver.optimizer is not None:
            check_optimized(targets, self._driver.optimizer)
        refuse_second(targets, model)
        shards = self._driver.shards(model, targets)
        check_doras(targets, shards)
        check_sharding(targets, shards, self._config)
        return list(zip(targets, shards, strict=True))

    def _load(
        self, members: Sequence[Member], delta: DeltaLike, model: nn.Module, everyone: Reduction
    ) -> None:
        """Bring Δ to where it lives; targets whose Δ is zero are left out."""
        logger.info(
            "injecting into %d parameters, %.1f%% of the delta's selected elements and %.1f%% of "
            "the language backbone; %d tensors of the delta have no parameter",
            len(members),
            100 * self.coverage.fraction,
            100 * self.coverage.backbone_fraction,
            len(self.coverage.unmatched_reasoning),
        )
        # A hook inside backward needs all of Δ at any time.
        residency = "device" if self._config.scope == "microbatch" else self._config.residency
        prefetch = parse_size(self._config.prefetch)
        loading = Loading(residency, prefetch, tuple(model.parameters()), everyone)
        self._groups, self.residency = load_groups(members, delta, loading)
        self._targets = [target for group in self._groups for target in group.targets]
        held = {id(target) for target in self._targets}
        self._named = [target.name for target, _ in members if id(target) in held]

    def _make_scope(self) -> Scope:
        config, driver = self._config, self._driver
        pushes = Pushes(self._groups, self._control, config.scale, driver.loss_scale)
        if config.scope == "microbatch":
            return MicrobatchScope(self._groups, pushes, self._watchdog)
        return StepScope(
            self._groups,
            pushes,
            self._watchdog,
            missing=self._missing,
            overlap=config.overlap,
        )

    @property
    def alpha(self) -> float | dict[str, float]:
        """Strength as stated, before schedules and caps; may be set between steps."""
        return self._control.alpha

    @alpha.setter
    def alpha(self, value: PerModule) -> None:
        self._control.alpha = value
        self._scope.restate()

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
        return self._watchdog.injected()

    @property
    def skipped(self) -> int:
        """Parameters that the last step left alone: their gradient was not finite, or missing.

        Reading it on an accelerator waits for the device.
        """
        return self._watchdog.skipped()

    @property
    def lost_steps(self) -> LostSteps:
        """What 16-bit weights lose of the optimizer's steps, for integrations that forecast."""
        return self._lost_steps

    @property
    def control(self) -> Control:
        """What decides α at each step, for integrations that restart or forecast a run."""
        return self._control

    def look_ahead(self, optimizer: Any, rates: Sequence[float], *, known: bool) -> Outlook:
        """As `forecast.look_ahead`, for integrations that know the learning rates."""
        return look_ahead(self._groups, self._control, self._config, optimizer, rates, known=known)

    def step(self) -> None:
        """Inject into the accumulated gradients, once, before clipping and the optimizer's step.

        Raises:
            DriftError: a gradient is missing, this gradient was injected already, or the injection
                runs by itself: in the scope "microbatch", or driven by a training library.
        """
        if self._driver.runs_by_itself is not None:
            raise DriftError(self._driver.runs_by_itself)
        self._require_attached()
        self._scope.step()

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Mark backward passes whose gradients are not final yet, with `overlap=True`.

        with injection.accumulating():
            loss(model, first_half).backward()
        loss(model, second_half).backward()
        injection.step()
        """
        with self._scope.accumulating():
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
        cap has switched off. Where experts may have no gradient, `missing_gradients` is how many
        had none in the last step, and `never_had_gradient` how many had none in any step so far.
        Under sharding every process must call this.
        """
        self._require_attached()
        self._scope.settle()
        found = measure(self._groups, self._control)
        self._hint.see(self.steps, found)
        return found | {
            "injected": float(self.injected),
            "skipped": float(self.skipped),
            **self._missing.metrics(),
        }

    def summary(self) -> dict[str, float]:
        """Return a few dozen metrics for a log; waits for the device, as `metrics` does.

        Overall, by kind and by module (`progress/attn`, `progress/q_proj`, …): λ, cos(g, Δ),
        `relative_push`, α in force, and what was skipped or stopped. What is returned is kept in
        `history`, by step, for `plot`: of long runs every second one, then every fourth, and so on.
        """
        found = summarize(self.metrics(), self._groups)
        keep(self.history, self.steps, found)
        return found

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw λ by module with its forecast, cos(g, Δ), push and α, as `history` has them.

        A figure of Matplotlib, which a notebook shows; it is written to a path if that is given.

        Raises:
            DriftError: no summary was taken.
            ImportError: matplotlib is not installed.
        """
        from drift_fast.inject.plot import plot_history

        return plot_history(self.history, path)

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
        saved = read_state(state, InjectionState, "an injection")
        check_version("an injection", saved.version, _STATE_VERSION)
        check_targets("injection", saved.origin, [target.name for target in self._targets])
        self._control.load_state_dict(saved.control)
        self._scope.restate()
        for group in self._groups:
            group.origin = [saved.origin[target.name] for target in group.targets]

    def remove(self) -> None:
        """Detach from the model and free Δ; gradients are left as they are. May be called twice."""
        self._undo.close()
        self._groups.clear()

    def lost_from(self, model: nn.Module) -> list[str]:
        """Return the targets that are not trained parameters of a model, such as one wrapped since.

        Those that an adapter has frozen since are among them.
        """
        lost = set(lost_from(model, self._targets))
        return [t.name for t in self._targets if t.name in lost or not t.trains]

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that does not step every target, for integrations that know it.

        Warns where it leaves 16-bit weights as they are in most steps.

        Raises:
            DriftError: a target is in none of its parameter groups.
        """
        check_optimized(self._targets, optimizer)
        self._lost_steps.see(optimizer)

    def headline(self) -> str:
        """Return how many parameters are injected into, and how."""
        return (
            f"{len(self._targets)} parameters, scale={self._config.scale}, "
            f"alpha={self.alpha}, scope={self._config.scope}, residency={self.residency}"
        )

    def blocks(self) -> list[Block]:
        """Return what is injected into, by module, and what the last summary said."""
        now = f"{self.headline()}; {self.steps} steps"
        return [now, module_table(self._targets, self.history), str(self.coverage)]

    def records(self) -> list[dict[str, Any]]:
        """Return the summary of each step that has one."""
        return [{"step": step, **found} for step, found in sorted(self.history.items())]

    def _require_attached(self) -> None:
        if not self._groups:
            raise DriftError("this injection was removed; attach a new one")
