"""From problems to tensors, and from a model to the share of problems that it gets right.

Owns tokens, padding and the greedy answers. Knows neither training nor Δ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from problems import DIGIT, SIDE, Half, Problem, image, result_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor]

# A token of the vocabulary that no text here contains, in the place of one digit of an image.
IMAGE_TOKEN: Final = "<reponame>"
IMAGE_TOKENS: Final = (SIDE // DIGIT) ** 2
END: Final = "<|im_end|>"
_IGNORED: Final = -100
# Problems that are answered at a time, and tokens of the longest answer.
_AT_ONCE: Final = 512
_LONGEST: Final = 84


class Encoder:
    """Turns problems into batches for one tokenizer.

    Args:
        tokenizer: of the language model.
        seed: of the images; the same problems in the same order give the same batches.
        half: which of the handwritten digits are shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, half: Half) -> None:
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng([seed, half == "test"])
        self._half: Half = half
        self._image = [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * IMAGE_TOKENS
        self._end: int = tokenizer.convert_tokens_to_ids(END)

    def training(self, problems: Sequence[Problem]) -> Batch:
        """Return prompts with answers, padded on the right; the loss is that of the answers."""
        prompts = self._prompts(problems)
        answers = self._tokenizer([problem.answer for problem in problems])["input_ids"]
        rows = [(p, [*a, self._end]) for p, a in zip(prompts, answers, strict=True)]
        width = max(len(p) + len(a) for p, a in rows)
        gaps = [width - len(p) - len(a) for p, a in rows]
        both = zip(rows, gaps, strict=True)
        ids = [[*p, *a, *[self._end] * gap] for (p, a), gap in both]
        labels = [
            [*[_IGNORED] * len(p), *a, *[_IGNORED] * gap]
            for (p, a), gap in zip(rows, gaps, strict=True)
        ]
        mask = [[1] * (width - gap) + [0] * gap for gap in gaps]
        return self._tensors(problems, input_ids=ids, attention_mask=mask, labels=labels)

    def prompts(self, problems: Sequence[Problem]) -> Batch:
        """Return prompts alone, padded on the left."""
        rows = self._prompts(problems)
        width = max(map(len, rows))
        return self._tensors(
            problems,
            input_ids=[[self._end] * (width - len(row)) + row for row in rows],
            attention_mask=[[0] * (width - len(row)) + [1] * len(row) for row in rows],
        )

    def _prompts(self, problems: Sequence[Problem]) -> list[list[int]]:
        texts = self._tokenizer([problem.prompt for problem in problems])["input_ids"]
        shown = [self._image if problem.numbers else [] for problem in problems]
        return [[*picture, *text] for picture, text in zip(shown, texts, strict=True)]

    def _tensors(self, problems: Sequence[Problem], **rows: list[list[int]]) -> Batch:
        batch = {name: torch.tensor(values) for name, values in rows.items()}
        pixels = [
            image(problem.numbers, self._rng, self._half)
            for problem in problems
            if problem.numbers is not None
        ]
        if pixels:
            batch["pixel_values"] = torch.from_numpy(np.stack(pixels))
        return batch


def to(batch: Batch, device: torch.device | str) -> Batch:
    """Return a batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@torch.no_grad()
def right(
    model: PreTrainedModel,
    encoder: Encoder,
    problems: Sequence[Problem],
    *,
    longest: int = _LONGEST,
) -> float:
    """Return the share of problems whose greedy answer ends in the right number.

    A model of float32 weights on a GPU answers under bfloat16 autocast, as it was trained.
    """
    device = next(model.parameters()).device
    end: Any = encoder._end
    found = 0
    model.eval()
    # Prompts of about one length together.
    ordered = sorted(problems, key=lambda problem: len(problem.prompt))
    for start in range(0, len(ordered), _AT_ONCE):
        some = ordered[start : start + _AT_ONCE]
        batch = to(encoder.prompts(some), device)
        with autocast(device):
            ids = model.generate(
                **batch, max_new_tokens=longest, do_sample=False, eos_token_id=end, pad_token_id=end
            )
        answers = encoder._tokenizer.batch_decode(
            ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        found += sum(
            result_of(answer) == problem.result
            for answer, problem in zip(answers, some, strict=True)
        )
    return found / len(problems)


def autocast(device: torch.device) -> torch.autocast:
    """Return bfloat16 autocast on a GPU, and what changes nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
