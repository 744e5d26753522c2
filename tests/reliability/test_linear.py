"""The work for one tensor does not grow with the number of tensors, and stays small.

Calls of functions are counted, not seconds: they are the same on every machine.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from drift_fast import align, check, compute_delta, inspect, merge
from drift_fast.names import parsed
from support.synthetic import stored, write_file

LAYERS = 2
# Experts of a layer, each with three tensors; evenly apart, so that differences can be compared.
EXPERTS = (40, 80, 120)

VERBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "check": lambda a, b, _: check(a, b, modules="all"),
    "align": lambda a, b, _: align(a, b),
    "inspect": lambda a, b, _: inspect(a, b, modules="all"),
    "compute_delta": lambda a, b, out: compute_delta(a, b, out, modules="all"),
    "merge": lambda a, b, out: merge("linear", a, b, out, weight=0.5),
}
# Calls of functions, of Python and of C, that one more tensor of a pair may take.
CALLS = {"check": 190, "align": 145, "inspect": 220, "compute_delta": 250, "merge": 290}
# Two names are parsed; what does not depend on a number is looked at once for all.
SEARCHES = 12


def write_experts(directory: Path, prefix: str, experts: int, shift: float) -> Path:
    """Write a mixture of experts with tiny tensors."""
    rng = np.random.default_rng(0)
    names = [
        f"{prefix}.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(LAYERS)
        for expert in range(experts)
        for part in ("gate", "up", "down")
    ]
    tensors = {name: stored(rng.normal(size=(4, 4)) + shift, "F32") for name in names}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": LAYERS}))
    write_file(directory / "model.safetensors", tensors)
    return directory


def counted(work: Callable[[], object]) -> Counter[str]:
    """Return how many functions were called, and how many of them are searches for a pattern."""
    found: Counter[str] = Counter()

    def count(frame: FrameType, event: str, called: Any) -> None:
        if event in ("call", "c_call"):
            found["calls"] += 1
            found["searches"] += isinstance(getattr(called, "__self__", None), re.Pattern)

    parsed.cache_clear()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.filterwarnings("ignore::drift_fast.DriftWarning")
@pytest.mark.parametrize("verb", VERBS)
def test_each_tensor_takes_as_many_calls_as_the_one_before(tmp_path: Path, verb: str) -> None:
    counts = []
    for experts in EXPERTS:
        place = tmp_path / str(experts)
        a = write_experts(place / "a", "model", experts, 0)
        b = write_experts(place / "b", "model.language_model", experts, 0.001)
        counts.append(counted(partial(VERBS[verb], a, b, place / "out")))
    tensors = LAYERS * 3 * (EXPERTS[1] - EXPERTS[0])
    for what, most in (("calls", CALLS[verb]), ("searches", SEARCHES)):
        first, second = ((more[what] - fewer[what]) / tensors for fewer, more in pairwise(counts))
        assert second == pytest.approx(first, rel=0.05, abs=0.5), what
        assert second <= most, what
