"""Stated pairs are checked like found ones, and weights that do not belong together are noticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drift_fast
from drift_fast import AlignmentError, CoverageError, DriftWarning, align, compute_delta, inspect
from drift_fast.alignment.mapping import read_map
from drift_fast.cli.main import main
from support.synthetic import (
    Pair,
    Stored,
    language_model,
    moved,
    refused,
    stored,
    vision_tower,
    write_checkpoint,
    write_pair,
)

TO = "model.language_model."


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


def write_two(
    directory: Path, text: Mapping[str, Stored], vlm: Mapping[str, Stored]
) -> tuple[Path, Path]:
    return write_checkpoint(directory / "text", text), write_checkpoint(directory / "vlm", vlm)


def shifted(tensors: Mapping[str, Stored], order: Mapping[int, int]) -> dict[str, Stored]:
    """Give layer n the tensors of layer `order[n]`."""
    result = dict(tensors)
    for layer, other in order.items():
        for name in tensors:
            if f"layers.{layer}." in name:
                result[name] = tensors[name.replace(f"layers.{layer}.", f"layers.{other}.")]
    return result


# ------------------------------------------------------------------ stated pairs


def test_prefix_pairs_a_dictionary_a_function_and_a_file_pair_alike(
    tmp_path: Path, pair: Pair
) -> None:
    found = align(pair.reasoning, pair.multimodal)
    found.save(tmp_path / "map.json")
    expected = set(compute_delta(pair.reasoning, pair.multimodal))
    mappings: list[Any] = [
        [("model", "model.language_model"), ("lm_head", "lm_head")],
        [("model.", "model.language_model."), ("lm_head", "lm_head")],
        dict(found.pairs),
        lambda name: name.replace("model.", TO) if name.startswith("model.") else None,
        tmp_path / "map.json",
        str(tmp_path / "map.json"),
    ]
    for mapping in mappings:
        delta = compute_delta(pair.reasoning, pair.multimodal, mapping=mapping)
        assert set(delta) == expected
        assert {b: a for a, b in delta.coverage.matched}.items() <= {
            b: a for a, b in found.pairs
        }.items()


def test_the_longest_prefix_that_fits_decides(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng)
    vlm = moved(rng, text, to="a.")
    for name in [name for name in vlm if name.startswith("a.layers.1.")]:
        vlm[name.replace("a.layers.1", "b.last.1")] = vlm.pop(name)
    mapping = [("model", "a"), ("model.layers.1", "b.last.1")]
    a, b = write_two(tmp_path, text, vlm)
    names = set(compute_delta(a, b, mapping=mapping))
    assert {name.split(".")[0] for name in names} == {"a", "b"}
    assert len(names) == 14


def test_one_of_two_language_models_can_be_pointed_out(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng)
    two = {**moved(rng, text, to="thinker.model."), **moved(rng, text, to="talker.model.")}
    a, b = write_two(tmp_path, text, two)
    with refused(AlignmentError, "thinker", "talker"):
        compute_delta(a, b)
    delta = compute_delta(a, b, mapping=[("model", "thinker.model")])
    assert {name.split(".")[0] for name in delta} == {"thinker"}


def test_layers_can_be_paired_out_of_order(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, layers=3)
    vlm = shifted(moved(rng, text), {0: 1, 1: 2, 2: 0})

    def place(name: str) -> str | None:
        if ".layers." not in name:
            return None
        layer = int(name.split(".")[2])
        there = {1: 0, 2: 1, 0: 2}[layer]
        return TO + name.removeprefix("model.").replace(f"layers.{layer}", f"layers.{there}")

    a, b = write_two(tmp_path, text, vlm)
    delta = compute_delta(a, b, mapping=place)
    assert len(delta) == 21
    assert float(delta.stats.total.cosine) > 0.9


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"model.layers.0.self_attn.q_prj.weight": "x"}, ["q_prj", "did you mean", "q_proj"]),
        (
            {"model.layers.0.self_attn.q_proj.weight": TO + "layers.0.self_attn.q.weight"},
            ["multimodal", "layers.0.self_attn.q.weight", "did you mean"],
        ),
        ([("transformer", "model.language_model")], ["'transformer'", "begins with"]),
        ([("model", "nowhere")], ["pairs nothing"]),
        ({}, ["pairs nothing"]),
        (lambda name: None, ["pairs nothing"]),
        (
            {"model.layers.0.self_attn.q_proj.weight": TO + "layers.0.mlp.up_proj.weight"},
            ["[8, 8]", "[12, 8]", "do not fit"],
        ),
        (
            {
                "model.layers.0.self_attn.q_proj.weight": TO + "layers.0.self_attn.q_proj.weight",
                "model.layers.0.self_attn.k_proj.weight": TO + "layers.0.self_attn.q_proj.weight",
            },
            ["2 tensors", "self_attn.q_proj.weight and", "k_proj", "which takes one"],
        ),
    ],
    ids=["reasoning", "multimodal", "prefix", "target", "empty", "none", "shapes", "twice"],
)
def test_a_mapping_that_does_not_hold_is_refused(
    pair: Pair, mapping: Any, words: list[str]
) -> None:
    with refused(AlignmentError, *words):
        compute_delta(pair.reasoning, pair.multimodal, mapping=mapping)


@pytest.mark.parametrize("mapping", [3, [("a", "b", "c")], ["ab"]], ids=repr)
def test_a_mapping_of_another_kind_is_a_type_error(pair: Pair, mapping: Any) -> None:
    with pytest.raises((TypeError, AlignmentError)):
        compute_delta(pair.reasoning, pair.multimodal, mapping=mapping)


def test_what_a_mapping_does_not_name_is_refused_when_strict_and_listed_otherwise(
    pair: Pair,
) -> None:
    full = dict(align(pair.reasoning, pair.multimodal).pairs)
    left_out = "model.layers.1.mlp.up_proj.weight"
    short = {name: match for name, match in full.items() if name != left_out}
    with refused(AlignmentError, left_out, "not in the mapping"):
        compute_delta(pair.reasoning, pair.multimodal, mapping=short)
    delta = compute_delta(pair.reasoning, pair.multimodal, mapping=short, strict=False)
    assert dict(delta.coverage.unmatched_reasoning)[left_out] == "not in the mapping"
    assert len(delta) == 13


def test_what_a_mapping_gives_none_for_is_left_out_and_counted(pair: Pair) -> None:
    full = dict(align(pair.reasoning, pair.multimodal).pairs)
    left_out = "model.layers.1.mlp.up_proj.weight"
    mapping: dict[str, str | None] = full | {left_out: None}
    delta = compute_delta(pair.reasoning, pair.multimodal, mapping=mapping)
    assert dict(delta.coverage.unmatched_reasoning)[left_out] == "left out by the mapping"
    assert len(delta) == 13
    assert delta.coverage.fraction < 1
    with refused(CoverageError, "min_coverage", left_out):
        compute_delta(pair.reasoning, pair.multimodal, mapping=mapping, min_coverage=1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"format_version": 2, "pairs": {}}',
        '{"format_version": 1, "pairs": []}',
        '{"format_version": 1, "pairs": {"a": 3}}',
        '{"format_version": 1, "pairs": {"a": "b", "a": "c"}}',
        "[" * 5000,
    ],
)
def test_a_file_that_is_no_map_is_refused_by_name(tmp_path: Path, pair: Pair, text: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    with refused(AlignmentError, "map.json", "expected a map file"):
        compute_delta(pair.reasoning, pair.multimodal, mapping=path)


@pytest.mark.parametrize("missing", ["a/b:c.json", "C:\\maps\\map", "a:b.json"])
def test_text_that_looks_like_a_path_is_one(pair: Pair, missing: str) -> None:
    with refused(FileNotFoundError, missing, "no such map file"):
        compute_delta(pair.reasoning, pair.multimodal, mapping=missing)


def test_prefix_pairs_may_be_text_however_long(pair: Pair) -> None:
    text = ", ".join(["model:model.language_model"] * 30)
    assert len(text) > 255
    found = compute_delta(pair.reasoning, pair.multimodal, mapping=text)
    assert len(found) == len(compute_delta(pair.reasoning, pair.multimodal))


def test_a_map_that_is_not_there_says_how_to_make_one(pair: Pair) -> None:
    with refused(FileNotFoundError, "nowhere.json", "drift-fast align"):
        compute_delta(pair.reasoning, pair.multimodal, mapping="nowhere.json")


def test_a_mapping_names_the_parameters_of_a_model_too(tmp_path: Path, pair: Pair) -> None:
    delta = compute_delta(pair.reasoning, pair.multimodal, modules="attn", dtype="float32")
    model = torch.nn.ModuleDict(
        {"first": torch.nn.Linear(8, 8, bias=False), "second": torch.nn.Linear(8, 8, bias=False)}
    )
    names = list(delta)[:2]
    mapping = dict(zip(names, ("second.weight", "first.weight"), strict=True))
    assert drift_fast.match_parameters(model, Only(delta, names), mapping=mapping) == {
        "second.weight": names[0],
        "first.weight": names[1],
    }
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with drift_fast.Injection(
        model, Only(delta, names), mapping=mapping, scale="absolute"
    ) as injection:
        injection.step()
    gradient = model["second"].weight.grad
    assert gradient is not None
    assert torch.equal(gradient, -delta[names[0]])
    with refused(AlignmentError, "third.weight"):
        drift_fast.Injection(model, delta, mapping={names[0]: "third.weight"})
    partial: dict[str, str | None] = {names[0]: "first.weight", names[1]: None}
    only = Only(delta, names)
    with drift_fast.Injection(model, only, mapping=partial) as injection:
        assert injection.targets == ["first.weight"]
        assert dict(injection.coverage.unmatched_reasoning)[names[1]] == "left out by the mapping"
    with refused(CoverageError, names[1], "50.0% covered"):
        drift_fast.Injection(model, only, mapping=partial, min_coverage=1.0)


class Only:
    """Some tensors of a delta."""

    def __init__(self, delta: Any, names: list[str]) -> None:
        self.shapes = {name: delta.shapes[name] for name in names}
        self._delta = delta

    def __getitem__(self, name: str, /) -> torch.Tensor:
        tensor: torch.Tensor = self._delta[name]
        return tensor


@given(st.dictionaries(st.text(min_size=1), st.one_of(st.none(), st.text(min_size=1)), max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_map_file_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, str | None]
) -> None:
    from drift_fast.alignment.mapping import write_map

    path = tmp_path_factory.mktemp("map") / "map.json"
    write_map(
        path,
        [(a, b) for a, b in pairs.items() if b is not None],
        [a for a, b in pairs.items() if b is None],
    )
    assert read_map(path) == pairs
    with pytest.raises(FileExistsError):
        write_map(path, [], [])


# ------------------------------------------------------------------ similarity


@pytest.mark.parametrize(
    "order",
    [{0: 1, 1: 2, 2: 3}, {1: 0, 2: 1, 3: 2}, {1: 2, 2: 1}, {0: 3, 3: 0, 1: 2, 2: 1}],
    ids=["one up", "one down", "two exchanged", "reversed"],
)
def test_layers_that_are_shifted_or_permuted_are_refused_by_their_weights(
    tmp_path: Path, rng: Any, order: dict[int, int]
) -> None:
    text = language_model(rng, layers=4, hidden=16, inner=24)
    vlm = {**vision_tower(rng, layers=4, hidden=16), **shifted(moved(rng, text), order)}
    a, b = write_two(tmp_path, text, vlm)
    layer, other = next(iter(order.items()))
    words = ("shifted or permuted", "mapping=", "check_weights=False")
    with refused(AlignmentError, *words):
        compute_delta(a, b, tmp_path / "delta")
    with refused(AlignmentError, *words):
        inspect(a, b, modules="mlp")
    assert not (tmp_path / "delta").exists()
    found = align(a, b)
    assert not found.ok
    assert found.problem is not None
    assert "shifted or permuted" in found.problem
    assert len(compute_delta(a, b, check_weights=False)) == 28
    assert f"layers.{layer}." in found.problem or f"layers.{other}." in found.problem


def test_one_module_that_is_not_its_counterpart_is_refused(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, hidden=16, inner=24)
    vlm = moved(rng, text)
    for layer in range(2):
        at = f"{TO}layers.{layer}.self_attn."
        vlm[f"{at}q_proj.weight"], vlm[f"{at}o_proj.weight"] = (
            vlm[f"{at}o_proj.weight"],
            vlm[f"{at}q_proj.weight"],
        )
    a, b = write_two(tmp_path, text, vlm)
    with refused(AlignmentError, "does not resemble", "o_proj"):
        compute_delta(a, b)
    assert len(compute_delta(a, b, modules="mlp")) == 6


def test_models_without_a_common_base_get_a_warning(tmp_path: Path, rng: Any) -> None:
    text, other = (language_model(rng, hidden=32, inner=48) for _ in range(2))
    a, b = write_two(tmp_path, text, moved(rng, other))
    with pytest.warns(DriftWarning, match="do not resemble each other.*share no base"):
        compute_delta(a, b)


@pytest.mark.parametrize("noise", [0.0, 0.3, 2.0])
def test_models_of_a_common_base_pass_however_far_they_have_moved(
    tmp_path: Path, rng: Any, noise: float
) -> None:
    text = language_model(rng, hidden=32, inner=48, layers=3)
    vlm = {
        TO + name.removeprefix("model."): stored(
            tensor.values.reshape(tensor.shape) + rng.normal(0, noise, tensor.shape)
        )
        for name, tensor in text.items()
        if name.startswith("model.")
    }
    a, b = write_two(tmp_path, text, vlm)
    if noise:
        assert len(compute_delta(a, b)) == 21
    found = align(a, b)
    assert found.ok
    assert found.similarity is not None
    assert found.similarity.matched == pytest.approx(1 / (1 + noise**2) ** 0.5, abs=0.02)
    assert abs(found.similarity.elsewhere) < 0.1


def test_layers_that_are_all_alike_are_no_shift(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, layers=3)
    text = shifted(text, {1: 0, 2: 0})
    a, b = write_two(tmp_path, text, moved(rng, text))
    assert len(compute_delta(a, b)) == 21


def test_weights_that_do_not_vary_are_no_evidence(tmp_path: Path, rng: Any) -> None:
    text = {
        name: stored(np.zeros(tensor.shape)) if "o_proj" in name else tensor
        for name, tensor in language_model(rng).items()
    }
    vlm = moved(rng, text)
    a, b = write_two(tmp_path, text, vlm)
    assert len(compute_delta(a, b)) == 14


def test_a_layer_that_does_not_vary_does_not_hide_a_shift(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, layers=5, hidden=16, inner=24)
    vlm = shifted(moved(rng, text), {0: 1, 1: 2, 2: 3})
    for name in [name for name in vlm if "layers.4." in name]:
        vlm[name] = stored(np.zeros(vlm[name].shape))
    a, b = write_two(tmp_path, text, vlm)
    with refused(AlignmentError, "shifted or permuted"):
        compute_delta(a, b)


@pytest.mark.parametrize("modules", ["attn", "re:q_proj"])
def test_a_shift_is_seen_though_only_one_layer_is_selected(
    tmp_path: Path, rng: Any, modules: str
) -> None:
    text = language_model(rng, layers=4, hidden=32, inner=48)
    a, b = write_two(tmp_path, text, shifted(moved(rng, text), {0: 1, 1: 2, 2: 3}))
    with refused(AlignmentError, "shifted or permuted"):
        compute_delta(a, b, modules=modules, layers=[2])


def test_one_tensor_that_was_exchanged_with_another_is_refused(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, layers=3, hidden=32, inner=48)
    vlm = moved(rng, text)
    at = f"{TO}layers.1.mlp."
    vlm[f"{at}gate_proj.weight"], vlm[f"{at}up_proj.weight"] = (
        vlm[f"{at}up_proj.weight"],
        vlm[f"{at}gate_proj.weight"],
    )
    a, b = write_two(tmp_path, text, vlm)
    with refused(AlignmentError, "layers.1.mlp", "does not resemble"):
        compute_delta(a, b)


def test_tensors_of_integers_are_paired_but_not_compared(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng)
    index = Stored("I64", (4, 4), np.zeros(16, dtype="<i8").tobytes())
    extra = {f"layers.{n}.self_attn.index": index for n in range(2)}
    vlm = moved(rng, text) | {TO + name: tensor for name, tensor in extra.items()}
    a, b = write_two(tmp_path, text | {f"model.{n}": t for n, t in extra.items()}, vlm)
    assert align(a, b).ok
    assert len(compute_delta(a, b)) == 14


# ------------------------------------------------------------------ exchanged models


def test_two_models_that_are_exchanged_are_refused_and_named_as_such(
    tmp_path: Path, pair: Pair
) -> None:
    with refused(AlignmentError, "vision_tower", "exchanged", "strict=False", "min_coverage=1.0"):
        compute_delta(pair.multimodal, pair.reasoning)
    found = align(pair.multimodal, pair.reasoning)
    assert found.problem is not None
    assert "exchanged" in found.problem
    report = drift_fast.check(pair.multimodal, pair.reasoning)
    assert not report.ok
    # What the message says to do, to see what a multimodal model learned beyond its text model.
    reverse = compute_delta(pair.multimodal, pair.reasoning, strict=False, min_coverage=1.0)
    assert len(reverse) == 14
    same = compute_delta(pair.reasoning, pair.multimodal)
    for name in reverse:
        other = name.replace("model.", "model.language_model.", 1)
        assert torch.equal(reverse[name], -same[other])


def test_the_report_of_an_alignment_is_what_is_printed(pair: Pair) -> None:
    found = align(pair.reasoning, pair.multimodal)
    assert str(found) == found.table()
    assert repr(found).startswith(f"Alignment({len(found.pairs)} pairs by names, ok")


def test_configurations_that_do_not_fit_are_warned_of_where_shapes_do(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng)
    a, b = write_two(tmp_path, text, moved(rng, text))
    for directory, heads in ((a, 2), (b, 4)):
        config = {"num_attention_heads": heads, "hidden_size": 8, "hidden_act": "silu"}
        (directory / "config.json").write_text(json.dumps(config))
    with pytest.warns(DriftWarning, match=r"do not fit.*drift-fast check.*attention heads"):
        compute_delta(a, b)


# ------------------------------------------------------------------ layers that are inserted


def with_inserted(
    rng: Any, tensors: Mapping[str, Stored], before: set[int], layers: int
) -> dict[str, Stored]:
    """Insert layers with cross attention in place of self attention, as Mllama does."""
    result: dict[str, Stored] = {}
    there = 0
    for layer in range(layers):
        if layer in before:
            at = f"{TO}layers.{there}."
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                result[f"{at}cross_attn.{name}.weight"] = stored(rng.normal(0, 1, (8, 8)))
            for name, shape in (("gate", (12, 8)), ("up", (12, 8)), ("down", (8, 12))):
                result[f"{at}mlp.{name}_proj.weight"] = stored(rng.normal(0, 1, shape))
            there += 1
        for name, tensor in tensors.items():
            if f"layers.{layer}." in name:
                result[name.replace(f"layers.{layer}.", f"layers.{there}.")] = tensor
        there += 1
    return result | {n: t for n, t in tensors.items() if "layers." not in n}


def test_inserted_layers_are_named_and_a_map_that_leaves_them_out_is_offered(
    tmp_path: Path, rng: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = language_model(rng, layers=4)
    vlm = with_inserted(rng, moved(rng, text), {1, 3}, 4)
    a, b = write_two(tmp_path, text, vlm)
    with refused(AlignmentError, "inserted layers 1, 4", "drift-fast align", "mapping"):
        compute_delta(a, b)
    assert main(["align", str(a), str(b)]) == 1
    path = tmp_path / "map.json"
    assert main(["align", str(a), str(b), "--out", str(path)]) == 0
    assert "inserted layers 1, 4" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["proposed"] is True
    delta = compute_delta(a, b, mapping=path)
    assert len(delta) == 28
    pairs = {b: a for a, b in delta.coverage.matched}
    assert pairs[f"{TO}layers.5.mlp.up_proj.weight"] == "model.layers.3.mlp.up_proj.weight"
    assert not any(f"layers.{n}." in name for name in delta for n in (1, 4))
    assert delta.stats.total.cosine > 0.9


def test_a_model_that_is_merely_deeper_gets_no_map(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, layers=2)
    vlm = moved(rng, language_model(rng, layers=4))
    a, b = write_two(tmp_path, text, vlm)
    with refused(AlignmentError, "different depths", "same backbone"):
        compute_delta(a, b)
    found = align(a, b)
    assert not found.ok
    assert not found.proposed


# ------------------------------------------------------------------ rows


def write_tokenizer(directory: Path, tokens: list[str]) -> None:
    vocab = {token: at for at, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    (directory / "tokenizer.json").write_text(
        json.dumps({"model": model, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": []})
    )


def letters(count: int) -> list[str]:
    return [f"t{n}" for n in range(count)]


def test_rows_of_embedding_and_head_are_matched_by_token(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, vocab=6)
    grown = language_model(rng, vocab=9)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tuned = moved(rng, {name: t for name, t in text.items() if name not in names})
    vlm = {**tuned, TO + "embed_tokens.weight": grown[names[0]], names[1]: grown[names[1]]}
    a, b = write_two(tmp_path, text, vlm)
    # Token t3 is only in the one, <image> only in the other; the last row has no token.
    write_tokenizer(a, ["t0", "t1", "t2", "t3", "t4", "t5"])
    write_tokenizer(b, ["t0", "t1", "t2", "<image>", "t5", "t4", "new", "other"])
    delta = compute_delta(a, b, tmp_path / "delta", modules=("embed", "head"), dtype="float32")
    assert set(delta) == {TO + "embed_tokens.weight", "lm_head.weight"}
    for name, source in ((TO + "embed_tokens.weight", names[0]), (names[1], names[1])):
        left = text[source].values.reshape(6, 8)
        right = vlm[name].values.reshape(9, 8)
        expected = np.zeros((9, 8))
        for row, other in ((0, 0), (1, 1), (2, 2), (4, 5), (5, 4)):
            expected[row] = left[other] - right[row]
        assert np.array_equal(delta[name].numpy(), expected.astype(np.float32))
        row_stats = next(row for row in delta.stats if row.name == name)
        matched = right[[0, 1, 2, 4, 5]]
        assert row_stats.multimodal_norm == pytest.approx(np.linalg.norm(matched), rel=1e-6)
    assert delta.coverage.matched_numel == 2 * 5 * 8
    assert delta.coverage.fraction == pytest.approx(5 / 9)
    described = json.loads((tmp_path / "delta" / "drift.json").read_text())["alignment"]["rows"]
    assert described["lm_head.weight"].startswith("5 of 9 rows matched by token")


def test_rows_by_index_are_taken_only_on_request(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, vocab=6)
    a, b = write_two(tmp_path, text, moved(rng, text))
    with refused(CoverageError, "embed_tokens", "[6, 8]", "no tokenizer", 'rows="index"'):
        compute_delta(a, b, modules="embed")
    assert len(compute_delta(a, b, modules="embed", rows="index")) == 1
    assert "model.embed_tokens.weight" in dict(
        compute_delta(a, b, modules="all", strict=False).coverage.unmatched_reasoning
    )
    with pytest.raises(ValueError, match="rows must be"):
        compute_delta(a, b, modules="embed", rows="name")  # type: ignore[arg-type]


def test_a_heads_bias_goes_by_token_like_its_weight(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, vocab=6) | {"lm_head.bias": stored(np.arange(6.0))}
    vlm = moved(rng, text) | {"lm_head.bias": stored(np.arange(6.0)[::-1])}
    a, b = write_two(tmp_path, text, vlm)
    write_tokenizer(a, letters(6))
    write_tokenizer(b, letters(6)[::-1])
    delta = compute_delta(a, b, modules="head", dtype="float32")
    assert float(delta["lm_head.bias"].abs().max()) == 0.0


def test_what_only_the_multimodal_backbone_has_outside_its_layers_is_missing(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng)
    vlm = moved(rng, text)
    del text["model.norm.weight"], text["lm_head.weight"]
    a, b = write_two(tmp_path, text, vlm)
    with refused(AlignmentError, TO + "norm.weight"):
        compute_delta(a, b, modules="attn,norm")
    assert len(compute_delta(a, b)) == 14


def test_embeddings_are_left_out_unless_they_are_asked_for(pair: Pair) -> None:
    names = set(compute_delta(pair.reasoning, pair.multimodal))
    assert not any("embed" in name or "lm_head" in name for name in names)


def test_a_tied_head_is_taken_once_with_the_embedding(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng, vocab=6)
    vlm = moved(rng, text)
    vlm["lm_head.weight"] = vlm[TO + "embed_tokens.weight"]
    a, b = write_two(tmp_path, text, vlm)
    (b / "config.json").write_text(json.dumps({"text_config": {"tie_word_embeddings": True}}))
    delta = compute_delta(a, b, modules=("embed", "head"), rows="index", strict=False)
    assert set(delta) == {TO + "embed_tokens.weight"}
    assert "tied" in dict(delta.coverage.unmatched_multimodal)["lm_head.weight"]


def test_two_tied_models_are_taken_once_and_a_lost_head_is_refused(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng, vocab=6)
    text["lm_head.weight"] = text["model.embed_tokens.weight"]
    vlm = moved(rng, text)
    vlm["lm_head.weight"] = vlm[TO + "embed_tokens.weight"]
    a, b = write_two(tmp_path, text, vlm)
    tied = json.dumps({"tie_word_embeddings": True})
    (b / "config.json").write_text(tied)
    with refused(AlignmentError, "lm_head.weight", "left out"):
        compute_delta(a, b, modules=("embed", "head"), rows="index")
    (a / "config.json").write_text(tied)
    delta = compute_delta(a, b, modules=("embed", "head"), rows="index")
    assert set(delta) == {TO + "embed_tokens.weight"}
    assert "tied" in dict(delta.coverage.unmatched_reasoning)["lm_head.weight"]
    with refused(CoverageError, "selects none"):
        compute_delta(a, b, modules="head", rows="index")


@pytest.mark.parametrize("text", ["[]", "{", '{"tie_word_embeddings": 3}', "[" * 5000])
def test_a_configuration_that_is_not_valid_is_refused_by_name(
    tmp_path: Path, rng: Any, text: str
) -> None:
    model = language_model(rng)
    a, b = write_two(tmp_path, model, moved(rng, model))
    (b / "config.json").write_text(text)
    with refused(drift_fast.CheckpointError, "config.json"):
        compute_delta(a, b)


def test_a_head_that_only_the_reasoning_model_ties_is_its_embedding(
    tmp_path: Path, rng: Any
) -> None:
    text = language_model(rng, vocab=6, head=None)
    vlm = moved(rng, text) | {"lm_head.weight": stored(rng.normal(0, 1, (6, 8)))}
    a, b = write_two(tmp_path, text, vlm)
    with pytest.warns(DriftWarning, match="stores no head and has no config.json"):
        guessed = compute_delta(a, b, modules="head", rows="index", dtype="float32")
    (a / "config.json").write_text('{"tie_word_embeddings": true}')
    delta = compute_delta(a, b, modules="head", rows="index", dtype="float32")
    assert torch.equal(guessed["lm_head.weight"], delta["lm_head.weight"])
    left = text["model.embed_tokens.weight"].values
    exact = (left - vlm["lm_head.weight"].values).astype(np.float32)
    assert np.array_equal(delta["lm_head.weight"].numpy().reshape(-1), exact)


# ------------------------------------------------------------------ coverage


def test_coverage_counts_the_share_of_the_backbone(tmp_path: Path, pair: Pair) -> None:
    delta = compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta", modules="attn")
    backbone = sum(t.values.size for name, t in pair.vlm.items() if TO in name or "lm_head" in name)
    assert delta.coverage.backbone_numel == backbone
    attention = sum(t.values.size for name, t in pair.text.items() if "self_attn" in name)
    assert delta.coverage.backbone_fraction == pytest.approx(attention / backbone)
    stored_coverage = json.loads((tmp_path / "delta" / "drift.json").read_text())["coverage"]
    assert stored_coverage["backbone_fraction"] == delta.coverage.backbone_fraction
    assert f"{attention / backbone:.1%} of the backbone" in str(delta.coverage)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_coverage_threshold_without_meaning_is_refused(pair: Pair, value: float) -> None:
    with pytest.raises(ValueError, match="min_coverage"):
        compute_delta(pair.reasoning, pair.multimodal, min_coverage=value)


def test_too_little_coverage_is_refused_though_not_strict(tmp_path: Path, rng: Any) -> None:
    text = language_model(rng)
    vlm = moved(rng, text)
    del vlm[TO + "layers.1.self_attn.o_proj.weight"]
    a, b = write_two(tmp_path, text, vlm)
    delta = compute_delta(a, b, strict=False, min_coverage=0.9)
    assert delta.coverage.fraction == pytest.approx(16 / 17)
    with refused(CoverageError, "94.1%", "min_coverage=95.0%", "o_proj"):
        compute_delta(a, b, strict=False, min_coverage=0.95)


# ------------------------------------------------------------------ the command


def test_the_command_shows_pairs_leftovers_alternatives_and_similarity(
    tmp_path: Path, rng: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_pair(tmp_path, layers=3)
    assert main(["align", str(text.reasoning), str(text.multimodal)]) == 0
    shown = capsys.readouterr().out
    for word in (
        "12 attn",
        "9 mlp",
        "model.language_model",
        "alternative",
        "correlate",
        "vision_tower",
    ):
        assert word in shown
    assert main(["align", str(text.reasoning), str(text.multimodal), "--all", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert len(answer["pairs"]) == len(text.text)
    assert answer["likeness"]["matched"] > 0.9


def test_the_command_takes_prefix_pairs_and_map_files(
    tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(pair.reasoning), str(pair.multimodal)
    path = tmp_path / "map.json"
    assert main(["align", a, b, "--out", str(path)]) == 0
    for mapping in ("model:model.language_model", str(path)):
        assert main(["inspect", a, b, "--json", "--mapping", mapping]) == 0
    assert main(["inspect", a, b, "--mapping", "encoder:decoder"]) == 1
    assert "encoder" in capsys.readouterr().err
    assert main(["align", a, b, "--out", str(path)]) == 1
    assert "map.json" in capsys.readouterr().err


# --- embeddings with different numbers of rows ----------------------------------------------------


@pytest.fixture
def resized(tmp_path: Path, rng: Any) -> tuple[Path, Path]:
    """Two models, of which the multimodal one has six rows more, for two tokens of its own."""
    text = language_model(rng)
    vlm = moved(rng, text)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        vlm[name] = stored(rng.normal(0, 1, (22, vlm[name].shape[1])))
    paths = write_two(tmp_path, text, vlm)
    for path, tokens in zip(paths, (14, 16), strict=True):
        words = {f"token {number}": number for number in range(tokens)}
        content = {"model": {"type": "WordLevel", "vocab": words}}
        (path / "tokenizer.json").write_text(json.dumps(content))
    return paths


def test_every_verb_says_of_a_resized_embedding_which_rows_match(
    tmp_path: Path, resized: tuple[Path, Path]
) -> None:
    delta = compute_delta(*resized, modules="all", dtype="float32")
    rows = delta.alignment["rows"]
    assert set(rows) == {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    assert all("14 of 22 rows matched by token string" in text for text in rows.values())
    found = align(*resized)
    assert found.rows == rows
    assert set(found.pairs) == set(delta.coverage.matched)
    assert found.matched_numel == delta.coverage.matched_numel
    assert not found.unmatched_reasoning + found.unmatched_multimodal
    assert "lm_head.weight: 14 of 22 rows matched by token string" in str(found)
    assert found.to_dict()["rows"] == rows
    # Its map is of the same pairs.
    found.save(tmp_path / "map.json")
    mapped = compute_delta(*resized, modules="all", mapping=tmp_path / "map.json", dtype="float32")
    assert mapped.coverage.matched == delta.coverage.matched
    assert all(torch.equal(mapped[name], delta[name]) for name in delta)


def test_where_it_is_not_selected_nothing_is_without_a_match(resized: tuple[Path, Path]) -> None:
    for coverage in (inspect(*resized).coverage, drift_fast.check(*resized).coverage):
        assert coverage is not None
        assert "without a match: 0 in the reasoning checkpoint, 0 in the" in str(coverage)
        left_out = dict(coverage.unmatched_multimodal)
        assert left_out["model.language_model.embed_tokens.weight"] == "not selected"
        assert left_out["lm_head.weight"] == "not selected"


def test_rows_that_cannot_be_matched_are_said_to_be_so_with_the_remedy(
    resized: tuple[Path, Path],
) -> None:
    (resized[0] / "tokenizer.json").unlink()
    found = align(*resized)
    assert found.ok
    assert found.rows == {}
    assert "no tokenizer in" in dict(found.unmatched_multimodal)["lm_head.weight"]
    assert 'rows="index"' in dict(found.unmatched_multimodal)["lm_head.weight"]
    reason = dict(found.unmatched_reasoning)["lm_head.weight"]
    assert reason == "its rows have no match in those of lm_head.weight"
