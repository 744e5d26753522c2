"""Experts and projections that are split in one checkpoint and fused in the other.

Checkpoints are written byte by byte, so that no conversion of another library comes between what
is planted and what is read; Δ is compared bit for bit with float64 rounded once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import drift_fast
from drift_fast import AlignmentError, CheckpointError, Delta, compute_delta, inspect
from support.synthetic import (
    Stored,
    cosine,
    moved,
    norm,
    refused,
    round_once,
    stored,
    subtract,
    vision_tower,
    write_checkpoint,
)

Floats = npt.NDArray[np.float64]
LAYERS, EXPERTS = 2, 3
FORMS = ("apart", "fused", "transposed")
AT = "model.layers.{}.mlp.experts"


def mixture(
    rng: np.random.Generator, hidden: int, inner: int, dtype: str, layers: int = LAYERS
) -> dict[str, Stored]:
    """Return the attention and experts of a small mixture model, one tensor for each projection."""
    tensors = {}
    for layer in range(layers):
        for projection in ("q_proj", "o_proj"):
            name = f"model.layers.{layer}.self_attn.{projection}.weight"
            tensors[name] = stored(rng.normal(0, 1, (hidden, hidden)), dtype)
        for expert in range(EXPERTS):
            at = f"{AT.format(layer)}.{expert}"
            tensors[f"{at}.gate_proj.weight"] = stored(rng.normal(0, 1, (inner, hidden)), dtype)
            tensors[f"{at}.up_proj.weight"] = stored(rng.normal(0, 1, (inner, hidden)), dtype)
            tensors[f"{at}.down_proj.weight"] = stored(rng.normal(0, 1, (hidden, inner)), dtype)
    return tensors


def values_of(tensor: Stored) -> Floats:
    return tensor.values.reshape(tensor.shape)


def in_form(tensors: Mapping[str, Stored], form: str) -> dict[str, Stored]:
    """Store the experts apart, fused, or fused and transposed."""
    if form == "apart":
        return dict(tensors)
    result = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    prefixes = sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name})
    for prefix in prefixes:
        at = f"{prefix}.experts"

        def stack(name: str, at: str = at) -> Floats:
            return np.stack([values_of(tensors[f"{at}.{n}.{name}.weight"]) for n in range(EXPERTS)])

        dtype = tensors[f"{at}.0.up_proj.weight"].dtype
        up = np.concatenate([stack("gate_proj"), stack("up_proj")], 1)
        down = stack("down_proj")
        if form == "transposed":
            up, down = up.swapaxes(1, 2), down.swapaxes(1, 2)
        result[f"{at}.gate_up_proj"] = stored(up, dtype)
        result[f"{at}.down_proj"] = stored(down, dtype)
    return result


def planted(
    rng: np.random.Generator, hidden: int, inner: int, text_dtype: str, vlm_dtype: str, **model: int
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    text = mixture(rng, hidden, inner, text_dtype, **model)
    tuned = moved(rng, text)
    return text, {name: stored(values_of(t), vlm_dtype) for name, t in tuned.items()}


def bits(delta: Mapping[str, torch.Tensor], name: str) -> Any:
    tensor = delta[name]
    kind = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    return tensor.reshape(-1).view(kind).numpy()


def assert_exact(
    delta: Delta, text: dict[str, Stored], vlm: dict[str, Stored], form: str, dtype: str
) -> None:
    """Compare every Δ with the difference of the two models brought to one form."""
    kind = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    a, b = in_form(text, form), in_form(vlm, form)
    assert set(delta) == set(b)
    for name in delta:
        source = a[name.replace("model.language_model.", "model.")]
        expected = round_once(subtract(source.values, b[name].values), kind)
        assert np.array_equal(bits(delta, name).view(expected.dtype), expected), name


@pytest.mark.parametrize(("text_form", "vlm_form"), list(itertools.product(FORMS, FORMS)))
@pytest.mark.parametrize(("hidden", "inner"), [(8, 6), (8, 4), (4, 4)])
def test_delta_is_exact_whichever_way_either_side_stores_its_experts(
    tmp_path: Path, text_form: str, vlm_form: str, hidden: int, inner: int
) -> None:
    text, vlm = planted(np.random.default_rng(3), hidden, inner, "BF16", "BF16")
    a = write_checkpoint(tmp_path / "text", in_form(text, text_form))
    b = write_checkpoint(
        tmp_path / "vlm", {**vision_tower(np.random.default_rng(4)), **in_form(vlm, vlm_form)}
    )
    delta = compute_delta(a, b, tmp_path / "delta")
    assert_exact(delta, text, vlm, vlm_form, "bfloat16")
    assert_exact(compute_delta(a, b), text, vlm, vlm_form, "bfloat16")
    coverage = delta.coverage
    assert coverage.fraction == 1.0
    assert {name for name, _ in coverage.matched} == set(in_form(text, text_form))
    assert {name for _, name in coverage.matched} == set(in_form(vlm, vlm_form))


@pytest.mark.parametrize(
    "dtypes", list(itertools.product(("BF16", "F16", "F32"), repeat=2)), ids="-".join
)
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_fused_tensors_take_every_mix_of_dtypes(
    tmp_path: Path, dtypes: tuple[str, str], out: str
) -> None:
    text, vlm = planted(np.random.default_rng(5), 8, 6, *dtypes)
    a = write_checkpoint(tmp_path / "text", text, shards=3)
    b = write_checkpoint(tmp_path / "vlm", in_form(vlm, "transposed"), shards=2)
    assert_exact(compute_delta(a, b, dtype=out), text, vlm, "transposed", out)


@pytest.mark.parametrize("reader", ["pread", "mmap"])
@pytest.mark.parametrize(
    ("text_form", "vlm_form"),
    [("apart", "transposed"), ("transposed", "apart"), ("fused", "transposed")],
)
def test_tensors_longer_than_a_chunk_are_gathered_right_by_any_number_of_threads(
    tmp_path: Path, text_form: str, vlm_form: str, reader: str
) -> None:
    text, vlm = planted(np.random.default_rng(6), 1100, 600, "BF16", "F32", layers=1)
    a = write_checkpoint(tmp_path / "text", in_form(text, text_form))
    b = write_checkpoint(tmp_path / "vlm", in_form(vlm, vlm_form))
    one = compute_delta(a, b, tmp_path / "one", threads=1, reader=reader)
    three = compute_delta(a, b, tmp_path / "three", threads=3, reader=reader)
    assert_exact(one, text, vlm, vlm_form, "bfloat16")
    assert list(one.stats) == list(three.stats)
    for name in one:
        assert torch.equal(one[name], three[name])
    name = next(name for name in one if "down_proj" in name)
    left = in_form(text, vlm_form)[name.replace("language_model.", "")].values
    right = in_form(vlm, vlm_form)[name].values
    row = next(row for row in one.stats if row.name == name)
    assert row.delta_norm == pytest.approx(norm(left - right), rel=1e-6)
    assert row.cosine == pytest.approx(cosine(left, right), abs=1e-6)


def attention(rng: np.random.Generator) -> dict[str, Stored]:
    """Return layers with grouped queries and biases: 8 rows of q, 4 of k, 4 of v."""
    tensors = {}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
            tensors[f"{at}self_attn.{name}.weight"] = stored(rng.normal(0, 1, (rows, 8)))
            tensors[f"{at}self_attn.{name}.bias"] = stored(rng.normal(0, 1, rows))
        tensors[f"{at}self_attn.o_proj.weight"] = stored(rng.normal(0, 1, (8, 8)))
        tensors[f"{at}mlp.gate_proj.weight"] = stored(rng.normal(0, 1, (12, 8)))
        tensors[f"{at}mlp.up_proj.weight"] = stored(rng.normal(0, 1, (12, 8)))
        tensors[f"{at}mlp.down_proj.weight"] = stored(rng.normal(0, 1, (8, 12)))
    return tensors


def joined(tensors: Mapping[str, Stored], names: tuple[str, ...], to: str) -> dict[str, Stored]:
    result = {}
    for name, tensor in tensors.items():
        part = next((part for part in names if f".{part}." in name), None)
        if part is None:
            result[name] = tensor
        elif part == names[0]:
            parts = [tensors[name.replace(names[0], other)] for other in names]
            result[name.replace(part, to)] = stored(np.concatenate([values_of(p) for p in parts]))
    return result


def phi(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    tensors = joined(tensors, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    return joined(tensors, ("gate_proj", "up_proj"), "gate_up_proj")


@pytest.mark.parametrize("fused", ["reasoning", "multimodal"])
def test_fused_projections_meet_split_ones_from_either_side(tmp_path: Path, fused: str) -> None:
    rng = np.random.default_rng(7)
    text = attention(rng)
    vlm = moved(rng, text)
    left, right = (phi(text), vlm) if fused == "reasoning" else (text, phi(vlm))
    a, b = write_checkpoint(tmp_path / "a", left), write_checkpoint(tmp_path / "b", right)
    delta = compute_delta(a, b, tmp_path / "delta")
    assert set(delta) == set(right)
    expected = phi(text) if fused == "multimodal" else text
    for name in delta:
        source = expected[name.replace("language_model.", "")]
        exact = round_once(subtract(source.values, right[name].values), "BF16")
        assert np.array_equal(bits(delta, name).view(exact.dtype), exact), name
    written = json.loads((tmp_path / "delta" / "drift.json").read_text())["alignment"]
    assert written["by"] == "names and shapes"
    assert len(written["composed"]) == LAYERS * (3 if fused == "multimodal" else 8)


def test_a_selection_of_the_fused_side_takes_only_what_it_needs(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    text = attention(rng)
    a = write_checkpoint(tmp_path / "a", text)
    b = write_checkpoint(tmp_path / "b", phi(moved(rng, text)))
    report = inspect(a, b, modules="attn", layers=[1])
    names = {row.name.split("layers.")[1] for row in report.stats}
    assert names == {
        "1.self_attn.qkv_proj.weight",
        "1.self_attn.qkv_proj.bias",
        "1.self_attn.o_proj.weight",
    }
    assert report.coverage.fraction == 1.0


# ------------------------------------------------------------------ what does not fit


def test_a_missing_expert_is_refused_by_name(tmp_path: Path) -> None:
    text, vlm = planted(np.random.default_rng(9), 8, 6, "BF16", "BF16")
    del text[f"{AT.format(1)}.2.up_proj.weight"]
    a = write_checkpoint(tmp_path / "a", text)
    b = write_checkpoint(tmp_path / "b", in_form(vlm, "fused"))
    with refused(AlignmentError, "layers.1.mlp.experts.0", "are missing", "experts.2.up_proj"):
        compute_delta(a, b)


def test_another_number_of_experts_is_refused_with_both_shapes(tmp_path: Path) -> None:
    text, vlm = planted(np.random.default_rng(10), 8, 6, "BF16", "BF16")
    fewer = {name: tensor for name, tensor in text.items() if ".experts.2." not in name}
    a = write_checkpoint(tmp_path / "a", fewer)
    b = write_checkpoint(tmp_path / "b", in_form(vlm, "fused"))
    with refused(AlignmentError, "[2, 12, 8]", "[3, 12, 8]"):
        compute_delta(a, b)


def test_experts_of_several_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    text, vlm = planted(np.random.default_rng(11), 8, 6, "BF16", "BF16")
    odd = f"{AT.format(0)}.1.up_proj.weight"
    text[odd] = stored(values_of(text[odd]), "F32")
    a = write_checkpoint(tmp_path / "a", text)
    b = write_checkpoint(tmp_path / "b", in_form(vlm, "fused"))
    with refused(CheckpointError, odd, "F32", "BF16"):
        compute_delta(a, b)


@pytest.mark.parametrize("form", ["fused", "transposed"])
def test_halves_in_the_other_order_are_noticed_by_their_weights(tmp_path: Path, form: str) -> None:
    text, vlm = planted(np.random.default_rng(12), 32, 24, "BF16", "BF16")
    swapped = {
        (
            name.replace("gate_", "@").replace("up_", "gate_").replace("@", "up_")
            if "experts" in name
            else name
        ): tensor
        for name, tensor in vlm.items()
    }
    a = write_checkpoint(tmp_path / "a", text)
    b = write_checkpoint(tmp_path / "b", in_form(swapped, form))
    with refused(AlignmentError, "gate_up_proj", "does not resemble", "check_weights=False"):
        compute_delta(a, b)
    assert len(compute_delta(a, b, check_weights=False)) == LAYERS * 4


def test_interleaved_halves_are_noticed_by_their_weights(tmp_path: Path) -> None:
    text, vlm = planted(np.random.default_rng(13), 32, 24, "BF16", "BF16")
    fused = in_form(vlm, "fused")
    for name in [name for name in fused if name.endswith("gate_up_proj")]:
        values = values_of(fused[name])
        woven = values.reshape(EXPERTS, 2, 24, 32).swapaxes(1, 2).reshape(values.shape)
        fused[name] = stored(woven)
    a, b = write_checkpoint(tmp_path / "a", text), write_checkpoint(tmp_path / "b", fused)
    with refused(AlignmentError, "gate_up_proj", "stored in different orders"):
        compute_delta(a, b)


@pytest.mark.parametrize("parts", ["projections", "experts"])
@pytest.mark.parametrize("fused", ["reasoning", "multimodal"])
def test_a_map_that_was_written_gives_the_pairs_that_were_found(
    tmp_path: Path, parts: str, fused: str
) -> None:
    rng = np.random.default_rng(16)
    text = attention(rng) if parts == "projections" else mixture(rng, 8, 6, "BF16")
    vlm = moved(rng, text)

    def together(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        return phi(tensors) if parts == "projections" else in_form(tensors, "transposed")

    left, right = (together(text), vlm) if fused == "reasoning" else (text, together(vlm))
    a, b = write_checkpoint(tmp_path / "a", left), write_checkpoint(tmp_path / "b", right)
    found = compute_delta(a, b)
    drift_fast.align(a, b).save(tmp_path / "map.json")
    stated = compute_delta(a, b, mapping=tmp_path / "map.json")
    assert set(stated) == set(found) == set(right)
    assert all(torch.equal(stated[name], found[name]) for name in found)
    pairs = json.loads((tmp_path / "map.json").read_text())["pairs"]
    if fused == "reasoning":
        name = next(name for name, match in pairs.items() if isinstance(match, list))
        pairs[name].pop()
        with refused(AlignmentError, name, "all of its matches"):
            compute_delta(a, b, mapping=pairs)


def test_values_in_another_order_within_a_fused_tensor_are_noticed(tmp_path: Path) -> None:
    rng = np.random.default_rng(17)
    tensors = {}
    for layer in range(LAYERS):
        for name, rows in (("q_proj", 64), ("k_proj", 16), ("v_proj", 16)):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            tensors[key] = stored(rng.normal(0, 1, (rows, 64)))
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = stored(
            rng.normal(0, 1, (64, 64))
        )
    right = joined(moved(rng, tensors), ("q_proj", "v_proj", "k_proj"), "qkv_proj")
    a, b = write_checkpoint(tmp_path / "a", tensors), write_checkpoint(tmp_path / "b", right)
    with refused(AlignmentError, "qkv_proj", "does not resemble"):
        compute_delta(a, b)


def test_scalars_and_empty_tensors_are_no_obstacle(tmp_path: Path) -> None:
    text, vlm = planted(np.random.default_rng(18), 8, 6, "BF16", "BF16")
    for tensors, prefix in ((text, "model."), (vlm, "model.language_model.")):
        for layer in range(LAYERS):
            at = f"{prefix}layers.{layer}.self_attn."
            tensors[f"{at}k_scale"] = Stored("BF16", (), b"\x80?")
            tensors[f"{at}empty"] = Stored("BF16", (3, 0), b"")
    a = write_checkpoint(tmp_path / "a", text)
    b = write_checkpoint(tmp_path / "b", in_form(vlm, "fused"))
    assert len(compute_delta(a, b)) == LAYERS * 4
    assert len(compute_delta(a, b, modules="re:k_scale|experts", check_weights=False)) == LAYERS * 3


def test_an_expert_of_an_enormous_number_costs_nothing(tmp_path: Path) -> None:
    text, vlm = planted(np.random.default_rng(19), 8, 6, "BF16", "BF16")
    name = f"{AT.format(0)}.100000000000.gate_proj.weight"
    text[name] = text[f"{AT.format(0)}.0.gate_proj.weight"]
    a = write_checkpoint(tmp_path / "a", text)
    b = write_checkpoint(tmp_path / "b", in_form(vlm, "fused"))
    with refused(AlignmentError, "are missing", "experts.3.gate_proj"):
        compute_delta(a, b)


def test_experts_stored_in_both_ways_are_refused(tmp_path: Path) -> None:
    text, vlm = planted(np.random.default_rng(20), 8, 6, "BF16", "BF16")
    a = write_checkpoint(tmp_path / "a", {**text, **in_form(text, "fused")})
    b = write_checkpoint(tmp_path / "b", vlm)
    with refused(AlignmentError, "layers.0.mlp.experts.0.gate_proj"):
        compute_delta(a, write_checkpoint(tmp_path / "c", in_form(vlm, "transposed")))
    mapping = {name: name.replace("model.", "model.language_model.") for name in text}
    assert len(compute_delta(a, b, mapping=mapping, strict=False)) == len(vlm)


# ------------------------------------------------------------------ into a running model


def test_a_square_weight_without_the_other_that_tells_how_it_lies_is_refused(
    tmp_path: Path,
) -> None:
    text, vlm = planted(np.random.default_rng(21), 8, 4, "F32", "F32")
    a = write_checkpoint(tmp_path / "a", in_form(text, "transposed"))
    b = write_checkpoint(tmp_path / "b", in_form(vlm, "transposed"))
    model = Experts(in_form(vlm, "fused"))
    delta = compute_delta(a, b, modules="re:gate_up_proj")
    with refused(AlignmentError, "gate_up_proj", "square", "take both"):
        drift_fast.Injection(model, delta)
    assert drift_fast.match_parameters(model, compute_delta(a, b))


class Experts(torch.nn.Module):
    """Parameters named and stacked as `in_form` stores them."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            values = torch.tensor(values_of(tensor), dtype=torch.float32)
            module.register_parameter(last, torch.nn.Parameter(values))


@pytest.mark.parametrize(("on_disk", "in_memory"), list(itertools.product(FORMS, FORMS)))
def test_each_parameter_in_memory_gets_its_own_delta_whichever_way_it_is_stored(
    tmp_path: Path, on_disk: str, in_memory: str
) -> None:
    text, vlm = planted(np.random.default_rng(14), 8, 6, "F32", "F32")
    a = write_checkpoint(tmp_path / "text", text)
    b = write_checkpoint(tmp_path / "vlm", in_form(vlm, on_disk))
    delta = compute_delta(a, b, tmp_path / "delta", dtype="float32")
    model = Experts(in_form(vlm, in_memory))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with drift_fast.Injection(model, delta, scale="absolute") as injection:
        injection.step()
        assert injection.coverage.fraction == 1.0
        assert {name for name, _ in injection.coverage.matched} == set(delta)
    expected = in_form(text, in_memory)
    for name, parameter in model.named_parameters():
        source = values_of(expected[name.replace("language_model.", "")])
        difference = source - parameter.detach().numpy().astype(np.float64)
        assert parameter.grad is not None
        assert np.array_equal(parameter.grad.numpy(), -difference.astype(np.float32)), name


def test_a_part_of_a_fused_parameter_that_is_not_selected_is_refused(tmp_path: Path) -> None:
    text, vlm = planted(np.random.default_rng(15), 8, 6, "F32", "F32")
    a, b = write_checkpoint(tmp_path / "a", text), write_checkpoint(tmp_path / "b", vlm)
    delta = compute_delta(a, b)
    model = Experts(in_form(vlm, "fused"))
    with refused(drift_fast.CoverageError, "experts.0.up_proj", "part"):
        drift_fast.Injection(model, delta, modules=r"re:experts\.\d+\.up_proj")
