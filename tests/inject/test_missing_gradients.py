"""Targets without a gradient in a step: experts are left out and counted, others end the run.

Owns: the policy `missing_gradients`, its counts and its warning, under every scope and under DDP
and FSDP2. Coverage at attachment is `strict`, in test_injection_errors.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drift_fast
from drift_fast import DriftError, DriftWarning, Injection
from drift_fast.inject.missing import PATIENCE
from drift_fast.names import is_expert
from support import reference
from support.injection_models import delta_towards, gradients_of, write_checkpoint
from support.joined import Joined, Report, launch

EXPERTS = 4
WIDTH = 6
SHARED = "shared_expert"


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, 4, bias=False)
        self.down_proj = nn.Linear(4, WIDTH, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(torch.relu(self.up_proj(inputs)))
        return out


class Mixture(nn.Module):
    """Two layers of experts, of which a caller says which are used, and one that always is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList()
        for _ in range(2):
            mlp = nn.Module()
            mlp.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
            mlp.shared_expert = Expert()
            layer = nn.Module()
            layer.mlp = mlp
            self.layers.append(layer)
        self.shared = True

    def forward(self, inputs: torch.Tensor, used: Iterable[int]) -> torch.Tensor:
        for layer in self.layers:
            mlp: Any = layer.mlp
            inputs = inputs + sum(mlp.experts[at](inputs) for at in used)
            if self.shared:
                inputs = inputs + mlp.shared_expert(inputs)
        return inputs


TARGETS = 2 * 2 * (EXPERTS + 1)


def backward(model: nn.Module, used: Iterable[int] = range(EXPERTS), *, seed: int = 0) -> None:
    inputs = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))
    model(inputs, used).square().sum().backward()


@pytest.fixture
def model() -> Mixture:
    return Mixture()


@pytest.fixture
def delta(tmp_path: Path, model: Mixture) -> drift_fast.Delta:
    return delta_towards(tmp_path, model, modules="mlp")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.experts.17.up_proj.weight", True),
        ("model.layers.3.block_sparse_moe.experts.0.w1.weight", True),
        ("decoder.block.1.layer.2.mlp.experts.expert_5.wi.weight", True),
        ("base_model.model.model.layers.0.mlp.experts.1.up_proj.base_layer.weight", True),
        ("deepspeed_moe.experts.deepspeed_experts.0.fc1.weight", True),
        ("decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight", True),
        ("model.layers.3.mlp.experts.gate_up_proj", True),
        ("model.layers.3.mlp.shared_expert.up_proj.weight", False),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", False),
        ("model.layers.3.mlp.shared_expert_gate.weight", False),
        ("model.layers.3.mlp.gate.weight", False),
        ("paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight", False),
        ("model.layers.3.mlp.up_proj.weight", False),
    ],
)
def test_experts_are_known_by_their_names(name: str, expected: bool) -> None:
    assert is_expert(name) is expected


@pytest.mark.parametrize("overlap", [False, True])
def test_an_expert_without_tokens_is_left_out_of_the_step_and_counted(
    model: Mixture, delta: drift_fast.Delta, overlap: bool
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Injection(model, delta, overlap=overlap) as injection:
        for step, used in enumerate(([0, 1, 2, 3], [0, 2], [1, 2, 3])):
            plain = Mixture()
            backward(model, used, seed=step)
            backward(plain, used, seed=step)
            injection.step()
            before, after = gradients_of(plain), gradients_of(model)
            assert before.keys() == after.keys()
            for name, gradient in before.items():
                expected = reference.inject(gradient, delta[name], alpha=1.0, scale="adaptive")
                error = reference.norm(reference.exact(after[name]) - expected)
                assert error <= 1e-5 * reference.norm(expected), name
            missing = 4 * (EXPERTS - len(used))
            assert (injection.injected, injection.skipped) == (TARGETS - missing, missing)
            metrics = injection.metrics()
            assert metrics["missing_gradients"] == metrics["skipped"] == missing
            assert metrics["never_had_gradient"] == 0
            assert injection.summary()["missing_gradients"] == missing
            optimizer.step()
            optimizer.zero_grad()


def test_experts_are_left_out_of_micro_batches_too(model: Mixture, delta: drift_fast.Delta) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Injection(model, delta, scope="microbatch") as injection:
        for used, missing in (([0, 1], 8), ([0, 1, 2, 3], 0)):
            backward(model, used[:1])
            backward(model, used)
            optimizer.step()
            optimizer.zero_grad()
            assert injection.metrics()["missing_gradients"] == missing
        model.shared = False
        backward(model)
        with pytest.raises(
            DriftError, match=f"4 of {TARGETS} targets have no gradient, .*{SHARED}"
        ):
            optimizer.step()


def test_what_every_token_passes_ends_the_run(model: Mixture, delta: drift_fast.Delta) -> None:
    model.shared = False
    with Injection(model, delta) as injection:
        backward(model, [0])
        with pytest.raises(
            DriftError, match=f"4 of {TARGETS} targets have no gradient, .*{SHARED}"
        ):
            injection.step()
    # The remedies that the message names.
    with Injection(model, delta, missing_gradients="skip") as injection:
        injection.step()
        assert injection.skipped == 4 * EXPERTS
    with Injection(model, delta, modules=r"re:\.experts\.") as injection:
        injection.step()


def test_an_expert_ends_the_run_where_that_is_asked_for(
    model: Mixture, delta: drift_fast.Delta
) -> None:
    backward(model, [1, 2, 3])
    with (
        Injection(model, delta, missing_gradients="raise") as injection,
        pytest.raises(DriftError, match=r"4 of 20 targets have no gradient, layers\.\d\.mlp\.exp"),
    ):
        injection.step()
    assert "missing_gradients" not in injection._missing.metrics()


@pytest.mark.parametrize("policy", ["auto", "skip", "raise"])
def test_a_step_with_no_gradient_at_all_is_refused(
    model: Mixture, delta: drift_fast.Delta, policy: Any
) -> None:
    with (
        Injection(model, delta, modules=r"re:\.experts\.", missing_gradients=policy) as injection,
        pytest.raises(DriftError, match="no target has a gradient"),
    ):
        injection.step()


def test_layers_that_are_dropped_at_random_train_where_that_is_asked_for(
    model: Mixture, delta: drift_fast.Delta
) -> None:
    """As LayerDrop does: a layer takes no part in some steps."""
    layers, optimizer = model.layers, torch.optim.SGD(model.parameters(), lr=0.0)
    with Injection(model, delta, missing_gradients="skip") as injection:
        for kept in ([0, 1], [1], [0]):
            model.layers = nn.ModuleList(layers[at] for at in kept)
            backward(model)
            model.layers = layers
            injection.step()
            assert injection.injected == TARGETS // 2 * len(kept)
            optimizer.step()
            optimizer.zero_grad()
        assert injection.metrics()["never_had_gradient"] == 0


def test_adapters_of_an_expert_without_tokens_are_left_out(
    model: Mixture, delta: drift_fast.Delta
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0
    )
    adapted = peft.get_peft_model(model, config)
    with Injection(adapted, delta) as injection:
        backward(adapted, [1, 3])
        injection.step()
        assert (injection.injected, injection.skipped) == (TARGETS - 8, 8)


def test_coverage_is_still_asked_for(tmp_path: Path, model: Mixture) -> None:
    delta = delta_towards(tmp_path, model, modules="mlp")
    del model.layers[1].mlp.experts[3]  # type: ignore[union-attr, operator]
    with pytest.raises(drift_fast.CoverageError):
        Injection(model, delta, missing_gradients="skip")
    Injection(model, delta, strict=False).remove()


def test_an_expert_that_never_had_a_gradient_is_warned_of_once(
    model: Mixture, delta: drift_fast.Delta
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with (
        Injection(model, delta) as injection,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", DriftWarning)
        for step in range(PATIENCE + 3):
            backward(model, [0, 1, 2] if step % 2 else [0, 1])
            injection.step()
            optimizer.step()
            optimizer.zero_grad()
            assert len(caught) == (step + 1 >= PATIENCE)
        assert injection.metrics()["never_had_gradient"] == 4
    assert f"4 of {TARGETS} targets had no gradient" in str(caught[0].message)
    assert "experts.3" in str(caught[0].message)


def test_a_dense_model_has_no_such_counts(tmp_path: Path) -> None:
    layer = nn.ModuleDict({"q_proj": nn.Linear(4, 4, bias=False)})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": layer})])})
    delta = delta_towards(tmp_path, model)
    with Injection(model, delta) as injection:
        assert "missing_gradients" not in injection.metrics()


def test_fused_experts_always_have_a_gradient(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        num_experts=8,
        num_experts_per_tok=1,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    delta = drift_fast.compute_delta(
        write_checkpoint(tmp_path / "expert", {k: v + 0.01 for k, v in weights.items()}),
        write_checkpoint(tmp_path / "multimodal", weights),
        modules="mlp",
        dtype="float32",
        check_weights=False,
    )
    with Injection(model, delta) as injection:
        tokens = torch.tensor([[3]])
        model(input_ids=tokens, labels=tokens).logits.sum().backward()
        injection.step()
        fused = any("gate_up_proj" in name for name in injection.targets)
        # Numbered in older versions of transformers, where seven of eight have no token.
        assert (injection.skipped == 0) is fused


# --- several processes ------------------------------------------------------------------------


def check_ddp(folder: Path) -> Report:
    """Expert 3 has no token anywhere, expert 2 has some on the second process only."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(Mixture(), find_unused_parameters=True)
    delta = drift_fast.Delta.open(folder / "delta")
    with Injection(model, delta) as injection:
        rank = dist.get_rank()
        backward(model, [0, 1, 2] if rank else [0, 1], seed=rank)
        injection.step()
        counts = [injection.injected, injection.skipped]
        total = sum(float(g.double().square().sum()) for g in gradients_of(model).values())
    return {"counts": counts, "total": total}


def check_fsdp2(folder: Path) -> Report:
    """An expert without a token on every process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = Mixture()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    delta = drift_fast.Delta.open(folder / "delta")
    with Injection(model, delta) as injection:
        backward(model, [0, 1, 2])
        injection.step()
        counts = [injection.injected, injection.skipped]
        missing = injection.metrics()["missing_gradients"]
    return {"counts": counts, "missing": missing}


def test_processes_agree_on_what_is_missing(tmp_path: Path) -> None:
    delta_towards(tmp_path, Mixture(), modules="mlp", out=tmp_path / "delta")
    jobs = {check.__name__: (check, (tmp_path,)) for check in (check_ddp, check_fsdp2)}
    first, second = launch(tmp_path / "two", jobs, Joined(2, "gloo", timedelta(seconds=60)))
    assert first["check_ddp"] == second["check_ddp"]
    assert first["check_ddp"]["counts"] == [TARGETS - 4, 4]
    assert first["check_fsdp2"] == second["check_fsdp2"]
    assert first["check_fsdp2"]["counts"] == [TARGETS - 4, 4]
    assert first["check_fsdp2"]["missing"] == 4
