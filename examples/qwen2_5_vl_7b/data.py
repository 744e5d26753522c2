"""Samples with images for a Qwen2.5-VL: rows of a JSON file, and the batch that is made of them.

Owns reading and collating. A row is what LLaMA-Factory calls ShareGPT with OpenAI's names:
{"messages": [{"role": "user", "content": "<image>What is x?"}, {"role": "assistant", …}],
"images": ["figures/1.png"]}. Invariant: the loss sees the tokens of assistant turns, with the mark
that ends each, and nothing else; a sample without one of them, one that is too long, or one whose
text holds the marks themselves is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

PLACEHOLDER = "<image>"
IGNORED = -100
# How Qwen's chat template opens and closes a turn; a newline follows the role.
STARTS, ASSISTANT, CLOSES = "<|im_start|>", "assistant", "<|im_end|>"
ROLES = ("system", "user", ASSISTANT)


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of a JSON or JSON lines file; images are opened when a row is asked for."""

    def __init__(self, path: str | Path, images: str | Path | None = None) -> None:
        self.path = Path(path)
        self.images = Path(images) if images else self.path.parent
        text = self.path.read_text(encoding="utf-8")
        lines = text.lstrip().startswith("{")
        # JSON strings may hold U+2028 and others that splitlines takes for ends of lines.
        self.rows = (
            [json.loads(line) for line in text.split("\n") if line.strip()]
            if lines
            else json.loads(text)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        paths = row.get("images") or []
        marks = sum(turn["content"].count(PLACEHOLDER) for turn in row["messages"])
        if marks != len(paths):
            raise ValueError(
                f"{self.path}, row {index}: {marks} × {PLACEHOLDER} and {len(paths)} images"
            )
        images = [Image.open(self.images / path).convert("RGB") for path in paths]
        return {"messages": [with_parts(turn) for turn in row["messages"]], "images": images}


def with_parts(turn: dict[str, str]) -> dict[str, Any]:
    """Return a turn with its text and its places for images apart, as processors take them."""
    parts: list[dict[str, str]] = []
    for at, text in enumerate(turn["content"].split(PLACEHOLDER)):
        if at:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return {"role": turn["role"], "content": parts}


class Collator:
    """Make a batch of samples: the processor's tensors, and labels.

    Args:
        processor: a Qwen2.5-VL's.
        max_length: tokens of a sample; a longer one is refused, since cutting it would cut images
            or answers.
    """

    def __init__(self, processor: Any, *, max_length: int | None = None) -> None:
        self.processor = processor
        self.max_length = max_length
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "right"
        self._opens = tokenizer.encode(STARTS + ASSISTANT, add_special_tokens=False)
        (self._closes,) = tokenizer.encode(CLOSES, add_special_tokens=False)
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = sorted({*special, *tokenizer.all_special_tokens, STARTS, CLOSES})

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for sample in samples:
            self._check(sample["messages"])
        texts = [
            self.processor.apply_chat_template(sample["messages"], tokenize=False)
            for sample in samples
        ]
        images = [image for sample in samples for image in sample["images"]]
        batch = dict(
            self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        )
        longest = int(batch["attention_mask"].sum(1).max())
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"a sample has {longest} tokens, more than max_length={self.max_length}; raise it, "
                "lower max_pixels, or leave the sample out"
            )
        turns = [
            sum(turn["role"] == ASSISTANT for turn in sample["messages"]) for sample in samples
        ]
        rows = zip(batch["input_ids"], turns, strict=True)
        batch["labels"] = torch.stack([self.labels(row, expected) for row, expected in rows])
        return batch

    def _check(self, messages: Sequence[dict[str, Any]]) -> None:
        """Refuse text that the template's own marks could not be told from."""
        for turn in messages:
            if turn["role"] not in ROLES:
                raise ValueError(f"a turn's role must be one of {ROLES}, got {turn['role']!r}")
            for text in (part["text"] for part in turn["content"] if part["type"] == "text"):
                found = [mark for mark in self._special if mark in text]
                if found:
                    raise ValueError(
                        f"a turn of {turn['role']!r} holds {', '.join(found)}, which the tokenizer "
                        "would take for the end or start of a turn, or an image; write it "
                        f"otherwise or leave the sample out: {text[:80]!r}…"
                    )

    def labels(self, tokens: torch.Tensor, turns: int) -> torch.Tensor:
        """Return a row of token ids with all but the assistant's turns replaced by −100.

        The token that holds the newline behind the role is not labeled. Where an answer starts
        with a newline, Qwen's tokenizer makes one token of both.

        turns: how many the sample has.
        """
        ids = tokens.tolist()
        labels = torch.full_like(tokens, IGNORED)
        at, found, width = 0, 0, len(self._opens)
        while at + width < len(ids):
            if ids[at : at + width] != self._opens:
                at += 1
                continue
            start = at + width + 1
            if self._closes not in ids[start:]:
                break
            end = ids.index(self._closes, start) + 1
            labels[start:end] = tokens[start:end]
            at, found = end, found + 1
        if not turns or found != turns:
            raise ValueError(
                f"no turn of an assistant in a sample: it has {turns}, and {found} stand between "
                f"{STARTS + ASSISTANT!r} and {CLOSES!r} in its text; the loss needs at least one, "
                "and all of them"
            )
        return labels


class Opening:
    """Open rows by their number, then make a batch of them."""

    def __init__(self, samples: Samples, collate: Collator) -> None:
        self._samples = samples
        self._collate = collate

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        return self._collate([self._samples[row["row"]] for row in rows])
