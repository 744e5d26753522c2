"""The planner: counts against transformers' own classes, rates against their results files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import drift_fast
from drift_fast.cli.main import main
from drift_fast.inject.predict import predict_progress
from drift_fast.planner import rates
from drift_fast.planner.configuration import Configuration
from drift_fast.planner.counts import VISION, read_model
from drift_fast.planner.memory import estimate, layer_nbytes_per_token
from drift_fast.planner.training import Training
from support.range_server import RangeServer
from support.synthetic import Pair, refused

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "qwen2_5_vl_7b"
REASONING, MULTIMODAL = RECIPE / "configurations/reasoning", RECIPE / "configurations/multimodal"
# As the models' own cards state them.
REASONING_NUMEL, MULTIMODAL_NUMEL = 7_615_616_512, 8_292_166_656

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VISION_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}


def configurations() -> dict[str, tuple[str, Any]]:
    import transformers as t

    qwen_vision = {"depth": 2, "num_heads": 4, "patch_size": 4, "window_size": 8}
    return {
        "Llama": ("LlamaForCausalLM", t.LlamaConfig(**TEXT)),
        "Qwen2, tied": ("Qwen2ForCausalLM", t.Qwen2Config(**TEXT, tie_word_embeddings=True)),
        "Qwen3-MoE": (
            "Qwen3MoeForCausalLM",
            t.Qwen3MoeConfig(
                **TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
            ),
        ),
        "LLaVA": (
            "LlavaForConditionalGeneration",
            t.LlavaConfig(
                text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**VISION_SIZES)
            ),
        ),
        "Qwen2-VL": (
            "Qwen2VLForConditionalGeneration",
            t.Qwen2VLConfig(
                text_config={**TEXT, **MROPE},
                vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
            ),
        ),
        "Qwen2.5-VL": (
            "Qwen2_5_VLForConditionalGeneration",
            t.Qwen2_5_VLConfig(
                text_config={**TEXT, **MROPE},
                vision_config={
                    **qwen_vision,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "out_hidden_size": 32,
                },
            ),
        ),
    }


NAMES = ("Llama", "Qwen2, tied", "Qwen3-MoE", "LLaVA", "Qwen2-VL", "Qwen2.5-VL")


@pytest.mark.parametrize("name", NAMES)
def test_headers_and_a_lone_configuration_count_what_the_class_has(
    tmp_path: Path, name: str
) -> None:
    transformers = pytest.importorskip("transformers")
    architecture, configuration = configurations()[name]
    model = getattr(transformers, architecture)(configuration)
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "alone").mkdir()
    text = (tmp_path / "whole" / "config.json").read_text()
    (tmp_path / "alone" / "config.json").write_text(text)
    expected = sum(parameter.numel() for parameter in model.parameters())
    whole, alone = read_model(tmp_path / "whole"), read_model(tmp_path / "alone" / "config.json")
    assert (whole.origin, alone.origin) == ("headers", "configuration")
    assert whole.numel() == alone.numel() == expected
    assert whole.by_kind() == alone.by_kind()
    assert whole.layer_numel() == alone.layer_numel() > 0
    assert whole.active_numel() == alone.active_numel()
    assert (whole.by_kind()[VISION] > 0) == ("V" in name)
    assert whole.by_kind()["attn"] > 0
    assert whole.by_kind()["mlp"] > 0


def test_the_7b_pair_has_the_sizes_that_its_cards_state() -> None:
    pytest.importorskip("transformers")
    assert read_model(REASONING).numel() == REASONING_NUMEL
    multimodal = read_model(MULTIMODAL)
    assert multimodal.numel() == MULTIMODAL_NUMEL
    kinds = multimodal.by_kind()
    assert kinds["attn"] + kinds["mlp"] == rates.BOTH.numel
    assert kinds["attn"] == rates.ATTENTION.numel


def test_a_token_goes_through_chosen_experts_only_and_looks_its_embedding_up(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    _, configuration = configurations()["Qwen3-MoE"]
    configuration.architectures = ["Qwen3MoeForCausalLM"]
    configuration.save_pretrained(tmp_path)
    model = read_model(tmp_path)
    expert = 3 * 32 * 16
    assert model.active_numel() == model.numel() - 96 * 32 - 3 * 2 * expert


# --- rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", rates.EVERY, ids=lambda rate: rate.row)
def test_every_rate_stands_in_the_results_file_that_it_names(rate: rates.Measured) -> None:
    text = (ROOT / rate.file).read_text(encoding="utf-8")
    section = text.split(f"## {rate.section}\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    (row,) = [row for row in rows if row[0] == rate.row]
    if isinstance(rate, rates.Streaming):
        column = next(row for row in rows if "GB/s" in row).index("GB/s")
        found: tuple[float, ...] = (float(row[column]),)
    else:
        found = tuple(float(re.split(r"[ (]", cell)[0]) for cell in row[1:3])
    assert found == rate.cells


def test_the_results_file_names_the_size_that_injections_are_scaled_from() -> None:
    text = (ROOT / rates.BOTH.file).read_text(encoding="utf-8")
    assert f"{2 * rates.BOTH.numel / 1e9:.2f} GB of Δ in bfloat16" in text
    assert "2048\ntokens" in text
    assert 0.3 < rates.utilisation()[0] < 0.6


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 0.05, 7])
def test_learning_rates_are_those_of_transformers(scheduler: str, warmup: float) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    run = Training(steps=50, scheduler=scheduler, warmup=warmup, learning_rate=2e-3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    steps = math.ceil(50 * warmup) if warmup < 1 else int(warmup)
    schedule = transformers.get_scheduler(
        scheduler, optimizer, num_warmup_steps=steps, num_training_steps=50
    )
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert run.rates() == pytest.approx(expected)
    assert run.sum_of_rates() == pytest.approx(math.fsum(expected))


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"samples": 4000, "epochs": 3.0, "gpus": 8, "sharding": "zero2"}, 1500),
        ({"samples": 10, "batch": 4}, 3),
        ({"samples": 10, "batch": 2, "accumulation": 2, "epochs": 2}, 6),
        ({"steps": 7, "samples": 4000}, 7),
    ],
)
def test_steps_are_counted_as_the_trainer_does(given: dict[str, Any], steps: int) -> None:
    assert Training(**given).optimizer_steps == steps


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ["steps", "samples"]),
        ({"steps": 0}, ["steps", "from 1", "0"]),
        ({"steps": 1, "sharding": "zero4"}, ["sharding", "zero3", "zero4"]),
        ({"steps": 1, "gpus": 2}, ["2 GPUs", "none", "fsdp2"]),
        ({"steps": 1, "offload": "optimizer"}, ["offload", "none"]),
        ({"steps": 1, "sharding": "zero2", "precision": "bf16"}, ["float32 copies"]),
        ({"steps": 1, "image_tokens": 9, "tokens": 8}, ["image_tokens", "9", "8"]),
        ({"steps": 1, "max_tokens": 9}, ["max_tokens", "9", "2048"]),
        ({"steps": 1, "learning_rate": math.nan}, ["learning_rate", "nan"]),
    ],
)
def test_a_run_without_meaning_is_refused(given: dict[str, Any], words: list[str]) -> None:
    with refused(ValueError, *words):
        Training(**given)


# --- memory --------------------------------------------------------------------------------------


def test_activations_are_what_backward_keeps_of_a_real_layer() -> None:
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
        model = transformers.Qwen2ForCausalLM(configuration).to(torch.bfloat16)
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        seen: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Any, seen: Any = seen, weights: Any = weights) -> Any:
            if tensor.data_ptr() not in weights:
                storage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ids = torch.randint(0, 96, (1, tokens))
            loss = model(input_ids=ids, labels=ids).loss
        kept[layers] = [sum(storage.nbytes() for storage in seen.values()), float(loss.detach())]
    of_layer = (kept[3][0] - kept[1][0]) / 2 / tokens

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

    found = layer_nbytes_per_token(Sizes(), 2)  # type: ignore[arg-type]
    assert found is not None
    assert of_layer == pytest.approx(found[0], rel=0.1)


def part(memory: Any, name: str) -> float:
    return float(sum(one.nbytes for one in memory.device if one.name == name))


@pytest.fixture(scope="module")
def seven() -> Any:
    pytest.importorskip("transformers")
    return read_model(MULTIMODAL)


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


# --- plans ---------------------------------------------------------------------------------------


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
    compute = 6 * active * 2048 / (rates.utilisation()[0] * rates.H100_FLOPS)
    assert found["compute of a step"].value == pytest.approx(compute)
    assert found["injection of a step"].value == pytest.approx(attention.seconds / 8)
    assert found["training"].value == pytest.approx(1500 * (compute + attention.seconds / 8))
    again = drift_fast.plan(
        REASONING, MULTIMODAL, steps=10, gradient_checkpointing=True, utilisation=0.5, peak=1e12
    )
    assert again["compute of a step"].value == pytest.approx(8 * active * 2048 / 0.5e12)
    assert again["utilisation"].origin == "given"


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
    assert "in none of the ways" in hopeless.remedies[0]


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
    assert any("rounds most updates" in warning for warning in found.warnings)


def test_a_pair_of_checkpoints_is_planned_from_headers_and_its_delta(
    tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    delta = drift_fast.compute_delta(pair.reasoning, pair.multimodal, tmp_path / "delta")
    arguments = ["plan", str(pair.reasoning), str(pair.multimodal), "--steps", "100"]
    assert main([*arguments, "--delta", str(tmp_path / "delta"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    figures = {figure["name"]: figure for figure in found["figures"]}
    total = delta.stats.total
    rms = math.sqrt(total.delta_sq / total.numel)
    assert figures["rms(Δ)"]["value"] == pytest.approx(rms)
    assert figures["selected for Δ"]["value"] == total.numel
    assert figures["selected for Δ"]["origin"] == "headers"
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


# --- configurations ------------------------------------------------------------------------------


def test_configurations_of_the_trainer_and_of_llamafactory_say_the_same() -> None:
    pytest.importorskip("yaml")
    pytest.importorskip("transformers")
    plans = [
        drift_fast.plan(
            REASONING, MULTIMODAL, config=RECIPE / name, samples=4000, gpus=8, gpu_memory="80GB"
        )
        for name in ("paper.yaml", "llamafactory.yaml")
    ]
    assert plans[0].figures == plans[1].figures
    assert plans[0]["optimizer steps"].value == 1500
    assert plans[0].fits
    assert "report_to" in plans[0].unused


def test_a_configuration_is_read_by_any_of_its_names_and_flags_take_precedence(
    tmp_path: Path,
) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "zero.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}'
    )
    (tmp_path / "run.yaml").write_text(
        "learning_rate: 2e-5\nmax_steps: 20\nwarmup_ratio: 0.1\noptim: adamw_bnb_8bit\n"
        "deepspeed: zero.json\nbf16: true\ngpus: 4\nfreeze_vision_tower: false\nseed: 1\n"
        "drift_fast: {delta: delta, modules: [attn, norm], alpha: 0.5, residency: host}\n"
    )
    found = Configuration.read(tmp_path / "run.yaml")
    run = Training(**found.numbers)
    assert (run.learning_rate, run.steps, run.warmup, run.gpus) == (2e-5, 20, 0.1, 4)
    assert (run.sharding, run.offload, run.optimizer) == ("zero3", "all", "adamw8bit")
    assert (run.trained, run.precision) == ("all", "bf16-mixed")
    assert (run.modules, run.alpha, run.residency) == (("attn", "norm"), 0.5, "host")
    assert found.unused == ["seed"]
    assert found.delta == tmp_path / "delta"
    found = drift_fast.plan(REASONING, MULTIMODAL, config=tmp_path / "run.yaml", steps=30)
    assert found["optimizer steps"].value == 30


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", ["mapping"]),
        ("learning_rate: fast\n", ["learning_rate", "fast"]),
        ("max_steps: 5\noptim: lion\n", ["optimizer", "lion"]),
        ("max_steps: 5\ndeepspeed: wrong.json\n", ["stage", "None"]),
        ("max_steps: 5\ndeepspeed: [1]\n", ["run.yaml", "deepspeed", "[1]"]),
        (
            "deepspeed: {zero_optimization: {stage: 2}, fp16: {enabled: true}}\n",
            ["run.yaml: deepspeed", "fp16"],
        ),
        ('max_steps: "100"\n', ["run.yaml", "max_steps", "'100'"]),
        ("max_steps: 5\noptim: [a]\n", ["run.yaml", "optim", "['a']"]),
        ("max_steps: 5\nbatch: true\n", ["run.yaml", "batch", "True"]),
        ("max_steps: 5\nfreeze_vision: 1\n", ["run.yaml", "freeze_vision", "1"]),
        ("max_samples: 5\nnum_train_epochs: 0\n", ["epochs", "0"]),
        ("max_steps: 5\nfinetuning_type: lora\n", ["finetuning_type", "lora", "all weights"]),
        ("max_steps: 5\nload_in_4bit: true\n", ["load_in_4bit", "all weights"]),
        ("max_steps: 5\nfp16: true\n", ["fp16", "all weights"]),
        ("max_steps: 5\ndrift_fast: {schedule: sideways}\n", ["sideways"]),
        ("max_steps: 5\ndrift_fast: {progress_cap: 0}\n", ["progress_cap", "0"]),
        ("max_steps: 5\ndrift_fast: {modules: [1]}\n", ["modules", "1"]),
    ],
)
def test_a_configuration_without_meaning_is_refused(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "wrong.json").write_text("{}")
    (tmp_path / "run.yaml").write_text(text)
    with refused(ValueError, *words):
        Training(**Configuration.read(tmp_path / "run.yaml").numbers)


def read(folder: Path, text: str) -> tuple[Training, list[str]]:
    (folder / "run.yaml").write_text(f"max_steps: 5\n{text}")
    found = Configuration.read(folder / "run.yaml")
    return Training(**found.numbers), found.unused


def test_keys_that_change_the_figures_are_used_in_any_order_or_listed(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    keys = ["freeze_vision_tower: false", "freeze_multi_modal_projector: true"]
    for order in (keys, keys[::-1], ["freeze_vision: false"]):
        assert read(tmp_path, "\n".join(order))[0].trained == "all"
    assert read(tmp_path, "freeze_vision: true")[0].trained == "language"
    for text in ("warmup_ratio: 0.1\nwarmup_steps: 0", "warmup_steps: 0\nwarmup_ratio: 0.1"):
        assert read(tmp_path, text)[0].warmup == 0.1
    assert read(tmp_path, "warmup_steps: 3\nwarmup_ratio: 0.1")[0].warmup == 3
    assert read(tmp_path, "warmup_steps: 0")[0].warmup == 0
    inline = "deepspeed: {zero_optimization: {stage: 2}}"
    assert read(tmp_path, inline)[0].sharding == "zero2"
    run, unused = read(
        tmp_path, "drift_fast: {delta: d, schedule: linear, progress_cap: 0.5, csv: x}"
    )
    assert (run.schedule, run.progress_cap) == ("linear", 0.5)
    assert unused == ["drift_fast.csv"]


def test_a_schedule_a_cap_and_a_target_are_part_of_the_prediction() -> None:
    pytest.importorskip("transformers")

    def value(**given: Any) -> Any:
        found = drift_fast.plan(REASONING, MULTIMODAL, steps=375, rms=5e-5, **given)
        return found["λ"].value

    plain = value()
    assert plain > 1
    assert value(schedule="constant(0.5)") == pytest.approx(plain / 2)
    assert value(progress_cap=0.5) == 0.5
    assert value(progress_cap=2 * plain) == plain
    assert value(progress_cap={"attn": 0.5}) is None
    assert value(progress_target=0.5) is None


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
    assert any("bfloat16, and fp32" in warning for warning in found.warnings)
    found = drift_fast.plan(REASONING, MULTIMODAL, **given, peak=67e12, utilisation=0.5)
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
    import subprocess
    import sys

    code = (
        "import sys, drift_fast; "
        f"drift_fast.plan({str(pair.reasoning)!r}, {str(pair.multimodal)!r}, steps=3); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
