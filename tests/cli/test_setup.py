"""`drift-fast setup`: what it prints fits the pair, and the examples are what it prints."""

from __future__ import annotations

import ast
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from drift_fast.alignment.options import SelectionOptions
from drift_fast.cli.setup import STACKS, TUNINGS, render, values_for
from drift_fast.integrations.settings import Settings
from support.commands import run, succeeds
from support.synthetic import Pair, contents

EXAMPLES = Path(__file__).parents[2] / "examples"
# The pair that the examples are for.
SEVEN = {
    "multimodal": "Qwen/Qwen2.5-VL-7B-Instruct",
    "model_type": "qwen2_5_vl",
    "tuning": "full",
    "adapted": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "delta": "delta",
    "data": "train.jsonl",
    "modules": "attn,mlp",
}


def texts_of(stack: str, **changes: Any) -> dict[str, str]:
    given = {**SEVEN, **changes}
    return render(STACKS[stack], values_for(**given), given["tuning"])


@pytest.mark.parametrize("stack", ["llamafactory", "swift", "axolotl", "verl"])
def test_the_examples_of_frameworks_are_what_setup_writes(stack: str) -> None:
    folder = EXAMPLES / stack
    texts = texts_of(stack)
    assert {file.name for file in folder.iterdir()} == {*texts, "README.md"}
    for name, text in texts.items():
        assert (folder / name).read_text(encoding="utf-8") == text, (
            f"{folder / name} differs from what cli/setups makes; copy the one to the other"
        )


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("stack", STACKS)
def test_every_file_is_whole_and_its_settings_exist(stack: str, tuning: str) -> None:
    yaml = pytest.importorskip("yaml")
    sections = 0
    for name, text in texts_of(stack, tuning=tuning).items():
        assert not re.search(r"^@|\$[a-z{]", text, re.MULTILINE), text
        assert "FILL_IN" not in text
        assert max(map(len, text.splitlines())) <= 120
        if name.endswith(".py"):
            tree = ast.parse(text)
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            named = {word.arg for node in calls for word in node.keywords}
            sections += {"alpha", "scale", "modules", "residency"} <= named
        elif name.endswith(".json"):
            json.loads(text)
        elif name.endswith(".yaml"):
            content = yaml.safe_load(text)
            section = content if name == "drift.yaml" else content["drift_fast"]
            assert Settings.from_mapping(section, origin=name).modules == "attn,mlp"
            sections += 1
    assert sections == 1


@pytest.mark.parametrize("stack", [name for name, one in STACKS.items() if "train.py" in one.parts])
def test_adapters_are_spoken_of_where_there_are_some(stack: str) -> None:
    for tuning in TUNINGS:
        (text,) = texts_of(stack, tuning=tuning).values()
        assert ("adapters" in text.lower()) == (tuning == "lora")


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_a_model_without_a_processor_is_remarked_on(pair: Pair, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(pair.multimodal, tmp_path / "model")
    words = ("setup", "trl", pair.reasoning, folder)
    assert f"{folder} has no processor_config.json or preprocessor" in succeeds(*words).stderr
    (folder / name).write_text("{}")
    assert "processor" not in succeeds(*words).stderr


def test_a_model_type_that_is_not_known_is_left_to_fill_in() -> None:
    (text, _) = texts_of("llamafactory", model_type="new_vl").values()
    assert "template: FILL_IN\n" in text


def written(pair: Pair, out: Path, *more: object) -> str:
    succeeds("setup", "llamafactory", pair.reasoning, pair.multimodal, "--out", out, *more)
    return (out / "train.yaml").read_text(encoding="utf-8")


def test_what_is_asked_of_the_pair_is_in_the_file_and_in_the_command(
    pair: Pair, tmp_path: Path
) -> None:
    yaml = pytest.importorskip("yaml")
    text = written(pair, tmp_path / "a", "--modules", "attn", "--layers", "0", "--delta", "there")
    content = yaml.safe_load(text)
    assert content["model_name_or_path"] == str(pair.multimodal.resolve())
    assert content["drift_fast"]["delta"] == "there"
    assert content["drift_fast"]["modules"] == "attn"
    command = f"{pair.multimodal.resolve()} --out there --modules attn --layers 0\n"
    assert command in text


def test_a_delta_that_was_given_is_named_in_full_and_not_computed_again(
    pair: Pair, tmp_path: Path
) -> None:
    yaml = pytest.importorskip("yaml")
    succeeds("delta", pair.reasoning, pair.multimodal, "--out", "mine", cwd=tmp_path)
    words = ("setup", "llamafactory", pair.reasoning, pair.multimodal, "--out", "run")
    said = succeeds(*words, "--delta", "mine", cwd=tmp_path).stdout
    text = (tmp_path / "run" / "train.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["drift_fast"]["delta"] == str((tmp_path / "mine").resolve())
    assert f"# Δ: {(tmp_path / 'mine').resolve()}\n" in text
    assert said.splitlines() == ["next: cd run", f"next: {STACKS['llamafactory'].run}"]
    assert "drift-fast delta" not in text

    said = succeeds(*words, "--delta", "other", "--overwrite", cwd=tmp_path).stdout
    assert f"{pair.multimodal.resolve()} --out other" in said.splitlines()[1]


def test_a_delta_of_the_default_name_that_nobody_gave_is_not_taken_for_the_pairs(
    pair: Pair, tmp_path: Path
) -> None:
    succeeds("delta", pair.reasoning, pair.multimodal, "--out", "delta", cwd=tmp_path)
    said = succeeds("setup", "trl", pair.reasoning, pair.multimodal, "--out", "r", cwd=tmp_path)
    assert "--out delta" in said.stdout


@pytest.mark.parametrize("stack", STACKS)
def test_every_file_names_the_learning_rate_that_was_given(stack: str) -> None:
    assert "2.5e-5" in "".join(texts_of(stack, learning_rate=2.5e-5).values())


def test_a_learning_rate_is_a_number_in_yaml_and_the_papers_is_remarked_on(pair: Pair) -> None:
    yaml = pytest.importorskip("yaml")
    words = ("setup", "axolotl", pair.reasoning, pair.multimodal)
    given = succeeds(*words, "--learning-rate", "1e-5")
    assert yaml.safe_load(given.stdout)["learning_rate"] == 1e-5
    assert "1e-6" not in given.stderr
    left_out = succeeds(*words)
    assert yaml.safe_load(left_out.stdout)["learning_rate"] == 1e-6
    assert "the paper's 1e-6, at which λ may hardly move" in left_out.stderr
    assert "1e-6" not in succeeds(*words, "--tuning", "lora").stderr
    for refused in ("0", "-1", "nan", "inf"):
        assert "above 0" in run(*words, f"--learning-rate={refused}").stderr


def test_no_more_gpus_are_launched_than_anybody_spoke_of() -> None:
    assert STACKS["deepspeed"].run == "deepspeed --num_gpus 1 train.py"


def test_the_plan_chooses_adapters_where_whole_weights_do_not_fit(
    pair: Pair, tmp_path: Path
) -> None:
    assert "finetuning_type: full\n" in written(pair, tmp_path / "a", "--gpu-memory", "80GB")
    assert "finetuning_type: lora\n" in written(pair, tmp_path / "b", "--gpu-memory", "100kB")
    forced = ("--gpu-memory", "100kB", "--tuning", "full")
    assert "finetuning_type: full\n" in written(pair, tmp_path / "c", *forced)
    words = ("setup", "llamafactory", pair.reasoning, pair.multimodal, "--gpu-memory", "100kB")
    said = succeeds(*words).stderr
    assert "LoRA does not fit into 100kB of one GPU; none of the changes tried makes" in said
    assert "fits none" not in said
    assert "would fit" not in said
    assert "LoRA does not fit into 100kB" in succeeds(*words, "--tuning", "lora").stderr


@pytest.mark.parametrize("stack", STACKS)
def test_every_file_of_adapters_has_the_rank_that_was_given(stack: str) -> None:
    text = "".join(texts_of(stack, tuning="lora", rank=24).values())
    assert re.search(r"\b(?:lora_rank|lora_r|r)[=: ]+24\b", text)
    assert re.search(r"\blora_alpha[=: ]+48\b", text)


def test_a_rank_chooses_adapters_and_comes_with_a_plan(pair: Pair, tmp_path: Path) -> None:
    planned = succeeds("plan", pair.reasoning, pair.multimodal, "--steps", "5", "--lora-rank", "8")
    (following,) = re.findall(r"drift-fast setup trainer .*", planned.stdout)
    assert "--lora-rank 8" in following
    text = written(pair, tmp_path / "a", "--lora-rank", "8")
    assert "finetuning_type: lora\n" in text
    assert "lora_rank: 8\n" in text
    words = ("setup", "llamafactory", pair.reasoning, pair.multimodal)
    assert "tuning is 'full'" in run(*words, "--lora-rank", "8", "--tuning", "full").stderr
    assert "at least 1" in run(*words, "--lora-rank", "0").stderr


def test_a_file_that_is_there_stays_unless_it_may_be_replaced(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.yaml").write_text("mine")
    before = contents(out)
    words = ("setup", "llamafactory", pair.reasoning, pair.multimodal, "--out", out)
    refused = run(*words)
    assert refused.returncode == 1
    assert "train.yaml already" in refused.stderr
    assert contents(out) == before
    succeeds(*words, "--overwrite")
    assert "drift_fast:" in (out / "train.yaml").read_text()


def test_a_pair_that_does_not_fit_is_refused_as_by_check(pair: Pair, tmp_path: Path) -> None:
    words = (pair.multimodal, pair.reasoning)
    checked = run("check", *words)
    assert checked.returncode == 1
    refused = run("setup", "trl", *words, "--out", tmp_path / "out")
    assert refused.returncode == 1
    # What to do next is for `check` to say.
    assert checked.stdout.startswith(refused.stdout)
    assert not (tmp_path / "out").exists()


def test_every_option_of_a_selection_reaches_the_command_for_delta() -> None:
    # `setup` hands these on by name.
    assert set(SelectionOptions.names()) == {"modules", "layers", "mapping", "rows"}


def test_every_stack_was_run_from_an_environment_of_its_own_or_is_named_as_not_run() -> None:
    page = (EXAMPLES.parent / "docs" / "stacks.md").read_text(encoding="utf-8")
    section = page.partition("<!-- make test-stacks writes")[2].partition("\n## ")[0]
    assert not [
        name for name in STACKS if f"\n| {name} |" not in section and f"`{name}`" not in section
    ]
    pinned = tomllib.loads((EXAMPLES.parent / "tests/installed_stacks/versions.toml").read_text())
    assert set(pinned) <= set(STACKS)
