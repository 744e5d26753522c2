"""The one problem that every stack trains, and what must come of it.

Owns: a tiny Qwen2, a delta for it, sixteen sequences, and the injected gradients in float64: the
gradient of the whole batch by one process, then tests/reference.py for each parameter. Does not
own: how a stack is driven (stacks.py), nor what is run where (run.py).
Invariant: built once and read from its folder by every process; all that is random is seeded. Every
micro-batch has the same number of predicted tokens, so a mean over micro-batches and processes is
the mean over the batch.

The delta of each target is half noise and half its gradient, forwards or backwards in turn, so that
no scale can be mistaken for another and "project" acts on half of the targets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import drift_fast
from support import reference
from support.injection_models import ATTENTION, MLP, saved, tiny_qwen2

SCALES = ("absolute", "gradnorm", "adaptive", "project")
# Training without an injection, which tells how far the stack itself is from float64.
NONE = "none"
ACCUMULATIONS = (1, 4)
SEQUENCES, LENGTH = 16, 8
# One step of SGD with this rate moves weights by far more than their own size, so that the
# difference of the weights before and after is the gradient to float32's precision.
LEARNING_RATE = 2.0**14
STRENGTH = 0.7

SHAPES: dict[str, dict[str, int]] = {
    # Every first dimension is a multiple of four.
    "even": {},
    # Odd but for the projections to heads, whose sizes rotary embeddings need even; a key bias of
    # six leaves the last of four processes nothing.
    "uneven": {
        "hidden_size": 31,
        "head_dim": 6,
        "intermediate_size": 45,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "vocab_size": 67,
    },
    # Tensors that the library does not count as small, not even a quarter of one: small ones stay
    # beside the gradients whatever the residency, and are computed together.
    "large": {
        "hidden_size": 512,
        "intermediate_size": 384,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
# One that is the end of another comes after it.
_WRAPPERS = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "module.",
)

Gradients = dict[str, torch.Tensor]


def canonical(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def is_target(name: str) -> bool:
    return ".layers." in name and name.split(".")[-2] in (*ATTENTION, *MLP)


@dataclass(frozen=True)
class World:
    """A folder that `build` filled."""

    folder: Path

    def model(self) -> Any:
        """Load the model as it is before training, in float32 and training mode."""
        model: Any = self._empty()
        model.load_state_dict(load_file(self.folder / "start.safetensors"))
        return model.train()

    def adapted(self, adapter: str) -> Any:
        """Load the model with LoRA on all linear layers and factors that are not zero."""
        model = with_lora(self.model(), adapter)
        start = load_file(self.folder / f"{adapter}-start.safetensors")
        left = model.load_state_dict(start, strict=False)
        assert not left.unexpected_keys
        return model.train()

    def delta(self) -> drift_fast.Delta:
        return drift_fast.Delta.open(self.folder / "delta")

    def batch(self) -> dict[str, torch.Tensor]:
        """All sequences [SEQUENCES, LENGTH], as input_ids and labels."""
        return load_file(self.folder / "batch.safetensors")

    def micro_batches(
        self, accumulation: int, *, rank: int = 0, size: int = 1
    ) -> list[dict[str, torch.Tensor]]:
        """The share of one process: as many micro-batches as accumulation says."""
        count = SEQUENCES // (accumulation * size)
        assert count * accumulation * size == SEQUENCES
        first = rank * accumulation * count
        starts = range(first, first + accumulation * count, count)
        return [
            {key: rows[start : start + count] for key, rows in self.batch().items()}
            for start in starts
        ]

    def start(self, kind: str) -> Gradients:
        """Trained weights before the step. kind: "weights", or the name of an adapter."""
        return load_file(self.folder / _file(kind, "start"))

    def expected(self, kind: str, scale: str) -> Gradients:
        """The injected gradient of every trained parameter, in float64."""
        return load_file(self.folder / _file(kind, scale))

    def alpha(self, scale: str) -> float | None:
        """Strength, such that push and gradient are of one size; None where there is no push."""
        if scale == NONE:
            return None
        alphas: dict[str, float] = json.loads((self.folder / "alpha.json").read_text())
        return alphas[scale]

    def injected(self, kind: str, scale: str, gradients: Mapping[str, torch.Tensor]) -> Gradients:
        """Restate the injection in float64, from any gradients of all trained parameters."""
        alpha = self.alpha(scale)
        if alpha is None:
            return {name: gradient.double() for name, gradient in gradients.items()}
        deltas = load_file(self.folder / "exact-delta.safetensors")
        if kind == "weights":
            return _injected(gradients, deltas, alpha, scale)
        start = self.start("weights") | self.start(kind)
        return _injected_factors(gradients, start, deltas, alpha, scale, adapter=kind)

    def _empty(self) -> Any:
        overrides = json.loads((self.folder / "shapes.json").read_text())
        return tiny_qwen2(num_hidden_layers=2, attention_dropout=0.0, **overrides)


def build(folder: Path, shapes: str, *, adapters: Sequence[str] = ()) -> World:
    """Fill an empty folder: weights, batch, delta and the expected gradients of every scale."""
    folder.mkdir(parents=True)
    (folder / "shapes.json").write_text(json.dumps(SHAPES[shapes]))
    world = World(folder)
    model = world._empty()
    # Qwen2's biases begin as zeros, and weights so small that attention hardly attends.
    generator = torch.Generator().manual_seed(21)
    spread = 0.2 * (32 / model.config.hidden_size) ** 0.5
    start = {
        name: weight + spread * torch.randn(weight.shape, generator=generator)
        for name, weight in model.state_dict().items()
    }
    save_file(start, folder / "start.safetensors")
    tokens = torch.randint(4, 64, (SEQUENCES, LENGTH), generator=generator)
    save_file({"input_ids": tokens, "labels": tokens.clone()}, folder / "batch.safetensors")

    plain = gradients_in_float64(world.model(), world.batch())
    expert = dict(start)
    for index, name in enumerate(filter(is_target, start)):
        direction = torch.randn(start[name].shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        direction += (-1) ** index * plain[name] / plain[name].norm()
        step = 0.3 * start[name].norm() * direction / direction.norm()
        expert[name] = (start[name].double() + step).float()
    model.load_state_dict(start)
    saved(model, folder / "multimodal")
    model.load_state_dict(expert)
    saved(model, folder / "expert")
    drift_fast.compute_delta(
        folder / "expert", folder / "multimodal", folder / "delta", dtype="float32"
    )
    deltas = {
        name: expert[name].double() - start[name].double() for name in filter(is_target, start)
    }
    save_file(deltas, folder / "exact-delta.safetensors")
    ratios = torch.stack([plain[name].norm() / deltas[name].norm() for name in deltas])
    alphas = dict.fromkeys(SCALES, STRENGTH) | {"absolute": float(ratios.median())}
    (folder / "alpha.json").write_text(json.dumps(alphas))
    _save_expected(world, "weights", plain)

    for adapter in adapters:
        factors = {
            # Exact in bfloat16, which float32 masters start from.
            name: (0.1 * torch.randn(parameter.shape, generator=generator)).bfloat16().float()
            for name, parameter in with_lora(world.model(), adapter).named_parameters()
            if parameter.requires_grad
        }
        save_file(factors, folder / _file(adapter, "start"))
        plain = gradients_in_float64(world.adapted(adapter), world.batch())
        _save_expected(world, adapter, plain)
    return world


def gradients_in_float64(model: Any, batch: Mapping[str, torch.Tensor]) -> Gradients:
    """The gradient of the mean loss over a batch, computed in float64 throughout.

    transformers takes norms and the loss in float32 whatever the model's dtype; both are restated.
    """
    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, _as_float64_norm(child))
    logits = model(input_ids=batch["input_ids"]).logits
    assert logits.dtype is torch.float64
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    loss.backward()
    return {
        canonical(name): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _as_float64_norm(norm: Any) -> nn.Module:
    exact = nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon, dtype=torch.float64)
    exact.weight = norm.weight
    return exact


def _save_expected(world: World, kind: str, plain: Gradients) -> None:
    for scale in (NONE, *SCALES):
        save_file(world.injected(kind, scale, plain), world.folder / _file(kind, scale))


def _file(kind: str, content: str) -> str:
    return f"{content}.safetensors" if kind == "weights" else f"{kind}-{content}.safetensors"


def _inject(gradient: Any, delta: Any, alpha: float, scale: str) -> reference.Array:
    if scale != "project":
        return reference.inject(gradient, delta, alpha=alpha, scale=scale)
    # c = α·max(⟨g,Δ⟩, 0)/‖Δ‖²: only where a step along -g would leave the expert behind.
    g, d = reference.exact(gradient), reference.exact(delta)
    along = max(float((g * d).sum()), 0.0)
    injected: reference.Array = g - alpha * along / reference.norm(d) ** 2 * d
    return injected


def _injected(
    gradients: Mapping[str, torch.Tensor],
    deltas: Mapping[str, torch.Tensor],
    alpha: float,
    scale: str,
) -> Gradients:
    return {
        name: torch.from_numpy(_inject(gradient, deltas[name], alpha, scale))
        if name in deltas
        else gradient.double()
        for name, gradient in gradients.items()
    }


# --- LoRA: the formula on the pair of factors, with the delta pulled back to them ----------------

RANK, LORA_ALPHA = 4, 8
# The factor s in W = W₀ + s·BA, restated: α/r, or α/√r for rsLoRA. With "copies" the last
# projection of each MLP trains whole.
ADAPTERS = {
    "lora": LORA_ALPHA / RANK,
    "rslora": LORA_ALPHA / RANK**0.5,
    "copies": LORA_ALPHA / RANK,
    "dora": LORA_ALPHA / RANK,
}


def with_lora(model: Any, adapter: str) -> Any:
    """Wrap all linear layers of the blocks with PEFT."""
    from peft import LoraConfig, get_peft_model

    copies = ["down_proj"] if adapter == "copies" else []
    config = LoraConfig(
        r=RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules=sorted({*ATTENTION, *MLP} - {*copies}),
        modules_to_save=copies or None,
        use_rslora=adapter == "rslora",
        use_dora=adapter == "dora",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _injected_factors(
    gradients: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
    deltas: Mapping[str, torch.Tensor],
    alpha: float,
    scale: str,
    *,
    adapter: str,
) -> Gradients:
    """Δ̃ = (s·BᵀΔ, s·ΔAᵀ) for (A, B), and one coefficient for the pair; Δ itself for copies.

    With DoRA W = diag(m/n)·V, V = W₀ + s·B·A with the norms n of its rows held; m joins A and B.
    """
    s = ADAPTERS[adapter]
    injected: Gradients = {}
    for name_a, gradient_a in gradients.items():
        if ".modules_to_save." in name_a:
            module = name_a.removeprefix("base_model.model.").partition(".modules_to_save.")[0]
            whole = _inject(gradient_a, deltas[f"{module}.weight"], alpha, scale)
            injected[name_a] = torch.from_numpy(whole)
        if ".lora_A." not in name_a:
            continue
        name_b = name_a.replace(".lora_A.", ".lora_B.")
        module = name_a.removeprefix("base_model.model.").partition(".lora_A.")[0]
        delta = deltas[f"{module}.weight"]
        a, b = start[name_a].double(), start[name_b].double()
        names, factors = [name_a, name_b], [a, b]
        scaled, pulled_back = s * delta, []
        if adapter == "dora":
            names.append(name_a.replace("lora_A.default", "lora_magnitude_vector.default"))
            m, v = start[names[-1]].double(), start[f"{module}.weight"].double() + s * b @ a
            norms = v.norm(dim=1)
            scaled = (m / norms)[:, None] * scaled
            factors.append(m)
            pulled_back = [(delta * v).sum(1) / norms]
        pulled_back = [(b.T @ scaled).flatten(), (scaled @ a.T).flatten(), *pulled_back]
        joint = torch.cat([gradients[name].flatten() for name in names])
        whole = torch.from_numpy(_inject(joint, torch.cat(pulled_back), alpha, scale))
        parts = whole.split([factor.numel() for factor in factors])
        for name, factor, part in zip(names, factors, parts, strict=True):
            injected[name] = part.reshape(factor.shape).clone()
    assert injected.keys() == gradients.keys()
    return injected
