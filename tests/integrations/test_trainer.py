"""drift_fast.attach on the Hugging Face Trainer.

Owns: that the gradient the optimizer sees is the accumulated one, injected, then clipped; logging,
resuming, removal and refusal. Models are tiny and random; every run is a few steps on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from support import reference
from support.injection_models import (
    TEXT_TARGETS,
    Backbone,
    language_targets,
    moved_text,
    saved,
    text_samples,
    tiny_llava,
    tiny_qwen2,
    weights_of,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# Most runs here are too short to move far along Δ, which the injection says.
pytestmark = pytest.mark.filterwarnings("ignore:progress along:drift_fast.DriftWarning")

SAMPLES = 10


def make_trainer(
    model: torch.nn.Module,
    folder: Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    trainer_class: Any = None,
    **arguments: Any,
) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(folder / "runs"),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return (trainer_class or transformers.Trainer)(
        model=model,
        args=transformers.TrainingArguments(**{**options, **arguments}),
        train_dataset=text_samples(SAMPLES),
        optimizers=(optimizer, None),
    )


@pytest.fixture(scope="module")
def llava_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text expert and a LLaVA of the same backbone, saved in shards."""
    folder = tmp_path_factory.mktemp("pair")
    text = tiny_qwen2()
    expert = saved(moved_text(text), folder / "expert")
    return expert, saved(tiny_llava(text=text), folder / "multimodal")


@pytest.fixture(scope="module")
def delta(llava_pair: tuple[Path, Path]) -> drift_fast.Delta:
    expert, multimodal = llava_pair
    return drift_fast.compute_delta(expert, multimodal, dtype="float32")


@pytest.fixture
def build(llava_pair: tuple[Path, Path]) -> Callable[[], torch.nn.Module]:
    """Loads the saved LLaVA afresh."""
    loader = transformers.LlavaForConditionalGeneration.from_pretrained
    return functools.partial(loader, llava_pair[1], dtype=torch.float32)


def deltas_by_parameter(model: torch.nn.Module, delta: drift_fast.Delta) -> dict[str, torch.Tensor]:
    """Look the delta of each target up by what every naming shares, without the library's match."""

    def suffix(name: str) -> str:
        return name[name.index("layers.") :]

    by_suffix = {suffix(name): delta[name] for name in delta}
    return {name: by_suffix[suffix(name)] for name in language_targets(model)}


def gradients_the_optimizer_sees(
    model: torch.nn.Module,
    folder: Path,
    attach: Callable[[Any], Any] | None = None,
    **arguments: Any,
) -> list[dict[str, torch.Tensor]]:
    """Train with a learning rate of zero, so that every step's gradient is comparable."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen: list[dict[str, torch.Tensor]] = []

    def record(inner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(
            {
                names[parameter]: parameter.grad.detach().clone()
                for group in inner.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
            }
        )

    optimizer.register_step_pre_hook(record)
    trainer = make_trainer(model, folder, optimizer=optimizer, **arguments)
    if attach is not None:
        attach(trainer)
    trainer.train()
    return seen


@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_the_optimizer_sees_the_accumulated_gradient_injected_then_clipped(
    tmp_path: Path,
    build: Callable[[], torch.nn.Module],
    delta: drift_fast.Delta,
    scale: str,
    accumulation: int,
    clip: float,
) -> None:
    # Ten samples, one a micro-batch: with accumulation 4 the epoch ends on a group of two.
    arguments = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 3,
    }
    plain = gradients_the_optimizer_sees(build(), tmp_path, max_grad_norm=0.0, **arguments)
    model = build()
    seen = gradients_the_optimizer_sees(
        model,
        tmp_path,
        lambda trainer: drift_fast.attach(trainer, delta, alpha=0.7, scale=scale),
        max_grad_norm=clip,
        **arguments,
    )
    assert len(seen) == len(plain) == 3
    own = deltas_by_parameter(model, delta)
    assert len(own) == TEXT_TARGETS
    for found, before in zip(seen, plain, strict=True):
        expected: dict[str, Any] = {
            name: reference.inject(gradient, own[name], alpha=0.7, scale=scale)
            if name in own
            else reference.exact(gradient)
            for name, gradient in before.items()
        }
        if clip:
            total, expected = reference.clip(expected, clip)
            assert total > clip
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            error = reference.norm(reference.exact(gradient) - expected[name])
            assert error <= 2e-5 * reference.norm(expected[name]) + 1e-9, name


def test_mixed_precision_training_is_injected(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    arguments = {"bf16": True, "max_grad_norm": 0.0, "max_steps": 2}
    plain = gradients_the_optimizer_sees(build(), tmp_path, **arguments)
    model = build()
    seen = gradients_the_optimizer_sees(
        model,
        tmp_path,
        lambda trainer: drift_fast.attach(trainer, delta, scale="gradnorm"),
        **arguments,
    )
    for found, before in zip(seen, plain, strict=True):
        for name, own in deltas_by_parameter(model, delta).items():
            expected = reference.inject(before[name], own, alpha=1.0, scale="gradnorm")
            error = reference.norm(reference.exact(found[name]) - expected)
            assert error <= 2e-5 * reference.norm(expected) + 1e-9, name


def test_microbatch_scope_injects_into_every_micro_batch(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    arguments = {"per_device_train_batch_size": 1, "max_steps": 1, "max_grad_norm": 0.0}

    micro: list[dict[str, torch.Tensor]] = []

    class Recorder(transformers.Trainer):  # type: ignore[misc]
        def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            loss = super().training_step(model, *args, **kwargs)
            micro.append(
                {
                    name: parameter.grad - before.get(name, 0.0)
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                }
            )
            return loss

    model = build()
    gradients_the_optimizer_sees(
        model, tmp_path, trainer_class=Recorder, gradient_accumulation_steps=4, **arguments
    )
    assert len(micro) == 4
    model = build()
    (seen,) = gradients_the_optimizer_sees(
        model,
        tmp_path,
        lambda trainer: drift_fast.attach(trainer, delta, scale="gradnorm", scope="microbatch"),
        gradient_accumulation_steps=4,
        **arguments,
    )
    for name, own in deltas_by_parameter(model, delta).items():
        if "k_proj.bias" in name:
            continue  # softmax cancels it: its gradient is rounding, which differences amplify
        expected = sum(
            reference.public_inject(part[name], own, alpha=1.0, scale="gradnorm") for part in micro
        )
        error = reference.norm(reference.exact(seen[name]) - expected)
        assert error <= 1e-4 * reference.norm(expected), name


def test_trained_weights_differ_from_plain_fine_tuning_and_lie_towards_the_expert(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    start = weights_of(build())
    plain, model = build(), build()
    make_trainer(plain, tmp_path).train()
    trainer = make_trainer(model, tmp_path)
    injection = drift_fast.attach(trainer, delta)
    trainer.train()
    own = deltas_by_parameter(model, delta)
    without, _ = reference.progress(weights_of(plain), start, own)
    overall, _ = reference.progress(weights_of(model), start, own)
    assert overall > without + 1e-4
    for name in own:
        assert not torch.equal(model.get_parameter(name), plain.get_parameter(name)), name
    assert injection.injected == TEXT_TARGETS
    assert injection.metrics()["progress"] == pytest.approx(overall, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize("scale", reference.SCALES)
def test_ten_steps_with_alpha_zero_are_bit_identical_to_plain_fine_tuning(
    tmp_path: Path,
    build: Callable[[], torch.nn.Module],
    delta: drift_fast.Delta,
    scale: str,
    scope: str,
) -> None:
    plain, model = build(), build()
    start = weights_of(plain)
    make_trainer(plain, tmp_path, max_steps=10).train()
    trainer = make_trainer(model, tmp_path, max_steps=10)
    drift_fast.attach(trainer, delta, alpha=0.0, scale=scale, scope=scope)
    trainer.train()
    for name, found in model.named_parameters():
        assert torch.equal(found, plain.get_parameter(name)), name
    assert any(not torch.equal(found, start[name]) for name, found in model.named_parameters())


def test_progress_is_logged_at_every_logging_step(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    model = build()
    start = weights_of(model)
    trainer = make_trainer(model, tmp_path)
    drift_fast.attach(trainer, delta)
    trainer.train()
    logged = [row["drift/progress"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 3
    assert logged == sorted(logged)
    overall, _ = reference.progress(weights_of(model), start, deltas_by_parameter(model, delta))
    assert logged[-1] == pytest.approx(overall, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"progress_cap": 0.9}], ids=["plain", "capped"])
def test_a_log_line_has_eight_metrics_at_most_and_all_on_request(
    tmp_path: Path,
    build: Callable[[], torch.nn.Module],
    delta: drift_fast.Delta,
    options: dict[str, Any],
) -> None:
    def keys(**more: Any) -> set[str]:
        trainer = make_trainer(build(), tmp_path, max_steps=1)
        injection = drift_fast.attach(trainer, delta, **options, **more)
        trainer.train()
        assert injection.summary().keys() >= {"progress/self_attn.q_proj", "cosine/mlp"}
        assert "\n" not in repr(injection)
        assert str(injection) == str(injection.injection)
        return {key for key in trainer.state.log_history[0] if key.startswith("drift/")}

    brief, all_of_them = keys(), keys(log="all")
    assert len(brief) == 8
    assert {"drift/progress", "drift/predicted_progress", "drift/cosine"} <= brief
    assert ("drift/stopped" in brief) == bool(options)
    assert brief | {"drift/progress/self_attn.q_proj"} <= all_of_them


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    # A text model: transformers 5.23's Trainer resumes a LLaVA checkpoint by its disk names, finds
    # none of them in the model, warns and goes on from the weights that were there.
    text = tiny_qwen2()
    expert = saved(moved_text(text), tmp_path / "expert")
    delta = drift_fast.compute_delta(expert, saved(text, tmp_path / "base"), dtype="float32")
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    start = weights_of(text)
    whole = tiny_qwen2()
    trainer = make_trainer(whole, tmp_path, **arguments)
    drift_fast.attach(trainer, delta)
    trainer.train()

    resumed = tiny_qwen2()
    trainer = make_trainer(resumed, tmp_path, **arguments)
    injection = drift_fast.attach(trainer, delta)
    trainer.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    for name, found in resumed.named_parameters():
        torch.testing.assert_close(found, whole.get_parameter(name), rtol=1e-6, atol=1e-8)
    # Progress counts from the weights at attachment, not from those the checkpoint brought.
    expected, _ = reference.progress(weights_of(whole), start, dict(delta))
    assert injection.metrics()["progress"] == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def checkpoint(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> Path:
    """The second step of a run of four, whose names on disk are not those of the model."""
    trainer = make_trainer(build(), tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    drift_fast.attach(trainer, delta)
    trainer.train()
    return tmp_path / "runs" / "checkpoint-2"


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does where a checkpoint's names are not the model's."""
    monkeypatch.setattr(transformers.Trainer, "_load_from_checkpoint", lambda *_, **__: None)


def resumed(
    model: torch.nn.Module, delta: drift_fast.Delta, checkpoint: Path, attach: Any = None
) -> Any:
    trainer = make_trainer(model, checkpoint.parent.parent, max_steps=4)
    (attach or drift_fast.attach)(trainer, delta)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@pytest.mark.usefixtures("loads_nothing")
def test_a_run_that_resumes_without_the_checkpoints_weights_is_refused_with_the_way_round(
    build: Callable[[], torch.nn.Module], delta: drift_fast.Delta, checkpoint: Path
) -> None:
    model = build()
    start = weights_of(model)
    refusal = r"resume at step 2 of .*checkpoint-2, .*were not loaded .*from_pretrained\("
    with pytest.raises(drift_fast.DriftError, match=refusal):
        resumed(model, delta, checkpoint)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, start[name]), "it trained on"
    # A planned motion is lost in the same way.
    motion = functools.partial(drift_fast.attach_motion, progress=0.1)
    with pytest.raises(drift_fast.DriftError, match=refusal):
        resumed(build(), delta, checkpoint, motion)


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["exact", "rounded"])
def test_a_model_that_was_loaded_from_the_checkpoint_goes_on(
    delta: drift_fast.Delta, checkpoint: Path, dtype: torch.dtype
) -> None:
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    # Some frameworks round what they load to 16 bits before they train it in float32.
    model = load(checkpoint, dtype=dtype).float()
    assert resumed(model, delta, checkpoint).state.global_step == 4


def test_weights_that_cannot_be_compared_with_the_checkpoint_are_judged_by_their_progress(
    build: Callable[[], torch.nn.Module], delta: drift_fast.Delta, checkpoint: Path
) -> None:
    def attach(trainer: Any, delta: drift_fast.Delta) -> None:
        drift_fast.attach(trainer, delta)
        trainer._load_from_checkpoint = lambda *_, **__: None

    with pytest.warns(drift_fast.DriftWarning, match=r"at step 2 at λ = .*were not loaded"):
        resumed(build(), delta, checkpoint, attach)


def test_a_second_run_has_the_schedule_from_its_start(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(build(), tmp_path)
    injection = drift_fast.attach(trainer, delta, schedule="window(0, 0.4)")
    found = []
    for _ in range(2):
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        found.append([row["drift/alpha"] for row in rows])
    assert found == [[1.0, 1.0, 0.0]] * 2
    assert injection.steps == 3


def test_removal_restores_plain_training(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    plain, model = build(), build()
    make_trainer(plain, tmp_path).train()
    trainer = make_trainer(model, tmp_path)
    drift_fast.attach(trainer, delta).remove()
    trainer.train()
    for name, found in model.named_parameters():
        assert torch.equal(found, plain.get_parameter(name)), name
    assert not any(key.startswith("drift/") for row in trainer.state.log_history for key in row)


def test_removal_after_training_lets_a_second_run_be_plain(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    model = build()
    trainer = make_trainer(model, tmp_path, max_steps=1)
    injection = drift_fast.attach(trainer, delta)
    trainer.train()
    injection.remove()
    plain = build()
    plain.load_state_dict(model.state_dict())
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    make_trainer(plain, tmp_path).train()
    for name, found in model.named_parameters():
        assert torch.equal(found, plain.get_parameter(name)), name


# --- refusals ---------------------------------------------------------------------------------


def attach_and_train(trainer: Any, delta: drift_fast.Delta) -> None:
    """Targets may be resolved when they are attached or when training begins."""
    drift_fast.attach(trainer, delta)
    trainer.train()


def test_a_trainer_of_another_model_is_refused(tmp_path: Path, delta: drift_fast.Delta) -> None:
    stranger = torch.nn.Module()
    stranger.inner = Backbone()
    with pytest.raises(drift_fast.DriftError) as caught:
        attach_and_train(make_trainer(stranger, tmp_path), delta)
    assert "proj" in str(caught.value)


def test_a_trainer_of_a_model_of_another_width_is_refused_with_both_shapes(
    tmp_path: Path, delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(tiny_qwen2(intermediate_size=40), tmp_path)
    with pytest.raises(drift_fast.CoverageError) as caught:
        attach_and_train(trainer, delta)
    message = str(caught.value)
    assert ("[48, 32]" in message and "[40, 32]" in message) or (
        "[32, 48]" in message and "[32, 40]" in message
    )


def test_a_frozen_backbone_is_refused(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    model = build()
    victim = "model.language_model.layers.1.self_attn.v_proj.weight"
    model.get_parameter(victim).requires_grad_(False)
    with pytest.raises(drift_fast.DriftError, match=r"requires_grad|frozen") as caught:
        attach_and_train(make_trainer(model, tmp_path), delta)
    assert victim in str(caught.value)


def test_a_second_attachment_is_refused(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(build(), tmp_path)
    first = drift_fast.attach(trainer, delta)
    with pytest.raises(drift_fast.DriftError, match="already"):
        drift_fast.attach(trainer, delta)
    first.remove()
    drift_fast.attach(trainer, delta).remove()


def in_one_row(trainer: Any) -> None:
    """Let a micro-batch be one row without padding, in which positions start anew."""
    rows = [{key: values.tolist() for key, values in row.items()} for row in trainer.train_dataset]
    trainer.train_dataset = [
        {key: row[key][: 3 + at % 5] for key in row} for at, row in enumerate(rows)
    ]
    trainer.data_collator = transformers.DataCollatorWithFlattening()


def in_two_backward_passes(trainer: Any) -> None:
    """Replace `training_step` on the instance, as libraries do that bound the tokens of a pass."""
    original = trainer.training_step

    def training_step(model: torch.nn.Module, inputs: dict[str, Any], *more: Any) -> Any:
        halves = [{key: values[at : at + 1] for key, values in inputs.items()} for at in (0, 1)]
        return sum(original(model, half, *more) for half in halves)

    trainer.training_step = training_step


@pytest.mark.parametrize("arranged", [in_one_row, in_two_backward_passes])
def test_rows_without_padding_and_batches_that_are_split_are_injected_once(
    tmp_path: Path,
    build: Callable[[], torch.nn.Module],
    delta: drift_fast.Delta,
    arranged: Callable[[Any], None],
) -> None:
    arguments = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    (plain, *_) = gradients_the_optimizer_sees(build(), tmp_path, arranged, **arguments)

    def attach(trainer: Any) -> None:
        arranged(trainer)
        drift_fast.attach(trainer, delta)

    model = build()
    (found, *_) = gradients_the_optimizer_sees(model, tmp_path, attach, **arguments)
    for name, change in deltas_by_parameter(model, delta).items():
        expected = reference.inject(plain[name], change, alpha=1.0, scale="adaptive")
        error = reference.norm(reference.exact(found[name]) - expected)
        assert error <= 2e-5 * reference.norm(expected), name


def test_a_wrapper_that_splits_batches_around_the_injection_is_stopped(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(build(), tmp_path)
    drift_fast.attach(trainer, delta)
    in_two_backward_passes(trainer)
    with pytest.raises(drift_fast.DriftError, match="Δ would be in it twice"):
        trainer.train()


@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "cosine"}],
    ids=["attached at once", "attaches when training starts"],
)
def test_a_loop_that_trains_the_model_of_a_trainer_without_it_is_stopped(
    tmp_path: Path,
    build: Callable[[], torch.nn.Module],
    delta: drift_fast.Delta,
    options: dict[str, Any],
) -> None:
    # As unsloth_zoo.training_utils.unsloth_train: it takes a trainer and calls nothing of it.
    trainer = make_trainer(build(), tmp_path, max_steps=-1, num_train_epochs=1)
    injection = drift_fast.attach(trainer, delta, **options)
    assert (injection.steps, "attaches when" in repr(injection)) == (0, bool(options))

    def own_loop() -> None:
        optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
        batch = trainer.data_collator([trainer.train_dataset[at] for at in range(2)])
        trainer.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.raises(drift_fast.DriftError, match=r"train with trainer\.train\(\)"):
        own_loop()
    trainer.model.zero_grad()
    trainer.train()
    assert injection.steps == trainer.state.max_steps > 0
    injection.remove()
    own_loop()


def test_an_injection_that_waits_and_was_removed_stops_no_loop(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    trainer = make_trainer(build(), tmp_path, max_steps=-1, num_train_epochs=1)
    drift_fast.attach(trainer, delta, schedule="cosine").remove()
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
    trainer.model(**trainer.data_collator([trainer.train_dataset[0]])).loss.backward()
    optimizer.step()


def test_training_stops_when_something_undoes_the_injection(
    tmp_path: Path, build: Callable[[], torch.nn.Module], delta: drift_fast.Delta
) -> None:
    class Undo(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            plain = transformers.Trainer.training_step
            self.trainer.training_step = functools.partial(plain, self.trainer)

    trainer = make_trainer(build(), tmp_path)
    drift_fast.attach(trainer, delta)
    trainer.add_callback(Undo(trainer))
    with pytest.raises(drift_fast.DriftError, match="nothing was injected"):
        trainer.train()
