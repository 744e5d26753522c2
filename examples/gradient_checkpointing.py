"""Gradient checkpointing of both kinds: activations are computed again, gradients are the same."""

import tempfile

import tiny
import torch

import drift_fast

with tempfile.TemporaryDirectory() as folder:
    for reentrant in (False, True):
        place = f"{folder}/{reentrant}"
        model, delta = tiny.pair(place)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # A reentrant segment has gradients only if its input requires one.
        model.enable_input_require_grads()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with drift_fast.Injection(model, delta, optimizer=optimizer) as injection:
            for batch in tiny.batches(4):
                model(**batch, use_cache=False).loss.backward()
                injection.step()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            progress = injection.metrics()["progress"]
        print(f"λ after 4 steps, use_reentrant={reentrant}: {progress:.4f}")
