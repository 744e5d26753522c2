"""Counts against transformers' own classes, and rates against their results files."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from drift_fast.planner import rates
from drift_fast.planner.counts import VISION, read_model
from support.planner_models import (
    MULTIMODAL,
    MULTIMODAL_NUMEL,
    REASONING,
    REASONING_NUMEL,
    ROOT,
    TEXT,
)

VISION_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}


def configurations() -> dict[str, tuple[str, Any]]:
    import transformers as t

    qwen_vision = {"depth": 2, "num_heads": 4, "patch_size": 4, "window_size": 8}
    return {
        "Llama": ("LlamaForCausalLM", t.LlamaConfig(**TEXT)),
        "Qwen2, tied": ("Qwen2ForCausalLM", t.Qwen2Config(**TEXT, tie_word_embeddings=True)),
        "Qwen3-MoE": (
            "Qwen3MoeForCausalLM",
            t.Qwen3MoeConfig(
                **TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
            ),
        ),
        "LLaVA": (
            "LlavaForConditionalGeneration",
            t.LlavaConfig(
                text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**VISION_SIZES)
            ),
        ),
        "Qwen2-VL": (
            "Qwen2VLForConditionalGeneration",
            t.Qwen2VLConfig(
                text_config={**TEXT, **MROPE},
                vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
            ),
        ),
        "Qwen2.5-VL": (
            "Qwen2_5_VLForConditionalGeneration",
            t.Qwen2_5_VLConfig(
                text_config={**TEXT, **MROPE},
                vision_config={
                    **qwen_vision,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "out_hidden_size": 32,
                },
            ),
        ),
    }


NAMES = ("Llama", "Qwen2, tied", "Qwen3-MoE", "LLaVA", "Qwen2-VL", "Qwen2.5-VL")


@pytest.mark.parametrize("name", NAMES)
def test_headers_and_a_lone_configuration_count_what_the_class_has(
    tmp_path: Path, name: str
) -> None:
    transformers = pytest.importorskip("transformers")
    architecture, configuration = configurations()[name]
    model = getattr(transformers, architecture)(configuration)
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "alone").mkdir()
    text = (tmp_path / "whole" / "config.json").read_text()
    (tmp_path / "alone" / "config.json").write_text(text)
    expected = sum(parameter.numel() for parameter in model.parameters())
    whole, alone = read_model(tmp_path / "whole"), read_model(tmp_path / "alone" / "config.json")
    assert (whole.origin, alone.origin) == ("headers", "configuration")
    assert whole.numel() == alone.numel() == expected
    assert whole.by_kind() == alone.by_kind()
    assert whole.layer_numel() == alone.layer_numel() > 0
    assert whole.active_numel() == alone.active_numel()
    assert (whole.by_kind()[VISION] > 0) == ("V" in name)
    assert whole.by_kind()["attn"] > 0
    assert whole.by_kind()["mlp"] > 0


def test_the_7b_pair_has_the_sizes_that_its_cards_state() -> None:
    pytest.importorskip("transformers")
    assert read_model(REASONING).numel() == REASONING_NUMEL
    multimodal = read_model(MULTIMODAL)
    assert multimodal.numel() == MULTIMODAL_NUMEL
    kinds = multimodal.by_kind()
    assert kinds["attn"] + kinds["mlp"] == rates.BOTH.numel
    assert kinds["attn"] == rates.ATTENTION.numel


def test_a_token_goes_through_chosen_experts_only_and_looks_its_embedding_up(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    _, configuration = configurations()["Qwen3-MoE"]
    configuration.architectures = ["Qwen3MoeForCausalLM"]
    configuration.save_pretrained(tmp_path)
    model = read_model(tmp_path)
    expert = 3 * 32 * 16
    assert model.active_numel() == model.numel() - 96 * 32 - 3 * 2 * expert
    # Factors of the two experts of four that a token does not use, in each of three layers.
    whole, used = model.factors_numel(8), model.factors_numel(8, active=True)
    factors = [s for n, s in model.shapes.items() if ".experts." in n and len(s) > 1]
    of_experts = sum(8 * math.prod(s[:-2]) * (s[-2] + s[-1]) for s in factors)
    assert whole - used == of_experts / 2


@pytest.mark.parametrize("rate", rates.EVERY, ids=lambda rate: rate.row)
def test_every_rate_stands_in_the_results_file_that_it_names(rate: rates.Measured) -> None:
    text = (ROOT / rate.file).read_text(encoding="utf-8")
    section = text.split(f"## {rate.section}\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    (row,) = [row for row in rows if row[0] == rate.row]
    if isinstance(rate, rates.Streaming):
        column = next(row for row in rows if "GB/s" in row).index("GB/s")
        found: tuple[float, ...] = (float(row[column]),)
    else:
        found = tuple(float(re.split(r"[ (]", cell)[0]) for cell in row[1:3])
    assert found == rate.cells


def test_the_results_file_names_the_size_that_injections_are_scaled_from() -> None:
    text = (ROOT / rates.BOTH.file).read_text(encoding="utf-8")
    assert f"{2 * rates.BOTH.numel / 1e9:.2f} GB of Δ in bfloat16" in text
    assert "2048\ntokens" in text
    assert 0.3 < rates.utilization()[0] < 0.6
