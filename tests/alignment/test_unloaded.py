"""What no model loads is part of no Δ, no merge and no count, and every verb lists it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import drift_fast
from drift_fast import AlignmentError, DriftWarning, align, check, compute_delta, inspect, merge
from drift_fast.checkpoints.unloaded import is_computed
from support.families import HandWritten
from support.synthetic import (
    Stored,
    language_model,
    moved,
    opaque,
    refused,
    stored,
    write_checkpoint,
)

LAYERS, HIDDEN, INNER, VOCABULARY = 3, 8, 12, 16
LM = "model.language_model."
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
Tensors = dict[str, Stored]


class Sources:
    """A text model and a multimodal one of the same backbone, and what is stored besides."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rng = np.random.default_rng(9)
        self.text = language_model(self.rng, layers=LAYERS, dtype="F32")
        self.vlm = moved(self.rng, self.text)

    def random(self, *shape: int) -> Stored:
        return stored(self.rng.normal(0, 1, shape), "F32")

    def layer(self, name: str, *more: str) -> Tensors:
        """Return a layer at `name`, with further tensors of one dimension in it."""
        inside = {
            one.removeprefix("model.layers.0."): tensor
            for one, tensor in self.text.items()
            if one.startswith("model.layers.0.")
        }
        layer = {f"{name}.{one}": self.random(*tensor.shape) for one, tensor in inside.items()}
        return layer | {f"{name}.{one}": self.random(HIDDEN) for one in more}

    def write(
        self,
        text: Tensors,
        vlm: Tensors,
        text_config: dict[str, Any] | None = None,
        vlm_config: dict[str, Any] | None = None,
    ) -> tuple[Path, Path]:
        found = []
        for side, tensors, config in (
            ("text", self.text | text, text_config),
            ("vlm", self.vlm | vlm, vlm_config),
        ):
            path = write_checkpoint(self.directory / side, tensors)
            (path / "config.json").write_text(json.dumps(CONFIG | (config or {})))
            found.append(path)
        return found[0], found[1]


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path)


NEXTN = ("eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight")
MTP = ("fc.weight", "norm.weight", "pre_fc_norm_embedding.weight")


def further(sources: Sources, how: str, prefix: str) -> tuple[Tensors, dict[str, Any]]:
    """Return tensors that predict further tokens as a family stores them, and its config."""
    if how == "DeepSeek-V3, GLM-4.5":
        # It stores the shared embedding and head once more.
        shared = {
            f"{prefix}layers.{LAYERS}.{name}.weight": sources.random(VOCABULARY, HIDDEN)
            for name in ("embed_tokens", "shared_head.head")
        }
        layer = sources.layer(f"{prefix}layers.{LAYERS}", *NEXTN)
        return layer | shared, {"num_nextn_predict_layers": 1}
    if how == "without a word in config.json":
        return sources.layer(f"{prefix}layers.{LAYERS}", *NEXTN), {}
    if how == "told by config.json only":
        return sources.layer(f"{prefix}layers.{LAYERS}"), {"num_nextn_predict_layers": 1}
    if how == "Qwen3.5":
        mtp = {f"mtp.{one}": sources.random(HIDDEN) for one in MTP}
        return mtp | sources.layer("mtp.layers.0"), {"mtp_num_hidden_layers": 1}
    if how == "MiMo":
        return sources.layer(f"{prefix}mtp_layers.0", "token_layernorm.weight"), {}
    assert how == "Ernie 4.5"
    return sources.layer(f"{prefix}mtp_block.0") | {
        f"{prefix}mtp_linear_proj.0.weight": sources.random(HIDDEN, 2 * HIDDEN)
    }, {}


HOWS = (
    "DeepSeek-V3, GLM-4.5",
    "without a word in config.json",
    "told by config.json only",
    "Qwen3.5",
    "MiMo",
    "Ernie 4.5",
)


@pytest.mark.parametrize("where", ["text", "multimodal", "both"])
@pytest.mark.parametrize("how", HOWS)
def test_layers_that_predict_further_tokens_are_left_out_of_everything(
    sources: Sources, tmp_path: Path, how: str, where: str
) -> None:
    ours, ours_config = further(sources, how, "model.") if where != "multimodal" else ({}, {})
    theirs, theirs_config = further(sources, how, LM) if where != "text" else ({}, {})
    a, b = sources.write(ours, theirs, ours_config, theirs_config)
    everything: dict[str, Any] = {"modules": "all", "rows": "index"}
    delta = compute_delta(a, b, tmp_path / "delta", **everything)
    assert set(delta) == set(sources.vlm)
    coverage = delta.coverage
    assert coverage.fraction == coverage.backbone_fraction == coverage.layers_fraction == 1.0
    assert {n for n, why in coverage.unmatched_reasoning if "further tokens" in why} == set(ours)
    assert {n for n, why in coverage.unmatched_multimodal if "further tokens" in why} == set(theirs)
    assert set(coverage.unmatched_multimodal) == set(
        inspect(a, b, **everything).coverage.unmatched_multimodal
    )

    found = align(a, b)
    assert found.ok
    assert {name for name, _ in found.unmatched_reasoning} == set(ours)
    report = check(a, b, modules="attn")
    assert report.ok
    assert "further tokens" in report.table()

    merged = merge("linear", a, b, tmp_path / "merged", weight=0.5, rows="index")
    assert set(merged.merged) == set(sources.vlm)
    assert set(merged.copied) == set(theirs)
    assert all("further tokens" in one.reason for one in merged.tensors if one.name in theirs)

    model = HandWritten({name: one.shape for name, one in (sources.vlm | theirs).items()})
    injection = drift_fast.Injection(model, delta, modules="attn")
    assert len(injection.coverage.matched) == 4 * LAYERS
    injection.remove()


def test_the_layers_of_a_model_that_only_says_so_are_all_there(sources: Sources) -> None:
    # The layer was lost in fine-tuning, and config.json still counts it.
    a, b = sources.write({}, {}, {"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 1})
    delta = compute_delta(a, b, modules="attn")
    assert len(delta) == 4 * LAYERS
    assert not any("further" in why for _, why in delta.coverage.unmatched_reasoning)


def test_layers_beyond_those_that_both_configurations_state_are_left_out(sources: Sources) -> None:
    a, b = sources.write(sources.layer(f"model.layers.{LAYERS}"), {})
    for _ in range(2):
        delta = compute_delta(a, b, modules="attn")
        assert len(delta) == 4 * LAYERS
        reasons = [why for _, why in delta.coverage.unmatched_reasoning]
        assert sum("config.json states" in why for why in reasons) == 9
        (b / "config.json").unlink(missing_ok=True)


def test_advice_about_layers_works_when_it_is_followed(sources: Sources) -> None:
    """Both have one layer more than one of them states, so `check` says what to do."""
    a, b = sources.write(
        sources.layer(f"model.layers.{LAYERS}"),
        sources.layer(f"{LM}layers.{LAYERS}"),
        None,
        {"num_hidden_layers": LAYERS + 1},
    )
    note = next(one for one in check(a, b).findings if one.subject == "layers on disk")
    advised = re.search(r"layers=([\d-]+)", note.message)
    assert advised is not None
    with pytest.warns(DriftWarning, match="layers"):
        delta = compute_delta(a, b, modules="attn", layers=advised[1], check_weights=False)
    assert len(delta) == 4 * LAYERS


def test_a_deeper_model_is_refused_and_layers_of_another_part_are_not_counted(
    sources: Sources,
) -> None:
    deeper = {"num_hidden_layers": LAYERS + 1}
    a, b = sources.write(sources.layer(f"model.layers.{LAYERS}"), {}, deeper)
    with refused(AlignmentError, "layer counts differ"):
        compute_delta(a, b, modules="attn")
    # A talker has layers too, and config.json counts those of the thinker.
    talker = sources.layer(f"talker.layers.{LAYERS + 4}")
    a, b = sources.write({}, talker)
    coverage = compute_delta(a, b, modules="attn").coverage
    assert not any("left out" in why for _, why in coverage.unmatched_multimodal)


def test_a_mapping_may_still_pair_what_no_model_loads(sources: Sources) -> None:
    a, b = sources.write(sources.layer("mtp.layers.0"), sources.layer("mtp.layers.0"))
    mapping = [("model", "model.language_model"), ("mtp", "mtp")]
    delta = compute_delta(a, b, modules="attn", mapping=mapping, check_weights=False)
    assert sum(name.startswith("mtp.") for name in delta) == 4
    delta = compute_delta(a, b, modules="attn", mapping=mapping[:1])
    assert len(delta) == 4 * LAYERS


def test_a_map_that_leaves_out_what_no_model_loads_is_taken(
    sources: Sources, tmp_path: Path
) -> None:
    a, b = sources.write(sources.layer("mtp.layers.0"), {})
    align(a, b).save(tmp_path / "map.json")
    assert len(compute_delta(a, b, modules="attn", mapping=tmp_path / "map.json")) == 4 * LAYERS


# ------------------------------------------------------------------ buffers

BUFFERS = {
    "layers.0.self_attn.rotary_emb.inv_freq": ("F32", (4,)),
    "rotary_emb.inv_freq": ("F32", (4,)),
    "layers.0.attn.bias": ("BOOL", (1, 1, 6, 6)),
    "layers.1.attn.bias": ("U8", (1, 1, 6, 6)),
    "layers.0.attention.bias": ("F32", (1, 1, 6, 6)),
    "layers.0.attn.masked_bias": ("F32", ()),
    "embeddings.position_ids": ("I64", (1, 6)),
    "layers.0.self_attn.rotary_emb.cos_cached": ("F32", (6, 4)),
    "rope.freqs": ("F32", (4,)),
    "layers.0.self_attn.mask": ("BOOL", (6, 6)),
}


@pytest.mark.parametrize("where", ["text", "multimodal", "both"])
def test_buffers_that_a_model_computes_are_left_out_of_everything(
    sources: Sources, tmp_path: Path, where: str
) -> None:
    held = {name: opaque(dtype, *shape) for name, (dtype, shape) in BUFFERS.items()}
    ours = {f"model.{name}": one for name, one in held.items()} if where != "multimodal" else {}
    theirs = {f"{LM}{name}": one for name, one in held.items()} if where != "text" else {}
    a, b = sources.write(ours, theirs)
    delta = compute_delta(a, b, modules="all", rows="index")
    assert set(delta) == set(sources.vlm)
    assert delta.coverage.fraction == delta.coverage.backbone_fraction == 1.0
    assert {n for n, why in delta.coverage.unmatched_reasoning if "buffer" in why} == set(ours)
    assert align(a, b).ok
    assert "buffer" in check(a, b).table()
    merged = merge("linear", a, b, tmp_path / "merged", weight=0.5, rows="index")
    assert set(merged.merged) == set(sources.vlm)
    assert set(merged.copied) == set(theirs)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "F32", (8,)),
        ("h.0.attn.c_attn.bias", "F32", (24,)),
        ("model.layers.0.attention.bias", "F32", (8,)),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "F32", (4,)),
        ("model.language_model.layers.0.layer_scalar", "F32", (1,)),
        ("visual.position_embedding.weight", "F32", (4, 8)),
        ("model.layers.0.self_attn.q_proj.qweight", "I32", (4, 8)),
    ],
)
def test_weights_are_not_taken_for_buffers(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    assert not is_computed(name, dtype, shape)


def test_a_pattern_that_names_a_buffer_means_it(sources: Sources) -> None:
    frequencies = "layers.0.self_attn.rotary_emb.inv_freq"
    a, b = sources.write(
        {f"model.{frequencies}": stored([4.0, 2.0], "F32")},
        {f"{LM}{frequencies}": stored([1.0, 1.0], "F32")},
    )
    delta = compute_delta(a, b, modules=["attn", "re:inv_freq"], dtype="float32")
    assert torch.equal(delta[LM + frequencies], torch.tensor([3.0, 1.0]))
    # Only one of the two stores it: a pattern that covers more does not ask for it.
    a, b = sources.write({f"model.{frequencies}": stored([4.0, 2.0], "F32")}, {})
    assert len(compute_delta(a, b, modules="re:self_attn")) == 4 * LAYERS
