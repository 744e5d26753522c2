"""Planned motion under the Hugging Face Trainer.

Owns: where a run ends, what is logged, checkpoints that resume, removal and refusals. Models are
tiny and random; every run is a few steps on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from support import reference
from support.injection_models import moved_text, saved, text_samples, tiny_qwen2, weights_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
attach_motion = pytest.importorskip("drift_fast.integrations.trainer_motion").attach_motion

LAMBDAS = {"attn": 0.7, "mlp": 1.3}


def make_trainer(model: torch.nn.Module, folder: Path, **arguments: Any) -> Any:
    callbacks = arguments.pop("callbacks", None)
    options: dict[str, Any] = {
        "output_dir": str(folder / "runs"),
        "per_device_train_batch_size": 2,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**options, **arguments}),
        train_dataset=text_samples(12),
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> drift_fast.Delta:
    folder = tmp_path_factory.mktemp("pair")
    text = tiny_qwen2()
    expert = saved(moved_text(text), folder / "expert")
    return drift_fast.compute_delta(expert, saved(text, folder / "base"), dtype="float32")


def progress_by_kind(model: torch.nn.Module, delta: drift_fast.Delta) -> dict[str, float]:
    start = weights_of(tiny_qwen2())
    found = {}
    for kind, mark in (("attn", "self_attn"), ("mlp", "mlp")):
        some = {name: delta[name] for name in delta if mark in name}
        found[kind], _ = reference.progress(weights_of(model), start, some)
    return found


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_that_learns_nothing_ends_at_the_plan(
    tmp_path: Path, delta: drift_fast.Delta, accumulation: int
) -> None:
    model = tiny_qwen2()
    trainer = make_trainer(
        model, tmp_path, learning_rate=0.0, gradient_accumulation_steps=accumulation
    )
    attached = attach_motion(trainer, delta, progress=LAMBDAS, window=0.5)
    assert attached.motion is None
    trainer.train()
    assert attached.motion is not None
    assert attached.motion.steps == attached.motion.taken == 4
    assert progress_by_kind(model, delta) == pytest.approx(LAMBDAS, abs=1e-5)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for step, row in enumerate(logged, 1):
        share = min(1.0, step / 4)
        for kind, value in LAMBDAS.items():
            assert row[f"drift/planned/{kind}"] == pytest.approx(share * value, abs=1e-9)
            assert row[f"drift/progress/{kind}"] == pytest.approx(share * value, abs=1e-5)
        assert row["drift/progress"] == pytest.approx(row["drift/planned"], abs=1e-5)
    assert len(logged) == 8
    assert not any("layers" in key for row in logged for key in row)


def test_a_run_that_learns_ends_at_the_plan_and_what_it_learns(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    plain, model = tiny_qwen2(), tiny_qwen2()
    make_trainer(plain, tmp_path).train()
    trainer = make_trainer(model, tmp_path)
    attach_motion(trainer, delta, progress=LAMBDAS, steps=2)
    trainer.train()
    own = progress_by_kind(plain, delta)
    for kind, found in progress_by_kind(model, delta).items():
        # Each run learns from where it is, so what they learn along Δ differs a little.
        assert found == pytest.approx(LAMBDAS[kind] + own[kind], abs=0.011)


@pytest.mark.parametrize(
    ("window", "total", "expected"), [(0.1, 8, 1), (0.07, 100, 7), (0.071, 100, 8), (1.0, 3, 3)]
)
def test_a_window_is_a_share_of_the_optimizer_steps(
    tmp_path: Path, delta: drift_fast.Delta, window: float, total: int, expected: int
) -> None:
    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == expected

    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=total, callbacks=[Stop()])
    attached = attach_motion(trainer, delta, progress=0.5, window=window)
    trainer.train()
    assert attached.motion is not None
    assert attached.motion.steps == attached.motion.taken == expected


def test_a_run_resumed_amid_the_motion_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = tiny_qwen2()
    trainer = make_trainer(whole, tmp_path, **arguments)
    first = attach_motion(trainer, delta, progress=LAMBDAS, steps=5)
    trainer.train()
    checkpoint = tmp_path / "runs" / "checkpoint-3"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert "drift_fast.PlannedMotion" in state["stateful_callbacks"]

    resumed = tiny_qwen2()
    trainer = make_trainer(resumed, tmp_path, **arguments)
    second = attach_motion(trainer, delta, progress=LAMBDAS, steps=5)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in weights_of(resumed).items():
        torch.testing.assert_close(tensor, whole.get_parameter(name), rtol=1e-6, atol=1e-8)
    assert second.motion is not None
    assert second.motion.taken == 5
    assert second.metrics() == pytest.approx(first.metrics(), rel=1e-4, abs=1e-6)


def test_a_checkpoint_without_the_motions_state_warns(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tiny_qwen2(), tmp_path, **arguments).train()
    trainer = make_trainer(tiny_qwen2(), tmp_path, **arguments)
    attached = attach_motion(trainer, delta, progress=0.5, steps=2)
    with pytest.warns(drift_fast.DriftWarning, match="resumes at step 2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
    assert attached.motion is not None
    assert attached.motion.finished


def test_a_run_that_ends_before_its_motion_warns(tmp_path: Path, delta: drift_fast.Delta) -> None:
    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    trainer = make_trainer(tiny_qwen2(), tmp_path, callbacks=[Stop()])
    attach_motion(trainer, delta, progress=0.5, steps=3)
    with pytest.warns(drift_fast.DriftWarning, match="ended after 1 of 3 steps"):
        trainer.train()


def test_removal_restores_plain_training(tmp_path: Path, delta: drift_fast.Delta) -> None:
    plain, model = tiny_qwen2(), tiny_qwen2()
    make_trainer(plain, tmp_path, max_steps=2).train()
    trainer = make_trainer(model, tmp_path, max_steps=2)
    attached = attach_motion(trainer, delta, progress=0.5)
    attached.remove()
    attached.remove()
    assert "log" not in trainer.__dict__
    trainer.train()
    for name, tensor in weights_of(model).items():
        assert torch.equal(tensor, plain.get_parameter(name)), name
    assert not any(key.startswith("drift/") for row in trainer.state.log_history for key in row)
    with pytest.raises(drift_fast.DriftError, match=r"begins with trainer\.train"):
        attached.metrics()


def test_a_second_motion_and_a_second_run_are_refused(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=2)
    attached = attach_motion(trainer, delta, progress=0.5)
    with pytest.raises(drift_fast.DriftError, match="already"):
        attach_motion(trainer, delta, progress=0.5)
    trainer.train()
    with pytest.raises(drift_fast.DriftError, match="moved the weights 1 times already"):
        trainer.train()
    attached.remove()
    attach_motion(trainer, delta, progress=0.5)
    trainer.train()


def test_a_motion_longer_than_the_run_is_refused(tmp_path: Path, delta: drift_fast.Delta) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path, max_steps=2)
    attach_motion(trainer, delta, progress=0.5, steps=3)
    with pytest.raises(drift_fast.DriftError, match="steps=3 does not end in a run of 2"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0.0}, ValueError, "window must be"),
        ({"window": 1.5}, ValueError, "window must be"),
        ({"window": "all"}, ValueError, "window must be"),
        ({"steps": 0}, ValueError, "steps must be"),
        ({"optimizer": None}, ValueError, "its own optimizer"),
        ({"module": "attn"}, TypeError, "module"),
    ],
)
def test_arguments_without_meaning_are_refused_at_once(
    tmp_path: Path,
    delta: drift_fast.Delta,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    trainer = make_trainer(tiny_qwen2(), tmp_path)
    with pytest.raises(error, match=message):
        attach_motion(trainer, delta, progress=0.5, **options)
    assert "log" not in trainer.__dict__


def test_what_is_no_trainer_is_refused(delta: drift_fast.Delta) -> None:
    with pytest.raises(TypeError, match="expected a transformers Trainer"):
        attach_motion(tiny_qwen2(), delta, progress=0.5)
