"""Which files of the multimodal model go along with a merge, and which are left behind.

Owns a list of names that hold settings, text or a tokenizer. A file that can run code (`.py`, a
pickle) or that holds weights is never taken; links are followed, as the Hub's cache consists of
them, but only to regular files.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drift_fast.errors import CheckpointError, DriftWarning

if TYPE_CHECKING:
    from drift_fast.pairing import Opened

# As transformers, sentencepiece, tiktoken and mistral-common name them; a remote model is asked for
# each of them.
NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "processor_config.json",
    "audio_tokenizer_config.json",
    "configuration.json",
)
_INDEX = "model.safetensors.index.json"
_LICENCE = re.compile(r"(licen[cs]e|notice)([._-][\w.-]*)?", re.IGNORECASE)
# Far above what a tokenizer of a quarter of a million tokens takes.
_LIMIT_NBYTES = 500_000_000


@dataclass(frozen=True)
class Carried:
    """Files that go along, with their sizes, and the names of those that are left behind."""

    files: dict[str, tuple[Path, int]]
    left_behind: list[str]

    @property
    def code(self) -> list[str]:
        """The files left behind that a model with remote code may need."""
        return [name for name in self.left_behind if name.endswith(".py")]

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            CheckpointError: its size is no longer what it was.
        """
        path, nbytes = self.files[name]
        data = path.read_bytes()
        if len(data) != nbytes:
            raise CheckpointError(
                f"{path}: has {len(data)} bytes and had {nbytes} when the merge began; run again "
                "once nothing writes to it"
            )
        return data


def carried_over(multimodal: Opened) -> Carried:
    """Return what goes along from beside a multimodal model's weights.

    Raises:
        FileNotFoundError: no config.json, without which the result loads nowhere.
        CheckpointError: a file that is far too large, or a server that fails.
    """
    directory, remote = multimodal.directory, multimodal.source.remote
    if remote is not None:
        for name in NAMES:
            remote.optional_file(name)
    weights = {Path(shard).name for *_, shard in multimodal.checkpoint.tensors()} | {_INDEX}
    files: dict[str, tuple[Path, int]] = {}
    left_behind = []
    for path in sorted(directory.iterdir()):
        name = path.name
        if name in weights or name.startswith("."):
            continue
        if (name in NAMES or _LICENCE.fullmatch(name)) and path.is_file():
            nbytes = path.stat().st_size
            if nbytes > _LIMIT_NBYTES:
                raise CheckpointError(
                    f"{path}: has {nbytes:,} bytes, more than any such file needs "
                    f"({_LIMIT_NBYTES:,}); move it away"
                )
            files[name] = (path, nbytes)
        elif not name.endswith(".ranges.json"):
            left_behind.append(f"{name}/" if path.is_dir() else name)
    if "config.json" not in files:
        raise FileNotFoundError(
            f"{directory}: there is no config.json beside the multimodal weights, so the merged "
            "model could not be loaded; give the directory that save_pretrained wrote"
        )
    return Carried(files, left_behind)


def warn_of_code(carried: Carried) -> None:
    """Warn where the multimodal model comes with code, which does not go along."""
    if carried.code:
        warnings.warn(
            f"the multimodal model comes with code ({', '.join(carried.code)}), which is never "
            "copied: a model that needs it loads only once you have put it beside the merged one",
            DriftWarning,
            stacklevel=3,
        )
