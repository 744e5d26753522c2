"""Merges of tensors that few fine-tunes look like: hardly changed, not finite, or not weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merge_reference
from drift_fast import NonFiniteError
from drift_fast.merging import merge
from synthetic import (
    Stored,
    language_model,
    refused,
    stored,
    widen,
    write_checkpoint,
)
from test_merge import PREFIX, Three, agrees, exact, stored_tensors, text_name, write_three

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
        write_checkpoint(tmp_path / "text", {**three.text, name: stored(r)}),
        write_vlm(
            tmp_path / "vlm",
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
    sources = write_checkpoint(tmp_path / "text", sides["text"]), write_vlm(
        tmp_path / "vlm", sides["vlm"]
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
