"""torch.compile: attach to the compiled or to the plain module, the parameters are the same."""

import tempfile

import tiny
import torch

import drift_fast

with tempfile.TemporaryDirectory() as folder:
    model, delta = tiny.pair(folder, text_only=True)
    # "inductor", the default, makes it faster and needs a C++ or Triton compiler.
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with drift_fast.Injection(compiled, delta, optimizer=optimizer) as injection:
        for batch in tiny.batches(4):
            compiled(**batch).loss.backward()
            injection.step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"λ after 4 steps: {injection.metrics()['progress']:.4f}")
