"""Which jobs there are, when each can run, and which settings a test takes from the trials.

Knows lines of results and checkpoints that are there. Invariant: nothing of a test pair is looked
at before a method's settings are chosen, and the order in which trials ended does not matter.

Every trial runs on the first tuning pair, the best three again on the second. The score of a trial
is the mean over pairs of answers plus reading: what moves reasoning and leaves perception.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lessons
from methods import METHODS
from training import Job

Line = dict[str, Any]

TUNING_PAIRS: Final = (0, 1)
TUNING_SEED: Final = 100
AGAIN: Final = 3


@dataclass(frozen=True, kw_only=True)
class Form:
    """How much is run."""

    pairs: tuple[int, ...] = (2, 3)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    trials: int = 8
    methods: tuple[str, ...] = tuple(METHODS)
    tunes: bool = True


def jobs(form: Form) -> list[Job]:
    """Return every job, checkpoints first, in the order in which they are worth running."""
    pairs = (*TUNING_PAIRS, *form.pairs) if form.tunes else form.pairs
    wanted = [
        Job(stage="checkpoint", pair=pair, seed=0, method=name)
        for name in ("multimodal", "expert", "other_base", "other_expert", "unrelated")
        for pair in pairs
        if any(name in needed(method) for method in form.methods)
        and (pair in form.pairs or name in ("multimodal", "expert"))
    ]
    tuned = [name for name in form.methods if METHODS[name].space] if form.tunes else []
    wanted += [
        Job(
            stage="tune",
            pair=TUNING_PAIRS[0],
            seed=TUNING_SEED,
            method=name,
            settings=json.dumps(trial),
        )
        for name in tuned
        for trial in METHODS[name].trials(form.trials)
    ]
    wanted += [
        Job(stage="again", pair=TUNING_PAIRS[1], seed=TUNING_SEED, method=name, settings=str(rank))
        for name in tuned
        for rank in range(min(AGAIN, len(METHODS[name].trials(form.trials))))
    ]
    # A seed of every method, then the next: stopped early, what there is can be compared.
    wanted += [
        Job(stage="test", pair=pair, seed=seed, method=name, settings="chosen")
        for seed in form.seeds
        for pair in form.pairs
        for name in form.methods
        # Nothing of it is drawn.
        if name != "as_is" or seed == form.seeds[0]
    ]
    return wanted


def left(undone: Sequence[Job]) -> list[Job]:
    """Return the jobs without the checkpoints of pairs that no other job needs any more."""
    pairs = {job.pair for job in undone if job.stage != "checkpoint"}
    return [job for job in undone if job.pair in pairs]


def needed(method: str) -> set[str]:
    """Return the checkpoints of a pair that a method reads, besides the base."""
    chosen = METHODS[method]
    other = {
        "O-B": {"other_expert"},
        "O-V": {"other_expert"},
        "O-OB": {"other_expert", "other_base"},
    }
    found = {"expert", "multimodal"} | other.get(chosen.delta, set())
    return found | ({"unrelated"} if chosen.control == "unrelated" else set())


def ready(job: Job, root: Path, form: Form, lines: Sequence[Line]) -> bool:
    """Whether all that a job follows from is there."""
    if job.stage == "checkpoint":
        return lessons.exists(root, job.pair, lessons.LESSONS[job.method].source)
    if not all(lessons.exists(root, job.pair, name) for name in needed(job.method)):
        return False
    if job.stage == "tune":
        return True
    source = METHODS[job.method].like or job.method
    if job.stage == "again":
        return len(_trials(lines, source, "tune")) == len(METHODS[source].trials(form.trials))
    if not METHODS[source].space or not form.tunes:
        return True
    count = min(AGAIN, len(METHODS[source].trials(form.trials)))
    return len(_trials(lines, source, "again")) == count


def settings(job: Job, form: Form, lines: Sequence[Line], given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a job runs with; `given` are those of a form that does not tune."""
    source = METHODS[job.method].like or job.method
    if job.stage == "tune":
        return dict(json.loads(job.settings))
    if not METHODS[source].space:
        return {}
    if job.stage == "again":
        return dict(_ranked(_trials(lines, source, "tune"))[int(job.settings)])
    if not form.tunes:
        return dict(given[source])
    return chosen(lines, source)


def chosen(lines: Sequence[Line], method: str) -> dict[str, Any]:
    """Return the settings of a method that did best on both tuning pairs."""
    again = _trials(lines, method, "again")
    both = [
        *again,
        *(
            t
            for t in _trials(lines, method, "tune")
            if any(t["settings"] == a["settings"] for a in again)
        ),
    ]
    return dict(_ranked(both)[0])


def _trials(lines: Sequence[Line], method: str, stage: str) -> list[Line]:
    return [line for line in lines if line["method"] == method and line["stage"] == stage]


def _ranked(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return settings, best first; of equals, in the order of their text."""
    scores: dict[str, list[float]] = {}
    for line in lines:
        scores.setdefault(json.dumps(line["settings"], sort_keys=True), []).append(
            line["answers"] + line["reading"]
        )
    mean = {text: round(sum(found) / len(found), 9) for text, found in scores.items()}
    return [json.loads(text) for text in sorted(mean, key=lambda text: (-mean[text], text))]
