"""What a run of a Hugging Face Trainer starts from, and what its checkpoints hold.

A trainer may run more than once: with a smaller batch after one that did not fit, with another
number of steps, or with another model. So what a run starts from is asked for at its start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from drift_fast.errors import DriftError
from drift_fast.inject.config import InjectionConfig
from drift_fast.inject.optimizer_watch import OptimizerWatch
from drift_fast.inject.shards.fsdp1 import flattened
from drift_fast.inject.shards.zero_support import check_configuration, is_engine
from drift_fast.inject.target import Target
from drift_fast.integrations.deepspeed_engine import check_step_scope
from drift_fast.integrations.resumed_weights import Difference, difference
from drift_fast.integrations.wrapped_method import WrappedMethod
from drift_fast.names import bare

# Of the sampled elements, from which share on a checkpoint was not loaded: of those that are no
# rounding of its own, which a 16-bit model at a small learning rate has few of, and of all others.
_FOREIGN, _MOST = 0.1, 0.5


def bare_model(trainer: Any) -> Any:
    """Return the model that a trainer trains, without what it is wrapped in for a run."""
    return trainer.accelerator.unwrap_model(trainer.model)


def engine_of(trainer: Any) -> Any:
    """Return the DeepSpeed engine of the current run, None without DeepSpeed."""
    held = getattr(trainer.accelerator, "deepspeed_engine_wrapped", None)
    if held is None:
        # Accelerate forgets an engine that a second run goes on with.
        return trainer.model_wrapped if is_engine(trainer.model_wrapped) else None
    return held.engine


def check_ahead(trainer: Any, config: InjectionConfig) -> None:
    """Refuse what a trainer is set to do to the model when training starts.

    Raises:
        DriftError: a way of sharding that is not supported, or options that it does not allow.
    """
    state = trainer.accelerator.state
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "lomo" in optimizer or "layerwise" in optimizer:
        raise DriftError(
            f"optim={optimizer!r} steps inside backward, before a gradient is complete and can be "
            "injected into; use another, such as adamw_torch or paged_adamw_8bit"
        )
    if trainer.is_deepspeed_enabled:
        check_step_scope(config)
        check_configuration(state.deepspeed_plugin.deepspeed_config)
    elif trainer.is_fsdp_enabled:
        if config.scope != "step" or config.overlap:
            raise DriftError(
                'FSDP shards gradients before they are whole: use scope="step" and '
                "overlap=False, or train with DDP or on one device"
            )
        plugin = state.fsdp_plugin
        if getattr(plugin, "fsdp_version", 1) == 1 and not plugin.use_orig_params:
            raise flattened("all parameters of each block")


def check_doras_ahead(trainer: Any, targets: Sequence[Target]) -> None:
    """Refuse DoRAs under FSDP1, where a Trainer wraps each A on its own, as PEFT advises.

    Raises:
        DriftError: such a target.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is None or getattr(plugin, "fsdp_version", 1) != 1:
        return
    for target in targets:
        if target.adapted is not None and target.adapted.is_dora:
            raise DriftError(
                f"{target.name} has a DoRA adapter, whose A a Trainer wraps on its own under "
                "FSDP1, and PEFT cannot train it there: take FSDP2 (fsdp_config={'version': 2}), "
                "or train with use_dora=False"
            )


class Wait:
    """Refuses a loop that trains the targets before the run at which an injection attaches.

    Such a loop never calls `on_train_begin`, and nothing else would notice.
    """

    def __init__(self, trainer: Any, targets: Sequence[Target]) -> None:
        self._trainer = trainer
        held = {id(p) for target in targets for p in target.trained}
        # Not the parameters: sharding and `model_init` put others in their places.
        self._names = {
            bare(name)
            for name, parameter in trainer.model.named_parameters()
            if id(parameter) in held
        }
        self._watch = OptimizerWatch(self._refuse)

    def remove(self) -> None:
        """Refuse nothing from now on. May be called twice."""
        self._watch.remove()

    def _refuse(self, optimizer: torch.optim.Optimizer) -> None:
        # A step at a learning rate of zero trains nothing: it is how torch prepares an optimizer of
        # sharded weights for its saved state.
        used = {
            id(parameter)
            for group in optimizer.param_groups
            if group.get("lr") != 0
            for parameter in group["params"]
            if parameter.grad is not None
        }
        if any(
            id(parameter) in used and bare(name) in self._names
            for name, parameter in self._trainer.model.named_parameters()
        ):
            raise DriftError(
                f"{type(optimizer).__name__} steps before trainer.train(), at which the injection "
                "attaches, so nothing would be injected: train with trainer.train(), or in a loop "
                "of one's own use Injection(model, delta, …) and call its step(); or call "
                "remove() to train without it"
            )


class CheckpointedState:
    """Adds a state to every checkpoint of a trainer; `state` returns None where there is none.

    It is asked for when a checkpoint is written. Callbacks that come later, and evaluations that
    find the best model so far, may ask for one after the events of a step.

    It also looks at the weights that the trainer loads from a checkpoint, right after.
    """

    def __init__(
        self, trainer: Any, key: str, state: Callable[[], Mapping[str, Any] | None]
    ) -> None:
        self._trainer = trainer
        self._key = key
        self._state = state
        self._method = WrappedMethod(trainer, "_save_checkpoint", self._save)
        self._load_method = WrappedMethod(trainer, "_load_from_checkpoint", self._load)
        self._difference: Difference | None = None

    def found_in(self, state: Any) -> Mapping[str, Any] | None:
        """Return what a resumed run's state holds."""
        found = (state.stateful_callbacks or {}).get(self._key)
        return found if isinstance(found, Mapping) else None

    def refuse_unloaded(self, step: int, *, lost: bool = False) -> None:
        """Refuse to go on at a step of a checkpoint whose weights are not those of the model.

        lost: whether the progress of the run before is gone, so that weights which are roundings
            of the checkpoint's are none of its either.

        Raises:
            DriftError: more of what was sampled differs than a loaded checkpoint explains.
        """
        found, self._difference = self._difference, None
        if found is None:
            return
        if found.foreign <= _FOREIGN and not (lost and found.share > _MOST):
            return
        raise DriftError(
            f"the run would resume at step {step} of {found.path}, but the checkpoint's weights "
            f"were not loaded into the model: {found.share:.0%} of what was sampled differs, "
            f"{found.first} first, and training would begin anew. Load the model itself from the "
            f'checkpoint, from_pretrained("{found.path}", dtype=…) in the dtype that trains, and '
            "pass the same resume_from_checkpoint once more"
        )

    def remove(self) -> None:
        """Add nothing from now on. May be called twice."""
        self._state = lambda: None
        self._method.remove()
        self._load_method.remove()

    def _load(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> Any:
        loaded = self._load_method.original(resume_from_checkpoint, *args, **kwargs)
        if not _shards_weights(self._trainer):
            self._difference = difference(bare_model(self._trainer), resume_from_checkpoint)
        return loaded

    def _save(self, *args: Any, **kwargs: Any) -> Any:
        found = self._state()
        if found is not None:
            callbacks = self._trainer.state.stateful_callbacks
            self._trainer.state.stateful_callbacks = {**(callbacks or {}), self._key: found}
        return self._method.original(*args, **kwargs)


def _shards_weights(trainer: Any) -> bool:
    """Whether processes hold parts of the weights, frozen ones too."""
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return bool(trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3))
