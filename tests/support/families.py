"""Tiny multimodal models of every family that is claimed, each with a text model of its backbone.

Owns the catalog, what corresponds to what in memory, and the planting: the text model gets random
weights, and each element of the multimodal one is its counterpart plus a difference of its own.
Invariant: correspondence is known from the classes alone, never from `drift_fast`.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.utils.logging.set_verbosity_error()
# Older releases have no switch for their bars.
getattr(transformers.utils.logging, "disable_progress_bar", lambda: None)()

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
NEW = VERSION >= (5, 0)

LAYERS, EXPERTS, HIDDEN, INNER = 3, 4, 16, 24
# Grouped queries, and a down_proj that is not square: shapes tell most orientations apart.
TEXT = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
TIED = {**TEXT, "tie_word_embeddings": True}
# q_proj is 32 × 16, so a transposed one is seen by its shape too.
WIDE = {**TEXT, "head_dim": 8}
# The tower has the language model's width, depth and projection names: the worst neighbor.
VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 14,
}


Tensors = dict[str, torch.Tensor]


class HandWritten(nn.Module):
    """Parameters under given names, for classes that transformers does not have.

    Saved and loaded under the names in memory, as a model of remote code is.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))

    def save_pretrained(self, directory: Path, max_shard_size: str = "5GB") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.state_dict()), directory / "model.safetensors", {"format": "pt"})

    def load(self, directory: Path) -> HandWritten:
        self.load_state_dict(load_file(directory / "model.safetensors"))
        return self


@dataclass(frozen=True)
class Family:
    """One multimodal class, a text model of its backbone, and what is to be expected of the pair.

    `base` and `head` are the modules in memory that correspond to the text model's base and head;
    `renamed` maps a name within the text base to the one within the multimodal base. `names` must
    be in the message of a refusal. `stored` gives other ways in which the checkpoint is published,
    each made from the tensors that this transformers saves. `told_by_class` is for names that only
    transformers' own tables bring together, so that a model of no class of its is refused.
    """

    name: str
    text_name: str
    text: Callable[[], Any]
    multimodal: Callable[[], Any]
    base: str = "model.language_model"
    head: str = "lm_head"
    expected: Literal["aligned", "refused"] = "aligned"
    note: str = ""
    since: tuple[int, int] = (4, 52)
    renamed: Callable[[str], str] = lambda name: name
    names: tuple[str, ...] = ()
    stored: Mapping[str, Callable[[Tensors], Tensors]] = field(default_factory=dict)
    told_by_class: bool = False

    def language_model(self, multimodal: nn.Module) -> nn.Module:
        """Return the module whose parameters correspond to those of the text model's base."""
        base = multimodal.get_submodule(self.base)
        # Where some versions have it, others have a shell around it.
        shelled = getattr(base, "language_model", base)
        assert isinstance(shelled, nn.Module)
        return shelled

    @property
    def missing(self) -> str | None:
        """Why the installed transformers cannot build this family, None if it can."""
        if self.since <= VERSION:
            return None
        wanted = ".".join(map(str, self.since))
        return f"{self.name} needs transformers {wanted}, this is {transformers.__version__}"

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.name}+{self.text_name}".lower())


# ---------------------------------------------------------------- text models


def rope(**parameters: Any) -> dict[str, Any]:
    """Return the options that set a rotary embedding, which 5.0 renamed."""
    if NEW:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **parameters}}
    partial = {k: parameters.pop(k) for k in ("partial_rotary_factor",) if k in parameters}
    return {"rope_scaling": {"rope_type": "default", **parameters}, "rope_theta": 1e4, **partial}


def causal(kind: str, options: Mapping[str, Any] = TEXT, config: str | None = None) -> Any:
    """Build `<kind>ForCausalLM`."""
    make = getattr(transformers, config or f"{kind}Config")
    return getattr(transformers, f"{kind}ForCausalLM")(make(**options))


MOE = {
    **WIDE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
}
# gate_up is 16 × 16 whichever way it lies.
SQUARE_MOE = {**MOE, "moe_intermediate_size": HIDDEN // 2}
ARIA = {**TEXT, "moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1}
LLAMA4 = {
    **WIDE,
    "intermediate_size": 12,
    "intermediate_size_mlp": INNER,
    "num_local_experts": EXPERTS,
    "moe_layers": [0, 2],
    "attention_chunk_size": 32,
}
DEEPSEEK = {
    **TEXT,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
}
# Moonlight, which Kimi-VL is built on, projects queries at once.
MOONLIGHT = {**DEEPSEEK, "q_lora_rank": None}
QWEN3_5 = {
    **WIDE,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
QWEN3_5_MOE = {
    **{key: value for key, value in QWEN3_5.items() if key != "intermediate_size"},
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
}
GEMMA3 = {**TIED, "head_dim": 8}
# PaliGemma lets a prompt see all of itself, which a text model does not.
GEMMA = {**GEMMA3, "use_bidirectional_attention": False}
# Two heads, so that half of each can be rotated in two sections.
GLM = {**TEXT, "num_attention_heads": 2, "num_key_value_heads": 1}


# ---------------------------------------------------------------- multimodal models


def tokens(*names: str) -> dict[str, int]:
    """Place special tokens at the end of the vocabulary."""
    return {name: 63 - at for at, name in enumerate(names)}


def vision_language(
    kind: str,
    text: Mapping[str, Any] | Any,
    vision: Mapping[str, Any] | Any,
    suffix: str = "ForConditionalGeneration",
    **options: Any,
) -> Any:
    """Build `<kind>ForConditionalGeneration` from its two configurations."""
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, **options
    )
    return getattr(transformers, kind + suffix)(config)


def qwen_vl(kind: str, text: Mapping[str, Any], vision: Mapping[str, Any], section: Any) -> Any:
    return vision_language(
        kind,
        {**text, **rope(mrope_section=section)},
        vision,
        **tokens(
            "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"
        ),
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def qwen2_vl() -> Any:
    # Its tower calls the width embed_dim and the width it hands on hidden_size.
    vision = {"depth": LAYERS, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 14}
    return qwen_vl("Qwen2VL", TIED, vision, [1, 1, 0])


def qwen3_vl(kind: str, text: Mapping[str, Any]) -> Any:
    vision = {
        **QWEN_VISION,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    return qwen_vl(kind, text, vision, [2, 1, 1])


def qwen3_5(kind: str, text: Mapping[str, Any]) -> Any:
    return qwen_vl(kind, text, {**QWEN_VISION, "num_position_embeddings": 16}, [1, 0, 0])


def llava(kind: str, text: Any, vision: Any = None, **options: Any) -> Any:
    vision = vision or transformers.CLIPVisionConfig(**VISION, projection_dim=8)
    return vision_language(kind, text, vision, tie_word_embeddings=False, **options)


def internvl() -> Any:
    vision = {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}
    return vision_language(
        "InternVL",
        transformers.Qwen2Config(**TEXT),
        vision,
        image_token_id=63,
        tie_word_embeddings=False,
    )


def gemma3() -> Any:
    return vision_language(
        "Gemma3",
        GEMMA3,
        VISION,
        mm_tokens_per_image=4,
        **tokens("image_token_index", "boi_token_index", "eoi_token_index"),
    )


def paligemma() -> Any:
    return vision_language(
        "PaliGemma",
        transformers.GemmaConfig(**GEMMA),
        transformers.SiglipVisionConfig(**VISION, projection_dim=HIDDEN, vision_use_head=False),
        image_token_index=63,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )


def idefics2() -> Any:
    perceiver = {
        "hidden_size": HIDDEN,
        "resampler_n_latents": 4,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 4,
        "num_key_value_heads": 2,
    }
    return vision_language(
        "Idefics2",
        transformers.MistralConfig(**TEXT),
        VISION,
        perceiver_config=perceiver,
        image_token_id=63,
        tie_word_embeddings=False,
    )


def idefics3(kind: str) -> Any:
    return vision_language(
        kind,
        transformers.LlamaConfig(**TEXT),
        VISION,
        image_token_id=63,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def mistral3() -> Any:
    return vision_language(
        "Mistral3",
        transformers.MistralConfig(**WIDE),
        transformers.PixtralVisionConfig(**VISION),
        image_token_index=63,
        tie_word_embeddings=False,
    )


def phi4() -> Any:
    vision = {**VISION, "crop_size": 28, "image_token_id": 62}
    audio = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_blocks": LAYERS,
        "num_attention_heads": 4,
        "ext_pw_out_channel": HIDDEN,
        "depthwise_separable_out_channel": HIDDEN,
        "nemo_conv_channels": 4,
        "input_size": 16,
        "audio_token_id": 63,
    }
    config = transformers.Phi4MultimodalConfig(**TEXT, vision_config=vision, audio_config=audio)
    return transformers.Phi4MultimodalForCausalLM(config)


def glm4v() -> Any:
    vision = {**QWEN_VISION, "image_size": 28}
    return vision_language(
        "Glm4v",
        {**GLM, **rope(mrope_section=[1, 1, 0], partial_rotary_factor=0.5)},
        vision,
        **tokens(
            "image_token_id",
            "video_token_id",
            "image_start_token_id",
            "image_end_token_id",
            "video_start_token_id",
            "video_end_token_id",
        ),
        tie_word_embeddings=False,
    )


def ovis2() -> Any:
    return vision_language(
        "Ovis2",
        transformers.Qwen2Config(**TIED),
        {**VISION, "vocab_size": 32, "num_visual_indicator_tokens": 5},
        image_token_id=63,
        visual_indicator_token_ids=[58, 59, 60, 61, 62],
        vocab_size=64,
        hidden_size=HIDDEN,
    )


def aria() -> Any:
    return vision_language(
        "Aria",
        transformers.AriaTextConfig(**ARIA),
        transformers.Idefics3VisionConfig(**VISION),
        image_token_index=63,
        projector_patch_to_query_dict={4: 2},
    )


def llama4() -> Any:
    vision = {
        **VISION,
        "vision_output_dim": HIDDEN,
        "projector_input_dim": HIDDEN,
        "projector_output_dim": HIDDEN,
        "intermediate_size": 64,
    }
    return vision_language(
        "Llama4",
        LLAMA4,
        vision,
        **tokens("image_token_index", "boi_token_index", "eoi_token_index"),
        tie_word_embeddings=False,
    )


# Layers 1 and 3 attend to the image, so text layers 0, 1, 2 are layers 0, 2, 4.
INSERTED = (1, 3)


def mllama() -> Any:
    vision = {
        **{key: value for key, value in VISION.items() if key != "num_attention_heads"},
        "attention_heads": 4,
        "num_global_layers": 1,
        "vision_output_dim": 2 * HIDDEN,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    text = {
        **TEXT,
        "num_hidden_layers": LAYERS + len(INSERTED),
        "cross_attention_layers": list(INSERTED),
        **rope(),
    }
    return vision_language("Mllama", text, vision, image_token_index=63)


def mllama_layer(name: str) -> str:
    kept = [layer for layer in range(LAYERS + len(INSERTED)) if layer not in INSERTED]
    return re.sub(r"^layers\.(\d+)", lambda found: f"layers.{kept[int(found[1])]}", name)


def omni(talker: Mapping[str, Any]) -> Any:
    thinker = {
        "text_config": {**TEXT, **rope(mrope_section=[1, 1, 0])},
        "vision_config": QWEN_VISION,
        "audio_config": {
            "d_model": HIDDEN,
            "encoder_layers": LAYERS,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": INNER,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "n_window": 4,
            "output_dim": HIDDEN,
        },
        **tokens("audio_token_index", "image_token_index", "video_token_index"),
    }
    small = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "head_dim": 4}
    token2wav = {
        "dit_config": {
            **small,
            "emb_dim": 8,
            "mel_dim": 4,
            "enc_emb_dim": 8,
            "enc_dim": 4,
            "enc_channels": [8, 8, 8, 8, 24],
            "enc_attention_channels": 4,
            "enc_res2net_scale": 2,
            "enc_se_channels": 4,
            "num_embeds": 16,
        },
        "bigvgan_config": {
            "mel_dim": 4,
            "upsample_initial_channel": 16,
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3, 5]],
            "upsample_rates": [2],
            "upsample_kernel_sizes": [4],
        },
    }
    config = transformers.Qwen2_5OmniConfig(
        thinker_config=thinker,
        talker_config={
            **TEXT,
            **rope(mrope_section=[1, 1, 0]),
            "head_dim": 4,
            "embedding_size": HIDDEN,
            **talker,
        },
        token2wav_config=token2wav,
    )
    return transformers.Qwen2_5OmniForConditionalGeneration(config)


def kimi_k25() -> Any:
    vision = {**VISION, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2}
    del vision["image_size"]
    return vision_language(
        "Kimi_K25",
        transformers.DeepseekV3Config(**DEEPSEEK),
        vision,
        projection_hidden_size=HIDDEN,
        **tokens(
            "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"
        ),
        tie_word_embeddings=False,
    )


def kimi_vl() -> Any:
    """Write Kimi-VL by hand, as its published weights are named: experts one by one."""
    names: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (64, HIDDEN),
        "language_model.model.norm.weight": (HIDDEN,),
        "language_model.lm_head.weight": (64, HIDDEN),
        "multi_modal_projector.pre_norm.weight": (HIDDEN,),
        "multi_modal_projector.linear_1.weight": (HIDDEN, HIDDEN),
    }
    for layer in range(LAYERS):
        at, block = f"language_model.model.layers.{layer}", f"vision_tower.encoder.blocks.{layer}"
        names |= {
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
            f"{at}.self_attn.q_proj.weight": (32, HIDDEN),
            f"{at}.self_attn.kv_a_proj_with_mqa.weight": (12, HIDDEN),
            f"{at}.self_attn.kv_a_layernorm.weight": (8,),
            f"{at}.self_attn.kv_b_proj.weight": (32, 8),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{block}.wqkv.weight": (3 * HIDDEN, HIDDEN),
            f"{block}.wo.weight": (HIDDEN, HIDDEN),
            f"{block}.mlp.fc0.weight": (INNER, HIDDEN),
            f"{block}.mlp.fc1.weight": (HIDDEN, INNER),
        }
        dense = [(f"{at}.mlp", INNER)]
        if layer:
            dense = [(f"{at}.mlp.experts.{expert}", 12) for expert in range(EXPERTS)]
            dense.append((f"{at}.mlp.shared_experts", 12))
            names[f"{at}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
            names[f"{at}.mlp.gate.e_score_correction_bias"] = (EXPERTS,)
        for place, inner in dense:
            names |= {
                f"{place}.gate_proj.weight": (inner, HIDDEN),
                f"{place}.up_proj.weight": (inner, HIDDEN),
                f"{place}.down_proj.weight": (HIDDEN, inner),
            }
    return HandWritten(names)


def minicpm_v() -> Any:
    """Write MiniCPM-V 2.6 by hand: a Qwen2 under llm, a SigLIP under vpm, a resampler."""
    names: dict[str, tuple[int, ...]] = {
        f"llm.{name}": tuple(p.shape) for name, p in causal("Qwen2").named_parameters()
    }
    for layer in range(LAYERS):
        at = f"vpm.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names[f"{at}.self_attn.{part}.weight"] = (HIDDEN, HIDDEN)
            names[f"{at}.self_attn.{part}.bias"] = (HIDDEN,)
        names[f"{at}.mlp.fc1.weight"] = (INNER, HIDDEN)
        names[f"{at}.mlp.fc2.weight"] = (HIDDEN, INNER)
    names["vpm.post_layernorm.weight"] = (HIDDEN,)
    names["resampler.attn.in_proj_weight"] = (3 * HIDDEN, HIDDEN)
    names["resampler.kv_proj.weight"] = (HIDDEN, HIDDEN)
    return HandWritten(names)


def minicpm_v4_6() -> Any:
    return vision_language(
        "MiniCPMV4_6",
        transformers.Qwen3_5TextConfig(**QWEN3_5, **rope(mrope_section=[1, 0, 0])),
        VISION,
        insert_layer_id=1,
        image_size=28,
        image_token_id=63,
        video_token_id=62,
        tie_word_embeddings=False,
    )


def experts_across(tensors: Tensors) -> Tensors:
    """Lay fused experts as [expert, in, out], as 4.57 and the Hub do; 5.x saves them otherwise."""
    return {
        name: tensor.transpose(1, 2).contiguous()
        if re.search(r"\.experts\.(gate_up|down)_proj$", name) and NEW
        else tensor
        for name, tensor in tensors.items()
    }


def language_layers(tensors: Tensors) -> Tensors:
    """Undo the renaming of layers to blocks, which 5.23 means for the tower, in the backbone."""
    return {
        re.sub(r"^language_model\.model\.blocks\.", "language_model.model.layers.", name): tensor
        for name, tensor in tensors.items()
    }


FAMILIES: tuple[Family, ...] = (
    Family("Qwen2-VL", "Qwen2", lambda: causal("Qwen2", TIED), qwen2_vl),
    Family(
        "Qwen2.5-VL",
        "Qwen2",
        lambda: causal("Qwen2"),
        lambda: qwen_vl("Qwen2_5_VL", TEXT, QWEN_VISION, [1, 1, 0]),
    ),
    Family(
        "Qwen3-VL",
        "Qwen3",
        lambda: causal("Qwen3", WIDE),
        lambda: qwen3_vl("Qwen3VL", WIDE),
        since=(4, 57),
    ),
    Family(
        "Qwen3-VL-MoE",
        "Qwen3-MoE",
        lambda: causal("Qwen3Moe", MOE),
        lambda: qwen3_vl("Qwen3VLMoe", MOE),
        since=(4, 57),
        note="published transposed, saved fused by 5.x",
        stored={"as published": experts_across},
    ),
    Family(
        "Qwen3-VL-MoE, square gate_up",
        "Qwen3-MoE",
        lambda: causal("Qwen3Moe", SQUARE_MOE),
        lambda: qwen3_vl("Qwen3VLMoe", SQUARE_MOE),
        note="hidden is twice intermediate, so the shape of gate_up does not tell how it lies",
        since=(4, 57),
    ),
    Family(
        "Qwen3.5",
        "Qwen3.5 text",
        lambda: causal("Qwen3_5", QWEN3_5, "Qwen3_5TextConfig"),
        lambda: qwen3_5("Qwen3_5", QWEN3_5),
        since=(5, 2),
    ),
    Family(
        "Qwen3.5-MoE",
        "Qwen3.5-MoE text",
        lambda: causal("Qwen3_5Moe", QWEN3_5_MOE, "Qwen3_5MoeTextConfig"),
        lambda: qwen3_5("Qwen3_5Moe", QWEN3_5_MOE),
        since=(5, 2),
    ),
    Family(
        "LLaVA 1.5",
        "Llama",
        lambda: causal("Llama"),
        lambda: llava("Llava", transformers.LlamaConfig(**TEXT), image_token_index=63),
    ),
    Family(
        "LLaVA-NeXT",
        "Mistral",
        lambda: causal("Mistral", WIDE),
        lambda: llava(
            "LlavaNext",
            transformers.MistralConfig(**WIDE),
            image_token_index=63,
            image_grid_pinpoints=[[28, 56]],
        ),
    ),
    Family(
        "LLaVA-OneVision",
        "Qwen2",
        lambda: causal("Qwen2"),
        lambda: llava(
            "LlavaOnevision",
            transformers.Qwen2Config(**TEXT),
            transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
            image_grid_pinpoints=[[28, 56]],
            **tokens("image_token_index", "video_token_index"),
        ),
    ),
    Family("InternVL3-hf", "Qwen2", lambda: causal("Qwen2"), internvl),
    Family("Gemma3", "Gemma3 text", lambda: causal("Gemma3", GEMMA3, "Gemma3TextConfig"), gemma3),
    Family("PaliGemma", "Gemma", lambda: causal("Gemma", GEMMA3), paligemma),
    Family(
        "Idefics2",
        "Mistral",
        lambda: causal("Mistral"),
        idefics2,
        base="model.text_model",
    ),
    Family(
        "Idefics3",
        "Llama",
        lambda: causal("Llama"),
        partial(idefics3, "Idefics3"),
        base="model.text_model",
    ),
    Family(
        "SmolVLM",
        "Llama",
        lambda: causal("Llama"),
        partial(idefics3, "SmolVLM"),
        base="model.text_model",
    ),
    Family("Mistral3", "Mistral", lambda: causal("Mistral", WIDE), mistral3),
    Family(
        "Pixtral",
        "Mistral",
        lambda: causal("Mistral", WIDE),
        lambda: llava(
            "Llava",
            transformers.MistralConfig(**WIDE),
            transformers.PixtralVisionConfig(**VISION),
            image_token_index=63,
        ),
    ),
    Family(
        "Phi-4-multimodal",
        "Phi3",
        lambda: causal("Phi3"),
        phi4,
        base="model",
    ),
    Family(
        "Phi-4-multimodal",
        "Llama",
        lambda: causal("Llama"),
        phi4,
        base="model",
        note="q, k, v and gate, up apart in the text model, together in the multimodal one",
    ),
    Family(
        "GLM-4.1V",
        "Glm4",
        lambda: causal("Glm4", {**GLM, "head_dim": 8, **rope(partial_rotary_factor=0.5)}),
        glm4v,
        since=(4, 53),
    ),
    Family("Ovis2", "Qwen2", lambda: causal("Qwen2", TIED), ovis2, since=(4, 56)),
    Family(
        "Aria",
        "Aria text",
        lambda: causal("AriaText", ARIA),
        aria,
        told_by_class=True,
    ),
    Family(
        "Llama4",
        "Llama4 text",
        lambda: causal("Llama4", LLAMA4, "Llama4TextConfig"),
        llama4,
        base="language_model.model",
        head="language_model.lm_head",
    ),
    Family(
        "Mllama",
        "Llama",
        lambda: causal("Llama"),
        mllama,
        expected="refused",
        renamed=mllama_layer,
        names=("layers 1, 3", "drift-fast align"),
        note="cross-attention layers stand between the others; aligned when given a layer map",
    ),
    Family(
        "Kimi-K2.5",
        "DeepSeek-V3",
        lambda: causal("DeepseekV3", DEEPSEEK),
        kimi_k25,
        since=(5, 13),
        note="its layers are published as layers, saved as blocks by 5.23",
        stored={"as published": language_layers},
    ),
    Family(
        "Kimi-VL",
        "DeepSeek-V3",
        lambda: causal("DeepseekV3", MOONLIGHT),
        kimi_vl,
        base="language_model.model",
        head="language_model.lm_head",
        since=(4, 53),
        note="names and shapes by hand, as transformers has no class",
    ),
    Family(
        "Qwen2.5-Omni",
        "Qwen2",
        lambda: causal("Qwen2"),
        lambda: omni({"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12}),
        base="thinker.model",
        head="thinker.lm_head",
        note="the thinker; the talker is narrower",
    ),
    Family(
        "Qwen2.5-Omni, equal talker",
        "Qwen2",
        lambda: causal("Qwen2"),
        lambda: omni({}),
        base="thinker.model",
        head="thinker.lm_head",
        expected="refused",
        names=("thinker", "talker"),
        note="thinker and talker fit equally well",
    ),
    Family(
        "MiniCPM-V 2.6",
        "Qwen2",
        lambda: causal("Qwen2"),
        minicpm_v,
        base="llm.model",
        head="llm.lm_head",
        note="names and shapes by hand, as transformers has no class",
    ),
    Family(
        "MiniCPM-V 4.6",
        "Qwen3.5 text",
        lambda: causal("Qwen3_5", QWEN3_5, "Qwen3_5TextConfig"),
        minicpm_v4_6,
        since=(5, 7),
    ),
)


# ---------------------------------------------------------------- what corresponds to what


def fused_across(config: Any) -> bool:
    """Whether the experts' fused weights are stored as [expert, in, out] in memory."""
    kind = config.model_type
    return kind in ("aria_text", "llama4_text") or (kind == "qwen3_vl_moe_text" and not NEW)


def parts(base: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a view of each weight of a base model, with experts, q, k, v, gate and up all apart."""
    config = getattr(base, "config", None)
    for name, tensor in base.state_dict().items():
        expert = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj|fc[12]\.weight)", name)
        if expert:
            for number, weight in enumerate(tensor):
                rows = weight.T if fused_across(config) else weight
                at = f"{expert[1]}.{number}"
                if expert[2] in ("down_proj", "fc2.weight"):
                    yield f"{at}.down_proj.weight", rows
                    continue
                for part, half in zip(("gate_proj", "up_proj"), rows.chunk(2), strict=True):
                    yield f"{at}.{part}.weight", half
        elif name.endswith(".gate_up_proj.weight"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                yield name.replace("gate_up_proj", part), half
        elif name.endswith(".qkv_proj.weight"):
            heads, shared = config.num_attention_heads, config.num_key_value_heads
            width = tensor.shape[0] // (heads + 2 * shared)
            rows = tensor.split([heads * width, shared * width, shared * width])
            for part, some in zip(("q_proj", "k_proj", "v_proj"), rows, strict=True):
                yield name.replace("qkv_proj", part), some
        else:
            yield name, tensor


@dataclass(frozen=True)
class Counterparts:
    """One weight of the text model and its counterpart; both share storage with their models."""

    name: str
    text: torch.Tensor
    multimodal: torch.Tensor


def counterparts(family: Family, text: Any, multimodal: Any) -> list[Counterparts]:
    """Pair the weights of both models in memory."""
    there = dict(parts(family.language_model(multimodal)))
    found = []
    for name, weight in parts(text.model):
        # A vocabulary that was extended keeps the text model's rows first.
        view = there[family.renamed(name)][: len(weight)]
        found.append(Counterparts(name, weight, view))
    if not text.config.tie_word_embeddings:
        heads = text.lm_head.weight.detach(), multimodal.get_submodule(family.head).weight.detach()
        found.append(Counterparts("lm_head.weight", *heads))
    for pair in found:
        assert pair.text.shape == pair.multimodal.shape, pair.name
    return found


# ---------------------------------------------------------------- planting

Layout = Literal["none", "per expert", "fused", "transposed"]


@dataclass(frozen=True)
class Stored:
    """A checkpoint, and which weight of the text model each of its elements is.

    `elements` has a number for every element that has a counterpart, the same in every layout, and
    0 for the others; `parts` names the weights that a tensor consists of.
    """

    path: Path
    elements: Tensors
    parts: dict[str, frozenset[str]]
    experts: Layout

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(numbers.shape) for name, numbers in self.elements.items()}


@dataclass(frozen=True)
class Planted:
    """A saved pair.

    `added` is what an element of the multimodal model has more than its counterpart, by number.
    `layouts` has the multimodal checkpoint as this transformers saves it ("saved"), under the names
    and shapes in memory ("memory"), and as the family says it is published otherwise.
    """

    family: Family
    reasoning: Stored
    layouts: dict[str, Stored]
    model: Any
    added: torch.Tensor

    @property
    def multimodal(self) -> Stored:
        """The checkpoint as this transformers saves it."""
        return self.layouts["saved"]

    def moved(self, stored: Stored, name: str) -> torch.Tensor:
        """Return what was added to a tensor: zero where it has no counterpart."""
        return self.added[stored.elements[name]]

    def pairs(self, stored: Stored) -> set[tuple[str, str]]:
        """Return which tensors of the two checkpoints have weights in common."""
        whole: dict[str, set[str]] = {}
        for name, held in self.reasoning.parts.items():
            for part in held:
                whole.setdefault(part, set()).add(name)
        return {(a, name) for name, held in stored.parts.items() for p in held for a in whole[p]}

    def load(self) -> Any:
        """Load the multimodal checkpoint as a user does."""
        if isinstance(self.model, HandWritten):
            return self.family.multimodal().load(self.multimodal.path)
        # The own method of Qwen2.5-Omni asks for a file of voices besides.
        load = transformers.PreTrainedModel.from_pretrained.__func__
        return load(type(self.model), self.multimodal.path)


def plant(family: Family, directory: Path, *, shard_size: str = "5GB") -> Planted:
    """Build both models, plant the weights in memory and save them.

    Weights are multiples of 2**-8 below two, so every difference is exact in float32.
    """
    torch.manual_seed(0)
    text, multimodal = family.text().eval(), family.multimodal().eval()
    pairs = counterparts(family, text, multimodal)
    # Saved once with numbers for weights, a checkpoint tells where each element lies in it.
    for model in (text, multimodal):
        for tensor in model.state_dict().values():
            tensor.zero_()
    owners = [""]
    for pair in pairs:
        numbers = torch.arange(pair.text.numel()) + len(owners)
        owners += [pair.name] * len(numbers)
        for view in (pair.text, pair.multimodal):
            view.copy_(numbers.view(view.shape))
    numbered = directory / "numbered"
    text.save_pretrained(numbered / "text")
    text_numbers = read_tensors(numbered / "text")
    multimodal.save_pretrained(numbered / "multimodal")
    saved = read_tensors(numbered / "multimodal")
    ways = {"saved": saved, "memory": in_memory(multimodal)}
    ways |= {way: publish(saved) for way, publish in family.stored.items()}

    added = torch.randint(1, 256, (len(owners),)) / 256
    added[0] = 0
    for model in (text, multimodal):
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randint(-256, 256, tensor.shape) / 256)
    first = 1
    for pair in pairs:
        difference = added[first : first + pair.text.numel()].view(pair.text.shape)
        pair.multimodal.copy_(pair.text + difference)
        first += pair.text.numel()
    paths = {way: directory / way.replace(" ", "-") for way in ways}
    text.save_pretrained(directory / "text", max_shard_size=shard_size)
    multimodal.save_pretrained(paths["saved"], max_shard_size=shard_size)
    rewrite(paths["saved"], in_memory(multimodal), paths["memory"])
    for way, publish in family.stored.items():
        rewrite(paths["saved"], publish(read_tensors(paths["saved"])), paths[way])
    return Planted(
        family,
        describe(directory / "text", text_numbers, owners),
        {way: describe(paths[way], tensors, owners) for way, tensors in ways.items()},
        multimodal,
        added,
    )


def in_memory(model: nn.Module) -> Tensors:
    """Copy a model's tensors under their names in memory, tied ones once."""
    tensors: Tensors = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def rewrite(saved: Path, tensors: Tensors, directory: Path) -> None:
    """Write tensors beside a copy of a saved model's configuration."""
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    for file in saved.glob("*config.json"):
        shutil.copy(file, directory)


def read_tensors(directory: Path) -> Tensors:
    """Read every tensor of a checkpoint."""
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def describe(path: Path, numbered: Tensors, owners: Sequence[str]) -> Stored:
    """Read from a checkpoint's numbers what its tensors consist of."""
    elements = {name: tensor.long() for name, tensor in numbered.items()}
    parts = {
        name: frozenset(owners[number] for number in numbers.unique().tolist() if number)
        for name, numbers in elements.items()
    }
    return Stored(path, elements, parts, expert_layout(elements, owners))


def expert_layout(elements: Tensors, owners: Sequence[str]) -> Layout:
    """Tell how a checkpoint stores experts, from where gate and up lie."""
    for name, numbers in elements.items():
        if re.search(r"\.experts\.\d+\.", name) and numbers.any():
            return "per expert"
        if re.search(r"\.experts\.(gate_up_proj|fc1\.weight)$", name) and numbers.any():
            row = owners[numbers[0, 0, 0]], owners[numbers[0, 0, -1]]
            return "fused" if row[0] == row[1] else "transposed"
    return "none"


# ---------------------------------------------------------------- what must hold


def misplaced(planted: Planted, stored: Stored, delta: Mapping[str, torch.Tensor]) -> list[str]:
    """Return what is wrong with a delta of everything: a tensor that is missing, or another Δ."""
    found = [
        f"{name} is missing" for name, held in stored.parts.items() if held and name not in delta
    ]
    return found + mistaken(planted, stored, delta)


def mistaken(planted: Planted, stored: Stored, delta: Mapping[str, torch.Tensor]) -> list[str]:
    """Return which tensors of a delta are not, element by element, less what was added."""
    found = []
    for name, difference in delta.items():
        if not stored.parts[name]:
            found.append(f"{name} has no counterpart")
        elif not torch.equal(difference, -planted.moved(stored, name)):
            found.append(f"{name} is not its counterpart's difference")
    return found


def miscounted(planted: Planted, stored: Stored, coverage: Any) -> list[str]:
    """Return what is wrong with a coverage of everything: each tensor must be listed, and once."""
    pairs = planted.pairs(stored)
    found = [f"{a} is not of {b}" for a, b in sorted(set(coverage.matched) - pairs)]
    found += [f"{a} of {b} is not listed" for a, b in sorted(pairs - set(coverage.matched))]
    if len(coverage.matched) != len(set(coverage.matched)):
        found.append("a pair is listed twice")
    sides = (
        (planted.reasoning, {a for a, _ in pairs}, coverage.unmatched_reasoning),
        (stored, {b for _, b in pairs}, coverage.unmatched_multimodal),
    )
    for side, matched, unmatched in sides:
        if sorted(name for name, _ in unmatched) != sorted(side.parts.keys() - matched):
            found.append(f"the leftovers of {side.path.name} are not what has no counterpart")
        found += [
            f"there is no reason why {name} is left out" for name, why in unmatched if not why
        ]
    if coverage.fraction != 1.0:
        found.append(f"{coverage.fraction:.1%} are covered")
    return found


def misinjected(
    planted: Planted,
    delta: Any,
    model: nn.Module,
    memory: Stored | None = None,
    *,
    prefix: str = "",
    parts: Collection[str] | None = None,
) -> list[str]:
    """Inject into gradients of zero with α = 1: return which parameters did not move as they must.

    Each element must have moved by what was added to it, and where nothing was, not at all.
    `memory` is the layout that the model has, `prefix` what a wrapper puts before its names, and
    `parts` the weights that the delta has; buffers, which take no gradient, are left out.
    """
    import drift_fast

    memory = memory or planted.layouts["memory"]
    trained = {name for name, _ in planted.model.named_parameters()}
    buffers = {
        n.rpartition(".")[2]
        for n, held in planted.layouts["memory"].parts.items()
        if held and n not in trained
    }
    modules = f"re:^(?!.*({'|'.join(buffers)})$)" if buffers else None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with drift_fast.Injection(
        model, delta, scale="absolute", alpha=1.0, strict=True, modules=modules
    ) as injection:
        injection.step()
    found = []
    for name, parameter in model.named_parameters():
        own = name.removeprefix(prefix)
        expected = planted.moved(memory, own)
        if own.rpartition(".")[2] in buffers or (
            parts is not None and not memory.parts[own] & set(parts)
        ):
            expected = torch.zeros_like(expected)
        if parameter.grad is None or not torch.equal(parameter.grad, expected):
            found.append(f"{name} was not moved by its own difference")
        parameter.grad = None
    return found


def mismatched(planted: Planted, deltas: Mapping[str, Any]) -> list[str]:
    """Return what is wrong when deltas from each layout on disk meet each one in memory.

    Names on disk are one version's or the Hub's, names in memory another's; a class of another
    version is stood in for by a module with its names and shapes.
    """
    import drift_fast

    found, loaded = [], planted.load()
    for disk, delta in deltas.items():
        found += [f"{disk} on disk: {wrong}" for wrong in misinjected(planted, delta, loaded)]
        for memory, layout in planted.layouts.items():
            model = HandWritten(layout.shapes)
            try:
                wrong = misinjected(planted, delta, model, layout)
            except drift_fast.CoverageError:
                if not planted.family.told_by_class or disk == memory:
                    raise
                continue
            found += [f"{disk} on disk, {memory} in memory: {one}" for one in wrong]
    return found
