"""LoRA for the benches: adapters, their gradients in float64, and a rival in plain PyTorch.

With W = W₀ + s·B·A the gradients of the factors are (s·Bᵀ·g, s·g·Aᵀ), so Δ in the gradient of W
becomes Δ̃ = (s·Bᵀ·Δ, s·Δ·Aᵀ) in theirs. The formula runs on both factors of a weight together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from drift_fast.names import bare

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """Wrap all linear layers of the blocks with PEFT, factors in float32 and B not zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(KINDS),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(2)
    wrapped: Any = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=1e-3)
    return wrapped


def pairs(model: nn.Module) -> Iterator[tuple[str, Any, Any, float]]:
    """Yield every adapted weight: the name it has without adapters, A, B and s."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            path = bare(name).removeprefix("base_model.model.")
            yield f"{path}.weight", a, b, module.scaling["default"]


def coefficient(
    scale: str, square: torch.Tensor, dot: torch.Tensor, length: torch.Tensor
) -> torch.Tensor:
    """Return c for α = 1 from ‖g‖², ⟨g, Δ⟩ and ‖Δ‖²."""
    norm, size = square.sqrt(), length.sqrt()
    if scale == "absolute":
        return torch.ones_like(norm)
    if scale == "gradnorm":
        return norm / size
    return (1 + dot / (norm * size)) / 2 * norm / size


def restated(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    deltas: Mapping[str, torch.Tensor],
    scale: str,
) -> dict[str, torch.Tensor]:
    """Return what the factors' optimizer receives, over the whole batch, in float64.

    deltas: by the names that weights have without adapters.
    """
    plain = model.double()
    for tokens in batches:
        (plain(input_ids=tokens, labels=tokens).loss / len(batches)).backward()
    found: dict[int, torch.Tensor] = {}
    for name, a, b, s in pairs(plain):
        d = deltas[name].to(a.device).double()
        pulled = (s * b.detach().mT @ d, s * d @ a.detach().mT)
        square = a.grad.square().sum() + b.grad.square().sum()
        dot = (a.grad * pulled[0]).sum() + (b.grad * pulled[1]).sum()
        c = coefficient(scale, square, dot, sum(p.square().sum() for p in pulled))
        found |= {id(p): p.grad - c * d for p, d in zip((a, b), pulled, strict=True)}
    return {name: found[id(p)] for name, p in plain.named_parameters() if id(p) in found}


class PlainPullBack:
    """The adaptive formula for the factors in plain PyTorch, well written, Δ beside them.

    Products are of bfloat16, as training's own are, so Δ̃ is rounded more than the library's.
    """

    def __init__(self, model: nn.Module, deltas: Mapping[str, torch.Tensor]) -> None:
        self._pairs = [
            (a, b, s, deltas[name].to(a.device)) for name, a, b, s in pairs(model) if name in deltas
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Change the gradients of all factors."""
        gradients: list[torch.Tensor] = []
        pulled: list[torch.Tensor] = []
        for a, b, s, delta in self._pairs:
            gradients += [a.grad, b.grad]
            low = delta.dtype
            pulled.append((b.to(low).mT @ delta).to(a.grad.dtype).mul_(s))
            pulled.append((delta @ a.to(low).mT).to(b.grad.dtype).mul_(s))
        squares = torch.stack(torch._foreach_norm(gradients)).square().view(-1, 2).sum(1)
        lengths = torch.stack(torch._foreach_norm(pulled)).square().view(-1, 2).sum(1)
        each = [torch.dot(g.view(-1), d.view(-1)) for g, d in zip(gradients, pulled, strict=True)]
        dots = torch.stack(each).view(-1, 2).sum(1)
        c = coefficient("adaptive", squares, dots, lengths).repeat_interleave(2)
        torch._foreach_mul_(pulled, list(c.unbind()))
        torch._foreach_sub_(gradients, pulled)
