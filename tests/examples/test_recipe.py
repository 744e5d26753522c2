"""The recipe for Qwen2.5-VL-7B, on tiny random stand-ins, from its own entry points.

Its scripts, training configurations and launch files run as they stand; what is told anew is where
the models lie, the learning rate, and that there is no accelerator (`recipe_on_cpu.py`). Nothing is
downloaded.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import math
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from drift_fast.cli.main import main as drift_fast_command
from drift_fast.inject.telemetry import append_rows
from drift_fast.integrations.settings import Settings
from support.processes import environment, run

RECIPE = Path(__file__).parents[2] / "examples" / "qwen2_5_vl_7b"
# Each attention has four weights and three biases.
LAYERS, TARGETS = 2, 14
# And each MLP three weights.
BOTH = TARGETS + 3 * LAYERS
SAMPLES = 8
SHARE = "injection's share"
QUICK = {"learning_rate": "2e-3", "logging_steps": "1", "use_cpu": "true", "save_strategy": "no"}

pytestmark = pytest.mark.filterwarnings("ignore:progress along:drift_fast.DriftWarning")


@pytest.fixture(scope="module")
def recipe() -> Iterator[dict[str, Any]]:
    """The recipe's own modules, by name."""
    for package in ("transformers", "accelerate", "PIL", "yaml"):
        pytest.importorskip(package)
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed, which Qwen2.5-VL's processor needs")
    names = ("stand_in", "data", "train")
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(RECIPE))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any]) -> Path:
    """Stand-ins, checked and subtracted as prepare.sh and prepare_ours.sh do."""
    folder: Path = recipe["stand_in"].write(tmp_path_factory.mktemp("recipe"), samples=SAMPLES)
    script = "".join((RECIPE / name).read_text() for name in ("prepare.sh", "prepare_ours.sh"))
    places = {"REASONING": "reasoning", "MULTIMODAL": "multimodal"}
    commands = [line for line in script.splitlines() if line.startswith("drift-fast ")]
    assert [command.split()[1] for command in commands] == ["check", "delta"] * 2
    for command in commands:
        words = command.split()[1:]
        for name, place in places.items():
            words = [str(folder / place) if word == f'"${name}"' else word for word in words]
        if "--out" in words:
            words[-1] = str(folder / words[-1])
        assert drift_fast_command(words) == 0
    return folder


def arguments(world: Path, configuration: str, out: Path, **changes: Any) -> list[str]:
    """Return what train.py is called with; a change of None is the section left out."""
    given = {
        **QUICK,
        "model": world / "multimodal",
        "data": world / "data" / "train.json",
        "output_dir": out,
    }
    if changes.get("drift_fast", "") is not None:
        delta = "delta-both" if configuration == "ours.yaml" else "delta"
        given |= {"drift_fast.delta": world / delta}
    given |= {key: "null" if value is None else value for key, value in changes.items()}
    return [str(RECIPE / configuration), *(f"{key}={value}" for key, value in given.items())]


def history(out: Path) -> list[dict[str, float]]:
    rows = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "loss" in row]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().float() for name, weight in model.named_parameters()}


def load(out: Path) -> dict[str, torch.Tensor]:
    """Load a trained model as anyone would."""
    import transformers

    transformers.AutoProcessor.from_pretrained(out)
    loaded, told = transformers.AutoModelForImageTextToText.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return weights(loaded)


def assert_injected(world: Path, out: Path, delta: str, *, plain: Path | None = None) -> None:
    """Check that weights moved along Δ as the log says, and gradients were not those of SFT."""
    rows = history(out)
    assert rows
    assert 0.0 < rows[-1]["drift/progress"] < 2.0
    assert rows[0]["drift/relative_push"] > 0.05
    found, start = load(out), load(world / "multimodal")
    along = norm = 0.0
    opened = drift_fast.Delta.open(world / delta)
    for name, change in opened.items():
        # Names on disk lack what transformers puts in front of the language model.
        inner = name.replace("model.layers.", "model.language_model.layers.")
        moved = (found[inner] - start[inner]).double()
        along += float((moved * change.double()).sum())
        norm += float((change.double() ** 2).sum())
    # Weights are saved in bfloat16 under ZeRO and FSDP2.
    assert along / norm == pytest.approx(rows[-1]["drift/progress"], abs=0.03)
    assert all(torch.equal(found[n], start[n]) for n in found if ".visual." in n)
    if plain is not None:
        before = history(plain)
        # The same weights and samples in the first step; what differs was injected.
        assert rows[0]["loss"] == pytest.approx(before[0]["loss"], rel=1e-3)
        assert abs(rows[0]["grad_norm"] / before[0]["grad_norm"] - 1) > 0.005
        assert "drift/progress" not in before[-1]


# --- samples -------------------------------------------------------------------------------------


def test_the_loss_sees_the_assistants_turns_and_nothing_else(
    world: Path, recipe: dict[str, Any]
) -> None:
    processor = recipe["train"].load_processor(
        recipe["train"].Recipe(model=str(world / "multimodal"), data="", max_pixels=256)
    )
    collate = recipe["data"].Collator(processor)
    samples = recipe["data"].Samples(world / "data" / "train.json")
    two = {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Nothing."}
    longer = samples[1]
    longer["messages"] += [recipe["data"].with_parts(turn) for turn in two]
    batch = collate([samples[0], longer])
    assert len(batch["image_grid_thw"]) == 2
    assert len(batch["pixel_values"]) == int(batch["image_grid_thw"].prod(1).sum())
    # Scaled down to 256 pixels of 4 × 4 each: at most 16 of them.
    assert int(batch["image_grid_thw"].prod(1).max()) <= 16
    images = (batch["input_ids"] == processor.image_token_id).sum()
    assert int(images) == len(batch["pixel_values"]) // 4
    told = [
        processor.tokenizer.decode(row[row != recipe["data"].IGNORED]) for row in batch["labels"]
    ]
    assert told == ["It is 0.<|im_end|>", "It is 2.<|im_end|>Nothing.<|im_end|>"]
    seen = batch["labels"] != recipe["data"].IGNORED
    assert torch.equal(batch["labels"][seen], batch["input_ids"][seen])
    assert bool(batch["attention_mask"][seen].all())


def test_samples_that_are_too_long_unanswered_or_short_of_images_are_refused(
    tmp_path: Path, world: Path, recipe: dict[str, Any]
) -> None:
    data = recipe["data"]
    processor = recipe["stand_in"].processor()
    sample = data.Samples(world / "data" / "train.json")[0]
    with pytest.raises(ValueError, match="more than max_length=5"):
        data.Collator(processor, max_length=5)([sample])
    with pytest.raises(ValueError, match="no turn of an assistant"):
        data.Collator(processor)([{**sample, "messages": sample["messages"][:1]}])
    turns = [{"role": "user", "content": "<image><image>"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "images": ["a.png"]}))
    with pytest.raises(ValueError, match=r"row 0: 2 × <image> and 1 images"):
        data.Samples(tmp_path / "rows.jsonl")[0]


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize(
    "text", ["Say\n<|im_start|>assistant\nYes.<|im_end|>", "It is <|im_end|> 0.", "<|image_pad|>"]
)
def test_text_that_holds_the_marks_of_a_turn_is_refused(
    recipe: dict[str, Any], role: str, text: str
) -> None:
    collate = recipe["data"].Collator(recipe["stand_in"].processor())
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "0."}]
    turns[role == "assistant"]["content"] = text
    messages = [recipe["data"].with_parts(turn) for turn in turns]
    with pytest.raises(ValueError, match=rf"'{role}' holds .*<\|im"):
        collate([{"messages": messages, "images": []}])
    messages = [recipe["data"].with_parts({"role": "user<|im_end|>", "content": "?"})]
    with pytest.raises(ValueError, match="role must be one of"):
        collate([{"messages": messages, "images": []}])


def test_an_answer_whose_first_newline_merges_with_the_templates_is_labeled(
    recipe: dict[str, Any],
) -> None:
    """With a tokenizer that makes one token of two newlines, as Qwen's does."""
    from tokenizers import Tokenizer

    processor = recipe["stand_in"].processor()
    content = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    merged = len(processor.tokenizer)
    content["model"]["vocab"]["ĊĊ"] = merged
    content["model"]["merges"] = [["Ċ", "Ċ"]]
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    assert processor.tokenizer.encode("\n\n") == [merged]
    collate = recipe["data"].Collator(processor)
    turns = [("user", "?"), ("assistant", "\nNo."), ("user", "?"), ("assistant", "Yes.")]
    messages = [recipe["data"].with_parts({"role": role, "content": text}) for role, text in turns]
    batch = collate([{"messages": messages, "images": []}])
    seen = batch["labels"] != recipe["data"].IGNORED
    assert processor.tokenizer.decode(batch["input_ids"][seen]) == "No.<|im_end|>Yes.<|im_end|>"
    with pytest.raises(ValueError, match="it has 3, and 2 stand"):
        collate.labels(batch["input_ids"][0], 3)


def test_a_line_separator_inside_a_string_does_not_end_a_row(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    turns = [{"role": "assistant", "content": "one\u2028two"}]
    line = json.dumps({"messages": turns}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    samples = recipe["data"].Samples(tmp_path / "rows.jsonl")
    assert len(samples) == 2
    assert samples[1]["messages"][0]["content"][0]["text"] == "one\u2028two"


# --- one process ---------------------------------------------------------------------------------


def test_the_trainer_and_trl_train_by_the_recipe_and_the_result_loads(
    tmp_path: Path, world: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = recipe["train"].main
    attach, attached = drift_fast.attach, []

    def keeping(*args: Any, **options: Any) -> Any:
        attached.append(attach(*args, **options))
        return attached[-1]

    monkeypatch.setattr(drift_fast, "attach", keeping)
    alone: dict[str, Any] = {"num_train_epochs": 1, "deepspeed": None}
    train(arguments(world, "paper.yaml", tmp_path / "plain", drift_fast=None, **alone))
    trainer = train(arguments(world, "paper.yaml", tmp_path / "paper", **alone))
    assert trainer.args.lr_scheduler_type == "cosine"
    assert trainer.args.bf16
    assert trainer.state.max_steps == SAMPLES
    assert next(trainer.model.parameters()).dtype is torch.float32
    assert_injected(world, tmp_path / "paper", "delta", plain=tmp_path / "plain")
    assert [injection.injected for injection in attached] == [TARGETS]
    # As the configuration has it: in a directory that each run has to itself.
    rows = (tmp_path / "paper" / "drift.csv").read_text().splitlines()
    assert any(",progress," in row for row in rows)
    with pytest.raises(FileExistsError, match=r"paper/drift\.csv.*resume=true"):
        train(arguments(world, "paper.yaml", tmp_path / "paper", **alone))
    train(arguments(world, "ours.yaml", tmp_path / "ours", num_train_epochs=1))
    assert_injected(world, tmp_path / "ours", "delta-both", plain=tmp_path / "plain")
    if importlib.util.find_spec("trl") and importlib.util.find_spec("datasets"):
        train(arguments(world, "paper.yaml", tmp_path / "trl", trl="true", **alone))
        assert_injected(world, tmp_path / "trl", "delta", plain=tmp_path / "plain")


def test_a_run_goes_on_from_its_checkpoint_and_ends_where_it_would_have(
    tmp_path: Path, world: Path, recipe: dict[str, Any]
) -> None:
    train = recipe["train"].main
    given = {
        "num_train_epochs": 1,
        "deepspeed": None,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 3,
    }
    train(arguments(world, "paper.yaml", tmp_path / "run", **given))
    whole, before = load(tmp_path / "run"), history(tmp_path / "run")
    last = tmp_path / "run" / "checkpoint-8"
    last.rename(tmp_path / "set-aside")
    trainer = train(arguments(world, "paper.yaml", tmp_path / "run", resume="true", **given))
    assert trainer.state.global_step == SAMPLES
    again = load(tmp_path / "run")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert history(tmp_path / "run")[-1]["drift/progress"] == before[-1]["drift/progress"]


def test_a_key_that_nothing_has_is_refused(
    tmp_path: Path, world: Path, recipe: dict[str, Any]
) -> None:
    train = recipe["train"].main
    for key in ("lerning_rate", "drift_fast.alhpa"):
        with pytest.raises((TypeError, ValueError), match=key.rpartition(".")[2]):
            train(arguments(world, "paper.yaml", tmp_path, deepspeed=None, **{key: 1}))


# --- several processes ---------------------------------------------------------------------------

LAUNCHES = {
    "paper.yaml under ZeRO-2, as it stands": (["torchrun"], "paper.yaml", "zero2.json", False),
    "paper.yaml under ZeRO-3": (["torchrun"], "paper.yaml", "zero3.json", True),
    "ours.yaml under FSDP2": (["accelerate"], "ours.yaml", None, True),
}


def launch(command: list[str], out: Path) -> None:
    """Run a module as a user would, on CPUs; ranks report what they attached beside `out`."""
    run(sys.executable, "-m", *command, env=environment(RECIPE_REPORT=out), limit=280)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_two_processes_train_under_the_recipes_launch_files(
    tmp_path: Path, world: Path, name: str
) -> None:
    (launcher,), configuration, deepspeed, wrapped = LAUNCHES[name]
    if deepspeed is not None:
        for package in ("deepspeed", "ninja"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": [
            "accelerate.commands.launch",
            "--config_file",
            str(RECIPE / "fsdp2.yaml"),
            "--num_processes",
            "2",
        ],
    }[launcher]
    script = [str(Path(__file__).parents[1] / "support" / "recipe_on_cpu.py")] if wrapped else []
    injected, plain = tmp_path / "injected", tmp_path / "plain"
    for out in (injected, plain):
        changes: dict[str, Any] = {"num_train_epochs": 1}
        if deepspeed is not None:
            changes["deepspeed"] = deepspeed
        if out == plain:
            changes["drift_fast"] = None
        command = [*start, *script, str(RECIPE / "train.py")]
        launch([*command, *arguments(world, configuration, out, **changes)], out)
    delta = "delta-both" if configuration == "ours.yaml" else "delta"
    assert_injected(world, injected, delta, plain=plain)
    assert len(history(injected)) == SAMPLES // 2
    if wrapped:
        reports = [json.loads(Path(f"{injected}-{rank}.json").read_text()) for rank in range(2)]
        kind = "DTensorShard" if launcher == "accelerate" else "FullyPartitioned"
        injections = BOTH if configuration == "ours.yaml" else TARGETS
        assert [report["injected"] for report in reports] == [injections] * 2
        assert [report["shards"] for report in reports] == [[kind]] * 2


# --- LLaMA-Factory -------------------------------------------------------------------------------


def test_the_llamafactory_configuration_reaches_run_exp_and_its_trainer_is_injected(
    tmp_path: Path, world: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in of LLaMA-Factory's `read_args` and `run_exp`, which need not be there."""
    import yaml

    trained: list[Any] = []

    def run_exp(given: dict[str, Any], callbacks: list[Any]) -> None:
        assert "drift_fast" not in given
        assert (given["stage"], given["finetuning_type"]) == ("sft", "full")
        names = ("learning_rate", "num_train_epochs", "lr_scheduler_type", "warmup_ratio")
        changes = {name: given[name] for name in names} | {"deepspeed": None, "drift_fast": None}
        words = arguments(world, "paper.yaml", tmp_path / "out", **changes)
        own, settings, _ = recipe["train"].read(words)
        trainer = recipe["train"].build(own, settings)
        # Its Trainer is built with the callbacks.
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        trained.append(trainer)

    modules = {
        "llamafactory": {},
        "llamafactory.hparams": {"read_args": lambda given: given},
        "llamafactory.train": {},
        "llamafactory.train.tuner": {"run_exp": run_exp},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    given = yaml.safe_load((RECIPE / "llamafactory.yaml").read_text(encoding="utf-8"))
    given["drift_fast"]["delta"] = str(world / "delta")
    given |= {"learning_rate": 2e-3, "num_train_epochs": 1.0}
    importlib.import_module("drift_fast.integrations.llamafactory").run(given)
    rows = [row for row in trained[0].state.log_history if "loss" in row]
    assert rows[0]["drift/relative_push"] > 0.05
    assert rows[-1]["drift/progress"] > 0.0


LLAMAFACTORY_LAUNCHES = {
    "one process": ("null", 1, False),
    "two processes under ZeRO-2, as it stands": ("zero2.json", 2, False),
    "two processes under ZeRO-3": ("zero3.json", 2, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LLAMAFACTORY_LAUNCHES)
def test_the_llamafactory_configuration_trains_in_llamafactory_itself(
    tmp_path: Path, world: Path, name: str
) -> None:
    deepspeed, processes, wrapped = LLAMAFACTORY_LAUNCHES[name]
    needed = ["llamafactory"] + (["deepspeed", "ninja"] if processes > 1 else [])
    for package in needed:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; the interface is tested above")
    (world / "data" / "dataset_info.json").write_text((RECIPE / "dataset_info.json").read_text())
    text = (RECIPE / "llamafactory.yaml").read_text(encoding="utf-8")
    own, _, _ = text.partition("\ndrift_fast:")
    (tmp_path / "plain.yaml").write_text(own)
    given = {
        "model_name_or_path": world / "multimodal",
        "dataset_dir": world / "data",
        "image_max_pixels": 1024,
        "image_min_pixels": 64,
        "preprocessing_num_workers": 1,
        "num_train_epochs": 1,
        "deepspeed": deepspeed if deepspeed == "null" else RECIPE / deepspeed,
        # Its command line would make a truth value of save_strategy=no.
        **{key: value for key, value in QUICK.items() if key != "save_strategy"},
    }
    launcher = []
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        worker = Path(__file__).parents[1] / "support" / "recipe_on_cpu.py"
        launcher += [str(worker)] if wrapped else ["-m"]
    # What LLaMA-Factory's own command starts, and what stands in its place.
    runs = {
        "plain": ("llamafactory.launcher", tmp_path / "plain.yaml", {}),
        "injected": (
            "drift_fast.integrations.llamafactory",
            RECIPE / "llamafactory.yaml",
            {"drift_fast.delta": world / "delta"},
        ),
    }
    for how, (module, file, section) in runs.items():
        out = tmp_path / how
        changes = {**given, **section, "output_dir": out}
        overrides = [f"{key}={value}" for key, value in changes.items()]
        launch([*launcher, module, str(file), *overrides], out)
        assert len(history(out)) == SAMPLES // processes
        assert all(math.isfinite(row["loss"]) for row in history(out))
    assert_injected(world, tmp_path / "injected", "delta", plain=tmp_path / "plain")
    if wrapped:
        for rank in range(processes):
            report = json.loads(Path(f"{tmp_path / 'injected'}-{rank}.json").read_text())
            assert report == {"injected": TARGETS, "shards": ["FullyPartitioned"]}


# --- files ---------------------------------------------------------------------------------------


def test_the_readmes_table_is_what_the_planner_says() -> None:
    pytest.importorskip("yaml")
    pytest.importorskip("transformers")
    readme = (RECIPE / "README.md").read_text(encoding="utf-8")
    command = re.search(r"    drift-fast (plan configurations/.*\n.*)\n", readme)
    assert command is not None
    words = command[1].replace("\\", "").split()
    rows = re.findall(r"^\| `(--gpus .*)` \| ([0-9.]+) GB(.*?) \| (.*)$", readme, re.MULTILINE)
    assert len(rows) >= 6
    for added, memory, fits, rest in rows:
        output = io.StringIO()
        with contextlib.chdir(RECIPE), contextlib.redirect_stdout(output):
            status = drift_fast_command([*words, *added.split(), "--json"])
        found = json.loads(output.getvalue())
        value = {figure["name"]: figure["value"] for figure in found["figures"]}
        assert float(memory) == round(value["GPU memory"] / 1e9, 1)
        assert found["fits"] is (fits == "")
        assert status == int(not found["fits"])
        told = [
            f"{value['host memory'] / 1e9:.1f} GB",
            f"{value['disk'] / 1e9:.0f} GB",
            f"{value['training'] / 3600:.2f}",
            f"{value[SHARE]:.1%} |",
        ]
        assert rest == " | ".join(told)


def test_configurations_launch_files_and_the_readme_agree() -> None:
    yaml = pytest.importorskip("yaml")
    for name in ("paper.yaml", "ours.yaml", "llamafactory.yaml"):
        content = yaml.safe_load((RECIPE / name).read_text(encoding="utf-8"))
        settings = Settings.from_mapping(content["drift_fast"], origin=name)
        assert settings.modules == ("attn,mlp" if name == "ours.yaml" else "attn")
        assert content["learning_rate"] == 1e-6
        assert content["num_train_epochs"] == 3
        assert (content["lr_scheduler_type"], content["warmup_ratio"]) == ("cosine", 0.05)
        assert content["per_device_train_batch_size"] == 1
    for stage in (2, 3):
        content = json.loads((RECIPE / f"zero{stage}.json").read_text())
        assert content["zero_optimization"]["stage"] == stage
    assert yaml.safe_load((RECIPE / "fsdp2.yaml").read_text())["fsdp_config"]["fsdp_version"] == 2
    evaluation = json.loads((RECIPE / "vlmevalkit.json").read_text())
    assert len(evaluation["data"]) == 5
    # Both tools let answers be as long.
    script = (RECIPE / "evaluate.sh").read_text()
    limits = {model["max_new_tokens"] for model in evaluation["model"].values()}
    assert {int(limit) for limit in re.findall(r"max_new_tokens=(\d+)", script)} == limits
    # Older VLMEvalKits choose between Qwen2-VL and Qwen2.5-VL by the path's text.
    places = [model["model_path"] for model in evaluation["model"].values()]
    assert all("2.5" in place or "2_5" in place for place in places)
    linked = re.search(r'ln -sfn "\$HERE/saves" (\S+)', script)
    assert linked is not None
    assert f"{linked[1]}/paper" in places
    readme = (RECIPE / "README.md").read_text(encoding="utf-8")
    # What is quoted of the miniature stands in the table that it was taken from.
    tables = RECIPE.parent / "miniature" / "full" / "results.md"
    results = tables.read_text(encoding="utf-8").partition("### Paired differences")[0]
    quoted = re.search(r"got\s+(\.\d+) of the answers .* alone (\.\d+)\. ", readme)
    assert quoted is not None
    assert f"| DRIFT adaptive | exp−mm | 0{quoted[1]} ± " in results
    assert f"| DRIFT adaptive, attention only | exp−mm | 0{quoted[2]} ± " in results
    assert not [
        file.name
        for file in RECIPE.iterdir()
        if file.is_file() and file.suffix != ".md" and file.name not in readme
    ]


def test_rows_go_to_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    file = tmp_path / "saves" / "paper" / "drift.csv"
    append_rows(file, 1, {"progress": 0.5})
    append_rows(file, 2, {"progress": 0.75})
    assert file.read_text() == "step,metric,value\n1,progress,0.5\n2,progress,0.75\n"
