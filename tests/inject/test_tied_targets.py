"""An embedding and head that a model ties are injected once, or refused where they train apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import drift_fast
from drift_fast import DriftError
from support.injection_models import (
    gradients_of,
    saved,
    text_loss,
    tiny_qwen2,
)
from support.reference import assert_follows_reference
from support.synthetic import refused

peft = pytest.importorskip("peft")

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BOTH: dict[str, Any] = {"modules": ("embed", "head"), "rows": "index", "dtype": "float32"}


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, drift_fast.Delta]:
    """Δ between two tied models, and between the same tensors stored as two."""
    found = {}
    for tied in (True, False):
        directory = tmp_path_factory.mktemp(f"tied-{tied}")
        found["tied" if tied else "apart"] = drift_fast.compute_delta(
            saved(tiny_qwen2(seed=4, tie_word_embeddings=tied), directory / "expert"),
            saved(tiny_qwen2(tie_word_embeddings=tied), directory / "base"),
            **BOTH,
        )
    return found


def adapted(**options: Any) -> Any:
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], **options})
    return peft.get_peft_model(tiny_qwen2(tie_word_embeddings=True), config)


TRAINS_APART = {
    "copies of both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "a copy of the head": {"modules_to_save": ["lm_head"]},
    "adapters on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "an adapter on the head": {"target_modules": ["q_proj", "lm_head"]},
    "a copy and an adapter": {
        "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"],
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Model has")
@pytest.mark.parametrize("options", TRAINS_APART.values(), ids=TRAINS_APART)
def test_a_tied_weight_that_trains_as_two_is_refused(
    deltas: dict[str, drift_fast.Delta], options: dict[str, Any]
) -> None:
    """huggingface/peft#2864, unslothai/unsloth#9331: the head would train without Δ."""
    for strict in (True, False):
        with refused(DriftError, EMBED, HEAD, "two parameters", "ensure_weight_tying=True"):
            drift_fast.Injection(adapted(**options), deltas["tied"], strict=strict)


@pytest.mark.filterwarnings("ignore:Model has")
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
def test_the_remedy_makes_them_one_that_is_injected_once(
    deltas: dict[str, drift_fast.Delta], options: dict[str, Any]
) -> None:
    model = adapted(**options, ensure_weight_tying=True)
    injection = drift_fast.Injection(model, deltas["tied"], scale="gradnorm")
    assert len(injection.coverage.matched) == 1
    text_loss(model).backward()
    before = gradients_of(model)
    injection.step()
    assert injection.injected == 1
    if "modules_to_save" in options:
        name = next(name for name in before if "embed_tokens" in name)
        delta = deltas["tied"][EMBED]
        assert_follows_reference(
            gradients_of(model)[name], before[name], delta, alpha=1, scale="gradnorm"
        )


@pytest.mark.filterwarnings("ignore:Model has")
def test_copies_that_have_a_delta_each_are_injected_each(
    deltas: dict[str, drift_fast.Delta],
) -> None:
    model = adapted(modules_to_save=["embed_tokens", "lm_head"])
    injection = drift_fast.Injection(model, deltas["apart"], scale="gradnorm")
    text_loss(model).backward()
    before = gradients_of(model)
    injection.step()
    assert injection.injected == 2
    for kind, stored in (("embed_tokens", EMBED), ("lm_head", HEAD)):
        name = next(name for name in before if kind in name)
        assert_follows_reference(
            gradients_of(model)[name], before[name], deltas["apart"][stored],
            alpha=1, scale="gradnorm",
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Model has")
def test_a_head_that_does_not_train_is_no_reason(deltas: dict[str, drift_fast.Delta]) -> None:
    model = adapted(modules_to_save=["embed_tokens"])
    injection = drift_fast.Injection(model, deltas["tied"])
    assert [name for _, name in injection.coverage.matched] == [
        next(name for name, p in model.named_parameters() if "embed" in name and p.requires_grad)
    ]


def test_a_head_untied_in_memory_is_seen_without_adapters(
    deltas: dict[str, drift_fast.Delta],
) -> None:
    model = tiny_qwen2(tie_word_embeddings=True)
    assert drift_fast.Injection(model, deltas["tied"]).coverage.fraction == 1.0
    head: Any = model.get_submodule("lm_head")
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with refused(DriftError, EMBED, HEAD, "two parameters"):
        drift_fast.Injection(model, deltas["tied"])
    retied: Any = model
    retied.tie_weights()
    assert drift_fast.Injection(model, deltas["tied"]).coverage.fraction == 1.0
    assert drift_fast.Injection(tiny_qwen2(), deltas["tied"]).coverage.fraction == 1.0


def test_a_head_belongs_with_the_embedding_of_its_own_language_model(
    deltas: dict[str, drift_fast.Delta],
) -> None:
    # As in a model that states ties as a whole, of a part that thinks and one that talks.
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.thinker = tiny_qwen2(tie_word_embeddings=False)
            self.talker = tiny_qwen2(tie_word_embeddings=False)
            self.config = tiny_qwen2(tie_word_embeddings=True).config

    mapping = {name: f"thinker.{name}" for name in (EMBED, HEAD)}
    with drift_fast.Injection(Both(), deltas["apart"], mapping=mapping) as injection:
        assert set(injection.targets) == set(mapping.values())
