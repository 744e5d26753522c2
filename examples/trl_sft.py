"""TRL's SFTTrainer is a Trainer: attach to it in the same way."""

import tempfile

import tiny
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import drift_fast

with tempfile.TemporaryDirectory() as folder:
    model, delta = tiny.pair(folder, text_only=True)
    rows = [{"input_ids": sample["input_ids"].tolist()} for sample in tiny.samples(16)]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=folder,
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            pad_token="<pad>",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    drift_fast.attach(trainer, delta)
    trainer.train()
    logged = [row["drift/progress"] for row in trainer.state.log_history if "loss" in row]
    print(f"λ after 4 steps: {logged[-1]:.4f}")
