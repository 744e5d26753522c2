"""Fine-tune the demo's multimodal model in four ways and measure each on held-out images.

Owns the methods that are compared, their tuned settings, one run (`train_and_evaluate`) and the
evaluation. `world` owns the task; the package chooses seeds and prints. Invariant: for one seed,
every method starts from the same checkpoint, sees the same fine-tuning set in the same order, and
is measured on the same problems, so that differences are paired.

Fine-tuning uses the Hugging Face `Trainer`: 256 samples, 30 % of them plain reading and the others
folds of 2 to 4 cells, 200 steps of 16, AdamW, cosine, clip 1, with a frozen vision tower.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from transformers import (
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import drift_fast
from drift_fast.demo import world as w

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState

    from drift_fast import Delta

logger = logging.getLogger(__name__)

LENGTHS: Final = (2, 3, 4)

Prior = Literal["multimodal", "base"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune.

    `prior` names the model that the delta subtracts from the expert; None means no delta. `alpha`
    injects it at every step; `merge_*` add that multiple of it before the first step.
    """

    label: str
    lr: float | None
    prior: Prior | None = None
    alpha: float = 0.0
    merge_attention: float = 0.0
    merge_mlp: float = 0.0


# The best of eight trials for each method, which examples/miniature/README.md lists.
METHODS: Final[dict[str, Method]] = {
    "as_is": Method(label="multimodal model as is", lr=None),
    "sft": Method(label="SFT", lr=5e-5),
    "drift": Method(label="DRIFT, expert − multimodal", lr=1e-3, prior="multimodal", alpha=0.5),
    "drift_prior2": Method(label="DRIFT, expert − text base", lr=5e-4, prior="base", alpha=1.0),
    "merge_sft": Method(
        label="merge (expert − text base), then SFT",
        lr=3e-4,
        prior="base",
        merge_attention=1.0,
        merge_mlp=1.0,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How much is trained and measured. The defaults are the demo's; tests use less."""

    samples: int = 256
    reading_share: float = 0.3
    steps: int = 200
    batch: int = 16
    answers_per_length: int = 200
    readings_per_length: int = 100
    log_every: int = 10
    split: w.Split = "test"

    def __post_init__(self) -> None:
        if self.split == "train":
            raise ValueError("held-out problems cannot be drawn from the split 'train'")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one run; `curve` has step, loss, and progress along each delta."""

    method: str
    seed: int
    answers_right: float
    digits_read: float
    curve: list[dict[str, float]] = field(default_factory=list)


class Progress:
    """Progress of a model along a delta since construction: <W_t - W_0, D> / |D|^2.

    It is 0 at the start, and 1 when the model has moved by the whole delta. Keeps float32 copies of
    the delta, and references to the model's parameters.
    """

    def __init__(self, model: PreTrainedModel, delta: Delta) -> None:
        parameters = dict(model.named_parameters())
        self._pairs = [
            (parameters[name], delta[source].float())
            for name, source in drift_fast.match_parameters(model, delta).items()
        ]
        self._squared_norm = sum(float(d.double().square().sum()) for _, d in self._pairs)
        self._start = self._along()

    def __call__(self) -> float:
        """Return the progress of all parameters of the delta together."""
        return (self._along() - self._start) / self._squared_norm

    def _along(self) -> float:
        return sum(
            float(torch.dot(p.detach().flatten().double(), d.flatten().double()))
            for p, d in self._pairs
        )


class _Curve(TrainerCallback):
    """Combines the loss that the Trainer logs with the progress at the same step."""

    def __init__(self, progress: dict[str, Callable[[], float]]) -> None:
        self.rows: list[dict[str, float]] = []
        self._progress = progress

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        along = {f"progress_{prior}": read() for prior, read in self._progress.items()}
        self.rows.append({"step": state.global_step, "loss": float(logs["loss"]), **along})


def train_and_evaluate(
    method: str,
    seed: int,
    *,
    checkpoint: Path,
    deltas: dict[Prior, Delta],
    protocol: Protocol,
    settings: Method | None = None,
) -> Outcome:
    """Fine-tune `checkpoint` by one method on the fine-tuning set of `seed`, then measure it.

    `settings` replace those in `METHODS`, for tuning. Progress is measured along every delta,
    whether or not the method uses it.
    """
    settings = settings or METHODS[method]
    world = w.World()
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    curve: list[dict[str, float]] = []
    if settings.lr is not None:
        samples = fine_tuning_set(world, seed, protocol)
        curve = _fine_tune(model, samples, settings.lr, settings, deltas, protocol, seed)
    model.train(False)
    answers, digits = evaluate(model, world, seed, protocol)
    return Outcome(method=method, seed=seed, answers_right=answers, digits_read=digits, curve=curve)


def fine_tuning_set(world: w.World, seed: int, protocol: Protocol) -> list[w.Problem]:
    """Draw the samples of one seed over training images: plain reading, then folds."""
    generator = np.random.default_rng([world.seed, 20, seed])
    readings = round(protocol.samples * protocol.reading_share)

    def length() -> int:
        return int(generator.choice(LENGTHS))

    return [world.image_read(generator, length(), "train") for _ in range(readings)] + [
        world.image_fold(generator, length(), "train") for _ in range(protocol.samples - readings)
    ]


def evaluate(
    model: PreTrainedModel, world: w.World, seed: int, protocol: Protocol
) -> tuple[float, float]:
    """Return the share of answers right and of digits read right on held-out images."""
    generator = np.random.default_rng([world.seed, 30, seed])
    right = asked = read = shown = 0
    for length in LENGTHS:
        folds = [
            world.image_fold(generator, length, protocol.split)
            for _ in range(protocol.answers_per_length)
        ]
        right += sum(
            is_answer_right(problem, reply)
            for problem, reply in zip(folds, decode(model, folds), strict=True)
        )
        asked += len(folds)
        readings = [
            world.image_read(generator, length, protocol.split)
            for _ in range(protocol.readings_per_length)
        ]
        for problem, reply in zip(readings, decode(model, readings), strict=True):
            read += sum(a == b for a, b in zip(reply, problem.target[:-1], strict=False))
            shown += length
    return right / asked, read / shown


def is_answer_right(problem: w.Problem, reply: Sequence[int]) -> bool:
    """Whether the last token before <eos> is the answer; a reply without an end is wrong."""
    if w.EOS not in reply:
        return False
    said = reply[: reply.index(w.EOS)]
    return bool(said) and said[-1] == w.DIGIT + problem.answer


@torch.no_grad()
def decode(model: PreTrainedModel, problems: Sequence[w.Problem]) -> list[list[int]]:
    """Decode greedily, all problems at once, with a cache.

    The prompts must have the same length, so that nothing is padded. Produces as many tokens as the
    longest target has.
    """
    widths = {len(p.prompt) for p in problems}
    if len(widths) != 1:
        raise ValueError(f"prompts of one batch must have the same length, got {sorted(widths)}")
    batch = w.collate(problems)
    ids = torch.from_numpy(batch.input_ids[:, : widths.pop()]).to(model.device)
    images = {}
    if batch.pixel_values is not None:
        images["pixel_values"] = torch.from_numpy(batch.pixel_values).to(model.device)
    output = model(input_ids=ids, use_cache=True, **images)
    replies = [output.logits[:, -1:].argmax(-1)]
    for _ in range(max(len(p.target) for p in problems) - 1):
        output = model(
            input_ids=replies[-1], past_key_values=output.past_key_values, use_cache=True
        )
        replies.append(output.logits[:, -1:].argmax(-1))
    return torch.cat(replies, dim=1).tolist()


def _fine_tune(
    model: PreTrainedModel,
    samples: list[w.Problem],
    lr: float,
    method: Method,
    deltas: dict[Prior, Delta],
    protocol: Protocol,
    seed: int,
) -> list[dict[str, float]]:
    """Fine-tune in place and return the curve."""
    progress: dict[str, Callable[[], float]] = {
        prior: Progress(model, delta) for prior, delta in deltas.items()
    }
    if method.prior is not None and (method.merge_attention or method.merge_mlp):
        _merge(model, deltas[method.prior], method)
    model.model.vision_tower.requires_grad_(False)
    curve = _Curve(progress)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=protocol.steps,
                per_device_train_batch_size=protocol.batch,
                learning_rate=lr,
                lr_scheduler_type="cosine",
                warmup_steps=protocol.steps // 20,
                max_grad_norm=1.0,
                logging_steps=protocol.log_every,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            ),
            train_dataset=samples,
            data_collator=tensors,
            callbacks=[curve],
        )
        trainer.remove_callback(PrinterCallback)
        if method.prior is not None and method.alpha:
            injection = drift_fast.attach(trainer, deltas[method.prior], alpha=method.alpha)
            progress[method.prior] = lambda: injection.metrics()["progress"]
            with injection, warnings.catch_warnings():
                # The demo's own table says how far each method moves along Δ.
                warnings.filterwarnings("ignore", "progress along", drift_fast.DriftWarning)
                trainer.train()
        else:
            trainer.train()
    return curve.rows


def tensors(problems: Sequence[w.Problem]) -> dict[str, torch.Tensor]:
    """Collate problems into a model's keyword arguments, sharing memory with the batch."""
    batch = w.collate(problems)
    arguments = {
        "input_ids": torch.from_numpy(batch.input_ids),
        "labels": torch.from_numpy(batch.labels),
    }
    if batch.pixel_values is not None:
        arguments["pixel_values"] = torch.from_numpy(batch.pixel_values)
    return arguments


@torch.no_grad()
def _merge(model: PreTrainedModel, delta: Delta, method: Method) -> None:
    """Add multiples of the delta to the model's weights, one for attention and one for MLP."""
    parameters = dict(model.named_parameters())
    for name, source in drift_fast.match_parameters(model, delta).items():
        share = method.merge_attention if ".self_attn." in name else method.merge_mlp
        parameters[name].add_(delta[source].to(parameters[name].dtype), alpha=share)
