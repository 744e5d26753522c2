"""What a Trainer's run is told: steps that are lost, targets out of reach, where λ heads for."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from drift_fast import predict_progress
from drift_fast.inject.predict import joint_rms
from support.injection_models import moved_text, saved, text_samples, tiny_llava, tiny_qwen2

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 20


@pytest.fixture(scope="module")
def llava_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text expert and a LLaVA of the same backbone, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("pair")
    text = tiny_qwen2()
    expert = saved(moved_text(text).to(torch.bfloat16), folder / "expert")
    return expert, saved(tiny_llava(text=text).to(torch.bfloat16), folder / "multimodal")


@pytest.fixture(scope="module")
def delta(llava_pair: tuple[Path, Path]) -> drift_fast.Delta:
    return drift_fast.compute_delta(*llava_pair, dtype="float32")


@pytest.fixture
def load(llava_pair: tuple[Path, Path]) -> Callable[..., torch.nn.Module]:
    return functools.partial(
        transformers.LlavaForConditionalGeneration.from_pretrained, llava_pair[1]
    )


def trained(
    model: torch.nn.Module,
    folder: Path,
    delta: drift_fast.Delta,
    options: dict[str, Any] | None = None,
    attach: Callable[..., Any] = drift_fast.attach,
    **arguments: Any,
) -> tuple[list[str], list[dict[str, float]]]:
    """Train with what is attached; return what was warned of, and the logged rows."""
    settings: dict[str, Any] = {
        "output_dir": str(folder / "runs"),
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**settings, **arguments}),
        train_dataset=text_samples(10),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(trainer, delta, **(options or {}))
        trainer.train()
    said = [str(one.message) for one in caught if one.category is drift_fast.DriftWarning]
    return said, [row for row in trainer.state.log_history if "loss" in row]


def test_weights_as_they_are_stored_lose_steps_and_the_remedy_keeps_them(
    tmp_path: Path, load: Callable[..., torch.nn.Module], delta: drift_fast.Delta
) -> None:
    # transformers takes the stored dtype where none is given.
    (first, later), low = trained(load(), tmp_path, delta)
    assert "the weights are bfloat16" in first
    for word in ("from_pretrained(…, dtype=torch.float32)", "bf16=True", "TrainingArguments"):
        assert word in first
    assert "The first cause to look at: the weights are bfloat16" in later
    (only,), wide = trained(load(dtype=torch.float32), tmp_path, delta, bf16=True)
    assert "times Σ learning rate would reach 0.05, with a learning rate of " in only
    assert low[-1]["drift/progress"] < 0.5 * wide[-1]["drift/progress"]


def test_planned_motion_says_so_too_with_the_same_remedy(
    tmp_path: Path, load: Callable[..., torch.nn.Module], delta: drift_fast.Delta
) -> None:
    def said(model: torch.nn.Module, **arguments: Any) -> list[str]:
        plan = {"progress": 0.5, "steps": 1}
        attach = drift_fast.attach_motion
        return trained(model, tmp_path, delta, plan, attach, max_steps=2, **arguments)[0]

    (low,) = said(load())
    assert "the weights are bfloat16" in low
    assert "the planned motion is not" in low
    assert "TrainingArguments" in low
    assert said(load(dtype=torch.float32), bf16=True) == []


def test_the_end_that_is_predicted_is_about_that_which_comes(
    tmp_path: Path, load: Callable[..., torch.nn.Module], delta: drift_fast.Delta
) -> None:
    rates = {"learning_rate": 1e-3, "max_steps": 60}
    # Biases have a far larger Δ than weights here.
    size = joint_rms((row.delta_sq, row.numel) for row in delta.stats)
    for options in ({"alpha": 1.0}, {"alpha": 4.0, "schedule": "window(0, 0.2)"}):
        said, rows = trained(load(dtype=torch.float32), tmp_path, delta, options, **rates)
        assert said == []
        schedule: Any = options.get("schedule")
        alpha: Any = options["alpha"]
        expected = predict_progress(alpha, [1e-3] * 60, size, schedule=schedule)
        assert rows[-1]["drift/progress"] == pytest.approx(expected, rel=0.2)
        early = rows[len(rows) // 3]["drift/predicted_progress"]
        assert early == pytest.approx(rows[-1]["drift/progress"], rel=0.35)


def test_a_target_out_of_reach_says_what_would_reach_it(
    tmp_path: Path, load: Callable[..., torch.nn.Module], delta: drift_fast.Delta
) -> None:
    model = functools.partial(load, dtype=torch.float32)
    said, _ = trained(model(), tmp_path, delta, {"progress_target": 0.5})
    assert "progress_target=0.5 is out of reach" in said[0]
    assert "times Σ learning rate would reach it, with a learning rate of " in said[0]
    rates = {"learning_rate": 5e-3}
    assert trained(model(), tmp_path, delta, {"progress_target": 0.3}, **rates)[0] == []


def test_a_run_that_moves_away_from_the_expert_is_not_told_to_raise_alpha(
    tmp_path: Path, load: Callable[..., torch.nn.Module], delta: drift_fast.Delta
) -> None:
    model = load(dtype=torch.float32)
    assert trained(model, tmp_path, delta, {"alpha": -1.0}, max_steps=4)[0] == []


def test_a_directory_is_no_csv_file_and_stays(
    tmp_path: Path, load: Callable[..., torch.nn.Module], delta: drift_fast.Delta
) -> None:
    with pytest.raises(ValueError, match="csv names the directory"):
        trained(load(dtype=torch.float32), tmp_path, delta, {"csv": tmp_path})
    assert tmp_path.is_dir()


def test_a_run_shorter_than_its_logs_warns_and_each_run_has_a_csv_of_its_own(
    tmp_path: Path, load: Callable[..., torch.nn.Module], delta: drift_fast.Delta
) -> None:
    file = tmp_path / "m.csv"
    for _ in range(2):
        (said,), rows = trained(
            load(dtype=torch.float32), tmp_path, delta, {"csv": file}, logging_steps=500
        )
        assert rows == []
        assert "less than 0.05" in said
    for path in (file, tmp_path / "m-1.csv"):
        text = path.read_text()
        assert text.startswith("step,metric,value")
        assert text.count(",progress,") == 1
        assert f"{STEPS},progress," in text
