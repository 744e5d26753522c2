"""The checkpoints of every world: what a fine-tuning starts from and what it is drawn towards.

Owns which checkpoints a world has, how each is trained, what it must know and where it lies. The
task and the architectures are the demo's. Does not know any method. Invariant: every checkpoint is
trained from the world's number alone, until it knows what `PLANS` asks of it, or not written: an
expert that is none, or a model that cannot see, would make every comparison say nothing. It is
bf16 safetensors as real ones are.

* ``base``, ``expert``, ``multimodal``: as in the demo.
* ``unrelated``: an expert like the first, from the same base, for another world's operations.
* ``strong``: the expert trained on, longer and with a larger learning rate, so that its Δ is large
  beside what fine-tuning can move.
* ``foreign_base``, ``foreign``: base and expert from other initial weights.
* ``sibling_base``, ``sibling``: the base continued on single steps of the whole tables, and an
  expert from that one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypedDict

import numpy as np
import torch
import train_checkpoints as demo
from transformers import LlavaForConditionalGeneration, PreTrainedModel, Qwen2ForCausalLM

from drift_fast import compute_delta
from drift_fast.demo import world as w
from drift_fast.demo.experiment import decode, is_answer_right


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one checkpoint is trained: AdamW, clip 1, a constant rate and then down to zero.

    The rate is constant, after `WARMUP` steps, for at least `least` steps and until every measure
    of `goals` is reached, which is looked at every `CHECK` steps; it then falls to zero in `DECAY`.
    After `most` steps without that, or where the written checkpoint falls short, the training is
    begun again with other batches. `cost` is about how long it takes beside an expert.
    """

    parent: str | None
    lr: float
    batch: int
    most: int
    goals: Mapping[str, float]
    least: int = 0
    cost: float = 1.0


WARMUP: Final = 100
CHECK: Final = 100
DECAY: Final = 200
ATTEMPTS: Final = 3

_FACTS: Final = MappingProxyType({"facts": 0.99})
_CHAINS: Final = MappingProxyType({"chains": 0.95})
_EXPERT: Final = Plan(parent="base", lr=1e-3, batch=48, most=5000, goals=_CHAINS)
# In an order in which they can be trained.
PLANS: Final[dict[str, Plan]] = {
    "base": Plan(parent=None, lr=2e-3, batch=192, most=2000, goals=_FACTS, cost=0.5),
    "expert": _EXPERT,
    "multimodal": Plan(
        parent="base",
        lr=1e-3,
        batch=64,
        most=3000,
        goals=MappingProxyType({"digits": 0.9, "known": 0.85}),
        cost=0.7,
    ),
    "unrelated": replace(_EXPERT, cost=2.0),
    "strong": Plan(parent="expert", lr=2e-3, batch=48, most=5000, goals=_CHAINS, least=2000),
    "foreign_base": Plan(parent=None, lr=2e-3, batch=192, most=2000, goals=_FACTS, cost=0.5),
    "foreign": replace(_EXPERT, parent="foreign_base"),
    "sibling_base": Plan(
        parent="base",
        lr=1.5e-3,
        batch=96,
        most=3000,
        goals=MappingProxyType({"steps": 0.99}),
        cost=0.5,
    ),
    "sibling": replace(_EXPERT, parent="sibling_base"),
}

# What was measured of a checkpoint, beside its weights.
MEASURED: Final = "measured.json"

# Added to a world's number where something must differ from it: never the number of a world used.
_OTHER: Final = 5000


class Measured(TypedDict):
    """What a checkpoint knows (see `measure`), the steps, the seconds and the device it took."""

    knows: dict[str, float]
    steps: int
    attempts: int
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


def _in_order(pairs: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    order = list(PLANS)
    return sorted(pairs, key=lambda pair: (order.index(pair[1]), pair[0]))


def missing(root: Path, needed: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return (world, name) of what is not there, and of what it is trained from, parents first."""
    absent = {pair for pair in needed if not exists(root, *pair)}
    for name in reversed(PLANS):
        parent = PLANS[name].parent
        if parent is not None:
            begun = {(world, parent) for world, mine in absent if mine == name}
            absent |= {pair for pair in begun if not exists(root, *pair)}
    return _in_order(absent)


def orphans(root: Path, absent: Iterable[tuple[int, str]]) -> list[str]:
    """Return "world/name" of what was trained from one of those that are `absent`.

    Trained again, and elsewhere, a parent may come out otherwise: a Δ from it to such a checkpoint
    would be of two models that have nothing to do with each other.
    """
    gone = set(absent)
    return [
        f"{world}/{name}"
        for world in sorted({world for world, _ in gone})
        for name, plan in PLANS.items()
        if (world, plan.parent) in gone and exists(root, world, name)
    ]


def train(root: Path, number: int, name: str, *, device: str = "cpu", shrink: int = 1) -> Measured:
    """Train and measure one checkpoint; `shrink` divides its steps, and drops its goals.

    It is written whole or not at all, and what was measured of it with it.

    Raises:
        RuntimeError: no attempt reached the goals, with what each measured.
    """
    start = time.perf_counter()
    plan = PLANS[name]
    if shrink > 1:
        plan = replace(plan, most=max(1, plan.most // shrink), least=0, goals={})
    target = directory(root, number, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{name}.unfinished")
    short = []
    for attempt in range(ATTEMPTS):
        with torch.device(device):
            model = _begun(root, number, name)
            steps = _fit(model, _own(number, name), name, plan, attempt)
        shutil.rmtree(unfinished, ignore_errors=True)
        demo.save(model.cpu(), unfinished)
        knows = measure(root, number, name, unfinished)
        if all(knows[goal] >= least for goal, least in plan.goals.items()):
            found = Measured(
                knows=knows,
                steps=steps,
                attempts=attempt + 1,
                seconds=time.perf_counter() - start,
                device=device,
            )
            (unfinished / MEASURED).write_text(json.dumps(found) + "\n", encoding="utf-8")
            unfinished.rename(target)
            return found
        short.append({goal: knows[goal] for goal in plan.goals} | {"steps": steps})
    shutil.rmtree(unfinished)
    raise RuntimeError(
        f"world {number}, {name}: expected at least {dict(plan.goals)}, found {short} in "
        f"{ATTEMPTS} attempts of at most {plan.most} steps: give it more in PLANS"
    )


def measured(root: Path, number: int, name: str) -> Measured | None:
    """Return what `train` measured of a checkpoint; None where it was not trained here."""
    path = directory(root, number, name) / MEASURED
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def measure(root: Path, number: int, name: str, path: Path) -> dict[str, float]:
    """Return what a checkpoint that lies in `path` knows, and how far from its parent it is.

    `facts` is the share of the base's half of the tables that it completes, `steps` and `chains`
    of text folds of two and of six digits; of a multimodal model, `digits` is the share of digits
    that it reads in three cells, and `known` of single steps over two cells within the base's half,
    both on held-out images. All are of the operations it was trained for. `distance` is
    ‖W − W_parent‖/‖W_parent‖ over attention and MLP.
    """
    found: dict[str, float] = {}
    parent = PLANS[name].parent
    if parent is not None:
        pair = (directory(root, number, parent), path)
        # The multimodal model is the side that has a tower.
        reasoning, multimodal = pair if name == "multimodal" else reversed(pair)
        total = compute_delta(reasoning, multimodal, modules=("attn", "mlp"), threads=1).stats.total
        found["distance"] = total.relative
    kind: Any = LlavaForConditionalGeneration if name == "multimodal" else Qwen2ForCausalLM
    with torch.device("cpu"):
        model = kind.from_pretrained(path, dtype=torch.float32)
    names = ("digits", "known") if name == "multimodal" else ("facts", "steps", "chains")
    return found | _knows(model, _own(number, name), names)


# What is measured: how a problem is drawn from held-out images, and the share of a reply right.
_Draw = Callable[[w.World, np.random.Generator], w.Problem]
_MEASURES: Final[dict[str, _Draw]] = {
    "facts": lambda world, generator: world.text_known_fact(generator),
    "steps": lambda world, generator: world.text_fold(generator, 2),
    "chains": lambda world, generator: world.text_fold(generator, 6),
    "digits": lambda world, generator: world.image_read(generator, 3, "validation"),
    "known": lambda world, generator: world.image_known_step(generator, "validation"),
}


def _knows(model: PreTrainedModel, world: w.World, names: Iterable[str]) -> dict[str, float]:
    """Return each measure over 200 problems, which are the same at every call."""
    found = {}
    training = model.training
    model.train(False)
    for name in names:
        generator = np.random.default_rng([world.seed, 60])
        problems = [_MEASURES[name](world, generator) for _ in range(200)]
        replies = decode(model, problems)
        if name == "digits":
            right = [
                _share(reply, problem.target[:-1])
                for reply, problem in zip(replies, problems, strict=True)
            ]
        else:
            right = [
                float(is_answer_right(p, reply)) for p, reply in zip(problems, replies, strict=True)
            ]
        found[name] = sum(right) / len(right)
    model.train(training)
    return found


def _share(reply: Sequence[int], target: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(reply, target, strict=False)) / len(target)


def _own(number: int, name: str) -> w.World:
    """Return the world whose operations a checkpoint is trained for."""
    return w.World(number + _OTHER if name == "unrelated" else number)


def _begun(root: Path, number: int, name: str) -> PreTrainedModel:
    """Return what a checkpoint's training begins from: its parent as written, rounded to bf16."""
    parent = PLANS[name].parent
    if parent is None:
        return demo.new_text(number + (_OTHER if name == "foreign_base" else 0))
    base = Qwen2ForCausalLM.from_pretrained(directory(root, number, parent), dtype=torch.float32)
    return demo.with_tower(base, number + 1) if name == "multimodal" else base


def _problems(world: w.World, name: str) -> demo.Draw:
    """Return what draws the problems that a checkpoint is trained on."""
    if name in ("base", "foreign_base"):
        return demo.base_problems(world)
    if name == "multimodal":
        return demo.multimodal_problems(world)
    return _single_steps(world) if name == "sibling_base" else demo.expert_problems(world)


def _single_steps(world: w.World) -> demo.Draw:
    """Return what draws single steps of the whole tables, as a base for mathematics sees them."""

    def draw(generator: np.random.Generator, count: int) -> list[w.Problem]:
        copies = count // 4
        return [world.text_fold(generator, 2) for _ in range(count - copies)] + [
            world.text_copy(generator, 2) for _ in range(copies)
        ]

    return draw


def _fit(model: PreTrainedModel, world: w.World, name: str, plan: Plan, attempt: int) -> int:
    """Train in place as a plan says, and return the steps it took."""
    order = list(PLANS).index(name)
    generator = np.random.default_rng([world.seed, 10, order, attempt])
    draw = _problems(world, name)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.lr, weight_decay=0.01, betas=(0.9, 0.98)
    )
    model.train()

    def step(factor: float) -> None:
        demo.take_step(model, optimizer, draw(generator, plan.batch), plan.lr * factor)

    def enough(done: int) -> bool:
        if done < plan.least or done % CHECK or not plan.goals:
            return False
        knows = _knows(model, world, plan.goals)
        return all(knows[goal] >= least for goal, least in plan.goals.items())

    done = 0
    while done < plan.most and not enough(done):
        step(min(1.0, (done + 1) / WARMUP))
        done += 1
    decay = min(DECAY, plan.most)
    for left in range(decay, 0, -1):
        step(left / (decay + 1))
    return done + decay
