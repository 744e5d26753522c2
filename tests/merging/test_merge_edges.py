"""Merges of tensors that few fine-tunes look like: hardly changed, not finite, or not weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drift_fast import AlignmentError, CheckpointError, DriftWarning, NonFiniteError
from drift_fast.merging.merge import merge
from support import merge_reference
from support.merged_models import (
    PREFIX,
    Three,
    agrees,
    exact,
    near,
    stored_tensors,
    text_name,
    write_three,
)
from support.synthetic import (
    Stored,
    language_model,
    opaque,
    refused,
    stored,
    widen,
    write_checkpoint,
)

# The core samples 16 runs of this many elements, evenly spread, of tensors longer than 2**18.
RUN, RUNS = 1024, 16


def write_vlm(directory: Path, backbone: dict[str, Stored], **more: Stored) -> Path:
    """Write a multimodal model of the tensors of a text model and others."""
    renamed = {name.replace("model.", PREFIX, 1): tensor for name, tensor in backbone.items()}
    path = write_checkpoint(directory, {**renamed, **more})
    (path / "config.json").write_text("{}")
    return path


# ------------------------------------------------------------------ thresholds


def few_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    mask = np.zeros(shape, bool)
    mask[rng.random(shape[0]) < 0.1] = True
    return mask


def outside_the_sample(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    mask = np.ones(int(np.prod(shape)), bool)
    for run in range(RUNS):
        start = (mask.size - RUN) // (RUNS - 1) * run
        mask[start : start + RUN] = False
    return mask.reshape(shape)


@pytest.mark.parametrize("moved", [few_rows, outside_the_sample])
@pytest.mark.parametrize("seed", range(3))
def test_a_threshold_is_counted_even_where_a_sample_sees_nothing_move(
    tmp_path: Path, out: Path, moved: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    origin = {
        name: tensor
        for name, tensor in language_model(rng, layers=1, hidden=600, inner=900, vocab=20).items()
        if "embed" not in name and "head" not in name
    }

    def tuned(tensor: Stored) -> Stored:
        values = tensor.values.reshape(tensor.shape)
        if len(tensor.shape) == 1:
            return tensor
        step = rng.normal(0, 0.05, tensor.shape)
        return stored(np.where(moved(rng, tensor.shape), values + step, values))

    text = {name: tuned(tensor) for name, tensor in origin.items()}
    backbone = {name: tuned(tensor) for name, tensor in origin.items()}
    three = Three(
        write_checkpoint(tmp_path / "text", text),
        write_vlm(tmp_path / "vlm", backbone),
        write_checkpoint(tmp_path / "base", origin),
        text,
        {name.replace("model.", PREFIX, 1): tensor for name, tensor in backbone.items()},
        origin,
    )
    merged = merge(
        "ties",
        three.reasoning,
        three.multimodal,
        out,
        base=three.base,
        density=0.05,
        modules="mlp",
    )
    tensors = stored_tensors(out)
    for tensor in merged.tensors:
        if not tensor.sources:
            continue
        options = {"w": 1.0, "v": 1.0, "density": 0.05, "base": three.base}
        agrees(three, tensor.name, tensors[tensor.name], "ties", options)
        b = exact(origin, text_name(tensor.name))
        r, m = exact(text, text_name(tensor.name)), exact(three.vlm, tensor.name)
        assert tensor.kept_reasoning == merge_reference.top(r - b, 0.05).sum()
        assert tensor.kept_multimodal == merge_reference.top(m - b, 0.05).sum()


# ------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_what_is_not_finite_takes_no_place_among_the_largest_and_stays_to_be_seen(
    tmp_path: Path, out: Path, method: str, with_base: bool
) -> None:
    """A quarter of R and a row of M are NaN; a fifth of what is left is kept beside them."""
    three = write_three(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    ours = name.replace("model.", PREFIX, 1)
    r, m = exact(three.text, name).copy(), exact(three.vlm, ours).copy()
    r[:2], r[2, 0], m[7] = np.nan, np.inf, np.nan
    merged = merge(
        method,
        write_checkpoint(tmp_path / "broken-text", {**three.text, name: stored(r)}),
        write_vlm(
            tmp_path / "broken-vlm",
            {text_name(n): t for n, t in three.vlm.items() if PREFIX in n} | {name: stored(m)},
        ),
        out,
        base=three.base if with_base else None,
        density=0.2 if method == "ties" else 1.0,
        modules="attn",
        check_weights=False,
        allow_nonfinite=True,
    )
    found = widen(np.frombuffer(stored_tensors(out)[ours][2], "<u2"), "BF16").reshape(8, 8)
    assert np.isnan(found[:2]).all()
    assert np.isnan(found[7]).all()
    assert not np.isfinite(found[2, 0])
    assert np.isfinite(found).sum() == 64 - 16 - 8 - 1
    row = next(tensor for tensor in merged.tensors if tensor.name == ours)
    assert row.nonfinite == 16 + 1 + 8
    assert row.overflow == 0
    if method == "ties":
        b = exact(three.origin, name) if with_base else m
        assert row.kept_reasoning == merge_reference.top(r - b, 0.2).sum()
        expected = merge_reference.METHODS["ties"](
            r, m, b if with_base else None, w=1.0, v=1.0, density=0.2
        )
        finite = np.isfinite(found)
        assert np.allclose(found[finite], expected[finite], rtol=2**-8)


def test_rows_that_stay_are_counted_where_the_dtype_cannot_hold_them(
    tmp_path: Path, out: Path
) -> None:
    sides = {
        side: language_model(np.random.default_rng(1), vocab=rows, dtype="F32")
        for side, rows in (("text", 17), ("vlm", 19))
    }
    name = "model.embed_tokens.weight"
    values = exact(sides["vlm"], name).copy()
    values[17:, :3] = 1e6
    values[18, 7] = -65519.0
    sides["vlm"][name] = stored(values, "F32")
    sources = (
        write_checkpoint(tmp_path / "text", sides["text"]),
        write_vlm(tmp_path / "vlm", sides["vlm"]),
    )
    options: dict[str, Any] = {"weight": 0.5, "rows": "index", "check_weights": False}
    with refused(NonFiniteError, "6 results are beyond the range of float16", "float32"):
        merge("linear", *sources, out, dtype="float16", **options)
    assert not out.exists()
    merged = merge("linear", *sources, out, dtype="float16", allow_nonfinite=True, **options)
    ours = name.replace("model.", PREFIX, 1)
    counts = {tensor.name: tensor.overflow for tensor in merged.tensors if tensor.overflow}
    assert counts == {ours: 6}
    found = np.frombuffer(stored_tensors(out)[ours][2], "<f2").reshape(19, 8)
    assert np.isinf(found).sum() == 6
    assert found[18, 7] == -65504


# ------------------------------------------------------------------ a base that needs a mapping


def inserted(tmp_path: Path, prefix: str) -> tuple[Path, Path, Path, dict[str, str]]:
    """Return R, M and B, and a map to M, which has a layer more between R's two."""
    rng = np.random.default_rng(4)
    origin = language_model(rng, dtype="F32")
    text, deeper = near(rng, origin, "F32"), near(rng, origin, "F32")
    moved = {
        name: name.replace("model.", PREFIX, 1).replace("layers.1.", "layers.2.") for name in origin
    }
    more = {
        name.replace("layers.0.", "layers.1."): tensor
        for name, tensor in deeper.items()
        if "layers.0." in name
    }
    vlm = {moved[name]: tensor for name, tensor in deeper.items()}
    vlm |= {name.replace("model.", PREFIX, 1): tensor for name, tensor in more.items()}
    multimodal = write_checkpoint(tmp_path / "vlm", vlm)
    (multimodal / "config.json").write_text("{}")
    base = {name.replace("model.", prefix, 1): tensor for name, tensor in origin.items()}
    return (
        write_checkpoint(tmp_path / "text", text),
        multimodal,
        write_checkpoint(tmp_path / "base", base),
        moved,
    )


def test_a_mapping_stands_for_the_base_too_where_it_has_the_names(
    tmp_path: Path, out: Path
) -> None:
    reasoning, multimodal, base, mapping = inserted(tmp_path, "model.")
    options: dict[str, Any] = {"base": base, "modules": "mlp", "weight": 0.5}
    merge("task_arithmetic", reasoning, multimodal, out, mapping=mapping, **options)
    r, m, b, found = (stored_tensors(path) for path in (reasoning, multimodal, base, out))
    name = "model.layers.1.mlp.up_proj.weight"
    values = [
        np.frombuffer(tensors[own][2], "<f4").astype(np.float64)
        for tensors, own in ((r, name), (m, mapping[name]), (b, name), (found, mapping[name]))
    ]
    assert np.allclose(values[3], values[1] + 0.5 * (values[0] - values[2]), rtol=1e-6, atol=1e-7)
    described = json.loads((out / "merge.json").read_bytes())["alignment"]["base"]["by"]
    assert described == "the mapping given"


def test_a_base_of_other_names_has_a_mapping_of_its_own_which_the_refusal_names(
    tmp_path: Path, out: Path
) -> None:
    reasoning, multimodal, base, mapping = inserted(tmp_path, "transformer.")
    options: dict[str, Any] = {"base": base, "modules": "mlp", "weight": 0.5, "mapping": mapping}
    with refused(AlignmentError, "the base:", base, "does not hold", "base_mapping="):
        merge("task_arithmetic", reasoning, multimodal, out, **options)
    assert not out.exists()
    own = {name.replace("model.", "transformer.", 1): there for name, there in mapping.items()}
    merged = merge("task_arithmetic", reasoning, multimodal, out, base_mapping=own, **options)
    assert {tensor.layer for tensor in merged.tensors if tensor.sources} == {0, 2}
    with refused(ValueError, "base_mapping", "base="):
        merge("linear", reasoning, multimodal, tmp_path / "no", weight=0.5, base_mapping=own)


# ------------------------------------------------------------------ weights and what is no weight


@pytest.mark.parametrize(
    ("weight", "more", "unused"),
    [
        ({"attn": 0.5, "head": 0.5}, {}, "'head'"),
        ({"all": 0.5, "norm": 0.1}, {"modules": ["attn", "mlp"]}, "'norm'"),
        ({"attn": 0.5, "embed": 0.5}, {"layers": 0}, "'embed'"),
    ],
)
def test_a_weight_that_no_merged_tensor_has_is_refused(
    tmp_path: Path, out: Path, weight: dict[str, float], more: dict[str, Any], unused: str
) -> None:
    three = write_three(tmp_path, head=None)
    with refused(ValueError, unused, "no merged tensor", "attn"):
        merge("linear", three.reasoning, three.multimodal, out, weight=weight, rows="index", **more)
    assert not out.exists()


def experts(rng: np.random.Generator) -> dict[str, Stored]:
    """Return a model whose layers have two experts, a shared one and what chooses."""
    tensors = language_model(rng, dtype="F32")
    for name in [name for name in tensors if ".mlp." in name]:
        tensor = tensors.pop(name)
        for expert in ("experts.0", "experts.1", "shared_expert"):
            tensors[name.replace(".mlp.", f".mlp.{expert}.")] = tensor
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = stored(rng.normal(0, 1, (2, 8)), "F32")
    return tensors


def test_routers_that_stay_while_their_experts_are_merged_are_named(
    tmp_path: Path, out: Path
) -> None:
    rng = np.random.default_rng(5)
    origin = experts(rng)
    text, backbone = near(rng, origin, "F32"), near(rng, origin, "F32")
    sources = write_checkpoint(tmp_path / "text", text), write_vlm(tmp_path / "vlm", backbone)
    gate = f"{PREFIX}layers.1.mlp.gate.weight"
    with pytest.warns(DriftWarning, match="2 tensors that choose") as caught:
        merged = merge("linear", *sources, out, weight={"mlp": 0.5})
    assert gate in str(caught[0].message)
    assert gate in merged.copied
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        merge("linear", *sources, tmp_path / "attn", weight={"attn": 0.5})
        for at, more in enumerate(
            (
                {"weight": 0.5, "rows": "index"},
                {"weight": {"mlp": 0.5, "all": 0.1}, "modules": ["mlp", r"re:\.(gate|router)\."]},
            )
        ):
            options: dict[str, Any] = more
            assert gate in merge("linear", *sources, tmp_path / str(at), **options).merged


def test_buffers_are_carried_over_unless_a_pattern_names_them(tmp_path: Path, out: Path) -> None:
    rng = np.random.default_rng(6)
    text = language_model(rng, dtype="F32")
    at = "model.layers.0.self_attn."
    frequencies = f"{at}rotary_emb.inv_freq"
    whole = {f"{at}masked_bias": "I64", f"{at}bias": "BOOL", f"{at}steps": "I32"}
    buffers = {name: opaque(dtype, 1, 4) for name, dtype in whole.items()}
    sides = {}
    for side, size in (("text", 1.0), ("vlm", 2.0)):
        sides[side] = {
            **near(rng, text, "F32"),
            **buffers,
            frequencies: stored(size / np.arange(1, 5), "F32"),
        }
    sources = (
        write_checkpoint(tmp_path / "text", sides["text"]),
        write_vlm(tmp_path / "vlm", sides["vlm"]),
    )
    options: dict[str, Any] = {"weight": 0.5, "rows": "index"}
    for modules in (None, "all"):
        merged = merge("linear", *sources, out, modules=modules, overwrite=True, **options)
        before, after = stored_tensors(sources[1]), stored_tensors(out)
        reasons = {tensor.name: tensor.reason for tensor in merged.tensors}
        for name in (frequencies, *buffers):
            ours = name.replace("model.", PREFIX, 1)
            assert "not a weight" in reasons[ours]
            assert before[ours] == after[ours]
            assert ours not in merged.merged
    with refused(CheckpointError, "masked_bias", "I64", "modules"):
        merge("linear", *sources, tmp_path / "no", modules=["attn", "re:masked"], **options)
    merged = merge("linear", *sources, tmp_path / "named", modules=["attn", "re:inv_"], **options)
    assert frequencies.replace("model.", PREFIX, 1) in merged.merged


@pytest.mark.parametrize("name", ["self_attn.q_proj.qweight", "mlp.experts.gate_up_proj_blocks"])
def test_whole_numbers_that_hold_a_weight_are_refused_not_carried_over(
    tmp_path: Path, out: Path, name: str
) -> None:
    text = language_model(np.random.default_rng(6), dtype="F32")
    text |= {f"model.layers.0.{name}": opaque("I32", 2, 4)}
    sources = write_checkpoint(tmp_path / "text", text), write_vlm(tmp_path / "vlm", text)
    with refused(CheckpointError, name, "I32"):
        merge("linear", *sources, out, weight=0.5, rows="index", check_weights=False)
    assert not out.exists()
