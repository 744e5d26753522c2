"""Accelerate: inject where `sync_gradients` says that the gradient is complete."""

import tempfile

import tiny
import torch
from accelerate import Accelerator

import drift_fast

with tempfile.TemporaryDirectory() as folder:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, delta = tiny.pair(folder)
    loader = torch.utils.data.DataLoader(tiny.samples(32), batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # After prepare: wrapping may replace parameters.
    with drift_fast.Injection(model, delta, optimizer=optimizer) as injection:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    injection.step()
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        print(f"λ after 4 steps: {injection.metrics()['progress']:.4f}")
