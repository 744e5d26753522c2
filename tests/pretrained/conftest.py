"""A pre-trained language model, experts of it, and multimodal models around it, as files.

Owns what is written; nothing is expected here. The language model is SmolLM2-135M-Instruct from its
package, kept in build/pretrained; the others are it, moved at random by about as much as training
moves real models, and live as long as the session. Their vision towers are small and random.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SHARES = {"expert": 0.012, "multimodal": 0.0075}


@dataclass(frozen=True)
class Files:
    """Directories of transformers; each is written when it is first asked for."""

    directory: Path
    base: Path

    @cached_property
    def expert(self) -> Path:
        """The language model after a training, in float32."""
        return self._saved("expert", self._moved("expert", seed=1))

    @cached_property
    def expert_bfloat16(self) -> Path:
        return self._saved("expert-bfloat16", self._moved("expert", seed=1).to(torch.bfloat16))

    @cached_property
    def llava(self) -> Path:
        """LLaVA in float32, with a token more than the language model and padded rows."""
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        text = self._moved("multimodal", seed=2)
        tokenizer = self.tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        text.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
        config = LlavaConfig(
            vision_config=_vision(),
            text_config=text.config,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
        model = LlavaForConditionalGeneration(config)
        return self._saved("llava", _filled(model, model.model.language_model, text), tokenizer)

    @cached_property
    def idefics3(self) -> Path:
        from transformers import Idefics3Config, Idefics3ForConditionalGeneration

        return self._idefics("idefics3", Idefics3Config, Idefics3ForConditionalGeneration)

    @cached_property
    def smolvlm(self) -> Path:
        from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

        return self._idefics("smolvlm", SmolVLMConfig, SmolVLMForConditionalGeneration)

    def _idefics(self, name: str, config_class: Any, model_class: Any) -> Path:
        """Write one of the two in bfloat16, with the tokens of the language model."""
        text = self._moved("multimodal", seed=2)
        config = config_class(
            vision_config=_vision().to_dict(),
            text_config=text.config,
            image_token_id=16,
            scale_factor=2,
            tie_word_embeddings=True,
        )
        model = model_class(config)
        filled = _filled(model, model.model.text_model, text)
        return self._saved(name, filled.to(torch.bfloat16))

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base)

    def _moved(self, what: str, *, seed: int) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += SHARES[what] * parameter.std() * noise
        return model

    def _saved(self, name: str, model: Any, tokenizer: Any = None) -> Path:
        directory = self.directory / name
        model.save_pretrained(directory)
        (tokenizer or self.tokenizer()).save_pretrained(directory)
        return directory


def _vision() -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )


def _filled(model: Any, backbone: Any, text: Any) -> Any:
    backbone.load_state_dict(text.model.state_dict())
    model.tie_weights()
    return model


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    """The models; what a session has written is removed at its end, since it is gigabytes."""
    example = ROOT / "examples" / "pretrained" / "model.py"
    spec = importlib.util.spec_from_file_location("pretrained_model", example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            base = module.smollm2(ROOT / "build" / "pretrained" / "smollm2")
        except SystemExit as missing:
            pytest.skip(str(missing))
    directory = tmp_path_factory.mktemp("pretrained")
    yield Files(directory, base)
    shutil.rmtree(directory, ignore_errors=True)
