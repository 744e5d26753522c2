"""drift_fast.integrations.lightning on Lightning's own Trainer.

Owns: that the gradient the optimizer uses is the accumulated one, injected, then clipped, under
every precision and way of stepping that Lightning has on a CPU; logging, resuming and refusal.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import drift_fast
from support import reference
from support.injection_models import Backbone, delta_towards, regression_batch
from support.processes import python, run

pytest.importorskip("lightning.pytorch")

import lightning.pytorch as pl

from drift_fast.integrations.lightning import DriftCallback

# So large that the weights after one step tell the gradient to seven digits.
RATE = 1e3


class Module(pl.LightningModule):
    """Records every gradient that its optimizer steps with."""

    def __init__(
        self,
        network: torch.nn.Module,
        *,
        rate: float = RATE,
        manual: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.rate = rate
        self.fused = fused
        self.automatic_optimization = not manual
        self.before_clipping: Callable[[], None] | None = None

    def training_step(self, batch: Any, index: int) -> torch.Tensor | None:
        inputs, targets = batch
        loss = torch.nn.functional.mse_loss(self.network(inputs), targets)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.before_clipping is not None:
            self.before_clipping()
            self.clip_gradients(optimizer, gradient_clip_val=0.01)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.network.parameters(), lr=self.rate, fused=self.fused)


def loader(count: int, *, batch: int = 8) -> DataLoader[Any]:
    inputs, targets = regression_batch(count * batch)
    return DataLoader(TensorDataset(inputs, targets), batch_size=batch)


def trainer(*callbacks: Any, **options: Any) -> Any:
    return pl.Trainer(
        **{
            "max_steps": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            "num_sanity_val_steps": 0,
            **options,
        }
    )


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def one_step(start: torch.nn.Module, data: Any, *callbacks: Any, **options: Any) -> dict[str, Any]:
    """Return the gradient that one step of SGD used, from how far it moved the weights."""
    network = copy.deepcopy(start)
    before = weights(network)
    kinds = {key: options.pop(key) for key in ("manual", "fused") if key in options}
    trainer(*callbacks, **options).fit(Module(network, **kinds), data)
    after = weights(network)
    return {n: (reference.exact(before[n]) - reference.exact(after[n])) / RATE for n in before}


@pytest.fixture
def network() -> torch.nn.Module:
    return Backbone()


@pytest.fixture
def delta(tmp_path: Path, network: torch.nn.Module) -> drift_fast.Delta:
    return delta_towards(tmp_path, network)


def assert_injected(
    found: dict[str, Any],
    plain: dict[str, Any],
    delta: drift_fast.Delta,
    *,
    alpha: float = 1.0,
    scale: str = "adaptive",
    clip: float = 0.0,
    tolerance: float = 1e-5,
) -> None:
    expected = {
        name: reference.inject(gradient, delta[name], alpha=alpha, scale=scale)
        if name in delta.shapes
        else gradient
        for name, gradient in plain.items()
    }
    if clip:
        total, expected = reference.clip(expected, clip)
        assert total > clip
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = reference.norm(gradient - expected[name])
        assert error <= tolerance * reference.norm(expected[name]), name


@pytest.mark.parametrize("clip", [0.0, 0.01], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_the_optimizer_uses_the_accumulated_gradient_injected_then_clipped(
    network: torch.nn.Module, delta: drift_fast.Delta, scale: str, accumulation: int, clip: float
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulation}
    plain = one_step(network, loader(accumulation), **options)
    callback = DriftCallback(delta, alpha=0.7, scale=scale)
    found = one_step(network, loader(accumulation), callback, gradient_clip_val=clip, **options)
    assert_injected(found, plain, delta, alpha=0.7, scale=scale, clip=clip)
    assert callback.injection is None


def test_a_delta_may_be_given_by_its_directory(tmp_path: Path, network: torch.nn.Module) -> None:
    delta = delta_towards(tmp_path, network, out=tmp_path / "delta")
    plain = one_step(network, loader(1))
    found = one_step(network, loader(1), DriftCallback(tmp_path / "delta"))
    assert_injected(found, plain, delta)


def test_the_gradients_of_mixed_precision_are_injected(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    plain = one_step(network, loader(1), precision="bf16-mixed")
    found = one_step(network, loader(1), DriftCallback(delta), precision="bf16-mixed")
    assert_injected(found, plain, delta)


@pytest.mark.parametrize(
    "fused", [False, True], ids=["unscaled first", "unscaled by the optimizer"]
)
@pytest.mark.parametrize("scale", reference.SCALES)
def test_a_loss_scale_does_not_change_the_push(
    network: torch.nn.Module, delta: drift_fast.Delta, scale: str, fused: bool
) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    def scaled() -> Any:
        # bfloat16 arithmetic, since a CPU has no float16 backward for everything.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        return plugin

    plain = one_step(network, loader(1), plugins=[scaled()], fused=fused)
    callback = DriftCallback(delta, scale=scale)
    found = one_step(network, loader(1), callback, plugins=[scaled()], fused=fused)
    assert_injected(found, plain, delta, scale=scale)


def test_a_step_that_a_scaler_leaves_out_does_not_stop_the_next_injection(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    inputs, targets = regression_batch(16)
    inputs[0, 0] = float("inf")
    data = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    module = Module(copy.deepcopy(network), rate=0.0)
    callback = DriftCallback(delta)
    seen = []
    taken = register_optimizer_step_post_hook(lambda *_: seen.append(callback.injection.injected))
    try:
        trainer(callback, max_steps=-1, max_epochs=1, plugins=[plugin]).fit(module, data)
    finally:
        taken.remove()
    assert seen == [len(delta.shapes)]


def test_manual_optimization_is_injected_at_the_optimizer_step(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    plain = one_step(network, loader(1), manual=True)
    found = one_step(network, loader(1), DriftCallback(delta), manual=True)
    assert_injected(found, plain, delta)


def test_manual_optimization_may_inject_before_it_clips(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    plain = one_step(network, loader(1), manual=True)
    callback = DriftCallback(delta)
    module = Module(copy.deepcopy(network), manual=True)
    module.before_clipping = lambda: callback.injection.step()
    before = weights(module.network)
    trainer(callback).fit(module, loader(1))
    after = weights(module.network)
    found = {n: (reference.exact(before[n]) - reference.exact(after[n])) / RATE for n in before}
    assert_injected(found, plain, delta, clip=0.01)


def test_a_step_taken_by_hand_leaves_the_next_one_to_the_hook(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    callback = DriftCallback(delta)
    module = Module(copy.deepcopy(network), rate=0.0, manual=True)

    def only_once() -> None:
        callback.injection.step()
        module.before_clipping = None

    module.before_clipping = only_once
    taken: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: taken.append(callback.injection.steps))
    try:
        trainer(callback, max_steps=3).fit(module, loader(3))
    finally:
        handle.remove()
    assert taken == [1, 2, 3]


def test_of_several_optimizers_the_one_that_holds_the_targets_is_followed(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    class Two(Module):
        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.network.head.parameters(), lr=RATE),
                torch.optim.SGD(self.network.model.parameters(), lr=RATE),
            ]

        def training_step(self, batch: Any, index: int) -> None:
            inputs, targets = batch
            loss = torch.nn.functional.mse_loss(self.network(inputs), targets)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    plain = one_step(network, loader(1))
    module = Two(copy.deepcopy(network), manual=True)
    before = weights(module.network)
    trainer(DriftCallback(delta), max_steps=2).fit(module, loader(1))
    after = weights(module.network)
    found = {n: (reference.exact(before[n]) - reference.exact(after[n])) / RATE for n in before}
    assert_injected(found, plain, delta)


def test_targets_spread_over_optimizers_are_refused(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    class Spread(Module):
        def configure_optimizers(self) -> Any:
            first, second = self.network.model.layers
            return [torch.optim.SGD(part.parameters(), lr=1.0) for part in (first, second)]

    with pytest.raises(drift_fast.DriftError, match="not in the optimizer"):
        trainer(DriftCallback(delta)).fit(Spread(network, manual=True), loader(1))


def test_progress_and_push_are_logged_at_logging_steps(
    tmp_path: Path, network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    from lightning.pytorch.loggers import CSVLogger

    before = weights(network)
    module = Module(network, rate=0.05)
    run = trainer(
        DriftCallback(delta, csv=tmp_path / "drift.csv"),
        max_steps=4,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        logger=CSVLogger(tmp_path),
    )
    run.fit(module, loader(8))
    overall, _ = reference.progress(weights(network), before, {n: delta[n] for n in delta})
    logged = run.callback_metrics
    assert float(logged["drift/progress"]) == pytest.approx(overall, rel=1e-5)
    assert float(logged["drift/alpha"]) == 1.0
    assert 0.0 < float(logged["drift/relative_push"]) < 1.0
    assert {"drift/progress/attn", "drift/progress/mlp", "drift/skipped"} <= logged.keys()
    assert not any("layers" in key for key in logged)
    written = (tmp_path / "drift.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in written[1:]} == {"2", "4"}
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "drift/progress" in rows[0]
    assert len(rows) == 1 + 2


def test_a_resumed_run_goes_on_with_its_progress(
    tmp_path: Path, network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    before = weights(network)
    callback = DriftCallback(delta, schedule="linear", total_steps=4)
    saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=2)
    options: dict[str, Any] = {
        "enable_checkpointing": True,
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
    }
    trainer(callback, saver, max_steps=2, **options).fit(Module(network, rate=0.05), loader(8))
    saved = next((tmp_path / "saved").iterdir())

    resumed = Module(Backbone(seed=9), rate=0.05)
    again = DriftCallback(delta, schedule="linear", total_steps=4)
    run = trainer(again, max_steps=4, **options)
    run.fit(resumed, loader(8), ckpt_path=saved)
    overall, _ = reference.progress(weights(resumed.network), before, {n: delta[n] for n in delta})
    assert float(run.callback_metrics["drift/progress"]) == pytest.approx(overall, rel=1e-4)
    # Four steps in all: the last of a linear schedule.
    assert float(run.callback_metrics["drift/alpha"]) < 0.5


def test_a_checkpoint_that_is_written_after_training_holds_the_state(
    tmp_path: Path, network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    options: dict[str, Any] = {"schedule": "linear", "total_steps": 4}
    run = trainer(DriftCallback(delta, **options), max_steps=2)
    run.fit(Module(network, rate=0.05), loader(8))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = DriftCallback(delta, **options)
    run = trainer(again, max_steps=3)
    run.fit(Module(Backbone(seed=9), rate=0.05), loader(8), ckpt_path=tmp_path / "last.ckpt")
    assert again.state_dict()["control"]["step"] == 3


def test_a_run_that_goes_on_without_the_state_says_so(
    tmp_path: Path, network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    run = trainer(max_steps=2)
    run.fit(Module(network, rate=0.05), loader(8))
    run.save_checkpoint(tmp_path / "plain.ckpt")
    run = trainer(DriftCallback(delta), max_steps=3)
    with pytest.warns(drift_fast.DriftWarning, match="schedules start anew"):
        run.fit(Module(Backbone(), rate=0.05), loader(8), ckpt_path=tmp_path / "plain.ckpt")


def test_a_schedule_takes_the_length_of_the_run_from_the_trainer(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    run = trainer(DriftCallback(delta, schedule="linear"), max_steps=4, log_every_n_steps=1)
    run.fit(Module(network, rate=0.01), loader(4))
    assert float(run.callback_metrics["drift/alpha"]) < 0.5


def test_a_second_fit_goes_on_in_the_schedule_of_the_longer_run(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    callback = DriftCallback(delta, schedule="linear")
    alphas: list[float] = []

    class Note(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            alphas.append(float(trainer.callback_metrics["drift/alpha"]))

    before = weights(network)
    module = Module(network, rate=0.05)
    run = trainer(callback, Note(), max_steps=2, log_every_n_steps=1)
    run.fit(module, loader(4, batch=4))
    run.fit_loop.epoch_loop.max_steps = 8
    with pytest.warns(drift_fast.DriftWarning, match="total_steps was 2 and is 8"):
        run.fit(module, loader(4, batch=4))
    assert alphas == pytest.approx([1, 0.5] + [1 - at / 8 for at in range(2, 8)])
    overall, _ = reference.progress(weights(network), before, {n: delta[n] for n in delta})
    assert float(run.callback_metrics["drift/progress"]) == pytest.approx(overall, rel=1e-4)
    # Another module has a run of its own, of which nothing is known.
    run.fit_loop.epoch_loop.max_steps = 10
    with pytest.warns(drift_fast.DriftWarning, match="schedules start anew"):
        run.fit(Module(Backbone(seed=9), rate=0.05), loader(4, batch=4))


def test_a_search_of_the_batch_size_does_not_shorten_the_schedule(
    tmp_path: Path, network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    from lightning.pytorch.tuner import Tuner

    class Sized(Module):
        batch_size = 2

        def train_dataloader(self) -> DataLoader[Any]:
            return loader(16 // self.batch_size, batch=self.batch_size)

    module = Sized(network, rate=0.01)
    run = trainer(
        DriftCallback(delta, schedule="linear"),
        max_epochs=1,
        max_steps=-1,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    Tuner(run).scale_batch_size(module, mode="power", max_trials=2, steps_per_trial=2)
    run.fit(module)
    steps = 16 // module.batch_size
    assert module.batch_size > 2
    assert float(run.callback_metrics["drift/alpha"]) == pytest.approx(1 / steps)


def test_a_step_without_a_loss_is_left_alone(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    class Sometimes(Module):
        def training_step(self, batch: Any, index: int) -> torch.Tensor | None:
            return None if index == 0 else super().training_step(batch, index)

    module = Sometimes(network, rate=0.0)
    run = trainer(DriftCallback(delta), max_steps=-1, max_epochs=1, log_every_n_steps=1)
    run.fit(module, loader(2))
    assert float(run.callback_metrics["drift/relative_push"]) > 0.0


def test_a_module_that_steps_around_lightning_fails(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    class Around(Module):
        def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any) -> None:
            optimizer.optimizer.step(closure)

    with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
        trainer(DriftCallback(delta)).fit(Around(network), loader(1))


def test_targets_may_be_frozen_while_another_optimizer_steps(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    class Toggling(Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__(network, manual=True)
            self.critic = torch.nn.Linear(3, 1)

        def training_step(self, batch: Any, index: int) -> None:
            for optimizer in reversed(self.optimizers()):
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(self.critic(self.network(batch[0])).square().mean())
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            parts = (self.network, self.critic)
            return [torch.optim.SGD(part.parameters(), lr=RATE) for part in parts]

    callback = DriftCallback(delta)
    run = trainer(callback, max_steps=4, log_every_n_steps=1)
    run.fit(Toggling(network), loader(2))
    assert run.callback_metrics["drift/relative_push"] > 0


def test_an_attached_optimizer_injects_after_the_closure(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    attached: list[drift_fast.Injection] = []

    class Attached(Module):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.network.parameters(), lr=RATE)
            attached.append(drift_fast.attach(optimizer, delta, model=self.network))
            return optimizer

    plain = one_step(network, loader(1))
    start = weights(network)
    trainer().fit(Attached(network), loader(1))
    moved = weights(network)
    found = {n: (reference.exact(start[n]) - reference.exact(moved[n])) / RATE for n in start}
    assert_injected(found, plain, delta)
    assert attached[0].steps == 1


def test_a_failed_run_leaves_nothing_attached(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    class Broken(Module):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            raise RuntimeError("no data today")

    callback = DriftCallback(delta)
    with pytest.raises(RuntimeError, match="no data today"):
        trainer(callback).fit(Broken(network), loader(1))
    assert callback.injection is None
    drift_fast.Injection(network, delta).remove()


def test_overlap_is_refused_where_gradients_accumulate(
    network: torch.nn.Module, delta: drift_fast.Delta
) -> None:
    run = trainer(DriftCallback(delta, overlap=True), accumulate_grad_batches=2)
    with pytest.raises(drift_fast.DriftError, match="accumulate_grad_batches"):
        run.fit(Module(network), loader(2))


def test_attach_names_the_callback(delta: drift_fast.Delta) -> None:
    with pytest.raises(TypeError, match="DriftCallback"):
        drift_fast.attach(pl.Trainer(accelerator="cpu", logger=False), delta)


def test_an_option_that_does_not_exist_is_refused_at_once(delta: drift_fast.Delta) -> None:
    with pytest.raises(TypeError, match=r"'alhpa'; did you mean 'alpha'"):
        DriftCallback(delta, alhpa=1.0)


DDP = """
import json, sys
sys.path[:0] = {tests!r}
import torch, lightning.pytorch as pl
import test_lightning as t
from support.injection_models import Backbone
from drift_fast.integrations.lightning import DriftCallback
network = Backbone()
module = t.Module(network)
before = t.weights(network)
callbacks = [DriftCallback({delta!r}, alpha=0.7)] if {injected} else []
run = t.trainer(*callbacks, devices=2, strategy="ddp", accumulate_grad_batches=2)
run.fit(module, t.loader(4))
after = t.weights(network)
if run.global_rank == 0:
    moved = {{n: ((before[n].double() - after[n].double()) / t.RATE).tolist() for n in before}}
    open({out!r}, "w").write(json.dumps(moved))
"""


@pytest.mark.slow
def test_two_processes_inject_into_the_reduced_gradient(
    tmp_path: Path, network: torch.nn.Module
) -> None:
    delta = delta_towards(tmp_path, network, out=tmp_path / "delta")
    # The default sampler deals samples out in turn; four batches of eight make one step.
    runs = {}
    for injected in (False, True):
        out = tmp_path / f"{injected}.json"
        script = tmp_path / f"run_{injected}.py"
        script.write_text(
            DDP.format(
                tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])],
                delta=str(tmp_path / "delta"),
                injected=injected,
                out=str(out),
            )
        )
        run(sys.executable, script, limit=250)
        moved = json.loads(out.read_text())
        runs[injected] = {name: reference.exact(values) for name, values in moved.items()}
    assert_injected(runs[True], runs[False], delta, alpha=0.7)
    single = one_step(network, loader(4), accumulate_grad_batches=4)
    assert_injected(runs[True], single, delta, alpha=0.7)


def test_the_older_package_name_is_served_too(tmp_path: Path) -> None:
    script = (
        "import pytorch_lightning\n"
        "from drift_fast.integrations.lightning import DriftCallback\n"
        "assert issubclass(DriftCallback, pytorch_lightning.Callback)\n"
    )
    pytest.importorskip("pytorch_lightning")
    python(script, limit=250, cwd=tmp_path, forked=True)


class AdamModule(Module):
    """Trains by AdamW at a rate of fine-tuning."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-5)


def test_weights_that_lose_steps_are_told_the_precision_that_keeps_them(
    tmp_path: Path, network: torch.nn.Module
) -> None:
    delta = delta_towards(tmp_path, network)
    with pytest.warns(drift_fast.DriftWarning, match='precision="bf16-mixed"'):
        trainer(DriftCallback(delta), precision="bf16-true").fit(AdamModule(network), loader(1))
    wide = AdamModule(Backbone())
    trainer(DriftCallback(delta), precision="bf16-mixed").fit(wide, loader(1))
