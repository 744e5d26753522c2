"""LoRA with PEFT and the Trainer: the push reaches the factors of every adapted weight.

The delta's tensors that train otherwise (`modules_to_save`) are injected into as they are; those
that are frozen beside the adapters must be left out of the selection, but for biases.
"""

import tempfile

import peft
import tiny
import torch
import transformers

import drift_fast

with tempfile.TemporaryDirectory() as folder:
    base, delta = tiny.pair(folder)
    # The language backbone only: a bare list of names would adapt the vision tower as well.
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            use_rslora=True,
            target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        ),
    )
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=folder,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=tiny.samples(16),
    )
    injection = drift_fast.attach(trainer, delta)
    trainer.train()
    logged = [row["drift/progress"] for row in trainer.state.log_history if "loss" in row]
    print(f"{len(injection.targets)} adapted weights, λ after 4 steps: {logged[-1]:.4f}")
