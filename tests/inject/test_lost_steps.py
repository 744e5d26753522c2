"""16-bit weights without wider copies: what of the optimizer's steps they lose, and who is warned.

Owns: the share against weights that did not move, the remedy of each training stack, and silence
where nothing is lost. Sharded weights: also test_fsdp2.py, test_fsdp1.py and test_zero.py.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drift_fast
from drift_fast.inject.motion.motion import PlannedMotion
from support import reference
from support.injection_models import Backbone, delta_towards, train, weights_of

BF16 = torch.bfloat16
RATE = 1e-4
WIDTH = {"layers": 1, "width": 48, "inner": 64}


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """A regression in the dtype of the weights, or of autocast."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, WIDTH["width"], generator=generator)
    targets = torch.randn(8, 3, generator=generator)
    found = model(inputs.to(next(model.parameters()).dtype))
    return nn.functional.mse_loss(found.float(), targets)


@pytest.fixture
def model() -> Backbone:
    return Backbone(**WIDTH).to(BF16)


@pytest.fixture
def delta(tmp_path: Path, model: Backbone) -> drift_fast.Delta:
    return delta_towards(tmp_path / "delta", model.float(), size=0.1)


def adamw(model: nn.Module, rate: float = RATE) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)


def said_by(call: Callable[[], Any]) -> list[str]:
    """Return the DriftWarnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if one.category is drift_fast.DriftWarning]


def stated(text: str) -> float:
    """Return the share that a warning states."""
    found = re.search(r"last place of (\d+)% of them", text)
    assert found is not None, text
    return int(found[1]) / 100


@pytest.mark.parametrize("rate", [3e-5, 1e-4, 3e-4])
def test_the_stated_share_of_the_weights_does_not_move_in_a_step_of_the_learning_rate(
    model: Backbone, delta: drift_fast.Delta, rate: float
) -> None:
    model.to(BF16)
    optimizer = adamw(model, rate)
    before = weights_of(model)
    with pytest.warns(drift_fast.DriftWarning, match="bfloat16") as caught:
        injection = drift_fast.Injection(model, delta, optimizer=optimizer)
    # The first step of AdamW moves every element by the learning rate, whatever its gradient is.
    train(model, 1, injection=injection, optimizer=optimizer, loss=loss_of)
    after = weights_of(model)
    still = sum(int((after[name] == before[name]).sum()) for name in injection.targets)
    share = still / sum(before[name].numel() for name in injection.targets)
    assert stated(str(caught[0].message)) == pytest.approx(share, abs=0.02)
    assert injection.lost_steps.share == pytest.approx(share, abs=0.02)
    assert 0.1 < share < 0.99


def test_such_weights_end_far_below_those_in_float32_and_a_remedy_that_is_followed_brings_them_back(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    def progress(trained: nn.Module, run: Callable[[], None]) -> float:
        start = weights_of(trained)
        run()
        return reference.progress(weights_of(trained), start, delta)[0]

    def in_16_bits() -> None:
        optimizer = adamw(low)
        with pytest.warns(drift_fast.DriftWarning, match="torch.autocast"):
            injection = drift_fast.Injection(low, delta, alpha=2.0, optimizer=optimizer)
        train(low, 40, injection=injection, optimizer=optimizer, loss=loss_of)

    def with_autocast() -> None:
        optimizer = adamw(wide)
        injection = drift_fast.Injection(wide, delta, alpha=2.0, optimizer=optimizer)

        def loss(trained: nn.Module, step: int) -> torch.Tensor:
            with torch.autocast("cpu", dtype=BF16):
                return loss_of(trained, step)

        train(wide, 40, injection=injection, optimizer=optimizer, loss=loss)
        assert injection.lost_steps.cause == ""

    low = Backbone(**WIDTH).to(BF16)
    wide = Backbone(**WIDTH).to(BF16).float()
    kept, lost = progress(wide, with_autocast), progress(low, in_16_bits)
    assert kept > 0.05
    assert abs(lost) < 0.4 * kept


def test_weights_in_float16_lose_less_at_the_same_rate(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    def share(dtype: torch.dtype) -> float:
        trained = Backbone(**WIDTH).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", drift_fast.DriftWarning)
            with drift_fast.Injection(trained, delta, optimizer=adamw(trained, 6e-5)) as injection:
                found = injection.lost_steps.share
        assert found is not None
        return found

    assert 0.0 < share(torch.float16) < share(BF16) / 2


class Keeping(torch.optim.AdamW):
    """AdamW of another package, which keeps something in the state that the first step makes."""

    kept: dict[str, Callable[[nn.Parameter], Any]]

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            for key, make in self.kept.items():
                self.state[parameter].setdefault(key, make(parameter))
        return result


KEPT: dict[str, dict[str, Callable[[nn.Parameter], Any]]] = {
    "float32 copies under any name": {"wide": lambda p: p.detach().float()},
    "the remainder of each step": {"kahan_comp": torch.zeros_like},
}


@pytest.mark.parametrize("kept", KEPT)
def test_an_optimizer_that_keeps_what_rounding_loses_is_not_remarked_upon(
    model: Backbone, delta: drift_fast.Delta, kept: str
) -> None:
    model.to(BF16)
    optimizer = Keeping(model.parameters(), lr=RATE)
    optimizer.kept = KEPT[kept]
    with drift_fast.Injection(model, delta, optimizer=optimizer) as injection:
        train(model, 3, injection=injection, optimizer=optimizer, loss=loss_of)
        assert injection.lost_steps.cause == ""


@pytest.mark.parametrize("option", ["bf16_stochastic_round", "kahan_sum", "master_weights"])
def test_neither_is_one_whose_options_say_so(
    model: Backbone, delta: drift_fast.Delta, option: str
) -> None:
    model.to(BF16)
    optimizer = adamw(model)
    optimizer.param_groups[0][option] = True
    drift_fast.Injection(model, delta, optimizer=optimizer).remove()
    optimizer.param_groups[0][option] = False
    assert said_by(lambda: drift_fast.Injection(model, delta, optimizer=optimizer).remove())


def test_another_package_s_optimizer_that_keeps_nothing_is_named_once_it_has_stepped(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    model.to(BF16)
    optimizer = Keeping(model.parameters(), lr=RATE)
    optimizer.kept = {}
    injection = drift_fast.Injection(model, delta, optimizer=optimizer)

    def step() -> None:
        train(model, 1, injection=injection, optimizer=optimizer, loss=loss_of)

    step()
    (text,) = said_by(step)
    assert "a step of Keeping" in text
    assert said_by(step) == []


def test_an_optimizer_that_was_not_given_is_seen_when_it_steps(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    model.to(BF16)
    injection = drift_fast.Injection(model, delta)
    other = nn.Linear(2, 2)
    discriminator = adamw(other)
    other(torch.ones(1, 2)).sum().backward()
    discriminator.step()
    assert injection.lost_steps.cause == ""
    optimizer = adamw(model)

    def steps() -> None:
        train(model, 2, injection=injection, optimizer=optimizer, loss=loss_of)

    (text,) = said_by(steps)
    assert "AdamW" in text


def test_planned_motion_beside_such_an_optimizer_warns_of_the_same_share(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    model.to(BF16)
    optimizer = adamw(model)
    (known,) = said_by(lambda: drift_fast.Injection(model, delta, optimizer=optimizer).remove())

    def move(optimizer: Any = None) -> None:
        with PlannedMotion(model, delta, progress=0.5, steps=2, optimizer=optimizer) as motion:
            train(model, 1, optimizer=optimizer or adamw(model), loss=loss_of)
            if optimizer is None:
                motion.step()

    (given,) = said_by(lambda: move(optimizer))
    (seen,) = said_by(move)
    assert given == known.replace(", that along Δ included", "; the planned motion is not") != known
    assert stated(seen) == pytest.approx(stated(given), abs=0.01)
    model.float()
    assert said_by(lambda: move(adamw(model))) == []
    model.to(BF16)
    assert said_by(lambda: move(adamw(model, 1e-2))) == []


def test_a_motion_warns_once_not_after_its_removal_and_leaves_nothing_where_that_is_an_error(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    model.to(BF16)
    optimizer = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", drift_fast.DriftWarning)
        with pytest.raises(drift_fast.DriftWarning):
            PlannedMotion(model, delta, progress=0.5, steps=2, optimizer=optimizer)
        # No hook is left that would see the optimizer, and no claim.
        train(model, 2, optimizer=optimizer, loss=loss_of)
        motion = PlannedMotion(model, delta, progress=0.5, steps=2)
        motion.remove()
        train(model, 2, optimizer=optimizer, loss=loss_of)

    def moved() -> None:
        with PlannedMotion(model, delta, progress=0.5, steps=3, optimizer=optimizer) as motion:
            train(model, 2, optimizer=optimizer, loss=loss_of)
            motion.load_state_dict(motion.state_dict())
            train(model, 3, optimizer=optimizer, loss=loss_of)

    assert len(said_by(moved)) == 1


def test_a_warm_up_that_starts_at_zero_is_looked_at_by_the_rate_it_rises_to(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    model.to(BF16)
    optimizer = adamw(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0.0
    with pytest.warns(drift_fast.DriftWarning, match=r"At a learning rate of 0\.0001"):
        drift_fast.Injection(model, delta, optimizer=optimizer)


def test_large_steps_and_those_of_unknown_size_are_not_warned_of(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    model.to(BF16)
    with drift_fast.Injection(model, delta, optimizer=adamw(model, 1e-2)) as injection:
        assert injection.lost_steps.share == 0.0
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    with drift_fast.Injection(model, delta, optimizer=sgd) as injection:
        assert injection.lost_steps.share is None
        assert "rounded away" in injection.lost_steps.cause


def test_attach_to_an_optimizer_warns_and_leaves_no_injection_where_warnings_are_errors(
    model: Backbone, delta: drift_fast.Delta
) -> None:
    model.to(BF16)
    optimizer = adamw(model)
    # pytest makes errors of them.
    with pytest.raises(drift_fast.DriftWarning, match=r"Accelerator\(mixed_precision=\"bf16\"\)"):
        drift_fast.attach(optimizer, delta, model=model)
    with pytest.warns(drift_fast.DriftWarning):
        drift_fast.attach(optimizer, delta, model=model)


@pytest.fixture
def adapted() -> Callable[..., Any]:
    peft = pytest.importorskip("peft")

    def make(**options: Any) -> Any:
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
        torch.manual_seed(0)
        return peft.get_peft_model(Backbone(**WIDTH).to(BF16), settings, **options)

    return make


def test_factors_of_an_adapter_are_looked_at_instead_of_its_weight(
    adapted: Callable[..., Any], delta: drift_fast.Delta
) -> None:
    options: dict[str, Any] = {"modules": ["re:(q|v|up)_proj.weight$"]}
    wide = adapted()
    drift_fast.Injection(wide, delta, optimizer=adamw(wide), **options).remove()
    low = adapted(autocast_adapter_dtype=False)
    with pytest.warns(drift_fast.DriftWarning, match="autocast_adapter_dtype=False"):
        injection = drift_fast.Injection(low, delta, optimizer=adamw(low), **options)
    # A is as large as its shape has it; B starts at zero, where any step is kept.
    factors = {name: p for name, p in low.named_parameters() if "lora_" in name}
    first = [p for name, p in factors.items() if "lora_A" in name]
    below = sum(int((p.float().abs() >= 2.0**-5).sum()) for p in first)
    share = below / sum(p.numel() for p in factors.values())
    assert injection.lost_steps.share == pytest.approx(share, abs=1e-6)
