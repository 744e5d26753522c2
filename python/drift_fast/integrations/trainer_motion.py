"""The Hugging Face Trainer: planned motion in the first share of a run, logged, saved and resumed.

Owns when the motion is attached: at the start of training, when the model and the optimizer are
wrapped and the number of steps is known. The motion then follows the optimizer by itself.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from drift_fast.delta.delta import open_delta
from drift_fast.delta.protocol import DeltaLike
from drift_fast.errors import DriftError, DriftWarning
from drift_fast.inject.motion.motion import PlannedMotion
from drift_fast.inject.motion.options import MotionOptions
from drift_fast.inject.shards.find import all_processes
from drift_fast.inject.shards.reduction import Reduction
from drift_fast.inject.strength.per_module import PerModule, number
from drift_fast.integrations.hf_trainer import TrainerDriver
from drift_fast.integrations.trainer_run import CheckpointedState, bare_model, engine_of
from drift_fast.integrations.wrapped_method import WrappedMethod

# Where the trainer's state, which every checkpoint holds, keeps that of the motion.
_KEY = "drift_fast.PlannedMotion"


class _Motion(PlannedMotion):
    _wider = TrainerDriver.wider

    def _processes(self, model: Any) -> tuple[Any, ...]:
        return all_processes()


class TrainerMotion(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """A planned motion that begins with a Trainer's run; `motion` is None before that."""

    def __init__(
        self,
        trainer: Any,
        delta: DeltaLike,
        progress: PerModule,
        steps: int | None,
        window: float,
        options: dict[str, Any],
    ) -> None:
        self.motion: PlannedMotion | None = None
        self._model: Any = None
        self._ended = False
        self._trainer = trainer
        self._delta = delta
        self._progress = progress
        self._steps = steps
        self._window = window
        self._options = options
        self._log_method = WrappedMethod(trainer, "log", self._log)
        self._saves = CheckpointedState(trainer, _KEY, self._state)
        trainer.add_callback(self)

    def metrics(self) -> dict[str, float]:
        """Return those of the motion.

        Raises:
            DriftError: training has not begun.
        """
        if self.motion is None:
            raise DriftError("the motion begins with trainer.train(); there are no metrics before")
        return self.motion.metrics()

    def remove(self) -> None:
        """Detach from trainer and model, and free Δ; weights stay where they are."""
        if self in self._trainer.callback_handler.callbacks:
            self._trainer.remove_callback(self)
        self._log_method.remove()
        self._saves.remove()
        if self.motion is not None:
            self.motion.remove()
            self.motion = None

    # What the trainer calls.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            self._saves.refuse_unloaded(state.global_step)
        saved = self._saves.found_in(state) or self._begun()
        if self.motion is not None:
            self.motion.remove()
        steps = self._length(state.max_steps, saved)
        engine = engine_of(self._trainer)
        self.motion = _Motion(
            engine or self._trainer.model_wrapped,
            self._delta,
            progress=self._progress,
            steps=steps,
            optimizer=engine or self._trainer.optimizer,
            **self._options,
        )
        self._model, self._ended = bare_model(self._trainer), False
        if saved is not None:
            self.motion.load_state_dict(saved)
        elif state.global_step > 0:
            warnings.warn(
                f"the run resumes at step {state.global_step} from a checkpoint without the state "
                f"of a planned motion: it is carried out in the next {steps} steps",
                DriftWarning,
                stacklevel=2,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ended = True
        if self.motion is not None and not self.motion.finished:
            warnings.warn(
                f"the run ended after {self.motion.taken} of {self.motion.steps} steps of its "
                "planned motion, short of the planned progress",
                DriftWarning,
                stacklevel=2,
            )

    def _begun(self) -> Mapping[str, Any] | None:
        """Return the state of a motion that a run without an end has begun, which goes on with it.

        A batch size that did not fit is tried again smaller, from the start.

        Raises:
            DriftError: a run that has ended has moved these weights already.
        """
        if self.motion is None or self.motion.taken == 0:
            return None
        if self._model is not bare_model(self._trainer):
            return None
        if self._ended:
            raise DriftError(
                f"this motion has moved the weights {self.motion.taken} times already, and a "
                "second run would move them again from the start: remove() it first, and "
                "attach again if you want that"
            )
        return self.motion.state_dict()

    def _length(self, total: int, saved: Mapping[str, Any] | None) -> int:
        """Return over how many steps to move, in a run of `total`.

        What has begun goes on with the steps that it was planned with.
        """
        plan = None if saved is None or self._steps is not None else saved.get("plan")
        begun = plan.get("steps") if isinstance(plan, Mapping) else None
        if type(begun) is int and 0 < begun <= total:
            return begun
        if self._steps is None:
            # 0.07 · 100 is 7.000000000000001, which is meant to be seven.
            return max(1, math.ceil(self._window * total - 1e-9))
        if self._steps > total:
            raise DriftError(
                f"a motion over steps={self._steps} does not end in a run of {total} optimizer "
                "steps; pass fewer, or a window=… of the run"
            )
        return self._steps

    def _state(self) -> dict[str, Any] | None:
        return None if self.motion is None else self.motion.state_dict()

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Evaluation and the closing summary are logged through the same method.
        if "loss" in logs and self.motion is not None:
            found = self.motion.metrics()
            parameters = {f"progress/{name}" for name in self.motion.targets}
            logs = logs | {
                f"drift/{key}": value
                for key, value in found.items()
                if key.startswith(("progress", "planned")) and key not in parameters
            }
        self._log_method.original(logs, *args, **kwargs)


def attach_motion(
    trainer: Any,
    delta: Any,
    *,
    progress: PerModule,
    window: float = 0.1,
    steps: int | None = None,
    **options: Any,
) -> TrainerMotion:
    """Move a Trainer's model by λ·Δ in the first share of its run, besides what it trains.

    Works with subclasses, DDP, FSDP and DeepSpeed alike; steps that float16 training skips do not
    count. λ as measured and as planned join the training logs under `drift/progress` and
    `drift/planned`, checkpoints hold the state, and a resumed run goes on.

    Args:
        delta: an open `Delta`, one that streams, or the directory, Hub id or URL of one.
        progress: λ at the end, one number or one by module, such as {"attn": 0.8, "mlp": 1.25}.
        window: the share of the optimizer steps over which the motion is spread.
        steps: a number of optimizer steps instead.
        options: the others of `PlannedMotion`.

    Raises:
        TypeError: no trainer, no delta, or an option that is not known.
        ValueError: a window or a number of steps without meaning.
        DriftError: a second motion. What `PlannedMotion` raises comes when training begins.
    """
    undo = contextlib.ExitStack()
    with Reduction(all_processes()).together(undo.close):
        attached = _attached(trainer, delta, progress, window, steps, options)
        undo.callback(attached.remove)
    return attached


def _attached(
    trainer: Any,
    delta: Any,
    progress: PerModule,
    window: float,
    steps: int | None,
    options: dict[str, Any],
) -> TrainerMotion:
    if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "accelerator"):
        raise TypeError(
            f"expected a transformers Trainer, got {type(trainer).__name__}; in a loop of one's "
            "own, use PlannedMotion"
        )
    if "optimizer" in options:
        raise ValueError("a trainer has its own optimizer; leave optimizer=… out")
    MotionOptions.from_keywords(options, function="attach_motion")
    share = number(window, "window")
    if not 0.0 < share <= 1.0:
        raise ValueError(f"window must be a share of the run above 0 and up to 1, got {window!r}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be a number of optimizer steps from 1, got {steps!r}")
    if any(isinstance(callback, TrainerMotion) for callback in trainer.callback_handler.callbacks):
        raise DriftError("this trainer has a planned motion already; remove() that one first")
    return TrainerMotion(trainer, open_delta(delta), progress, steps, share, dict(options))
