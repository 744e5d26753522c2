"""Whole plans: figures, their origins, warnings and remedies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import drift_fast
from drift_fast.cli.main import main
from drift_fast.inject.predict import predict_progress
from drift_fast.planner import rates
from drift_fast.planner.counts import VISION, read_model
from drift_fast.planner.training import Training
from support.planner_models import (
    MULTIMODAL,
    MULTIMODAL_NUMEL,
    REASONING,
    REASONING_NUMEL,
)
from support.processes import python
from support.range_server import RangeServer
from support.synthetic import Pair, refused


def test_every_figure_says_where_it_comes_from_and_time_follows_from_the_stated_formulas() -> None:
    pytest.importorskip("transformers")
    found = drift_fast.plan(
        REASONING, MULTIMODAL, samples=4000, epochs=3.0, gpus=8, sharding="zero2", modules="attn"
    )
    assert all(figure.source and figure.origin for figure in found.figures)
    assert found["optimizer steps"].value == 1500
    attention = rates.ATTENTION
    assert found["Δ on disk"].value == 2 * attention.numel
    assert found["to read"].value == 4 * attention.numel
    assert found["time, cold"].value == pytest.approx(4 * attention.numel / 1.21e9)
    # The embedding is looked up; the head is multiplied with.
    active = REASONING_NUMEL - 152064 * 3584
    compute = 6 * active * 2048 / (rates.utilization()[0] * rates.H100_FLOPS)
    assert found["compute of a step"].value == pytest.approx(compute)
    assert found["injection of a step"].value == pytest.approx(attention.seconds / 8)
    # AdamW in mixed precision under ZeRO: weights, gradients and states in float32.
    trained = MULTIMODAL_NUMEL - read_model(MULTIMODAL).by_kind()[VISION]
    stepping = (6 * 4 + 2 * 8) * trained / 8 / (12 * rates.BOTH.numel / rates.BOTH.seconds)
    assert found["optimizer of a step"].value == pytest.approx(stepping)
    whole = compute + stepping + attention.seconds / 8
    assert found["training"].value == pytest.approx(1500 * whole)
    tokens = found["tokens of a sample"]
    assert (tokens.value, tokens.origin) == (2048, "assumed")
    assert "--tokens" in tokens.source
    assert "launches" not in found["training"].source
    again = drift_fast.plan(
        REASONING, MULTIMODAL, steps=10, gradient_checkpointing=True, utilization=0.5, peak=1e12
    )
    assert again["compute of a step"].value == pytest.approx(8 * active * 2048 / 0.5e12)
    assert again["utilization"].origin == "given"


def test_an_optimizer_on_the_host_is_said_not_to_be_counted() -> None:
    pytest.importorskip("transformers")
    run: dict[str, Any] = {"steps": 10, "gpus": 2, "sharding": "zero2"}
    beside = drift_fast.plan(REASONING, MULTIMODAL, **run)["optimizer of a step"]
    away = drift_fast.plan(REASONING, MULTIMODAL, offload="optimizer", **run)["optimizer of a step"]
    assert beside.value > 0
    assert "injection_h100" in beside.source
    assert away.value == 0
    assert "not counted" in away.source


def test_what_does_not_fit_is_told_with_what_would() -> None:
    pytest.importorskip("transformers")
    found = drift_fast.plan(REASONING, MULTIMODAL, steps=375, gpu_memory="80GB")
    assert found.fits is False
    assert any("80.00 GB" in warning for warning in found.warnings)
    assert any("on 4 GPUs under zero2" in remedy for remedy in found.remedies)
    fitting = drift_fast.plan(
        REASONING, MULTIMODAL, steps=375, gpu_memory="80GB", gpus=4, sharding="zero2"
    )
    assert fitting.fits is True
    assert not fitting.remedies
    hopeless = drift_fast.plan(REASONING, MULTIMODAL, steps=375, gpu_memory="2GB")
    assert not hopeless.remedies
    assert "none of the changes tried makes the run fit, up to 64 GPUs" in hopeless.warnings[-1]


def test_models_that_seem_to_be_exchanged_are_warned_of(pair: Pair) -> None:
    run: dict[str, Any] = {"steps": 3, "gradient_checkpointing": True}
    (text,) = drift_fast.plan(pair.multimodal, pair.reasoning, **run).warnings
    assert "24 tensors of another modality, " in text
    assert "the two seem to be exchanged" in text
    assert not drift_fast.plan(pair.reasoning, pair.multimodal, **run).warnings


def test_steps_win_over_samples_and_epochs_with_a_warning_where_they_differ(pair: Pair) -> None:
    def planned(**run: Any) -> drift_fast.TrainingPlan:
        return drift_fast.plan(
            pair.reasoning, pair.multimodal, epochs=3.0, gradient_checkpointing=True, **run
        )

    found = planned(steps=10, samples=5000)
    assert found["optimizer steps"].value == 10
    (text,) = found.warnings
    assert "steps=10 wins over samples=5000 and epochs=3, which come to 15,000 steps" in text
    assert planned(samples=5000)["optimizer steps"].value == 15000
    assert not planned(steps=15, samples=5).warnings


@pytest.mark.parametrize("cap", [0.5, 0.9, {"attn": 2.0, "mlp": 0.5}])
def test_a_cap_that_is_not_above_the_target_is_refused_as_by_an_injection(
    pair: Pair, cap: Any
) -> None:
    both, target = (pair.reasoning, pair.multimodal), {"progress_target": 0.9}
    with refused(ValueError, "would stop targets before they reach progress_target=0.9"):
        drift_fast.plan(*both, steps=3, progress_cap=cap, **target)
    assert drift_fast.plan(*both, steps=3, progress_cap=1.0, **target).figures


def test_a_run_of_adapters_is_planned_throughout() -> None:
    options: dict[str, Any] = {"samples": 100, "gpu_memory": "80GB", "rms": 1e-3}
    whole = drift_fast.plan(REASONING, MULTIMODAL, **options)
    assert whole.fits is False
    assert any("with LoRA of rank 64" in remedy for remedy in whole.remedies)
    found = drift_fast.plan(REASONING, MULTIMODAL, lora_rank=64, **options)
    assert found.fits
    factors = 161_480_704
    assert found["one training checkpoint"].value == 12 * factors
    assert found["trained model"].value == 4 * factors
    active = found["operations of a step"].value
    assert active == pytest.approx((4 * 7.07e9 + 6 * factors) * 2048, rel=1e-3)
    assert active < whole["operations of a step"].value
    assert "multi_gpu_lora" in found["injection of a step"].source
    assert found["λ"].value is None
    assert "adapters" in found["λ"].source
    with pytest.raises(ValueError, match="nothing that LoRA trains"):
        drift_fast.plan(REASONING, MULTIMODAL, lora_rank=64, modules="norm", **options)
    norms = drift_fast.plan(REASONING, MULTIMODAL, modules="norm", **options)
    assert not any("LoRA of rank" in remedy for remedy in norms.remedies)
    hopeless = drift_fast.plan(
        REASONING, MULTIMODAL, lora_rank=64, **options | {"gpu_memory": "1GB"}
    )
    assert not any("LoRA of rank" in remedy for remedy in hopeless.remedies)


def test_progress_is_predicted_from_rms_and_cannot_be_known_without() -> None:
    pytest.importorskip("transformers")
    unknown = drift_fast.plan(REASONING, MULTIMODAL, steps=375)
    assert unknown["λ"].value is None
    assert "drift-fast delta" in unknown["λ"].source
    total = math.fsum(Training(steps=375).rates())
    bound = unknown["rms(Δ) for λ of at most 1"].value
    assert isinstance(bound, float)
    assert predict_progress(1.0, total, bound) == pytest.approx(1.0)
    for rms, word in ((1e-2, "less than 0.05"), (5e-5, "overshoot"), (1e-3, None)):
        found = drift_fast.plan(REASONING, MULTIMODAL, steps=375, rms=rms)
        assert found["λ"].value == pytest.approx(predict_progress(1.0, total, rms))
        assert found.warnings == [] if word is None else word in found.warnings[0]
    sgd = drift_fast.plan(REASONING, MULTIMODAL, steps=375, rms=1e-3, optimizer="sgd")
    assert sgd["λ"].value is None
    assert "AdamW" in sgd["λ"].source


def test_a_run_whose_updates_bfloat16_rounds_away_is_warned_of() -> None:
    pytest.importorskip("transformers")
    found = drift_fast.plan(REASONING, MULTIMODAL, steps=375, precision="bf16")
    (text,) = [warning for warning in found.warnings if "rounded away" in warning]
    for word in ("bf16-mixed", "dtype=torch.float32", "bf16=True", "ZeRO", "λ ends far below"):
        assert word in text


def test_a_pair_of_checkpoints_is_planned_from_headers_and_its_delta(
    tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    delta = drift_fast.compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta")
    arguments = ["plan", str(pair.reasoning), str(pair.multimodal), "--steps", "100"]
    arguments += ["--tokens", "900"]
    assert main([*arguments, "--delta", str(tmp_path / "delta"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    figures = {figure["name"]: figure for figure in found["figures"]}
    total = delta.stats.total
    rms = math.sqrt(total.delta_sq / total.numel)
    assert figures["rms(Δ)"]["value"] == pytest.approx(rms)
    assert figures["selected for Δ"]["value"] == total.numel
    assert figures["selected for Δ"]["origin"] == "headers"
    assert figures["tokens of a sample"]["value"] == 900
    assert figures["tokens of a sample"]["origin"] == "given"
    assert "launches" in figures["training"]["source"]
    assert figures["Δ on disk"]["value"] == 2 * total.numel
    assert {"λ of attn", "λ of mlp"} <= figures.keys()
    assert main([*arguments, "--rms", "0.001"]) == 0
    table = capsys.readouterr().out
    assert "measured: benches/results/delta-1.5B_2core_202611.md" in table
    assert main([*arguments, "--rms", "-1"]) == 2
    assert "rms must be" in capsys.readouterr().err


def test_checkpoints_on_a_server_are_planned_from_their_headers_alone(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("requests")
    monkeypatch.setenv("DRIFT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    names = {"reasoning": pair.reasoning, "multimodal": pair.multimodal}
    files = {
        f"/{name}/{file.name}": file
        for name, place in names.items()
        for file in (place if place.is_dir() else place.parent).iterdir()
        if file.is_file()
    }
    with RangeServer(files) as server:
        urls = [
            f"{server.url}/{name}" + ("" if place.is_dir() else f"/{place.name}")
            for name, place in names.items()
        ]
        found = drift_fast.plan(*urls, steps=10)
    here = drift_fast.plan(pair.reasoning, pair.multimodal, steps=10)
    assert found["selected for Δ"].origin == "headers"
    assert [figure.value for figure in found.figures] == [figure.value for figure in here.figures]


def test_a_schedule_a_cap_and_a_target_are_part_of_the_prediction() -> None:
    pytest.importorskip("transformers")

    def value(**given: Any) -> Any:
        found = drift_fast.plan(REASONING, MULTIMODAL, steps=375, rms=5e-5, **given)
        return found["λ"].value

    plain = value()
    assert plain > 1
    weaker = predict_progress(0.5, Training(steps=375).sum_of_rates(), 5e-5)
    assert value(schedule="constant(0.5)") == pytest.approx(weaker)
    assert value(progress_cap=0.5) == 0.5
    assert value(progress_cap=2 * plain) == plain
    assert value(progress_cap={"attn": 0.5}) is None
    assert value(progress_target=0.5) == 0.5
    assert value(progress_target={"attn": 0.5}) is None
    assert value(scale="gradnorm", alpha=0.5) == pytest.approx(plain)
    assert value(scale="absolute") is None
    # AdamW's momentum moves weights on after a window.
    rates = Training(steps=375).rates()
    window = value(schedule="window(0, 0.3)")
    assert window == pytest.approx(predict_progress(1.0, rates, 5e-5, schedule="window(0, 0.3)"))
    assert window > 1.05 * plain * sum(rates[:113]) / sum(rates)


def test_a_run_that_alpha_cannot_help_says_which_sum_of_rates_would() -> None:
    pytest.importorskip("transformers")
    found = drift_fast.plan(REASONING, MULTIMODAL, steps=375, rms=1e-2, alpha=8.0)
    (text,) = found.warnings
    most = found["λ at any α, below"].value
    assert isinstance(most, float)
    assert most == pytest.approx(0.8 * Training(steps=375).sum_of_rates() / 1e-2, rel=1e-3)
    assert f"a larger alpha reaches {most:.2g} at most" in text
    assert "times Σlr would reach 0.05" in text
    missed = drift_fast.plan(REASONING, MULTIMODAL, steps=375, rms=1e-2, progress_target=0.5)
    assert missed["λ"].value == missed["λ of a target, at most"].value
    (text,) = missed.warnings
    assert "progress_target=0.5 is out of reach" in text
    assert "times Σ learning rate would reach it" in text


def test_tensors_of_a_larger_delta_move_less_far_along_it(tmp_path: Path, pair: Pair) -> None:
    delta = drift_fast.compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta")
    run = {"steps": 100, "delta": tmp_path / "delta"}
    found = drift_fast.plan(pair.reasoning, pair.multimodal, **run)
    total = Training(steps=100).sum_of_rates()
    of_each = [
        predict_progress(1.0, total, math.sqrt(row.delta_sq / row.numel)) for row in delta.stats
    ]
    whole = sum(row.delta_sq for row in delta.stats)
    mean = sum(λ * row.delta_sq / whole for λ, row in zip(of_each, delta.stats, strict=True))
    assert found["λ"].value == pytest.approx(mean)


def test_a_run_of_any_length_is_summed_at_once() -> None:
    run = Training(steps=10**12, learning_rate=1e-6)
    assert run.sum_of_rates() == pytest.approx(1e-6 * 10**12 * (0.05 / 2 + 0.95 / 2))
    with refused(ValueError, "steps", "1,000,000,000,000"):
        Training(steps=10**13)


def test_without_a_limit_every_checkpoint_stays_and_zero2_writes_weights_twice(seven: Any) -> None:
    run = Training(steps=1500, save_steps=100)
    assert run.checkpoints == 2
    assert [run.changed(save_total_limit=limit).checkpoints for limit in (0, None, 3)] == [
        15,
        15,
        4,
    ]
    assert run.changed(save_strategy="no").checkpoints == 0
    total, trained = seven.numel(), seven.numel() - seven.by_kind()[VISION]
    for stage, weights in (("zero1", 4), ("zero2", 4), ("zero3", 2)):
        found = drift_fast.plan(REASONING, MULTIMODAL, steps=5, gpus=2, sharding=stage)
        assert found["one training checkpoint"].value == weights * total + 12 * trained


def test_zero2_reduces_gradients_of_every_micro_batch(seven: Any) -> None:
    trained = seven.numel() - seven.by_kind()[VISION]
    for stage, times in (("zero1", 2), ("zero2", 5)):
        found = drift_fast.plan(
            REASONING, MULTIMODAL, steps=5, gpus=2, sharding=stage, accumulation=4
        )
        assert found["moved between GPUs in a step"].value == times * 2 * trained


def test_hours_in_float32_are_not_silently_those_of_bfloat16() -> None:
    pytest.importorskip("transformers")
    given: dict[str, Any] = {"steps": 5, "precision": "fp32", "rms": 1e-5}
    found = drift_fast.plan(REASONING, MULTIMODAL, **given)
    assert any("bfloat16, but fp32" in warning for warning in found.warnings)
    found = drift_fast.plan(REASONING, MULTIMODAL, **given, peak=67e12, utilization=0.5)
    assert not any("bfloat16, and fp32" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "num_hidden_layers", 10**9),
        ("vision_config", "depth", 2001),
        ("vision_config", "spatial_merge_size", 65),
    ],
)
def test_sizes_of_an_untrusted_configuration_are_bounded(
    tmp_path: Path, section: str | None, key: str, value: int
) -> None:
    pytest.importorskip("transformers")
    content = json.loads((MULTIMODAL / "config.json").read_text())
    (content if section is None else content[section])[key] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(drift_fast.CheckpointError, match=rf"{key} must be"):
        drift_fast.plan(REASONING, tmp_path, steps=3)


def test_an_unknown_name_and_a_configuration_that_cannot_be_built_are_refused(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    with refused(TypeError, "stepz", "steps"):
        drift_fast.plan(REASONING, MULTIMODAL, stepz=3)
    (tmp_path / "config.json").write_text('{"model_type": "of the future"}')
    with refused(drift_fast.DriftError, "of the future", "headers"):
        drift_fast.plan(REASONING, tmp_path, steps=3)


def test_planning_from_headers_imports_no_torch(pair: Pair) -> None:
    code = (
        "import sys, drift_fast; "
        f"drift_fast.plan({str(pair.reasoning)!r}, {str(pair.multimodal)!r}, steps=3); "
        "assert 'torch' not in sys.modules"
    )
    python(code)
