"""Merged values against float64, and what may and may not alter them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import drift_fast
from drift_fast import AlignmentError, CheckpointError, CoverageError, NonFiniteError
from drift_fast.merging.merge import merge
from support import merge_reference
from support.merged_models import (
    DTYPE_NAMES,
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
    contents,
    language_model,
    refused,
    stored,
    write_checkpoint,
)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"weight": 0.3}),
    ("linear", {"weight": 1.2}),
    ("task_arithmetic", {"weight": 0.7}),
    ("task_arithmetic", {"weight": 0.7, "base": True}),
    ("task_arithmetic", {"weight": 0.7, "base": True, "multimodal_weight": 0.4}),
    ("ties", {"weight": 0.8, "density": 0.2}),
    ("ties", {"density": 0.2, "base": True}),
    ("ties", {"weight": 1.3, "density": 0.7, "base": True, "multimodal_weight": 0.6}),
    ("ties", {"density": 1.0, "base": True}),
    ("dare_linear", {"weight": 0.9, "density": 0.4, "seed": 5}),
    ("dare_linear", {"density": 0.1, "seed": 2**63 + 5, "base": True, "multimodal_weight": 0.5}),
    ("dare_ties", {"density": 0.4, "seed": 1, "base": True, "weight": 0.5}),
    ("dare_ties", {"density": 0.4, "seed": 1}),
    ("slerp", {"weight": 0.35}),
    ("layer_swap", {"keep_layers": 0}),
]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Three:
    return write_three(tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Three:
    """Tensors of more than a chunk, so that thresholds and norms are put together from several."""
    return write_three(tmp_path_factory.mktemp("large"), layers=1, hidden=600, inner=900, vocab=20)


def check(three: Three, out: Path, method: str, given: dict[str, Any], **more: Any) -> None:
    options = dict(given)
    base = three.base if options.pop("base", False) else None
    merged = merge(
        method, three.reasoning, three.multimodal, out, base=base, rows="index", **options, **more
    )
    tensors = stored_tensors(out)
    assert set(tensors) == set(three.vlm)
    names = merged.merged
    assert names
    for name in names:
        reference = {
            "w": options.get("weight", 1.0),
            "v": options.get("multimodal_weight", 1.0),
            "density": options.get("density"),
            "seed": options.get("seed"),
            "base": base,
        }
        agrees(three, name, tensors[name], method, reference)


@pytest.mark.parametrize(("method", "options"), CASES, ids=lambda value: str(value))
def test_every_method_is_its_papers_formula_in_float64_rounded_once(
    three: Three, out: Path, method: str, options: dict[str, Any]
) -> None:
    check(three, out, method, options)


@pytest.mark.parametrize(
    ("method", "options"),
    [CASES[index] for index in (4, 6, 7, 11, 13)],
    ids=lambda value: str(value),
)
def test_tensors_of_several_chunks_are_merged_as_one(
    large: Three, out: Path, method: str, options: dict[str, Any]
) -> None:
    check(large, out, method, options)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize(
    "dtypes", [("BF16", "F16", "F32"), ("F32", "BF16", "F16"), ("F16", "F64", "BF16")]
)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp"])
def test_any_mix_of_dtypes_is_merged_into_any(
    tmp_path: Path, dtypes: tuple[str, str, str], dtype: str | None, method: str
) -> None:
    mixed = write_three(tmp_path, dtypes=dtypes)
    options: dict[str, Any] = {"weight": 0.4}
    if method != "slerp":
        options["base"] = True
    if method == "ties":
        options["density"] = 0.5
    check(mixed, tmp_path / "out", method, options, dtype=dtype)
    tensors = stored_tensors(tmp_path / "out")
    expected = dtypes[1] if dtype is None else DTYPE_NAMES[dtype]
    assert tensors[f"{PREFIX}norm.weight"][0] == expected
    tower = next(name for name in tensors if name.startswith("vision_tower"))
    assert tensors[tower][0] == "BF16"


def test_a_result_just_beside_a_midpoint_is_rounded_once(tmp_path: Path, out: Path) -> None:
    """By way of float32 it would become the midpoint and go to even."""
    three = write_three(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    values = np.tile([1 + 2**-8 - 2**-40, 1 + 2**-8, 1 + 2**-8 + 2**-40, 1 + 3 * 2**-8], 16)
    text = {**three.text, name: stored(values.reshape(8, 8), "F64")}
    merge(
        "layer_swap",
        write_checkpoint(tmp_path / "wide", text),
        three.multimodal,
        out,
        keep_layers=0,
        check_weights=False,
    )
    dtype, _, body = stored_tensors(out)[name.replace("model.", PREFIX, 1)]
    assert dtype == "BF16"
    assert list(np.frombuffer(body, "<u2")[:4]) == [0x3F80, 0x3F80, 0x3F81, 0x3F82]


def test_tensors_far_apart_go_along_the_great_circle_and_near_ones_along_the_line(
    tmp_path: Path, out: Path
) -> None:
    rng = np.random.default_rng(3)
    text = language_model(rng, dtype="F32")
    near_name, far_name = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    vlm = {
        name.replace("model.", PREFIX, 1): stored(
            rng.normal(0, 1, tensor.shape)
            if name == far_name
            else tensor.values.reshape(tensor.shape) * 1.5,
            "F32",
        )
        for name, tensor in text.items()
    }
    three = Three(
        write_checkpoint(tmp_path / "text", text),
        write_checkpoint(tmp_path / "vlm", vlm),
        tmp_path,
        text,
        vlm,
        {},
    )
    (three.multimodal / "config.json").write_text("{}")
    merged = merge(
        "slerp",
        three.reasoning,
        three.multimodal,
        out,
        weight=0.5,
        rows="index",
        check_weights=False,
    )
    cosines = {tensor.name: tensor.cosine for tensor in merged.tensors}
    assert abs(cosines[far_name.replace("model.", PREFIX, 1)] or 1) < 0.5
    assert cosines[near_name.replace("model.", PREFIX, 1)] == pytest.approx(1.0)
    for name in (near_name, far_name):
        ours = name.replace("model.", PREFIX, 1)
        agrees(three, ours, stored_tensors(out)[ours], "slerp", {"w": 0.5})


# ------------------------------------------------------------------ weights and selections


def unchanged(three: Three, out: Path) -> set[str]:
    before, after = stored_tensors(three.multimodal), stored_tensors(out)
    return {name for name in before if before[name] == after[name]}


def test_each_kind_of_module_has_its_own_weight_and_kinds_without_one_stay(
    three: Three, out: Path
) -> None:
    weights = {"attn": 0.7, "mlp": 1.25}
    merged = merge("task_arithmetic", three.reasoning, three.multimodal, out, weight=weights)
    tensors = stored_tensors(out)
    for tensor in merged.tensors:
        if tensor.sources:
            assert tensor.weight == weights[tensor.kind]
            options = {"w": tensor.weight, "v": 1.0}
            agrees(three, tensor.name, tensors[tensor.name], "task_arithmetic", options)
    assert {tensor.kind for tensor in merged.tensors if tensor.sources} == {"attn", "mlp"}
    assert set(merged.copied) <= unchanged(three, out)
    assert f"{PREFIX}norm.weight" in merged.copied


def test_all_stands_for_the_kinds_that_a_mapping_does_not_name(three: Three, out: Path) -> None:
    merged = merge(
        "linear",
        three.reasoning,
        three.multimodal,
        out,
        weight={"all": 0.25, "mlp": 0.5},
        rows="index",
    )
    found = {tensor.kind: tensor.weight for tensor in merged.tensors if tensor.sources}
    assert found == {"attn": 0.25, "mlp": 0.5, "norm": 0.25, "embed": 0.25, "head": 0.25}


def test_modules_and_layers_restrict_what_is_merged(three: Three, out: Path) -> None:
    merged = merge(
        "linear", three.reasoning, three.multimodal, out, weight=0.5, modules="attn", layers=1
    )
    assert {(tensor.kind, tensor.layer) for tensor in merged.tensors if tensor.sources} == {
        ("attn", 1)
    }
    assert set(merged.copied) == unchanged(three, out)
    reasons = {tensor.name: tensor.reason for tensor in merged.tensors}
    assert reasons[f"{PREFIX}layers.0.self_attn.q_proj.weight"] == "not selected"


def test_a_swap_keeps_the_first_layers_and_everything_outside_the_layers(
    three: Three, out: Path
) -> None:
    merged = merge("layer_swap", three.reasoning, three.multimodal, out, keep_layers=1)
    assert {tensor.layer for tensor in merged.tensors if tensor.sources} == {1}
    tensors = stored_tensors(out)
    for name in merged.merged:
        assert tensors[name][2] == stored_tensors(three.reasoning)[text_name(name)][2]
    assert set(merged.copied) == unchanged(three, out)


def test_rows_of_an_embedding_without_a_counterpart_stay_as_they_are(
    tmp_path: Path, out: Path
) -> None:
    """The expert has more rows, the base fewer; trimming counts what both have."""
    rng = np.random.default_rng(9)
    shapes = {"text": 21, "base": 17, "vlm": 19}
    tensors = {
        side: language_model(
            np.random.default_rng(1),
            vocab=rows,
            prefix=PREFIX if side == "vlm" else "model.",
            dtype="F32",
        )
        for side, rows in shapes.items()
    }
    tensors = {side: near(rng, found, "F32") for side, found in tensors.items()}
    paths = {side: write_checkpoint(tmp_path / side, found) for side, found in tensors.items()}
    (paths["vlm"] / "config.json").write_text("{}")
    name = f"{PREFIX}embed_tokens.weight"
    for method, density in (("task_arithmetic", None), ("ties", 0.3)):
        merged = merge(
            method,
            paths["text"],
            paths["vlm"],
            out,
            base=paths["base"],
            density=density,
            multimodal_weight=0.5,
            rows="index",
            overwrite=True,
            check_weights=False,
        )
        row = next(tensor for tensor in merged.tensors if tensor.name == name)
        assert row.merged == 17 * 8
        dtype, shape, body = stored_tensors(out)[name]
        found = np.frombuffer(body, "<f4").reshape(shape)
        m = exact(tensors["vlm"], name)
        assert np.array_equal(found[17:], m[17:].astype(np.float32))
        cut = [exact(tensors[side], "model.embed_tokens.weight")[:17] for side in ("text", "base")]
        expected = merge_reference.METHODS[method](
            cut[0], m[:17], cut[1], w=1.0, v=0.5, density=density
        )
        assert np.allclose(found[:17], expected, rtol=1e-6, atol=1e-9)
        assert dtype == "F32"


def test_what_was_kept_is_in_the_report(large: Three, out: Path) -> None:
    merged = merge(
        "ties", large.reasoning, large.multimodal, out, base=large.base, density=0.1, modules="mlp"
    )
    for tensor in merged.tensors:
        if tensor.sources:
            b = exact(large.origin, text_name(tensor.name))
            for source, kept in (
                (exact(large.text, text_name(tensor.name)), tensor.kept_reasoning),
                (exact(large.vlm, tensor.name), tensor.kept_multimodal),
            ):
                assert kept == merge_reference.top(source - b, 0.1).sum() >= 0.1 * b.size - 1


def test_what_is_dropped_depends_on_seed_name_model_and_element_alone(
    large: Three, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"density": 0.5, "modules": "mlp", "base": large.base}
    for run, more in enumerate(({"seed": 3}, {"seed": 3, "layers": 0}, {"seed": 4})):
        merge(
            "dare_linear", large.reasoning, large.multimodal, tmp_path / str(run), **options, **more
        )
    first, again, other = (contents(tmp_path / str(run)) for run in range(3))
    assert first == again != other


# ------------------------------------------------------------------ what must not alter a bit


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {"weight": 0.3}),
        ("ties", {"density": 0.3, "base": True}),
        ("dare_ties", {"density": 0.3, "base": True, "seed": 1}),
        ("slerp", {"weight": 0.3}),
    ],
)
def test_threads_memory_and_reader_alter_no_bit(
    large: Three, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    options = {**options, "rows": "index"}
    if options.pop("base", False):
        options["base"] = large.base
    with pytest.raises(ValueError, match="is too small") as caught:
        merge(method, large.reasoning, large.multimodal, tmp_path / "small", memory=1, **options)
    least = re.search(r"pass memory=(\d+)", str(caught.value))
    assert least is not None
    assert not (tmp_path / "small").exists()
    found = {}
    for way in (
        {"threads": 1, "memory": int(least[1])},
        {"threads": 2},
        {"threads": 7, "reader": "mmap", "memory": "1GB"},
    ):
        out = tmp_path / str(way["threads"])
        merged = merge(method, large.reasoning, large.multimodal, out, **options, **way)
        found[way["threads"]] = contents(out)
        if "memory" in way and way["threads"] == 1:
            assert merged.peak_nbytes <= int(least[1])
    assert found[1] == found[2] == found[7]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("average", {}, ["method", "linear", "average"]),
        ("linear", {}, ["linear needs a weight"]),
        ("slerp", {}, ["slerp needs a weight"]),
        ("linear", {"weight": 0.5, "base": True}, ["does not take a base", "task_arithmetic"]),
        ("layer_swap", {}, ["keep_layers"]),
        ("layer_swap", {"keep_layers": 1, "weight": 1.0}, ["leave weight out"]),
        ("layer_swap", {"keep_layers": -1}, ["keep_layers", "-1"]),
        ("linear", {"weight": 0.5, "keep_layers": 1}, ["keep_layers", "layer_swap"]),
        ("ties", {}, ["ties needs a density"]),
        ("ties", {"density": 0}, ["density", "above 0"]),
        ("ties", {"density": 1.5}, ["density", "at most 1"]),
        ("ties", {"density": 0.5, "seed": 1}, ["does not take seed", "dare_linear"]),
        ("task_arithmetic", {"density": 0.5}, ["does not take density", "ties"]),
        ("dare_ties", {"density": 0.5, "seed": -1}, ["seed", "-1"]),
        ("task_arithmetic", {"multimodal_weight": 0.5}, ["needs base"]),
        ("task_arithmetic", {"weight": float("nan")}, ["weight", "nan"]),
        ("task_arithmetic", {"weight": {"attention": 1.0}}, ["'attention'", "attn"]),
        ("task_arithmetic", {"weight": {}}, ["empty mapping"]),
        ("task_arithmetic", {"weight": {"attn": 1.0}, "modules": "mlp"}, ["no number for 'mlp'"]),
        ("linear", {"weight": 0.5, "dtype": "int8"}, ["dtype", "int8"]),
        ("linear", {"weight": 0.5, "threads": 0}, ["threads"]),
    ],
)
def test_an_argument_without_meaning_is_refused(
    three: Three, out: Path, method: str, options: dict[str, Any], words: list[str]
) -> None:
    options = dict(options)
    if options.pop("base", False):
        options["base"] = three.base
    with refused(ValueError, *words):
        merge(method, three.reasoning, three.multimodal, out, **options)
    assert not out.exists()


def test_embeddings_without_tokenizers_are_refused_with_the_remedy(three: Three, out: Path) -> None:
    with refused(CoverageError, "tokenizer", 'rows="index"', "embed_tokens"):
        merge("linear", three.reasoning, three.multimodal, out, weight=0.5)
    assert not out.exists()


def test_what_the_base_does_not_have_is_refused_or_carried_over(
    three: Three, tmp_path: Path, out: Path
) -> None:
    missing = "model.layers.1.mlp.up_proj.weight"
    origin = {name: tensor for name, tensor in three.origin.items() if name != missing}
    base = write_checkpoint(tmp_path / "base", origin)
    options: dict[str, Any] = {"base": base, "modules": "mlp"}
    with refused(AlignmentError, "up_proj", "strict=False", base):
        merge("task_arithmetic", three.reasoning, three.multimodal, out, **options)
    assert not out.exists()
    merged = merge(
        "task_arithmetic", three.reasoning, three.multimodal, out, strict=False, **options
    )
    name = missing.replace("model.", PREFIX, 1)
    reasons = {tensor.name: tensor.reason for tensor in merged.tensors}
    assert reasons[name] == "no match in the base"
    assert name in unchanged(three, out)


@pytest.mark.parametrize("side", ["text", "vlm", "base"])
def test_a_value_that_is_not_finite_is_refused_or_counted(
    tmp_path: Path, out: Path, side: str
) -> None:
    three = write_three(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    of = {"text": three.text, "vlm": three.vlm, "base": three.origin}[side]
    own = name.replace("model.", PREFIX, 1) if side == "vlm" else name
    values = exact(of, own)
    values[1, 2], values[3, 4] = np.nan, np.inf
    shards = {"text": 2, "vlm": 3, "base": 1}[side]
    path = write_checkpoint(tmp_path / side, {**of, own: stored(values, "BF16")}, shards=shards)
    options: dict[str, Any] = {"base": three.base, "density": 0.5, "modules": "attn"}
    options["check_weights"] = False
    with refused(NonFiniteError, own, "2 NaN or infinite", path, "allow_nonfinite"):
        merge("ties", three.reasoning, three.multimodal, out, **options)
    assert not out.exists()
    merged = merge("ties", three.reasoning, three.multimodal, out, allow_nonfinite=True, **options)
    counts = {tensor.name: tensor.nonfinite for tensor in merged.tensors if tensor.nonfinite}
    assert counts == {name.replace("model.", PREFIX, 1): 2}


def test_a_result_beyond_the_dtype_is_refused_or_counted(three: Three, out: Path) -> None:
    options: dict[str, Any] = {"weight": 1e6, "dtype": "float16", "modules": "attn"}
    with refused(NonFiniteError, "beyond the range of float16", "float32"):
        merge("task_arithmetic", three.reasoning, three.multimodal, out, **options)
    assert not out.exists()
    merged = merge(
        "task_arithmetic",
        three.reasoning,
        three.multimodal,
        out,
        allow_nonfinite=True,
        **options,
    )
    for tensor in merged.tensors:
        if tensor.sources:
            data = np.frombuffer(stored_tensors(out)[tensor.name][2], "<f2")
            assert tensor.overflow == np.sum(~np.isfinite(data.astype(np.float64))) > 0


def test_codes_cannot_be_merged_into(tmp_path: Path, out: Path) -> None:
    three = write_three(tmp_path)
    name = f"{PREFIX}layers.0.self_attn.q_proj.weight"
    codes = Stored("F8_E4M3", (8, 8), bytes(64))
    scale = stored(np.ones((1, 1)), "F32")
    write_checkpoint(
        three.multimodal, {**three.vlm, name: codes, f"{name}_scale_inv": scale}, shards=3
    )
    options: dict[str, Any] = {"weight": 0.5, "check_weights": False}
    with refused(CheckpointError, name, "F8_E4M3", "modules"):
        merge("linear", three.reasoning, three.multimodal, out, modules="attn", **options)
    merged = merge("linear", three.reasoning, three.multimodal, out, modules="mlp", **options)
    before, after = stored_tensors(three.multimodal), stored_tensors(out)
    assert after[name] == before[name]
    assert after[f"{name}_scale_inv"] == before[f"{name}_scale_inv"]
    assert all(tensor.reason for tensor in merged.tensors if not tensor.sources)


def test_the_public_name_is_the_function() -> None:
    assert drift_fast.merge is merge
