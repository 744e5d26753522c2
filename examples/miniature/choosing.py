"""Which settings a method is tested with, from its trials.

Knows lines of results alone. Invariant: nothing is chosen before every trial has a result on every
validation world, and the order in which trials ended does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from methods import METHODS
from pool import Line, by_key

# Of each method, by name.
Settings = dict[str, dict[str, Any]]


def choose(
    lines: Sequence[Line], methods: Sequence[str], validation: Sequence[int]
) -> dict[str, Any]:
    """Return for each method with a search space the settings that did best in its trials.

    A control has the name of the method it is like instead, whose settings it takes. The score is
    the mean over the validation worlds of answers right, or of answers and digits; of equals, the
    first trial's in the order of the lines.

    Raises:
        ValueError: a method without trials, or a trial that lacks a validation world.
    """
    chosen = {}
    for name in methods:
        method = METHODS[name]
        if not method.space:
            continue
        if method.control is not None:
            chosen[name] = {"like": method.like}
            continue
        measures = ("answers", "digits") if method.chosen_by != "answers" else ("answers",)
        mine = [line for line in lines if line["method"] == (method.like or name)]
        tried = {
            settings: rows
            for (settings,), rows in by_key(
                ({**line, "text": json.dumps(line["settings"])} for line in mine), "text"
            ).items()
        }
        if not tried:
            raise ValueError(
                f"{name}: no trial of {method.like or name!r}: finish its tuning first"
            )
        for settings, rows in tried.items():
            found = sorted(row["world"] for row in rows)
            if found != sorted(validation):
                raise ValueError(
                    f"{name}, trial {settings}: expected one run on each validation world "
                    f"{sorted(validation)}, found runs on {found}: finish its tuning first"
                )

        def score(settings: str, tried: Any = tried, measures: Any = measures) -> float:
            rows = tried[settings]
            # Rounded, so that the order of a sum makes no winner of equals.
            return round(sum(row[m] for row in rows for m in measures) / len(rows), 9)

        best = max(tried, key=score)
        rows = tried[best]
        chosen[name] = {
            "settings": json.loads(best),
            "answers": sum(row["answers"] for row in rows) / len(rows),
            "digits": sum(row["digits"] for row in rows) / len(rows),
            "trials": len(tried),
            "worlds": sorted({row["world"] for row in rows}),
        }
    return chosen
