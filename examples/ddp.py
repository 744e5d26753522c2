"""DistributedDataParallel: every process injects into the reduced gradient, and they agree.

torchrun --nproc-per-node 2 ddp.py
"""

import tempfile

import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import drift_fast

ACCUMULATION = 2

folder = tempfile.TemporaryDirectory()
# Before the processes join: transformers then lets the first alone write checkpoints.
inner, delta = tiny.pair(folder.name)
backend = "nccl" if torch.cuda.is_available() else "gloo"
dist.init_process_group(backend)
rank, world = dist.get_rank(), dist.get_world_size()
if backend == "nccl":
    torch.cuda.set_device(rank)
device = "cuda" if backend == "nccl" else "cpu"

# Text alone never runs the vision tower, so its parameters have no gradient to reduce.
inner.model.visual.requires_grad_(False)
model = DistributedDataParallel(inner.to(device))
optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3)
with drift_fast.Injection(model, delta, optimizer=optimizer) as injection:
    for at, batch in enumerate(tiny.batches(8, size=2 * world)):
        mine = {name: t[rank::world].to(device) for name, t in batch.items()}
        last = (at + 1) % ACCUMULATION == 0
        model.require_backward_grad_sync = last
        (model(**mine).loss / ACCUMULATION).backward()
        if last:
            injection.step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    progress = torch.tensor(injection.metrics()["progress"])
if rank == 0:
    print(f"λ after 4 steps: {progress:.4f}")
folder.cleanup()
dist.destroy_process_group()
