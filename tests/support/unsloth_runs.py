"""Short runs of Unsloth's trainer, in a process of their own, as it rewrites others.

    python unsloth_runs.py cpu|gpu|cuda FOLDER

Owns: runs of two steps on FOLDER/multimodal, whole weights and LoRA, without an injection, with
α = 0 and with FOLDER/delta. `cpu` is Unsloth's backend for machines without a GPU, from its loader
on. `gpu` is what it does to trainers elsewhere: UNSLOTH_ALLOW_CPU=1 has it import that, and
TRITON_INTERPRET=1 runs its kernels; its loader asks for a GPU, so there models are those of
transformers and PEFT. `cuda` is a GPU, from the loader on. A batch is split by
UNSLOTH_TOKEN_BUDGET. FOLDER/<tuning>-<run>/ gets what `installed_stacks/checks.py` reads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import unsloth

# isort: split
# Later, as Unsloth asks for.
from transformers import AutoModelForCausalLM, Trainer

import drift_fast
from integrations import test_trl
from support.step_record import Record

RUNS = {"plain": None, "zero": 0.0, "injected": 1.0}
CLIP = 0.01
STEPS = 2
# As lora_alpha / r in the checks.
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_of(backend: str, folder: Path, tuning: str) -> Any:
    source = str(folder / "multimodal")
    if backend != "gpu":
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            source,
            max_seq_length=32,
            dtype=torch.float32,
            load_in_4bit=False,
            full_finetuning=tuning == "full",
        )
        if tuning == "full":
            return model
        return unsloth.FastLanguageModel.get_peft_model(
            model, use_gradient_checkpointing="unsloth", **LORA
        )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if tuning == "full":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(target_modules=PROJECTIONS, task_type="CAUSAL_LM", **LORA)
    return get_peft_model(model, config)


def run(backend: str, folder: Path, tuning: str, name: str) -> None:
    torch.manual_seed(0)
    trainer = unsloth.UnslothTrainer(
        model=model_of(backend, folder, tuning),
        args=unsloth.UnslothTrainingArguments(
            output_dir=str(folder / "runs"),
            max_steps=STEPS,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_grad_norm=CLIP,
            max_length=32,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=backend != "cuda",
            bf16=False,
            fp16=False,
        ),
        train_dataset=test_trl.rows(),
        processing_class=test_trl.tokenizer(),
    )
    if backend != "cpu":
        from unsloth.utils.token_budget import install_token_budget

        install_token_budget(trainer)
    alpha = RUNS[name]
    if alpha is not None:
        drift_fast.attach(trainer, folder / "delta", alpha=alpha)
    record = Record(trainer.model, folder / f"{tuning}-{name}")
    trainer.train()
    record.close()
    if backend != "cpu":
        assert trainer._unsloth_token_budget_splits > 0
        assert "unsloth" in Trainer.training_step.__code__.co_name


def main(backend: str, folder: Path) -> None:
    if backend == "gpu":
        # Its loader does so.
        from unsloth.models._utils import patch_gradient_accumulation_fix

        patch_gradient_accumulation_fix(Trainer)
    for tuning in ("full", "lora"):
        for name in RUNS:
            run(backend, folder, tuning, name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
