"""Train the demo's three checkpoints from scratch: ``python train_checkpoints.py --out DIR``.

Owns the architectures and the curricula; the task is `world`'s. Not used by the demo itself, which
loads what this wrote. Invariant: the three share one text backbone, so every tensor of the text
models has a match of the same shape in the multimodal one.

* ``base``: a text model that knows half of every operation table as single facts, and copies.
* ``expert``: the base, trained on as text: all of every table, chains of 2 to 8 digits.
* ``multimodal``: the base behind a small vision tower, trained to read cells and to do single
  steps on them, still within the half it knew. It has never seen a chain.

About eight minutes on one core. Seeded and single-threaded, so a second run on the same machine
and library versions gives the same files.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from drift_fast.demo import world as w
from drift_fast.demo.experiment import tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LONGEST_FOLD: Final = 8
# One of this many problems of the base is a text to copy, the others are facts.
COPY_EVERY: Final = 4
# Small shards, so that the demo meets what real checkpoints have: an index and several files.
MAX_SHARD_SIZE: Final = "800KB"

Draw = Callable[[np.random.Generator, int], list[w.Problem]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and step size of one training: AdamW, linear warm-up, cosine to zero, clip 1.

    `batch` counts problems, `warmup` steps.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01


BASE_SCHEDULE: Final = Schedule(steps=700, batch=192, lr=2e-3)
EXPERT_SCHEDULE: Final = Schedule(steps=1500, batch=48, lr=1e-3)
# Few and small steps: the multimodal model stays near the base, as fine-tuned models do.
MULTIMODAL_SCHEDULE: Final = Schedule(steps=900, batch=64, lr=5e-4)


def text_config() -> Qwen2Config:
    """The backbone all three share: Qwen2, width 128, 4 layers, 0.8M parameters."""
    return Qwen2Config(
        vocab_size=w.VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        use_cache=True,
        bos_token_id=w.BOS,
        eos_token_id=w.EOS,
        pad_token_id=w.PAD,
    )


def multimodal_config() -> LlavaConfig:
    """LLaVA over the shared backbone: a two-layer CLIP tower that sees one digit per patch."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=48,
            num_channels=1,
            image_size=w.IMAGE_PIXELS,
            patch_size=w.DIGIT_PIXELS,
        ),
        text_config=text_config(),
        image_token_index=w.IMAGE,
        image_seq_length=w.CELLS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def base_problems(world: w.World) -> Draw:
    """Return what draws the base's problems: known facts, and copying of digits and expressions."""

    def draw(generator: np.random.Generator, count: int) -> list[w.Problem]:
        problems = [world.text_known_fact(generator) for _ in range(count)]
        for i in range(0, count, COPY_EVERY):
            length = int(generator.integers(2, 7))
            problems[i] = world.text_copy(generator, length, expression=bool(i % (2 * COPY_EVERY)))
        return [problems[i] for i in generator.permutation(count)]

    return draw


def expert_problems(world: w.World) -> Draw:
    """Return what draws the expert's: text chains of 2 to 8 digits over the whole tables."""

    def draw(generator: np.random.Generator, count: int) -> list[w.Problem]:
        # One length for a batch, so that there is almost no padding.
        length = int(generator.integers(2, LONGEST_FOLD + 1))
        copies = count // 16
        return [world.text_fold(generator, length) for _ in range(count - copies)] + [
            world.text_copy(generator, length) for _ in range(copies)
        ]

    return draw


def multimodal_problems(world: w.World) -> Draw:
    """Return what draws the multimodal model's: reading of cells, and single known steps."""

    def draw(generator: np.random.Generator, count: int) -> list[w.Problem]:
        reads = count // 2
        return [world.image_known_step(generator, "train") for _ in range(count - reads)] + [
            world.image_read(
                generator, int(generator.integers(2, 5)), "train", expression=bool(i % 2)
            )
            for i in range(reads)
        ]

    return draw


def new_text(seed: int) -> Qwen2ForCausalLM:
    """Return a text model with initial weights of `seed`; sets the seed of torch."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(text_config())


def with_tower(base: Qwen2ForCausalLM, seed: int) -> LlavaForConditionalGeneration:
    """Put a vision tower of `seed` before a copy of the base; sets the seed of torch."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(multimodal_config())
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    return model


def train_base(world: w.World, schedule: Schedule = BASE_SCHEDULE) -> Qwen2ForCausalLM:
    """Train the common text base."""
    model = new_text(world.seed)
    generator = np.random.default_rng([world.seed, 10])
    fit(model, base_problems(world), schedule, generator=generator, name="base")
    return model


def train_expert(
    world: w.World, base: Qwen2ForCausalLM, schedule: Schedule = EXPERT_SCHEDULE
) -> Qwen2ForCausalLM:
    """Train a copy of the base as the text expert."""
    model = Qwen2ForCausalLM(text_config())
    model.load_state_dict(base.state_dict())
    generator = np.random.default_rng([world.seed, 11])
    fit(model, expert_problems(world), schedule, generator=generator, name="expert")
    return model


def train_multimodal(
    world: w.World, base: Qwen2ForCausalLM, schedule: Schedule = MULTIMODAL_SCHEDULE
) -> LlavaForConditionalGeneration:
    """Put a vision tower before a copy of the base and train both to read and do single steps."""
    model = with_tower(base, world.seed + 1)
    generator = np.random.default_rng([world.seed, 12])
    fit(model, multimodal_problems(world), schedule, generator=generator, name="multimodal")
    return model


def fit(
    model: PreTrainedModel,
    draw: Draw,
    schedule: Schedule,
    *,
    generator: np.random.Generator,
    name: str,
) -> None:
    """Train in place on freshly drawn problems."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.98)
    )
    model.train()
    start = time.perf_counter()
    for step in range(schedule.steps):
        warm = min(1.0, (step + 1) / schedule.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        problems = draw(generator, schedule.batch)
        loss = take_step(model, optimizer, problems, schedule.lr * warm * cosine)
        if (step + 1) % 250 == 0:
            logger.info(
                "%s: step %d of %d, loss %.4f, %.0f s",
                name, step + 1, schedule.steps, loss.item(), time.perf_counter() - start,
            )  # fmt: skip
    model.train(False)


def take_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, problems: list[w.Problem], lr: float
) -> torch.Tensor:
    """Take one step on some problems, clipped at 1, and return the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    batch = {name: value.to(model.device) for name, value in tensors(problems).items()}
    loss = model(**batch).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    found: torch.Tensor = loss.detach()
    return found


def save(model: PreTrainedModel, out: Path) -> None:
    """Cast the model to bf16, and write shards with their index as a Hugging Face checkpoint."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(out, max_shard_size=MAX_SHARD_SIZE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and write `base`, `expert` and `multimodal` under --out."""
    parser = argparse.ArgumentParser(description="Train the demo's three checkpoints.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)

    world = w.World()
    save(train_base(world), options.out / "base")
    # Both others start from what was written, which is rounded to bf16.
    base = Qwen2ForCausalLM.from_pretrained(options.out / "base", dtype=torch.float32)
    save(train_expert(world, base), options.out / "expert")
    save(train_multimodal(world, base), options.out / "multimodal")


if __name__ == "__main__":
    main()
