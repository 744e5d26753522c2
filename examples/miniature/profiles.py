"""How much is run: the full form and the fast one.

Owns worlds, sets, budgets and which methods, regimes and stages each form has; runs nothing.
Invariant: the full form tunes on worlds and sets that it does not test on, and lines of profiles
that differ have digests that differ.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Final

from methods import METHODS, REGIMES

from drift_fast.demo.experiment import Protocol

STAGES: Final = ("checkpoints", "tune", "test", "dose", "regimes", "report")
OTHERS: Final = tuple(name for name in REGIMES if name != "main")
# Fine-tuning sets of tuning have numbers that no test has.
TUNING_SET: Final = 100
# λ that merges are given, and α of injections, for the curve of answers over λ.
DOSES: Final = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
STRENGTHS: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is run.

    The regimes are tested on the first `regime_worlds` of the test worlds, or fewer where they say
    so. `shrink` divides the steps in which checkpoints are trained.
    """

    flag: str
    test_worlds: tuple[int, ...]
    validation_worlds: tuple[int, ...]
    sets: int
    trials: int
    regime_worlds: int
    regime_trials: int
    methods: tuple[str, ...]
    regimes: tuple[str, ...]
    stages: tuple[str, ...]
    doses: tuple[float, ...] = DOSES
    strengths: tuple[float, ...] = STRENGTHS
    protocol: Protocol = field(default_factory=Protocol)
    shrink: int = 1

    @property
    def digest(self) -> str:
        """What tells lines of one profile from another's: worlds, sets, budgets and `shrink`."""
        stated = [self.flag, self.test_worlds, self.validation_worlds, self.sets]
        stated += [self.trials, self.regime_trials, self.shrink]
        return hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:16]


FULL: Final = Profile(
    flag="--full",
    test_worlds=tuple(range(1, 9)),
    validation_worlds=(11, 12),
    sets=3,
    trials=12,
    regime_worlds=6,
    regime_trials=8,
    methods=tuple(METHODS),
    regimes=tuple(name for name in REGIMES if name not in ("main", "more")),
    stages=STAGES,
)
# The demo's world, whose checkpoints are shipped, and settings that were chosen before.
FAST: Final = Profile(
    flag="",
    test_worlds=(0,),
    validation_worlds=(0,),
    sets=3,
    trials=6,
    regime_worlds=0,
    regime_trials=0,
    methods=(
        "as_is",
        "sft",
        "linear",
        "task_arithmetic",
        "drift",
        "drift_base",
        "drift_base_cap",
        "merge_sft_two",
        "motion_base",
        "drift_base_shuffled",
    ),
    regimes=(),
    stages=("test", "dose", "report"),
    doses=(0.5, 1.0, 1.5),
    strengths=(0.2, 0.4, 0.8, 1.6),
)
