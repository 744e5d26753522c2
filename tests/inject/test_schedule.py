"""Schedules give the factor they say at every step, as objects and as text."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift_fast.inject import schedule
from drift_fast.inject.schedule import Schedule, parse_schedule
from support.synthetic import refused


def factors(given_schedule: Any, total: int) -> list[float]:
    parsed = parse_schedule(given_schedule)
    return [parsed(step, total) for step in range(total)]


def test_no_schedule_is_one_throughout_and_needs_no_total() -> None:
    assert [parse_schedule(None)(step, None) for step in (0, 5, 10**9)] == [1.0] * 3


def test_a_constant_is_its_value() -> None:
    assert factors(schedule.constant(0.25), 3) == [0.25] * 3


def test_linear_falls_from_one_to_its_end_after_the_last_step_and_stays_there() -> None:
    assert factors("linear", 4) == [1.0, 0.75, 0.5, 0.25]
    assert factors(schedule.linear(0.5), 4) == [1.0, 0.875, 0.75, 0.625]
    assert schedule.linear(0.5)(4, 4) == schedule.linear(0.5)(400, 4) == 0.5


def test_cosine_falls_from_one_through_the_middle_to_its_end() -> None:
    found = [schedule.cosine(0.2)(step, 8) for step in range(9)]
    assert found[0] == 1.0
    assert found[4] == pytest.approx(0.6)
    assert found[8] == schedule.cosine(0.2)(80, 8) == pytest.approx(0.2)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("length", [4, 0.4])
def test_a_warm_up_in_steps_or_as_a_share_reaches_one_with_its_last_step(length: float) -> None:
    assert factors(schedule.warmup(length), 10) == [0.25, 0.5, 0.75] + [1.0] * 7


def test_a_warm_up_of_nothing_is_one() -> None:
    assert factors(schedule.warmup(0), 2) == factors(schedule.warmup(0.0), 2) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("bounds", "inside"),
    [
        ((0, 3), range(3)),
        ((2, 5), range(2, 5)),
        ((0, 0.3), range(3)),
        ((0.0, 0.3), range(3)),
        ((0.25, 0.5), range(3, 5)),
        ((2, 1.0), range(2, 10)),
        ((4,), range(4, 10)),
        ((0.5,), range(5, 10)),
        ((0, 1), range(1)),
        ((0, 1.0), range(10)),
    ],
)
def test_a_window_is_one_inside_and_zero_outside(bounds: tuple[float, ...], inside: range) -> None:
    expected = [float(step in inside) for step in range(10)]
    assert factors(schedule.window(*bounds), 10) == expected


@given(share=st.integers(1, 99).map(lambda hundredths: hundredths / 100), total=st.integers(1, 999))
def test_windows_that_share_a_bound_meet_without_overlap(share: float, total: int) -> None:
    try:
        first = factors(schedule.window(0.0, share), total)
        rest = factors(schedule.window(share, None), total)
    except ValueError:
        pytest.fail("a share above zero holds a step")
    assert [a + b for a, b in zip(first, rest, strict=True)] == [1.0] * total


def test_a_share_that_is_a_whole_number_of_steps_is_that_number_in_spite_of_rounding() -> None:
    # 0.07 · 100 is 7.000000000000001 in floating point.
    assert sum(factors(schedule.window(0, 0.07), 100)) == 7


def test_a_product_multiplies_step_by_step() -> None:
    product = schedule.warmup(2) * schedule.linear() * schedule.window(0, 0.5)
    assert factors(product, 4) == [0.5, 0.75, 0.0, 0.0]
    assert factors(schedule.warmup(2) * "linear", 4) == [0.5, 0.75, 0.5, 0.25]


def test_a_function_of_step_and_total_is_a_schedule() -> None:
    assert factors(lambda step, total: np.float32(step / total), 4) == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, True])
def test_a_function_that_returns_no_finite_number_is_refused_at_that_step(value: Any) -> None:
    with refused(ValueError, "finite number", "step=3", "odd"):

        def odd(step: int, total: int | None) -> Any:
            return value if step == 3 else 1.0

        factors(odd, 4)


@pytest.mark.parametrize(
    "relative",
    ["linear", "cosine", "warmup(0.1)", "window(0.1)", "window(0, 0.3)", "constant * linear"],
)
def test_a_schedule_relative_to_the_run_asks_for_total_steps_when_it_is_unknown(
    relative: str,
) -> None:
    with refused(ValueError, "total_steps=", "optimizer steps"):
        parse_schedule(relative)(0, None)


@pytest.mark.parametrize(
    "absolute", [None, "constant(0.5)", "warmup(5)", "window(3)", "window(1,4)"]
)
def test_a_schedule_in_steps_needs_no_total(absolute: str | None) -> None:
    assert parse_schedule(absolute)(3, None) >= 0.0


bounds = st.one_of(st.integers(0, 50), st.floats(0.0, 1.0))
single = st.one_of(
    st.floats(-2, 2).map(schedule.constant),
    st.floats(0, 1).map(schedule.linear),
    st.floats(0, 1).map(schedule.cosine),
    bounds.map(schedule.warmup),
    bounds.map(schedule.window),
    st.integers(0, 30).flatmap(
        lambda start: st.integers(start + 1, 60).map(lambda stop: schedule.window(start, stop))
    ),
)


@given(st.lists(single, min_size=1, max_size=4), st.integers(0, 120), st.integers(1, 100))
def test_the_text_of_a_schedule_reads_back_as_the_same_schedule(
    parts: list[Schedule], step: int, total: int
) -> None:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole * part
    again = parse_schedule(json.loads(json.dumps(str(whole))))
    assert again(step, total) == whole(step, total)
    assert str(again) == str(whole)


def test_steps_and_shares_stay_apart_in_text() -> None:
    assert parse_schedule("window(0, 1)") == schedule.window(0, 1)
    assert parse_schedule("window(0, 1.0)") == schedule.window(0, 1.0)
    assert factors("window(0, 1)", 4) != factors("window(0, 1.0)", 4)


def test_functions_are_told_apart_by_their_names() -> None:
    def mine(step: int, total: int | None) -> float:
        return 1.0

    assert "mine" in str(parse_schedule(mine))
    assert str(parse_schedule(mine)) != str(parse_schedule(lambda step, total: 1.0))


@pytest.mark.parametrize(
    "text",
    ["", "cosin", "cosine(", "linear(a)", "linear(1, 2)", "warmup", "cosine *", "window(0, nan)"],
)
def test_text_that_names_no_schedule_is_refused_and_shown(text: str) -> None:
    with refused(ValueError, repr(text)):
        parse_schedule(text)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedule.window(5, 5), "no step"),
        (lambda: schedule.window(0.5, 0.2), "no step"),
        (lambda: schedule.window(-1, 5), "from 0"),
        (lambda: schedule.window(0, 1.5), "share"),
        (lambda: schedule.warmup(True), "finite number"),
        (lambda: schedule.warmup(-0.1), "share"),
        (lambda: schedule.constant(math.inf), "finite"),
        (lambda: schedule.linear(math.nan), "finite"),
        (lambda: schedule.cosine("0"), "finite"),  # type: ignore[arg-type]
    ],
)
def test_arguments_without_meaning_are_refused(make: Any, words: str) -> None:
    with refused(ValueError, words):
        make()


def test_a_window_that_holds_no_step_of_this_run_is_refused_at_step_zero() -> None:
    late = schedule.window(100, 0.3)
    assert late(100, 1000) == 1.0
    with refused(ValueError, "window(100, 0.3)", "no step", "200"):
        late(0, 200)
    with refused(ValueError, "no step"):
        (schedule.window(50) * late)(0, 200)


def test_what_is_no_schedule_is_refused() -> None:
    with refused(TypeError, "cosine", "int"):
        parse_schedule(3)  # type: ignore[arg-type]
    with refused(TypeError, "a function of (step, total)"):
        parse_schedule(lambda step: 0.5)  # type: ignore[arg-type,misc]
    assert parse_schedule(lambda step, total=None: 0.5)(3, 9) == 0.5


def test_a_function_that_wraps_another_is_asked_for_its_own_arguments() -> None:
    def left(share: float) -> float:
        return 1 - share

    @functools.wraps(left)
    def wrapper(step: int, total: int) -> float:
        return left(step / total)

    assert parse_schedule(wrapper)(1, 4) == 0.75  # type: ignore[arg-type]
