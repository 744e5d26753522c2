"""Where a run will end along the delta: beside what was measured, and AdamW in float64."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import drift_fast
from drift_fast import predict_progress, rms
from drift_fast.inject.predict import BETAS, Outlook, motions
from drift_fast.inject.schedule import parse_schedule
from drift_fast.inject.strength.formula import Scale
from support import reference
from support.synthetic import refused

# Medians of c = λ·rms(Δ)/Σlr: of the miniature, and of a pre-trained model of 135M parameters.
MINIATURE = {
    0.05: 0.054, 0.12: 0.127, 0.25: 0.225, 0.37: 0.284, 0.54: 0.37, 0.78: 0.47, 1.14: 0.534,
    1.66: 0.59, 3.2: 0.66,
}  # fmt: skip
PRETRAINED = {0.5: 0.41, 1.0: 0.54, 2.0: 0.65, 4.0: 0.72, 8.0: 0.76}


@pytest.mark.parametrize(("alpha", "c"), [*MINIATURE.items(), *PRETRAINED.items()])
def test_the_prediction_is_within_a_tenth_of_what_was_measured(alpha: float, c: float) -> None:
    expected = pytest.approx(c * 1e-2 / 0.02, rel=0.1)
    assert predict_progress(alpha, [1e-4] * 100, 0.02) == expected
    assert predict_progress(alpha, 1e-2, 0.02) == expected
    assert predict_progress(alpha / 2, 1e-2, 0.02, scale="gradnorm") == expected
    # A push of α·rms(Δ) beside gradients of 0.001.
    absolute = alpha / 2 * 1e-3 / 0.02
    found = predict_progress(absolute, 1e-2, 0.02, scale="absolute", gradient_rms=1e-3)
    assert found == expected


RUNS = Path(__file__).parents[2] / "examples" / "miniature" / "full" / "results.jsonl.gz"


@pytest.mark.parametrize(
    ("way", "scale", "schedule", "count"),
    [
        ("", "adaptive", None, 144),
        ("_gradnorm", "gradnorm", None, 16),
        ("_window", "adaptive", "window(0, 0.3)", 86),
    ],
)
def test_published_runs_at_rates_of_fine_tuning_ended_where_it_is_predicted(
    way: str, scale: Scale, schedule: str | None, count: int
) -> None:
    shares = []
    for line in map(json.loads, gzip.decompress(RUNS.read_bytes()).splitlines()):
        prior = {f"drift{way}": "multimodal", f"drift_base{way}": "base"}.get(line.get("method"))
        if prior is None or line["regime"] == "lora" or line["settings"]["lr"] > 3e-4:
            continue
        # 200 steps of a cosine after 10 of warm-up, as many as their sum shows.
        shape = [
            step / 10 if step < 10 else (1 + math.cos(math.pi * (step - 10) / 190)) / 2
            for step in range(200)
        ]
        rates = [line["rates"] * factor / math.fsum(shape) for factor in shape]
        found = line["progress"][prior]
        expected = predict_progress(
            line["settings"]["alpha"], rates, found["rms"], scale=scale, schedule=schedule
        )
        shares.append(found["all"] / expected)
    assert len(shares) == count
    assert 0.92 < statistics.median(shares) < 1.03
    assert min(shares) > 0.82
    assert max(shares) < 1.2


STEPS = 150
WARM_COSINE = [
    step / 8 if step < 8 else (1 + math.cos(math.pi * (step - 8) / (STEPS - 8))) / 2
    for step in range(STEPS)
]
CONSTANT = [1.0] * STEPS


def adamw(
    alpha: float,
    rates: Sequence[float],
    schedule: str | None,
    scale: Scale,
    *,
    laplace: bool = False,
) -> tuple[float, float]:
    """Return λ·rms(Δ) of AdamW in float64, and mean|Δ|/rms(Δ).

    The gradients are noise whose elements differ in size, as those of networks do: log-normal, with
    the width at which c comes out as it was measured. They do not change from step to step.
    """
    random = np.random.default_rng(0)
    delta = random.laplace(size=20_000) if laplace else random.standard_normal(20_000)
    delta /= np.sqrt(np.mean(delta**2))
    size = np.exp(0.72 * random.standard_normal(delta.size))
    size /= np.sqrt(np.mean(size**2))
    weight, first, second = np.zeros((3, delta.size))
    factor = parse_schedule(schedule)
    for step, rate in enumerate(rates):
        gradient = size * random.standard_normal(delta.size)
        alpha_now = alpha * factor(step, len(rates))
        gradient = reference.inject(gradient, delta, alpha=alpha_now, scale=scale)
        first += (1 - BETAS[0]) * (gradient - first)
        second += (1 - BETAS[1]) * (gradient**2 - second)
        mean, square = (
            moment / (1 - beta ** (step + 1))
            for moment, beta in zip((first, second), BETAS, strict=True)
        )
        weight -= rate * mean / (np.sqrt(square) + 1e-8)
    return float(weight @ delta / (delta @ delta)), float(np.mean(np.abs(delta)))


@pytest.mark.parametrize(
    "schedule", [None, "window(0, 0.3)", "window(0.5, 0.8)", "linear", "cosine"]
)
@pytest.mark.parametrize("alpha", [0.1, 1.0, 8.0])
def test_schedules_of_both_are_followed_through_adamw_s_moments(
    alpha: float, schedule: str | None
) -> None:
    for rates in (CONSTANT, WARM_COSINE):
        found, limit = adamw(alpha, rates, schedule, "adaptive")
        assert predict_progress(alpha, rates, 1.0, schedule=schedule, limit=limit) == pytest.approx(
            found, rel=0.08
        )


@pytest.mark.parametrize("scale", ["gradnorm", "absolute"])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 4.0])
def test_so_are_the_other_scales(scale: Scale, alpha: float) -> None:
    found, limit = adamw(alpha, WARM_COSINE, None, scale)
    predicted = predict_progress(
        alpha, WARM_COSINE, 1.0, scale=scale, gradient_rms=1.0, limit=limit
    )
    assert predicted == pytest.approx(found, rel=0.08)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 16.0])
def test_a_delta_of_few_large_elements_has_a_lower_limit(alpha: float) -> None:
    found, limit = adamw(alpha, CONSTANT, None, "adaptive", laplace=True)
    assert limit == pytest.approx(0.707, abs=0.01)
    assert predict_progress(alpha, CONSTANT, 1.0, limit=limit) == pytest.approx(found, rel=0.12)


def test_momentum_moves_weights_on_by_nine_steps_after_a_window() -> None:
    # Small pushes, so that the squares that Adam divides by do not notice them.
    rates = [1e-3] * 400
    one = predict_progress(1e-3, 1e-3, 1.0)
    assert predict_progress(1e-3, rates, 1.0, schedule="window(0, 100)") == pytest.approx(
        109 * one, rel=0.01
    )
    # A window in the middle has the same length: what comes late at its start comes at its end.
    assert predict_progress(1e-3, rates, 1.0, schedule="window(150, 250)") == pytest.approx(
        100 * one, rel=0.01
    )
    assert predict_progress(
        1e-3, rates, 1.0, schedule="window(0, 100)", betas=(0.0, 0.999)
    ) == pytest.approx(100 * one)


@given(st.floats(0, 50), st.floats(0, 50))
def test_more_alpha_never_predicts_less_motion_and_the_way_back_is_the_same(
    first: float, second: float
) -> None:
    low, high = sorted((first, second))
    assert predict_progress(low, 1.0, 1.0) <= predict_progress(high, 1.0, 1.0) < 0.8
    assert predict_progress(-first, 1.0, 1.0) == -predict_progress(first, 1.0, 1.0)
    turned = predict_progress(-first, [0.1] * 9, 1.0, schedule="linear")
    assert turned == -predict_progress(first, [0.1] * 9, 1.0, schedule="linear")


def test_a_7b_run_of_public_settings_needs_a_tiny_delta_to_move() -> None:
    # lr 1e-6 over 375 steps, cosine: λ is useful only where Δ's elements are below a thousandth.
    total = sum(1e-6 * (1 + math.cos(math.pi * step / 375)) / 2 for step in range(375))
    assert predict_progress(1.0, total, 3e-4) == pytest.approx(0.34, abs=0.01)


def test_alpha_saturates_and_what_is_out_of_reach_says_what_would_reach_it() -> None:
    outlook = Outlook.of(0.5, [0.01] * 100, [1.0] * 100, 2.0, BETAS)
    assert outlook.drive == pytest.approx([0.5388 * 0.01 * n for n in range(1, 101)], rel=1e-3)
    assert outlook.expected == pytest.approx(predict_progress(1.0, 1.0, 2.0))
    assert outlook.steered == pytest.approx(predict_progress(4.0, 1.0, 2.0))
    assert outlook.reachable == pytest.approx(0.4, rel=1e-3)
    assert outlook.misses(0.3) == ""
    assert outlook.steered is not None
    text = outlook.misses(2 * outlook.steered)
    for word in ("progress_target=0.73", "0.37 with", " 2 times Σ learning rate", "no alpha"):
        assert word in text
    assert "by more steps or a higher learning rate" in text
    exact = outlook.misses(2 * outlook.steered, (2e-5, 300))
    assert "with a learning rate of 4e-05, or 600 steps" in exact
    assert "so would a larger alpha" in outlook.misses(0.39)
    assert Outlook.of(0.0, [0.01], [1.0], 2.0, BETAS).misses(0.5) == ""
    unknown = Outlook.of(None, [0.01] * 100, [1.0] * 100, 2.0, BETAS)
    assert unknown.expected is None
    assert unknown.misses(9.0) == ""


def test_rms_is_of_the_elements_and_part_of_the_package() -> None:
    assert drift_fast.rms is rms
    assert rms(5.0, 4) == 2.5
    with pytest.raises(ValueError, match="at least one element"):
        rms(1.0, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        (math.nan, 1.0, 1.0),
        (1.0, -1.0, 1.0),
        (1.0, math.inf, 1.0),
        (1.0, 1.0, 0.0),
        (1.0, [1.0, -1.0], 1.0),
    ],
)
def test_numbers_without_meaning_are_refused(arguments: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        predict_progress(*arguments)


def test_what_cannot_be_known_is_refused_with_what_would_tell() -> None:
    with refused(ValueError, "rms", "-1"):
        predict_progress(1.0, 1.0, -1.0)
    with refused(ValueError, "gradient_rms", "None"):
        predict_progress(1.0, 1.0, 1.0, scale="absolute")
    with refused(ValueError, "project", "not known"):
        predict_progress(1.0, 1.0, 1.0, scale="project")
    with refused(ValueError, "schedule", "all of them, not their sum"):
        predict_progress(1.0, 1.0, 1.0, schedule="linear")
    with refused(ValueError, "limit", "1.5"):
        predict_progress(1.0, 1.0, 1.0, limit=1.5)
    with refused(ValueError, "betas", "1.0"):
        list(motions(1.0, [1.0], [1.0], betas=(1.0, 0.999)))
