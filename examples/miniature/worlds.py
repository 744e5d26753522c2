"""The checkpoints of every world: what a fine-tuning starts from and what it is drawn towards.

Owns which checkpoints a world has, how each is trained and where it lies. The task, the
architectures and the training loop are the demo's. Does not know any method. Invariant: every
checkpoint is trained once, from the world's number alone, and is bf16 safetensors as real ones are.

* ``base``, ``expert``, ``multimodal``: as in the demo.
* ``unrelated``: an expert like the first, from the same base, for another world's operations.
* ``strong``: an expert trained from the base far longer and with a larger learning rate, so that
  its Δ is large beside what fine-tuning can move.
* ``foreign_base``, ``foreign``: base and expert from other initial weights.
* ``sibling_base``, ``sibling``: the base continued on single steps of the whole tables, and an
  expert from that one.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Final, TypedDict

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from drift_fast import compute_delta
from drift_fast.demo import train_checkpoints as demo
from drift_fast.demo import world as w
from drift_fast.demo.experiment import decode, is_answer_right

# Which checkpoint each is trained from, in an order in which they can be trained.
PARENTS: Final[dict[str, str | None]] = {
    "base": None,
    "expert": "base",
    "multimodal": "base",
    "unrelated": "base",
    "strong": "base",
    "foreign_base": None,
    "foreign": "foreign_base",
    "sibling_base": "base",
    "sibling": "sibling_base",
}
STRONG: Final = demo.Schedule(steps=3000, batch=48, lr=3e-3)
SIBLING: Final = demo.Schedule(steps=700, batch=96, lr=1.5e-3)

# How long each takes beside an expert, for what can still be started in time.
COSTS: Final[dict[str, float]] = {
    "base": 1.0,
    "expert": 1.0,
    "multimodal": 1.0,
    "unrelated": 1.0,
    "strong": 2.0,
    "foreign_base": 1.0,
    "foreign": 1.0,
    "sibling_base": 0.4,
    "sibling": 1.0,
}

# What was measured of a checkpoint, beside its weights.
MEASURED: Final = "measured.json"

# Added to a world's number where something must differ from it: never the number of a world used.
_OTHER: Final = 5000


class Measured(TypedDict):
    """What a checkpoint knows (see `measure`), and the seconds and the device that it took."""

    knows: dict[str, float]
    seconds: float
    device: str


def directory(root: Path, world: int, name: str) -> Path:
    """Return where a world's checkpoint lies."""
    return root / "checkpoints" / str(world) / name


def exists(root: Path, world: int, name: str) -> bool:
    """Whether a checkpoint has been trained."""
    return (directory(root, world, name) / "config.json").exists()


def digest(root: Path, world: int, name: str) -> str:
    """Return the start of the SHA-256 of the bytes of a checkpoint's safetensors."""
    paths = sorted(directory(root, world, name).glob("*.safetensors"))
    return _digest(tuple((path, path.stat().st_mtime_ns) for path in paths))


@functools.lru_cache(maxsize=256)
def _digest(paths: tuple[tuple[Path, int], ...]) -> str:
    found = hashlib.sha256()
    for path, _ in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def family(worlds: list[int], names: list[str]) -> list[tuple[int, str]]:
    """Return (world, name) of checkpoints and of what they are trained from, parents first."""
    needed = set(names)
    for name in reversed(PARENTS):
        parent = PARENTS[name]
        if name in needed and parent is not None:
            needed.add(parent)
    ordered = [name for name in PARENTS if name in needed]
    return [(world, name) for name in ordered for world in worlds]


def missing(root: Path, worlds: list[int], names: list[str]) -> list[tuple[int, str]]:
    """Return (world, name) of what is not trained yet, parents included and first."""
    return [(world, name) for world, name in family(worlds, names) if not exists(root, world, name)]


def train(root: Path, number: int, name: str, *, device: str = "cpu", shrink: int = 1) -> Measured:
    """Train and measure one checkpoint; `shrink` divides its steps.

    It is written whole or not at all, and what was measured of it with it.
    """
    start = time.perf_counter()
    world = w.World(number)
    parent = PARENTS[name]
    with torch.device(device):
        base = None
        if parent is not None:
            # What was written, which is rounded to bf16.
            base = Qwen2ForCausalLM.from_pretrained(
                directory(root, number, parent), dtype=torch.float32
            )
        model = _train(world, name, base, shrink)
    target = directory(root, number, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    demo.save(model.cpu(), unfinished)
    knows = measure(root, number, name, unfinished)
    found = Measured(knows=knows, seconds=time.perf_counter() - start, device=device)
    (unfinished / MEASURED).write_text(json.dumps(found) + "\n", encoding="utf-8")
    unfinished.rename(target)
    return found


def measured(root: Path, number: int, name: str) -> Measured | None:
    """Return what `train` measured of a checkpoint; None where it was not trained here."""
    path = directory(root, number, name) / MEASURED
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def measure(root: Path, number: int, name: str, path: Path) -> dict[str, float]:
    """Return what a checkpoint that lies in `path` knows, and how far from its parent it is.

    `steps` and `chains` are the shares right of text folds of two and of six digits, for text
    models; `distance` is ‖W − W_parent‖/‖W_parent‖ over attention and MLP.
    """
    found: dict[str, float] = {}
    parent = PARENTS[name]
    if parent is not None:
        pair = (directory(root, number, parent), path)
        # The multimodal model is the side that has a tower.
        reasoning, multimodal = pair if name == "multimodal" else reversed(pair)
        total = compute_delta(reasoning, multimodal, modules=("attn", "mlp"), threads=1).stats.total
        found["distance"] = total.relative
    if name != "multimodal":
        with torch.device("cpu"):
            model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.train(False)
        world, generator = w.World(number), np.random.default_rng([number, 60])
        for measure, length in (("steps", 2), ("chains", 6)):
            folds = [world.text_fold(generator, length) for _ in range(200)]
            right = map(is_answer_right, folds, decode(model, folds))
            found[measure] = sum(right) / len(folds)
    return found


def _train(
    world: w.World, name: str, base: Qwen2ForCausalLM | None, shrink: int
) -> torch.nn.Module:
    def short(schedule: demo.Schedule) -> demo.Schedule:
        return demo.Schedule(
            steps=max(1, schedule.steps // shrink),
            batch=schedule.batch,
            lr=schedule.lr,
            warmup=schedule.warmup,
            weight_decay=schedule.weight_decay,
        )

    if name == "base":
        return demo.train_base(world, short(demo.BASE_SCHEDULE))
    if name == "foreign_base":
        return demo.train_base(_reseeded(world), short(demo.BASE_SCHEDULE))
    if base is None:
        raise ValueError(f"{name} is trained from another checkpoint, none was given")
    if name == "sibling_base":
        return _continued(world, base, short(SIBLING))
    if name == "multimodal":
        return demo.train_multimodal(world, base, short(demo.MULTIMODAL_SCHEDULE))
    schedule = short(STRONG if name == "strong" else demo.EXPERT_SCHEDULE)
    if name == "unrelated":
        return demo.train_expert(w.World(world.seed + _OTHER), base, schedule)
    return demo.train_expert(world, base, schedule)


def _reseeded(world: w.World) -> w.World:
    """Return the same tables with other initial weights and other draws."""
    other = copy.copy(world)
    other.seed = world.seed + _OTHER
    return other


def _continued(world: w.World, base: Qwen2ForCausalLM, schedule: demo.Schedule) -> Qwen2ForCausalLM:
    """Train the base further on single steps of the whole tables, as a base for mathematics is."""

    def draw(generator: np.random.Generator, count: int) -> list[w.Problem]:
        copies = count // 4
        return [world.text_fold(generator, 2) for _ in range(count - copies)] + [
            world.text_copy(generator, 2) for _ in range(copies)
        ]

    demo.fit(
        base, draw, schedule, generator=np.random.default_rng([world.seed, 13]), name="sibling"
    )
    return base
