"""A tiny pair for the examples: a random Qwen2.5-VL, a text expert of its backbone, and their Δ.

Nothing is downloaded. Real runs replace `pair(…)` by a model of one's own and
`drift_fast.Delta.open("delta")`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import drift_fast

# Four special tokens, and one for each byte.
VOCABULARY = 4 + 256
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def text_model(*, seed: int = 0) -> torch.nn.Module:
    """Return a random Qwen2ForCausalLM in float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**TEXT))


def vision_language_model(*, seed: int = 0) -> torch.nn.Module:
    """Return a random Qwen2.5-VL in float32, its text backbone of the same size."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 32,
                "patch_size": 4,
                "spatial_merge_size": 1,
                "fullatt_block_indexes": [0],
                "window_size": 8,
            },
        )
    )


def pair(folder: str | Path, *, text_only: bool = False) -> tuple[torch.nn.Module, Path]:
    """Write both checkpoints and their Δ below a folder; return the model to train, and Δ's place.

    text_only: train a Qwen2 in the place of the Qwen2.5-VL, for tools that know only text.
    """
    folder = Path(folder)
    base = text_model()
    model: Any = text_model() if text_only else vision_language_model()
    backbone = model.model if text_only else model.model.language_model
    backbone.load_state_dict(base.model.state_dict())
    expert = text_model()
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.3 * parameter.std(correction=0) * torch.randn_like(parameter))
    expert.save_pretrained(folder / "reasoning")
    model.save_pretrained(folder / "multimodal")
    # Under a launcher each process has a folder of its own, so it writes alone.
    drift_fast.compute_delta(
        folder / "reasoning", folder / "multimodal", folder / "delta", dtype="float32", ranks=None
    )
    return model, folder / "delta"


def batches(steps: int, *, size: int = 4, length: int = 12) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of random token ids, as inputs and labels."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        tokens = torch.randint(4, VOCABULARY, (size, length), generator=generator)
        yield {"input_ids": tokens, "labels": tokens.clone()}


def samples(count: int, *, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Return single samples, for a Trainer's data set."""
    return [{k: v[0] for k, v in batch.items()} for batch in batches(count, size=1, length=length)]


def tokenizer() -> Any:
    """Return a tokenizer of single bytes, for tools that ask for one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<bos>", "<eos>", "<pad>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
