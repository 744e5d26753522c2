"""A pre-trained model in the Trainer, in full and with LoRA: the gradient that is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import drift_fast
from support import reference
from support.reference import exact

from .conftest import Files

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.pretrained,
    pytest.mark.timeout(1200),
    # Two steps move nothing far along Δ, and rounding loses most of it, which the injection says.
    pytest.mark.filterwarnings("ignore::drift_fast.DriftWarning"),
]

TEXTS = (
    "A train of 12 wagons loses 3 wagons, and so 9 wagons are left.",
    "Question: what is 7 times 8? Answer: 56.",
)
ALPHA = 0.8


@pytest.fixture(scope="module")
def delta(files: Files) -> drift_fast.Delta:
    return drift_fast.compute_delta(files.expert, files.base, dtype="float32")


def samples(files: Files) -> list[dict[str, Any]]:
    tokenizer = files.tokenizer()
    found = []
    for text in TEXTS:
        tokens = tokenizer(text)["input_ids"]
        found.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens})
    return found


def gradients(
    model: torch.nn.Module,
    files: Files,
    folder: Path,
    attach: Callable[[Any], Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Return what the optimizer of one step of two accumulated samples sees."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen: dict[str, torch.Tensor] = {}

    def record(inner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in inner.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    seen[names[parameter]] = parameter.grad.detach().clone()

    optimizer.register_step_pre_hook(record)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder / "runs"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=1,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=samples(files),
        optimizers=(optimizer, None),
    )
    if attach is not None:
        attach(trainer)
    trainer.train()
    return seen


def loaded(path: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shell", ["llava", "smolvlm"])
def test_the_gradient_of_a_full_training_is_injected_into(
    files: Files, delta: drift_fast.Delta, tmp_path: Path, shell: str, dtype: torch.dtype
) -> None:
    path = getattr(files, shell)
    before = gradients(loaded(path, dtype), files, tmp_path)
    injections: list[Any] = []

    def attach(trainer: Any) -> None:
        injections.append(drift_fast.attach(trainer, delta, alpha=ALPHA, scale="adaptive"))

    found = gradients(loaded(path, dtype), files, tmp_path, attach)
    assert len(injections[0].targets) == len(delta) == 210
    assert found.keys() == before.keys()
    by_suffix = {name[name.index("layers.") :]: name for name in delta}
    bound = 2e-5 if dtype == torch.float32 else 1.2 * reference.BFLOAT16_RELATIVE
    injected = 0
    for name, gradient in before.items():
        stored = by_suffix.get(name[name.find("layers.") :]) if "vision" not in name else None
        if stored is None:
            assert torch.equal(found[name], gradient), name
            continue
        own = delta[stored].to(dtype)
        expected = reference.inject(gradient, own, alpha=ALPHA, scale="adaptive")
        error = reference.norm(exact(found[name]) - expected)
        assert error <= bound * reference.norm(expected), name
        injected += 1
    assert injected == 210


def test_the_gradient_of_adapters_is_injected_into(
    files: Files, delta: drift_fast.Delta, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    rank, lora_alpha = 4, 8

    def adapted() -> Any:
        model = loaded(files.smolvlm, torch.float32)
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=lora_alpha,
            target_modules=r".*text_model.*\.(q_proj|v_proj|down_proj)",
            init_lora_weights=False,
        )
        return peft.get_peft_model(model, config)

    before = gradients(adapted(), files, tmp_path)
    model = adapted()

    def attach(trainer: Any) -> None:
        options: dict[str, Any] = {"alpha": ALPHA, "scale": "gradnorm"}
        with pytest.raises(drift_fast.DriftError, match="strict=False"):
            drift_fast.attach(trainer, delta, **options)
        drift_fast.attach(trainer, delta, strict=False, **options)

    found = gradients(model, files, tmp_path, attach)
    assert len(before) == 30 * 3 * 2
    weights = dict(model.named_parameters())
    for name in before:
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        module = name[name.index("layers.") : name.index(".lora_A.")]
        own = exact(delta[f"model.{module}.weight"])
        a, b = exact(weights[name]), exact(weights[other])
        # ∂W/∂(A, B) applied to Δ, for W = W₀ + s·B·A.
        scaling = lora_alpha / rank
        pulled = (scaling * b.T @ own, scaling * own @ a.T)
        both = [exact(before[x]) for x in (name, other)]
        g, d = (np.concatenate([part.ravel() for part in parts]) for parts in (both, pulled))
        c = reference.coefficient(g, d, alpha=ALPHA, scale="gradnorm")
        for one, gradient, direction in zip((name, other), both, pulled, strict=True):
            expected = gradient - c * direction
            error = reference.norm(exact(found[one]) - expected)
            size = reference.norm(gradient) + abs(c) * reference.norm(direction)
            assert error <= 2e-5 * size, one


def test_an_optimizer_moves_a_real_model_along_delta(files: Files, delta: drift_fast.Delta) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(files.base, dtype=torch.float32)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if name in delta}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tokens = files.tokenizer()(TEXTS[0], return_tensors="pt")["input_ids"]
    injection = drift_fast.Injection(model, delta, alpha=ALPHA, scale="absolute")
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        injection.step()
        optimizer.step()
        optimizer.zero_grad()
    now = {name: p.detach() for name, p in model.named_parameters()}
    total, _ = reference.progress(now, start, {name: delta[name] for name in start})
    assert injection.metrics()["progress"] == pytest.approx(total, rel=1e-4)
    # SGD moves by lr·α·Δ a step, and the gradient of the text has no part in that direction.
    assert total == pytest.approx(2 * 0.05 * ALPHA, rel=0.05)
