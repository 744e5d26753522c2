"""LLaMA-Factory: an entry module, run in the place of `llamafactory-cli train`.

    python -m drift_fast.integrations.llamafactory train.yaml [key=value …]
    torchrun --nproc-per-node 8 -m drift_fast.integrations.llamafactory train.yaml

The configuration is LLaMA-Factory's own with one more section, `drift_fast:`, which is taken out
before LLaMA-Factory reads it; a callback passed to `run_exp` attaches. Nothing is patched.

Tested with llamafactory 0.9.5 on transformers 5.6: full SFT of a tiny Qwen2 and a tiny Qwen2.5-VL,
the latter also on two processes under ZeRO-2 and ZeRO-3; where it is not installed, against a
`run_exp` that builds a Trainer with the callbacks it is given. Megatron (`use_mca`), HyperParallel
and Ray are not tested.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from transformers import Trainer, TrainerCallback

from drift_fast.errors import DriftError
from drift_fast.inject.injection import Injection
from drift_fast.integrations.hf_trainer import TrainerInjection
from drift_fast.integrations.settings import Settings

logger = logging.getLogger(__name__)

SECTION = "drift_fast"


class DriftCallback(TrainerCallback):
    """Attach to the Trainer that this callback is given to, once it is built.

    For frameworks that take callbacks but keep their Trainer to themselves. Runs that do not train
    are left alone.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.injection: Injection | TrainerInjection | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach at the end of `Trainer.__init__`.

        Raises:
            As `drift_fast.attach`.
        """
        if getattr(args, "do_train", True):
            self.injection = self.settings.attach(_calling_trainer())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach where the callback joined a Trainer that was built already."""
        if self.injection is None:
            self.injection = self.settings.attach(_calling_trainer())


def run(arguments: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
    """Train as `llamafactory.train.tuner.run_exp` does, with the injection that is configured.

    arguments: LLaMA-Factory's, with a section `drift_fast`; None reads the command line.

    Raises:
        ValueError: no such section, or an option that does not exist.
    """
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    given = read_args(arguments)
    if not isinstance(given, dict) or SECTION not in given:
        raise ValueError(
            f"expected a YAML file with a section `{SECTION}:` that names a delta; without "
            "an injection, run llamafactory-cli train"
        )
    arguments = {key: value for key, value in given.items() if key != SECTION}
    settings = Settings.from_mapping(given[SECTION], origin=f"the section {SECTION}")
    logger.info("training with the injection of %s", settings.delta)
    run_exp(arguments, callbacks=[*(callbacks or []), DriftCallback(settings)])


def _calling_trainer() -> Trainer:
    """Return the Trainer whose event runs this callback.

    A callback is given the state, the model and the optimizer, but not the Trainer, and only the
    Trainer knows the point between the last backward and clipping. It is on the call stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    raise DriftError(
        "no Trainer called this callback; pass it to a transformers Trainer, or call "
        "drift_fast.attach(trainer, delta) where you have one"
    )


if __name__ == "__main__":
    run()
