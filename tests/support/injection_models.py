"""Tiny models and checkpoint pairs for the injection tests.

Owns: a small network with the field's module names, tiny random transformers models, and the
writing of pairs that compute_delta can read. Does not own: any expectation.
Invariant: everything is seeded, on the CPU, and at most a few hundred kilobytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import drift_fast
from drift_fast.inject.compute.device import DeviceArithmetic

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class Attention(nn.Module):
    """Four projections with attention's names; a gated mixing stands in for the softmax."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.q_proj(hidden) * self.k_proj(hidden))
        mixed: torch.Tensor = self.o_proj(gate * self.v_proj(hidden))
        return mixed


class FeedForward(nn.Module):
    """The gated feed-forward block under its usual names."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gated = nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        lowered: torch.Tensor = self.down_proj(gated)
        return lowered


class Experts(nn.Module):
    """Stacked experts, of which each takes its share of every input.

    turned: whether weights are stored as [experts, in, out].
    """

    def __init__(self, width: int, inner: int, *, count: int = 3, turned: bool = False) -> None:
        super().__init__()
        self.is_transposed = turned
        up, down = (count, inner, width), (count, width, inner)
        self.gate_up_proj = nn.Parameter(torch.randn(down if turned else up) / width)
        self.down_proj = nn.Parameter(torch.randn(up if turned else down) / width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        sides = "ehi" if self.is_transposed else "eih", "eih" if self.is_transposed else "ehi"
        inside = torch.einsum(f"bh,{sides[0]}->bei", hidden, self.gate_up_proj)
        outside = torch.einsum(f"bei,{sides[1]}->beh", nn.functional.silu(inside), self.down_proj)
        mixed: torch.Tensor = outside.mean(1)
        return mixed


class Mixture(nn.Module):
    def __init__(self, width: int, inner: int, *, turned: bool) -> None:
        super().__init__()
        self.experts = Experts(width, inner, turned=turned)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.experts(hidden)
        return mixed


class Layer(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.self_attn = Attention(width)
        self.mlp = FeedForward(width, inner)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(hidden)
        return hidden + self.mlp(hidden)


class Trunk(nn.Module):
    def __init__(self, layers: int, width: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, inner) for _ in range(layers)])


class Backbone(nn.Module):
    """A regression network whose parameters are called as a language model's are.

    model.layers.<n>.self_attn.<q,k,v,o>_proj and model.layers.<n>.mlp.<gate,up,down>_proj are
    what a delta pushes; head stays outside it.
    """

    def __init__(self, *, layers: int = 2, width: int = 6, inner: int = 10, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Trunk(layers, width, inner)
            self.head = nn.Linear(width, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs
        for layer in self.model.layers:
            hidden = layer(hidden)
        predicted: torch.Tensor = self.head(hidden)
        return predicted


def with_experts(model: Backbone, *, turned: bool = False, seed: int = 7) -> Backbone:
    """Put stacked experts in the place of every feed-forward block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.model.layers:
            inner, width = layer.mlp.up_proj.weight.shape
            layer.mlp = Mixture(width, inner, turned=turned)
    return model


def regression_batch(
    count: int = 8, *, width: int = 6, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return seeded inputs [count, width] and targets [count, 3] in float32."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, width, generator=generator)
    targets = torch.randn(count, 3, generator=generator)
    return inputs, targets


def regression_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    dtype = next(model.parameters()).dtype
    return nn.functional.mse_loss(model(inputs.to(dtype)), targets.to(dtype))


def perturbed(
    tensors: Mapping[str, torch.Tensor], *, seed: int, size: float = 0.3
) -> dict[str, torch.Tensor]:
    """Copy tensors with seeded noise, each tensor's own standard deviation times size."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        spread = float(tensor.float().std(correction=0)) or 1.0
        moved[name] = (tensor.float() + size * spread * noise).to(tensor.dtype)
    return moved


def write_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a directory with one model.safetensors."""
    folder.mkdir(parents=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def delta_towards(
    folder: Path,
    model: nn.Module,
    *,
    seed: int = 7,
    size: float = 0.3,
    dtype: str = "float32",
    **options: Any,
) -> drift_fast.Delta:
    """Compute the delta from a plain module's current weights to a seeded perturbation of them.

    The expert of a bfloat16 model is written in float32 and lies a bfloat16 step from it, so that
    the stored delta is exact and its norm in the statistics is the norm of what is injected.
    """
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    moved = perturbed(state, seed=seed, size=size)
    for name, tensor in state.items():
        if tensor.dtype is torch.bfloat16:
            step = (moved[name].float() - tensor.float()).to(torch.bfloat16)
            moved[name] = tensor.float() + step.float()
    multimodal = write_checkpoint(folder / "multimodal", state)
    expert = write_checkpoint(folder / "expert", moved)
    return drift_fast.compute_delta(expert, multimodal, dtype=dtype, **options)


def single_target(
    tmp_path: Path,
    shape: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 5,
    size: float = 0.5,
) -> tuple[torch.nn.Module, torch.nn.Parameter, drift_fast.Delta]:
    """A module with one attention weight, and a delta for it with a positive mean."""
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.model.layers[0].self_attn = torch.nn.Module()
    projection = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    model.model.layers[0].self_attn.q_proj = projection
    name = "model.layers.0.self_attn.q_proj.weight"
    generator = torch.Generator().manual_seed(seed)
    step = (torch.rand(shape, generator=generator) * size).to(dtype)
    # Twice the step less the step is the step, exactly, in every dtype.
    base, expert = step, 2 * step
    delta = drift_fast.compute_delta(
        write_checkpoint(tmp_path / "expert", {name: expert}),
        write_checkpoint(tmp_path / "base", {name: base}),
        dtype=str(dtype).removeprefix("torch."),
    )
    return model, projection.weight, delta


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy every gradient that is there, by parameter name."""
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(
    model: nn.Module,
    steps: int,
    *,
    injection: drift_fast.Injection | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    clip: float | None = 1.0,
    loss: Callable[[nn.Module, int], torch.Tensor] | None = None,
) -> None:
    """Run a plain loop: backward, inject, clip, step; a fresh seeded batch for each step."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        value = (
            loss(model, step) if loss else regression_loss(model, regression_batch(seed=100 + step))
        )
        value.backward()
        if injection is not None:
            injection.step()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


@contextlib.contextmanager
def arithmetic(kind: str) -> Iterator[None]:
    """Run what is attached inside with one of the two backends, both on CPU tensors.

    kind: "host" as always on the CPU, or "device": the arithmetic that accelerators get.
    """
    with pytest.MonkeyPatch.context() as patches:
        if kind == "device":
            patches.setattr("drift_fast.inject.placement.load.make_arithmetic", DeviceArithmetic)
        yield


ARITHMETIC = pytest.mark.parametrize("kind", ["host", "device"])


# --- tiny transformers models -----------------------------------------------------------------

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# 7 weights and 3 biases in each of the two layers.
TEXT_TARGETS = 20


def text_samples(count: int) -> list[dict[str, torch.Tensor]]:
    """Seeded texts of 8 tokens, as a Trainer's dataset."""
    generator = torch.Generator().manual_seed(12)
    tokens = torch.randint(4, 64, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def tiny_qwen2(*, seed: int = 0, **overrides: Any) -> nn.Module:
    """A random Qwen2ForCausalLM in float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = Qwen2ForCausalLM(Qwen2Config(**{**TEXT, **overrides}))
    return model


def tiny_llava(*, seed: int = 0, text: nn.Module | None = None) -> nn.Module:
    """A random LLaVA whose CLIP tower is as wide and deep as its Qwen2 backbone.

    The equal sizes are a trap: the tower's self_attn.q_proj has the backbone's suffix and shape.
    text: a Qwen2ForCausalLM whose weights the backbone takes over.
    """
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
    )

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=Qwen2Config(**TEXT).to_dict(),
        image_token_id=3,
        image_seq_length=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config)
    _take_over(model, text, seed=seed)
    return model


def tiny_qwen2_5_vl(*, seed: int = 0, text: nn.Module | None = None) -> nn.Module:
    """A random Qwen2.5-VL; its vision blocks hold gated MLPs shaped as the backbone's are."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 1,
            "fullatt_block_indexes": [1],
            "window_size": 8,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    _take_over(model, text, seed=seed)
    return model


def _take_over(model: Any, text: Any, *, seed: int) -> None:
    """Start the language backbone from a text model's weights, moved a little."""
    if text is None:
        return
    moved = perturbed(dict(text.model.state_dict()), seed=seed + 50, size=0.1)
    model.model.language_model.load_state_dict(moved)


def text_batch(count: int = 2, length: int = 8, *, seed: int = 3) -> dict[str, torch.Tensor]:
    """Return random token ids [count, length], none of them special, as inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 64, (count, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}


def text_loss(model: nn.Module, *, seed: int = 3) -> torch.Tensor:
    loss: torch.Tensor = model(**text_batch(seed=seed)).loss
    return loss


def moved_text(text: nn.Module, *, seed: int = 11, size: float = 0.3) -> nn.Module:
    """A text expert: a copy of a text model with seeded noise on every tensor."""
    expert = tiny_qwen2(seed=0)
    expert.load_state_dict(perturbed(dict(text.state_dict()), seed=seed, size=size))
    return expert


def saved(model: Any, folder: Path, *, max_shard_size: str = "40KB") -> Path:
    """Save in the disk layout of transformers, in several shards."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def language_targets(model: nn.Module) -> set[str]:
    """The runtime names of the language backbone's attention and MLP parameters."""
    wanted = set(ATTENTION) | set(MLP)
    return {
        name
        for name, _ in model.named_parameters()
        if ".layers." in name
        and "vision" not in name
        and "visual" not in name
        and name.split(".")[-2] in wanted
    }
