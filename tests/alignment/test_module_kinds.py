"""A preset selects what is attention or MLP in each family, or says that it does not."""

from __future__ import annotations

import ast
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import drift_fast
from drift_fast import (
    AlignmentError,
    CoverageError,
    DriftWarning,
    check,
    compute_delta,
    inspect,
    merge,
)
from drift_fast.alignment.coverage import Coverage
from drift_fast.cli.main import main
from drift_fast.names import bare, kind_of, may_be_missed, module_of
from drift_fast.selection import Selection
from support.families import HandWritten
from support.synthetic import (
    Stored,
    language_model,
    moved,
    projector,
    refused,
    vision_tower,
    write_checkpoint,
)

Renamed = dict[str, str]

# Names of a Llama layer, and those of other families in their place.
FAMILIES: dict[str, tuple[Renamed, dict[str, set[str]]]] = {
    "Phi": (
        {
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        },
        {"attn": {"self_attn.dense"}, "mlp": {"mlp.fc1", "mlp.fc2"}},
    ),
    "InternLM2": (
        {
            "self_attn.q_proj": "attention.wqkv",
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
            "input_layernorm": "attention_norm",
        },
        {
            "attn": {"attention.wqkv", "attention.wo"},
            "mlp": {"feed_forward.w1", "feed_forward.w2", "feed_forward.w3"},
            "norm": {"attention_norm"},
        },
    ),
    "GPT-2": (
        {
            "self_attn.q_proj": "attn.c_attn",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
            "input_layernorm": "ln_1",
        },
        {
            "attn": {"attn.c_attn", "attn.c_proj"},
            "mlp": {"mlp.c_fc", "mlp.c_proj"},
            "norm": {"ln_1"},
        },
    ),
    "GPT-NeoX": (
        {
            "self_attn.q_proj": "attention.query_key_value",
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        {
            "attn": {"attention.query_key_value", "attention.dense"},
            "mlp": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        },
    ),
    "Falcon, Bloom, ChatGLM": (
        {
            "self_attn.q_proj": "self_attention.query_key_value",
            "self_attn.o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "input_layernorm": "ln_attn",
        },
        {
            "attn": {"self_attention.query_key_value", "self_attention.dense"},
            "mlp": {"mlp.dense_h_to_4h"},
            "norm": {"ln_attn"},
        },
    ),
    "MPT": (
        {
            "self_attn.q_proj": "attn.Wqkv",
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "ffn.up_proj",
            "mlp.down_proj": "ffn.down_proj",
            "input_layernorm": "norm_1",
        },
        {
            "attn": {"attn.Wqkv", "attn.out_proj"},
            "mlp": {"ffn.up_proj", "ffn.down_proj"},
            "norm": {"norm_1"},
        },
    ),
    "OPT": (
        {"self_attn.o_proj": "self_attn.out_proj", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2"},
        {"attn": {"self_attn.out_proj"}, "mlp": {"fc1", "fc2"}},
    ),
    "Baichuan": ({"self_attn.q_proj": "self_attn.W_pack"}, {"attn": {"self_attn.W_pack"}}),
}


def renamed(tensors: dict[str, Stored], table: Renamed) -> dict[str, Stored]:
    for old, new in table.items():
        tensors = {name.replace(f".{old}.", f".{new}."): one for name, one in tensors.items()}
    return tensors


def write_renamed(directory: Path, table: Renamed, **model: Any) -> tuple[Path, Path]:
    rng = np.random.default_rng(3)
    text = renamed(language_model(rng, **model), table)
    vlm = {**vision_tower(rng), **projector(rng), **moved(rng, text)}
    return write_checkpoint(directory / "text", text), write_checkpoint(directory / "vlm", vlm)


# ------------------------------------------------------------------ what presets select


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_takes_all_projections_whatever_a_family_calls_them(
    tmp_path: Path, family: str
) -> None:
    table, expected = FAMILIES[family]
    sources = write_renamed(tmp_path, table)
    for preset, modules in expected.items():
        delta = compute_delta(*sources, modules=preset)
        assert modules <= {module_of(name) for name in delta}, preset
    # Nothing is left of attention and MLP, and nothing has to be said of it.
    rest = inspect(*sources, modules=("attn", "mlp"), rows="index").coverage.unmatched_multimodal
    left = {module_of(name) for name, why in rest if why == "not selected" and ".layers." in name}
    assert all(re.search(r"norm|ln_", module) for module in left)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer.h.0.attn.c_proj.bias", "attn"),
        ("h.0.attn.attention.k_proj.weight", "attn"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", "attn"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attn"),
        ("transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight", "attn"),
        ("model.layers.0.attn.in_proj_weight", "attn"),
        ("block.0.layer.0.SelfAttention.q.weight", "attn"),
        ("block.0.layer.1.DenseReluDense.wi_0.weight", "mlp"),
        ("model.layers.0.block_sparse_moe.input_linear.weight", "mlp"),
        ("model.layers.0.mlp.shared_mlp.up_proj.weight", "mlp"),
        ("transformer.blocks.0.ffn.experts.mlp.v1", "mlp"),
        ("gpt_neox.embed_in.weight", "embed"),
        ("language_model.output.weight", "head"),
        ("transformer.output_layer.weight", "head"),
        ("model.layers.0.attention.output.weight", "attn"),
        # What chooses, what is convolved, where a token is: none of it is a projection.
        ("model.layers.0.mlp.gate.weight", "other"),
        ("model.layers.0.mlp.gate.wg.weight", "other"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "other"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "other"),
        ("model.layers.0.feed_forward.router.weight", "other"),
        ("model.layers.0.block_sparse_moe.router.layer.weight", "other"),
        ("model.layers.0.linear_attn.conv1d.weight", "other"),
        ("model.layers.0.linear_attn.A_log", "other"),
        ("model.layers.0.self_attn.indexer.wq_b.weight", "other"),
        ("model.layers.0.self_attn.sinks", "other"),
        ("block.0.layer.0.SelfAttention.relative_attention_bias.weight", "other"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "other"),
        ("h.0.attn.bias", "other"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.0.self_attn.kv_a_layernorm.weight", "norm"),
    ],
)
def test_the_place_in_a_layer_decides_where_the_name_does_not(name: str, kind: str) -> None:
    assert kind_of(name) == kind
    assert not (name.endswith(".weight") and may_be_missed(name, ("attn", "mlp")))


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.model.layers.0.self_attn.q_proj.weight",
        "_orig_mod.model.layers.0.self_attn._orig_mod.q_proj.weight",
        "_forward_module.model.layers.0.self_attn.q_proj.module.weight",
        "model.layers.0._checkpoint_wrapped_module.self_attn._fsdp_wrapped_module.q_proj.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
    ],
)
def test_wrappers_are_no_part_of_a_name_wherever_they_are(wrapped: str) -> None:
    assert (kind_of(wrapped), module_of(wrapped)) == ("attn", "self_attn.q_proj")
    for pattern in (r"re:^model\.layers\.0\.self_attn\.q_proj\.", "re:" + re.escape(wrapped)):
        assert wrapped in Selection.parse(pattern, None)


@pytest.mark.parametrize(
    "place",
    [
        ("", "_orig_mod."),
        (".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        ("_proj.", "_proj.module."),
    ],
)
def test_a_checkpoint_saved_with_wrappers_gives_the_delta_of_one_without(
    tmp_path: Path, place: tuple[str, str]
) -> None:
    rng = np.random.default_rng(5)
    text = language_model(rng)
    vlm = moved(rng, text)
    plain = write_checkpoint(tmp_path / "text", text), write_checkpoint(tmp_path / "vlm", vlm)
    wrapped = {
        (place[1] + name if not place[0] else name.replace(*place)): one
        for name, one in vlm.items()
    }
    other = write_checkpoint(tmp_path / "wrapped", wrapped)
    options: dict[str, Any] = {"modules": "attn,mlp,norm,embed,head", "rows": "index"}
    expected = compute_delta(*plain, **options)
    found = compute_delta(plain[0], other, **options)
    assert len(found) == len(expected) == len(text)
    for name in found:
        assert torch.equal(found[name], expected[bare(name)])


# Around each layer, around each of its parts, around each projection.
UNKNOWN_WRAPPERS = [
    (r"(layers\.\d+)\.", r"\1._guard_inner."),
    (r"(self_attn|mlp)\.", r"\1.wrapped."),
    (r"(_proj)\.", r"\1.inner."),
]


@pytest.mark.parametrize("side", ["reasoning", "multimodal"])
@pytest.mark.parametrize("place", UNKNOWN_WRAPPERS, ids=["layer", "part", "projection"])
def test_an_unknown_wrapper_that_repeats_in_every_layer_is_no_part_of_a_name(
    tmp_path: Path, place: tuple[str, str], side: str
) -> None:
    rng = np.random.default_rng(5)
    text = language_model(rng)
    vlm = moved(rng, text)
    sides = {"reasoning": text, "multimodal": vlm}
    sides[side] = {re.sub(*place, name): one for name, one in sides[side].items()}
    assert sides[side].keys() != (text if side == "reasoning" else vlm).keys()
    a = write_checkpoint(tmp_path / "a", sides["reasoning"])
    b = write_checkpoint(tmp_path / "b", sides["multimodal"])
    plain = write_checkpoint(tmp_path / "text", text), write_checkpoint(tmp_path / "vlm", vlm)
    options: dict[str, Any] = {"modules": "attn,mlp,norm", "dtype": "float32"}
    expected, found = compute_delta(*plain, **options), compute_delta(a, b, **options)
    given = {name if side == "reasoning" else re.sub(*place, name): name for name in expected}
    assert set(found) == set(given)
    assert all(torch.equal(found[name], expected[own]) for name, own in given.items())
    assert found.coverage.fraction == 1.0

    delta = compute_delta(*plain, tmp_path / "delta", modules="attn,mlp", dtype="float32")
    model = HandWritten({re.sub(*place, name): one.shape for name, one in vlm.items()})
    matches = drift_fast.match_parameters(model, delta)
    assert matches == {re.sub(*place, name): name for name in delta}


def test_a_component_that_some_matrices_lack_is_not_taken_for_a_wrapper(tmp_path: Path) -> None:
    # A shared expert is not a dense MLP, although its shapes are.
    rng = np.random.default_rng(5)
    text = language_model(rng)
    vlm = {name.replace(".mlp.", ".mlp.shared."): one for name, one in moved(rng, text).items()}
    sources = write_checkpoint(tmp_path / "a", text), write_checkpoint(tmp_path / "b", vlm)
    with refused(AlignmentError, "mlp.gate_proj", "no match"):
        compute_delta(*sources)


# ------------------------------------------------------------------ a preset that selects nothing

# Attention under a name that nothing knows.
UNKNOWN = {f"self_attn.{one}_proj": f"mixer.{one}" for one in "qkvo"}


def test_a_preset_that_selects_nothing_beside_one_that_does_is_refused_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = write_renamed(tmp_path, UNKNOWN)
    words = ("attn selects none", "mlp", "mixer.q")
    for modules in ("attn,mlp", ["attn", "mlp"], ("mlp", "attn")):
        with refused(CoverageError, *words):
            compute_delta(*sources, tmp_path / "delta", modules=modules)
    with refused(CoverageError, *words):
        compute_delta(*sources, strict=False)
    with refused(CoverageError, *words):
        inspect(*sources)
    with refused(CoverageError, *words):
        merge("linear", *sources, tmp_path / "merged", weight=0.5, modules="attn,mlp")
    report = check(*sources, modules="attn,mlp")
    assert not report.ok
    assert "attn selects none" in report.table()
    assert main(["delta", *map(str, sources), "--out", str(tmp_path / "delta")]) == 1
    assert "attn selects none" in capsys.readouterr().err
    assert not (tmp_path / "delta").exists()
    assert not (tmp_path / "merged").exists()


def test_each_remedy_of_a_preset_that_selects_nothing_works(tmp_path: Path) -> None:
    sources = write_renamed(tmp_path, UNKNOWN)
    with pytest.raises(CoverageError) as error:
        compute_delta(*sources, modules="attn,mlp")
    advised = re.search(r"modules=(\[.*\])", str(error.value))
    assert advised is not None
    delta = compute_delta(*sources, modules=ast.literal_eval(advised[1]))
    assert len(delta) == 2 * 7
    with pytest.warns(DriftWarning, match="mixer") as caught:
        assert len(compute_delta(*sources, modules="mlp")) == 2 * 3
    advised = re.search(r"such as ('re:.*')", str(caught[0].message))
    assert advised is not None
    delta = compute_delta(*sources, modules=["mlp", ast.literal_eval(advised[1])])
    assert len(delta) == 2 * 7


def test_embeddings_are_in_no_layer_and_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    sources = write_renamed(tmp_path, {}, head=None)
    with refused(CoverageError, "embed selects none", "leave layers out"):
        compute_delta(*sources, modules="attn,embed", layers=0, rows="index")
    with refused(CoverageError, "head selects none", "'embed'"):
        compute_delta(*sources, modules="attn,head", rows="index")
    delta = compute_delta(*sources, modules="attn,embed,head", rows="index")
    assert any("embed_tokens" in name for name in delta)


def test_a_model_may_lack_what_is_selected_by_default_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    text = {name: one for name, one in language_model(rng).items() if ".mlp." not in name}
    vlm = moved(rng, text)
    sources = write_checkpoint(tmp_path / "a", text), write_checkpoint(tmp_path / "b", vlm)
    assert len(compute_delta(*sources)) == 8
    with refused(CoverageError, "mlp selects none"):
        compute_delta(*sources, modules="attn,mlp")


def test_an_injection_refuses_a_preset_that_the_delta_does_not_have(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    text = language_model(rng, dtype="F32")
    vlm = moved(rng, text)
    sources = write_checkpoint(tmp_path / "a", text), write_checkpoint(tmp_path / "b", vlm)
    delta = compute_delta(*sources, modules="attn")
    model = HandWritten({name: one.shape for name, one in vlm.items()})
    with refused(CoverageError, "mlp selects none", "8 attn"):
        drift_fast.Injection(model, delta, modules=("attn", "mlp"))
    injection = drift_fast.Injection(model, delta, modules="attn")
    assert injection.coverage.layers_fraction < injection.coverage.fraction == 1.0
    injection.remove()


# ------------------------------------------------------------------ what no preset claims


def test_a_matrix_that_no_preset_claims_is_warned_of_and_in_the_coverage(tmp_path: Path) -> None:
    sources = write_renamed(
        tmp_path, {"self_attn.o_proj": "merge_heads", "mlp.up_proj": "mlp.gate"}
    )
    with pytest.warns(DriftWarning, match=r"merge_heads \(2\).*pattern") as caught:
        coverage = compute_delta(*sources, modules="attn").coverage
    assert [one.category for one in caught] == [DriftWarning]
    assert "mlp.gate" not in str(caught[0].message)
    # A router is known to be neither, and is counted all the same.
    assert {module_of(name) for name in coverage.unclaimed} == {"merge_heads", "mlp.gate"}
    assert "merge_heads (2)" in str(coverage)
    assert "merge_heads" in check(*sources, modules="attn").table()
    assert Coverage.from_dict(json.loads(json.dumps(coverage.to_dict()))) == coverage


def test_what_is_selected_by_a_pattern_or_not_asked_for_is_not_warned_of(tmp_path: Path) -> None:
    sources = write_renamed(
        tmp_path, {"self_attn.o_proj": "merge_heads", "mlp.up_proj": "mlp.gate"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        for modules in (["attn", "re:merge_heads"], "re:self_attn", "all", "norm"):
            compute_delta(*sources, modules=modules, rows="index")


def test_coverage_is_stated_over_the_paired_layers_too(tmp_path: Path) -> None:
    sources = write_renamed(tmp_path, {})
    hidden, inner, layers = 8, 12, 2
    attention, layer = 4 * hidden**2, 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    coverage = compute_delta(*sources, modules="attn").coverage
    assert coverage.fraction == 1.0
    assert coverage.layers_numel == layers * layer
    assert coverage.layers_matched_numel == layers * attention
    assert f"{attention / layer:.1%} of the paired layers'" in str(coverage)
    assert compute_delta(*sources, modules="all", rows="index").coverage.layers_fraction == 1.0


def test_check_says_what_each_preset_selects(tmp_path: Path) -> None:
    report = check(*write_renamed(tmp_path, FAMILIES["InternLM2"][0]), modules="attn,mlp")
    table = report.table()
    assert "attn selects 8 tensors: attention.wo, attention.wqkv, self_attn.k_proj" in table
    assert "mlp selects 6 tensors: feed_forward.w1, feed_forward.w2, feed_forward.w3" in table
    assert report.to_dict()["selected"]["attn"]["attention.wqkv"] == 2


class Inner(nn.Module):
    """What activation checkpointing does to the names of one part of each layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = model


def test_a_model_whose_attention_is_wrapped_in_memory_is_injected_into(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    text = language_model(rng, dtype="F32")
    vlm = moved(rng, text)
    sources = write_checkpoint(tmp_path / "a", text), write_checkpoint(tmp_path / "b", vlm)
    delta = compute_delta(*sources, dtype="float32")
    model = HandWritten({name: one.shape for name, one in vlm.items()})
    for number in (0, 1):
        layer = model.get_submodule(f"model.language_model.layers.{number}")
        layer.self_attn = Inner(layer.get_submodule("self_attn"))
    matches = drift_fast.match_parameters(model, delta)
    assert len(matches) == len(delta) == 14
    assert sum("_checkpoint_wrapped_module" in name for name in matches) == 8
