"""The command `drift-fast plan`: its options, and what it prints.

Exit status: 0 planned (warnings included), 1 refused, 2 an option without meaning.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from drift_fast.dtypes import STORED_DTYPES
from drift_fast.planner import training as run

_NAMES = {
    "steps": ("N", "optimizer steps; or --samples and --epochs"),
    "samples": ("N", "of the training set"),
    "epochs": ("X", "default 1"),
    "batch": ("N", "samples of a process in a micro-batch (1)"),
    "accumulation": ("N", "micro-batches of an optimizer step (1)"),
    "learning_rate": ("X", "default 1e-6"),
    "warmup": ("X", "a share of the steps below 1, else steps (0.05)"),
    "tokens": ("N", "of one sample on average, image tokens included (2048)"),
    "max_tokens": ("N", "of the longest sample, for memory (as --tokens)"),
    "image_tokens": ("N", "of those, what the vision tower makes (0)"),
    "layers": ("0-3,8", "of Δ; default all"),
    "gpus": ("N", "default 1"),
    "alpha": ("X", "default 1"),
    "save_total_limit": ("N", "training checkpoints kept (1); 0 keeps all"),
    "save_steps": ("X", "steps between checkpoints, or a share of all below 1 (500)"),
    "schedule": ("TEXT", "of α, such as linear or window(0,0.3); λ follows from it"),
    "progress_cap": ("X", "λ that the injection stops at"),
}
_CHOICES = {
    "scheduler": (run.SCHEDULERS, "default cosine"),
    "dtype": (STORED_DTYPES, "of Δ (bfloat16)"),
    "precision": (run.PRECISIONS, "default bf16-mixed: float32 weights or copies of them"),
    "trained": (run.TRAINED, "default language: vision tower and projector are frozen"),
    "sharding": (run.SHARDINGS, "default none"),
    "optimizer": (run.OPTIMIZERS, "default adamw"),
    "offload": (run.OFFLOADS, "to host memory (none)"),
    "residency": (run.RESIDENCIES, "of Δ (auto)"),
    "save_strategy": (run.SAVING, "when checkpoints are written (steps)"),
    "scale": (("absolute", "gradnorm", "adaptive", "project"), "default adaptive"),
}
_FLOATS = {"epochs", "learning_rate", "warmup", "alpha", "save_steps", "progress_cap"}
_TEXTS = {"layers", "schedule"}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="memory, disk, hours and λ of a training run, before it starts; reads no weight",
        description="Say what Δ and a training run with it will take, and how far it will move, "
        "each figure with where it comes from. A directory with a config.json is enough.",
    )
    parser.add_argument("reasoning", help="text-only reasoning checkpoint, or its config.json")
    parser.add_argument("multimodal", help="multimodal checkpoint, or its config.json")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="YAML",
        help="a training configuration, of the Trainer's or LLaMA-Factory's names too; options "
        "take precedence",
    )
    parser.add_argument("--delta", type=Path, metavar="DIR", help="to predict λ from")
    parser.add_argument("--rms", type=float, metavar="X", help="of Δ's elements, in its place")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of one GPU, such as 80GB")
    parser.add_argument(
        "--utilisation", type=float, metavar="SHARE", help="of --peak; default as measured"
    )
    parser.add_argument(
        "--peak-tflops", type=float, metavar="X", help="of one GPU in bfloat16 (H100: 989.4)"
    )
    parser.add_argument("--modules", help="of Δ: attn, mlp, …, as for delta (attn,mlp)")
    for name, (metavar, told) in _NAMES.items():
        kind: Any = str if name in _TEXTS else float if name in _FLOATS else int
        parser.add_argument(_flag(name), type=kind, metavar=metavar, help=told)
    for name, (choices, told) in _CHOICES.items():
        parser.add_argument(_flag(name), choices=choices, help=told)
    parser.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=None
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_plan, value_error_status=2)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plan(options: argparse.Namespace) -> int:
    from drift_fast.planner.planning import plan

    given = {
        name: value
        for name in (*_NAMES, *_CHOICES, "modules", "gradient_checkpointing")
        if (value := getattr(options, name)) is not None
    }
    if options.peak_tflops is not None:
        given["peak"] = options.peak_tflops * 1e12
    found = plan(
        options.reasoning,
        options.multimodal,
        config=options.config,
        delta=options.delta,
        rms=options.rms,
        gpu_memory=options.gpu_memory,
        utilisation=options.utilisation,
        **given,
    )
    if options.json:
        json.dump(found.to_dict(), sys.stdout, indent=1, ensure_ascii=False)
        print()
    else:
        print(found.table())
    return 0
