"""A Δ without the span of gradients, against a restatement in float64.

Owns: what is taken out, what the model is afterwards, what the result can be used for, and what is
refused. The restatement takes gradients batch by batch from a model of its own and projects by the
singular vectors that numpy finds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import drift_fast
from drift_fast import CoverageError, Delta, DriftError, NonFiniteError
from drift_fast.protection import gradients
from support.injection_models import (
    Backbone,
    delta_towards,
    moved_text,
    regression_batch,
    regression_loss,
    saved,
    text_batch,
    tiny_qwen2,
    tiny_qwen2_5_vl,
    write_checkpoint,
)
from support.reference import Array, exact
from support.synthetic import refused

BATCHES = [regression_batch(seed=10 + number) for number in range(7)]
TEXTS = [text_batch(seed=20 + number) for number in range(4)]
Loss = Callable[[Any, Any], torch.Tensor]


def loss_of_texts(model: Any, batch: Any) -> torch.Tensor:
    found: torch.Tensor = model(**batch).loss
    return found


def sums_of_gradients(
    model: nn.Module, batches: Iterable[Any], loss: Loss, directions: int
) -> list[dict[str, Array]]:
    """Return the sums of gradients of every parameter, flat, in float64."""
    sums: list[dict[str, Array]] = [{} for _ in range(directions)]
    for number, batch in enumerate(batches):
        model.zero_grad()
        loss(model, batch).backward()
        held = sums[number % directions]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                held[name] = held.get(name, 0.0) + exact(parameter.grad).ravel()
    model.zero_grad()
    return sums


def without_span(delta: Array, rows: list[Array]) -> Array:
    """Return Δ less its projection on the span of rows, by their singular vectors."""
    scaled = np.array([row / np.linalg.norm(row) for row in rows if np.any(row)])
    if not len(scaled):
        return delta
    _, values, right = np.linalg.svd(scaled, full_matrices=False)
    basis = right[values > 1e-6 * values[0]]
    flat = delta.ravel()
    return (flat - basis.T @ (basis @ flat)).reshape(delta.shape)


def worst_error(
    found: Mapping[str, torch.Tensor],
    delta: Mapping[str, torch.Tensor],
    sums: list[dict[str, Array]],
    parameter_of: Callable[[str], str] = str,
) -> float:
    """Return the largest ‖found − expected‖ / ‖Δ‖ of a tensor."""
    worst = 0.0
    for name in delta:
        whole = exact(delta[name])
        expected = without_span(whole, [one[parameter_of(name)] for one in sums])
        error = np.linalg.norm(exact(found[name]) - expected) / np.linalg.norm(whole)
        worst = max(worst, float(error))
    return worst


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Delta:
    """Δ of `Backbone()` in float32."""
    return delta_towards(tmp_path_factory.mktemp("delta"), Backbone())


def protect(delta: Any, batches: Iterable[Any] = BATCHES, **options: Any) -> Delta:
    return drift_fast.protect(Backbone(), delta, batches, loss=regression_loss, **options)


# --- what is taken out ------------------------------------------------------------------------


@pytest.mark.parametrize("directions", [1, 3, 7])
@pytest.mark.parametrize("place", ["device", "host"])
def test_the_result_is_that_of_float64(delta: Delta, directions: int, place: Any) -> None:
    found = protect(delta, directions=directions, gradients=place)
    sums = sums_of_gradients(Backbone(), BATCHES, regression_loss, directions)
    assert found.dtype == "float32"
    assert list(found) == list(delta)
    assert worst_error(found, delta, sums) < 1e-6
    # Without taking anything out the comparison would fail.
    assert worst_error(delta, delta, sums) > 1e-2


def test_large_tensors_are_done_in_pieces(delta: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drift_fast.protection.span._PIECE", 28)
    sums = sums_of_gradients(Backbone(), BATCHES, regression_loss, 3)
    assert worst_error(protect(delta), delta, sums) < 1e-6


def test_nearly_dependent_gradients_are_told_apart(delta: Delta) -> None:
    """A direction of 1e-4 beside another counts as its own, to the accuracy of float32."""
    first, second = BATCHES[:2]
    mixed = [(first, second, share) for share in (0.0, 1e-4, 3e-4)]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        one, other, share = batch
        return regression_loss(model, one) + share * regression_loss(model, other)

    found = drift_fast.protect(Backbone().double(), delta, mixed, loss=loss, directions=3)
    sums = sums_of_gradients(Backbone().double(), mixed, loss, 3)
    assert found.sources["protected"]["zero_or_dependent"] == len(delta)
    assert worst_error(found, delta, sums) < 1e-6


def test_equal_gradients_count_once(delta: Delta) -> None:
    found = protect(delta, [BATCHES[0]] * 5, directions=5)
    sums = sums_of_gradients(Backbone(), BATCHES[:1], regression_loss, 1)
    assert found.sources["protected"]["zero_or_dependent"] == 4 * len(delta)
    assert worst_error(found, delta, sums) < 1e-6


def test_the_loss_scale_does_not_matter(delta: Delta) -> None:
    found = drift_fast.protect(
        Backbone(), delta, BATCHES, loss=lambda *given: 2**20 * regression_loss(*given)
    )
    expected = protect(delta)
    assert all(torch.equal(found[name], expected[name]) for name in delta)


def test_16_bit_weights_and_deltas(tmp_path: Path) -> None:
    """Gradients of bfloat16 are added up in float32, and Δ is rounded once, to bfloat16."""
    model = Backbone().bfloat16()
    delta = delta_towards(tmp_path, model, dtype="bfloat16")
    found = drift_fast.protect(model, delta, BATCHES, loss=regression_loss)
    sums = sums_of_gradients(Backbone().bfloat16(), BATCHES, regression_loss, 3)
    assert found.dtype == "bfloat16"
    for name in delta:
        expected = without_span(exact(delta[name]), [one[name] for one in sums])
        off = np.abs(exact(found[name]) - expected)
        assert (off <= 2.0**-8 * np.abs(expected) * 1.0001 + 1e-9).all(), name
    wide = drift_fast.protect(model, delta, BATCHES, loss=regression_loss, dtype="float32")
    assert worst_error(wide, delta, sums) < 1e-6


def test_a_compressed_delta(tmp_path: Path, delta: Delta) -> None:
    small = delta_towards(tmp_path, Backbone(), dtype="int8", out=tmp_path / "int8")
    found = protect(small, dtype="float32")
    sums = sums_of_gradients(Backbone(), BATCHES, regression_loss, 3)
    assert worst_error(found, small, sums) < 1e-6
    assert protect(small).stored_dtype == "bfloat16"


def test_other_tensors_stay_as_they_are(delta: Delta) -> None:
    found = protect(delta, modules="mlp", layers="1")
    sums = sums_of_gradients(Backbone(), BATCHES, regression_loss, 3)
    changed = [name for name in delta if not torch.equal(found[name], delta[name])]
    assert changed == [name for name in delta if ".1.mlp." in name]
    assert worst_error({n: found[n] for n in changed}, {n: delta[n] for n in changed}, sums) < 1e-6


# --- models of transformers ---------------------------------------------------------------------


def text_delta(folder: Path, **options: Any) -> Delta:
    text = tiny_qwen2()
    return drift_fast.compute_delta(
        saved(moved_text(text), folder / "expert"),
        saved(text, folder / "base"),
        **{"dtype": "float32", **options},
    )


def test_texts_need_no_loss(tmp_path: Path) -> None:
    """The default is the model's own loss, of batches on any device."""
    delta = text_delta(tmp_path)
    found = drift_fast.protect(tiny_qwen2(), delta, TEXTS)
    sums = sums_of_gradients(tiny_qwen2(), TEXTS, loss_of_texts, 3)
    assert worst_error(found, delta, sums) < 1e-6


def test_names_of_a_multimodal_model(tmp_path: Path) -> None:
    """Δ between text models, and gradients of a multimodal one whose names differ."""
    delta = text_delta(tmp_path)
    model = tiny_qwen2_5_vl(text=tiny_qwen2())
    found = drift_fast.protect(model, delta, TEXTS)
    sums = sums_of_gradients(tiny_qwen2_5_vl(text=tiny_qwen2()), TEXTS, loss_of_texts, 3)
    names = drift_fast.match_parameters(model, delta)
    parameters = {source: name for name, source in names.items()}
    assert worst_error(found, delta, sums, parameters.__getitem__) < 1e-6


def test_a_tied_embedding_and_head_stay_equal(tmp_path: Path) -> None:
    text = tiny_qwen2(tie_word_embeddings=True)
    embedding = text.get_parameter("model.embed_tokens.weight")
    moved = embedding + torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    both = ("model.embed_tokens.weight", "lm_head.weight")
    delta = drift_fast.compute_delta(
        write_checkpoint(
            tmp_path / "expert", dict.fromkeys(both[:1], moved) | {both[1]: moved + 0}
        ),
        write_checkpoint(
            tmp_path / "base", {both[0]: embedding, both[1]: embedding.detach().clone()}
        ),
        modules=("embed", "head"),
        rows="index",
        dtype="float32",
    )
    assert set(delta) == set(both)
    found = drift_fast.protect(text, delta, TEXTS)
    assert torch.equal(found[both[0]], found[both[1]])
    sums = sums_of_gradients(text, TEXTS, loss_of_texts, 3)
    assert worst_error(found, delta, sums, lambda _: both[0]) < 1e-6
    # An injection takes it as it takes the delta that it came from.
    assert drift_fast.Injection(text, found).targets == [both[0]]


def test_experts_that_are_one_parameter(tmp_path: Path) -> None:
    """A parameter of many tensors is one to gradients; each tensor gets back its own part."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    torch.manual_seed(0)
    model, expert = (transformers.Qwen3MoeForCausalLM(config) for _ in range(2))
    delta = drift_fast.compute_delta(
        saved(expert, tmp_path / "expert"),
        saved(model, tmp_path / "base"),
        modules=r"re:\.experts\.",
        dtype="float32",
        check_weights=False,
    )
    found = drift_fast.protect(model, delta, TEXTS)
    sums = sums_of_gradients(model, TEXTS, loss_of_texts, 3)
    targets, _ = drift_fast.inject.targets.find_targets(
        model, delta, drift_fast.inject.config.TargetOptions()
    )
    assert any(len(target.sources) > 1 for target in targets)
    for target in targets:
        whole, left = (
            exact(target.read(drift_fast.inject.target.DeltaReader(one), Everything()))
            for one in (delta, found)
        )
        expected = without_span(whole, [one[target.name] for one in sums])
        assert np.linalg.norm(left - expected) < 1e-6 * np.linalg.norm(whole)
        assert np.linalg.norm(left - whole) > 1e-3 * np.linalg.norm(whole)


class Everything:
    """The part of a parameter that is all of it."""

    span = None

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole


def test_gradients_of_adapted_weights_are_those_of_the_weights(tmp_path: Path) -> None:
    """W = W₀ + s·B·A has the same gradient as W₀, at the factors as they are."""
    peft = pytest.importorskip("peft")
    delta = text_delta(tmp_path, modules="attn,mlp")
    config = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        lora_dropout=0.5,
        modules_to_save=["o_proj"],
    )
    model = peft.get_peft_model(tiny_qwen2(), config).train()
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = drift_fast.protect(model, delta, TEXTS)
    assert frozen == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    merged = model.eval().merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    sums = sums_of_gradients(merged, TEXTS, loss_of_texts, 3)
    assert worst_error(found, delta, sums) < 2e-6


# --- the model afterwards ---------------------------------------------------------------------


class Noisy(Backbone):
    """A backbone with dropout and running statistics, and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.model.layers[0].mlp.up_proj.weight.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(self.drop(self.norm(inputs)))


def state_of(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()
    }
    for name, parameter in model.named_parameters():
        found[f"weight {name}"] = parameter.detach().clone()
        found[f"trains {name}"] = parameter.requires_grad
        found[f"gradient {name}"] = parameter.grad
        found[f"value {name}"] = None if parameter.grad is None else parameter.grad.clone()
    return found | {f"mode {name}": module.training for name, module in model.named_modules()}


def assert_same_state(model: nn.Module, before: Mapping[str, Any]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if name.startswith("gradient"):
            assert after[name] is value, name
        elif isinstance(value, torch.Tensor):
            assert torch.equal(after[name], value), name
        else:
            assert after[name] == value, name


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(delta: Delta, *, fails: bool) -> None:
    model = Noisy().train()
    model.model.layers[1].eval()
    regression_loss(model, BATCHES[0]).backward()
    before = state_of(model)
    seen = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        seen.append(model.drop.training)
        if fails and len(seen) == 3:
            raise KeyError("in the user's loss")
        return regression_loss(model, batch)

    if fails:
        with pytest.raises(KeyError, match="in the user's loss"):
            drift_fast.protect(model, delta, BATCHES, loss=loss)
    else:
        drift_fast.protect(model, delta, BATCHES, loss=loss)
    assert not any(seen)
    assert_same_state(model, before)
    # Nor do hooks stay behind.
    model.zero_grad()
    regression_loss(model, BATCHES[0]).backward()
    assert model.head.weight.grad is not None
    assert model.model.layers[0].mlp.gate_proj.weight.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, reentrant: bool
) -> None:
    delta = text_delta(tmp_path)
    expected = drift_fast.protect(tiny_qwen2(), delta, TEXTS)
    model: Any = tiny_qwen2(attention_dropout=0.5)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs: list[bool] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, *_: runs.append(module.training))
    found = drift_fast.protect(model.train(), delta, TEXTS)
    assert len(runs) == 2 * len(TEXTS) * len(model.model.layers)
    assert not any(runs)
    assert all(torch.equal(found[name], expected[name]) for name in delta)


def test_autocast_and_no_grad_around_it(delta: Delta) -> None:
    expected = protect(delta)
    model = Backbone()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = drift_fast.protect(model, delta, BATCHES, loss=regression_loss)
        assert all(torch.equal(found[name], expected[name]) for name in delta)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = protect(delta)
    for name in delta:
        taken, other = (exact(delta[name]) - exact(one[name]) for one in (expected, rough))
        assert np.linalg.norm(taken - other) < 0.2 * np.linalg.norm(taken) + 1e-3


# --- the result -------------------------------------------------------------------------------


def test_written_it_is_an_ordinary_delta(tmp_path: Path, delta: Delta) -> None:
    kept = delta.save(tmp_path / "kept")
    lazy = protect(kept)
    written = protect(tmp_path / "kept", out=tmp_path / "protected")
    assert written.path == tmp_path / "protected"
    assert written.has_checksums
    assert all(torch.equal(written[name], lazy[name]) for name in delta)
    assert written.coverage == delta.coverage
    for name in delta:
        row, original = written.stats[name], delta.stats[name]
        share = written.sources["protected"]["removed_shares"][name]
        assert row.multimodal_sq == original.multimodal_sq
        assert math.isclose(row.delta_sq, original.delta_sq * (1 - share), rel_tol=1e-5)
    said = json.loads((tmp_path / "protected" / "drift.json").read_text())["sources"]["protected"]
    assert said["delta"] == str(tmp_path / "kept")
    assert len(said["sha256_of_description"]) == 64
    assert said["sources"] == delta.sources
    assert said["directions"] == 3
    assert said["batches"] == [3, 2, 2]
    assert said["model"] == "Backbone"
    total, left = (one.stats.total.delta_sq for one in (delta, written))
    assert math.isclose(1 - left / total, said["removed_share"], rel_tol=1e-4)


def test_it_is_injected_and_moved_along_and_protected_again(tmp_path: Path, delta: Delta) -> None:
    written = protect(delta, out=tmp_path / "protected")
    model = Backbone()
    injection = drift_fast.Injection(model, written, scale="absolute", alpha=1.0)
    regression_loss(model, BATCHES[0]).backward()
    plain = {name: model.get_parameter(name).grad.clone() for name in delta}
    injection.step()
    for name in delta:
        moved = plain[name] - model.get_parameter(name).grad
        assert torch.allclose(moved, written[name], atol=1e-6)
    with refused(DriftError, "attached already", "remove()"):
        drift_fast.protect(model, delta, BATCHES, loss=regression_loss)
    injection.remove()
    motion = drift_fast.PlannedMotion(model, written, progress=0.5, steps=1)
    before = {name: model.get_parameter(name).detach().clone() for name in delta}
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    motion.step()
    for name in delta:
        assert torch.allclose(
            model.get_parameter(name) - before[name], written[name] / 2, atol=1e-6
        )
    again = protect(written)
    assert again.sources["protected"]["removed_share"] < 1e-12


# --- refusals ---------------------------------------------------------------------------------


def detached(model: Any, batch: Any) -> torch.Tensor:
    return regression_loss(model, batch).detach()


def of_the_head(model: Any, batch: Any) -> torch.Tensor:
    return model.head(batch[0]).square().mean()


def nothing(model: Any, batch: Any) -> torch.Tensor:
    return 0.0 * regression_loss(model, batch)


def endless(model: Any, batch: Any) -> torch.Tensor:
    return regression_loss(model, batch) * math.inf


def beyond(model: Any, batch: Any) -> torch.Tensor:
    loss = regression_loss(model, batch)
    weight = model.model.layers[1].mlp.up_proj.weight
    # Its value is one and its slope infinite.
    return loss + torch.sqrt((weight.flatten()[0] - weight.flatten()[0].detach()).abs())


REFUSED: dict[str, tuple[type[Exception], dict[str, Any], list[str]]] = {
    "detached": (DriftError, {"loss": detached}, ["batch 0", "no gradient", "no_grad"]),
    "not one number": (
        DriftError,
        {"loss": lambda model, batch: model(batch[0])},
        ["[8, 3]", "one number", "mean"],
    ),
    "not a tensor": (DriftError, {"loss": lambda *_: 1.0}, ["float", "one number"]),
    "infinite": (NonFiniteError, {"loss": endless}, ["batch 0", "inf", "labels"]),
    "slope": (
        NonFiniteError,
        {"loss": beyond},
        ["1 of 20 tensors", "layers.1.mlp.up_proj.weight", "direction 0"],
    ),
    "aside": (DriftError, {"loss": of_the_head}, ["20 tensors have no gradient", "modules="]),
    "zero": (DriftError, {"loss": nothing}, ["every gradient is zero"]),
    "no batches": (DriftError, {"batches": iter(())}, ["0 batches", "used up"]),
    "one batch": (DriftError, {"batches": BATCHES[:1]}, ["there was 1 batch for 3 directions"]),
    "few batches": (DriftError, {"batches": BATCHES[:2]}, ["2 batches for 3 directions", "fewer"]),
    "no mapping": (DriftError, {"loss": None}, ["tuple", "loss="]),
    "no directions": (ValueError, {"directions": 0}, ["directions", "at least 1", "0"]),
    "directions as text": (ValueError, {"directions": "3"}, ["directions", "'3'"]),
    "place": (ValueError, {"gradients": "disk"}, ["gradients", "device, host"]),
    "dtype": (ValueError, {"dtype": "int8"}, ["dtype", "bfloat16"]),
    "selection": (CoverageError, {"modules": "norm"}, ["norm"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(delta: Delta, case: str) -> None:
    error, given, words = REFUSED[case]
    options = {"batches": BATCHES, "loss": regression_loss} | given
    model = Backbone()
    before = state_of(model)
    with refused(error, *words):
        drift_fast.protect(model, delta, **options)
    assert_same_state(model, before)


def test_a_model_that_returns_no_loss_is_refused(tmp_path: Path) -> None:
    batches = [{"input_ids": batch["input_ids"]} for batch in TEXTS]
    with refused(DriftError, "no loss", "labels", "loss="):
        drift_fast.protect(tiny_qwen2(), text_delta(tmp_path), batches)


def test_a_delta_of_another_model_is_refused(tmp_path: Path) -> None:
    with refused(CoverageError, "none of the delta's"):
        protect(text_delta(tmp_path))


def test_a_taken_output_is_refused_before_anything_is_measured(
    tmp_path: Path, delta: Delta
) -> None:
    protect(delta, out=tmp_path / "taken")
    batches = iter(BATCHES)
    with refused(FileExistsError, "taken", "overwrite=True"):
        protect(delta, batches, out=tmp_path / "taken")
    assert next(batches) is BATCHES[0]
    protect(delta, out=tmp_path / "taken", overwrite=True, directions=1)
    assert Delta.open(tmp_path / "taken").sources["protected"]["directions"] == 1


def test_more_directions_than_fit_are_refused(
    delta: Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    numel = sum(math.prod(shape) for shape in delta.shapes.values())
    needed = 3 * 4 * numel
    monkeypatch.setattr(gradients, "free_host_memory", lambda: int(needed / 0.8) - 1)
    for place in ("auto", "device", "host"):
        with refused(DriftError, "3 directions", f"{needed / 1e9:.2f} GB", "host memory", "fewer"):
            protect(delta, gradients=place)
    monkeypatch.setattr(gradients, "free_host_memory", lambda: int(needed / 0.8) + 1)
    protect(delta)


def test_a_delta_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = Backbone()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "model.layers.0.self_attn.v_proj.weight"
    state[name][0, 0] = math.nan
    delta = drift_fast.compute_delta(
        write_checkpoint(tmp_path / "expert", state),
        write_checkpoint(tmp_path / "base", Backbone(seed=1).state_dict()),
        allow_nonfinite=True,
        check_weights=False,
    )
    with refused(NonFiniteError, name, "NaN"):
        drift_fast.protect(model, delta, BATCHES, loss=regression_loss)


def test_packed_weights_are_refused(delta: Delta) -> None:
    model = Backbone()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.quant_state = type("State", (), {"shape": weight.shape})()
    with refused(DriftError, "up_proj", "codes", "without quantization"):
        drift_fast.protect(model, delta, BATCHES, loss=regression_loss)


def test_an_expert_that_no_token_reaches_keeps_its_delta(tmp_path: Path) -> None:
    model = Backbone()
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(6, 6, bias=False)])
    delta = delta_towards(tmp_path, model, modules="all")
    name = "model.layers.0.mlp.experts.0.weight"
    found = drift_fast.protect(model, delta, BATCHES, loss=regression_loss)
    assert torch.equal(found[name], delta[name])
    assert found.sources["protected"]["zero_or_dependent"] == 3
