"""A loop of one's own: inject when the gradient is complete, before clipping."""

import tempfile

import tiny
import torch

import drift_fast

ACCUMULATION = 2

with tempfile.TemporaryDirectory() as folder:
    model, delta = tiny.pair(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with drift_fast.Injection(model, delta, alpha=1.0, optimizer=optimizer) as injection:
        for at, batch in enumerate(tiny.batches(8)):
            (model(**batch).loss / ACCUMULATION).backward()
            if (at + 1) % ACCUMULATION == 0:
                injection.step()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        print(f"λ after 4 steps: {injection.metrics()['progress']:.4f}")
