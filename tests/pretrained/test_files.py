"""The verbs on files of a pre-trained model, against float64: check, align, delta, merge, plan."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import drift_fast
from drift_fast import align, check, compute_delta, inspect, merge, plan
from support import merge_reference, reference
from support.synthetic import round_once

from .conftest import SHARES, Files

pytestmark = [pytest.mark.pretrained, pytest.mark.timeout(1200)]

LAYERS, LAYER_MATRICES, NORMS = 30, 7, 61
SHELLS = ("llava", "idefics3", "smolvlm")


class Stored:
    """The language tensors of a checkpoint by what every naming shares, by safetensors alone."""

    def __init__(self, directory: Path) -> None:
        self.names: dict[str, tuple[Any, str]] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = safe_open(path, "pt")
            for name in list(file.keys()):
                if not any(part in name for part in ("vision", "connector", "projector")):
                    self.names[short(name)] = file, name

    def __getitem__(self, called: str) -> torch.Tensor:
        file, name = self.names[called]
        found: torch.Tensor = file.get_tensor(name)
        return found


def short(name: str) -> str:
    starts = ("layers.", "embed_tokens.", "norm.weight", "lm_head.")
    return name[min(at for start in starts if (at := name.find(start)) >= 0) :]


def test_the_model_is_the_one_that_transformers_reads(files: Files) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = files.tokenizer()
    model = transformers.AutoModelForCausalLM.from_pretrained(files.base)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])


@pytest.mark.parametrize("shell", SHELLS)
def test_the_pair_fits_and_comes_from_the_base(files: Files, shell: str) -> None:
    report = check(files.expert, getattr(files, shell), base=files.base, modules="all")
    assert report.ok, str(report)
    assert report.lineage is not None
    assert (report.lineage.verdict, report.lineage.subtract) == ("common base", "base")
    found = report.lineage.distances
    assert found is not None
    assert math.sqrt(found.reasoning_base) == pytest.approx(SHARES["expert"], rel=0.1)
    assert math.sqrt(found.multimodal_base) == pytest.approx(SHARES["multimodal"], rel=0.1)
    notes = {row.subject for row in report.findings if row.severity == "note"}
    # Both tokenizer.json are the same but for the one with a token for images.
    assert ("vocabulary size" in notes) == (shell == "llava")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_language_tensor_is_paired(files: Files, shell: str) -> None:
    found = align(files.expert, getattr(files, shell))
    assert found.ok, str(found)
    assert all(short(first) == short(second) for first, second in found.pairs)
    # Embeddings too, whose rows are matched by token where there are more of them.
    assert {short(first) for first, _ in found.pairs} == set(Stored(files.expert).names)
    assert not found.unmatched_reasoning
    assert found.similarity is not None
    assert found.similarity.matched > 0.999


@pytest.mark.parametrize(
    ("expert", "shell", "dtype"),
    [
        ("expert", "llava", "float32"),
        ("expert", "llava", "bfloat16"),
        ("expert", "smolvlm", "float32"),
        ("expert_bfloat16", "idefics3", "bfloat16"),
    ],
)
def test_every_element_of_delta_is_that_of_float64(
    files: Files, shell: str, expert: str, dtype: str
) -> None:
    paths = getattr(files, expert), getattr(files, shell)
    reasoning, multimodal = map(Stored, paths)
    delta = compute_delta(*paths, dtype=dtype, modules=("attn", "mlp", "norm"))
    assert len(delta) == LAYERS * LAYER_MATRICES + NORMS
    assert delta.coverage.fraction == 1.0
    for at, name in enumerate(delta):
        exact = reasoning[short(name)].double() - multimodal[short(name)].double()
        found = delta[name]
        if dtype == "float32":
            assert torch.equal(found, exact.float()), name
        elif at % 9 == 0:
            bits = round_once(exact.numpy().ravel(), "BF16")
            assert np.array_equal(found.view(torch.int16).numpy().ravel().view(np.uint16), bits)
    row = inspect(*paths, modules=("attn", "mlp", "norm")).stats.total
    square = sum(
        float(((reasoning[x].double() - multimodal[x].double()) ** 2).sum())
        for x in map(short, delta)
    )
    # Partial sums are of float32.
    assert row.delta_sq == pytest.approx(square, rel=2e-6)


def test_a_delta_of_embeddings_is_by_token(files: Files) -> None:
    delta = compute_delta(files.expert, files.llava, dtype="float32", modules="embed")
    (name,) = delta
    reasoning, multimodal = Stored(files.expert), Stored(files.llava)
    rows = reasoning["embed_tokens.weight"].double()
    others = multimodal["embed_tokens.weight"].double()
    assert len(others) > len(rows)
    assert torch.equal(delta[name][: len(rows)], (rows - others[: len(rows)]).float())
    assert not delta[name][len(rows) :].any()
    # Of the rows beyond, one has a token and the others are padding.
    (text,) = delta.alignment["rows"].values()
    assert f"{len(rows):,} of {len(others):,} rows matched by token" in text
    assert "1 only in the multimodal one" in text


@pytest.mark.parametrize("shell", SHELLS)
def test_what_the_multimodal_model_learned_is_taken_where_asked_for(
    files: Files, shell: str
) -> None:
    multimodal = getattr(files, shell)
    with pytest.raises(drift_fast.AlignmentError, match="strict=False"):
        compute_delta(multimodal, files.base)
    delta = compute_delta(multimodal, files.base, dtype="float32", strict=False, min_coverage=1.0)
    first, second = Stored(multimodal), Stored(files.base)
    for name in delta:
        exact = first[short(name)].double() - second[short(name)].double()
        assert torch.equal(delta[name], exact.float()), name


@pytest.mark.parametrize(
    ("method", "numbers", "based"),
    [
        ("linear", {"w": 0.4}, False),
        ("task_arithmetic", {"w": 0.5, "v": 0.9}, True),
        ("ties", {"w": 0.6, "v": 1.0, "density": 0.3}, True),
    ],
)
@pytest.mark.parametrize("shell", ["llava", "smolvlm"])
# Rounding to bfloat16 is half of a shift of this size, which the merge says.
@pytest.mark.filterwarnings("ignore::drift_fast.DriftWarning")
def test_a_merged_model_is_that_of_float64_and_loads(
    files: Files, tmp_path: Path, shell: str, method: str, numbers: dict[str, float], based: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    keywords = {"w": "weight", "v": "multimodal_weight", "density": "density"}
    options: dict[str, Any] = {keywords[key]: value for key, value in numbers.items()}
    if based:
        options["base"] = files.base
    multimodal = getattr(files, shell)
    out = tmp_path / "merged"
    merged = merge(method, files.expert, multimodal, out, modules=("attn", "mlp"), **options)
    assert len(merged.merged) == LAYERS * LAYER_MATRICES
    models = [Stored(path) for path in (files.expert, multimodal, files.base, out)]
    for at, name in enumerate(merged.merged):
        r, m, b, found = (model[short(name)] for model in models)
        assert found.dtype == m.dtype
        if at % 7:
            continue
        wide = [tensor.double().numpy() for tensor in (r, m, b)]
        if not based:
            wide[2] = None
        expected = merge_reference.METHODS[method](*wide, **numbers)
        stored = {torch.float32: "F32", torch.bfloat16: "BF16"}[found.dtype]
        bits = round_once(expected.ravel(), stored)
        kind = torch.int32 if stored == "F32" else torch.int16
        seen = found.contiguous().view(kind).numpy().ravel().view(bits.dtype)
        # Sums in another order may round to the neighbour.
        assert np.mean(seen != bits) < 1e-5, name
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(out)
    state = loaded.state_dict()
    name = next(x for x in state if x.endswith("layers.3.mlp.up_proj.weight"))
    assert torch.equal(state[name], models[3]["layers.3.mlp.up_proj.weight"].to(state[name].dtype))
    with torch.no_grad():
        assert torch.isfinite(loaded(input_ids=torch.arange(40, 60)[None]).logits).all()


def test_a_saved_delta_is_merged_as_its_models_are(files: Files, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weight": 0.5, "modules": "attn"}
    compute_delta(files.expert, files.llava, tmp_path / "delta", dtype="float32", modules="attn")
    merge("task_arithmetic", tmp_path / "delta", files.llava, tmp_path / "by-delta", **options)
    merge("task_arithmetic", files.expert, files.llava, tmp_path / "by-models", **options)
    first, second = Stored(tmp_path / "by-delta"), Stored(tmp_path / "by-models")
    assert first.names.keys() == second.names.keys()
    for name in first.names:
        # Δ is rounded to float32 once, and the result once more.
        assert torch.allclose(first[name], second[name], rtol=3e-7, atol=3e-8), name


@pytest.mark.parametrize("shell", SHELLS)
def test_a_plan_counts_the_parameters_that_there_are(files: Files, shell: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = getattr(files, shell)
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(path)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = plan(files.expert, path, samples=64, tokens=64, max_tokens=128)
    numels = {p: p.numel() for p in model.parameters()}
    assert found["multimodal: all"].value == sum(numels.values())


def test_statistics_of_real_weights_are_those_of_float64(files: Files) -> None:
    rows = inspect(files.expert, files.llava, modules="re:layers.7[.].*proj").stats
    reasoning, multimodal = Stored(files.expert), Stored(files.llava)
    assert len(rows) == LAYER_MATRICES
    for row in rows:
        r, m = (reference.exact(x[short(row.name)]).ravel() for x in (reasoning, multimodal))
        assert row.delta_norm == pytest.approx(reference.norm(r - m), rel=1e-6)
        assert row.cosine == pytest.approx(reference.cosine(r, m), rel=1e-6)
        assert row.max_abs == pytest.approx(np.abs(r - m).max(), rel=1e-6)
        assert row.zeros == int(np.sum(r == m))
