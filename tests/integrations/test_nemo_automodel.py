"""The recipe for NeMo AutoModel in docs/stacks.md, and `attach`, in NeMo's own loop.

Owns: that the recipe injects into the gradient of all micro-batches before NeMo clips, `attach`
after it, that α = 0 changes no bit, that NeMo's checkpoints hold the state, and that steps without
an injection are refused. What runs, and what is lifted for a CPU, is support/nemo_runs.py's.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import drift_fast
from installed_stacks import checks
from support import reference
from support.injection_models import moved_text, saved, tiny_qwen2
from support.processes import TESTS, environment, run

pytestmark = [
    pytest.mark.slow,
    # Not imported here: it changes transformers, and joins processes, for good.
    pytest.mark.skipif(
        importlib.util.find_spec("nemo_automodel") is None, reason="nemo_automodel is missing"
    ),
]

CLIP = 0.01
STEPS, SAVED = 4, 2


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with a model, its tokenizer, and a delta."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    start = tiny_qwen2()
    multimodal = saved(start, tmp_path / "multimodal")
    words = {"<pad>": 0, "<eos>": 1, **{f"w{at}": at for at in range(2, 64)}}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    ).save_pretrained(multimodal)
    expert = saved(moved_text(start), tmp_path / "expert")
    drift_fast.compute_delta(expert, multimodal, dtype="float32").save(tmp_path / "delta")
    return tmp_path


def train(world: Path, model: str, accumulation: int, *names: str) -> None:
    variables = environment(
        PYTHONPATH=f"{TESTS}:{TESTS.parent / 'python'}",
        HF_HUB_OFFLINE=1,
        CUDA_VISIBLE_DEVICES="",
    )
    script = TESTS / "support" / "nemo_runs.py"
    words = sys.executable, script, world, model, accumulation, *names
    run(*words, env=variables, cwd=world, limit=280.0)


@pytest.mark.parametrize(
    ("model", "accumulation"), [("hf", 1), ("hf", 4), ("own", 4), ("images", 1), ("images", 4)]
)
def test_the_recipe_injects_the_whole_gradient_before_nemo_clips(
    world: Path, model: str, accumulation: int
) -> None:
    train(world, model, accumulation, "plain", "zero", "injected")
    error = checks.parity(world / "plain", world / "injected", world / "delta", clip=CLIP)
    assert error <= checks.TOLERANCE, error
    assert checks.same(world / "plain", world / "zero", steps=STEPS)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_attach_injects_the_whole_gradient_after_nemo_clips(world: Path, accumulation: int) -> None:
    train(world, "hf", accumulation, "plain", "attached", "attached-zero")
    assert checks.same(world / "plain", world / "attached-zero", steps=STEPS)
    plain, found = (
        load_file(world / name / "gradients.safetensors") for name in ("plain", "attached")
    )
    delta = drift_fast.Delta.open(world / "delta")
    assert plain.keys() == found.keys() > set(delta)
    for name, gradient in plain.items():
        expected = reference.exact(gradient)
        if name in delta:
            expected = reference.inject(gradient, delta[name], alpha=1.0, scale="adaptive")
        error = reference.norm(reference.exact(found[name]) - expected)
        assert error <= 1e-6 * reference.norm(expected), name


def test_a_run_goes_on_from_nemos_checkpoint_with_its_schedule(world: Path) -> None:
    train(world, "hf", 1, "scheduled", "resumed")
    assert checks.same(world / "scheduled", world / "resumed", steps=STEPS, start=SAVED)


def test_a_step_that_clips_by_another_function_is_refused(world: Path) -> None:
    train(world, "hf", 1, "forgetful")
    error = (world / "forgetful" / "error").read_text()
    assert "nothing was injected before this step" in error
