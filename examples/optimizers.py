"""Any torch optimizer: the injection changes gradients, so it does not matter which one steps.

The last way, `attach(optimizer, …)`, injects by itself inside `optimizer.step()`. That is after any
clipping, which a loop of one's own does better as plain_loop.py shows.
"""

import importlib.util
import tempfile

import tiny
import torch

import drift_fast

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}
if importlib.util.find_spec("bitsandbytes"):
    import bitsandbytes

    OPTIMIZERS["AdamW, 8 bits"] = lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3)
    OPTIMIZERS["AdamW, 8 bits, paged"] = lambda p: bitsandbytes.optim.PagedAdamW8bit(p, lr=1e-3)

with tempfile.TemporaryDirectory() as folder:
    for name, build in OPTIMIZERS.items():
        model, delta = tiny.pair(f"{folder}/{name}")
        optimizer = build(model.parameters())
        injection = drift_fast.attach(optimizer, delta, model=model)
        for batch in tiny.batches(4):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"λ after 4 steps of {name}: {injection.metrics()['progress']:.4f}")
        injection.remove()
