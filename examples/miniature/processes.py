"""What each process of a pool begins with: one core, one GPU of those that may be used, silence.

Knows neither jobs nor results.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from drift_fast import DriftWarning


def cards(environment: Mapping[str, str], count: int) -> list[str]:
    """Return the GPUs that may be used: those the user left visible, or the `count` there are.

    Raises:
        SystemExit: none.
    """
    stated = environment.get("CUDA_VISIBLE_DEVICES")
    found = [str(number) for number in range(count)]
    if stated is not None:
        found = [name.strip() for name in stated.split(",")]
        # CUDA reads the list up to its first entry that is none.
        found = list(itertools.takewhile(lambda name: name not in ("", "-1"), found))
    if not found:
        raise SystemExit(
            f"--device cuda: expected a GPU, found {count} and CUDA_VISIBLE_DEVICES {stated!r}; "
            "set it to what may be used, or give --device cpu"
        )
    return found


def beginning(device: str) -> Callable[[], None]:
    """Return what each process of one pool begins with."""
    if device != "cuda":
        return partial(_begin, [], None)
    usable = cards(os.environ, torch.cuda.device_count())
    return partial(_begin, usable, multiprocessing.get_context("spawn").Value("i", 0))


def _begin(usable: Sequence[str], counter: Any) -> None:
    """Set a process up; `counter`, shared by the pool, gives each in turn one of its GPUs."""
    import transformers

    torch.set_num_threads(1)
    # Trainer collects garbage around every run, and would go over all imported modules.
    gc.freeze()
    atexit.register(gc.unfreeze)
    if usable:
        # One for each process: Trainer would spread a run over all that it sees.
        with counter.get_lock():
            own = counter.value
            counter.value += 1
        os.environ["CUDA_VISIBLE_DEVICES"] = usable[own % len(usable)]
    warnings.filterwarnings("ignore", category=FutureWarning)
    # The library says of models without a common base what the regime is there to measure.
    warnings.filterwarnings("ignore", "matched weights", DriftWarning)
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
