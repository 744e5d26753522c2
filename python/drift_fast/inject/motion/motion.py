"""Planned motion: after each of the first optimizer steps, W += λ·share·Δ, whatever the gradient.

Owns the life of a motion: targets found, Δ in its place, weights moved and reported. The increments
are a plan and no target: they add up to λ·Δ, and what the optimizer does to the weights comes on
top. Gradients, clipping and an optimizer's moments are not touched.
"""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from drift_fast.alignment.mapping import MappingLike
from drift_fast.errors import DriftError, DriftWarning
from drift_fast.inject.attachment import Attachment
from drift_fast.inject.compute.base import flattened
from drift_fast.inject.config import TargetOptions
from drift_fast.inject.driver import unwrap_optimizer
from drift_fast.inject.motion.master_weights import MasterWeights, find_key
from drift_fast.inject.motion.optimizer_steps import (
    EngineSteps,
    OptimizerSteps,
    parameters_of_optimizer,
)
from drift_fast.inject.motion.plan import Plan
from drift_fast.inject.motion.rounding import Thresholds, add_narrow, is_narrow
from drift_fast.inject.placement.load import Loading, load_groups
from drift_fast.inject.placement.residency import check_residency
from drift_fast.inject.refusals import check_optimized
from drift_fast.inject.schedule import ScheduleLike
from drift_fast.inject.shards import zero
from drift_fast.inject.shards.base import Shard
from drift_fast.inject.shards.find import process_groups_of, shards_of
from drift_fast.inject.shards.reduction import Reduction
from drift_fast.inject.shards.zero_support import is_engine, optimizer_of
from drift_fast.inject.strength.per_module import PerModule, per_target
from drift_fast.inject.targets import DeltaLike, Target, find_targets, opened
from drift_fast.inject.watchdog import claim, disclaim, refuse_second
from drift_fast.names import kind_of
from drift_fast.selection import Layers, Modules
from drift_fast.sizes import parse_size

logger = logging.getLogger(__name__)


class PlannedMotion(Attachment):
    """Move weights by λ·Δ in steps, one after each of the first `steps` optimizer steps.

    motion = PlannedMotion(model, delta, progress={"attn": 0.8, "mlp": 1.25}, steps=100,
                           optimizer=optimizer)

    With `optimizer` there is nothing to call: it moves whenever that optimizer has stepped, and a
    step that a gradient scaler leaves out does not count. Without, call `step()` after each
    `optimizer.step()`; a run that forgets to is stopped.

    A float32 weight moves by plain addition. A 16-bit weight moves through its float32 copy where
    the optimizer (or DeepSpeed) keeps one, and otherwise by increments that round so that none is
    lost on average: see `drift_fast.inject.motion.rounding`. Attach after the model was wrapped.

    Args:
        model, delta, modules, layers, mapping, residency, prefetch, strict, min_coverage: as those
            of `Injection`.
        progress: λ at the end, one number or one by module, such as {"attn": 0.8, "mlp": 1.25}:
            the share of Δ by which the weights are moved.
        steps: over how many optimizer steps.
        schedule: how these share the motion, evenly if None; a schedule as `Injection` takes, over
            `steps`, whose factors are normalised to a sum of one.
        optimizer: what steps the targets: a torch optimizer, the one that Accelerate returned, or
            a DeepSpeed engine, for which it is needed.
        seed: of the rounding of 16-bit weights.

    Raises:
        CoverageError: the delta does not fit the model; names and shapes are listed.
        DriftError: a frozen or an adapted target, one that the optimizer does not hold, a way of
            sharding that is not supported, or a target that has an injection or a motion already.
        NonFiniteError: the delta holds NaN or infinity.
        ValueError: an argument without meaning.
    """

    def __init__(
        self,
        model: nn.Module,
        delta: DeltaLike | str | os.PathLike[str],
        *,
        progress: PerModule,
        steps: int,
        schedule: ScheduleLike = None,
        modules: Modules | None = None,
        layers: Layers = None,
        mapping: MappingLike | None = None,
        residency: str = "auto",
        prefetch: int | str = "1GB",
        optimizer: Any = None,
        strict: bool = True,
        min_coverage: float | None = None,
        seed: int = 0,
    ) -> None:
        self._plan = Plan(progress, steps, schedule, seed)
        wanted = TargetOptions(
            modules=modules,
            layers=layers,
            mapping=mapping,
            strict=strict,
            min_coverage=min_coverage,
        )
        trained = tuple(model.parameters()) if isinstance(model, nn.Module) else ()
        loading = Loading(check_residency(residency), parse_size(prefetch), trained)
        with Reduction(process_groups_of(model)).together():
            delta = opened(delta)
            targets, self.coverage = find_targets(model, delta, wanted)
            _check_moved(targets)
            values, _ = per_target([target.delta_name for target in targets], progress, "progress")
            of_target = {target.name: value for target, value in zip(targets, values, strict=True)}
            refuse_second(targets)
            self._steps, shards = self._follow(model, targets, optimizer)
        self._groups, self.residency = load_groups(
            list(zip(targets, shards, strict=True)), delta, loading
        )
        self._targets = [target for group in self._groups for target in group.targets]
        held = {id(target) for target in self._targets}
        self._named = [target.name for target in targets if id(target) in held]
        self._progress = [
            [of_target[target.name] for target in group.targets] for group in self._groups
        ]
        self._factors = [
            group.vector(values) for group, values in zip(self._groups, self._progress, strict=True)
        ]
        self._thresholds = Thresholds(seed)
        # ⟨θ_0, Δ⟩ of each group's targets, on the host: a state may be asked for at every step.
        self._origin: list[list[float]] = []
        for group in self._groups:
            group.start(rescale=False)
            self._origin.append(group.origin)
            if any(is_narrow(shard.weight().dtype) for shard in group.shards):
                self._thresholds.prepare(group.device)
        logger.info(
            "moving %d parameters by λ = %.3g of Δ in %d steps, %.1f%% of the delta's selected "
            "elements and %.1f%% of the language backbone",
            len(self._targets),
            self._weighed("planned", self._progress)["planned"],
            steps,
            100 * self.coverage.fraction,
            100 * self.coverage.backbone_fraction,
        )
        self._taken = 0
        # Optimizers whose state was searched for copies of weights.
        self._searched: Any = weakref.WeakSet()
        self._steps.start()
        claim(self._targets, self)

    @property
    def targets(self) -> list[str]:
        """Names of the parameters that are moved."""
        return list(self._named)

    @property
    def steps(self) -> int:
        """Optimizer steps over which the plan moves."""
        return self._plan.steps

    @property
    def taken(self) -> int:
        """Optimizer steps after which it has moved."""
        return self._taken

    @property
    def finished(self) -> bool:
        """Whether the whole plan was carried out."""
        return self._taken >= self._plan.steps

    def step(self) -> None:
        """Move once, after the optimizer has stepped; nothing happens once the plan is finished.

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
        """Return where the weights are along Δ, and where the plan is; waits for the device.

        `progress` is λ = ⟨θ_t − θ_0, Δ⟩/‖Δ‖² over all targets, θ_0 being the weights at attachment;
        `planned` is what the motion alone has added up to. Each stands for module kinds too, as in
        `progress/attn` and `planned/attn`, and `progress/<parameter>` for one target. The
        difference is the optimizer's own motion. Under sharding every process must call this.
        """
        self._require_attached()
        actual = [group.progress().tolist() for group in self._groups]
        share = self._plan.share(self._taken)
        planned = [[share * value for value in values] for values in self._progress]
        each = {
            f"progress/{target.name}": value
            for group, values in zip(self._groups, actual, strict=True)
            for target, value in zip(group.targets, values, strict=True)
        }
        return (
            self._weighed("progress", actual)
            | self._weighed("planned", planned)
            | each
            | {"steps": float(self._taken)}
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON has it.

        It holds how many steps of the plan were taken, the plan, and where the weights started
        along Δ. Neither Δ nor weights are in it.
        """
        self._require_attached()
        origin = {
            target.name: value
            for group, values in zip(self._groups, self._origin, strict=True)
            for target, value in zip(group.targets, values, strict=True)
        }
        return self._plan.state_dict(self._taken, origin)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned, on the weights that were saved with it.

        Raises:
            DriftError: not such a state, or one of another plan; nothing is changed.
        """
        self._require_attached()
        names = {target.name for target in self._targets}
        self._taken, found = self._plan.resumed(state, names)
        for at, group in enumerate(self._groups):
            group.origin = self._origin[at] = [found[target.name] for target in group.targets]
        self._steps.restart(done=self.finished)

    def remove(self) -> None:
        """Detach from the model and free Δ; weights stay where they are. May be called twice."""
        if self._groups and not self.finished:
            logger.info("planned motion removed after %d of %d steps", self._taken, self.steps)
        self._steps.release()
        disclaim(self._targets, self)
        for group in self._groups:
            group.release()
        self._groups = []

    def __repr__(self) -> str:
        return (
            f"PlannedMotion({len(self._targets)} parameters, progress={self._plan.progress}, "
            f"{self._taken} of {self.steps} steps, residency={self.residency})"
        )

    # Where the weights are.

    def _follow(
        self, model: nn.Module, targets: Sequence[Target], optimizer: Any
    ) -> tuple[OptimizerSteps | EngineSteps, list[Shard]]:
        """Return what tells when the targets were stepped, and how their weights are reached."""
        parameters = [target.parameter for target in targets]
        if is_engine(optimizer):
            inner = optimizer_of(optimizer)
            if not isinstance(inner, torch.optim.Optimizer):
                names = [target.name for target in targets]
                return EngineSteps(inner, self._advance), zero.shards(names, parameters, inner)
            optimizer = inner
        if optimizer is not None:
            optimizer = unwrap_optimizer(optimizer)
            check_optimized(targets, optimizer)
        names = [target.name for target in targets]
        shards = shards_of(names, [target.parameter for target in targets], model)
        return OptimizerSteps(parameters, optimizer, self._stepped), shards

    @torch.no_grad()
    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        self._find_masters(optimizer)
        if optimizer is self._steps.given:
            self._advance()

    def _find_masters(self, optimizer: torch.optim.Optimizer) -> None:
        """Reach 16-bit weights through the float32 copies that an optimizer's state may hold."""
        if optimizer in self._searched:
            return
        self._searched.add(optimizer)
        held = parameters_of_optimizer(optimizer)
        found = [
            (group, at)
            for group in self._groups
            for at, shard in enumerate(group.shards)
            if id(group.targets[at].parameter) in held and is_narrow(shard.weight().dtype)
        ]
        parameters = [group.targets[at].parameter for group, at in found]
        key = find_key(optimizer, parameters)
        if key is None:
            return
        logger.info("moving %d parameters through %r of the optimizer's state", len(found), key)
        for (group, at), parameter in zip(found, parameters, strict=True):
            group.shards[at] = MasterWeights(group.shards[at], parameter, optimizer, key)

    # One step.

    @torch.no_grad()
    def _advance(self) -> None:
        """Carry out the next step of the plan; nothing waits for the device, but for the last."""
        if self.finished:
            return
        if self._taken + 1 == self.steps > 1:
            self._check_kept()
        before, after = self._plan.share(self._taken), self._plan.share(self._taken + 1)
        self._taken += 1
        for at, group in enumerate(self._groups):
            with torch.autocast(device_type=group.device.type, enabled=False):
                for start, stop, deltas in group.store.batches():
                    self._move(at, start, stop, deltas, before, after)
        self._steps.moved(done=self.finished)

    def _move(
        self,
        which: int,
        start: int,
        stop: int,
        deltas: Sequence[torch.Tensor],
        before: float,
        after: float,
    ) -> None:
        """Move the targets [start, stop) of a group."""
        group = self._groups[which]
        weights = [group.shards[at].weight() for at in range(start, stop)]
        with flattened(weights) as flats:
            wide = [at for at, flat in enumerate(flats) if not is_narrow(flat.dtype)]
            if wide:
                factors = self._factors[which][start:stop]
                if len(wide) < len(flats):
                    # A list as index would be copied to the device.
                    factors = torch.stack([factors[at] for at in wide])
                group.arithmetic.subtract(
                    [flats[at] for at in wide],
                    [deltas[at] for at in wide],
                    factors * (before - after),
                )
            for at, flat in enumerate(flats):
                if not is_narrow(flat.dtype):
                    continue
                value = self._progress[which][start + at]
                span = group.shards[start + at].span
                add_narrow(
                    flat,
                    deltas[at],
                    value * before,
                    value * after,
                    self._thresholds,
                    name=group.targets[start + at].delta_name,
                    start=0 if span is None else span[0],
                )
        for at, weight in enumerate(weights, start):
            group.shards[at].write_weight(weight)

    def _check_kept(self) -> None:
        """Warn if the weights have not kept what they were moved by; waits for the device once.

        What counts is the part of their motion that lies along the plan's, weighted by ‖Δ‖², so
        that modules which are planned to move apart do not cancel.
        """
        share = self._plan.share(self._taken)
        actual = [group.progress().tolist() for group in self._groups]
        squares = [group.squares() for group in self._groups]
        along = total = 0.0
        for found, values, weights in zip(actual, self._progress, squares, strict=True):
            for value, planned, square in zip(found, values, weights, strict=True):
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

    def _weighed(self, what: str, values: Sequence[Sequence[float]]) -> dict[str, float]:
        """Return the mean over all targets and over those of each kind, weighed by ‖Δ‖²."""
        sums: dict[str, list[float]] = {}
        for group, some in zip(self._groups, values, strict=True):
            for target, value, square in zip(group.targets, some, group.squares(), strict=True):
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
