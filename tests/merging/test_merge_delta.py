"""A delta merged in place of a reasoning model: as the model M + Δ, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import drift_fast
from drift_fast import AlignmentError, CheckpointError, Delta
from support.injection_models import (
    moved_text,
    saved,
    text_batch,
    tiny_qwen2,
    tiny_qwen2_5_vl,
)
from support.synthetic import everything_under, refused

METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": 0.5},
    "linear": {"weight": 0.3},
    "ties": {"density": 0.3, "weight": 0.7},
    "dare_linear": {"density": 0.5, "seed": 3},
    "dare_ties": {"density": 0.5},
    "slerp": {"weight": 0.4},
    "layer_swap": {"keep_layers": 1},
}


class Files:
    """A multimodal model, Δ between two text models of its backbone, and M + Δ in float64."""

    def __init__(self, folder: Path) -> None:
        text = tiny_qwen2()
        self.model = saved(tiny_qwen2_5_vl(text=text).bfloat16(), folder / "model")
        self.delta = drift_fast.compute_delta(
            saved(moved_text(text), folder / "expert"),
            saved(text, folder / "base"),
            folder / "delta",
            dtype="float32",
        )
        self.weights = {
            name: tensor
            for shard in self.model.glob("*.safetensors")
            for name, tensor in load_file(shard).items()
        }
        self.names = {
            f"model.language_model.{name.removeprefix('model.')}"
            if f"model.language_model.{name.removeprefix('model.')}" in self.weights
            else name: name
            for name in self.delta
        }
        self.sum = folder / "sum"
        self.sum.mkdir()
        save_file(
            {
                own: self.weights[own].double() + self.delta[name].double()
                for own, name in self.names.items()
            },
            self.sum / "model.safetensors",
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("merge-delta"))


def merged(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for shard in path.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_delta_stands_for_the_model_that_it_leads_to(
    tmp_path: Path, files: Files, method: str
) -> None:
    options = METHODS[method]
    result = drift_fast.merge(
        method, files.delta.path, files.model, tmp_path / "out", dtype="float32", **options
    )
    drift_fast.merge(
        method,
        files.sum,
        files.model,
        tmp_path / "expected",
        dtype="float32",
        strict=False,
        check_weights=False,
        **options,
    )
    found, expected = merged(tmp_path / "out"), merged(tmp_path / "expected")
    assert found.keys() == expected.keys() == files.weights.keys()
    changed = {name for name in found if not torch.equal(found[name], files.weights[name].float())}
    assert changed
    assert changed <= set(result.merged) <= set(files.names)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_task_arithmetic_is_exact(tmp_path: Path, files: Files) -> None:
    drift_fast.merge("task_arithmetic", files.delta, files.model, tmp_path / "out", weight=0.5)
    found = merged(tmp_path / "out")
    for own, name in files.names.items():
        exact = files.weights[own].double() + 0.5 * files.delta[name].double()
        assert found[own].dtype == torch.bfloat16
        assert torch.equal(found[own], exact.float().bfloat16()) or bool(
            ((found[own].double() - exact).abs() <= 2.0**-9 * exact.abs() * 1.001).all()
        )
    said = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert said["sources"]["reasoning"]["delta"] == files.delta.sources


def test_a_protected_delta_is_merged(tmp_path: Path, files: Files) -> None:
    model = tiny_qwen2()
    batches = [text_batch(seed=seed) for seed in range(3)]
    protected = drift_fast.protect(model, files.delta, batches, tmp_path / "protected")
    drift_fast.merge(
        "task_arithmetic", protected, files.model, tmp_path / "out", weight=1.0, dtype="float32"
    )
    found = merged(tmp_path / "out")
    for own, name in files.names.items():
        exact = files.weights[own].double() + protected[name].double()
        assert torch.allclose(found[own].double(), exact, rtol=2.0**-23, atol=0)


def test_what_is_selected(tmp_path: Path, files: Files) -> None:
    result = drift_fast.merge(
        "task_arithmetic",
        files.delta.path,
        files.model,
        tmp_path / "out",
        weight={"mlp": 1.0},
        layers="1",
    )
    assert result.merged
    assert all(".1.mlp." in name for name in result.merged)


def test_what_does_not_fit_is_refused(tmp_path: Path, files: Files) -> None:
    out = tmp_path / "out"

    def attempt(reasoning: Any, multimodal: Path = files.model, **options: Any) -> None:
        drift_fast.merge("task_arithmetic", reasoning, multimodal, out, **options)

    with refused(ValueError, "is a delta", "leave base out"):
        attempt(files.delta.path, base=files.sum)
    with refused(ValueError, "not on disk", "save("):
        attempt(Delta.combine({files.delta: 0.5}))
    codes = drift_fast.compute_delta(
        files.delta.path.parent / "expert",
        files.delta.path.parent / "base",
        tmp_path / "int8",
        dtype="int8",
    )
    with refused(CheckpointError, "int8", "bfloat16"):
        attempt(codes.path)
    attempt(Delta.combine({codes: 1.0}).save(tmp_path / "wider"))
    assert (tmp_path / "out" / "merge.json").exists()
    out = tmp_path / "out of another"
    other = saved(tiny_qwen2_5_vl(text=None), tmp_path / "other")
    for shard in other.glob("*.safetensors"):
        held = load_file(shard)
        for name in set(held) & set(files.names):
            if name.endswith("layers.1.mlp.up_proj.weight"):
                held[name] = held[name][:-1].contiguous()
                save_file(held, shard)
    with refused(AlignmentError, "1 tensors of the delta", "layers.1.mlp.up_proj", "strict=False"):
        attempt(files.delta.path, other)
    assert everything_under(tmp_path) >= {"int8", "other"}
    assert not out.exists()
    attempt(files.delta.path, other, strict=False)
    assert out.exists()


def test_a_damaged_delta_is_refused(tmp_path: Path, files: Files) -> None:
    copy = files.delta.save(tmp_path / "copy").path
    assert copy is not None
    shard = next(copy.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with refused(CheckpointError, "checksum"):
        drift_fast.merge("task_arithmetic", copy, files.model, tmp_path / "out", weight=1.0)
    assert not (tmp_path / "out").exists()
