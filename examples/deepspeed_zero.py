"""DeepSpeed ZeRO-1, 2 or 3: attach to the engine, which then injects by itself before it clips.

deepspeed --num_gpus 2 deepspeed_zero.py --stage 3
DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 deepspeed_zero.py --stage 2

On a CPU DeepSpeed compiles a kernel at its first start, for which it needs ninja and a compiler.
"""

import argparse
import os
import tempfile

import deepspeed
import tiny
import torch
import torch.distributed as dist

import drift_fast

ACCUMULATION = 2

parser = argparse.ArgumentParser()
parser.add_argument("--stage", type=int, default=2)
parser.add_argument("--local_rank", type=int, default=0)
stage = parser.parse_args().stage

config = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": ACCUMULATION,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": stage},
}

with tempfile.TemporaryDirectory() as folder:
    # Before the processes meet: transformers saves on the first of them only, then.
    model, delta = tiny.pair(folder)
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    # Text alone never runs the vision tower.
    model.model.visual.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=1e-3), config=config
    )
    # After deepspeed.initialize, on every rank.
    with drift_fast.attach(engine, delta) as injection:
        for batch in tiny.batches(4 * ACCUMULATION, size=2 * world):
            mine = {name: t[rank::world].to(engine.device) for name, t in batch.items()}
            engine.backward(engine(**mine).loss)
            # Injects at accumulation boundaries.
            engine.step()
        progress = injection.metrics()["progress"]
    if rank == 0:
        print(f"λ after 4 steps: {progress:.4f}")
dist.destroy_process_group()
