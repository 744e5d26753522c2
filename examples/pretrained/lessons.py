"""The checkpoints: experts and multimodal models made from one pre-trained language model.

Owns their training. A *pair* is a number: it seeds everything that its expert and its multimodal
model have of their own. Invariant: a checkpoint's directory is complete or not there, and its model
knows what its lesson asks for.

* base: the language model as its package carries it;
* expert: the base after stories of 3 to 6 steps, as text;
* multimodal: the base behind a vision tower trained from nothing, after reading numbers in images.
  The tower first learns alone to give the base's embedding of each digit: without that, three of
  four models had not begun to read after 1,200 steps;
* other base, other expert: the base after single sums, and that after the stories;
* unrelated: the base after sorting numbers.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import batches
import numpy as np
import problems
import torch
from batches import IMAGE_TOKEN, Encoder
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Name = Literal["base", "expert", "multimodal", "other_base", "other_expert", "unrelated"]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How one checkpoint is trained from another: until it knows enough, or the steps are over.

    `draw` returns one problem; `test` one whose share of right answers must reach `enough`.
    """

    source: Name
    draw: Callable[[np.random.Generator], problems.Problem]
    test: Callable[[np.random.Generator], problems.Problem]
    enough: float
    steps: int
    batch: int = 32
    learning_rate: float = 2e-4
    every: int = 100


def _stories(rng: np.random.Generator) -> problems.Problem:
    return problems.story(rng, int(rng.integers(3, 7)), image=False)


def _reading(rng: np.random.Generator) -> problems.Problem:
    return problems.reading(rng, whole=rng.random() < 0.5)


_EXPERT: Final = Lesson(source="base", draw=_stories, test=_stories, enough=0.95, steps=1000)
LESSONS: Final[dict[Name, Lesson]] = {
    "expert": _EXPERT,
    "multimodal": Lesson(
        source="base",
        draw=_reading,
        test=problems.reading,
        enough=0.93,
        steps=4000,
        batch=64,
        learning_rate=5e-5,
        every=200,
    ),
    "other_base": Lesson(
        source="base", draw=problems.single, test=problems.single, enough=0.97, steps=3000
    ),
    "other_expert": Lesson(
        source="other_base", draw=_stories, test=_stories, enough=0.95, steps=1000
    ),
    "unrelated": Lesson(
        source="base", draw=problems.sorting, test=problems.sorting, enough=0.97, steps=300
    ),
}
# Learning rate of the vision tower and the projector, which start from nothing.
_TOWER_RATE: Final = 1e-3
# Steps and images of each in which the tower learns digits alone.
_DIGITS: Final = (400, 64)
# Problems of the test that ends a lesson.
_TESTED: Final = 256


def directory(root: Path, pair: int, name: Name) -> Path:
    """Return where a checkpoint is; the base is the same for all pairs."""
    return root / "base" if name == "base" else root / f"pair-{pair}" / name


def exists(root: Path, pair: int, name: Name) -> bool:
    """Whether a checkpoint was written."""
    return (directory(root, pair, name) / "config.json").exists()


def tokenizer(root: Path) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer."""
    return AutoTokenizer.from_pretrained(root / "base")


def load(root: Path, pair: int, name: Name, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a checkpoint's model on the CPU."""
    kind = LlavaForConditionalGeneration if name == "multimodal" else AutoModelForCausalLM
    return kind.from_pretrained(directory(root, pair, name), dtype=dtype)


def train(root: Path, pair: int, name: Name, *, device: str, shrink: int = 1) -> dict[str, object]:
    """Train a checkpoint, write it in float32, and return what it came to.

    `shrink` divides the steps and the batch, for a machine that only shows that the way works.
    """
    start = time.perf_counter()
    lesson = LESSONS[name]
    torch.manual_seed(1000 * pair + sorted(LESSONS).index(name))
    rng = np.random.default_rng([pair, sorted(LESSONS).index(name)])
    words = tokenizer(root)
    model = load(root, pair, lesson.source)
    if name == "multimodal":
        model = _with_tower(model, words)
    model.to(device)
    if name == "multimodal":
        teach_digits(model, words, rng, steps=max(1, _DIGITS[0] // shrink))
    encoder = Encoder(words, pair, "train")
    steps, size = max(1, lesson.steps // shrink), max(2, lesson.batch // shrink)
    check = np.random.default_rng([pair, 7])
    tested = [lesson.test(check) for _ in range(max(4, _TESTED // shrink))]
    optimizer = torch.optim.AdamW(_rates(model, lesson), weight_decay=0.0, fused=device == "cuda")
    curve: list[tuple[int, float]] = []
    for step in range(1, steps + 1):
        _warm_up(optimizer, step / max(1, steps // 20))
        batch = encoder.training([lesson.draw(rng) for _ in range(size)])
        model.train()
        with batches.autocast(torch.device(device)):
            loss = model(**batches.to(batch, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % lesson.every == 0 or step == steps:
            share = batches.right(model, Encoder(words, pair, "test"), tested)
            curve.append((step, round(share, 4)))
            if share >= lesson.enough:
                break
    else:
        if shrink == 1:
            raise RuntimeError(
                f"{name} of pair {pair}: expected {lesson.enough} of its test after {steps} steps, "
                f"found {curve}"
            )
    _write(model, words, directory(root, pair, name))
    return {
        "curve": curve,
        "loss": float(loss.detach()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _with_tower(model: PreTrainedModel, words: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Put a language model behind a small vision tower: one image token for each digit."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=problems.SIDE,
        patch_size=problems.DIGIT,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=model.config,
        image_token_id=words.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    shell = LlavaForConditionalGeneration(config)
    shell.model.language_model.load_state_dict(model.model.state_dict())
    shell.tie_weights()
    shell.generation_config = model.generation_config
    return shell


def teach_digits(
    model: PreTrainedModel, words: PreTrainedTokenizerBase, rng: np.random.Generator, *, steps: int
) -> float:
    """Train the tower and the projector until an image's tokens are like its digits' embeddings.

    Returns:
        The share of digits of the last batch whose own embedding is the nearest.
    """
    weights = model.get_input_embeddings().weight
    ids = words.convert_tokens_to_ids([str(digit) for digit in range(10)])
    digits = weights[ids].detach().float()
    scale = digits.var(0).mean()
    parts = [model.model.vision_tower, model.model.multi_modal_projector]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_TOWER_RATE, weight_decay=0.0)
    right = 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _TOWER_RATE * (1 - step / steps)
        numbers = rng.integers(10, 100, (_DIGITS[1], len(problems.LETTERS)))
        shown = np.stack([problems.image(row, rng, "train") for row in numbers])
        wanted = torch.from_numpy(np.stack([numbers // 10, numbers % 10], -1)).flatten(1)
        wanted = wanted.to(weights.device)
        states = parts[0](torch.from_numpy(shown).to(weights.device)).last_hidden_state
        found = parts[1](states[:, 1:])
        loss = torch.nn.functional.mse_loss(found, digits[wanted]) / scale
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distances = torch.cdist(found.detach().float(), digits)
        right = float((distances.argmin(-1) == wanted).float().mean())
    return right


def _rates(model: PreTrainedModel, lesson: Lesson) -> list[dict[str, object]]:
    new = [
        parameter
        for name, parameter in model.named_parameters()
        if "vision_tower" in name or "projector" in name
    ]
    known = {id(parameter) for parameter in new}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups: list[dict[str, object]] = [{"params": rest, "lr": lesson.learning_rate}]
    if new:
        groups.append({"params": new, "lr": _TOWER_RATE})
    return [{**group, "peak": group["lr"]} for group in groups]


def _warm_up(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * min(1.0, share)


def _write(model: PreTrainedModel, words: PreTrainedTokenizerBase, place: Path) -> None:
    scratch = place.with_name(f".{place.name}-{os.getpid()}")
    model.to("cpu").save_pretrained(scratch)
    words.save_pretrained(scratch)
    shutil.rmtree(place, ignore_errors=True)
    scratch.rename(place)
