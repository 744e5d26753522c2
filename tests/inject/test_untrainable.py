"""Parameters that no optimizer can train are refused by name when an injection attaches.

Owns: what has no data, what is packed, complex or whole numbers, and what has sparse gradients.
Each remedy is followed where this machine can.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drift_fast
from drift_fast import DriftError, Injection, PlannedMotion
from support.injection_models import (
    Backbone,
    delta_towards,
    moved_text,
    regression_batch,
    regression_loss,
    saved,
    text_loss,
    tiny_qwen2,
    write_checkpoint,
)

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def delta(tmp_path: Path) -> drift_fast.Delta:
    return delta_towards(tmp_path, Backbone())


def attach(model: nn.Module, delta: drift_fast.Delta, how: str) -> None:
    if how == "injection":
        Injection(model, delta).remove()
    else:
        PlannedMotion(model, delta, progress=0.5, steps=2).remove()


BOTH = pytest.mark.parametrize("how", ["injection", "motion"])


@BOTH
def test_a_model_on_the_meta_device_has_no_data(delta: drift_fast.Delta, how: str) -> None:
    weights = Backbone().state_dict()
    with torch.device("meta"):
        model = Backbone()
    with pytest.raises(DriftError, match=rf"{NAME}.*meta device and has no data.*to_empty"):
        attach(model, delta, how)
    model.to_empty(device="cpu").load_state_dict(weights)
    attach(model, delta, how)


def test_one_parameter_on_the_meta_device_is_enough(delta: drift_fast.Delta) -> None:
    model = Backbone()
    module: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    module.to("meta")
    with pytest.raises(DriftError, match=rf"2 of 20 targets cannot be trained, {NAME}"):
        Injection(model, delta, modules=("attn", "mlp"))
    Injection(model, delta, layers=1).remove()


@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
def test_a_model_that_accelerate_offloads_has_no_data(
    tmp_path: Path, delta: drift_fast.Delta, how: str
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Backbone()
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        accelerate.disk_offload(model, str(tmp_path / "away"), execution_device="cpu")
    else:
        places = {"model.layers.0": "disk", "model.layers.1": "cpu", "head": "cpu"}
        accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=str(tmp_path / "away")
        )
    with pytest.raises(DriftError, match=rf"{NAME}.*offloaded by Accelerate.*device_map"):
        Injection(model, delta)


@BOTH
@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.complex64, "it is complex64, and Δ is a real direction"),
        (torch.int8, "it is int8, and packed weights do not train: add LoRA"),
        (torch.uint8, "it is uint8, and packed weights do not train: add LoRA"),
        (torch.float8_e4m3fn, "it is float8_e4m3fn, and packed weights do not train: add LoRA"),
    ],
)
def test_numbers_of_another_kind_are_refused(
    delta: drift_fast.Delta, how: str, dtype: torch.dtype, message: str
) -> None:
    model = Backbone()
    module: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=dtype.is_complex)
    with pytest.raises(DriftError, match=f"{NAME} first: {message}"):
        attach(model, delta, how)


class Packed(torch.Tensor):
    """A weight that a library holds as codes, and shows as bfloat16."""


Packed.__module__ = "torchao.dtypes.affine_quantized_tensor"


def test_a_weight_of_a_packing_library_is_refused_where_it_does_not_train(
    delta: drift_fast.Delta,
) -> None:
    model = Backbone()
    module: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    codes = module.weight.detach().as_subclass(Packed)
    module.weight = nn.Parameter(codes, requires_grad=False)
    with pytest.raises(DriftError, match=rf"{NAME} first: it is a Packed of torchao.*add LoRA"):
        Injection(model, delta)
    # Training in 8 bits, which these libraries have too, is let through.
    module.weight = nn.Parameter(codes)
    Injection(model, delta).remove()


class Coded(nn.Module):
    """A linear layer as GPTQ, AWQ and others hold it: no weight, but codes."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(inner.weight.shape, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(inner.weight.shape[0]))


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_a_model_whose_layers_hold_codes_is_called_quantized(
    tmp_path: Path, layers: list[int]
) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model, modules="attn")
    for layer in layers:
        attention = model.get_submodule(f"model.layers.{layer}.self_attn")
        for name, module in list(attention.named_children()):
            if isinstance(module, nn.Linear):
                setattr(attention, name, Coded(module))
    with pytest.raises(drift_fast.CoverageError, match=r"quantized \(.*qweight\).*add LoRA"):
        Injection(model, delta)


class Reader(nn.Module):
    """An embedding and a head."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed_tokens = nn.Embedding(12, 4, sparse=sparse)
        self.lm_head = nn.Linear(4, 12, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lm_head(self.embed_tokens(rows))
        return out


def reader_delta(folder: Path) -> drift_fast.Delta:
    weights = {f"model.{k}": v for k, v in Reader(sparse=False).state_dict().items()}
    moved = {name: tensor + 0.1 for name, tensor in weights.items()}
    return drift_fast.compute_delta(
        write_checkpoint(folder / "expert", moved),
        write_checkpoint(folder / "multimodal", weights),
        modules=("embed", "head"),
        rows="index",
        dtype="float32",
        check_weights=False,
    )


def test_an_embedding_with_sparse_gradients_is_refused(tmp_path: Path) -> None:
    delta = reader_delta(tmp_path)
    with pytest.raises(DriftError, match=r"embed_tokens\.weight first.*sparse=False"):
        Injection(Reader(sparse=True), delta)
    Injection(Reader(sparse=True), delta, modules="head").remove()
    Injection(Reader(sparse=False), delta).remove()


def test_a_sparse_gradient_that_no_module_announces_is_refused_in_its_step(tmp_path: Path) -> None:
    model = Reader(sparse=False)
    with Injection(model, reader_delta(tmp_path)) as injection:
        rows = nn.functional.embedding(torch.tensor([3]), model.embed_tokens.weight, sparse=True)
        model.lm_head(rows).sum().backward()
        with pytest.raises(DriftError, match=r"gradient of embed_tokens\.weight is sparse"):
            injection.step()
        model.zero_grad()
        model(torch.tensor([3])).sum().backward()
        injection.step()


def test_weights_that_a_trainer_shards_later_may_have_no_data_yet(tmp_path: Path) -> None:
    """Ranks other than the first build their model on the meta device to save memory."""
    from drift_fast.inject.config import TargetOptions
    from drift_fast.inject.refusals import check_trainable
    from drift_fast.inject.targets import find_targets

    delta = delta_towards(tmp_path, Backbone())
    with torch.device("meta"):
        model = Backbone()
    targets, _ = find_targets(model, delta, TargetOptions())
    check_trainable(targets, model, loaded=False)


def test_a_real_model_trains_after_its_remedy(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    text = tiny_qwen2()
    delta = drift_fast.compute_delta(
        saved(moved_text(text), tmp_path / "expert"), saved(text, tmp_path / "multimodal")
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "multimodal", dtype=torch.float32)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(DriftError, match="load the model without device_map"):
        Injection(model, delta)
    model = load(tmp_path / "multimodal", dtype=torch.float32)
    with Injection(model, delta) as injection:
        text_loss(model).backward()
        injection.step()
        assert injection.injected == len(injection.targets)


def test_names_with_very_long_numbers_are_names(tmp_path: Path) -> None:
    """A number of more digits than any layer has is part of a name."""
    long = "9" * 18
    weights = {f"model.layers.{long}.self_attn.q_proj.weight": torch.ones(4, 4)}
    weights |= {f"model.layers.0.mlp.experts.{long}.gate_proj.weight": torch.ones(4, 4)}
    moved = {name: tensor + 0.5 for name, tensor in weights.items()}
    delta = drift_fast.compute_delta(
        write_checkpoint(tmp_path / "expert", moved),
        write_checkpoint(tmp_path / "multimodal", weights),
        modules="all",
        check_weights=False,
    )
    with pytest.raises(drift_fast.CoverageError, match="parameter"):
        Injection(Backbone(), delta)


def test_a_frozen_model_trains_after_its_remedy(delta: drift_fast.Delta) -> None:
    model = Backbone()
    for parameter in model.parameters():
        parameter.requires_grad = False
    with pytest.raises(DriftError, match="unfreeze"):
        Injection(model, delta)
    regression_loss(model.requires_grad_(), regression_batch()).backward()
    Injection(model, delta).step()


def test_a_model_that_was_made_for_inference_is_refused(delta: drift_fast.Delta) -> None:
    with torch.inference_mode():
        model = Backbone()
    with pytest.raises(DriftError, match=rf"{NAME} first: it was made under torch\.inference_mode"):
        Injection(model, delta)


@pytest.mark.parametrize("how", ["meta", "offloaded before", "offloaded after"])
def test_adapters_without_data_are_refused(tmp_path: Path, how: str) -> None:
    peft = pytest.importorskip("peft")
    accelerate = pytest.importorskip("accelerate")
    text: Any = tiny_qwen2()
    delta = drift_fast.compute_delta(
        saved(moved_text(text), tmp_path / "expert"), saved(text, tmp_path / "multimodal")
    )
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    if how == "offloaded before":
        accelerate.cpu_offload(text, execution_device="cpu")
    model = peft.get_peft_model(text, config, low_cpu_mem_usage=how == "meta")
    if how == "offloaded after":
        accelerate.cpu_offload(model, execution_device="cpu")
    message = "low_cpu_mem_usage" if how == "meta" else "offloaded by Accelerate"
    with pytest.raises(DriftError, match=message):
        Injection(model, delta)


def test_eight_bit_weights_of_bitsandbytes_are_refused(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model: Any = tiny_qwen2()
    delta = drift_fast.compute_delta(
        saved(moved_text(model), tmp_path / "expert"), saved(model, tmp_path / "multimodal")
    )
    attention = model.model.layers[0].self_attn
    plain = attention.o_proj
    packed = bitsandbytes.nn.Linear8bitLt(
        plain.in_features, plain.out_features, bias=False, has_fp16_weights=False
    )
    packed.load_state_dict(plain.state_dict())
    attention.o_proj = packed
    with pytest.raises(DriftError, match=r"1 of 20 targets .*Int8Params of bitsandbytes"):
        Injection(model, delta)
