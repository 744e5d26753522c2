"""Mixed precision with a loss scaler: unscale, inject, clip, step."""

import tempfile

import tiny
import torch

import drift_fast

device = "cuda" if torch.cuda.is_available() else "cpu"
low = torch.float16 if device == "cuda" else torch.bfloat16

with tempfile.TemporaryDirectory() as folder:
    model, delta = tiny.pair(folder)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    # Only "absolute" depends on the loss scale; it follows the scaler, unscaled or not.
    options = {"scale": "absolute", "alpha": 0.1, "optimizer": optimizer, "scaler": scaler}
    with drift_fast.Injection(model, delta, **options) as injection:
        for batch in tiny.batches(4):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device, dtype=low):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            injection.step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        print(f"λ after 4 steps: {injection.metrics()['progress']:.4f}")
