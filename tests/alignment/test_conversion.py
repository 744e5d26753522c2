"""A config.json is a stranger's: no code of its is run, and no model is built that it makes up."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from drift_fast.alignment.transformers_layout import convert, convert_checkpoint

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
EXPERTS = "model.layers.0.mlp.experts"

needs_machinery = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="4.x converts nothing on loading"
)


def tensors() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for expert in range(4):
        found[f"{EXPERTS}.{expert}.gate_proj.weight"] = (8, 16)
        found[f"{EXPERTS}.{expert}.up_proj.weight"] = (8, 16)
        found[f"{EXPERTS}.{expert}.down_proj.weight"] = (16, 8)
    return found


def write(directory: Path, **entries: Any) -> Path:
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **TINY}
    (directory / "config.json").write_text(json.dumps(config | entries))
    return directory


@needs_machinery
def test_transformers_is_asked_how_experts_become_one_parameter(tmp_path: Path) -> None:
    layouts = convert_checkpoint(write(tmp_path), tensors())
    assert layouts is not None
    fused = layouts[f"{EXPERTS}.gate_up_proj"]
    assert fused.shape == (4, 16, 16)
    first, half = fused.blocks[0], fused.blocks[4]
    assert (first.source, first.start) == (f"{EXPERTS}.0.gate_proj.weight", (0, 0, 0))
    assert (half.source, half.start) == (f"{EXPERTS}.0.up_proj.weight", (0, 8, 0))


@needs_machinery
def test_a_model_in_memory_is_asked_through_its_wrappers_and_left_as_it_was() -> None:
    config = transformers.Qwen3MoeConfig(**TINY)
    model = transformers.Qwen3MoeForCausalLM(config)
    state = torch.get_rng_state()
    layouts = convert(torch.nn.ModuleDict({"module": model}), tensors())
    assert layouts is not None
    assert layouts[f"{EXPERTS}.down_proj"].shape == (4, 16, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_device().type == "cpu"
    assert convert(torch.nn.Linear(2, 2), tensors()) is None


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**7},
        {"vision_config": {"depth": 10**7}},
        {"num_experts": 1e9},
        {"n_layer": 8000},
        {"layers_block_type": [{"repeat_of_blocks": 10**6}]},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_a_config_that_makes_up_a_size_is_not_built(
    tmp_path: Path, entries: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "drift_fast")
    assert convert_checkpoint(write(tmp_path, **entries), tensors()) is None
    assert "more than the checkpoint can hold" in caplog.text


CODE = "open({!r}, 'w').close()\nfrom transformers import PretrainedConfig as Evil\n"


@pytest.mark.parametrize(
    "entries",
    [
        {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
        {"attn_implementation": "org/kernel", "_attn_implementation": "org/kernel"},
        {
            "model_type": "upernet",
            "architectures": ["UperNetForSemanticSegmentation"],
            "backbone": "HERE",
            "use_pretrained_backbone": False,
            "use_timm_backbone": False,
            "backbone_kwargs": {"trust_remote_code": True},
        },
        {
            "model_type": "encoder-decoder",
            "architectures": ["EncoderDecoderModel"],
            "encoder": {"model_type": "bert", "num_hidden_layers": 1},
            "decoder": {
                "model_type": "vit",
                "auto_map": {"AutoModelForCausalLM": "HERE--evil.Evil"},
            },
        },
    ],
    ids=["auto_map", "kernel", "backbone", "part"],
)
def test_code_that_a_config_names_is_never_run_nor_asked_for(
    tmp_path: Path, entries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(CODE.format(str(tmp_path / "ran")))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    text = json.dumps(entries).replace("HERE", str(tmp_path))
    write(tmp_path, **json.loads(text))
    answer = convert_checkpoint(tmp_path, tensors())
    assert not (tmp_path / "ran").exists()
    if "auto_map" in entries and int(transformers.__version__[0]) >= 5:
        # Many published models name code of their own beside a class that transformers has.
        assert answer is not None


@pytest.mark.parametrize(
    "entries",
    [
        {"architectures": ["os.system"]},
        {"architectures": ["AutoModel"]},
        {"architectures": None},
        {"architectures": [3]},
        {"model_type": "nothing"},
        {"hidden_size": "many"},
        {"hidden_size": -1},
    ],
    ids=str,
)
def test_a_config_of_no_model_gives_no_answer(tmp_path: Path, entries: dict[str, Any]) -> None:
    assert convert_checkpoint(write(tmp_path, **entries), tensors()) is None


def test_without_a_config_there_is_no_answer(tmp_path: Path) -> None:
    assert convert_checkpoint(tmp_path, tensors()) is None
