"""A Trainer that runs twice under FSDP2 or DeepSpeed, which wrap the model anew or go on with it.

Owns: that the second run is injected into with the schedule of its own length. Two processes on the
CPU share one start for all checks.
"""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import drift_fast
from drift_fast.inject.targets import find_targets
from drift_fast.integrations.trainer_run import check_ahead, check_doras_ahead
from support.injection_models import (
    ATTENTION,
    MLP,
    Backbone,
    delta_towards,
    moved_text,
    saved,
    text_samples,
    tiny_qwen2,
)
from support.joined import Joined, Report, launch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PATIENCE = timedelta(seconds=90)


def run_twice(folder: Path, trainer_class: Any = None, **arguments: Any) -> Report:
    from accelerate.state import AcceleratorState, GradientState

    # The processes have met; Accelerate only wants to see where.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options: dict[str, Any] = {
        "output_dir": str(folder / "runs"),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "dataloader_pin_memory": False,
    }
    report: Report = {}
    trainer = (trainer_class or transformers.Trainer)(
        model=tiny_qwen2(),
        args=transformers.TrainingArguments(**{**options, **arguments}),
        train_dataset=text_samples(16),
    )
    injection = drift_fast.attach(trainer, folder / "delta", schedule="linear", scale="gradnorm")
    report["own loop"] = refused_own_loop(trainer) if trainer.is_fsdp_enabled else ""
    for steps in (2, 4):
        trainer.args.max_steps = steps
        if trainer.is_deepspeed_enabled:
            # What `auto_find_batch_size` does; without it a Trainer does not run twice.
            trainer.model_wrapped = trainer.model
        trainer.train()
        rows = [row for row in trainer.state.log_history if "drift/alpha" in row]
        report[str(steps)] = {
            key: [row[f"drift/{key}"] for row in rows]
            for key in ("alpha", "progress", "relative_push")
        }
    report["injected"] = injection.injected
    report["targets"] = len(injection.targets)
    return report


def refused_own_loop(trainer: Any) -> str:
    """Return why a loop of one's own over a copy of the model that FSDP2 shards may not step.

    What torch does to give an optimizer room for a saved state is no such loop.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, trainer.model = trainer.model, copy.deepcopy(trainer.model)
    try:
        fully_shard(trainer.model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-2)
        assert get_optimizer_state_dict(trainer.model, optimizer)["state"]
        trainer.model(**trainer.data_collator([trainer.train_dataset[0]])).loss.backward()
        with pytest.raises(drift_fast.DriftError) as refusal:
            optimizer.step()
        return str(refusal.value)
    finally:
        trainer.model = whole


def check_fsdp2(folder: Path) -> Report:
    from parity.libraries import BLOCK, _fsdp_without_accelerators

    with _fsdp_without_accelerators():
        return run_twice(
            folder,
            fsdp=True,
            fsdp_config={
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": [BLOCK],
                "cpu_ram_efficient_loading": False,
            },
        )


def zero(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000},
        "optimizer": {"type": "SGD", "params": {"lr": 1e-2}},
    }


def check_zero_2(folder: Path) -> Report:
    import deepspeed

    # It would be compiled, and is not needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return run_twice(folder, deepspeed=zero(2))


def check_ddp(folder: Path) -> Report:
    return run_twice(folder)


CHECKS = {"ddp": check_ddp, "fsdp2": check_fsdp2, "zero 2": check_zero_2}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Report]]:
    folder = tmp_path_factory.mktemp("runs")
    text = tiny_qwen2()
    drift_fast.compute_delta(
        saved(moved_text(text), folder / "expert"),
        saved(text, folder / "multimodal"),
        dtype="float32",
        out=folder / "delta",
    )
    jobs = {name: (check, (folder,)) for name, check in CHECKS.items()}
    return launch(folder / "processes", jobs, Joined(2, "gloo", PATIENCE))


@pytest.mark.parametrize("how", list(CHECKS))
def test_a_second_run_is_injected_over_its_own_length(
    reports: list[dict[str, Report]], how: str
) -> None:
    for report in (rank[how] for rank in reports):
        assert report["2"]["alpha"] == [1.0, 0.5]
        assert report["4"]["alpha"] == [1.0, 0.75, 0.5, 0.25]
        assert report["injected"] == report["targets"] == 20
        # λ goes on from where the first run ended.
        first, second = report["2"]["progress"], report["4"]["progress"]
        assert 0 < first[0] < first[1] < second[0] < second[-1]
        # With this scale, α is how large the push is beside the gradient.
        assert report["4"]["relative_push"] == pytest.approx(report["4"]["alpha"], rel=1e-3)


def test_a_loop_over_what_fsdp_shards_may_not_train_before_the_trainer(
    reports: list[dict[str, Report]],
) -> None:
    for rank in reports:
        assert "train with trainer.train()" in rank["fsdp2"]["own loop"]


class _Owner(SimpleNamespace):
    """What is looked at of a trainer before it has wrapped its model."""

    def __init__(
        self, *, deepspeed: Any = None, fsdp: Any = None, optim: str = "adamw_torch"
    ) -> None:
        state = SimpleNamespace(
            deepspeed_plugin=SimpleNamespace(
                deepspeed_config=deepspeed,
                zero_stage=(deepspeed or {}).get("zero_optimization", {}).get("stage", 0),
            ),
            fsdp_plugin=fsdp,
        )
        super().__init__(
            args=SimpleNamespace(optim=optim),
            accelerator=SimpleNamespace(state=state),
            is_deepspeed_enabled=deepspeed is not None,
            is_fsdp_enabled=fsdp is not None,
        )


@pytest.mark.parametrize(
    ("owner", "options", "message"),
    [
        (
            _Owner(fsdp=SimpleNamespace(fsdp_version=1, use_orig_params=False)),
            {},
            "fsdp_use_orig_params",
        ),
        (_Owner(fsdp=SimpleNamespace(fsdp_version=2)), {"overlap": True}, "overlap=False"),
        (_Owner(fsdp=SimpleNamespace(fsdp_version=2)), {"scope": "microbatch"}, 'scope="step"'),
        (_Owner(deepspeed={}), {"scope": "microbatch"}, 'scope="step"'),
        (_Owner(deepspeed={"optimizer": {"type": "Muon"}}), {}, "Muon"),
        (_Owner(optim="adalomo"), {}, "inside backward"),
        (_Owner(optim="galore_adamw_layerwise"), {}, "inside backward"),
    ],
)
def test_what_a_trainer_is_set_to_is_refused_before_it_trains(
    owner: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(drift_fast.DriftError, match=message):
        check_ahead(owner, drift_fast.InjectionConfig(**options))


def test_a_supported_way_of_sharding_is_taken() -> None:
    config = drift_fast.InjectionConfig()
    check_ahead(_Owner(), config)
    check_ahead(_Owner(deepspeed={"zero_optimization": {"stage": 3}}), config)
    for plugin in ({"fsdp_version": 2}, {"fsdp_version": 1, "use_orig_params": True}):
        check_ahead(_Owner(fsdp=SimpleNamespace(**plugin)), config)


@pytest.mark.parametrize(
    ("owner", "refused"),
    [
        (_Owner(), False),
        (_Owner(deepspeed={"zero_optimization": {"stage": 3}}), False),
        (_Owner(fsdp=SimpleNamespace(fsdp_version=2)), False),
        (_Owner(fsdp=SimpleNamespace(fsdp_version=1, use_orig_params=True)), True),
    ],
)
def test_a_dora_is_refused_before_a_trainer_wraps_its_factors_apart(
    tmp_path: Path, owner: Any, *, refused: bool
) -> None:
    peft = pytest.importorskip("peft")
    config = drift_fast.InjectionConfig(modules=r"re:_proj\.weight$")
    model = peft.get_peft_model(
        Backbone(), peft.LoraConfig(target_modules=[*ATTENTION, *MLP], use_dora=True)
    )
    targets, _ = find_targets(model, delta_towards(tmp_path, Backbone()), config)
    if refused:
        with pytest.raises(drift_fast.DriftError, match=r"q_proj.*FSDP2.*use_dora=False"):
            check_doras_ahead(owner, targets)
    else:
        check_doras_ahead(owner, targets)
