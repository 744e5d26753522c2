"""What the method's public code does wrong in silence, and the test that shows it done right here.

Owns the tests that have no other place. The table names the others too, and they must exist.

No hook is attached to Qwen2.5-VL on current transformers, and the run is called active:
    test_injection_names.py::test_a_delta_of_a_text_expert_reaches_every_target_of_a_multimodal_model
    test_injection_errors.py::test_a_model_with_nothing_in_common_is_refused
    test_injection_errors.py::test_a_language_model_under_another_path_is_found_or_refused_but_never_skipped
    test_injection_watchdog.py::test_an_update_without_an_injection_is_stopped_at_the_first_step
    test_public_failures.py::test_targets_that_were_replaced_or_frozen_after_attaching_stop_the_run
Both models are held in host memory:
    test_memory.py::test_a_delta_of_a_gigabyte_pair_takes_less_than_100_megabytes
    test_residency.py::test_no_more_of_delta_is_held_than_the_store_says
Δ is copied to the device in every backward pass:
    test_public_failures.py::test_a_resident_delta_is_read_once_for_the_whole_run
‖Δ‖ is computed anew in each step:
    test_public_failures.py::test_the_norm_of_delta_is_taken_once
The adaptive scale waits for the device at every tensor:
    test_injection_writing.py::test_a_step_reads_nothing_back_to_the_host
    test_injection_cuda.py::test_a_step_never_waits_and_matches_the_restatement
α in effect depends on the number of micro-batches:
    test_injection_loop.py::test_one_batch_of_eight_and_eight_of_one_give_the_same_injected_gradient
    test_microbatch.py::test_the_push_depends_on_the_number_of_micro_batches_as_in_the_public_code
    test_public_failures.py::test_the_push_on_noise_is_alpha_whatever_the_number_of_micro_batches
α in effect depends on the number of processes:
    test_public_failures.py::test_two_processes_are_pushed_as_one_is
    test_accelerate.py::test_two_processes_inject_into_the_reduced_gradient
    test_fsdp2.py::test_gradients_are_those_of_one_process
Under FSDP2 a hook on a parameter never fires:
    test_public_failures.py::test_a_hook_never_fires_under_fsdp2_and_a_step_injects_all_the_same
    test_microbatch.py::test_a_fully_sharded_model_is_refused
Under ZeRO-3 a parameter has no `grad`:
    test_zero.py::test_an_attached_engine_steps_along_the_injected_gradient
    test_injection_errors.py::test_a_step_before_any_backward_is_refused
Under LoRA the weight is frozen:
    test_lora.py::test_the_joint_gradient_of_the_factors_follows_the_equations
    test_injection_errors.py::test_a_frozen_target_is_refused_by_name
Nothing of the pair is checked, such as heads, RoPE, vocabulary and tied heads:
    test_check.py::test_heads_of_another_size_break_although_every_shape_agrees
    test_check.py::test_r1_distill_and_qwen_vl_fit_and_their_bases_are_noted
    test_check.py::test_another_vocabulary_breaks_where_embeddings_are_selected_and_cannot_be_matched
    test_check.py::test_tied_embeddings_matter_where_they_are_selected
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import drift_fast
from support import reference
from support.injection_models import (
    ARITHMETIC,
    Backbone,
    arithmetic,
    delta_towards,
    gradients_of,
    regression_batch,
    regression_loss,
    single_target,
)
from support.joined import Job, Joined, Report, launch


def test_every_test_that_the_table_names_exists() -> None:
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", __doc__ or "")
    assert len(named) > 20
    files = {path.name: path for path in Path(__file__).parents[1].rglob("test_*.py")}
    for file, name in named:
        assert f"def {name}(" in files[file].read_text(encoding="utf-8"), f"{file}::{name}"


# --- hooks that are attached to nothing ---------------------------------------------------------


def replaced(model: torch.nn.Module) -> None:
    """Put other parameters in the place of all, as wrapping may do."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))


def frozen(model: torch.nn.Module) -> None:
    """Leave the head alone to train, as adapters do with what they are added to."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))


@pytest.mark.parametrize("change", [replaced, frozen])
@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_targets_that_were_replaced_or_frozen_after_attaching_stop_the_run(
    tmp_path: Path, scope: Any, change: Callable[[torch.nn.Module], None]
) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model)
    injection = drift_fast.Injection(model, delta, scope=scope)
    change(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    regression_loss(model, regression_batch()).backward()
    with pytest.raises(drift_fast.DriftError, match="attach after the model was wrapped"):
        optimizer.step()
    injection.remove()
    optimizer.step()


def test_an_optimizer_of_other_parameters_of_the_model_is_let_through(tmp_path: Path) -> None:
    model = Backbone()
    injection = drift_fast.Injection(model, delta_towards(tmp_path, model))
    head = torch.optim.SGD(model.head.parameters(), lr=1e-2)
    regression_loss(model, regression_batch()).backward()
    head.step()
    injection.remove()


# --- what is done anew in every step ------------------------------------------------------------


class Counted:
    """A delta that counts how often each of its tensors is asked for."""

    def __init__(self, delta: drift_fast.Delta) -> None:
        self.delta = delta
        self.dtype = delta.dtype
        self.shapes = delta.shapes
        self.asked: Counter[str] = Counter()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked[name] += 1
        return self.delta[name]


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_a_resident_delta_is_read_once_for_the_whole_run(tmp_path: Path, scope: Any) -> None:
    model = Backbone()
    delta = Counted(delta_towards(tmp_path, model))
    with drift_fast.Injection(model, delta, scope=scope, residency="device") as injection:
        for _ in range(3):
            model.zero_grad()
            regression_loss(model, regression_batch()).backward()
            if scope == "step":
                injection.step()
        assert injection.injected == len(delta.shapes)
    assert delta.asked == Counter(dict.fromkeys(delta.shapes, 1))


@ARITHMETIC
@pytest.mark.parametrize("scale", ["gradnorm", "adaptive"])
def test_the_norm_of_delta_is_taken_once(tmp_path: Path, scale: str, kind: str) -> None:
    model, weight, delta = single_target(tmp_path, (8, 8))
    values = next(iter(delta.values()))
    gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    # At right angles to Δ, where both scales are a share of the gradient's norm.
    gradient -= (gradient * values).sum() / values.square().sum() * values
    with arithmetic(kind):
        injection = drift_fast.Injection(model, delta, scale=scale, residency="device")
    pushes = []
    for factor in (1.0, 3.0):
        # A norm that were taken of what is injected would make up for its length.
        (store,) = [group.store for group in injection._groups]
        for held in store.deltas:  # type: ignore[attr-defined]
            held.mul_(factor)
        weight.grad = gradient.clone()
        injection.step()
        pushes.append(reference.norm(reference.exact(weight.grad) - reference.exact(gradient)))
    assert pushes[1] / pushes[0] == pytest.approx(3.0, rel=1e-5)


# --- α in effect --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_the_push_on_noise_is_alpha_whatever_the_number_of_micro_batches(
    tmp_path: Path, count: int
) -> None:
    model, weight, delta = single_target(tmp_path, (64, 64))
    noise = torch.randn(count, 64, 64, generator=torch.Generator().manual_seed(8))

    def relative_push(scope: Any) -> float:
        with drift_fast.Injection(model, delta, alpha=0.5, scale="gradnorm", scope=scope) as run:
            weight.grad = None
            for part in noise:
                # The gradient of a micro-batch is noise alone.
                ((weight * part).sum() / count).backward()
            if scope == "step":
                run.step()
        assert weight.grad is not None
        plain = reference.exact(noise.double().mean(0))
        return reference.norm(reference.exact(weight.grad) - plain) / reference.norm(plain)

    assert relative_push("step") == pytest.approx(0.5, rel=1e-4)
    # What the public code does, for whoever reproduces it.
    assert relative_push("microbatch") == pytest.approx(0.5 * math.sqrt(count), rel=0.05)


def in_two(delta: str) -> Report:
    """Inject into the gradient that two processes have reduced, and report it."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(Backbone())
    injection = drift_fast.Injection(model, delta, alpha=0.7)
    inputs, targets = regression_batch()
    rank = dist.get_rank()
    regression_loss(model, (inputs[rank::2], targets[rank::2])).backward()
    injection.step()
    return {name: tensor.tolist() for name, tensor in gradients_of(model.module).items()}


def test_two_processes_are_pushed_as_one_is(tmp_path: Path) -> None:
    model = Backbone()
    delta = delta_towards(tmp_path, model, out=tmp_path / "delta")
    jobs: dict[str, Job] = {"injected": (in_two, (str(tmp_path / "delta"),))}
    reports = launch(tmp_path / "work", jobs, Joined(2))
    regression_loss(model, regression_batch()).backward()
    plain = gradients_of(model)
    for report in reports:
        found = report["injected"]
        for name in delta:
            expected = reference.inject(plain[name], delta[name], alpha=0.7, scale="adaptive")
            error = reference.norm(reference.exact(found[name]) - expected)
            assert error <= 1e-5 * reference.norm(expected), name


# --- FSDP2 --------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_hook_never_fires_under_fsdp2_and_a_step_injects_all_the_same(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Backbone()
    delta = delta_towards(tmp_path, model)
    regression_loss(model, regression_batch()).backward()
    plain = gradients_of(model)
    model.zero_grad()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: fired.append(name))
    with drift_fast.Injection(model, delta) as injection:
        regression_loss(model, regression_batch()).backward()
        injection.step()
        assert injection.injected == len(delta)
    assert fired == []
    for name, parameter in model.named_parameters():
        if name in delta:
            found: Any = parameter.grad
            reference.assert_follows_reference(
                found.to_local(), plain[name], delta[name], alpha=1.0, scale="adaptive", label=name
            )
