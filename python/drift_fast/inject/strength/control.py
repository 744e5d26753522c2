"""α in force at each step: per module and layer, by a schedule, a cap on λ, or a target λ.

Owns what a user states about α and the number of the step. α is a vector of shape [targets] on the
targets' device; it is computed there, and after the first call nothing waits for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from drift_fast.errors import DriftError, DriftWarning
from drift_fast.inject.config import CapBy, StrengthOptions
from drift_fast.inject.saved_state import (
    ControlState,
    check_version,
    damaged,
    first_difference,
    read_state,
    shown,
)
from drift_fast.inject.schedule import parse_schedule
from drift_fast.inject.strength.controllers import Aim, Cap, Sets
from drift_fast.inject.strength.formula import check_alpha
from drift_fast.inject.strength.per_module import (
    PerModule,
    layer_factors,
    per_target,
    plain,
    positive,
)
from drift_fast.names import kind_of

_STATE_VERSION = 1


class Control:
    """The strength of every target, step by step.

    A mapping of modules has the keys of a selection: presets such as `attn`, or `re:<pattern>`.
    If several match a target, the most specific one decides: `re:…` before a preset before `all`,
    and the first of several patterns. Every target must match a key, and every key must decide a
    target.

    A cap switches a target off for good once λ + look_ahead·(λ − λ of the step before) has reached
    it: Adam's momentum carries weights on by about nine times their last change. A target scales α
    between 0 and 4 times what is stated, so that the λ of all targets together, or of those of each
    entry, comes to it by the middle of the run and stays there.

    Args:
        names: the delta's name of every target.
        options: what is stated about α.
        squares: ‖Δ‖² of every target; needed for λ of several together.

    Raises:
        ValueError: an argument without meaning.
    """

    def __init__(
        self,
        names: Sequence[str],
        options: StrengthOptions,
        *,
        squares: Sequence[float] | None = None,
    ) -> None:
        self._names = list(names)
        self._step = 0
        self._layers = layer_factors(self._names, options.layer_alpha)
        self._schedule = parse_schedule(options.schedule)
        self._total = options.total_steps
        self._look_ahead = float(options.look_ahead)
        self.max_push = None if options.max_push is None else float(options.max_push)
        self._cap: Cap | None = None
        self._aim: Aim | None = None
        self._previous: torch.Tensor | None = None
        self._previous_step = 0
        self._where: tuple[torch.device, torch.dtype] | None = None
        self._vector: torch.Tensor | None = None
        caps = [math.inf] * len(self._names)
        self._planned: tuple[Any, ...] = ()
        if options.progress_cap is not None:
            caps = self._make_cap(options.progress_cap, options.cap_by, squares)
        if options.progress_target is not None:
            self._planned = (options.progress_target, caps, squares)
            self._make_aim(*self._planned)
        self._settings: dict[str, Any] = {
            "layer_alpha": None if options.layer_alpha is None else self._layers,
            "schedule": str(self._schedule),
            "total_steps": self._total,
            "progress_cap": plain(options.progress_cap),
            "cap_by": options.cap_by,
            "look_ahead": self._look_ahead,
            "progress_target": plain(options.progress_target),
            "max_push": self.max_push,
        }
        self._each = self._layers
        self.alpha = options.alpha
        # A schedule that cannot be followed is refused now, not after the first backward.
        self._factor()

    @property
    def alpha(self) -> float | dict[str, float]:
        """Strength as stated; may be set between steps."""
        return dict(self._alpha) if isinstance(self._alpha, Mapping) else self._alpha

    @alpha.setter
    def alpha(self, value: PerModule) -> None:
        alphas, _ = per_target(self._names, value, "alpha")
        if self.needs_progress and min(alphas, default=0.0) < 0:
            raise ValueError(
                f"progress_cap and progress_target are for alpha > 0, which moves towards them, "
                f"got alpha={value!r}; use a schedule instead"
            )
        self._alpha: float | dict[str, float]
        if isinstance(value, Mapping):
            self._alpha = {entry: float(each) for entry, each in value.items()}
            self._strength = 1.0
            by_target = [a * b for a, b in zip(alphas, self._layers, strict=True)]
        else:
            # One number stays on the host, so that setting it copies nothing to the device.
            self._alpha = self._strength = check_alpha(value)
            by_target = self._layers
        if by_target != self._each:
            self._vector = None
        self._each = by_target
        self._all_zero = self._strength == 0.0 or not any(by_target)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the run; setting another number plans anew over them.

        What a target λ has learned is forgotten then.

        Raises:
            ValueError: a schedule or a target that has no meaning for so many steps.
        """
        return self._total

    @total_steps.setter
    def total_steps(self, total: int | None) -> None:
        if total == self._total:
            return
        self._total = self._settings["total_steps"] = total
        if self._planned:
            self._make_aim(*self._planned)
            self._where = None
        self._factor()

    @property
    def needs_progress(self) -> bool:
        """Whether `alphas` must be given λ."""
        return self._cap is not None or self._aim is not None

    @property
    def constant_zero(self) -> bool:
        """Whether α is exactly 0 for every target at this step, without asking the device."""
        return self._all_zero or self._factor() == 0.0

    @property
    def step(self) -> int:
        """Number of the present step, from 0."""
        return self._step

    @property
    def stopped(self) -> int:
        """Targets that a cap has switched off; waits for the device."""
        return 0 if self._cap is None else int(self._cap.stopped.sum())

    def alphas(
        self,
        progress: torch.Tensor | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return α of every target for this step, shape [targets]; call it once for each step.

        Steps at which α is constantly zero may be left out, if `finish` is called for them. The
        result has the device and dtype of `progress`, which is λ of every target as the weights
        are now, or those given; without, it is float64 on the CPU and float32 elsewhere. The first
        call copies what was stated to the device.

        Raises:
            ValueError: no `progress`, or not of every target, where it is needed.
        """
        count = len(self._names)
        if progress is not None:
            if tuple(progress.shape) != (count,):
                raise ValueError(
                    f"expected λ of {count} targets, got a tensor of shape {list(progress.shape)}"
                )
            device, dtype = progress.device, progress.dtype
        elif self.needs_progress:
            raise ValueError("progress_cap and progress_target need λ of every target at each step")
        device = torch.device("cpu") if device is None else torch.device(device)
        if dtype is None:
            dtype = torch.float64 if device.type == "cpu" else torch.float32
        factor = self._factor()
        result = self._placed(device, dtype) * (self._strength * factor)
        return result if progress is None else self._steered(result, progress, factor)

    def factor(self, step: int) -> float:
        """Return the schedule's factor on α at a step, from 0."""
        return self._schedule(step, self._total)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Copy what was stated to the device now, so that no step waits for it."""
        self._placed(device, dtype)

    def finish(self) -> None:
        """Count a step as done."""
        self._step += 1

    def undo(self) -> None:
        """Uncount the last step, which the optimizer skipped; an aim keeps what it learned."""
        self._step = max(0, self._step - 1)

    def restart(self) -> None:
        """Start over at step 0, for a second run; targets that a cap has switched off stay off."""
        self._step = self._previous_step = 0
        self._previous = None
        if self._aim is not None:
            self._aim.restart()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, for JSON; waits for the device.

        λ is kept as it was measured: the resumed run must measure it from the same weights θ_0.
        """
        return {
            "version": _STATE_VERSION,
            "step": self._step,
            "names": list(self._names),
            "settings": self._described(),
            "progress": None if self._previous is None else self._previous.tolist(),
            "progress_step": self._previous_step,
            "stopped": None if self._cap is None else self._cap.stopped.tolist(),
            "aim": None if self._aim is None else self._aim.saved(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned; nothing is changed if it is refused.

        The options stated now apply. If they differ from those of the saved run, this warns with a
        DriftWarning.

        Raises:
            DriftError: not such a state, or one of other targets.
        """
        saved = read_state(state, ControlState, "a control")
        check_version("a control", saved.version, _STATE_VERSION)
        if saved.names != self._names:
            raise DriftError(
                f"the saved control is of {len(saved.names)} targets, this one of "
                f"{len(self._names)}, and they differ{first_difference(saved.names, self._names)}; "
                "attach the same delta with the same modules=… and layers=… as the run that is "
                "resumed"
            )
        if saved.progress_step > saved.step:
            raise damaged(
                "a control",
                f"progress_step must be a step up to {saved.step}, found {saved.progress_step}",
            )
        for key, values in (("progress", saved.progress), ("stopped", saved.stopped)):
            if values is not None and len(values) != len(self._names):
                raise damaged(
                    "a control", f"{key} must have {len(self._names)} values, found {len(values)}"
                )
        aim = None
        if self._aim is not None and saved.aim is not None:
            aim = self._aim.read_state(saved.aim)
        self._warn_of_change(saved.settings)
        self._step, self._previous_step = saved.step, saved.progress_step
        self._previous = (
            None if saved.progress is None else torch.tensor(saved.progress, dtype=torch.float64)
        )
        if self._cap is not None and saved.stopped is not None:
            self._cap.stopped = torch.tensor(saved.stopped, dtype=torch.bool)
        if self._aim is not None and aim is not None:
            self._aim.state = aim
        # All of it is moved to the device by the next call.
        self._where = None

    def _factor(self) -> float:
        return self._schedule(self._step, self._total)

    def _placed(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return α by target before the schedule, on the device, with all other state there."""
        if self._where != (device, dtype):
            self._where = (device, dtype)
            self._vector = None
            for part in (self._cap, self._aim):
                if part is not None:
                    part.place(device, dtype)
            if self._previous is not None:
                self._previous = self._previous.to(device, dtype)
        if self._vector is None:
            self._vector = torch.tensor(self._each, dtype=dtype, device=device)
        return self._vector

    def _steered(self, alphas: torch.Tensor, progress: torch.Tensor, factor: float) -> torch.Tensor:
        if not self.needs_progress:
            return alphas
        previous, gap = self._previous, None
        # Before two steps were seen, and where a step was seen twice, no change is known.
        if previous is None or self._step == self._previous_step:
            rate = torch.zeros_like(progress)
        else:
            gap = self._step - self._previous_step
            rate = (progress - previous) / gap
        known = torch.zeros_like(progress) if previous is None else previous
        self._previous = torch.where(torch.isfinite(progress), progress, known)
        self._previous_step = self._step
        if self._aim is not None:
            alphas = self._aim.apply(
                alphas, progress, rate, step=self._step, factor=factor, gap=gap
            )
        if self._cap is not None:
            alphas = self._cap.apply(alphas, progress + self._look_ahead * rate)
        return alphas

    def _make_cap(
        self, given: PerModule, cap_by: CapBy, squares: Sequence[float] | None
    ) -> list[float]:
        caps, entries = per_target(self._names, given, "progress_cap", infinite=True)
        if min(caps, default=1.0) <= 0:
            raise ValueError(f"progress_cap must be a λ above 0, got {given!r}")
        sets = None
        if cap_by == "overall":
            if isinstance(given, Mapping):
                raise ValueError(
                    "cap_by='overall' compares one λ and needs one progress_cap, got one by "
                    "module; pass a number, or cap_by='module'"
                )
            sets = Sets(["overall"] * len(caps), self._weights(squares, "cap_by='overall'"))
        elif cap_by == "module":
            kinds: Sequence[Hashable] = (
                entries if isinstance(given, Mapping) else [kind_of(name) for name in self._names]
            )
            sets = Sets(kinds, self._weights(squares, "cap_by='module'"))
        self._cap = Cap(caps, sets)
        return caps

    def _make_aim(
        self, given: PerModule, caps: Sequence[float], squares: Sequence[float] | None
    ) -> None:
        targets, entries = per_target(self._names, given, "progress_target")
        if min(targets, default=1.0) <= 0:
            raise ValueError(f"progress_target must be a λ above 0, got {given!r}")
        if any(cap <= target for cap, target in zip(caps, targets, strict=True)):
            raise ValueError(
                f"progress_cap, {min(caps):g} at the least, would stop targets before they reach "
                f"progress_target={given!r}; raise the cap or leave one of them out"
            )
        if self._total is None:
            raise ValueError(
                "progress_target plans over the run, whose length is not known: pass "
                "total_steps=…, the number of optimizer steps"
            )
        factors = [self._schedule(step, self._total) for step in range(self._total)]
        if min(factors) < 0 or not any(factors):
            raise ValueError(
                f"progress_target needs a schedule that is never negative and not always zero, got "
                f"{self._schedule}"
            )
        sets = Sets(entries, self._weights(squares, "progress_target"))
        # One for each set, in the order in which sets are found.
        of_set = dict(zip(entries, targets, strict=True))
        self._aim = Aim(sets, list(of_set.values()), factors, self._look_ahead)

    def _weights(self, squares: Sequence[float] | None, what: str) -> Sequence[float]:
        if squares is None:
            raise ValueError(f"{what} weighs λ by ‖Δ‖²: pass squares=…, one for each target")
        if len(squares) != len(self._names):
            raise ValueError(f"expected {len(self._names)} squares, got {len(squares)}")
        return [positive(square, "‖Δ‖²") for square in squares]

    def _described(self) -> dict[str, Any]:
        return {"alpha": plain(self.alpha), **self._settings}

    def _warn_of_change(self, settings: Mapping[str, Any]) -> None:
        changed = [
            f"{key} was {shown(settings.get(key))} and is {shown(value)}"
            for key, value in self._described().items()
            if settings.get(key) != value
        ]
        if changed:
            warnings.warn(
                f"the resumed run continues with other settings than it was saved with: "
                f"{'; '.join(changed)}. Pass what the saved run had to go on unchanged",
                DriftWarning,
                stacklevel=3,
            )


def limit(
    c: torch.Tensor, norm: torch.Tensor, delta_norm: torch.Tensor, max_push: float | None
) -> torch.Tensor:
    """Return c with ‖c·Δ‖ at most max_push·‖g‖ for every parameter; None sets no limit.

    `norm` is ‖g‖ and `delta_norm` is ‖Δ‖, all of shape [parameters] on one device. Where ‖g‖ is NaN
    the result is NaN too.
    """
    if max_push is None:
        return c
    largest = max_push * (norm / delta_norm)
    return torch.maximum(torch.minimum(c, largest), -largest)
