"""What changes a weight beside it is refused by name and with a remedy, in every verb."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from drift_fast import CheckpointError, align, check, compute_delta, inspect, merge
from drift_fast.alignment import beside
from drift_fast.alignment.options import PairOptions
from drift_fast.alignment.pairing import survey_checkpoints
from drift_fast.alignment.refusals import why_not
from drift_fast.errors import DriftWarning
from support.synthetic import (
    Stored,
    language_model,
    moved,
    opaque,
    refused,
    stored,
    write_checkpoint,
)

Tensors = dict[str, Stored]
Q = "model.layers.0.self_attn.q_proj"
TO = "model.language_model."
MERGE = "merge_and_unload"
UNQUANTIZED = "unquantized checkpoint"


def floats(*shape: int) -> Stored:
    return stored(np.ones(shape), "F32")


def written(
    directory: Path,
    here: Mapping[str, Stored],
    *,
    both: bool = False,
    without: str = "nothing",
    config: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write a pair whose reasoning model, or both, has more tensors and lacks some."""
    rng = np.random.default_rng(3)
    text = language_model(rng)
    vlm = moved(rng, text)
    text = {name: one for name, one in text.items() if not name.startswith(without)} | dict(here)
    if both:
        vlm = {n: o for n, o in vlm.items() if not n.startswith(without.replace("model.", TO, 1))}
        vlm |= {name.replace("model.", TO, 1): one for name, one in here.items()}
    a = write_checkpoint(directory / "text", text)
    if config is not None:
        (a / "config.json").write_text(json.dumps(config))
    return a, write_checkpoint(directory / "vlm", vlm)


def verbs(a: Path, b: Path, out: Path) -> list[Callable[[], object]]:
    """Return what takes a pair, with other modules selected than those that are changed."""
    return [
        lambda: compute_delta(a, b, out, modules="mlp"),
        lambda: compute_delta(a, b, out, modules="norm", strict=False),
        lambda: inspect(a, b, modules="mlp"),
        lambda: merge("linear", a, b, out, weight=0.5, modules="mlp"),
    ]


# In the layer's q_proj, unless the name has a path of its own: what a format leaves beside or in
# place of the weight, and the words of its remedy.
LEFTOVERS: dict[str, tuple[dict[str, Stored], bool, str]] = {
    "LoRA": (
        {"base_layer.weight": floats(8, 8), "lora_A.default.weight": floats(2, 8)}, True, MERGE,
    ),
    "LoRA beside a weight under its own name": ({"lora_B.weight": floats(8, 2)}, False, MERGE),
    "DoRA": ({"lora_magnitude_vector.default.weight": floats(8)}, False, MERGE),
    "IA3": ({"base_layer.weight": floats(8, 8), "ia3_l.default": floats(8, 1)}, True, MERGE),
    "OFT": ({"base_layer.weight": floats(8, 8), "oft_R.default.weight": floats(1, 6)}, True, MERGE),
    "an adapter of a library that nobody knows": (
        {"delta_tuner.down.weight": floats(2, 8)}, False, "merged into their weights",
    ),
    "a parametrization": (
        {
            "parametrizations.weight.original0": floats(8, 1),
            "parametrizations.weight.original1": floats(8, 8),
        },
        False,
        "merged into their weights",
    ),
    "a weight norm": ({"weight_g": floats(8, 1), "weight_v": floats(8, 8)}, True, "merged into"),
    "GPTQ": (
        {"qweight": opaque("I32", 1, 8), "scales": floats(1, 8), "g_idx": opaque("I32", 8)},
        True,
        UNQUANTIZED,
    ),
    "AWQ": (
        {"qweight": opaque("I32", 8, 1), "qzeros": opaque("I32", 1, 1), "scales": floats(1, 8)},
        True,
        UNQUANTIZED,
    ),
    "MLX": (
        {"weight": opaque("U32", 8, 1), "scales": floats(8, 1), "biases": floats(8, 1)},
        True,
        UNQUANTIZED,
    ),
    "bitsandbytes in 8 bits": (
        {"weight": opaque("I8", 8, 8), "SCB": floats(8), "weight_format": opaque("U8")},
        True,
        "dequantize()",
    ),
    "bitsandbytes, whose codes are lost": (
        {"weight.absmax": floats(1), "weight.quant_state.bitsandbytes__nf4": opaque("U8", 78)},
        False,
        "dequantize()",
    ),
    "compressed-tensors": (
        {"weight_packed": opaque("I32", 8, 1), "weight_shape": opaque("I64", 2),
         "weight_scale": floats(8, 1)},
        True,
        UNQUANTIZED,
    ),
    "NVFP4": (
        {"weight": opaque("U8", 8, 4), "weight_scale": opaque("F8_E4M3", 8, 1),
         "input_scale": floats(), "weight_scale_2": floats()},
        True,
        UNQUANTIZED,
    ),
    "8-bit floats with a scale for each row": (
        {"weight": opaque("F8_E4M3", 8, 8), "weight_scale": floats(8, 1)}, True, UNQUANTIZED,
    ),
    "8-bit floats with a scale under another name": (
        {"weight": opaque("F8_E4M3", 8, 8), "scale": opaque("F8_E8M0", 1, 1)}, True, UNQUANTIZED,
    ),
    "HQQ": (
        {"W_q": opaque("U8", 4, 8), "zero": floats(1, 8), "scale": floats(1, 8)},
        True,
        UNQUANTIZED,
    ),
    "torchao": (
        {"_weight_qdata": opaque("I8", 8, 8), "_weight_scale": floats(8, 1)}, True, UNQUANTIZED,
    ),
    "quanto": (
        {"weight._data": opaque("I8", 8, 8), "weight._scale": floats(8, 1)}, True, UNQUANTIZED,
    ),
    "AQLM": (
        {"codes": opaque("I8", 8, 1, 1), "codebooks": floats(1, 4, 1, 8), "scales": floats(8, 1)},
        True,
        UNQUANTIZED,
    ),
    "a scale of inputs that was moved out of the weight": (
        {"input_quantizer._pre_quant_scale": floats(8)}, False, UNQUANTIZED,
    ),
    "a format of tomorrow": (
        {"planes": opaque("U16", 8, 2), "exponents": opaque("U16", 8)}, True, UNQUANTIZED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFTOVERS)
def test_every_verb_refuses_a_changed_weight_selected_or_not(tmp_path: Path, kind: str) -> None:
    tensors, replaces, remedy = LEFTOVERS[kind]
    here = {f"{Q}.{name}": one for name, one in tensors.items()}
    a, b = written(tmp_path, here, without=f"{Q}." if replaces else "nothing")
    last = list(here)[-1]
    for verb in verbs(a, b, tmp_path / "out"):
        with refused(CheckpointError, str(a), "reasoning", last, remedy):
            verb()
        assert not (tmp_path / "out").exists()
    finding = next(one for one in check(a, b).findings if one.subject == "alignment")
    assert finding.severity == "breaks"
    for text in (align(a, b).problem, finding.message):
        assert text is not None
        assert remedy in text
        assert "strict=False" not in text


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.lora_embedding_A.default",
        "model.embed_tokens.trainable_tokens_delta.default",
        "lm_head.lora_A.default.weight",
        "lm_head.modules_to_save.default.weight",
        "lm_head.qweight",
        "lm_head.weight.absmax",
        "lm_head.weight_scale",
        "model.norm.ln_tuning_layers.default.weight",
    ],
)
def test_embeddings_and_head_are_weights_too(tmp_path: Path, name: str) -> None:
    for verb in verbs(*written(tmp_path, {name: floats(2, 8)}), tmp_path / "out"):
        with refused(CheckpointError, name):
            verb()


EXPERTS = "model.layers.0.mlp.experts."


@pytest.mark.parametrize(
    "here",
    [
        {f"{Q}.lora_A.default.weight": floats(2, 8), f"{Q}.lora_B.default.weight": floats(8, 2)},
        {f"{Q}.base_layer.weight": floats(8, 8)},
        {f"{Q}.qweight": opaque("I32", 1, 8), f"{Q}.scales": floats(1, 8)},
        {f"{Q}.weight": opaque("U32", 8, 1), f"{Q}.scales": floats(8, 1)},
        {f"{Q}.weight_packed": opaque("U8", 8, 4), f"{Q}.weight_scale": floats(8, 1)},
        {
            f"{EXPERTS}down_proj_blocks": opaque("U8", 2, 8, 1, 16),
            f"{EXPERTS}down_proj_scales": opaque("U8", 2, 8, 1),
            f"{EXPERTS}down_proj_bias": floats(2, 8),
        },
        {
            f"{EXPERTS}down_proj": opaque("U8", 2, 8, 4),
            f"{EXPERTS}down_proj_scale": floats(2, 8, 1),
        },
    ],
    ids=["adapters", "base layers", "GPTQ", "MLX", "packed", "MXFP4", "experts"],
)
@pytest.mark.parametrize("stated", [False, True])
def test_what_both_models_have_changes_both(tmp_path: Path, here: Tensors, *, stated: bool) -> None:
    """Then the leftovers match each other, and a config.json need not say what they are."""
    config = {"quantization_config": {"quant_method": "mxfp4"}} if stated else None
    a, b = written(tmp_path, here, both=True, without=f"{Q}.", config=config)
    first = next(iter(here))
    for verb in verbs(a, b, tmp_path / "out"):
        with refused(CheckpointError, str(a), first, str(b), first.replace("model.", TO, 1)):
            verb()


def test_experts_that_only_one_model_packs_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    text = language_model(rng)
    vlm = moved(rng, text) | {
        EXPERTS.replace("model.", TO, 1) + name: floats(2, 8, 8)
        for name in ("gate_up_proj", "down_proj")
    }
    text |= {f"{EXPERTS}{name}_packs": floats(2, 8, 1) for name in ("gate_up_proj", "down_proj")}
    a, b = write_checkpoint(tmp_path / "a", text), write_checkpoint(tmp_path / "b", vlm)
    with refused(CheckpointError, f"{EXPERTS}down_proj_packs", "F32"):
        compute_delta(a, b)


def test_the_cause_comes_before_what_follows_from_it(tmp_path: Path) -> None:
    """Even where no tensor at all has a match, and with both causes in one checkpoint."""
    coded = {f"{Q}.qweight": opaque("I32", 1, 8), f"{Q}.lora_A.weight": floats(2, 8)}
    a = write_checkpoint(tmp_path / "a", coded)
    b = write_checkpoint(tmp_path / "b", language_model(np.random.default_rng(1)))
    with refused(CheckpointError, "adapter", "quantized", f"{Q}.qweight (I32)"):
        compute_delta(a, b)
    with refused(CheckpointError, "the multimodal checkpoint", "quantized"):
        compute_delta(b, a)


def test_the_unquantized_checkpoint_is_named_where_the_name_tells(tmp_path: Path) -> None:
    a, b = written(tmp_path, {f"{Q}.qweight": opaque("I32", 1, 8)})
    named = a.rename(tmp_path / "Qwen3-8B-AWQ")
    with refused(CheckpointError, "by its name Qwen3-8B"):
        compute_delta(named, b)


HARMLESS = {
    f"{Q}.bias": floats(8),
    "model.layers.0.self_attn.k_proj.k_scale": floats(1),
    "model.layers.0.self_attn.v_proj.v_scale": floats(1),
    f"{Q}.input_scale": floats(1),
    "model.layers.0.self_attn.q_norm.weight": floats(8),
    "model.layers.0.self_attn.sinks": floats(2),
    "model.layers.0.self_attn.rotary_emb.inv_freq": floats(4),
    "model.layers.0.self_attn.bias": opaque("U8", 1, 1, 8, 8),
    "model.layers.0.self_attn.masked_bias": floats(),
    "model.layers.0.layer_scalar": floats(1),
    "model.embed_tokens.embed_norm.weight": floats(8),
    "model.embed_tokens.eoi_embedding": floats(8),
    "lm_head.logit_scale": floats(1),
    "model.layers.0.mlp.gate.weight": floats(4, 8),
    "model.layers.0.mlp.gate.e_score_correction_bias": floats(4),
    "model.layers.0.mlp.gate.tid2eid": opaque("I64", 16, 2),
    "model.rotary_emb.inv_freq": floats(4),
    "multi_modal_projector.linear_1.lora_A.default.weight": floats(2, 8),
    "vision_tower.layers.0.self_attn.q_proj.lora_A.default.weight": floats(2, 8),
    "vision_tower.layers.0.self_attn.q_proj.SCB": floats(8),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_weight_of_the_backbone_is_no_reason(tmp_path: Path, name: str) -> None:
    here = {n: one for n, one in HARMLESS.items() if n == name or (".gate." in n and "e." in name)}
    a, b = written(tmp_path / "one", here)
    reasons = [one.reason for one in why_not(survey_checkpoints(a, b, PairOptions()))]
    assert "changed beside" not in reasons
    assert len(compute_delta(*written(tmp_path / "two", here, both=True), strict=False)) >= 14


def test_another_tower_in_the_checkpoint_is_no_reason(tmp_path: Path) -> None:
    a, b = written(tmp_path, {"talker.layers.0.attn.q_proj.qweight": opaque("I32", 1, 8)})
    assert len(compute_delta(a, b)) == 14


def test_many_names_are_looked_at_in_linear_time() -> None:
    """By the count of looks, since timing decides no test."""
    deep = {f"model.layers.{k % 99}." + "x." * 4000 + f"y{k}": (1,) for k in range(100)}
    assert all(len(list(beside._above(name))) <= beside._DEPTH for name in deep)
    assert len(list(beside._stems("", "a_" * 4000))) <= beside._DEPTH


# ------------------------------------------------------------------ the remedies, followed


def tiny_llama(directory: Path) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    return model


def test_the_remedy_for_an_adapter_is_one(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama(tmp_path / "plain")
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True),
    )
    stored_whole = tmp_path / "whole"
    stored_whole.mkdir()
    save_file(adapted.state_dict(), stored_whole / "model.safetensors")
    with refused(CheckpointError, "lora_A", "merge_and_unload()"):
        compute_delta(stored_whole, tmp_path / "plain")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert len(compute_delta(tmp_path / "merged", tmp_path / "plain", check_weights=False)) == 14


@pytest.mark.parametrize("bits", [4, 8])
def test_the_remedy_for_bitsandbytes_is_one(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(tmp_path / "plain", quantization_config=config).save_pretrained(tmp_path / "coded")
    with refused(CheckpointError, "quantized", "down_proj", "model.dequantize()"):
        compute_delta(tmp_path / "coded", tmp_path / "plain")
    load(tmp_path / "coded").dequantize().save_pretrained(tmp_path / "back")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        assert len(compute_delta(tmp_path / "back", tmp_path / "plain")) == 14


def test_the_remedy_for_packed_experts_is_one(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=32, num_local_experts=2,
        num_experts_per_tok=1, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    packed = {}
    for name, weight in model.state_dict().items():
        packed[name] = weight
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, outer = packed.pop(name).shape
            blocks = torch.randint(0, 255, (experts, outer, inner // 32, 16), dtype=torch.uint8)
            scales = torch.full((experts, outer, inner // 32), 120, dtype=torch.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    coded = tmp_path / "coded"
    coded.mkdir()
    save_file(packed, coded / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((tmp_path / "plain" / "config.json").read_text())
    stated["quantization_config"] = {"quant_method": "mxfp4"}
    (coded / "config.json").write_text(json.dumps(stated))
    with refused(CheckpointError, "_blocks", "Mxfp4Config(dequantize=True)"):
        compute_delta(coded, tmp_path / "plain")
    back = transformers.AutoModelForCausalLM.from_pretrained(
        coded, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    back.save_pretrained(tmp_path / "back")
    delta = compute_delta(tmp_path / "back", tmp_path / "plain", modules="mlp", check_weights=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in delta
