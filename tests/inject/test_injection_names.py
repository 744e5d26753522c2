"""Which parameter of a real model a delta's tensor belongs to.

Owns: disk names against runtime names on transformers classes, wrappers, and a delta of two text
models on a third, multimodal one. Invariant checked throughout: the vision tower is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import drift_fast
from support import reference
from support.injection_models import (
    TEXT_TARGETS,
    gradients_of,
    language_targets,
    moved_text,
    saved,
    text_loss,
    tiny_llava,
    tiny_qwen2,
    tiny_qwen2_5_vl,
)
from support.reference import assert_follows_reference

FAMILIES: list[tuple[str, Callable[..., torch.nn.Module]]] = [
    ("llava", tiny_llava),
    ("qwen2.5-vl", tiny_qwen2_5_vl),
]


@pytest.fixture(params=FAMILIES, ids=[name for name, _ in FAMILIES])
def build(request: pytest.FixtureRequest) -> Callable[..., torch.nn.Module]:
    builder: Callable[..., torch.nn.Module] = request.param[1]
    return builder


@pytest.fixture
def process_group() -> Iterator[None]:
    """A gloo group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def suffix(name: str) -> str:
    """What every naming of a language parameter shares: layers.<n>.<block>.<projection>.<kind>."""
    return name[name.index("layers.") :]


def assert_each_target_got_its_own_delta(
    model: torch.nn.Module, delta: drift_fast.Delta, before: dict[str, torch.Tensor]
) -> None:
    by_suffix = {suffix(name): delta[name] for name in delta}
    targets = language_targets(model)
    assert len(targets) == TEXT_TARGETS == len(delta)
    for name, found in gradients_of(model).items():
        if name in targets:
            own = by_suffix[suffix(name)]
            assert_follows_reference(
                found, before[name], own, alpha=1.0, scale="gradnorm", label=name
            )
            assert not torch.equal(found, before[name])
        else:
            assert torch.equal(found, before[name]), name


def test_a_delta_of_a_text_expert_reaches_every_target_of_a_multimodal_model(
    tmp_path: Path, build: Callable[..., torch.nn.Module]
) -> None:
    # The public code attaches no hook at all here and reports itself active.
    text = tiny_qwen2()
    model = build(text=text)
    expert = saved(moved_text(text), tmp_path / "expert")
    delta = drift_fast.compute_delta(expert, saved(model, tmp_path / "multimodal"), dtype="float32")
    text_loss(model).backward()
    before = gradients_of(model)
    injection = drift_fast.Injection(model, delta, scale="gradnorm")
    injection.step()
    assert injection.injected == TEXT_TARGETS
    assert_each_target_got_its_own_delta(model, delta, before)


def test_a_delta_of_two_text_models_is_injected_into_a_third_multimodal_one(
    tmp_path: Path, build: Callable[..., torch.nn.Module]
) -> None:
    text = tiny_qwen2()
    expert = saved(moved_text(text), tmp_path / "expert")
    delta = drift_fast.compute_delta(expert, saved(text, tmp_path / "base"), dtype="float32")
    model = build(text=text)
    text_loss(model).backward()
    before = gradients_of(model)
    drift_fast.Injection(model, delta, scale="gradnorm").step()
    assert_each_target_got_its_own_delta(model, delta, before)


def test_stretching_a_text_delta_uses_the_norms_of_the_model_it_is_attached_to(
    tmp_path: Path,
) -> None:
    text = tiny_qwen2()
    expert = saved(moved_text(text), tmp_path / "expert")
    delta = drift_fast.compute_delta(expert, saved(text, tmp_path / "base"), dtype="float32")
    model = tiny_llava(text=text)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    text_loss(model).backward()
    before = gradients_of(model)
    drift_fast.Injection(model, delta, scale="absolute", rescale="weight", alpha=0.2).step()
    by_suffix = {suffix(name): delta[name] for name in delta}
    for name in language_targets(model):
        parameter = model.get_parameter(name)
        own = by_suffix[suffix(name)]
        if not parameter.any():
            continue  # a bias of zeros has no norm to stretch to
        assert parameter.grad is not None
        assert_follows_reference(
            parameter.grad, before[name], own, alpha=0.2, scale="absolute", weight=parameter
        )


def test_disk_names_are_matched_to_runtime_names(
    tmp_path: Path, build: Callable[..., torch.nn.Module]
) -> None:
    text = tiny_qwen2()
    model = build(text=text)
    expert = saved(moved_text(text), tmp_path / "expert")
    delta = drift_fast.compute_delta(expert, saved(model, tmp_path / "multimodal"))
    matched = drift_fast.match_parameters(model, delta)
    assert set(matched) == language_targets(model)
    assert set(matched.values()) == set(delta)
    assert all(suffix(runtime) == suffix(stored) for runtime, stored in matched.items())
    # The trap is real: on disk and in memory the names differ.
    assert all(runtime != stored for runtime, stored in matched.items())


def test_a_text_model_is_matched_by_its_own_names(tmp_path: Path) -> None:
    text = tiny_qwen2()
    expert = saved(moved_text(text), tmp_path / "expert")
    delta = drift_fast.compute_delta(expert, saved(text, tmp_path / "base"))
    matched = drift_fast.match_parameters(text, delta)
    assert matched == {name: name for name in language_targets(text)}


def test_norms_embeddings_and_head_are_matched_when_they_are_in_the_delta(
    tmp_path: Path, build: Callable[..., torch.nn.Module]
) -> None:
    text = tiny_qwen2()
    model = build(text=text)
    expert = saved(moved_text(text), tmp_path / "expert")
    delta = drift_fast.compute_delta(
        expert,
        saved(model, tmp_path / "multimodal"),
        modules="all",
        rows="index",
        dtype="float32",
        strict=False,
    )
    matched = drift_fast.match_parameters(model, delta)
    # 20 projections, two norms in each layer and the last one, the embedding, the head.
    assert len(matched) == TEXT_TARGETS + 2 * 2 + 1 + 1 + 1
    for runtime, stored in matched.items():
        assert runtime.split(".")[-2:] == stored.split(".")[-2:]
        assert "vis" not in runtime
    text_loss(model).backward()
    before = gradients_of(model)
    drift_fast.Injection(model, delta, scale="gradnorm").step()
    for runtime, stored in matched.items():
        found = model.get_parameter(runtime).grad
        assert found is not None
        assert_follows_reference(found, before[runtime], delta[stored], alpha=1, scale="gradnorm")


def test_a_tied_embedding_is_injected_once(tmp_path: Path) -> None:
    text = tiny_qwen2(tie_word_embeddings=True)
    expert = tiny_qwen2(seed=4, tie_word_embeddings=True)
    delta = drift_fast.compute_delta(
        saved(expert, tmp_path / "expert"),
        saved(text, tmp_path / "base"),
        modules=("embed", "head"),
        rows="index",
        dtype="float32",
    )
    text_loss(text).backward()
    before = gradients_of(text)
    injection = drift_fast.Injection(text, delta, scale="gradnorm")
    injection.step()
    assert injection.injected == 1
    name = "model.embed_tokens.weight"
    found = gradients_of(text)[name]
    assert_follows_reference(found, before[name], delta[name], alpha=1, scale="gradnorm")


def test_a_model_loaded_in_bfloat16_takes_a_bfloat16_delta(tmp_path: Path) -> None:
    text = tiny_qwen2()
    expert = saved(moved_text(text).to(torch.bfloat16), tmp_path / "expert")
    model = tiny_llava(text=text).to(torch.bfloat16)
    delta = drift_fast.compute_delta(expert, saved(model, tmp_path / "multimodal"))
    text_loss(model).backward()
    before = gradients_of(model)
    drift_fast.Injection(model, delta, scale="gradnorm").step()
    assert_each_target_got_its_own_delta(model, delta, before)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("prefix", "wrap"),
    [
        ("_orig_mod.", torch.compile),
        ("module.", torch.nn.parallel.DistributedDataParallel),
        (
            "_orig_mod.module.",
            lambda model: torch.compile(torch.nn.parallel.DistributedDataParallel(model)),
        ),
    ],
    ids=["compiled", "distributed", "both"],
)
def test_a_wrapped_model_is_matched_and_injected(tmp_path: Path, prefix: str, wrap: Any) -> None:
    text = tiny_qwen2()
    model = tiny_llava(text=text)
    for name, parameter in model.named_parameters():
        # DistributedDataParallel wants every trained parameter to take part.
        parameter.requires_grad_("language_model" in name or "lm_head" in name)
    expert = saved(moved_text(text), tmp_path / "expert")
    delta = drift_fast.compute_delta(expert, saved(model, tmp_path / "multimodal"), dtype="float32")
    wrapped = wrap(model)
    assert all(name.startswith(prefix) for name, _ in wrapped.named_parameters())
    matched = drift_fast.match_parameters(wrapped, delta)
    assert {name.removeprefix(prefix) for name in matched} == language_targets(model)
    text_loss(model).backward()
    before = gradients_of(model)
    with drift_fast.Injection(wrapped, delta, scale="gradnorm") as injection:
        injection.step()
    assert_each_target_got_its_own_delta(model, delta, before)


@pytest.mark.usefixtures("process_group")
def test_gradients_reduced_by_ddp_are_injected(tmp_path: Path) -> None:
    text = tiny_qwen2()
    expert = saved(moved_text(text), tmp_path / "expert")
    delta = drift_fast.compute_delta(expert, saved(text, tmp_path / "base"), dtype="float32")
    wrapped = torch.nn.parallel.DistributedDataParallel(text)
    text_loss(wrapped).backward()
    before = gradients_of(text)
    injection = drift_fast.Injection(wrapped, delta, scale="adaptive")
    injection.step()
    for name in delta:
        found = text.get_parameter(name).grad
        assert found is not None
        expected = reference.inject(before[name], delta[name], alpha=1.0, scale="adaptive")
        assert reference.norm(reference.exact(found) - expected) < 1e-5 * reference.norm(expected)
    assert injection.injected == TEXT_TARGETS


def test_a_mapping_may_hold_its_tensors_on_a_device() -> None:
    class OnDevice(torch.Tensor):
        """A tensor that only `cpu()` makes one of host memory."""

        def numpy(self, *, force: bool = False) -> Any:
            raise TypeError("can't convert a device's tensor to numpy")

        def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    class Held(dict[str, torch.Tensor]):
        @property
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {name: tuple(tensor.shape) for name, tensor in self.items()}

    model = tiny_qwen2()
    shapes = {n: p.shape for n, p in model.named_parameters() if "proj.weight" in n}
    host = Held((name, torch.full(shape, 0.01)) for name, shape in shapes.items())
    device = Held((name, tensor.as_subclass(OnDevice)) for name, tensor in host.items())
    found = []
    for delta in (host, device):
        model.zero_grad()
        with drift_fast.Injection(model, delta) as injection:
            text_loss(model).backward()
            injection.step()
        found.append(gradients_of(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
