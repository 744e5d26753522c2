"""A Trainer that runs more than once, for another length, or with another model.

Owns: that an injection follows what each start of training says, and that every checkpoint holds
its state, whoever asks for it. Models are tiny and random; every run is a few steps on the CPU.
"""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from support.injection_models import moved_text, saved, text_samples, tiny_qwen2, weights_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from drift_fast.integrations.trainer_motion import attach_motion  # noqa: E402

# Most runs here are too short to move far along Δ, which the injection says.
pytestmark = pytest.mark.filterwarnings("ignore:progress along:drift_fast.DriftWarning")

SAMPLES = 16


class OutOfMemory(transformers.Trainer):  # type: ignore[misc]
    """Runs out of memory once, at the loss of this number."""

    fails_at = 0
    losses = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.losses += 1
        if self.losses == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().compute_loss(*args, **kwargs)


def make_trainer(
    model: torch.nn.Module | None, folder: Path, *, kind: Any = None, **arguments: Any
) -> Any:
    objects = {
        name: arguments.pop(name)
        for name in ("callbacks", "model_init", "optimizers", "eval_dataset")
        if name in arguments
    }
    options: dict[str, Any] = {
        "output_dir": str(folder / "runs"),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return (kind or transformers.Trainer)(
        model=model,
        args=transformers.TrainingArguments(**{**options, **arguments}),
        train_dataset=text_samples(SAMPLES),
        **objects,
    )


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> drift_fast.Delta:
    folder = tmp_path_factory.mktemp("pair")
    text = tiny_qwen2()
    return drift_fast.compute_delta(
        saved(moved_text(text), folder / "expert"),
        saved(text, folder / "multimodal"),
        dtype="float32",
    )


def alphas(trainer: Any) -> list[float]:
    rows = trainer.state.log_history
    return [round(row["drift/alpha"], 6) for row in rows if "drift/alpha" in row]


def line(steps: int, of: int | None = None) -> list[float]:
    """Return the factors of the schedule "linear"."""
    return [round(1 - at / (of or steps), 6) for at in range(steps)]


# --- notebooks --------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [drift_fast.attach, attach_motion])
def test_a_cell_that_is_run_again_attaches_to_the_new_trainer(
    tmp_path: Path, delta: drift_fast.Delta, verb: Any
) -> None:
    model = tiny_qwen2()
    options = {} if verb is drift_fast.attach else {"progress": 0.1}
    for _ in range(2):
        trainer = make_trainer(model, tmp_path, max_steps=4)
        verb(trainer, delta, **options)
        trainer.train()
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    # The model may go on to be used.
    assert gone() is None


def test_a_trainer_that_is_attached_to_twice_says_what_to_remove(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=2)
    attached = drift_fast.attach(trainer, delta)
    with pytest.raises(drift_fast.DriftError, match=r"remove\(\) on what attach\(\) returned"):
        drift_fast.attach(trainer, delta)
    attached.remove()
    drift_fast.attach(trainer, delta)
    trainer.train()


# --- lengths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_batch_that_did_not_fit_is_tried_again_with_the_schedule_of_the_longer_run(
    tmp_path: Path, delta: drift_fast.Delta, fails_at: int
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path, kind=OutOfMemory, auto_find_batch_size=True)
    trainer.fails_at = fails_at
    injection = drift_fast.attach(trainer, delta, schedule="linear")
    trainer.train()
    steps = trainer.state.global_step
    assert steps > SAMPLES // 4
    assert alphas(trainer) == line(steps)
    assert injection.steps == steps


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_a_second_run_of_another_length_has_its_own_schedule(
    tmp_path: Path, delta: drift_fast.Delta, scope: Any
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path)
    drift_fast.attach(trainer, delta, schedule="linear", scope=scope)
    trainer.train()
    assert alphas(trainer) == line(4)
    trainer.args.num_train_epochs = 2
    trainer.train()
    assert alphas(trainer) == line(8)
    trainer.args.max_steps = 3
    trainer.train()
    assert alphas(trainer) == line(3)


def test_a_number_of_steps_that_changes_after_attaching_counts(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=4)
    injection = drift_fast.attach(trainer, delta, schedule="linear")
    assert injection.injection is not None
    trainer.args.max_steps = 8
    trainer.train()
    assert alphas(trainer) == line(8)


def test_a_length_that_was_stated_stays(tmp_path: Path, delta: drift_fast.Delta) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=2)
    drift_fast.attach(trainer, delta, schedule="linear", total_steps=10)
    for steps in (2, 4):
        trainer.args.max_steps = steps
        trainer.train()
        assert alphas(trainer) == line(steps, of=10)


def test_a_target_is_planned_over_each_run(tmp_path: Path, delta: drift_fast.Delta) -> None:
    def of(*lengths: int) -> list[float]:
        trainer = make_trainer(tiny_qwen2(), tmp_path, learning_rate=0.0, max_steps=lengths[0])
        with drift_fast.attach(trainer, delta, progress_target=0.5):
            for length in lengths:
                trainer.args.max_steps = length
                trainer.train()
            return alphas(trainer)

    assert of(4, 6) == of(6)


def test_a_run_that_resumes_with_more_steps_goes_on_in_the_longer_schedule(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path, save_strategy="steps", save_steps=4)
    drift_fast.attach(trainer, delta, schedule="linear")
    trainer.train()
    trainer = make_trainer(tiny_qwen2(), tmp_path, num_train_epochs=2)
    injection = drift_fast.attach(trainer, delta, schedule="linear")
    with pytest.warns(drift_fast.DriftWarning, match="total_steps was 4 and is 8"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-4"))
    assert alphas(trainer) == line(4) + line(8)[4:]
    assert injection.steps == 8


def test_the_forecast_is_of_the_run_that_trains(tmp_path: Path, delta: drift_fast.Delta) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=2)
    injection = drift_fast.attach(trainer, delta)
    for steps in (2, 5):
        trainer.args.max_steps = steps
        trainer.train()
        assert len(injection._drive) == steps


# --- models -----------------------------------------------------------------------------------


def test_each_model_of_model_init_is_injected_into(tmp_path: Path, delta: drift_fast.Delta) -> None:
    wanted = make_trainer(tiny_qwen2(), tmp_path, max_steps=3)
    drift_fast.attach(wanted, delta, schedule="linear")
    wanted.train()
    trainer = make_trainer(None, tmp_path, model_init=lambda: tiny_qwen2(), max_steps=3)
    injection = drift_fast.attach(trainer, delta, schedule="linear")
    assert injection.injection is None
    assert injection.coverage.fraction == 1.0
    for _ in range(2):
        trainer.train()
        expected = weights_of(wanted.model)
        for name, tensor in weights_of(trainer.model).items():
            assert torch.equal(tensor, expected[name]), name
        assert injection.metrics()["progress"] == wanted.state.log_history[-2]["drift/progress"]


def test_an_alpha_that_was_set_holds_for_the_next_model(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(None, tmp_path, model_init=lambda: tiny_qwen2(), max_steps=2)
    injection = drift_fast.attach(trainer, delta)
    trainer.train()
    injection.alpha = 0.25
    trainer.train()
    assert alphas(trainer) == [0.25, 0.25]


def test_a_second_run_from_a_checkpoint_without_the_state_starts_anew(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    plain = make_trainer(tiny_qwen2(), tmp_path, save_strategy="steps", save_steps=2)
    plain.train()
    trainer = make_trainer(tiny_qwen2(), tmp_path)
    drift_fast.attach(trainer, delta, schedule="linear")
    trainer.train()
    with pytest.warns(drift_fast.DriftWarning, match="schedules start anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
    assert alphas(trainer) == line(4)[:2]


def test_a_search_of_hyperparameters_builds_everything_anew(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(None, tmp_path, model_init=lambda: tiny_qwen2(), max_steps=2)
    injection = drift_fast.attach(trainer, delta, schedule="linear")
    for steps in (2, 3):
        trainer.args.max_steps = steps
        # What `hyperparameter_search` does before each run.
        trainer.create_accelerator_and_postprocess()
        trainer.train()
        assert alphas(trainer) == line(steps)
        assert injection.injected == len(injection.targets)


def test_a_model_that_was_exchanged_before_training_is_injected_into(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=3)
    injection = drift_fast.attach(trainer, delta)
    trainer.model = trainer.model_wrapped = copy.deepcopy(trainer.model)
    trainer.train()
    assert injection.injection is not None
    assert injection.injection.lost_from(trainer.model) == []
    assert injection.injected == len(injection.targets)


def test_a_layer_that_was_exchanged_between_runs_is_injected_into(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=2)
    injection = drift_fast.attach(trainer, delta, schedule="linear")
    trainer.train()
    before = injection.metrics()["progress"]
    layer = trainer.model.model.layers[0]
    layer.mlp = copy.deepcopy(layer.mlp)
    trainer.optimizer = None
    trainer.args.max_steps = 4
    trainer.train()
    assert alphas(trainer) == line(4)
    # The same model, so that λ goes on from where it was.
    assert injection.metrics()["progress"] > before > 0


def test_adapters_that_are_added_before_training_are_injected_into(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    peft = pytest.importorskip("peft")
    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=2)
    injection = drift_fast.attach(trainer, delta)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    trainer.model = trainer.model_wrapped = peft.get_peft_model(trainer.model, config)
    trainer.train()
    assert all("lora" not in name for name in injection.targets)
    assert injection.injected == len(injection.targets) > 0


# --- checkpoints ------------------------------------------------------------------------------


def state_in(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    found: dict[str, Any] = state["stateful_callbacks"]
    return found


class Asks(transformers.TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint after one step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == 2


def test_a_checkpoint_that_a_later_callback_asks_for_holds_the_state(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path)
    drift_fast.attach(trainer, delta, schedule="linear")
    trainer.add_callback(Asks())
    trainer.train()
    found = state_in(tmp_path / "runs" / "checkpoint-2")
    assert found["drift_fast.Injection"]["control"]["step"] == 2


def test_a_checkpoint_of_the_best_evaluation_holds_the_state(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(
        tiny_qwen2(),
        tmp_path,
        save_strategy="best",
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset=text_samples(SAMPLES),
    )
    drift_fast.attach(trainer, delta, schedule="linear")
    trainer.train()
    found = state_in(tmp_path / "runs" / "checkpoint-3")
    assert found["drift_fast.Injection"]["control"]["step"] == 3


def test_a_motion_is_in_a_checkpoint_that_a_later_callback_asks_for(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path)
    attached = attach_motion(trainer, delta, progress=0.5, steps=3)
    trainer.add_callback(Asks())
    trainer.train()
    found = state_in(tmp_path / "runs" / "checkpoint-2")
    assert found["drift_fast.PlannedMotion"]["taken"] == 2
    attached.remove()
    assert "_save_checkpoint" not in trainer.__dict__


# --- motions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_motion_goes_on_where_a_batch_did_not_fit(
    tmp_path: Path, delta: drift_fast.Delta, fails_at: int
) -> None:
    trainer = make_trainer(
        tiny_qwen2(), tmp_path, kind=OutOfMemory, auto_find_batch_size=True, learning_rate=0.0
    )
    trainer.fails_at = fails_at
    attached = attach_motion(trainer, delta, progress=0.5, window=0.5)
    trainer.train()
    assert attached.motion is not None
    # Half of the run that it began in.
    steps = 2 if fails_at > 1 else -(-trainer.state.global_step // 2)
    assert attached.motion.steps == attached.motion.taken == steps
    assert attached.metrics()["progress"] == pytest.approx(0.5, abs=1e-4)


def test_a_motion_resumes_in_a_longer_run_with_the_steps_that_it_had(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    options: dict[str, Any] = {"learning_rate": 0.0, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=4, **options)
    attach_motion(trainer, delta, progress=0.5, window=0.5)
    trainer.train()
    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=12, **options)
    attached = attach_motion(trainer, delta, progress=0.5, window=0.5)
    trainer.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-1"))
    assert attached.motion is not None
    assert attached.motion.steps == attached.motion.taken == 2
    assert attached.metrics()["progress"] == pytest.approx(0.5, abs=1e-4)
    # The same trainer may resume once more, on the weights of the checkpoint.
    trainer.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-1"))
    assert attached.metrics()["progress"] == pytest.approx(0.5, abs=1e-4)


def test_a_motion_moves_each_model_of_model_init(tmp_path: Path, delta: drift_fast.Delta) -> None:
    trainer = make_trainer(
        None, tmp_path, model_init=lambda: tiny_qwen2(), max_steps=3, learning_rate=0.0
    )
    attached = attach_motion(trainer, delta, progress=0.5, steps=2)
    for _ in range(2):
        trainer.train()
        assert attached.metrics()["progress"] == pytest.approx(0.5, abs=1e-4)


# --- optimizers and parameters that are not those of the targets ---------------------------------


@pytest.mark.parametrize("layers", [(), (1,)], ids=["none", "half"])
def test_an_optimizer_that_lacks_targets_is_refused_before_the_first_step(
    tmp_path: Path, delta: drift_fast.Delta, layers: tuple[int, ...]
) -> None:
    model: Any = tiny_qwen2()
    held = [p for at in layers for p in model.model.layers[at].parameters()]
    optimizer = torch.optim.SGD([*held, *model.lm_head.parameters()], lr=1e-2)
    trainer = make_trainer(model, tmp_path, optimizers=(optimizer, None))
    start = weights_of(model)
    injection = drift_fast.attach(trainer, delta)
    with pytest.raises(drift_fast.DriftError, match="are not in the optimizer"):
        trainer.train()
    injection.remove()
    assert all(torch.equal(found, start[name]) for name, found in weights_of(model).items())
    # The remedy, followed.
    if layers:
        with drift_fast.attach(trainer, delta, layers=layers):
            trainer.train()


class Freezes(transformers.TrainerCallback):  # type: ignore[misc]
    """Freezes the first layer at the beginning of the third step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].model.layers[0].requires_grad_(False)


def test_targets_that_a_callback_freezes_stop_the_run(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path, callbacks=[Freezes()])
    with (
        drift_fast.attach(trainer, delta),
        pytest.raises(drift_fast.DriftError, match="were frozen after attaching"),
    ):
        trainer.train()
    assert trainer.state.global_step == 2
