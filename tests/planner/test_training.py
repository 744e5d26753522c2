"""Training runs and what they say about a configuration file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import drift_fast
from drift_fast.planner.configuration import Configuration
from drift_fast.planner.training import Training
from support.planner_models import (
    MULTIMODAL,
    REASONING,
    RECIPE,
)
from support.synthetic import refused


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 0.05, 7])
def test_learning_rates_are_those_of_transformers(scheduler: str, warmup: float) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    run = Training(steps=50, scheduler=scheduler, warmup=warmup, learning_rate=2e-3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    steps = math.ceil(50 * warmup) if warmup < 1 else int(warmup)
    schedule = transformers.get_scheduler(
        scheduler, optimizer, num_warmup_steps=steps, num_training_steps=50
    )
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert run.rates() == pytest.approx(expected)
    assert run.sum_of_rates() == pytest.approx(math.fsum(expected))


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"samples": 4000, "epochs": 3.0, "gpus": 8, "sharding": "zero2"}, 1500),
        ({"samples": 10, "batch": 4}, 3),
        ({"samples": 10, "batch": 2, "accumulation": 2, "epochs": 2}, 6),
        ({"steps": 7, "samples": 4000}, 7),
    ],
)
def test_steps_are_counted_as_the_trainer_does(given: dict[str, Any], steps: int) -> None:
    assert Training(**given).optimizer_steps == steps


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ["steps", "samples"]),
        ({"steps": 0}, ["steps", "from 1", "0"]),
        ({"steps": 1, "sharding": "zero4"}, ["sharding", "zero3", "zero4"]),
        ({"steps": 1, "gpus": 2}, ["2 GPUs", "none", "fsdp2"]),
        ({"steps": 1, "offload": "optimizer"}, ["offload", "none"]),
        ({"steps": 1, "sharding": "zero2", "precision": "bf16"}, ["float32 copies"]),
        ({"steps": 1, "image_tokens": 9, "tokens": 8}, ["image_tokens", "9", "8"]),
        ({"steps": 1, "max_tokens": 9}, ["max_tokens", "9", "2048"]),
        ({"steps": 1, "learning_rate": math.nan}, ["learning_rate", "nan"]),
    ],
)
def test_a_run_without_meaning_is_refused(given: dict[str, Any], words: list[str]) -> None:
    with refused(ValueError, *words):
        Training(**given)


def test_configurations_of_the_trainer_and_of_llamafactory_say_the_same() -> None:
    pytest.importorskip("yaml")
    pytest.importorskip("transformers")
    plans = [
        drift_fast.plan(
            REASONING, MULTIMODAL, config=RECIPE / name, samples=4000, gpus=8, gpu_memory="80GB"
        )
        for name in ("paper.yaml", "llamafactory.yaml")
    ]
    assert plans[0].figures == plans[1].figures
    assert plans[0]["optimizer steps"].value == 1500
    assert plans[0].fits
    assert "report_to" in plans[0].unused


def test_a_configuration_is_read_by_any_of_its_names_and_flags_take_precedence(
    tmp_path: Path,
) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "zero.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}'
    )
    (tmp_path / "run.yaml").write_text(
        "learning_rate: 2e-5\nmax_steps: 20\nwarmup_ratio: 0.1\noptim: adamw_bnb_8bit\n"
        "deepspeed: zero.json\nbf16: true\ngpus: 4\nfreeze_vision_tower: false\nseed: 1\n"
        "drift_fast: {delta: delta, modules: [attn, norm], alpha: 0.5, residency: host}\n"
    )
    found = Configuration.read(tmp_path / "run.yaml")
    run = Training(**found.numbers)
    assert (run.learning_rate, run.steps, run.warmup, run.gpus) == (2e-5, 20, 0.1, 4)
    assert (run.sharding, run.offload, run.optimizer) == ("zero3", "all", "adamw8bit")
    assert (run.trained, run.precision) == ("all", "bf16-mixed")
    assert (run.modules, run.alpha, run.residency) == (("attn", "norm"), 0.5, "host")
    assert found.unused == ["seed"]
    assert found.delta == tmp_path / "delta"
    found = drift_fast.plan(REASONING, MULTIMODAL, config=tmp_path / "run.yaml", steps=30)
    assert found["optimizer steps"].value == 30


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", ["mapping"]),
        ("learning_rate: fast\n", ["learning_rate", "fast"]),
        ("max_steps: 5\noptim: lion\n", ["optimizer", "lion"]),
        ("max_steps: 5\ndeepspeed: wrong.json\n", ["stage", "None"]),
        ("max_steps: 5\ndeepspeed: [1]\n", ["run.yaml", "deepspeed", "[1]"]),
        (
            "deepspeed: {zero_optimization: {stage: 2}, fp16: {enabled: true}}\n",
            ["run.yaml: deepspeed", "fp16"],
        ),
        ('max_steps: "100"\n', ["run.yaml", "max_steps", "'100'"]),
        ("max_steps: 5\noptim: [a]\n", ["run.yaml", "optim", "['a']"]),
        ("max_steps: 5\nbatch: true\n", ["run.yaml", "batch", "True"]),
        ("max_steps: 5\nfreeze_vision: 1\n", ["run.yaml", "freeze_vision", "1"]),
        ("max_samples: 5\nnum_train_epochs: 0\n", ["epochs", "0"]),
        ("max_steps: 5\nfinetuning_type: freeze\n", ["finetuning_type", "freeze", "LoRA on every"]),
        ("max_steps: 5\nadapter: qlora\n", ["adapter", "qlora", "LoRA on every"]),
        ("max_steps: 5\nadapter: lora\n", ["adapter", "lora_r"]),
        ("max_steps: 5\nuse_peft: true\nlora_target: q_proj,v_proj\n", ["lora_target", "q_proj"]),
        ("max_steps: 5\nuse_peft: true\n", ["use_peft", "lora_target_modules: all-linear"]),
        ("max_steps: 5\nfinetuning_type: lora\nlora_rank: 0\n", ["finetuning_type", "rank"]),
        ("max_steps: 5\nlora_rank: 8\nlora_r: 16\n", ["lora_rank", "lora_r", "differ"]),
        ("max_steps: 5\nlora_rank: 8\nlora_modules_to_save: [lm_head]\n", ["modules_to_save"]),
        ("max_steps: 5\nlora_rank: 8\nfreeze_vision_tower: false\n", ["lora_rank", "language"]),
        ("max_steps: 5\nload_in_4bit: true\n", ["load_in_4bit", "all of them trained"]),
        ("max_steps: 5\nfp16: true\n", ["fp16", "all of them trained"]),
        ("max_steps: 5\ndrift_fast: {schedule: sideways}\n", ["sideways"]),
        ("max_steps: 5\ndrift_fast: {progress_cap: 0}\n", ["progress_cap", "0"]),
        ("max_steps: 5\ndrift_fast: {modules: [1]}\n", ["modules", "1"]),
    ],
)
def test_a_configuration_without_meaning_is_refused(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "wrong.json").write_text("{}")
    (tmp_path / "run.yaml").write_text(text)
    with refused(ValueError, *words):
        Training(**Configuration.read(tmp_path / "run.yaml").numbers)


@pytest.mark.parametrize(
    ("text", "rank", "unused"),
    [
        ("finetuning_type: full\n", 0, ["finetuning_type"]),
        ("finetuning_type: full\nlora_rank: 16\n", 0, ["finetuning_type", "lora_rank"]),
        ("finetuning_type: lora\n", 8, []),
        ("finetuning_type: lora\nlora_rank: 16\nlora_target: all\n", 16, []),
        ("use_peft: true\nlora_target_modules: [all-linear]\n", 16, []),
        ("train_type: lora\nlora_rank: 4\ntarget_modules: all-linear\n", 4, []),
        ("train_type: full\nlora_rank: 4\n", 0, ["lora_rank", "train_type"]),
        ("use_peft: true\nlora_r: 32\nlora_target_modules: all-linear\n", 32, []),
        ("use_peft: false\n", 0, []),
        ("adapter: lora\nlora_r: 64\nlora_target_linear: true\n", 64, []),
        (
            "adapter: lora\nlora_r: 64\nlora_target_modules: [q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj]\n",
            64,
            [],
        ),
        ("lora_rank: 64\n", 64, []),
        ("lora_rank: 0\n", 0, []),
    ],
)
def test_adapters_are_planned_at_the_rank_that_a_file_states(
    tmp_path: Path, text: str, rank: int, unused: list[str]
) -> None:
    pytest.importorskip("yaml")
    run, left = read(tmp_path, text)
    assert run.lora_rank == rank
    assert left == unused


def read(folder: Path, text: str) -> tuple[Training, list[str]]:
    (folder / "run.yaml").write_text(f"max_steps: 5\n{text}")
    found = Configuration.read(folder / "run.yaml")
    return Training(**found.numbers), found.unused


def test_keys_that_change_the_figures_are_used_in_any_order_or_listed(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    keys = ["freeze_vision_tower: false", "freeze_multi_modal_projector: true"]
    for order in (keys, keys[::-1], ["freeze_vision: false"]):
        assert read(tmp_path, "\n".join(order))[0].trained == "all"
    assert read(tmp_path, "freeze_vision: true")[0].trained == "language"
    for text in ("warmup_ratio: 0.1\nwarmup_steps: 0", "warmup_steps: 0\nwarmup_ratio: 0.1"):
        assert read(tmp_path, text)[0].warmup == 0.1
    assert read(tmp_path, "warmup_steps: 3\nwarmup_ratio: 0.1")[0].warmup == 3
    assert read(tmp_path, "warmup_steps: 0")[0].warmup == 0
    inline = "deepspeed: {zero_optimization: {stage: 2}}"
    assert read(tmp_path, inline)[0].sharding == "zero2"
    run, unused = read(
        tmp_path, "drift_fast: {delta: d, schedule: linear, progress_cap: 0.5, csv: x}"
    )
    assert (run.schedule, run.progress_cap) == ("linear", 0.5)
    assert unused == ["drift_fast.csv"]
