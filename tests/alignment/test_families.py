"""Every family of multimodal models is paired right with a text model of its backbone, or refused.

Real classes are planted (`families.py`): every element of Δ is known beforehand, on disk and in the
gradients of the model in memory, whichever way transformers names and stores its weights.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drift_fast
from drift_fast import AlignmentError, CoverageError
from drift_fast.cli.main import main
from drift_fast.names import is_other_modality, kind_of
from support.families import (
    FAMILIES,
    LAYERS,
    Family,
    HandWritten,
    Planted,
    causal,
    counterparts,
    miscounted,
    misinjected,
    mismatched,
    misplaced,
    mistaken,
    plant,
    read_tensors,
    rewrite,
)

BY_SLUG = {family.slug: family for family in FAMILIES}
ALIGNED = [family for family in FAMILIES if family.expected == "aligned"]
REFUSED = [family for family in FAMILIES if family.expected == "refused"]
EVERYTHING: dict[str, Any] = {"modules": "all", "rows": "index", "dtype": "float32"}
TABLE = Path(__file__).parents[2] / "docs" / "families.md"


class Case:
    """A planted family, and deltas from each way in which its checkpoint is stored."""

    def __init__(self, planted: Planted) -> None:
        self.planted = planted
        self._deltas: dict[str, drift_fast.Delta] = {}

    def delta(self, way: str = "saved") -> drift_fast.Delta:
        """Compute the delta of everything once, written and opened again."""
        if way not in self._deltas:
            stored = self.planted.layouts[way]
            out = stored.path.parent / f"delta-{stored.path.name}"
            self._deltas[way] = drift_fast.compute_delta(
                self.planted.reasoning.path, stored.path, out, **EVERYTHING
            )
        return self._deltas[way]


def planted_in(factory: pytest.TempPathFactory, family: Family) -> Planted:
    if family.missing:
        pytest.skip(family.missing)
    # In turn one file and many, which the alignment must not notice.
    shard_size = "5GB" if FAMILIES.index(family) % 2 else "20KB"
    planted = plant(family, factory.mktemp("planted"), shard_size=shard_size)
    shards = len(list(planted.multimodal.path.glob("*.safetensors")))
    assert shards == 1 or shard_size == "20KB"
    assert shards > 1 or shard_size == "5GB" or isinstance(planted.model, HandWritten)
    return planted


@pytest.fixture(scope="module", params=ALIGNED, ids=lambda family: family.slug)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(planted_in(tmp_path_factory, request.param))


@pytest.fixture(scope="module", params=REFUSED, ids=lambda family: family.slug)
def refused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(planted_in(tmp_path_factory, request.param))


def of_family(slug: str, factory: pytest.TempPathFactory) -> Case:
    return Case(planted_in(factory, BY_SLUG[slug]))


# ------------------------------------------------------------------ the planting itself


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.slug)
def test_counterparts_compute_the_same_function(family: Family) -> None:
    """What is called a counterpart is one: with equal weights both backbones give equal states."""
    if family.missing:
        pytest.skip(family.missing)
    text, multimodal = family.text().eval(), family.multimodal().eval()
    base = family.language_model(multimodal)
    if isinstance(multimodal, HandWritten):
        pytest.skip("written by hand, it has names and shapes but computes nothing")
    torch.manual_seed(3)
    for pair in counterparts(family, text, multimodal):
        pair.text.copy_(torch.randn(pair.text.shape) / 2)
        pair.multimodal.copy_(pair.text)
    ids = torch.arange(3, 15)[None]
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad():
        mine, theirs = text.model(**options), base(**options)
    torch.testing.assert_close(theirs.last_hidden_state, mine.last_hidden_state)


def test_a_saved_model_is_loaded_with_the_planted_weights(case: Case) -> None:
    loaded = dict(case.planted.load().named_parameters())
    for name, parameter in case.planted.model.named_parameters():
        assert torch.equal(loaded[name], parameter), name


# ------------------------------------------------------------------ disk against disk


def test_every_tensor_of_the_delta_is_the_difference_of_counterparts(case: Case) -> None:
    for way, stored in case.planted.layouts.items():
        assert misplaced(case.planted, stored, case.delta(way)) == [], way


def test_the_coverage_lists_every_tensor_of_both_sides_once(case: Case) -> None:
    for way, stored in case.planted.layouts.items():
        assert miscounted(case.planted, stored, case.delta(way).coverage) == [], way


def test_nothing_but_the_backbone_is_in_a_delta_of_attention_mlp_and_norms(case: Case) -> None:
    planted, stored = case.planted, case.planted.multimodal
    delta = drift_fast.compute_delta(
        planted.reasoning.path, stored.path, modules=("attn", "mlp", "norm"), dtype="float32"
    )
    assert mistaken(planted, stored, delta) == []
    projections = re.compile(r"\.(self_attn|mlp|feed_forward)\..*_proj\.")
    wanted = {n for n, held in stored.parts.items() if any(projections.search(p) for p in held)}
    assert wanted <= set(delta)


# The names of these families alone say what is selected, and a Δ of them is what it always was.
KINDS = {
    "norm": r"(^|[._])(layer_?norm|rms_?norm|norm|ln)(_?[a-z0-9]+)?\.(weight|bias)$",
    "embed": r"(^|\.)(embed_tokens(_per_layer)?|wte|word_embeddings|tok_embeddings)\.weight$",
    "head": r"(^|\.)(lm_head|embed_out)\.(weight|bias)$",
    "attn": r"(^|\.)(self_attn|self_attention|attention|attn)\."
    r"(q|k|v|o|qkv|out|kv_a|kv_b|q_a|q_b)_proj(_with_mqa)?\.(weight|bias)$"
    r"|(^|\.)linear_attn\.(in_proj\w*|out_proj)\.(weight|bias)$",
    "mlp": r"(^|\.)(mlp|feed_forward|block_sparse_moe)\.(.+\.)?"
    r"((gate|up|down|gate_up)_proj|w[123]|fc[12])(\.(weight|bias)|_bias)?$",
}


def test_presets_select_by_name_alone_what_they_always_did(case: Case) -> None:
    planted = case.planted
    for stored in (planted.reasoning, *planted.layouts.values()):
        for name in stored.parts:
            kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, name))
            expected = "other" if is_other_modality(name) else next(kinds, "other")
            assert kind_of(name) == expected, name


def test_the_attention_preset_takes_linear_attention_too(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # Three layers in four of Qwen3.5 have no other; a preset without it would be a silent skip.
    planted = of_family("qwen3.5-qwen3.5-text", tmp_path_factory).planted
    delta = drift_fast.compute_delta(
        planted.reasoning.path, planted.multimodal.path, modules="attn", dtype="float32"
    )
    linear = {name for name in planted.multimodal.parts if ".linear_attn.in_proj" in name}
    assert linear
    assert linear <= set(delta)


# ------------------------------------------------------------------ delta against memory


class Wrapped(nn.Module):
    """What DDP (`module`) and torch.compile (`_orig_mod`) do to names."""

    def __init__(self, model: nn.Module, attribute: str) -> None:
        super().__init__()
        self.add_module(attribute, model)


def test_each_parameter_in_memory_is_moved_by_its_own_delta(case: Case) -> None:
    planted = case.planted
    assert misinjected(planted, case.delta(), planted.load()) == []


@pytest.mark.parametrize("attribute", ["module", "_orig_mod"])
def test_a_wrapped_model_is_moved_likewise(case: Case, attribute: str) -> None:
    planted, prefix = case.planted, f"{attribute}."
    model = Wrapped(planted.load(), attribute)
    assert misinjected(planted, case.delta(), model, prefix=prefix) == []


def test_a_delta_reaches_the_model_however_either_is_named_and_stored(case: Case) -> None:
    deltas = {way: case.delta(way) for way in case.planted.layouts}
    assert mismatched(case.planted, deltas) == []


# ------------------------------------------------------------------ refusals


def test_a_pair_without_one_right_answer_is_refused_with_what_stands_in_its_way(
    refused: Case, tmp_path: Path
) -> None:
    planted = refused.planted
    for stored in planted.layouts.values():
        for modules in ("attn", ("attn", "mlp", "norm")):
            with pytest.raises(AlignmentError) as error:
                drift_fast.compute_delta(
                    planted.reasoning.path, stored.path, tmp_path / "delta", modules=modules
                )
            for name in planted.family.names:
                assert name in str(error.value), name
    assert not (tmp_path / "delta").exists()


@pytest.fixture(scope="module")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return of_family("mllama-llama", tmp_path_factory).planted


def test_mllama_is_aligned_when_the_map_of_layers_is_given(mllama: Planted, tmp_path: Path) -> None:
    stored = mllama.multimodal
    # Its embedding has rows besides the text model's, so it is no pair of whole tensors.
    layers = {a: b for a, b in mllama.pairs(stored) if "embed_tokens" not in a}
    file = tmp_path / "map.json"
    command = ["align", str(mllama.reasoning.path), str(stored.path), "--out", str(file)]
    assert main(command) == 0
    for mapping in (layers, layers.get, file):
        delta = drift_fast.compute_delta(
            mllama.reasoning.path,
            stored.path,
            modules=("attn", "mlp", "norm"),
            dtype="float32",
            mapping=mapping,
        )
        assert len(delta) == 9 * LAYERS + 1
        assert mistaken(mllama, stored, delta) == []
        parts = {part for name in delta for part in stored.parts[name]}
        assert misinjected(mllama, delta, mllama.load(), parts=parts) == []


def test_a_map_may_pair_an_embedding_that_has_more_rows(mllama: Planted) -> None:
    stored = mllama.multimodal
    delta = drift_fast.compute_delta(
        mllama.reasoning.path, stored.path, mapping=dict(mllama.pairs(stored)), **EVERYTHING
    )
    # Rows that only the multimodal model has are zero, being no one's difference.
    assert misplaced(mllama, stored, delta) == []


def test_the_thinker_is_aligned_when_it_is_pointed_out(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    planted = of_family("qwen2.5-omni-equal-talker-qwen2", tmp_path_factory).planted
    delta = drift_fast.compute_delta(
        planted.reasoning.path,
        planted.multimodal.path,
        mapping=[("model.", "thinker.model."), ("lm_head.", "thinker.lm_head.")],
        **EVERYTHING,
    )
    assert misplaced(planted, planted.multimodal, delta) == []
    assert misinjected(planted, delta, planted.load()) == []


def test_experts_whose_shape_does_not_tell_how_they_lie_are_never_mixed_up(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """With hidden = 2 × intermediate gate_up is square; the right answer or a refusal will do."""
    planted = of_family("qwen3-vl-moe-square-gate-up-qwen3-moe", tmp_path_factory).planted
    saved = planted.multimodal
    path = saved.path.parent / "turned"
    rewrite(saved.path, turned(read_tensors(saved.path)), path)
    other = replace(saved, path=path, elements=turned(saved.elements))
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in other.shapes
    try:
        delta = drift_fast.compute_delta(planted.reasoning.path, path, **EVERYTHING)
    except AlignmentError as error:
        if "gate_up_proj" in str(error):
            return
        raise
    assert misplaced(planted, other, delta) == []
    assert misinjected(planted, delta, HandWritten(other.shapes), other) == []
    assert misinjected(planted, delta, planted.load()) == []


def turned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Lay experts, which alone have three dimensions, the other way."""
    return {
        name: tensor.transpose(1, 2).contiguous() if tensor.ndim == 3 else tensor
        for name, tensor in tensors.items()
    }


# ------------------------------------------------------------------ what the public code does


def hooks_of_the_public_code(text: nn.Module, multimodal: nn.Module) -> int:
    """Count the hooks that looking text-model paths up in the multimodal model gives.

    The public code takes each attention module's path in the text model, looks it up among the
    multimodal model's modules, and goes on to the next where there is none.
    """
    modules = dict(multimodal.named_modules())
    hooks = 0
    for path, _ in text.named_modules():
        if not re.search(r"self_attn\.[qkvo]_proj$", path):
            continue
        module = modules.get(path)
        if module is None:
            continue
        hooks += 1
    return hooks


def test_the_lookup_that_finds_nothing_in_silence_cannot_happen_here(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = of_family("qwen2.5-vl-qwen2", tmp_path_factory)
    text, model = case.planted.family.text(), case.planted.load()
    assert hooks_of_the_public_code(text, text) == 4 * LAYERS
    assert hooks_of_the_public_code(text, model) == 0

    delta = drift_fast.compute_delta(
        case.planted.reasoning.path, case.planted.multimodal.path, modules="attn", dtype="float32"
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    injection = drift_fast.Injection(model, delta, scale="absolute")
    injection.step()
    # Four weights and three biases in each layer.
    assert injection.injected == 7 * LAYERS
    assert sum(bool(p.grad.any()) for p in model.parameters() if p.grad is not None) == 7 * LAYERS
    injection.remove()


def test_a_model_in_which_nothing_matches_is_an_error_and_not_plain_training(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = of_family("qwen2.5-vl-qwen2", tmp_path_factory)
    delta = case.delta()
    for other in (
        nn.Sequential(nn.Linear(16, 16)),
        causal("Llama").lm_head,
        HandWritten({"a.b": (3,)}),
    ):
        with pytest.raises((CoverageError, AlignmentError)):
            drift_fast.Injection(other, delta, scale="absolute")
    gpt = HandWritten({f"transformer.h.{n}.attn.c_attn.weight": (16, 48) for n in range(LAYERS)})
    gpt.save_pretrained(tmp_path / "gpt")
    with pytest.raises((CoverageError, AlignmentError)):
        drift_fast.compute_delta(tmp_path / "gpt", case.planted.multimodal.path)


# ------------------------------------------------------------------ the table


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.slug)
def test_the_committed_table_has_a_row_with_the_verdict_that_is_expected(family: Family) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    (row,) = [row for row in rows if row[:2] == [family.name, family.text_name]]
    assert re.match(r"\w+", row[-1])[0] == family.expected
