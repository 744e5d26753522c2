"""The two models of the recipe for Qwen2.5-VL-7B, without weights, and sizes of a tiny one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "qwen2_5_vl_7b"
REASONING, MULTIMODAL = RECIPE / "configurations/reasoning", RECIPE / "configurations/multimodal"
# As the models' own cards state them.
REASONING_NUMEL, MULTIMODAL_NUMEL = 7_615_616_512, 8_292_166_656

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
