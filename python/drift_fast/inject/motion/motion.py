"""Planned motion: after each of the first optimizer steps, W += λ·share·Δ, whatever the gradient.

Owns the life of a motion: targets found, Δ in its place, weights moved and reported. The increments
follow a schedule and aim at no λ: they add up to λ·Δ, and what the optimizer does to the weights
comes on top. Gradients, clipping and an optimizer's moments are not touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from drift_fast.delta.delta import open_delta
from drift_fast.delta.protocol import DeltaLike
from drift_fast.errors import DriftError, DriftWarning
from drift_fast.inject.attachment import Attachment
from drift_fast.inject.claims import Claim, refuse_second
from drift_fast.inject.driver import unwrap_optimizer
from drift_fast.inject.lost_steps import LostSteps
from drift_fast.inject.motion.master_weights import reach_master_weights
from drift_fast.inject.motion.moved_group import MovedGroup
from drift_fast.inject.motion.optimizer_steps import EngineSteps, OptimizerSteps
from drift_fast.inject.motion.options import MotionOptions
from drift_fast.inject.motion.rounding import Thresholds
from drift_fast.inject.motion.schedule import MotionSchedule
from drift_fast.inject.placement.load import Loading, Member, load_groups
from drift_fast.inject.refusals import check_optimized, check_trainable, statement
from drift_fast.inject.shards import zero
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.shards.find import all_processes, processes_of, shards_of
from drift_fast.inject.shards.reduction import Reduction
from drift_fast.inject.shards.zero_support import WIDER, is_engine, optimizer_of
from drift_fast.inject.strength.per_module import PerModule, per_target
from drift_fast.inject.target import Target
from drift_fast.inject.targets import find_targets
from drift_fast.names import kind_of
from drift_fast.options import takes
from drift_fast.sizes import parse_size

if TYPE_CHECKING:
    from drift_fast._keywords import MotionKeywords

logger = logging.getLogger(__name__)


@takes(MotionOptions)
class PlannedMotion(Attachment):
    """Move weights by λ·Δ in steps, one after each of the first `steps` optimizer steps.

    motion = PlannedMotion(model, delta, progress={"attn": 0.8, "mlp": 1.25}, steps=100,
                           optimizer=optimizer)

    With `optimizer` there is nothing to call: it moves whenever that optimizer has stepped, and a
    step that a gradient scaler leaves out does not count. Without, call `step()` after each
    `optimizer.step()`; a run that forgets to is stopped.

    A float32 weight moves by plain addition. A 16-bit weight moves through its float32 copy where
    the optimizer (or DeepSpeed) keeps one, and elsewhere by increments whose rounding loses nothing
    on average: see `drift_fast.inject.motion.rounding`. What an optimizer adds to such weights may
    be lost as under an injection, which is warned of. Attach after the model was wrapped.

    Args:
        model: as that of `Injection`.
        delta: as that of `Injection`.
        progress: λ at the end, one number or one by module, such as {"attn": 0.8, "mlp": 1.25}:
            the share of Δ by which the weights are moved.
        steps: the number of optimizer steps over which they move.
        optimizer: what steps the targets: a torch optimizer, the one that Accelerate returned, or
            a DeepSpeed engine, which must be given.
        options: those of `MotionOptions`, listed below.

    Raises:
        CoverageError: the delta does not fit the model; names and shapes are listed.
        DriftError: a target that is frozen, adapted or cannot be trained, one that the optimizer
            does not hold, a way of sharding that is not supported, a target that has an injection
            or a motion already, or another process that failed, with its rank and message.
        NonFiniteError: the delta holds NaN or infinity.
        TypeError: an unknown or retired keyword.
        ValueError: an argument without meaning.
    """

    # How to train float32 weights in a training library; empty for a loop's or the shards' way.
    _wider = ""

    def __init__(
        self,
        model: nn.Module,
        delta: DeltaLike | str | os.PathLike[str],
        *,
        progress: PerModule,
        steps: int,
        optimizer: Any = None,
        **options: Unpack[MotionKeywords],
    ) -> None:
        self._groups: list[MovedGroup] = []
        self._taken = 0
        # Optimizers whose state was searched for copies of weights.
        self._searched: Any = weakref.WeakSet()
        self._undo = contextlib.ExitStack()
        everyone = Reduction(all_processes() if is_engine(optimizer) else self._processes(model))
        with everyone.together(self._undo.close):
            wanted = MotionOptions.from_keywords(options, function="PlannedMotion")
            self._schedule = MotionSchedule(progress, steps, wanted.schedule, wanted.seed)
            with everyone.together():
                delta = open_delta(delta)
                targets, shards = self._find(model, delta, wanted, optimizer)
                stated = statement(wanted, targets, delta)
            everyone.refuse_different([f"progress={progress!r}", f"steps={steps}", *stated])
            self._load(model, list(zip(targets, shards, strict=True)), delta, wanted, everyone)
            self._attach(model, optimizer)

    @property
    def targets(self) -> list[str]:
        """Names of the parameters that are moved."""
        return list(self._named)

    @property
    def steps(self) -> int:
        """Optimizer steps over which the weights move."""
        return self._schedule.steps

    @property
    def taken(self) -> int:
        """Optimizer steps after which it has moved."""
        return self._taken

    @property
    def finished(self) -> bool:
        """Whether the whole motion was carried out."""
        return self._taken >= self._schedule.steps

    def step(self) -> None:
        """Move once, after the optimizer has stepped; nothing happens once the motion is finished.

        Raises:
            DriftError: no optimizer has stepped the targets since the last call, or the motion was
                given its optimizer and needs no call.
        """
        self._require_attached()
        if self._steps.given is not None:
            raise DriftError(
                "this motion was given its optimizer and moves when that steps: leave step() out, "
                "or attach without optimizer=…"
            )
        if self.finished:
            return
        if not self._steps.fresh:
            raise DriftError(
                "no optimizer that holds the targets has stepped since the last call: call step() "
                "once, after optimizer.step(). Where a gradient scaler may leave a step out, or "
                "the optimizer is not torch's, pass optimizer=… instead and leave step() out"
            )
        self._advance()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return the progress of the weights along Δ, and the planned one; waits for the device.

        `progress` is λ = ⟨θ_t − θ_0, Δ⟩/‖Δ‖² over all targets, θ_0 being the weights at attachment;
        `planned` is what the motion alone has added up to. Both are given for module kinds too, as
        in `progress/attn` and `planned/attn`, and `progress/<parameter>` for one target. The
        difference is the optimizer's own motion. Under sharding every process must call this.
        """
        self._require_attached()
        actual = self._measured()
        share = self._schedule.share(self._taken)
        each = list(self._each())
        return (
            self._means("progress", actual)
            | self._means("planned", [share * planned for _, planned, _ in each])
            | {
                f"progress/{target.name}": value
                for (target, _, _), value in zip(each, actual, strict=True)
            }
            | {"steps": float(self._taken)}
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON has it.

        It holds the number of steps taken, the schedule, and where the weights started along Δ.
        Neither Δ nor weights are in it.
        """
        self._require_attached()
        origin = {name: value for group in self._groups for name, value in group.origin.items()}
        return self._schedule.state_dict(self._taken, origin)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned, on the weights that were saved with it.

        Raises:
            DriftError: not such a state, or one of another motion; nothing is changed.
        """
        self._require_attached()
        names = {target.name for target in self._targets}
        self._taken, found = self._schedule.resumed(state, names)
        for group in self._groups:
            group.origin = found
        self._steps.restart(done=self.finished)
        self._keep()

    def remove(self) -> None:
        """Detach from the model and free Δ; weights stay where they are. May be called twice."""
        if self._groups and not self.finished:
            logger.info("planned motion removed after %d of %d steps", self._taken, self.steps)
        self._undo.close()
        self._groups, self._claim.kept = [], None

    def __repr__(self) -> str:
        return (
            f"PlannedMotion({len(self._targets)} parameters, progress={self._schedule.progress}, "
            f"{self._taken} of {self.steps} steps, residency={self.residency})"
        )

    # How it attaches.

    def _processes(self, model: nn.Module) -> tuple[Any, ...]:
        """Return the groups of all processes that train the model together."""
        return processes_of(model)

    def _find(
        self, model: nn.Module, delta: DeltaLike, wanted: MotionOptions, optimizer: Any
    ) -> tuple[list[Target], list[Shard]]:
        """Return the targets and how they are reached, and get ready to follow the optimizer.

        Raises:
            CoverageError, DriftError: a target is missing, or cannot be moved.
        """
        targets, self.coverage = find_targets(model, delta, wanted)
        check_trainable(targets, model)
        _check_moved(targets)
        names = [target.delta_name for target in targets]
        values, _ = per_target(names, self._schedule.progress, "progress")
        self._planned = dict(zip((target.name for target in targets), values, strict=True))
        refuse_second(targets, model)
        self._steps, shards = self._follow(model, targets, optimizer)
        return targets, shards

    def _load(
        self,
        model: nn.Module,
        members: Sequence[Member],
        delta: DeltaLike,
        wanted: MotionOptions,
        everyone: Reduction,
    ) -> None:
        """Bring Δ to where it lives; targets whose Δ is zero are left out."""
        prefetch = parse_size(wanted.prefetch)
        loading = Loading(wanted.residency, prefetch, tuple(model.parameters()), everyone)
        groups, self.residency = load_groups(members, delta, loading)
        thresholds = Thresholds(wanted.seed)
        self._groups = [
            MovedGroup(group, [self._planned[target.name] for target in group.targets], thresholds)
            for group in groups
        ]
        self._targets = [target for group in groups for target in group.targets]
        held = {id(target) for target in self._targets}
        self._named = [target.name for target, _ in members if id(target) in held]
        logger.info(
            "moving %d parameters by λ = %.3g of Δ in %d steps, %.1f%% of the delta's selected "
            "elements and %.1f%% of the language backbone",
            len(self._targets),
            self._means("planned", [target[1] for target in self._each()])["planned"],
            self.steps,
            100 * self.coverage.fraction,
            100 * self.coverage.backbone_fraction,
        )

    def _attach(self, model: nn.Module, optimizer: Any) -> None:
        """Follow the optimizer's steps from now on, and warn of those that are lost."""
        groups = [moved.group for moved in self._groups]
        wider = WIDER if is_engine(optimizer) else self._wider
        self._lost_steps = LostSteps(groups, wider, along=False)
        for group in groups:
            self._undo.callback(group.release)
        self._undo.callback(self._lost_steps.remove)
        stepping = getattr(self._steps.given, "optimizer", self._steps.given)
        if isinstance(stepping, torch.optim.Optimizer):
            self._lost_steps.see(stepping)
        self._steps.start()
        self._undo.callback(self._steps.release)
        nothing = contextlib.ExitStack()
        self._claim = Claim(self._targets, self, nothing, what="a planned motion").take(model)
        self._undo.callback(self._claim.release)
        self._keep()

    def _keep(self) -> None:
        """Live as long as the model until the motion is finished, whoever refers to it."""
        self._claim.kept = None if self.finished else self

    def _follow(
        self, model: nn.Module, targets: Sequence[Target], optimizer: Any
    ) -> tuple[OptimizerSteps | EngineSteps, list[Shard]]:
        """Return what says when the targets were stepped, and how their weights are reached."""
        names = [target.name for target in targets]
        parameters = [target.parameter for target in targets]
        if is_engine(optimizer):
            inner = optimizer_of(optimizer)
            if not isinstance(inner, torch.optim.Optimizer):
                return EngineSteps(inner, self._advance), zero.shards(names, parameters, inner)
            optimizer = inner
        if optimizer is not None:
            optimizer = unwrap_optimizer(optimizer)
            check_optimized(targets, optimizer)
        shards = shards_of(names, parameters, model)
        return OptimizerSteps(parameters, optimizer, self._stepped), shards

    # One step.

    @torch.no_grad()
    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer not in self._searched:
            self._searched.add(optimizer)
            reach_master_weights([moved.group for moved in self._groups], optimizer)
        if optimizer is self._steps.given:
            self._advance()

    @torch.no_grad()
    def _advance(self) -> None:
        """Carry out the next step of the motion; only the last one waits for the device."""
        if self.finished:
            return
        if self._taken + 1 == self.steps > 1:
            self._check_kept()
        before, after = self._schedule.share(self._taken), self._schedule.share(self._taken + 1)
        self._taken += 1
        for moved in self._groups:
            moved.move(before, after)
        self._steps.moved(done=self.finished)
        self._keep()

    def _check_kept(self) -> None:
        """Warn if the weights have not kept what they were moved by; waits for the device once.

        What counts is the part of their motion that is along the planned one, weighted by ‖Δ‖², so
        that modules which are planned to move in opposite directions do not cancel.
        """
        share = self._schedule.share(self._taken)
        along = total = 0.0
        for value, (_, planned, square) in zip(self._measured(), self._each(), strict=True):
            along += value * planned * square
            total += share * planned**2 * square
        if total > 0 and not along > 0.5 * total:
            warnings.warn(
                f"after {self._taken} of {self.steps} steps of a planned motion the weights are "
                f"{along / total:.0%} of the way that they were moved: the optimizer moves them "
                "back, or overwrites them with a copy of its own that this library does not know",
                DriftWarning,
                stacklevel=2,
            )

    # What is reported.

    def _each(self) -> Iterator[tuple[Target, float, float]]:
        """Yield every target with its λ at the end and its ‖Δ‖²."""
        for moved in self._groups:
            yield from moved.targets()

    def _measured(self) -> list[float]:
        """Return λ of every target as its weights are now."""
        return [value for moved in self._groups for value in moved.group.progress().tolist()]

    def _means(self, what: str, values: Sequence[float]) -> dict[str, float]:
        """Return the mean over all targets and over those of each kind, weighted by ‖Δ‖²."""
        sums: dict[str, list[float]] = {}
        for (target, _, square), value in zip(self._each(), values, strict=True):
            for key in (what, f"{what}/{kind_of(target.delta_name)}"):
                pair = sums.setdefault(key, [0.0, 0.0])
                pair[0] += value * square
                pair[1] += square
        return {key: moved / total for key, (moved, total) in sums.items()}

    def _require_attached(self) -> None:
        if not self._groups:
            raise DriftError("this motion was removed; attach a new one")


def _check_moved(targets: Sequence[Target]) -> None:
    """Refuse what no optimizer steps, and what is computed of other parameters.

    Raises:
        DriftError: an adapted or a frozen target.
    """
    adapted = [target.name for target in targets if target.adapted is not None]
    if adapted:
        raise DriftError(
            f"{adapted[0]} trains through an adapter (LoRA), whose factors cannot move by a share "
            "of Δ: merge λ·Δ into the model before the adapter is added, train the full "
            "parameters, or use Injection"
        )
    frozen = [target.name for target in targets if not target.parameter.requires_grad]
    if frozen:
        raise DriftError(
            f"{len(frozen)} of {len(targets)} targets are frozen (requires_grad is False), "
            f"{frozen[0]} first: unfreeze it, leave it out with modules=… or layers=…, or merge "
            "λ·Δ into it before training"
        )
