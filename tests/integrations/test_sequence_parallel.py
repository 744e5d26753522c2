"""DeepSpeed's Ulysses (ALST) under the Trainer: two processes, each with half of every sequence.

Owns: that the gradient which the engine has reduced over both is injected, once, before the step.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import drift_fast
from support import reference
from support.injection_models import moved_text, saved, text_samples, tiny_qwen2
from support.joined import Joined, Report, launch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")


class Spy(transformers.TrainerCallback):  # type: ignore[misc]
    """Notes the gradients of the first step of an engine, where it stands in the chain of calls."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seen: dict[str, Any] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        from deepspeed.utils import safe_get_full_grad

        engine = self.trainer.model_wrapped
        original = engine.optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            for name, parameter in engine.module.named_parameters():
                self.seen.setdefault(name, reference.exact(safe_get_full_grad(parameter)))
            return original(*args, **kwargs)

        engine.optimizer.step = step


def train(folder: Path, stage: int) -> Report:
    """Train two steps, and return the largest error of a target's first gradient."""
    import deepspeed
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    # It would be compiled, and is not needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "1")
    deepspeed.init_distributed(dist_backend="gloo")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "runs"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        dataloader_pin_memory=False,
        deepspeed={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000},
            "optimizer": {"type": "SGD", "params": {"lr": 1e-2}},
        },
        parallelism_config=ParallelismConfig(
            sp_size=2,
            sp_backend="deepspeed",
            sp_handler=DeepSpeedSequenceParallelConfig(
                sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
            ),
        ),
    )
    rows = [row | {"position_ids": torch.arange(8)} for row in text_samples(16)]
    trainer = transformers.Trainer(
        model=tiny_qwen2(attn_implementation="sdpa"), args=arguments, train_dataset=rows
    )
    # Callbacks run in their order, and each wraps what the one before has put there.
    after, before = Spy(trainer), Spy(trainer)
    trainer.add_callback(after)
    injection = drift_fast.attach(trainer, folder / "delta", alpha=0.7)
    trainer.add_callback(before)
    trainer.train()
    errors = []
    for name, change in drift_fast.Delta.open(folder / "delta").items():
        expected = reference.inject(before.seen[name], change, alpha=0.7, scale="adaptive")
        error = reference.norm(after.seen[name] - expected) / reference.norm(expected)
        errors.append(error)
    one = np.array([reference.norm(gradient) for gradient in before.seen.values()])
    both: list[Any] = [None, None]
    dist.all_gather_object(both, one.tolist())
    return {"error": max(errors), "steps": injection.steps, "same": both[0] == both[1]}


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_gradient_of_both_halves_of_a_sequence_is_injected(tmp_path: Path, stage: int) -> None:
    text = tiny_qwen2()
    drift_fast.compute_delta(
        saved(moved_text(text), tmp_path / "expert"),
        saved(text, tmp_path / "multimodal"),
        dtype="float32",
        out=tmp_path / "delta",
    )
    joined = Joined(2, "gloo", timedelta(seconds=90))
    for rank in launch(tmp_path / "processes", {"train": (train, (tmp_path, stage))}, joined):
        assert rank["train"]["error"] < 1e-5
        assert rank["train"]["steps"] == 2
        assert rank["train"]["same"]
