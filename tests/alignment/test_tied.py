"""Whether a head is its embedding is one decision, from config.json, class defaults and tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from drift_fast import (
    AlignmentError,
    CheckpointError,
    CoverageError,
    check,
    compute_delta,
    inspect,
    merge,
)
from drift_fast.alignment import tied
from drift_fast.checkpoints.config_json import Configuration
from drift_fast.checkpoints.tied_by_default import TIED_BY_DEFAULT
from support.range_server import RangeServer
from support.synthetic import Stored, language_model, moved, refused, stored, write_checkpoint

JSON = dict[str, Any]
Tensors = dict[str, Stored]
HEAD = "lm_head.weight"
TO = "model.language_model."
EMBED, EMBED_THERE = "model.embed_tokens.weight", f"{TO}embed_tokens.weight"
UNTIED = {"model_type": "llama", "tie_word_embeddings": False}
TIED = {"model_type": "llama", "tie_word_embeddings": True}
BOTH: JSON = {"modules": ("embed", "head"), "rows": "index"}


@pytest.fixture
def text() -> Tensors:
    return language_model(np.random.default_rng(7), dtype="F32")


@pytest.fixture
def vlm(text: Tensors) -> Tensors:
    return moved(np.random.default_rng(8), text)


def write(directory: Path, tensors: Tensors, config: JSON | None) -> Path:
    write_checkpoint(directory, tensors)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def headless(tensors: Tensors) -> Tensors:
    return {name: one for name, one in tensors.items() if name != HEAD}


def tied_head(tensors: Tensors) -> Tensors:
    """Store the embedding once more as the head."""
    embedding = next(name for name in tensors if "embed" in name)
    return tensors | {HEAD: tensors[embedding]}


def difference(a: Stored, b: Stored) -> np.ndarray[Any, Any]:
    return (a.values - b.values).astype(np.float32).reshape(a.shape)


# ------------------------------------------------------------------ no head is stored


@pytest.mark.parametrize(
    "config",
    [
        UNTIED,
        {"model_type": "llama"},
        {"model_type": "gemma3_text", "tie_word_embeddings": False},
        {"model_type": "a_model_of_its_own"},
        # What the whole model says counts for the head, which is outside of its text model.
        {"tie_word_embeddings": False, "text_config": {"model_type": "qwen3_vl_moe_text"}},
    ],
)
def test_a_head_that_is_neither_stored_nor_tied_is_unknown(
    tmp_path: Path, text: Tensors, vlm: Tensors, config: JSON
) -> None:
    """QwenLM/Qwen3-VL-Embedding#89: a base model's weights under a configuration with a head."""
    a, b = write(tmp_path / "a", headless(text), config), write(tmp_path / "b", vlm, UNTIED)
    words = (HEAD, "stores no head", "tie_word_embeddings to true")
    for verb in (
        lambda: compute_delta(a, b, modules="head", rows="index"),
        lambda: inspect(a, b, **BOTH),
        lambda: merge("linear", a, b, tmp_path / "out", weight=1.0, rows="index"),
    ):
        with refused(AlignmentError, *words):
            verb()
    finding = next(one for one in check(a, b, **BOTH).findings if one.subject == "alignment")
    assert all(word in finding.message for word in words)
    merged = merge("linear", a, b, tmp_path / "out", weight=1.0, rows="index", strict=False)
    assert HEAD in merged.copied
    # The remedy, followed.
    (a / "config.json").write_text(json.dumps(TIED))
    delta = compute_delta(a, b, modules="head", rows="index", dtype="float32")
    assert np.array_equal(delta[HEAD].numpy(), difference(text[EMBED], vlm[HEAD]))


def test_a_head_that_only_the_multimodal_model_lacks_is_named(
    tmp_path: Path, text: Tensors, vlm: Tensors
) -> None:
    a = write(tmp_path / "a", text, UNTIED)
    b = write(tmp_path / "b", headless(vlm), UNTIED)
    with refused(AlignmentError, HEAD, "stores no head"):
        compute_delta(a, b, **BOTH)
    assert len(compute_delta(a, b)) == 14


@pytest.mark.parametrize(
    "config",
    [
        TIED,
        {"model_type": "gemma3_text"},
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        {"model_type": "cohere2"},
        # huggingface/transformers#43429: said of the text model alone.
        {"model_type": "mistral3", "text_config": {"tie_word_embeddings": True}},
        {"model_type": "llava", "text_config": {"model_type": "gemma2"}},
    ],
)
def test_a_tied_head_is_the_embedding_stated_or_by_default(
    tmp_path: Path, text: Tensors, vlm: Tensors, config: JSON
) -> None:
    a = write(tmp_path / "a", headless(text), config)
    b = write(tmp_path / "b", vlm, UNTIED)
    delta = compute_delta(a, b, **BOTH, dtype="float32")
    assert np.array_equal(delta[HEAD].numpy(), difference(text[EMBED], vlm[HEAD]))
    finding = next(one for one in check(a, b).findings if one.subject == "tie_word_embeddings")
    assert finding.reasoning.value is True
    both = compute_delta(a, write(tmp_path / "c", headless(vlm), config), **BOTH)
    assert set(both) == {EMBED_THERE}


def test_a_tied_model_that_stores_its_head_alone(
    tmp_path: Path, text: Tensors, vlm: Tensors
) -> None:
    """transformers 5 ties both ways, so what is stored is both; so it is after shared tensors were
    dropped by whoever saved them."""
    alone = {HEAD if name == EMBED else name: one for name, one in headless(text).items()}
    a, b = write(tmp_path / "a", alone, TIED), write(tmp_path / "b", vlm, UNTIED)
    delta = compute_delta(a, b, **BOTH, dtype="float32")
    for name in (HEAD, EMBED_THERE):
        assert np.array_equal(delta[name].numpy(), difference(text[EMBED], vlm[name]))
    there = {HEAD if name == EMBED_THERE else name: one for name, one in headless(vlm).items()}
    c = write(tmp_path / "c", there, TIED)
    delta = compute_delta(a, c, modules="head", rows="index", dtype="float32")
    assert np.array_equal(delta[HEAD].numpy(), difference(text[EMBED], vlm[EMBED_THERE]))


# ------------------------------------------------------------------ a head is stored and tied


def test_a_stored_head_that_equals_its_embedding_is_the_embedding(
    tmp_path: Path, text: Tensors, vlm: Tensors
) -> None:
    """vllm-project/vllm#6758, hiyouga/LlamaFactory#10560: saved twice by a training framework."""
    a, b = (
        write(tmp_path / "a", tied_head(text), TIED),
        write(tmp_path / "b", tied_head(vlm), TIED),
    )
    delta = compute_delta(a, b, **BOTH, dtype="float32")
    assert set(delta) == {EMBED_THERE}
    assert np.array_equal(delta[EMBED_THERE].numpy(), difference(text[EMBED], vlm[EMBED_THERE]))
    for modules in (("embed",), ("embed", "head")):
        out = tmp_path / "-".join(modules)
        merged = merge("linear", a, b, out, weight=0.5, rows="index", modules=modules)
        # An old head beside the new embedding would be loaded.
        assert HEAD not in merged.merged + merged.copied


@pytest.mark.parametrize("side", ["reasoning", "multimodal"])
def test_a_tied_head_with_other_values_is_refused_and_the_remedies_work(
    tmp_path: Path, text: Tensors, vlm: Tensors, side: str
) -> None:
    """huggingface/peft#2777: both were trained as copies, and the configuration still ties them."""
    configs = {"reasoning": UNTIED, "multimodal": UNTIED, side: TIED}
    a = write(tmp_path / "a", text, configs["reasoning"])
    b = write(tmp_path / "b", vlm, configs["multimodal"])
    wrong = a if side == "reasoning" else b
    words = (str(wrong), HEAD, "embed_tokens.weight", "differ", "tie_word_embeddings to false")
    for verb in (
        lambda: compute_delta(a, b, modules="head", rows="index"),
        lambda: inspect(a, b, **BOTH, strict=False),
        lambda: merge("linear", a, b, tmp_path / "out", weight=1.0, rows="index"),
    ):
        with refused(CheckpointError, *words):
            verb()
    finding = next(one for one in check(a, b, **BOTH).findings if one.subject == "alignment")
    assert all(word in finding.message for word in words)
    assert check(a, b).ok
    merged = merge("linear", a, b, tmp_path / "rest", weight=1.0, modules=("attn", "mlp", "norm"))
    assert HEAD in merged.copied
    # To take both: as transformers 5 does.
    (wrong / "config.json").write_text(json.dumps(UNTIED))
    delta = compute_delta(a, b, **BOTH, dtype="float32")
    assert np.array_equal(delta[HEAD].numpy(), difference(text[HEAD], vlm[HEAD]))
    # To take the embedding: as transformers 4 and vLLM do.
    if side == "reasoning":
        a = write(tmp_path / "c", headless(text), TIED)
        delta = compute_delta(a, b, **BOTH, dtype="float32")
        assert np.array_equal(delta[HEAD].numpy(), difference(text[EMBED], vlm[HEAD]))


def test_one_element_in_many_is_found(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#6749: only the rows of new tokens were trained apart."""
    rng = np.random.default_rng(5)
    text = tied_head(language_model(rng, vocab=40_000, dtype="F32"))
    values = text[HEAD].values.reshape(40_000, 8).copy()
    values[39_425, 0] += 1
    text[HEAD] = stored(values, "F32")
    plain = headless(text)
    a, b = write(tmp_path / "a", text, TIED), write(tmp_path / "b", plain, TIED)
    assert check(a, b, **BOTH).ok, "it is outside of the sample"
    with refused(CheckpointError, str(a), HEAD, "differ"):
        compute_delta(a, b, **BOTH)


def test_a_default_gives_way_to_a_stored_head(tmp_path: Path, text: Tensors, vlm: Tensors) -> None:
    """huggingface/transformers#42313: a class that ties by default, and a model that does not."""
    a = write(tmp_path / "a", text, UNTIED)
    b = write(tmp_path / "b", vlm, {"model_type": "mistral3", "text_config": {}})
    delta = compute_delta(a, b, **BOTH, dtype="float32")
    assert np.array_equal(delta[HEAD].numpy(), difference(text[HEAD], vlm[HEAD]))
    merged = merge("linear", a, b, tmp_path / "out", weight=0.5, rows="index")
    assert HEAD in merged.merged


def test_values_are_read_only_where_they_matter(
    tmp_path: Path, text: Tensors, vlm: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> bool:
        raise AssertionError("read")

    monkeypatch.setattr(tied, "_equal", never)
    tied_pair = write(tmp_path / "a", text, TIED), write(tmp_path / "b", vlm, TIED)
    assert len(compute_delta(*tied_pair)) == 14
    lone = write(tmp_path / "c", headless(text), TIED), write(tmp_path / "d", vlm, UNTIED)
    assert HEAD in compute_delta(*lone, **BOTH)


# ------------------------------------------------------------------ what transformers does


def test_transformers_ties_as_is_decided_here(tmp_path: Path) -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 takes the embedding for a stored head")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=12, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | {"tie_word_embeddings": True}))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 has one default for all classes")
    from transformers.models.auto import modeling_auto as auto

    writers = {
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    for kind in ("gemma3", "gemma3_text", "cohere2", "ernie4_5", "llama", "qwen3", "llava", "glm4"):
        assert kind in writers or kind.endswith("_text")
        default = bool(transformers.CONFIG_MAPPING[kind]().tie_word_embeddings)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert Configuration.read(tmp_path).is_tied == default == (kind in TIED_BY_DEFAULT), kind
    unknown = [kind for kind in TIED_BY_DEFAULT if kind not in transformers.CONFIG_MAPPING]
    # A model that a later transformers adds or drops changes no decision about the others.
    assert len(unknown) < len(TIED_BY_DEFAULT) / 4


@pytest.mark.slow
def test_every_default_is_that_of_transformers() -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 has one default for all classes")
    for kind in TIED_BY_DEFAULT & set(transformers.CONFIG_MAPPING):
        assert transformers.CONFIG_MAPPING[kind]().tie_word_embeddings is True, kind


def test_an_entry_that_is_not_a_truth_value_is_refused(
    tmp_path: Path, text: Tensors, vlm: Tensors
) -> None:
    a = write(tmp_path / "a", text, {"text_config": {"tie_word_embeddings": 3}})
    b = write(tmp_path / "b", vlm, UNTIED)
    for modules in ("head", "embed"):
        with refused((CheckpointError, CoverageError), "tie_word_embeddings"):
            compute_delta(a, b, modules=modules, rows="index")


@pytest.mark.parametrize("config", [TIED, {"model_type": "mistral3", "text_config": {}}])
def test_a_head_on_a_server_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: JSON
) -> None:
    monkeypatch.setenv("DRIFT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    text = language_model(np.random.default_rng(7), hidden=64, vocab=10_000)
    vlm = moved(np.random.default_rng(8), text)
    write(tmp_path / "text", tied_head(text), TIED)
    write(tmp_path / "vlm", vlm, config)
    write(tmp_path / "same", tied_head(vlm), TIED)
    with RangeServer(tmp_path) as server:
        text_url, vlm_url, same_url = (f"{server.url}/{n}" for n in ("text", "vlm", "same"))
        if "text_config" in config:
            # The default of a class gives way to what is stored.
            assert HEAD in compute_delta(text_url, vlm_url, **BOTH)
        else:
            with refused(CheckpointError, HEAD, "differ"):
                compute_delta(text_url, vlm_url, **BOTH)
        assert set(compute_delta(text_url, same_url, **BOTH)) == {EMBED_THERE}
