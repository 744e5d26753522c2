"""FSDP1: wrap with use_orig_params=True, attach after wrapping, and inject before clipping.

torchrun --nproc-per-node 2 fsdp1.py
"""

import tempfile

import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import drift_fast

backend = "nccl" if torch.cuda.is_available() else "gloo"

with tempfile.TemporaryDirectory() as folder:
    # Before the processes meet: transformers saves on the first of them only, then.
    inner, delta = tiny.pair(folder, text_only=True)
    dist.init_process_group(backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    if backend == "nccl":
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    layers = ModuleWrapPolicy({type(inner.model.layers[0])})
    model = FullyShardedDataParallel(
        inner, auto_wrap_policy=layers, use_orig_params=True, device_id=device
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with drift_fast.Injection(model, delta, optimizer=optimizer) as injection:
        for batch in tiny.batches(4, size=2 * world):
            mine = {name: t[rank::world].to(device) for name, t in batch.items()}
            model(**mine).loss.backward()
            injection.step()
            model.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        progress = injection.metrics()["progress"]
    if rank == 0:
        print(f"λ after 4 steps: {progress:.4f}")
dist.destroy_process_group()
