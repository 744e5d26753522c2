"""Where a run is heading along the delta: from what it has done, and what is said about it."""

from __future__ import annotations

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

import drift_fast
from drift_fast.inject.forecast import Forecast


def test_a_run_of_no_drive_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        Forecast(0.0)


def test_a_steady_run_is_drawn_out_to_its_end() -> None:
    forecast = Forecast(200.0)
    assert forecast.final is None
    found = [forecast.see(0.003 * done, float(done)) for done in range(10, 201, 10)]
    assert found == pytest.approx([0.6] * 20)


def test_a_run_that_stands_still_is_forecast_to_stay_where_it_is() -> None:
    forecast = Forecast(100.0)
    found = [forecast.see(min(0.4, 0.009 * done), float(done)) for done in range(1, 100)]
    assert found[38] == pytest.approx(0.9)
    assert found[-1] == pytest.approx(0.4)


def test_a_steep_run_with_a_cap_is_forecast_to_end_there_and_not_remarked_upon() -> None:
    forecast = Forecast(100.0, stops_at=0.9)
    found = [forecast.see(min(0.93, 0.04 * done), float(done)) for done in range(1, 101)]
    assert found[0] == found[19] == pytest.approx(0.9)
    assert found[-1] == pytest.approx(0.93)


@given(st.floats(0.06, 0.99))
def test_a_run_that_heads_for_a_useful_end_is_not_remarked_upon(final: float) -> None:
    forecast = Forecast(10.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for done in range(1, 11):
            forecast.see(final * done / 10, float(done))


def warned(forecast: Forecast, per_done: float, *, lost: str = "") -> list[tuple[int, str]]:
    """Return at which hundredth of the run what was said."""
    said = []
    for done in range(1, 101):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            forecast.see(per_done * done, float(done), lost=lost)
        said += [(done, str(one.message)) for one in caught]
        assert all(issubclass(one.category, drift_fast.DriftWarning) for one in caught)
    return said


def test_a_run_that_will_hardly_move_is_told_once_after_a_fifth_with_numbers_and_a_remedy() -> None:
    ((when, text),) = warned(Forecast(100.0), 0.0002)
    assert when == 20
    for word in ("0.004", "20%", "0.02", "0.05", "alpha", "learning rate", "merge"):
        assert word in text


def test_a_run_that_moves_as_expected_is_told_which_sum_of_rates_helps_and_what_alpha_can() -> None:
    ((_, text),) = warned(Forecast(100.0, expected=0.02, reachable=0.03), 0.0002)
    assert "2.5 times Σ learning rate would reach 0.05" in text
    assert "a larger alpha reaches 0.03 at most" in text
    assert "aise alpha" not in text


LOST = "the weights are bfloat16"


def test_weights_that_lose_steps_are_named_first_where_less_than_half_of_the_expected_comes() -> (
    None
):
    for per_done, expected, meant in ((0.0002, 0.5, "0.5 was"), (0.001, 0.5, "0.5 was")):
        ((when, text),) = warned(
            Forecast(100.0, expected=expected, reachable=0.9), per_done, lost=LOST
        )
        assert when == 20
        assert meant in text
        assert f"The first cause to look at: {LOST}" in text
        assert "alpha" not in text
    # Without an expectation, where λ is of no use.
    ((_, text),) = warned(Forecast(100.0), 0.0002, lost=LOST)
    assert f"less than 0.05. The first cause to look at: {LOST}" in text
    assert warned(Forecast(100.0), 0.001, lost=LOST) == []
    # As much as was expected, whatever the weights lose.
    assert warned(Forecast(100.0, expected=0.1, reachable=0.2), 0.001, lost=LOST) == []
    ((_, text),) = warned(Forecast(100.0, expected=0.02, reachable=0.2), 0.0002, lost=LOST)
    assert LOST not in text
    # A cap is what ends it.
    capped = Forecast(100.0, stops_at=0.1, expected=0.9, reachable=1.0)
    assert warned(capped, 0.00098, lost=LOST) == []


def test_a_run_that_will_overshoot_is_told_once_after_a_fifth_with_numbers_and_a_remedy() -> None:
    ((when, text),) = warned(Forecast(100.0), 0.02)
    assert when == 20
    for word in ("0.4", "20%", "heading for 2", "alpha", "progress_cap=", "window"):
        assert word in text


def test_a_run_beyond_one_is_told_at_once() -> None:
    ((when, _),) = warned(Forecast(100.0), 0.15)
    assert when == 7


def test_a_cap_beyond_one_or_a_target_below_a_twentieth_is_what_was_asked_for() -> None:
    assert warned(Forecast(100.0, stops_at=1.25), 0.013) == []
    assert warned(Forecast(100.0, stops_at=0.01), 0.0001) == []


def test_a_run_far_beyond_its_cap_or_far_from_it_is_told_nevertheless() -> None:
    assert len(warned(Forecast(100.0, stops_at=0.9), 0.02)) == 1
    assert len(warned(Forecast(100.0, stops_at=0.9), 0.0002)) == 1


def test_values_that_are_not_finite_or_out_of_order_are_left_out() -> None:
    forecast = Forecast(10.0)
    assert forecast.see(0.2, 4.0) == pytest.approx(0.5)
    for progress, done in ((math.nan, 5.0), (0.3, math.nan), (0.1, 2.0)):
        assert forecast.see(progress, done) == pytest.approx(0.5)
    assert forecast.see(0.25, 4.0) == pytest.approx(0.625)
    assert forecast.see(0.0, 0.0) == pytest.approx(0.625)
