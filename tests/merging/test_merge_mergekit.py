"""Merges of two text models beside mergekit's, where `mergekit-yaml` is on the path.

mergekit computes in the tensors' own dtype, here float32, and this library in float64; so values
agree to float32's accuracy, but for the few elements of which that decides whether they are
trimmed. docs/merging.md says where the two differ on purpose.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drift_fast.merging.merge import merge
from support.merged_models import near, stored_tensors
from support.processes import environment, run
from support.synthetic import Stored, language_model, stored, write_checkpoint

MERGEKIT = shutil.which("mergekit-yaml")

pytestmark = [
    pytest.mark.skipif(MERGEKIT is None, reason="mergekit-yaml is not on the path"),
    pytest.mark.slow,
]

CONFIGURATION = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(13)
    base = language_model(rng, hidden=64, inner=96, vocab=32, dtype="F32")

    def apart(scale: float) -> dict[str, Stored]:
        return {
            name: stored(
                tensor.values.reshape(tensor.shape) + rng.normal(0, scale, tensor.shape), "F32"
            )
            for name, tensor in base.items()
        }

    tensors = {"base": base, "r": apart(0.05), "m": apart(0.03), "far": apart(1.0)}
    tensors["same"] = near(rng, base, "F32")
    for name, held in tensors.items():
        write_checkpoint(directory / name, held)
        (directory / name / "config.json").write_text(json.dumps(CONFIGURATION))
    return {name: directory / name for name in tensors}


def theirs(
    directory: Path, method: str, models: list[tuple[Path, dict[str, Any]]], **more: Any
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    recipe = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": own} for path, own in models],
        "dtype": "float32",
        **more,
    }
    configuration = directory / "mergekit.yaml"
    # JSON is YAML.
    configuration.write_text(json.dumps(recipe))
    command = [MERGEKIT, configuration, directory / "theirs", "--no-copy-tokenizer"]
    run(*command, env=environment("PYTHONPATH", HF_HUB_OFFLINE=1), limit=280)
    return values(directory / "theirs")


def values(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    found = {}
    for name, (dtype, shape, body) in stored_tensors(path).items():
        assert dtype == "F32"
        found[name] = np.frombuffer(body, "<f4").astype(np.float64).reshape(shape)
    return found


def apart(
    ours: dict[str, np.ndarray[Any, np.dtype[np.float64]]],
    others: dict[str, np.ndarray[Any, np.dtype[np.float64]]],
) -> float:
    """Return the share of elements that differ by more than float32's accuracy."""
    assert ours.keys() == others.keys()
    differing = [
        ~np.isclose(ours[name], others[name], rtol=2e-6, atol=2e-7).reshape(-1) for name in ours
    ]
    return float(np.mean(np.concatenate(differing)))


def ours(directory: Path, method: str, r: Path, m: Path, **options: Any) -> Any:
    merge(method, r, m, directory / "ours", rows="index", check_weights=False, **options)
    return values(directory / "ours")


def test_linear_is_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    found = theirs(
        tmp_path, "linear", [(models["r"], {"weight": 0.3}), (models["m"], {"weight": 0.7})]
    )
    assert apart(ours(tmp_path, "linear", models["r"], models["m"], weight=0.3), found) == 0


def test_task_arithmetic_is_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    base = models["base"]
    found = theirs(
        tmp_path,
        "task_arithmetic",
        [(models["r"], {"weight": 0.7}), (models["m"], {"weight": 0.4})],
        base_model=str(base),
    )
    mine = ours(
        tmp_path,
        "task_arithmetic",
        models["r"],
        models["m"],
        base=base,
        weight=0.7,
        multimodal_weight=0.4,
    )
    assert apart(mine, found) == 0


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_same_at_equal_weights_where_theirs_normalizes(
    models: dict[str, Path], tmp_path: Path, density: float
) -> None:
    own = {"weight": 1.0, "density": density}
    found = theirs(
        tmp_path,
        "ties",
        [(models["r"], own), (models["m"], own)],
        base_model=str(models["base"]),
        parameters={"normalize": True},
    )
    mine = ours(tmp_path, "ties", models["r"], models["m"], base=models["base"], density=density)
    assert apart(mine, found) <= 1e-3


def test_ties_keeps_what_equals_the_threshold_and_theirs_some_of_it(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Half of the elements did not move, so at a density of 0.9 the threshold is zero."""
    own = {"weight": 1.0, "density": 0.9}
    found = theirs(
        tmp_path,
        "ties",
        [(models["same"], own), (models["m"], own)],
        base_model=str(models["base"]),
        parameters={"normalize": True},
    )
    mine = ours(tmp_path, "ties", models["same"], models["m"], base=models["base"], density=0.9)
    assert apart(mine, found) <= 1e-3


def test_ties_with_unequal_weights_differs_by_what_the_mean_is_divided_by(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """theirs: Σ w·t / Σ w of those that agree; here Σ w·t / how many agree."""
    found = theirs(
        tmp_path,
        "ties",
        [
            (models["r"], {"weight": 0.5, "density": 1.0}),
            (models["m"], {"weight": 0.5, "density": 1.0}),
        ],
        base_model=str(models["base"]),
        parameters={"normalize": True},
    )
    mine = ours(
        tmp_path,
        "ties",
        models["r"],
        models["m"],
        base=models["base"],
        density=1.0,
        weight=0.5,
        multimodal_weight=0.5,
    )
    base = values(models["base"])
    assert apart(mine, found) > 0.9
    halved = {name: base[name] + (found[name] - base[name]) / 2 for name in base}
    assert apart(mine, halved) == 0


@pytest.mark.parametrize("far", [False, True])
def test_slerp_is_the_same(models: dict[str, Path], tmp_path: Path, far: bool) -> None:
    r, m = models["far" if far else "r"], models["m"]
    found = theirs(tmp_path, "slerp", [(m, {}), (r, {})], base_model=str(m), parameters={"t": 0.3})
    assert apart(ours(tmp_path, "slerp", r, m, weight=0.3), found) == 0


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_the_same_where_nothing_is_dropped(
    models: dict[str, Path], tmp_path: Path, method: str
) -> None:
    own = {"weight": 1.0, "density": 1.0}
    found = theirs(
        tmp_path,
        method,
        [(models["r"], own), (models["m"], own)],
        base_model=str(models["base"]),
        parameters={"normalize": method == "dare_ties"},
    )
    mine = ours(tmp_path, method, models["r"], models["m"], base=models["base"], density=1.0)
    assert apart(mine, found) == 0


def test_dare_drops_other_elements_but_as_many_and_rescales_them_about_as_much(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """theirs scales what is left to the L1 norm of the whole; here it is 1 / density."""
    own = {"weight": 1.0, "density": 0.25}
    found = theirs(
        tmp_path,
        "dare_linear",
        [(models["r"], own)],
        base_model=str(models["base"]),
    )
    mine = ours(
        tmp_path,
        "dare_linear",
        models["r"],
        models["m"],
        base=models["base"],
        density=0.25,
        multimodal_weight=0.0,
    )
    base, r = values(models["base"]), values(models["r"])
    # Of few elements the norm tells little.
    base = {name: tensor for name, tensor in base.items() if tensor.size > 1000}
    for result, accuracy in ((mine, 1e-3), (found, 0.2)):
        moved = np.concatenate([(result[name] - base[name]).reshape(-1) for name in base])
        task = np.concatenate([(r[name] - base[name]).reshape(-1) for name in base])
        kept = moved != 0
        # Six standard deviations.
        assert abs(kept.mean() - 0.25) < 6 * np.sqrt(0.25 * 0.75 / kept.size)
        large = kept & (np.abs(task) > 1e-2)
        assert np.allclose(moved[large], 4 * task[large], rtol=accuracy)
    assert apart(mine, found) > 0.3
