"""What α is multiplied by at each optimizer step: a pure function of the step and the total.

A schedule has no state, so a run resumes with the number of its step alone. Steps count from 0;
where a bound is a step or a share of the run, an int is steps and a float is a share, so that
`window(0, 1)` is one step and `window(0, 1.0)` all of them. `str(schedule)` is text that
`parse_schedule` reads.

`constant`, `linear`, `cosine`, `warmup` and `window` make schedules; the classes have their names.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

Bound: TypeAlias = int | float


class Schedule(ABC):
    """A factor on α for every step; `a * b` is the product of two."""

    @abstractmethod
    def __call__(self, step: int, total: int | None) -> float:
        """Return the factor of step 0, 1, …, of `total` optimizer steps.

        Raises:
            ValueError: the schedule is relative to the run's length, and `total` is None.
        """

    def __mul__(self, other: ScheduleLike) -> Schedule:
        return Product((self, parse_schedule(other)))

    def __str__(self) -> str:
        given = ", ".join(repr(value) for value in vars(self).values() if value is not None)
        return f"{type(self).__name__.lower()}({given})"


ScheduleLike: TypeAlias = str | Schedule | Callable[[int, int | None], float] | None


@dataclass(frozen=True)
class Constant(Schedule):
    """The same factor throughout."""

    value: float = 1.0

    def __post_init__(self) -> None:
        _finite(self.value, "the factor of a constant schedule")

    def __call__(self, step: int, total: int | None) -> float:
        return float(self.value)


@dataclass(frozen=True)
class Linear(Schedule):
    """Fall from 1 at step 0 to `end` after the last step, in a straight line."""

    end: float = 0.0

    def __post_init__(self) -> None:
        _finite(self.end, "the end of a linear schedule")

    def __call__(self, step: int, total: int | None) -> float:
        return self.end + (1.0 - self.end) * (1.0 - _share(self, step, total))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Fall from 1 at step 0 to `end` after the last step, along half a cosine."""

    end: float = 0.0

    def __post_init__(self) -> None:
        _finite(self.end, "the end of a cosine schedule")

    def __call__(self, step: int, total: int | None) -> float:
        fall = (1.0 + math.cos(math.pi * _share(self, step, total))) / 2.0
        return self.end + (1.0 - self.end) * fall


@dataclass(frozen=True)
class Warmup(Schedule):
    """Rise to 1 over the first steps (an int) or share of the run (a float).

    The first of n steps has 1/n and the n-th 1, so that no step is without effect.
    """

    length: Bound

    def __post_init__(self) -> None:
        _check_bound(self.length, "the length of a warm-up")

    def __call__(self, step: int, total: int | None) -> float:
        steps = _steps(self, self.length, total)
        return 1.0 if step >= steps else (step + 1) / steps


@dataclass(frozen=True)
class Window(Schedule):
    """Inject only from `start` until before `stop`: steps (ints) or shares of the run (floats).

    `window(0, 0.3)` is the first 30 % of the run, `window(100)` all but the first 100 steps. A
    share is rounded up to whole steps, so two windows that share a bound also meet.
    """

    start: Bound
    stop: Bound | None = None

    def __post_init__(self) -> None:
        _check_bound(self.start, "the start of a window")
        if self.stop is None:
            return
        _check_bound(self.stop, "the stop of a window")
        if type(self.start) is type(self.stop) and self.stop <= self.start:
            raise ValueError(f"{self} holds no step: its stop must come after its start")

    def __call__(self, step: int, total: int | None) -> float:
        start = _steps(self, self.start, total)
        if self.stop is None:
            return float(step >= start)
        stop = _steps(self, self.stop, total)
        if stop <= start:
            raise ValueError(
                f"{self} holds no step of {total}: it would start at step {start} and stop before "
                f"step {stop}; move its bounds apart"
            )
        return float(start <= step < stop)


@dataclass(frozen=True)
class Product(Schedule):
    """Several schedules multiplied."""

    factors: tuple[Schedule, ...]

    def __call__(self, step: int, total: int | None) -> float:
        # Every factor is asked even after a zero, so that one without meaning is refused at step 0.
        return functools.reduce(operator.mul, [factor(step, total) for factor in self.factors])

    def __str__(self) -> str:
        return " * ".join(map(str, self.factors))


@dataclass(frozen=True)
class Custom(Schedule):
    """A user's function of (step, total)."""

    function: Callable[[int, int | None], float]

    def __call__(self, step: int, total: int | None) -> float:
        return _finite(self.function(step, total), f"the factor that {self} returned at {step=}")

    def __str__(self) -> str:
        function: Any = self.function
        named = function if hasattr(function, "__qualname__") else type(function)
        return f"<{named.__module__}.{named.__qualname__}>"


constant, linear, cosine, warmup, window = Constant, Linear, Cosine, Warmup, Window


def parse_schedule(schedule: ScheduleLike) -> Schedule:
    """Return a schedule from None (constant), text, a schedule, or a function of (step, total).

    Text is a name with its arguments, or several multiplied: "cosine", "linear(0.1)",
    "warmup(0.05) * window(0, 0.3)". A function is asked for the same step more than once.

    Raises:
        ValueError: text that does not name a schedule, or an argument without meaning.
        TypeError: none of these.
    """
    if schedule is None:
        return Constant(1.0)
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, str):
        factors = tuple(_parse_factor(part, schedule) for part in schedule.split("*"))
        return factors[0] if len(factors) == 1 else Product(factors)
    if callable(schedule):
        _refuse_other_arguments(schedule)
        return Custom(schedule)
    raise TypeError(
        f"schedule must be text such as 'cosine', one of drift_fast.schedule, or a function of "
        f"(step, total), got {type(schedule).__name__}"
    )


def _refuse_other_arguments(function: Callable[..., float]) -> None:
    try:
        inspect.signature(function, follow_wrapped=False).bind(0, 1)
    except TypeError as error:
        raise TypeError(f"a schedule is a function of (step, total): {error}") from None
    except ValueError:
        # Some of C's say nothing of their arguments.
        return


_NAMED: dict[str, Callable[..., Schedule]] = {
    kind.__name__.lower(): kind for kind in (Constant, Linear, Cosine, Warmup, Window)
}


def _parse_factor(part: str, text: str) -> Schedule:
    found = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", part)
    if found is None or found[1] not in _NAMED:
        raise ValueError(
            f"{text!r} is not a schedule: expected one of {', '.join(_NAMED)}, with numbers in "
            "parentheses if any, or several joined by *; for example 'warmup(0.05) * cosine'"
        )
    given = (found[2] or "").strip()
    try:
        arguments = [_number(item.strip()) for item in given.split(",")] if given else []
        return _NAMED[found[1]](*arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{part.strip()!r} in schedule {text!r}: {error}") from error


def _number(text: str) -> Bound:
    return int(text) if re.fullmatch(r"[+-]?\d{1,15}", text) else float(text)


def _finite(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    return float(value)


def _check_bound(bound: Any, what: str) -> None:
    known = isinstance(bound, int | float) and math.isfinite(_finite(bound, what))
    if not known or bound < 0 or (isinstance(bound, float) and bound > 1.0):
        raise ValueError(
            f"{what} must be a number of steps (an int from 0) or a share of the run (a float from "
            f"0.0 to 1.0), got {bound!r}"
        )


def _length(schedule: Schedule, total: int | None) -> int:
    if total is None:
        raise ValueError(
            f"the schedule {schedule} is relative to the length of the run, which is not known: "
            "pass total_steps=…, the number of optimizer steps"
        )
    return total


def _share(schedule: Schedule, step: int, total: int | None) -> float:
    return min(1.0, step / _length(schedule, total))


def _steps(schedule: Schedule, bound: Bound, total: int | None) -> int:
    """Return a bound in steps."""
    if isinstance(bound, int):
        return bound
    # 0.07 · 100 is 7.000000000000001, which is meant to be seven.
    return math.ceil(bound * _length(schedule, total) - 1e-9)
