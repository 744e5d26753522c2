"""Samples of a file as batches for a model of transformers, one sample each.

A file is JSON or JSON lines. A row is {"text": …}, of which every token counts, or
{"messages": […], "images": […]} as LLaMA-Factory has it, of which the tokens of assistant turns
count: roles and contents, `<image>` in a content standing for the next of the images, whose paths
are relative to the file. Contents in parts, as processors take them, stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from drift_fast.errors import DriftError
from drift_fast.paths import local_path

_PLACEHOLDER = "<image>"
_IGNORED = -100
_FORM = (
    'expected {"text": …} or {"messages": [{"role": …, "content": …}, …]}, with "images": '
    f"[path, …] for every {_PLACEHOLDER} in a content"
)


class Samples:
    """The rows of a file; each becomes a batch when it is asked for, with `processor` set by then.

    Raises:
        FileNotFoundError: no such file.
        DriftError: a file or a row that is not of the form, a row of fewer than two tokens, or one
            whose answers cannot be told from the rest.
    """

    def __init__(self, path: Path, processor: Any = None) -> None:
        self._path = path
        self.processor = processor
        self._rows = _read(path)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self._rows):
            where = f"{self._path}, sample {number}"
            if not isinstance(row, Mapping) or not ("text" in row or "messages" in row):
                raise DriftError(f"{where}: {_FORM}, found {str(row)[:100]}")
            yield self._text(row["text"], where) if "text" in row else self._answers(row, where)

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _text(self, text: str, where: str) -> dict[str, Any]:
        batch = dict(self._tokenizer(text, return_tensors="pt"))
        self._refuse_short(batch, where)
        return batch | {"labels": batch["input_ids"].clone()}

    def _refuse_short(self, batch: Mapping[str, Any], where: str) -> None:
        """Refuse a row without a token to predict.

        Raises:
            DriftError: it has fewer than two tokens; whether the model has a tokenizer is told.
        """
        count = batch["input_ids"].shape[1]
        if count > 1:
            return
        tokenizer, known = self._tokenizer, self._tokenizer.get_vocab()
        source = tokenizer.name_or_path
        # Without files transformers makes a tokenizer of special tokens alone.
        why = (
            f"its tokenizer knows {len(known):,} tokens: write a longer text, or leave the row out"
            if known.keys() - tokenizer.get_added_vocab().keys()
            else "it has no tokenizer files: copy tokenizer.json and tokenizer_config.json there "
            "from the model that it comes from"
        )
        raise DriftError(
            f"{where}: {source} makes {count or 'no'} token{'' if count == 1 else 's'} of it, and "
            f"the loss needs two or more; {why}"
        )

    def _answers(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return a conversation whose labels are the tokens of the assistant's turns."""
        messages = self._messages(row, where)
        batch = self._template(messages)
        self._refuse_short(batch, where)
        tokens = batch["input_ids"]
        labels = torch.full_like(tokens, _IGNORED)
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            ends = []
            for turns, asking in ((messages[:at], True), (messages[: at + 1], False)):
                part = self._template(turns, add_generation_prompt=asking)["input_ids"]
                ends.append(part.shape[1])
                if not torch.equal(part, tokens[:, : part.shape[1]]):
                    raise DriftError(
                        f"{where}: the chat template writes the first {len(turns)} turns otherwise "
                        "when more follow, so the answers cannot be told from the rest; call "
                        "drift_fast.protect with batches of your own"
                    )
            labels[:, slice(*ends)] = tokens[:, slice(*ends)]
        if bool((labels == _IGNORED).all()):
            raise DriftError(f"{where}: no turn of the role assistant, so there is no loss")
        return batch | {"labels": labels}

    def _template(self, messages: Sequence[Any], **options: Any) -> dict[str, Any]:
        return dict(
            self.processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", **options
            )
        )

    def _messages(self, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        """Return the turns of a row with its images in their places."""
        try:
            turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
        except (TypeError, KeyError) as error:
            raise DriftError(f"{where}: {_FORM}") from error
        images = [self._path.parent / path for path in row.get("images") or ()]
        marks = sum(text.count(_PLACEHOLDER) for _, text in turns if isinstance(text, str))
        if marks != len(images):
            raise DriftError(f"{where}: {marks} × {_PLACEHOLDER} and {len(images)} images")
        missing = [image for image in images if not image.is_file()]
        if missing:
            raise DriftError(f"{where}: {missing[0]} is not there")
        left = iter(images)
        return [{"role": role, "content": _content(text, left)} for role, text in turns]


def _content(content: Any, images: Iterator[Path]) -> Any:
    """Return a content in parts where it has images; text alone is what every template takes."""
    if not isinstance(content, str) or _PLACEHOLDER not in content:
        return content
    parts: list[dict[str, str]] = []
    for at, text in enumerate(content.split(_PLACEHOLDER)):
        if at:
            parts.append({"type": "image", "path": str(next(images))})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _read(path: Path) -> list[Any]:
    """Return the rows of a JSON or JSON lines file.

    Raises:
        FileNotFoundError, DriftError: as `Samples`.
    """
    text = path.read_text(encoding="utf-8")
    # JSON strings may hold U+2028 and others that splitlines takes for ends of lines.
    lines = text.split("\n") if text.lstrip().startswith("{") else [text]
    try:
        found = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise DriftError(f"{path}: neither JSON nor JSON lines: {error}") from error
    rows = found[0] if len(found) == 1 and isinstance(found[0], list) else found
    if not rows:
        raise DriftError(f"{path}: no samples; {_FORM}")
    return list(rows)


def load(source: str, device: str | None) -> tuple[Any, Any]:
    """Return a model of transformers in its own dtype, and its processor or tokenizer.

    source: a directory or a Hub id; weights in safetensors alone, and no code, is loaded of it.
    device: where it computes; None is a GPU if there is one.

    Raises:
        ImportError: transformers is not installed.
        OSError, DriftError: no such model.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "protect loads a model with transformers: pip install 'drift-fast[trainer]'"
        ) from error
    place = str(local_path(source)) if local_path(source).exists() else source
    config = transformers.AutoConfig.from_pretrained(place)
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    kind = getattr(transformers, named, None)
    if kind is None:
        raise DriftError(
            f"{source}: config.json names {named or 'no architecture'}, which is not a class of "
            "transformers; call drift_fast.protect with the model from Python"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kind.from_pretrained(place, dtype="auto", use_safetensors=True).to(device)
    processors: Any = transformers.AutoProcessor
    return model, processors.from_pretrained(place)
