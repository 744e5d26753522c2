"""α in force: per module and layer, by schedule, stopped at a cap, or steered to a λ.

Owns: a first-order model of how λ answers α under Adam, in which caps and targets are tried.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import drift_fast
from drift_fast import DriftError
from drift_fast.inject import schedule
from drift_fast.inject.config import InjectionConfig
from drift_fast.inject.strength.control import Control, limit
from drift_fast.inject.strength.per_module import per_target
from support.synthetic import refused

LAYERS = 4
INSIDE = ("self_attn.q_proj.weight", "self_attn.q_proj.bias", "mlp.up_proj.weight")
NAMES = [f"model.layers.{layer}.{inside}" for layer in range(LAYERS) for inside in INSIDE]
WITH_HEAD = [*NAMES, "lm_head.weight"]


def of_kind(attention: float, mlp: float) -> list[float]:
    return [attention, attention, mlp] * LAYERS


def lambdas(value: float | list[float], names: list[str] = NAMES, **dtype: Any) -> torch.Tensor:
    values = value if isinstance(value, list) else [value] * len(names)
    return torch.tensor(values, **({"dtype": torch.float64} | dtype))


def squares(names: list[str] = NAMES) -> list[float]:
    return [1.0 + at for at in range(len(names))]


def control_of(
    names: Sequence[str], *, squares: Sequence[float] | None = None, **options: Any
) -> Control:
    return Control(names, InjectionConfig(**options), squares=squares)


# ------------------------------------------------------------------ α as stated


def test_one_alpha_is_that_of_every_target_bit_for_bit() -> None:
    found = control_of(NAMES, alpha=0.1).alphas()
    assert found.dtype == torch.float64
    assert found.tolist() == [0.1] * len(NAMES)
    assert control_of(NAMES, alpha=0.1).alphas(dtype=torch.float32).dtype == torch.float32


def test_alphas_have_the_device_and_dtype_of_the_progress_that_is_given() -> None:
    found = control_of(NAMES, alpha=0.5).alphas(lambdas(0.0, dtype=torch.float32))
    assert (found.dtype, found.tolist()) == (torch.float32, [0.5] * len(NAMES))
    assert control_of(NAMES).alphas(device=torch.device("meta")).dtype == torch.float32


def test_alpha_by_module() -> None:
    control = control_of(NAMES, alpha={"attn": 0.5, "mlp": 2})
    assert control.alphas().tolist() == of_kind(0.5, 2.0)
    assert control.alpha == {"attn": 0.5, "mlp": 2.0}


@pytest.mark.parametrize("order", [1, -1])
def test_a_pattern_decides_before_a_preset_before_all_in_any_order(order: int) -> None:
    stated = {"all": 1.0, "attn": 2.0, "re:q_proj.bias": 3.0}
    control = control_of(WITH_HEAD, alpha=dict(list(stated.items())[::order]))
    assert control.alphas().tolist() == [2.0, 3.0, 1.0] * LAYERS + [1.0]


def test_of_several_patterns_the_first_decides() -> None:
    stated = {r"re:layers\.0\.": 0.0, "re:proj": 1.0}
    assert control_of(NAMES, alpha=stated).alphas().tolist() == [0.0] * 3 + [1.0] * 9
    with refused(ValueError, "decides no target", "layers"):
        control_of(NAMES, alpha=dict(reversed(stated.items())))


def test_several_presets_may_share_an_entry() -> None:
    assert control_of(WITH_HEAD, alpha={"attn,mlp": 2.0, "head": 1.0}).alphas()[-2:].tolist() == [
        2,
        1,
    ]


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        ({"attn": 1.0}, ("no entry for 5 of 13", NAMES[2], "modules=")),
        ({"attn": 1.0, "mlp": 1.0}, ("lm_head.weight",)),
        ({"all": 1.0, "norm": 1.0}, ("'norm'", "decides no target")),
        ({"all": 1.0, "attention": 1.0}, ("unknown module preset", "attention")),
        ({"all": 1.0, "re:(": 1.0}, ("does not compile",)),
        ({"all": math.nan}, ("alpha['all']", "finite")),
        ({"all": "1"}, ("alpha['all']", "finite")),
        ({3: 1.0}, ("preset",)),
        ({}, ("empty",)),
        (math.inf, ("alpha", "finite")),
        ("strong", ("alpha", "number")),
    ],
)
def test_an_alpha_without_meaning_is_refused(alpha: Any, words: tuple[str, ...]) -> None:
    with refused(ValueError, *words):
        control_of(WITH_HEAD, alpha=alpha)


@given(
    st.lists(st.sampled_from(WITH_HEAD), min_size=1, max_size=8),
    st.permutations(["all", "attn", "mlp", "re:bias", "re:layers.[01]"]),
)
def test_every_target_gets_the_value_of_an_entry_that_matches_it(
    names: list[str], entries: list[str]
) -> None:
    stated = {entry: float(at) for at, entry in enumerate(entries)}
    with contextlib.suppress(ValueError):
        values, chosen = per_target(names, stated, "alpha")
        assert values == [stated[entry] for entry in chosen]
        for name, entry in zip(names, chosen, strict=True):
            assert (entry == "re:bias") <= ("bias" in name)
            assert (entry == "attn") <= ("self_attn" in name and "bias" not in name)
            assert (entry == "all") <= (name == "lm_head.weight")


# ------------------------------------------------------------------ by layer


@pytest.mark.parametrize(
    "mask",
    [
        [0.0, 0.5, 1.0, 1.5],
        {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5},
        {"0": 0.0, "1": 0.5, "2": 1, 3: 1.5, None: 1.0},
        lambda layer: 1.0 if layer is None else layer / 2,
    ],
)
def test_a_depth_mask_multiplies_alpha_by_layer_in_every_form(mask: Any) -> None:
    control = control_of(WITH_HEAD, alpha=2.0, layer_alpha=mask)
    expected = [layer * 1.0 for layer in range(LAYERS) for _ in INSIDE]
    assert control.alphas().tolist() == [*expected, 2.0]


def test_a_depth_mask_takes_ranges_of_layers_and_a_factor_for_what_lies_outside() -> None:
    control = control_of(WITH_HEAD, alpha={"all": 2.0}, layer_alpha={"0-2": 0.5, 3: 0, None: 3})
    assert control.alphas().tolist() == [1.0] * 9 + [0.0] * 3 + [6.0]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([1.0] * 3, ("no entry for layer 3", "0 to 3")),
        ([1.0] * 5, ("layer 4 too many", "0 to 3")),
        ({0: 1.0, "2-3": 1.0}, ("no entry for layer 1",)),
        ({"0-4": 1.0}, ("layer 4",)),
        ({"0-3": 1.0, 2: 0.0}, ("layer 2 twice",)),
        ({"0-999999999999": 1.0}, ("more layers",)),
        ({"first": 1.0}, ("0-3,8",)),
        ({True: 1.0}, ("layer",)),
        ([1.0, 1.0, math.nan, 1.0], ("layer 2", "finite")),
        (lambda layer: None, ("layer 0", "finite")),
        ("0-3", ("layer_alpha", "mapping")),
        (0.5, ("layer_alpha", "mapping")),
    ],
)
def test_a_depth_mask_that_does_not_fit_the_layers_is_refused(
    mask: Any, words: tuple[str, ...]
) -> None:
    with refused(ValueError, *words):
        control_of(NAMES, layer_alpha=mask)


# ------------------------------------------------------------------ by step


def test_a_schedule_multiplies_alpha_step_by_step() -> None:
    control = control_of(NAMES, alpha={"all": 2.0}, schedule=schedule.linear(), total_steps=4)
    found = []
    for _ in range(5):
        found.append(control.alphas().tolist()[0])
        control.finish()
    assert found == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert control.step == 5


def test_alpha_set_between_steps_holds_from_the_next_one() -> None:
    control = control_of(NAMES, alpha=1.0, layer_alpha={"0": 0.5, "1-3": 1})
    assert control.alphas()[0] == 0.5
    control.alpha = 3.0
    assert control.alphas().tolist() == [1.5] * 3 + [3.0] * 9
    control.alpha = {"attn": 1.0, "mlp": 0.0}
    assert control.alphas().tolist() == [0.5, 0.5, 0.0, *of_kind(1.0, 0.0)[3:]]
    control.alpha = 0.25
    assert control.alphas().tolist() == [0.125] * 3 + [0.25] * 9
    with pytest.raises(ValueError, match="finite"):
        control.alpha = math.nan
    assert control.alpha == 0.25


def test_alpha_is_known_to_be_zero_only_where_it_is_zero_everywhere() -> None:
    assert control_of(NAMES, alpha=0.0).constant_zero
    assert control_of(NAMES, alpha={"attn": 0.0, "mlp": 0.0}).constant_zero
    assert control_of(NAMES, layer_alpha=[0.0] * 4).constant_zero
    assert not control_of(NAMES, alpha={"attn": 0.0, "mlp": 1.0}).constant_zero
    window = control_of(NAMES, schedule="window(1, 2)")
    seen = []
    for _ in range(3):
        seen.append(window.constant_zero)
        window.finish()
    assert seen == [True, False, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "cosine"}, ("total_steps=",)),
        ({"schedule": "window(9, 0.5)", "total_steps": 10}, ("no step",)),
        ({"total_steps": 0}, ("total_steps", "from 1")),
        ({"total_steps": 2.0}, ("total_steps",)),
        ({"progress_cap": 0.0}, ("progress_cap", "above 0")),
        ({"progress_cap": "high"}, ("progress_cap", "number")),
        ({"progress_cap": {"attn": 1.0}}, ("progress_cap", "no entry for 4 of 12")),
        ({"progress_cap": 1.0, "cap_by": "layer"}, ("cap_by", "overall")),
        ({"cap_by": "module"}, ("progress_cap=",)),
        ({"progress_cap": 1.0, "cap_by": "overall"}, ("squares=",)),
        ({"progress_cap": 1.0, "cap_by": "overall", "squares": [1.0]}, ("12 squares", "1")),
        ({"progress_cap": 1.0, "cap_by": "module", "squares": [0.0] * 12}, ("above 0",)),
        (
            {"progress_cap": {"all": 1.0}, "cap_by": "overall", "squares": squares()},
            ("a number", "module"),
        ),
        ({"progress_cap": 1.0, "alpha": -1.0}, ("alpha > 0",)),
        ({"look_ahead": -1.0}, ("look_ahead", "at least 0")),
        ({"max_push": 0.0}, ("max_push", "above 0")),
        ({"progress_target": 0.5, "squares": squares()}, ("total_steps=",)),
        ({"progress_target": 0.5, "total_steps": 9}, ("squares=",)),
        ({"progress_target": -0.5, "total_steps": 9, "squares": squares()}, ("above 0",)),
        (
            {
                "progress_target": 0.9,
                "progress_cap": 0.9,
                "total_steps": 9,
                "squares": squares(),
            },
            ("progress_cap", "progress_target"),
        ),
        (
            {
                "progress_target": 0.9,
                "schedule": "constant(0.0)",
                "total_steps": 9,
                "squares": squares(),
            },
            ("schedule", "always zero"),
        ),
        (
            {
                "progress_target": 0.9,
                "schedule": "linear(-1)",
                "total_steps": 9,
                "squares": squares(),
            },
            ("schedule", "never negative"),
        ),
    ],
)
def test_options_without_meaning_are_refused_at_once(
    options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused(ValueError, *words):
        control_of(NAMES, **options)


# ------------------------------------------------------------------ a cap on λ


def test_progress_is_needed_exactly_where_it_is_used() -> None:
    assert not control_of(NAMES).needs_progress
    capped = control_of(NAMES, progress_cap=1.0)
    assert capped.needs_progress
    assert control_of(NAMES, progress_target=1.0, total_steps=9, squares=squares()).needs_progress
    with refused(ValueError, "λ of every target"):
        capped.alphas()
    with refused(ValueError, "12 targets", "[3]"):
        capped.alphas(torch.zeros(3))


def test_a_target_stops_where_its_progress_and_what_momentum_adds_reach_the_cap() -> None:
    control = control_of(NAMES[:3], progress_cap=1.0, look_ahead=9.0)
    names = NAMES[:3]
    # λ + 9·change after the second step: 0.9 + 0.09, 0.9 + 0.18, and 0.9 − 0.09.
    for values, expected in (
        ([0.89, 0.88, 0.91], [2.0, 2.0, 2.0]),
        ([0.90, 0.90, 0.90], [2.0, 0.0, 2.0]),
    ):
        control.alpha = 2.0
        assert control.alphas(lambdas(values, names)).tolist() == expected
        control.finish()
    assert control.stopped == 1


def test_without_look_ahead_a_cap_is_compared_with_progress_itself() -> None:
    control = control_of(NAMES[:2], progress_cap=1.0, look_ahead=0.0)
    control.alphas(lambdas(0.0, NAMES[:2]))
    control.finish()
    assert control.alphas(lambdas([0.999, 1.0], NAMES[:2])).tolist() == [1.0, 0.0]


def test_what_a_cap_has_stopped_stays_off_when_progress_falls_back() -> None:
    control = control_of(NAMES, progress_cap=1.0)
    for value, expected in ((1.2, 0.0), (0.1, 0.0), (0.0, 0.0)):
        assert control.alphas(lambdas(value)).tolist() == [expected] * len(NAMES)
        control.finish()


def test_caps_by_module_hold_for_each_parameter_alone_and_infinity_is_no_cap() -> None:
    control = control_of(NAMES, progress_cap={"attn": 0.9, "mlp": math.inf})
    values = [0.0, 0.95, 50.0, 0.95, 0.0, 50.0, *of_kind(0.0, 0.0)[6:]]
    expected = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, *of_kind(1.0, 1.0)[6:]]
    assert control.alphas(lambdas(values)).tolist() == expected


@given(st.lists(st.floats(-2, 2), min_size=len(NAMES), max_size=len(NAMES)))
@settings(deadline=None)
def test_overall_and_by_module_progress_is_weighed_by_the_squares_of_the_delta(
    values: list[float],
) -> None:
    def mean(members: list[int]) -> float:
        weights = squares()
        total = sum(weights[at] for at in members)
        return sum(weights[at] * values[at] for at in members) / total

    mlp = [at for at, name in enumerate(NAMES) if "mlp" in name]
    attention = [at for at in range(len(NAMES)) if at not in mlp]
    reached = [mean(list(range(len(NAMES)))), mean(attention), mean(mlp)]
    if any(abs(value - 0.5) < 1e-9 for value in reached):
        return
    whole, attn, other = (float(value < 0.5) for value in reached)
    for options, expected in (
        ({"progress_cap": 0.5, "cap_by": "overall"}, of_kind(whole, whole)),
        ({"progress_cap": 0.5, "cap_by": "module"}, of_kind(attn, other)),
        ({"progress_cap": {"attn": 0.5, "mlp": 0.5}, "cap_by": "module"}, of_kind(attn, other)),
        ({"progress_cap": {"all": 0.5}, "cap_by": "module"}, of_kind(whole, whole)),
    ):
        control = control_of(NAMES, squares=squares(), **options)  # type: ignore[arg-type]
        assert control.alphas(lambdas(values)).tolist() == expected


def test_progress_that_is_not_a_number_stops_nothing_and_is_forgotten() -> None:
    control = control_of(NAMES, progress_cap=1.0, cap_by="module", squares=squares())
    control.alphas(lambdas(0.5))
    for values in (of_kind(math.nan, 0.5), of_kind(0.5, 0.5)):
        control.finish()
        assert control.alphas(lambdas(values)).tolist() == [1.0] * len(NAMES)
        assert control.state_dict()["progress"] == [0.5] * len(NAMES)


def test_a_state_holds_no_value_that_json_lacks_even_if_progress_never_was_a_number() -> None:
    control = control_of(NAMES, progress_cap={"attn": math.inf, "mlp": 1.0})
    control.alphas(lambdas(math.nan))
    control_of(NAMES, progress_cap={"attn": math.inf, "mlp": 1.0}).load_state_dict(
        json.loads(json.dumps(control.state_dict(), allow_nan=False))
    )


def test_progress_that_is_not_a_number_leaves_other_modules_alone() -> None:
    control = control_of(NAMES, progress_cap=1.0, cap_by="module", squares=squares())
    assert control.alphas(lambdas(of_kind(math.nan, 2.0))).tolist() == of_kind(1.0, 0.0)


def test_a_change_over_steps_that_were_left_out_counts_per_step() -> None:
    # Ten steps between the two calls: 0.5 + 9 · 0.4/10 is below one, 0.5 + 9 · 0.4 is not.
    control = control_of(NAMES, progress_cap=1.0)
    control.alphas(lambdas(0.1))
    for _ in range(10):
        control.finish()
    assert control.alphas(lambdas(0.5)).tolist() == [1.0] * len(NAMES)


# ------------------------------------------------------------------ a model of Adam


class Run:
    """λ of every target under Adam: motion follows α through momentum, learning rate and noise.

    Motion saturates for large α, as measured in the miniature. `strength` is the λ at which the run
    would end, by its learning rates alone, if α were 1 throughout.
    """

    def __init__(
        self,
        total: int,
        strength: list[float],
        rate: Callable[[float], float],
        *,
        noise: float = 0.0,
        momentum: float = 0.9,
        seed: int = 0,
    ) -> None:
        self.random = random.Random(seed)
        self.total, self.rate, self.noise, self.momentum = total, rate, noise, momentum
        drive = sum(rate(step / total) for step in range(total))
        self.unit = [value / drive for value in strength]
        self.first = [0.0] * len(strength)
        self.progress = [0.0] * len(strength)
        self.step = 0

    def move(self, alphas: list[float]) -> None:
        correction = 1.0 - self.momentum ** (self.step + 1)
        rate = self.rate(self.step / self.total)
        for at, alpha in enumerate(alphas):
            push = alpha * math.sqrt(1.8 / (1.0 + 0.8 * alpha * alpha))
            push += self.noise * self.random.gauss(0.0, 1.0)
            self.first[at] += (1.0 - self.momentum) * (push - self.first[at])
            self.progress[at] += rate * self.unit[at] * self.first[at] / correction
        self.step += 1


def follow(control: Control, run: Run, steps: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Let a control steer a run for some steps; return the α of each."""
    found = []
    for _ in range(steps):
        alphas = control.alphas(torch.tensor(run.progress, dtype=dtype)).tolist()
        control.finish()
        run.move(alphas)
        found.append(alphas)
    return found


def cosine_rate(share: float) -> float:
    return (1.0 + math.cos(math.pi * share)) / 2.0


RATES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": cosine_rate,
    "warm-up and cosine": lambda share: min(1.0, share / 0.05 + 1e-3) * cosine_rate(share),
}


def test_a_cap_that_looks_ahead_ends_where_it_is_and_one_that_does_not_overshoots() -> None:
    ends = {}
    for look_ahead in (0.0, 9.0):
        control = control_of(NAMES[:1], alpha=2.0, progress_cap=0.9, look_ahead=look_ahead)
        run = Run(200, [4.0], RATES["constant"])
        follow(control, run, 200)
        ends[look_ahead] = run.progress[0]
    assert ends[9.0] == pytest.approx(0.9, abs=0.03)
    assert ends[0.0] > 1.05


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("total", [200, 800])
@pytest.mark.parametrize("guess", [0.5, 1.0, 4.0])
def test_a_target_is_reached_from_any_first_guess_in_spite_of_noise(
    rate: str, total: int, guess: float
) -> None:
    for seed in range(2):
        for noise in (0.0, 0.5):
            control = control_of(
                NAMES[:1], alpha=guess, progress_target=0.6, total_steps=total, squares=[3.0]
            )
            run = Run(total, [0.6], RATES[rate], noise=noise, seed=seed)
            alphas = [alpha for (alpha,) in follow(control, run, total)]
            # Noise of half the push alone spreads the end of 200 equal steps by 3.5 %.
            bound = 0.04 if noise and total == 200 else 0.02
            assert run.progress[0] == pytest.approx(0.6, rel=bound), (seed, noise)
            assert min(alphas) >= 0.0
            assert max(alphas) <= 4.0 * guess
            assert alphas[0] == pytest.approx(guess)


def test_a_target_is_reached_by_the_middle_of_the_run_and_kept() -> None:
    control = control_of(NAMES[:1], progress_target=0.6, total_steps=400, squares=[1.0])
    run = Run(400, [1.2], RATES["constant"])
    follow(control, run, 160)
    assert 0.3 < run.progress[0] < 0.58
    follow(control, run, 90)
    assert run.progress[0] == pytest.approx(0.6, rel=0.05)
    follow(control, run, 150)
    assert run.progress[0] == pytest.approx(0.6, rel=0.02)


@pytest.mark.parametrize("rate", RATES)
def test_a_short_run_comes_near_its_target(rate: str) -> None:
    control = control_of(NAMES[:1], progress_target=0.6, total_steps=60, squares=[1.0])
    run = Run(60, [0.6], RATES[rate])
    follow(control, run, 60)
    assert run.progress[0] == pytest.approx(0.6, rel=0.06)


@pytest.mark.parametrize("apart", [1, 3])
def test_a_target_is_reached_where_only_every_so_many_steps_inject_and_are_seen(
    apart: int,
) -> None:
    # α is so small that motion is proportional to it: at α as stated, the end would be 2.4.
    proportional = 0.01 * math.sqrt(1.8)
    control = control_of(
        NAMES[:1],
        alpha=0.01,
        progress_target=0.6,
        total_steps=600,
        schedule=lambda step, total: float(step % apart == 0),
        squares=[1.0],
    )
    run = Run(600, [2.4 * apart / proportional], RATES["constant"])
    gains = []
    for _ in range(600):
        alphas = [0.0]
        if not control.constant_zero:
            alphas = control.alphas(lambdas(run.progress, NAMES[:1])).tolist()
            gains.append(control.state_dict()["aim"]["gain"][0])
        control.finish()
        run.move(alphas)
    assert run.progress[0] == pytest.approx(0.6, rel=0.02)
    # The first guess is that α as stated gets there by the middle.
    assert gains[0] == pytest.approx(1.2 / (600 / apart))
    assert gains[len(gains) // 3] == pytest.approx(2.4 / (600 / apart), rel=0.03)


def test_how_a_product_of_alpha_and_schedule_is_stated_makes_no_difference_to_a_target() -> None:
    found = []
    for alpha, factor in ((1.0, 1.0), (8.0, 0.125)):
        run = Run(200, [0.6], RATES["cosine"], noise=0.3)
        control = control_of(
            NAMES[:1],
            alpha=alpha,
            schedule=schedule.constant(factor) * schedule.linear(0.5),
            progress_target=0.6,
            total_steps=200,
            squares=[1.0],
        )
        found.append(follow(control, run, 200))
    assert found[0] == found[1]


def test_a_run_that_is_pulled_back_at_first_still_pushes_towards_its_target() -> None:
    control = control_of(NAMES[:1], progress_target=0.6, total_steps=400, squares=[1.0])
    run = Run(400, [1.2], RATES["constant"])
    for step in range(60):
        (alpha,) = control.alphas(lambdas(run.progress, NAMES[:1])).tolist()
        control.finish()
        run.step += 1
        run.progress[0] -= 0.004
        assert alpha >= 1.0, step
    follow(control, run, 340)
    assert run.progress[0] == pytest.approx(0.6, rel=0.02)


def test_after_arrival_noise_is_answered_calmly() -> None:
    for seed in range(3):
        control = control_of(NAMES[:1], progress_target=0.6, total_steps=400, squares=[1.0])
        run = Run(400, [1.2], RATES["constant"], noise=0.5, seed=seed)
        follow(control, run, 220)
        assert max(alpha for (alpha,) in follow(control, run, 180)) < 0.3


def test_motion_without_a_push_teaches_nothing_of_what_a_push_does() -> None:
    control = control_of(NAMES[:1], progress_target=0.6, total_steps=400, squares=[1.0])
    run = Run(400, [1.2], RATES["constant"])
    follow(control, run, 100)
    state = control.state_dict()
    state["aim"]["drive"] = [1e-6]
    control.load_state_dict(state)
    control.alphas(lambdas([run.progress[0] + 0.05], NAMES[:1]))
    assert control.state_dict()["aim"]["gain"] == pytest.approx(state["aim"]["gain"], rel=1e-3)


def test_targets_by_module_are_reached_by_each_kind_on_its_own() -> None:
    names, weights = NAMES[:6], squares(NAMES[:6])
    target = {"attn": 0.7, "mlp": 1.25}
    control = control_of(names, progress_target=target, total_steps=400, squares=weights)
    run = Run(400, [0.5, 1.5, 1.0, 0.9, 0.4, 2.0], RATES["cosine"], noise=0.3)
    follow(control, run, 400)
    for entry, members in (("attn", (0, 1, 3, 4)), ("mlp", (2, 5))):
        total = sum(weights[at] for at in members)
        found = sum(weights[at] * run.progress[at] for at in members) / total
        assert found == pytest.approx(target[entry], rel=0.03)


def test_a_target_within_a_window_is_reached_within_it() -> None:
    control = control_of(
        NAMES[:1],
        progress_target=0.6,
        total_steps=1000,
        schedule=schedule.window(0, 0.3),
        squares=[1.0],
    )
    run = Run(1000, [2.0], RATES["constant"], noise=0.3)
    alphas = follow(control, run, 1000)
    assert run.progress[0] == pytest.approx(0.6, rel=0.05)
    assert not any(alpha for (alpha,) in alphas[300:])


def test_a_target_out_of_reach_pushes_no_more_than_fourfold_and_one_passed_not_at_all() -> None:
    control = control_of(NAMES[:1], alpha=0.5, progress_target=0.6, total_steps=100, squares=[1.0])
    run = Run(100, [0.001], RATES["constant"])
    assert max(follow(control, run, 100)) == [2.0]
    control = control_of(NAMES[:1], progress_target=0.6, total_steps=100, squares=[1.0])
    run = Run(100, [1.0], RATES["constant"])
    run.progress = [0.7]
    assert max(follow(control, run, 100)) == [0.0]


def test_progress_that_is_not_a_number_pushes_nothing_and_does_not_spoil_what_was_learned() -> None:
    control = control_of(NAMES[:1], progress_target=0.6, total_steps=200, squares=[1.0])
    run = Run(200, [0.6], RATES["constant"])
    follow(control, run, 40)
    assert control.alphas(torch.tensor([math.nan], dtype=torch.float64)).tolist() == [0.0]
    control.finish()
    run.move([0.0])
    follow(control, run, 159)
    assert run.progress[0] == pytest.approx(0.6, rel=0.02)


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=12),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None)
def test_whatever_progress_says_alpha_never_turns_round_and_stays_within_its_bounds(
    values: list[float], dtype: torch.dtype
) -> None:
    control = control_of(
        NAMES[:1], alpha=0.7, progress_target=0.6, progress_cap=2.0, total_steps=8, squares=[1.0]
    )
    for value in values:
        (alpha,) = control.alphas(torch.tensor([value], dtype=dtype)).tolist()
        assert 0.0 <= alpha <= 4.0 * 0.7 + 1e-6
        control.finish()


# ------------------------------------------------------------------ saved and resumed


def everything(total: int = 60) -> Control:
    return control_of(
        NAMES,
        alpha={"attn": 0.5, "mlp": 1.5},
        layer_alpha=[1.0, 0.5, 1.0, 2.0],
        schedule=schedule.warmup(0.1) * schedule.linear(0.2),
        total_steps=total,
        progress_cap={"attn": 0.9, "mlp": 1.3},
        cap_by="module",
        progress_target={"attn": 0.5, "mlp": 0.8},
        max_push=2.0,
        squares=squares(),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("at", [0, 1, 2, 25, 59])
def test_a_resumed_run_has_the_alphas_of_an_uninterrupted_one_bit_for_bit(
    at: int, dtype: torch.dtype
) -> None:
    def run() -> Run:
        return Run(60, [0.4 + 0.1 * at for at in range(12)], RATES["constant"], noise=0.5, seed=3)

    whole, broken = run(), run()
    expected = follow(everything(), whole, 60, dtype)
    first = everything()
    found = follow(first, broken, at, dtype)
    saved = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second = everything()
    second.load_state_dict(saved)
    assert second.state_dict() == first.state_dict()
    found += follow(second, broken, 60 - at, dtype)
    assert found == expected
    assert broken.progress == whole.progress


def test_a_second_run_is_steered_as_the_first_was() -> None:
    control = everything()
    first = follow(control, Run(60, [1.0] * 12, RATES["constant"]), 60)
    learned = control.state_dict()["aim"]
    control.restart()
    assert control.state_dict()["aim"] != learned
    assert follow(control, Run(60, [1.0] * 12, RATES["constant"]), 60) == first


def test_what_a_cap_has_stopped_stays_off_in_the_resumed_run() -> None:
    first = control_of(NAMES, progress_cap=1.0)
    first.alphas(lambdas([1.5, *[0.0] * 11]))
    first.finish()
    second = control_of(NAMES, progress_cap=1.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.stopped, second.step) == (1, 1)
    assert second.alphas(lambdas(0.0)).tolist() == [0.0] + [1.0] * 11


def test_a_control_that_has_run_in_float32_takes_a_state_as_well() -> None:
    first, second = everything(), everything()
    expected = follow(first, Run(60, [1.0] * 12, RATES["constant"]), 60, torch.float32)
    run = Run(60, [1.0] * 12, RATES["constant"])
    follow(second, run, 30, torch.float32)
    second.load_state_dict(second.state_dict())
    assert follow(second, run, 30, torch.float32) == expected[30:]


def test_a_run_resumed_with_other_settings_is_told_which_and_goes_on_with_the_new() -> None:
    first = control_of(NAMES, alpha=1.0, schedule="cosine", total_steps=100)
    for _ in range(50):
        first.finish()
    second = control_of(NAMES, alpha=0.5, schedule="linear", total_steps=100)
    with pytest.warns(drift_fast.DriftWarning) as caught:
        second.load_state_dict(first.state_dict())
    text = str(caught[0].message)
    for word in ("alpha was 1.0 and is 0.5", "schedule was 'cosine(0.0)' and is 'linear(0.0)'"):
        assert word in text
    assert "total_steps" not in text
    assert second.alphas()[0] == 0.25


def test_a_cap_that_is_new_in_the_resumed_run_starts_open() -> None:
    first = control_of(NAMES)
    second = control_of(NAMES, progress_cap=1.0)
    with pytest.warns(drift_fast.DriftWarning, match="progress_cap was None and is 1"):
        second.load_state_dict(first.state_dict())
    assert second.alphas(lambdas(0.5)).tolist() == [1.0] * len(NAMES)


def test_a_state_of_other_targets_is_refused_with_the_first_difference() -> None:
    state = control_of(NAMES).state_dict()
    with refused(DriftError, "12 targets", "11", "at 0", NAMES[0], NAMES[1], "modules="):
        control_of(NAMES[1:]).load_state_dict(state)


def changed(**fields: Any) -> dict[str, Any]:
    control = everything()
    follow(control, Run(60, [1.0] * 12, RATES["constant"]), 5)
    state: dict[str, Any] = json.loads(json.dumps(control.state_dict()))
    for key, value in fields.items():
        if isinstance(value, dict) and isinstance(state[key], dict):
            state[key].update(value)
        else:
            state[key] = value
    return state


DAMAGE: list[dict[str, Any]] = [
    {"version": 2},
    {"version": "1"},
    {"step": -1},
    {"step": 1.5},
    {"step": True},
    {"step": 10**400},
    {"names": "all"},
    {"names": [1] * 12},
    {"names": []},
    {"settings": None},
    {"progress": [0.0] * 11},
    {"progress": [math.nan] * 12},
    {"progress": [math.inf] * 12},
    {"progress": ["0"] * 12},
    {"progress": 0.5},
    {"progress": [True] * 12},
    {"progress": [10**400] * 12},
    {"progress_step": 6},
    {"progress_step": None},
    {"stopped": [0] * 12},
    {"stopped": [True]},
    {"aim": 3},
    {"aim": {"gain": [1.0]}},
    {"aim": {"gain": [0.0, 1.0]}},
    {"aim": {"gain": [math.nan, 1.0]}},
    {"aim": {"drive": [-1.0, 0.0]}},
    {"aim": {"steps": -1}},
    {"aim": {"learned": None}},
]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_damaged_state_is_refused_with_its_field_and_a_remedy_and_changes_nothing(
    damage: dict[str, Any],
) -> None:
    control = everything()
    before = control.state_dict()
    (field,) = damage
    word = "targets" if damage == {"names": []} else field
    with refused(DriftError, word):
        control.load_state_dict(changed(**damage))
    assert control.state_dict() == before


@pytest.mark.parametrize("key", list(control_of(NAMES).state_dict()))
def test_a_state_without_one_of_its_fields_is_refused(key: str) -> None:
    state = changed()
    del state[key]
    with refused(DriftError, key, "resume"):
        everything().load_state_dict(state)


@pytest.mark.parametrize("state", [None, [], "state", 3])
def test_what_is_no_state_at_all_is_refused(state: Any) -> None:
    with refused(DriftError, "state_dict()"):
        everything().load_state_dict(state)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(st.sampled_from(list(control_of(NAMES).state_dict())), json_values)
@settings(deadline=None)
@pytest.mark.filterwarnings("ignore::drift_fast.DriftWarning")
def test_any_value_in_any_field_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    control = everything()
    with contextlib.suppress(DriftError):
        control.load_state_dict(changed() | {key: value})
        assert len(control.alphas(lambdas(0.1))) == len(NAMES)


# ------------------------------------------------------------------ on the device


class _Recorded(TorchDispatchMode):
    """Notes every operation that torch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.add(func.name())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    with _Recorded() as mode:
        yield mode.operations


# What brings a value to the host, or would copy a constant to the device and wait for it.
WAITING = ("_local_scalar_dense", "nonzero", "_to_copy", "lift_fresh", "masked_select", "item")


def test_a_step_brings_no_value_to_the_host_and_copies_none_to_the_device() -> None:
    control = everything()
    progress = lambdas(0.1)
    control.alphas(progress)
    control.finish()
    with recorded() as operations:
        control.alphas(progress)
        control.finish()
        control.constant_zero  # noqa: B018
    assert "aten::index_select" in operations
    assert not [name for name in operations if any(word in name for word in WAITING)]


def test_a_control_that_was_placed_copies_nothing_in_its_first_step_either() -> None:
    control = control_of(NAMES, alpha={"attn": 1.0, "mlp": 2.0})
    control.place(torch.device("cpu"), torch.float64)
    with recorded() as operations:
        control.alphas()
    assert operations == {"aten::mul.Tensor"}


def test_one_alpha_set_between_steps_copies_nothing_to_the_device() -> None:
    control = control_of(NAMES)
    control.alphas()
    with recorded() as operations:
        control.alpha = 0.5
        control.alphas()
    assert operations == {"aten::mul.Tensor"}


def test_a_run_in_float32_ends_where_one_in_float64_does() -> None:
    ends = []
    for dtype in (torch.float32, torch.float64):
        run = Run(60, [1.0] * 12, RATES["constant"], noise=0.3)
        follow(everything(), run, 60, dtype)
        ends.append(run.progress)
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


# ------------------------------------------------------------------ a cap on the push


@given(
    st.floats(-10, 10),
    # Below 1e-300 a quotient loses digits.
    st.just(0.0) | st.floats(1e-290, 100),
    st.floats(0.01, 100),
    st.floats(0.01, 10),
)
def test_a_push_is_at_most_its_share_of_the_gradient_and_unchanged_below_that(
    c: float, norm: float, delta_norm: float, max_push: float
) -> None:
    vector = [torch.tensor([value], dtype=torch.float64) for value in (c, norm, delta_norm)]
    found = limit(*vector, max_push).item()
    push, largest = abs(c) * delta_norm, max_push * norm
    assert abs(found) * delta_norm <= largest * (1 + 1e-12)
    assert found * c >= 0
    if push < largest * (1 - 1e-12):
        assert found == c
    else:
        assert abs(found) == pytest.approx(largest / delta_norm, rel=1e-9, abs=1e-300)


def test_without_a_limit_a_push_is_unchanged_and_one_that_is_no_number_stays_none() -> None:
    c = torch.tensor([5.0, -5.0])
    assert limit(c, torch.zeros(2), torch.ones(2), None) is c
    found = limit(c, torch.tensor([math.nan, 1.0]), torch.ones(2), 2.0)
    assert math.isnan(found[0])
    assert found[1] == -2.0
