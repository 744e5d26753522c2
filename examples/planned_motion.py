"""Planned motion: move the weights by λ·Δ in the first steps, beside what the optimizer does.

First in a loop of one's own, here of pure bfloat16 weights, then under the Trainer.
"""

import tempfile

import tiny
import torch
from transformers import Trainer, TrainingArguments

from drift_fast.inject.motion.motion import PlannedMotion
from drift_fast.integrations.trainer_motion import attach_motion

# λ by module kind; each needs trials on validation data of its own.
PROGRESS = {"attn": 0.7, "mlp": 1.25}


def show(metrics: dict[str, float]) -> None:
    for kind in PROGRESS:
        print(f"{kind}: λ {metrics[f'progress/{kind}']:.3f}, plan {metrics[f'planned/{kind}']:.3f}")


with tempfile.TemporaryDirectory() as folder:
    model, delta = tiny.pair(folder)
    model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with PlannedMotion(model, delta, progress=PROGRESS, steps=4, optimizer=optimizer) as motion:
        for batch in tiny.batches(10):
            model(**batch).loss.backward()
            optimizer.step()  # the motion follows by itself
            optimizer.zero_grad()
        show(motion.metrics())

with tempfile.TemporaryDirectory() as folder:
    model, delta = tiny.pair(folder)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            max_steps=20,
            learning_rate=1e-4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=tiny.samples(32),
    )
    attached = attach_motion(trainer, delta, progress=PROGRESS, window=0.1)
    trainer.train()
    show(attached.metrics())
