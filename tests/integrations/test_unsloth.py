"""drift_fast.attach on Unsloth's own trainer.

Owns: that the gradient its optimizer uses is the accumulated one, injected and then clipped, under
its losses, its checkpointing, its `training_step` and batches that it splits. What runs, and in
which process, is support/unsloth_runs.py's. Without a GPU its kernels are interpreted.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import drift_fast
from installed_stacks import checks
from support.injection_models import moved_text, saved, tiny_qwen2
from support.processes import TESTS, environment, run

pytestmark = [
    pytest.mark.slow,
    # Not imported here: it rewrites transformers and TRL for the whole process.
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is missing"),
]

CLIP = 0.01
# With this budget each micro-batch of two rows is two backward passes.
SPLIT = {"UNSLOTH_TOKEN_BUDGET": 12}
BACKENDS = {
    "cpu": {"CUDA_VISIBLE_DEVICES": ""},
    "gpu": {"CUDA_VISIBLE_DEVICES": "", "UNSLOTH_ALLOW_CPU": 1, "TRITON_INTERPRET": 1, **SPLIT},
    "cuda": {"CUDA_VISIBLE_DEVICES": 0, **SPLIT},
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_unsloth_uses_the_accumulated_gradient_injected_then_clipped(
    tmp_path: Path, backend: str
) -> None:
    if backend == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from integrations.test_trl import tokenizer

    start = tiny_qwen2()
    multimodal = saved(start, tmp_path / "multimodal")
    tokenizer().save_pretrained(multimodal)
    expert = saved(moved_text(start), tmp_path / "expert")
    drift_fast.compute_delta(expert, multimodal, dtype="float32").save(tmp_path / "delta")
    variables = environment(
        PYTHONPATH=f"{TESTS}:{TESTS.parent / 'python'}",
        HF_HUB_OFFLINE=1,
        UNSLOTH_DISABLE_STATISTICS=1,
        UNSLOTH_SKIP_TORCHVISION_CHECK=1,
        **BACKENDS[backend],
    )
    script = TESTS / "support" / "unsloth_runs.py"
    # It writes a folder of generated trainers where it is started.
    run(sys.executable, script, backend, tmp_path, env=variables, cwd=tmp_path, limit=280.0)
    for tuning in ("full", "lora"):
        plain, zero, injected = (
            tmp_path / f"{tuning}-{name}" for name in ("plain", "zero", "injected")
        )
        error = checks.parity(plain, injected, tmp_path / "delta", clip=CLIP)
        assert error <= checks.TOLERANCE, (tuning, error)
        assert checks.same(plain, zero, steps=2), tuning
