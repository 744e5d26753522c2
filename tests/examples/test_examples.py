"""Every example runs as it stands, as a process of its own, and says where λ has come to."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from drift_fast.integrations.settings import Settings
from support import processes

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "lora": ["peft", "accelerate"],
    "qlora": ["peft", "accelerate", "bitsandbytes"],
    "planned_motion": ["accelerate"],
    "accelerate_loop": ["accelerate"],
    "trainer": ["accelerate"],
    "trl_sft": ["trl", "datasets"],
    "lightning_module": ["lightning"],
}
# Imported by the others, not run.
SHARED = {"tiny"}


def run(command: list[str]) -> str:
    return processes.run(sys.executable, *command, cwd=EXAMPLES, limit=280, forked=True).stdout


def assert_moved(output: str) -> None:
    found = re.findall(r"λ(?: after [^:\n]*(?::| is))? (-?[0-9]+[.][0-9]+)", output)
    progress = [float(value) for value in found]
    assert progress, output
    assert all(0.0 < value < 2.0 for value in progress), output


@pytest.mark.parametrize(
    "name",
    [
        "plain_loop",
        pytest.param("autocast_gradscaler", marks=pytest.mark.slow),
        pytest.param("accelerate_loop", marks=pytest.mark.slow),
        "trainer",
        pytest.param("trl_sft", marks=pytest.mark.slow),
        pytest.param("lightning_module", marks=pytest.mark.slow),
        pytest.param("compile", marks=pytest.mark.slow),
        pytest.param("gradient_checkpointing", marks=pytest.mark.slow),
        pytest.param("optimizers", marks=pytest.mark.slow),
        "lora",
        pytest.param("qlora", marks=pytest.mark.slow),
        pytest.param("planned_motion", marks=pytest.mark.slow),
    ],
)
def test_an_example_runs_and_moves_along_the_delta(name: str) -> None:
    pytest.importorskip("transformers")
    for package in NEEDS.get(name, []):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    assert_moved(run([f"{name}.py"]))


def test_sixteen_bits_take_away_what_the_example_shows() -> None:
    pytest.importorskip("transformers")
    output = run(["sixteen_bits.py"])
    assert_moved(output)
    rounded, whole = (float(value) for value in re.findall(r"λ after .* is ([0-9.]+)", output))
    assert rounded < 0.3 * whole, output
    shares = [float(value) for value in re.findall(r"([0-9.]+)% of", output) if "." in value]
    assert shares[2:] == [0.0, 0.0], output
    assert min(shares[0] - 15, shares[1] - 25) > 0, output
    assert output.count("warning:") == 2, output


@pytest.mark.parametrize("name", ["ddp", "fsdp1", "deepspeed_zero"])
@pytest.mark.slow
def test_an_example_of_two_processes_runs(name: str) -> None:
    pytest.importorskip("transformers")
    if name == "deepspeed_zero":
        for package in ("deepspeed", "ninja"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert_moved(run([*launch, f"{name}.py"]))


@pytest.mark.slow
def test_the_vision_language_example_trains_on_images_and_logs_where_it_came(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    output = run(["vision_language.py", "--steps", "4", "--out", str(tmp_path)])
    assert re.search(r"^DRIFT: \d+% of sums right", output, re.MULTILINE), output
    rows = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()]
    progress = [float(value) for _, metric, value in rows[1:] if metric == "progress"]
    assert len(progress) == 4
    assert 0.0 < progress[-1] < 2.0


def test_the_configuration_examples_hold_settings_that_exist() -> None:
    yaml = pytest.importorskip("yaml")
    found = sorted(EXAMPLES.glob("*/*.yaml"))
    checked = []
    for file in found:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        section = content if file.name == "drift.yaml" else content.get("drift_fast")
        if section is not None:
            assert Settings.from_mapping(section, origin=str(file)).to_dict()
            checked.append(file.parent.name)
    assert sorted(checked) == ["axolotl", "llamafactory", *["qwen2_5_vl_7b"] * 3, "swift", "verl"]


def test_the_index_names_every_example() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    present = {file.stem for file in EXAMPLES.glob("*.py")} - SHARED
    present |= {folder.name for folder in EXAMPLES.iterdir() if (folder / "README.md").is_file()}
    assert not [name for name in sorted(present) if name not in index]
