"""Time what an injection adds to a training step, beside the public code's formula as a rival.

    python benches/injection.py [--layers 28] [--tokens 2048] [--repeats 10] [--out results.md]

The model is the text backbone of Qwen2.5-VL-7B with random bfloat16 weights (fewer layers where the
memory is smaller). A step is one forward and backward pass; variants take turns in one run. The
rival is the public code's adaptive formula re-stated: Δ of every tensor in pageable host memory,
copied to the device and reduced inside a gradient hook. Before timing, injected gradients are
compared with float64, and no step may wait for the device (CUDA's sync detector set to raise).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from drift_fast import Injection, _core
from drift_fast.inject.targets import DeltaLike
from drift_fast.select import Selection


class RandomDelta(Mapping[str, torch.Tensor]):
    """A delta of seeded random values, a tenth of a typical weight, made when asked for."""

    def __init__(self, model: torch.nn.Module, selection: Selection) -> None:
        self.shapes = {
            name: tuple(p.shape) for name, p in model.named_parameters() if name in selection
        }
        self._device = next(model.parameters()).device

    def __getitem__(self, name: str) -> torch.Tensor:
        seed = sum(map(ord, name))
        generator = torch.Generator(self._device).manual_seed(seed)
        values = torch.randn(self.shapes[name], generator=generator, device=self._device)
        return (values * 0.002).to(torch.bfloat16).cpu()

    def __iter__(self) -> Any:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def public_hooks(model: torch.nn.Module, delta: DeltaLike) -> list[Any]:
    """Hook every target with the public code's adaptive formula, Δ in pageable host memory."""
    handles = []
    for name, parameter in model.named_parameters():
        if name not in delta.shapes:
            continue
        host = delta[name].cpu()

        def hook(gradient: torch.Tensor, host: torch.Tensor = host) -> torch.Tensor:
            there = host.to(gradient.device, gradient.dtype, non_blocking=True)
            norm, size = gradient.norm().clamp_min(1e-12), there.norm().clamp_min(1e-12)
            if norm < 1e-12 or size < 1e-12:  # as there: a comparison that waits for the device
                cosine = gradient.new_tensor(0.0)
            else:
                cosine = torch.dot(gradient.flatten(), there.flatten()) / (norm * size)
            push = 0.5 * (cosine.clamp(-1.0, 1.0) + 1.0)
            return gradient - push * norm * (there / size)

        handles.append(parameter.register_hook(hook))
    return handles


def check(model: torch.nn.Module, delta: DeltaLike, step: Callable[[], None]) -> float:
    """Compare injected gradients with float64, without a host sync in the step."""
    step()
    names = list(delta.shapes)
    sample = names[:: max(1, len(names) // 12)]
    before = {name: model.get_parameter(name).grad.double() for name in sample}
    worst = 0.0
    with Injection(model, delta, scale="adaptive") as injection:
        cuda = next(model.parameters()).is_cuda
        if cuda:
            torch.cuda.set_sync_debug_mode("error")
        injection.step()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
        assert injection.injected == len(names)
        for name, g in before.items():
            d = delta[name].to(g.device).double()
            cosine = (g * d).sum() / (g.norm() * d.norm())
            exact = g - 0.5 * (1 + cosine) * g.norm() * d / d.norm()
            found = model.get_parameter(name).grad.double()
            # Rounding a value to bfloat16 moves it by at most 2^-8 of itself.
            bound = exact.abs() * 2**-8 + (exact - g).abs() * 1e-4 + 1e-30
            worst = max(worst, float(((found - exact).abs() / bound).max()))
    assert worst <= 1.0, f"an injected gradient is off by {worst} roundings"
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rival-repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if _core.debug_build:
        raise SystemExit("this is a debug build; timings of it mean nothing")

    torch.manual_seed(0)
    heads = options.hidden // 128
    config = Qwen2Config(
        vocab_size=152_064 if options.hidden >= 2048 else 32_000,
        hidden_size=options.hidden,
        intermediate_size=round(options.hidden * 18_944 / 3584),
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 7),
        tie_word_embeddings=False,
    )
    with torch.device(options.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(config)
        torch.set_default_dtype(default)
    tokens = torch.randint(0, 32_000, (1, options.tokens), device=options.device)
    cuda = options.device.startswith("cuda")

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()

    def timed(action: Callable[[], None]) -> float:
        wait()
        start = time.perf_counter()
        action()
        wait()
        return (time.perf_counter() - start) * 1e3

    everything = RandomDelta(model, Selection.parse(("attn", "mlp"), None))
    attention = RandomDelta(model, Selection.parse("attn", None))
    worst = check(model, everything, step)

    for _ in range(3):
        step()
    rows: dict[str, list[float]] = {"no injection": []}
    memory = {"no injection": 0.0}
    for label, delta in (("attention + MLP", everything), ("attention only", attention)):
        for scale in ("adaptive", "gradnorm", "absolute"):
            name = f"drift_fast, {scale}, {label}"
            held = torch.cuda.memory_allocated() if cuda else 0
            injection = Injection(model, delta, scale=scale)
            memory[name] = (torch.cuda.memory_allocated() - held) / 1e9 if cuda else 0.0

            def injected(injection: Injection = injection) -> None:
                step()
                injection.step()

            injected()
            rows[name] = []
            for _ in range(options.repeats):
                rows["no injection"].append(timed(step))
                rows[name].append(timed(injected))
            injection.remove()
    name = "public formula in a hook, adaptive, attention + MLP"
    handles = public_hooks(model, everything)
    step()
    rows[name] = [timed(step) for _ in range(options.rival_repeats)]
    memory[name] = 0.0
    for handle in handles:
        handle.remove()

    base = statistics.median(rows["no injection"])
    what = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    numel = sum(torch.Size(s).numel() for s in everything.shapes.values())
    lines = [
        f"# What an injection adds to a step: {what}",
        "",
        f"`python benches/injection.py --layers {options.layers} --hidden {options.hidden} "
        f"--tokens {options.tokens}`, {time.strftime('%Y-%m')}, torch {torch.__version__}, "
        f"drift_fast {_core.__version__}. Forward and backward of {options.tokens} tokens through "
        f"{options.layers} layers of width {options.hidden} in bfloat16; attention + MLP are "
        f"{len(everything)} tensors, {numel * 2 / 1e9:.2f} GB of Δ, resident on the device. Median "
        f"(min to max) of {options.repeats} in one run. Before timing: injected gradients within "
        f"{worst:.2f} of the bound of one bfloat16 rounding against float64"
        + (", no host sync in the step." if cuda else "."),
        "",
        "| | step ms | added | Δ on the device, GB |",
        "|---|---|---|---|",
    ]
    for label, times in rows.items():
        middle = statistics.median(times)
        added = "" if label == "no injection" else f"{(middle / base - 1) * 100:+.1f} %"
        lines.append(
            f"| {label} | {middle:.1f} ({min(times):.1f} to {max(times):.1f}) | {added} | "
            f"{memory[label]:.2f} |"
        )
    table = "\n".join(lines)
    print(table)
    if options.out:
        options.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
