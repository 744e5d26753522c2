"""Text and multimodal checkpoints are paired tensor by tensor, or the pair is refused.

Real transformers classes save the checkpoints. Every multimodal tensor is planted as the text
tensor plus a constant of its own, so a delta that is not that one constant shows a wrong pair.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from drift_fast import AlignmentError, CoverageError, Delta, compute_delta, inspect
from support.synthetic import (
    Errors,
    Stored,
    everything_under,
    language_model,
    moved,
    opaque,
    projector,
    refused,
    stored,
    vision_tower,
    write_checkpoint,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LAYERS = 3
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# The tower has the language model's width, depth and projection names: the worst neighbor.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def llava(text: Any) -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=8),
        text_config=text,
        image_token_index=63,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            "depth": LAYERS,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 14,
        },
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=59,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def idefics3() -> Any:
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=VISION,
        image_token_id=63,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def smolvlm() -> Any:
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=VISION,
        image_token_id=63,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 4, "tie_word_embeddings": True},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=63,
        boi_token_index=61,
        eoi_token_index=62,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))


def gemma3_text() -> Any:
    config = transformers.Gemma3TextConfig(**{**TEXT, "head_dim": 4, "tie_word_embeddings": True})
    return transformers.Gemma3ForCausalLM(config)


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "qwen2.5-vl+qwen2": (qwen2, qwen2_5_vl),
    "llava+llama": (llama, lambda: llava(transformers.LlamaConfig(**TEXT))),
    "llava+qwen2": (qwen2, lambda: llava(transformers.Qwen2Config(**TEXT))),
    "idefics3+llama": (llama, idefics3),
    "smolvlm+llama": (llama, smolvlm),
    "gemma3+gemma3-text": (gemma3_text, gemma3),
}


@dataclass(frozen=True)
class Planted:
    """A saved pair, and by in-memory name the constant by which each tensor was moved."""

    reasoning: Path
    multimodal: Path
    constants: dict[str, float]
    text_names: set[str]

    def expected(self, pattern: str) -> dict[str, float]:
        return {name: value for name, value in self.constants.items() if re.search(pattern, name)}


@pytest.fixture(
    scope="module",
    params=[(f, s) for f in FAMILIES for s in ("5GB", "4KB")],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def planted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Planted]:
    family, shard_size = request.param
    return plant(family, tmp_path_factory.mktemp("planted"), shard_size)


def plant(family: str, directory: Path, shard_size: str = "5GB") -> Planted:
    make_text, make_multimodal = FAMILIES[family]
    torch.manual_seed(0)
    text, multimodal = make_text(), make_multimodal()
    backbone = getattr(multimodal.model, "language_model", None)
    if backbone is None:
        backbone = multimodal.model.text_model
    constants: dict[str, float] = {}
    with torch.no_grad():
        pairs = [
            (f"model.{name}", p, backbone.get_parameter(name))
            for name, p in text.model.named_parameters()
        ]
        if not text.config.tie_word_embeddings:
            pairs.append(("lm_head.weight", text.lm_head.weight, multimodal.lm_head.weight))
        for number, (name, source, target) in enumerate(pairs, 1):
            # Multiples of 2**-8 below four: every sum and difference is exact in float32.
            source.copy_(torch.randint(-256, 256, source.shape) / 256)
            constants[name] = number / 256
            target.copy_(source + constants[name])
    text.save_pretrained(directory / "text", max_shard_size=shard_size)
    multimodal.save_pretrained(directory / "multimodal", max_shard_size=shard_size)
    sharded = (directory / "multimodal" / "model.safetensors.index.json").exists()
    assert sharded == (shard_size != "5GB")
    return Planted(directory / "text", directory / "multimodal", constants, set(constants))


def names_on_disk(directory: Path) -> set[str]:
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            names |= set(shard.keys())
    return names


def assert_pairs(planted: Planted, delta: Any, expected: dict[str, float]) -> None:
    """Check that each expected text tensor was paired, once, with its own counterpart."""
    text_of = {multimodal: text for text, multimodal in delta.coverage.matched}
    found = {}
    for name, tensor in delta.items():
        values = tensor.unique().tolist()
        assert len(values) == 1, (
            f"{name} was paired with {text_of.get(name)}, which is not its counterpart"
        )
        found[text_of[name]] = -values[0]
    assert found == expected


def test_each_backbone_tensor_is_paired_with_its_counterpart(
    planted: Planted, tmp_path: Path
) -> None:
    out = tmp_path / "delta"
    delta = compute_delta(planted.reasoning, planted.multimodal, out, dtype="float32")
    expected = planted.expected(r"self_attn\.[qkvo]_proj\.|mlp\.(gate|up|down)_proj\.")
    assert len(expected) >= 7 * LAYERS
    assert_pairs(planted, delta, expected)
    assert set(delta) <= names_on_disk(planted.multimodal), (
        "names are not those on the multimodal disk"
    )
    assert_pairs(planted, Delta.open(out), expected)


@pytest.mark.parametrize(
    ("modules", "pattern"),
    [
        ("attn", r"self_attn\.[qkvo]_proj\."),
        ("mlp", r"mlp\.(gate|up|down)_proj\."),
        ("norm", r"norm\.weight$"),
        ("embed", r"embed_tokens"),
        ("all", r""),
    ],
)
def test_a_preset_selects_its_modules_in_each_family(
    planted: Planted, modules: str, pattern: str
) -> None:
    delta = compute_delta(
        planted.reasoning, planted.multimodal, modules=modules, rows="index", dtype="float32"
    )
    assert_pairs(planted, delta, planted.expected(pattern))


def test_the_coverage_accounts_for_every_tensor_of_both_sides(planted: Planted) -> None:
    coverage = inspect(planted.reasoning, planted.multimodal, modules="all", rows="index").coverage
    text, multimodal = names_on_disk(planted.reasoning), names_on_disk(planted.multimodal)
    assert {a for a, _ in coverage.matched} | {
        name for name, _ in coverage.unmatched_reasoning
    } == text
    assert {b for _, b in coverage.matched} | {
        name for name, _ in coverage.unmatched_multimodal
    } == multimodal
    assert len(coverage.matched) == len({b for _, b in coverage.matched}) == len(planted.constants)
    assert coverage.fraction == 1.0
    vision = [(name, reason) for name, reason in coverage.unmatched_multimodal if "vis" in name]
    assert vision
    for name, reason in [*vision, *coverage.unmatched_reasoning]:
        assert reason, f"no reason why {name} is unmatched"


# ------------------------------------------------------------------ mismatches

# Single tensors without a match are a matter of coverage, the whole pair one of alignment.
UNFIT = (AlignmentError, CoverageError)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def assert_alignment_refused(
    tmp_path: Path,
    text: dict[str, Stored],
    vlm: dict[str, Stored],
    *words: object,
    error: Errors = AlignmentError,
    **options: Any,
) -> None:
    a, b = write_checkpoint(tmp_path / "text", text), write_checkpoint(tmp_path / "vlm", vlm)
    out = tmp_path / "result" / "delta"
    out.parent.mkdir()
    with refused(error, *words):
        compute_delta(a, b, out, **options)
    with refused(error, *words):
        inspect(a, b, **options)
    assert everything_under(out.parent) == set()


def test_checkpoints_that_share_no_tensor_are_refused_with_names_of_both(
    tmp_path: Path, rng: Any
) -> None:
    gpt2 = {f"transformer.h.{n}.attn.c_attn.weight": stored(np.ones((4, 4))) for n in range(2)}
    assert_alignment_refused(
        tmp_path, gpt2, language_model(rng), "transformer.h.0.attn.c_attn.weight", "text", "vlm"
    )


def test_a_multimodal_checkpoint_of_another_width_is_refused_with_both_shapes(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng, hidden=8)
    vlm = {**vision_tower(rng), **moved(rng, language_model(rng, hidden=16, inner=24))}
    name = "layers.0.self_attn.q_proj.weight"
    words = (f"model.{name}", f"model.language_model.{name}", "[8, 8]", "[16, 16]")
    assert_alignment_refused(tmp_path, text, vlm, *words, error=UNFIT)


def test_one_tensor_of_another_shape_is_refused_with_both_names_and_shapes(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng)
    name = "model.layers.1.mlp.up_proj.weight"
    other = "model.language_model.layers.1.mlp.up_proj.weight"
    vlm = {**vision_tower(rng), **moved(rng, text), other: stored(np.ones((14, 8)))}
    assert_alignment_refused(tmp_path, text, vlm, name, other, "[12, 8]", "[14, 8]", error=UNFIT)


def test_the_same_values_in_a_transposed_shape_are_not_the_same_shape(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng)
    other = "model.language_model.layers.0.mlp.down_proj.weight"
    vlm = {**moved(rng, text), other: stored(np.ones((12, 8)))}
    assert_alignment_refused(tmp_path, text, vlm, "[8, 12]", "[12, 8]", error=UNFIT)


@pytest.mark.parametrize(("here", "there"), [(4, 2), (2, 4)])
def test_another_number_of_layers_is_refused_with_both_numbers(
    tmp_path: Path, rng: Any, here: int, there: int
) -> None:
    text = language_model(rng, layers=here, hidden=4, inner=4)
    vlm = {**vision_tower(rng), **moved(rng, language_model(rng, layers=there, hidden=4, inner=4))}
    assert_alignment_refused(tmp_path, text, vlm, "layers", here, there)


def test_a_missing_layer_parameter_of_the_source_is_refused(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng)
    vlm = moved(rng, text)
    del vlm["model.language_model.layers.1.self_attn.o_proj.weight"]
    assert_alignment_refused(tmp_path, text, vlm, "layers.1.self_attn.o_proj.weight", error=UNFIT)


def test_biases_that_only_the_text_model_has_are_refused(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, bias=True)
    vlm = moved(rng, {name: tensor for name, tensor in text.items() if not name.endswith("bias")})
    assert_alignment_refused(tmp_path, text, vlm, "q_proj.bias", error=UNFIT)


def test_an_extended_vocabulary_matters_only_when_the_embedding_is_selected(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng, vocab=16)
    grown = {
        name: stored(np.ones((20, 8))) if tensor.shape == (16, 8) else tensor
        for name, tensor in moved(rng, text).items()
    }
    a, b = write_checkpoint(tmp_path / "text", text), write_checkpoint(tmp_path / "vlm", grown)
    delta = compute_delta(a, b)
    assert len(delta) == 14
    reasons = dict(delta.coverage.unmatched_multimodal)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert reasons[name] == "not selected"
    for modules in ("embed", "head"):
        with refused(UNFIT, "[16, 8]", "[20, 8]"):
            compute_delta(a, b, modules=modules)
    lenient = compute_delta(a, b, modules="all", strict=False)
    assert "lm_head.weight" not in lenient
    assert len(lenient) == 14 + 5


def test_what_is_unmatched_lowers_the_fraction_when_not_strict(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng)
    vlm = moved(rng, text)
    del vlm["model.language_model.layers.1.self_attn.o_proj.weight"]
    a, b = write_checkpoint(tmp_path / "text", text), write_checkpoint(tmp_path / "vlm", vlm)
    delta = compute_delta(a, b, strict=False)
    assert len(delta) == 13
    assert delta.coverage.fraction == pytest.approx(16 / 17)  # 64 of 1088 elements are missing
    assert "model.layers.1.self_attn.o_proj.weight" in dict(delta.coverage.unmatched_reasoning)


def test_not_strict_still_refuses_a_pair_that_shares_nothing(tmp_path: Path, rng: Any) -> None:
    gpt2 = {"transformer.h.0.attn.c_attn.weight": stored(np.ones((4, 4)))}
    assert_alignment_refused(tmp_path, gpt2, language_model(rng), strict=False)


# ------------------------------------------------------------------ adversaries


def assert_paired_with(
    tmp_path: Path,
    text: dict[str, Stored],
    vlm: dict[str, Stored],
    prefix: str,
    text_prefix: str = "model.",
) -> None:
    """Check that every pair lies under `prefix`, for the whole and for attention alone."""
    a, b = write_checkpoint(tmp_path / "text", text), write_checkpoint(tmp_path / "vlm", vlm)
    for modules in (("attn", "mlp"), ("attn",), ("mlp",)):
        delta = compute_delta(a, b, modules=modules)
        layers = {name for name in text if re.search(r"layers\.\d+\.(self_attn|mlp)", name)}
        wanted = {
            name
            for name in layers
            if ("self_attn" in name and "attn" in modules) or ("mlp" in name and "mlp" in modules)
        }
        assert set(delta) == {prefix + name.removeprefix(text_prefix) for name in wanted}


@pytest.mark.parametrize("tower_layers", [1, 2, 12])
@pytest.mark.parametrize(
    "tower_prefix", ["vision_tower.vision_model.", "model.vision_model.", "a.", "model.visual."]
)
def test_a_vision_tower_with_the_language_models_names_and_dimensions_does_not_capture_the_match(
    tmp_path: Path, rng: Any, tower_layers: int, tower_prefix: str
) -> None:
    text = language_model(rng)
    tower = vision_tower(rng, layers=tower_layers, prefix=tower_prefix)
    vlm = {**tower, **projector(rng), **moved(rng, text)}
    assert_paired_with(tmp_path, text, vlm, "model.language_model.")


def test_a_tower_that_matches_biases_too_does_not_capture_the_match(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng, bias=True, layers=3)
    vlm = {**vision_tower(rng, layers=3, prefix="vision_model."), **moved(rng, text)}
    assert_paired_with(tmp_path, text, vlm, "model.language_model.")


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "language_model.model.",
        "model.text_model.",
        "model.language_model.",
        "llm.a.b.c.",
    ],
)
@pytest.mark.parametrize("text_prefix", ["", "model."])
def test_any_prefix_on_either_side_is_found(
    tmp_path: Path, rng: Any, prefix: str, text_prefix: str
) -> None:
    text = language_model(rng, prefix=text_prefix)
    plain = {
        name.removeprefix(text_prefix): tensor
        for name, tensor in text.items()
        if name != "lm_head.weight"
    }
    vlm = {
        **vision_tower(rng),
        **{
            prefix + name: stored(tensor.values.reshape(tensor.shape) + 1)
            for name, tensor in plain.items()
        },
    }
    assert_paired_with(tmp_path, text, vlm, prefix, text_prefix)


def test_a_head_kept_under_another_prefix_than_the_layers_is_still_found(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng)
    for head in ("lm_head.weight", "language_model.lm_head.weight"):
        vlm = moved(rng, text, to="language_model.model.")
        vlm[head] = vlm.pop("lm_head.weight")
        directory = tmp_path / head
        a, b = write_checkpoint(directory / "text", text), write_checkpoint(directory / "vlm", vlm)
        assert list(compute_delta(a, b, modules="head", rows="index")) == [head]


def test_two_complete_language_models_in_one_checkpoint_are_refused_naming_both(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng)
    vlm = {**moved(rng, text, to="thinker.model."), **moved(rng, text, to="talker.model.")}
    assert_alignment_refused(tmp_path, text, vlm, "thinker", "talker")


def test_two_language_models_of_which_one_lacks_its_embedding_are_refused_too(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng)
    draft = {
        name: tensor for name, tensor in moved(rng, text, to="draft.").items() if "layers" in name
    }
    vlm = {**moved(rng, text), **draft}
    assert_alignment_refused(tmp_path, text, vlm, "draft", "model.language_model")


def test_layers_inserted_between_those_of_the_text_model_are_refused(
    tmp_path: Path, rng: Any
) -> None:
    # Mllama puts cross-attention layers among the others; equal indices then mean other layers.
    text = language_model(rng, layers=4)
    vlm = {
        re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + (int(m[1]) >= 2)}", name): tensor
        for name, tensor in moved(rng, text).items()
    }
    vlm["model.language_model.layers.2.cross_attn.q_proj.weight"] = stored(np.ones((8, 8)))
    assert_alignment_refused(tmp_path, text, vlm, "layers", 4, 5)


def test_layer_ten_is_not_layer_one(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, layers=12, hidden=4, inner=4)
    vlm = {
        name: stored(tensor.values.reshape(tensor.shape) + 1, "F32")
        for name, tensor in text.items()
    }
    vlm = {
        name.replace("model.", "model.language_model.", 1): tensor for name, tensor in vlm.items()
    }
    a, b = write_checkpoint(tmp_path / "text", text), write_checkpoint(tmp_path / "vlm", vlm)
    delta = compute_delta(a, b, dtype="float32")
    assert len(delta) == 12 * 7
    assert all(tensor.unique().tolist() == [-1.0] for tensor in delta.values())


def test_the_order_of_tensors_in_the_files_does_not_matter(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, layers=3)
    vlm = {**vision_tower(rng, layers=3), **moved(rng, text)}
    a, b = write_checkpoint(tmp_path / "text", text), write_checkpoint(tmp_path / "vlm", vlm)
    shuffled = {name: vlm[name] for name in rng.permutation(list(vlm)).tolist()}
    c = write_checkpoint(tmp_path / "shuffled", shuffled, shards=3)
    first, second = compute_delta(a, b), compute_delta(a, c)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first.stats[name] == second.stats[name] for name in first)
    assert sorted(first.coverage.matched) == sorted(second.coverage.matched)


def test_layers_are_counted_and_not_spelt(tmp_path: Path, rng: Any) -> None:
    # A saved file lists its tensors by name, layers.10 before layers.2.
    text = dict(sorted(language_model(rng, layers=12, hidden=4, inner=4).items()))
    a = write_checkpoint(tmp_path / "text", text)
    b = write_checkpoint(tmp_path / "vlm", moved(rng, text))
    assert [row.layer for row in inspect(a, b).stats.by_layer()] == list(range(12))


def test_strange_names_are_carried_through_and_do_no_harm(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng)
    strange = {
        name: stored([1.0])
        for name in ("", ".", "..", "model", "layers.0", "ü.ñ.weight", "a" * 500, "x y")
    }
    vlm = {**strange, **moved(rng, text), "model.language_model.layers.x.weight": opaque("I64", 2)}
    a, b = write_checkpoint(tmp_path / "text", text), write_checkpoint(tmp_path / "vlm", vlm)
    delta = compute_delta(a, b, tmp_path / "delta")
    assert len(delta) == 14
    assert set(strange) <= {name for name, _ in delta.coverage.unmatched_multimodal}
    assert (
        Delta.open(tmp_path / "delta").coverage.unmatched_multimodal
        == delta.coverage.unmatched_multimodal
    )


def test_a_checkpoint_of_ten_thousand_tensors_is_aligned(tmp_path: Path) -> None:
    one = stored([1.0, 2.0])
    text = {
        f"model.layers.{n}.{k}": one
        for n in range(100)
        for k in (f"mlp.experts.{e}.w.weight" for e in range(100))
    }
    vlm = {name.replace("model.", "model.language_model."): stored([2.0, 3.0]) for name in text}
    a, b = write_checkpoint(tmp_path / "text", text), write_checkpoint(tmp_path / "vlm", vlm)
    report = inspect(a, b, modules="all", rows="index")
    assert len(report.coverage.matched) == 10_000
