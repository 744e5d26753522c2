"""Tiny random stand-ins for everything that the recipe downloads, to try each of its steps on.

    python stand_in.py FOLDER

writes FOLDER/reasoning, FOLDER/text-base (Qwen2) and FOLDER/multimodal (Qwen2.5-VL, with a
tokenizer of single bytes, its processor and a chat template), and FOLDER/data with pictures and
train.json. They know nothing; what they show is that commands, configurations and launch files
work.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY = 256 + len(SPECIAL)
LAYERS = 2
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
PIXELS: dict[str, Any] = {
    "patch_size": 4,
    "merge_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 1024},
}
# What Qwen's own template writes for text and images.
TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string %}{{- message.content }}{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{- part.text }}{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


def tokenizer() -> Any:
    """Return a tokenizer of single bytes with Qwen's special tokens behind them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    # Processors of transformers 4 insist on the class; that of 5 makes a vocabulary of its own.
    old = transformers.__version__.startswith("4.")
    kind = transformers.Qwen2TokenizerFast if old else transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def processor() -> Any:
    """Return a Qwen2.5-VL processor for pictures of at most 1,024 pixels."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    return transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**PIXELS),
        tokenizer(),
        Qwen2VLVideoProcessor(**PIXELS),
        chat_template=TEMPLATE,
    )


def text_model(seed: int) -> Any:
    torch.manual_seed(seed)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))


def multimodal_model() -> Any:
    torch.manual_seed(1)
    identifiers = {name: 256 + at for at, name in enumerate(SPECIAL)}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 32,
                "patch_size": PIXELS["patch_size"],
                "spatial_merge_size": PIXELS["merge_size"],
                "fullatt_block_indexes": [0],
                "window_size": 16,
            },
            tie_word_embeddings=False,
            image_token_id=identifiers["<|image_pad|>"],
            video_token_id=identifiers["<|video_pad|>"],
            vision_start_token_id=identifiers["<|vision_start|>"],
            vision_end_token_id=identifiers["<|vision_end|>"],
        )
    )


@torch.no_grad()
def moved(model: Any, seed: int) -> Any:
    """Move every weight of a model by a fifth of its tensor's spread, at random."""
    # Biases start at zero and norms at one: they have no spread yet.
    torch.manual_seed(seed)
    for weight in model.parameters():
        spread = weight.std(correction=0).clamp_min(0.02)
        weight.add_(0.2 * spread * torch.randn_like(weight))
    return model


def write(folder: str | Path, *, samples: int = 8) -> Path:
    """Write models and data below a folder, and return it."""
    folder = Path(folder)
    base, multimodal = text_model(0), multimodal_model()
    multimodal.model.language_model.load_state_dict(base.model.state_dict())
    multimodal.lm_head.load_state_dict(base.lm_head.state_dict())
    moved(multimodal.model.language_model, 2)
    every = {"text-base": base, "reasoning": moved(text_model(0), 3), "multimodal": multimodal}
    for name, model in every.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    processor().save_pretrained(folder / "multimodal")
    (folder / "data" / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(samples):
        path = f"images/{index}.png"
        shade = 20 * index % 256
        Image.new("RGB", (24, 16 + 8 * (index % 2)), (shade, 99, 7)).save(folder / "data" / path)
        turns = [("user", f"<image>{index} + {index}?"), ("assistant", f"It is {2 * index}.")]
        messages = [{"role": role, "content": text} for role, text in turns]
        rows.append({"messages": messages, "images": [path]})
    (folder / "data" / "train.json").write_text(json.dumps(rows, indent=1))
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    write(sys.argv[1])
