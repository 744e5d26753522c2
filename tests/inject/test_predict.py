"""Where a run will end along the delta: by the measured table, and from what it has done."""

from __future__ import annotations

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

import drift_fast
from drift_fast.inject.predict import Forecast, predict_progress, rms
from support.synthetic import refused


@pytest.mark.parametrize(
    ("alpha", "c"),
    [
        (0.0, 0.0),
        (0.05, 0.054),
        (0.25, 0.225),
        (0.78, 0.47),
        (1.66, 0.59),
        (3.2, 0.66),
        (9.0, 0.66),
        (0.025, 0.027),
        (0.455, 0.327),
    ],
)
def test_prediction_is_the_measured_coefficient_times_learning_rates_over_rms(
    alpha: float, c: float
) -> None:
    assert predict_progress(alpha, [1e-4] * 100, 0.02) == pytest.approx(c * 1e-2 / 0.02)
    assert predict_progress(alpha, 1e-2, 0.02) == pytest.approx(c * 1e-2 / 0.02)


@given(st.floats(0, 3), st.floats(0, 3))
def test_more_alpha_never_predicts_less_motion_and_the_way_back_is_the_same(
    first: float, second: float
) -> None:
    low, high = sorted((first, second))
    assert predict_progress(low, 1.0, 1.0) <= predict_progress(high, 1.0, 1.0)
    assert predict_progress(-first, 1.0, 1.0) == -predict_progress(first, 1.0, 1.0)


def test_a_7b_run_of_public_settings_needs_a_tiny_delta_to_move() -> None:
    # lr 1e-6 over 375 steps, cosine: λ is useful only where Δ's elements are below a thousandth.
    total = sum(1e-6 * (1 + math.cos(math.pi * step / 375)) / 2 for step in range(375))
    assert predict_progress(1.0, total, 3e-4) == pytest.approx(0.32, abs=0.01)


def test_rms_is_of_the_elements() -> None:
    assert rms(5.0, 4) == 2.5


@pytest.mark.parametrize(
    "arguments", [(math.nan, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, math.inf, 1.0), (1.0, 1.0, 0.0)]
)
def test_numbers_without_meaning_are_refused(arguments: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        predict_progress(*arguments)


def test_an_rms_of_nothing_and_a_run_of_no_drive_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one element"):
        rms(1.0, 0)
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


def warned(forecast: Forecast, per_done: float, steps: int = 100) -> list[tuple[int, str]]:
    """Return at which hundredth of the run what was said."""
    said = []
    for done in range(1, steps + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            forecast.see(per_done * done, float(done))
        said += [(done, str(one.message)) for one in caught]
        assert all(issubclass(one.category, drift_fast.DriftWarning) for one in caught)
    return said


def test_a_run_that_will_hardly_move_is_told_once_after_a_fifth_with_numbers_and_a_remedy() -> None:
    ((when, text),) = warned(Forecast(100.0), 0.0002)
    assert when == 20
    for word in ("0.004", "20%", "0.02", "0.05", "alpha", "learning rate", "progress_target="):
        assert word in text


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


def test_the_remedy_of_a_refused_number_names_what_was_given() -> None:
    with refused(ValueError, "rms", "-1"):
        predict_progress(1.0, 1.0, -1.0)
