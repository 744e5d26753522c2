"""The memory of a run, item by item."""

from __future__ import annotations

from typing import Any

import pytest

from drift_fast.planner import rates
from drift_fast.planner.counts import VISION, read_model
from drift_fast.planner.memory import PULLED_NUMEL, estimate, layer_nbytes_per_token
from drift_fast.planner.training import Training
from support.planner_models import REASONING, TEXT


def part(memory: Any, name: str) -> float:
    return float(sum(one.nbytes for one in memory.device if one.name == name))


# LoRA's rank, and whether autocast computes in bfloat16 beside factors in float32.
@pytest.mark.parametrize(("rank", "mixed"), [(0, False), (16, True), (16, False)])
def test_activations_are_what_backward_keeps_of_a_real_layer(rank: int, mixed: bool) -> None:
    pytest.importorskip("transformers")
    import torch
    import transformers

    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8}
    # Long enough that what does not grow with tokens counts for little.
    tokens = 512
    kept: dict[int, list[float]] = {}
    for layers in (1, 3):
        torch.manual_seed(0)
        configuration = transformers.Qwen2Config(
            **TEXT | sizes | {"num_hidden_layers": layers, "max_position_embeddings": tokens}
        )
        model: Any = transformers.Qwen2ForCausalLM(configuration).to(torch.bfloat16)
        if rank:
            peft = pytest.importorskip("peft")
            adapters = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, adapters, autocast_adapter_dtype=mixed)
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        seen: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Any, seen: Any = seen, weights: Any = weights) -> Any:
            if tensor.data_ptr() not in weights:
                storage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ids = torch.randint(0, 96, (1, tokens))
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = model(input_ids=ids, labels=ids).loss
        kept[layers] = [sum(storage.nbytes() for storage in seen.values()), float(loss.detach())]
    of_layer = (kept[3][0] - kept[1][0]) / 2 / tokens
    if mixed:
        # Autocast's bfloat16 copies of the factors do not grow with tokens.
        of_layer -= 2 * rank * (7 * 256 + 2 * 64 + 256 + 3 * 704 + 256) / tokens

    class Sizes:
        configuration = read_model(REASONING).configuration

        def size(self, subject: str) -> int | None:
            return {
                "hidden size": 256,
                "attention heads": 8,
                "KV heads": 2,
                "head dimension": 32,
                "intermediate size": 704,
            }.get(subject)

    found = layer_nbytes_per_token(Sizes(), 2, rank, mixed=mixed)  # type: ignore[arg-type]
    assert found is not None
    assert of_layer == pytest.approx(found[0], rel=0.1 if not rank else 0.01)


def test_lora_trains_its_factors_beside_frozen_weights_in_bfloat16(seven: Any) -> None:
    matrices = [s for n, s in seven.shapes.items() if ".layers." in n and len(s) == 2]
    assert len(matrices) == 28 * 7
    factors = sum(64 * (height + width) for height, width in matrices)
    total = seven.numel() + factors
    run = Training(steps=1, lora_rank=64)
    assert seven.trained_numel(run) == factors
    alone = estimate(run, seven, 10**9, None)
    assert part(alone, "weights") == 2 * (total - factors) + 4 * factors
    assert part(alone, "gradients") == 4 * factors
    assert part(alone, "optimizer states") == 8 * factors
    assert part(alone, "Δ pulled back") == 22 * PULLED_NUMEL
    zero3 = estimate(run.changed(sharding="zero3", gpus=8), seven, 10**9, None)
    assert part(zero3, "weights") == 2 * total / 8
    fsdp = estimate(run.changed(sharding="fsdp2", gpus=8), seven, 10**9, None)
    assert part(fsdp, "weights") == part(alone, "weights") / 8
    whole = estimate(run.changed(lora_rank=0), seven, 10**9, None)
    assert part(whole, "Δ pulled back") == 0
    # Adapters are on all of these, whatever Δ covers.
    assert seven.trained_numel(run.changed(modules=("attn",), layers="0-3")) == factors
    needed = alone.device_nbytes
    assert estimate(run, seven, 10**9, needed).residency == "device"
    assert estimate(run, seven, 10**9, needed - 1).residency == "host"


def test_delta_is_pulled_back_for_as_many_elements_as_planned() -> None:
    pytest.importorskip("torch")
    from drift_fast.inject.lora import group

    assert group._ROOM == PULLED_NUMEL


def test_states_of_mixed_precision_take_sixteen_bytes_and_sharding_divides_them(seven: Any) -> None:
    total, frozen = seven.numel(), seven.by_kind()[VISION]
    trained = total - frozen
    alone = estimate(Training(steps=1), seven, 10**9, None)
    kept = sum(part(alone, name) for name in ("weights", "gradients", "optimizer states"))
    assert kept == 16 * trained + 4 * frozen
    for stage, gradients, weights in (("zero1", 1, 1), ("zero2", 8, 1), ("zero3", 8, 8)):
        run = Training(steps=1, sharding=stage, gpus=8)
        memory = estimate(run, seven, 10**9, None)
        assert part(memory, "float32 weights") == 4 * trained / 8
        assert part(memory, "optimizer states") == trained
        assert part(memory, "gradients") == 2 * trained / gradients
        assert part(memory, "weights") == 2 * total / weights
        assert part(memory, "Δ") == 2 * 10**9 / 8
    fsdp = estimate(Training(steps=1, sharding="fsdp2", gpus=8), seven, 10**9, None)
    assert part(fsdp, "weights") == (4 * trained + 2 * frozen) / 8
    offloaded = estimate(
        Training(steps=1, sharding="zero2", gpus=8, offload="optimizer"), seven, 10**9, None
    )
    assert part(offloaded, "optimizer states") == 0
    assert offloaded.host_nbytes == round(16 * trained / 8)


def test_residency_moves_delta_and_auto_chooses_by_what_is_left(seven: Any) -> None:
    run = Training(steps=1, sharding="zero3", gpus=8)
    numel = rates.BOTH.numel
    whole = {
        residency: estimate(run.changed(residency=residency), seven, numel, None)
        for residency in ("device", "device-int8", "host", "host-int8", "disk")
    }
    assert part(whole["device"], "Δ") == 2 * numel / 8
    assert part(whole["device-int8"], "Δ") == pytest.approx(66 / 64 * numel / 8)
    assert whole["host"].host_nbytes == round(2 * numel / 8)
    assert whole["host-int8"].host_nbytes == round(66 / 64 * numel / 8)
    assert whole["disk"].host_nbytes == part(whole["disk"], "Δ") == 0
    needed = whole["device"].device_nbytes
    assert estimate(run, seven, numel, needed).residency == "device"
    assert estimate(run, seven, numel, needed - 1).residency == "host"


def test_checkpointing_and_longer_samples_change_activations_only(seven: Any) -> None:
    run = Training(steps=1, sharding="zero3", gpus=8)
    plain = estimate(run, seven, 10**9, None)
    saving = estimate(run.changed(gradient_checkpointing=True), seven, 10**9, None)
    assert part(saving, "activations") < part(plain, "activations") / 10
    longer = estimate(run.changed(max_tokens=4096), seven, 10**9, None)
    assert part(longer, "activations") == 2 * part(plain, "activations")
    assert part(longer, "logits") == 2 * part(plain, "logits")
    assert part(longer, "optimizer states") == part(plain, "optimizer states")
