"""Measure tokens per second of fine-tuning Qwen2.5-VL-7B with images: SFT, DRIFT, the public way.

    python benches/throughput.py [--samples 4] [--repeats 3] [--out results.md]
    python benches/throughput.py --device cpu --size tiny --samples 2 --image 56 --text 32

The whole model with random weights in bfloat16: vision tower and projector frozen, as in the
recipe, everything else trained by AdamW with its gradient clipped at 1. A sample is one image and
some text. Plain fine-tuning (SFT) is timed before and after every variant, all in one run. The
rival is the public code's adaptive formula in gradient hooks, Δ of every tensor in pageable host
memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from injection import RandomDelta, public_hooks
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import drift_fast
from drift_fast import Injection
from drift_fast.bench.pair import SIZES
from drift_fast.selection import Selection

# The vision tower of every Qwen2.5-VL; the tiny one is for trying this script out.
VISION = {
    "full": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "tiny": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "fullatt_block_indexes": [0],
    },
}
# A patch is 14 pixels wide, and two by two of them make one token.
PATCH, MERGED = 14, 2


@dataclass
class Row:
    """Milliseconds a step of a variant and of SFT in turn with it, and gigabytes it adds."""

    label: str
    times: list[float]
    base: list[float]
    memory: float


class Training:
    """The model, a batch with images, and one optimizer step on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.model = make_model(options, self.device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("visual" not in name)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # Weights stay where they are, so that every variant times the same numbers.
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0, fused=self.cuda)
        self.batch = make_batch(options, self.model.config, self.device)
        self.tokens = self.batch["input_ids"].numel()
        self.images = int((self.batch["input_ids"] == self.model.config.image_token_id).sum())

    def step(self, inject: Callable[[], None] | None = None) -> None:
        self.model(**self.batch).loss.backward()
        if inject is not None:
            inject()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self, steps: int, inject: Callable[[], None] | None = None) -> float:
        """Return the milliseconds of a step, the mean of several in a row."""
        self.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(inject)
        self.wait()
        return (time.perf_counter() - start) * 1e3 / steps

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def memory(self) -> float:
        gc.collect()
        return torch.cuda.memory_allocated() / 1e9 if self.cuda else 0.0

    def variant(self, label: str, attach: Callable[[], Any], steps: int) -> Row:
        """Time a variant, and SFT before and after it; `attach` returns what steps and removes."""
        row = Row(label, [], [], 0.0)
        self.step()
        row.base.extend(self.timed(steps) for _ in range(self.options.repeats))
        before = self.memory()
        held = attach()
        row.memory = self.memory() - before
        # Allocations settle, and what is launched as one is recorded.
        for _ in range(min(4, steps)):
            self.step(held.step)
        row.times.extend(self.timed(steps, held.step) for _ in range(self.options.repeats))
        held.remove()
        del held
        self.step()
        row.base.extend(self.timed(steps) for _ in range(self.options.repeats))
        added = statistics.median(row.times) / statistics.median(row.base) - 1
        print(f"{label}: {added:+.1%}", flush=True)
        return row


class PublicHooks:
    """The public code's hooks, which do their work inside backward."""

    def __init__(self, model: torch.nn.Module, delta: RandomDelta) -> None:
        self._handles = public_hooks(model, delta)

    def step(self) -> None:
        pass

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def make_model(options: argparse.Namespace, device: torch.device) -> Any:
    """Return the multimodal model with random weights in bfloat16."""
    size = SIZES[options.size]
    half = size.head // 2
    sections = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocab,
            "hidden_size": size.hidden,
            "intermediate_size": size.inner,
            "num_hidden_layers": options.layers or size.layers,
            "num_attention_heads": size.hidden // size.head,
            "num_key_value_heads": size.keys // size.head,
            "rope_scaling": {"type": "mrope", "mrope_section": sections},
            "tie_word_embeddings": size.tied,
        },
        vision_config={
            **VISION["tiny" if options.size == "tiny" else "full"],
            "out_hidden_size": size.hidden,
        },
        image_token_id=size.vocab - 1,
        video_token_id=size.vocab - 2,
        vision_start_token_id=size.vocab - 4,
        vision_end_token_id=size.vocab - 3,
        tie_word_embeddings=size.tied,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    return model.train()


def make_batch(
    options: argparse.Namespace, config: Any, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return seeded samples of one square image, `image` pixels wide, and `text` tokens each."""
    patches = options.image // PATCH
    merged = (patches // MERGED) ** 2
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(
        8, config.image_token_id - 8, (options.samples, options.text), generator=generator
    )
    start = torch.full((options.samples, 1), config.vision_start_token_id)
    image = torch.full((options.samples, merged), config.image_token_id)
    tokens = torch.cat([start, image, start + 1, text], dim=1)
    labels = tokens.clone()
    labels[:, : merged + 2] = -100
    width = 3 * 2 * PATCH * PATCH
    pixels = torch.randn(options.samples * patches**2, width, generator=generator)
    grid = torch.tensor([[1, patches, patches]] * options.samples)
    batch = {
        "input_ids": tokens,
        "labels": labels,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": pixels.to(torch.bfloat16),
        "image_grid_thw": grid,
        "mm_token_type_ids": (tokens == config.image_token_id).long(),
    }
    return {name: values.to(device) for name, values in batch.items()}


def measure(training: Training) -> list[Row]:
    """Return the rows of all variants."""
    options, model = training.options, training.model
    both = RandomDelta(model, Selection.parse(("attn", "mlp"), None))
    attention = RandomDelta(model, Selection.parse("attn", None))
    # One value for each name, whichever asks for it.
    attention._made = both._made
    rows = []
    for label, delta, held in (
        ("attention", attention, {"residency": "device"}),
        ("attention, overlapped", attention, {"residency": "device", "overlap": True}),
        ("attention + MLP", both, {"residency": "device"}),
        ("attention + MLP, overlapped", both, {"residency": "device", "overlap": True}),
        (
            "attention + MLP, Δ in host memory, overlapped",
            both,
            {"residency": "host", "overlap": True, "prefetch": "4GB"},
        ),
    ):

        def attach(delta: RandomDelta = delta, held: dict[str, Any] = held) -> Injection:
            return Injection(model, delta, optimizer=training.optimizer, **held)

        rows.append(training.variant(f"DRIFT, {label}", attach, options.steps))
    for label, delta in (("attention", attention), ("attention + MLP", both)):

        def hook(delta: RandomDelta = delta) -> PublicHooks:
            return PublicHooks(model, delta)

        rows.append(training.variant(f"the public way, {label}", hook, 1))
    return rows


def render(training: Training, rows: list[Row], peak: float) -> str:
    """Return the results as Markdown."""
    options = training.options
    name = torch.cuda.get_device_name() if training.cuda else "CPU"
    every = [time for row in rows for time in row.base]
    base = statistics.median(every)
    lines = [
        f"# Fine-tuning Qwen2.5-VL-{options.size} with images: {name}",
        "",
        f"`{options.command}`, {time.strftime('%Y-%m')}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, drift_fast {drift_fast.__version__}. Random weights in "
        f"bfloat16, {sum(p.numel() for p in training.model.parameters()) / 1e9:.2f}B parameters, "
        f"of which {sum(p.numel() for p in training.trained) / 1e9:.2f}B train (not the vision "
        f"tower and projector). A step is {options.samples} samples of one {options.image}-pixel "
        f"image and {options.text} tokens of text, {training.tokens} tokens of which "
        f"{training.images} are image tokens: forward, backward, injection (adaptive), clipping "
        f"and AdamW. Medians of {options.repeats} rounds of {options.steps} steps in a row (the "
        "public way: of one), and of as many of SFT before and after them.",
        "",
        "| | tokens/s | step ms | SFT beside it, ms | added | Δ on the device, GB |",
        "|---|---|---|---|---|---|",
        f"| SFT | {training.tokens / base * 1e3:,.0f} "
        f"| {base:.1f} ({min(every):.1f} to {max(every):.1f}) | | | |",
    ]
    for row in rows:
        middle, beside = statistics.median(row.times), statistics.median(row.base)
        lines.append(
            f"| {row.label} | {training.tokens / middle * 1e3:,.0f} "
            f"| {middle:.1f} ({min(row.times):.1f} to {max(row.times):.1f}) "
            f"| {beside:.1f} ({min(row.base):.1f} to {max(row.base):.1f}) "
            f"| {middle / beside - 1:+.1%} | {max(row.memory, 0.0):.2f} |"
        )
    return "\n".join([*lines, "", f"Peak memory of all: {peak:.1f} GB."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="7B")
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--image", type=int, default=448, help="pixels, a multiple of 28")
    parser.add_argument("--text", type=int, default=254)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.command = " ".join(["python benches/throughput.py", *sys.argv[1:]])
    training = Training(options)
    # Allocations settle.
    training.timed(3)
    rows = measure(training)
    peak = torch.cuda.max_memory_allocated() / 1e9 if training.cuda else 0.0
    text = render(training, rows, peak)
    if options.out:
        options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
