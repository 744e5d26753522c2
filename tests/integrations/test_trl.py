"""drift_fast.attach on TRL's SFTTrainer.

Owns: that what its own way of preparing data, computing losses and accumulating leaves in the
gradient is injected before clipping.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import drift_fast
from support import reference
from support.injection_models import language_targets, moved_text, saved, tiny_qwen2

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# The learning rate is meant to be absurd, and the forecast of λ says so.
pytestmark = pytest.mark.filterwarnings("ignore::drift_fast.DriftWarning")

RATE = 1e3


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", "<eos>", "<pad>", "<unk>", *(f"w{at}" for at in range(4, 64))]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def rows() -> Any:
    generator = torch.Generator().manual_seed(6)
    texts = []
    for length in (5, 9, 7, 12, 6, 8, 10, 11):
        words = torch.randint(4, 64, (length,), generator=generator).tolist()
        texts.append(
            {
                "prompt": " ".join(f"w{word}" for word in words[:3]),
                "completion": " " + " ".join(f"w{word}" for word in words[3:]),
            }
        )
    return datasets.Dataset.from_list(texts)


def one_step(
    start: torch.nn.Module,
    folder: Path,
    delta: drift_fast.Delta | None = None,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Return the gradient that one step of SGD used, and the log."""
    model = copy.deepcopy(start)
    before = {name: reference.exact(p) for name, p in model.named_parameters()}
    settings: dict[str, Any] = {
        "output_dir": str(folder / "runs"),
        "max_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "per_device_train_batch_size": 8,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "max_length": 32,
        "gradient_checkpointing": False,
    }
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**{**settings, **arguments}),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    if delta is not None:
        drift_fast.attach(trainer, delta, **(options or {}))
    trainer.train()
    after = {name: reference.exact(p) for name, p in model.named_parameters()}
    return {n: (before[n] - after[n]) / RATE for n in before}, trainer.state.log_history


@pytest.fixture(scope="module")
def start() -> torch.nn.Module:
    return tiny_qwen2()


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory, start: torch.nn.Module) -> drift_fast.Delta:
    folder = tmp_path_factory.mktemp("pair")
    expert = saved(moved_text(start), folder / "expert")
    return drift_fast.compute_delta(expert, saved(start, folder / "multimodal"), dtype="float32")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
        {"packing": True, "max_length": 16, "packing_strategy": "bfd"},
        {"padding_free": True, "max_length": None, "per_device_train_batch_size": 4},
        {"loss_type": "nll", "bf16": True},
    ],
    ids=[
        "one batch",
        "accumulation",
        "checkpointing",
        "packing",
        "packing of whole samples",
        "padding-free",
        "bf16",
    ],
)
@pytest.mark.parametrize("scale", reference.SCALES)
def test_the_optimizer_uses_the_accumulated_gradient_injected_then_clipped(
    tmp_path: Path,
    start: torch.nn.Module,
    delta: drift_fast.Delta,
    scale: str,
    arguments: dict[str, Any],
) -> None:
    plain, _ = one_step(start, tmp_path, **arguments)
    clip = 0.01
    options = {"alpha": 0.7, "scale": scale}
    found, log = one_step(start, tmp_path, delta, options, max_grad_norm=clip, **arguments)
    targets = language_targets(start)
    assert targets == set(delta.shapes)
    expected = {
        name: reference.inject(gradient, delta[name], alpha=0.7, scale=scale)
        if name in targets
        else gradient
        for name, gradient in plain.items()
    }
    total, expected = reference.clip(expected, clip)
    assert total > clip
    for name, gradient in found.items():
        error = reference.norm(gradient - expected[name])
        assert error <= 1e-5 * reference.norm(expected[name]) + 1e-9, name
    assert any("drift/progress" in row for row in log)


# --- trainers beyond SFT -------------------------------------------------------------------------


def preferences() -> Any:
    rows_of = rows()
    rejected = [text.replace("w4", "w5") + " w6" for text in rows_of["completion"]]
    return rows_of.rename_column("completion", "chosen").add_column("rejected", rejected)


def judged() -> Any:
    return rows().add_column("label", [bool(at % 2) for at in range(8)])


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


# The trainer, its rows, and what is particular to it.
OTHERS: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {
    "DPO": ("DPO", preferences, {"max_length": 32}, {}),
    "KTO": ("KTO", judged, {"max_length": 32}, {}),
    "Reward": ("Reward", preferences, {"max_length": 32}, {}),
    "GRPO": (
        "GRPO",
        lambda: rows().remove_columns("completion"),
        {"num_generations": 4, "max_completion_length": 6, "temperature": 1.0},
        {"reward_funcs": reward},
    ),
}


def one_step_of(
    kind: str, start: torch.nn.Module, folder: Path, delta: Any = None, *, clip: float = 0.0
) -> dict[str, Any]:
    """Return the gradient that one step of SGD used in another of TRL's trainers."""
    name, rows_of, own, objects = OTHERS[kind]
    trainer_class = getattr(trl, f"{name}Trainer", None)
    if trainer_class is None:
        pytest.skip(f"this TRL has no {name}Trainer")
    transformers = pytest.importorskip("transformers")
    start.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    if kind == "Reward":
        torch.manual_seed(3)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder / "model", num_labels=1, dtype=torch.float32
        )
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32
        )
    before = {name: reference.exact(p) for name, p in model.named_parameters()}
    settings: dict[str, Any] = {
        "output_dir": str(folder / "runs"),
        "max_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": clip,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **own,
    }
    trainer = trainer_class(
        model=model,
        args=getattr(trl, f"{name}Config")(**settings),
        train_dataset=rows_of(),
        processing_class=tokenizer(),
        **objects,
    )
    if delta is not None:
        drift_fast.attach(trainer, delta, alpha=0.7)
    trainer.train()
    after = {name: reference.exact(p) for name, p in model.named_parameters()}
    return {name: (before[name] - after[name]) / RATE for name in before}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_the_other_trainers_of_trl_are_injected_before_clipping(
    tmp_path: Path, start: torch.nn.Module, delta: drift_fast.Delta, kind: str
) -> None:
    plain = one_step_of(kind, start, tmp_path)
    clip = 0.5 * reference.norm(np.array([reference.norm(g) for g in plain.values()]))
    found = one_step_of(kind, start, tmp_path, delta, clip=clip)
    expected = {
        name: reference.inject(gradient, delta[name], alpha=0.7, scale="adaptive")
        if name in delta.shapes
        else gradient
        for name, gradient in plain.items()
    }
    assert delta.shapes.keys() <= expected.keys()
    total, expected = reference.clip(expected, clip)
    assert total > clip > 0.0
    for name, gradient in found.items():
        error = reference.norm(gradient - expected[name])
        assert error <= 1e-5 * reference.norm(expected[name]) + 1e-9, name
