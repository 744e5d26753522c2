"""Liger's kernels in a model that the Trainer trains, run by Triton's interpreter on a CPU.

Owns: that patched modules keep their parameters, and that what the kernels leave in the gradient,
of which the fused linear cross-entropy computes a part in the forward pass, is injected.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import drift_fast
from support import reference
from support.injection_models import language_targets, moved_text, saved, text_samples, tiny_qwen2

transformers = pytest.importorskip("transformers")
RATE = 1e3
OFF = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": False}
# The interpreter runs neither the norm nor the feed-forward block.
KERNELS: dict[str, dict[str, bool]] = {
    "the fused linear cross-entropy": OFF | {"fused_linear_cross_entropy": True},
    "that and rotary embeddings": OFF | {"fused_linear_cross_entropy": True, "rope": True},
}

pytestmark = pytest.mark.filterwarnings("ignore::drift_fast.DriftWarning")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have kernels interpreted, which is decided when they are first imported."""
    if any(name.startswith("liger_kernel") for name in sys.modules):
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("liger_kernel")
    import liger_kernel.transformers  # noqa: F401


def one_step(
    folder: Path, kernels: dict[str, bool] | None, delta: Any = None, *, clip: float = 0.0
) -> dict[str, Any]:
    """Return the gradient that one step of SGD used, accumulated over two micro-batches."""
    model = tiny_qwen2()
    before = {name: (id(p), reference.exact(p)) for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=clip,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        use_liger_kernel=kernels is not None,
        liger_kernel_config=kernels,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=text_samples(4))
    if delta is not None:
        # Liger patches the model when training starts, after this.
        drift_fast.attach(trainer, delta, alpha=0.7)
    trainer.train()
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: identity for name, (identity, _) in before.items()
    }
    return {
        name: (before[name][1] - reference.exact(p)) / RATE for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
def test_the_gradient_of_ligers_kernels_is_injected_then_clipped(
    tmp_path: Path, kernels: dict[str, bool]
) -> None:
    start, clip = tiny_qwen2(), 0.01
    expert = saved(moved_text(start), tmp_path / "expert")
    delta = drift_fast.compute_delta(expert, saved(start, tmp_path / "start"), dtype="float32")
    own, plain = one_step(tmp_path, None), one_step(tmp_path, kernels)
    for name, gradient in plain.items():
        error = reference.norm(gradient - own[name])
        assert error <= 1e-4 * reference.norm(own[name]), name
    found = one_step(tmp_path, kernels, delta, clip=clip)
    targets = language_targets(start)
    assert targets == set(delta.shapes)
    expected = {
        name: reference.inject(gradient, delta[name], alpha=0.7, scale="adaptive")
        if name in targets
        else gradient
        for name, gradient in plain.items()
    }
    total, expected = reference.clip(expected, clip)
    assert total > clip
    for name, gradient in found.items():
        error = reference.norm(gradient - expected[name])
        assert error <= 1e-5 * reference.norm(expected[name]) + 1e-9, name
