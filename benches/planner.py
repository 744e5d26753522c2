"""Compare what `drift_fast.plan` says of a run with the run itself: memory, seconds, disk.

    python benches/planner.py --directory /dev/shm/planner [--steps 8] [--out results.md]
    python benches/planner.py --device cpu --layers 2 --hidden 64 --directory /dev/shm/planner

Qwen2.5-VL-7B's architecture with random weights trains in full under AdamW (fused), vision tower
frozen, on samples of text, with Δ of attention and MLP in each residency; and with LoRA of rank 64
in mixed precision. Every run is a process of its own. Its memory is the most that PyTorch reserved
on the device (on a CPU there is no such figure), its seconds the median step after three, its disk
what is saved of weights and the optimizer's states. The aims are 10 % for memory and 25 % for time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from injection import RandomDelta
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

import drift_fast
from drift_fast import Injection, _core
from drift_fast.selection import Selection

VOCABULARY: Final = 152_064
# AdamW without a wider copy of bfloat16 weights fits on one device; mixed precision of 7B does not.
RUNS: Final[dict[str, dict[str, Any]]] = {
    "device, checkpointing": {"residency": "device", "gradient_checkpointing": True},
    "device": {"residency": "device"},
    "host, checkpointing": {"residency": "host", "gradient_checkpointing": True},
    "int8, checkpointing": {
        "residency": "device-int8",
        "gradient_checkpointing": True,
    },
    "LoRA": {"residency": "device", "lora_rank": 64},
    "LoRA, checkpointing": {
        "residency": "device",
        "gradient_checkpointing": True,
        "lora_rank": 64,
    },
}
# With LoRA factors are in float32 and the rest computes in bfloat16.
PRECISION: Final = {True: "bf16-mixed", False: "bf16"}


@dataclass(frozen=True)
class Found:
    """What one run took: bytes on the device, seconds of a step, bytes of a saved checkpoint."""

    memory: int
    seconds: float
    disk: int


def write_config(directory: Path, layers: int, hidden: int) -> None:
    """Write the configuration of a model of this size; at 28 and 3,584 it is Qwen2.5-VL-7B's."""
    heads = max(2, hidden // 128)
    text = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 37 // 7,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 7),
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    if hidden // heads != 128:
        part = hidden // heads // 8
        text["rope_scaling"]["mrope_section"] = [2 * part, part, part]
    vision = {"out_hidden_size": hidden, "hidden_size": 1280, "intermediate_size": 3420}
    if hidden < 1280:
        vision |= {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128}
        vision["fullatt_block_indexes"] = [1]
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(directory)


def built(config: Path, device: torch.device) -> torch.nn.Module:
    """Return the model in bfloat16 with random weights, its vision tower frozen."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = AutoModelForImageTextToText.from_config(
                Qwen2_5_VLConfig.from_pretrained(config)
            )
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".visual." not in name and not name.startswith("visual."))
    return model


def with_adapters(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """Put adapters on every matrix of the language model's layers; the rest is frozen."""
    from peft import LoraConfig, get_peft_model

    matrices = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and re.search(r"language_model\.layers\.", name)
    ]
    adapters: Any = get_peft_model(model, LoraConfig(r=rank, target_modules=matrices))
    if model.is_gradient_checkpointing:
        model.enable_input_require_grads()
    return adapters


def run(options: argparse.Namespace) -> Found:
    """Train for some steps and return what that took."""
    device = torch.device(options.device)
    settings = RUNS[options.run]
    model = built(options.directory / "config", device)
    if settings.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    # Presets select nothing of the vision tower, which is frozen.
    delta = RandomDelta(model, Selection.parse(("attn", "mlp"), None))
    rank = settings.get("lora_rank")
    if rank:
        model = with_adapters(model, rank)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # As the Trainer's default. With foreach a step takes a copy of the weights for a moment.
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    seconds = []
    ids = torch.randint(1000, (1, options.tokens), device=device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    casts: Any = contextlib.nullcontext()
    if rank:
        casts = torch.autocast(device.type, torch.bfloat16)
    with Injection(model, delta, residency=settings["residency"]) as injection:
        for _ in range(options.steps):
            start = time.perf_counter()
            with casts:
                loss = model(**batch).loss
            loss.backward()
            injection.step()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
    states = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    saved = trained if rank else model.parameters()
    weights = sum(parameter.nbytes for parameter in saved)
    return Found(memory, statistics.median(seconds[3:]), weights + states)


def foreseen(options: argparse.Namespace, settings: dict[str, Any]) -> Found:
    """Return what `plan` says of the run."""
    config = options.directory / "config"
    plan = drift_fast.plan(
        config,
        config,
        steps=options.steps,
        tokens=options.tokens,
        precision=PRECISION["lora_rank" in settings],
        rms=1e-3,
        **settings,
    )
    print(plan)
    parts = ("compute of a step", "optimizer of a step", "injection of a step")
    step = sum(plan[name].value for name in parts)
    memory, disk = (plan[name].value for name in ("GPU memory", "one training checkpoint"))
    return Found(int(memory), step, int(disk))


def compare(options: argparse.Namespace) -> list[str]:
    """Run everything; return the lines of the results."""
    directory: Path = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    write_config(directory / "config", options.layers, options.hidden)
    on_gpu = options.device.startswith("cuda")
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU"
    lines = [
        f"Qwen2.5-VL, {options.layers} layers, width {options.hidden}, {options.tokens} tokens a "
        f"step; {name}, torch {torch.__version__}. Each cell: measured, planned, their ratio.",
        "",
        "| Δ | GPU memory, GB | a step, s | one checkpoint, GB |",
        "|---|---|---|---|",
    ]
    for label, settings in RUNS.items():
        if label not in options.runs:
            continue
        planned = foreseen(options, settings)
        command = [sys.executable, __file__, "--run", label]
        for option in ("directory", "device", "steps", "tokens"):
            command += [f"--{option}", str(getattr(options, option))]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            lines.append(f"| {label} | failed: {ended.stderr.strip().splitlines()[-1]} | | |")
            continue
        measured = Found(**json.loads(ended.stdout.splitlines()[-1]))
        cells = [
            f"{one / unit:.2f}, {other / unit:.2f}, {one / other:.2f}"
            for one, other, unit in (
                (measured.memory, planned.memory, 1e9),
                (measured.seconds, planned.seconds, 1),
                (measured.disk, planned.disk, 1e9),
            )
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm/planner"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(vars(run(options))))
        return
    if _core.debug_build:
        raise SystemExit("the compiled module is a debug build; build it with --release")
    text = "\n".join(compare(options)) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
