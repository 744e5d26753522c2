"""The Hugging Face Trainer: attach before `train()`; λ joins the logs as `drift/progress`."""

import tempfile

import tiny
import torch
import transformers

import drift_fast

with tempfile.TemporaryDirectory() as folder:
    model, delta = tiny.pair(folder)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=folder,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=tiny.samples(16),
    )
    drift_fast.attach(trainer, delta, alpha=1.0, scale="adaptive")
    trainer.train()
    logged = [row["drift/progress"] for row in trainer.state.log_history if "loss" in row]
    print(f"λ after 4 steps: {logged[-1]:.4f}")
