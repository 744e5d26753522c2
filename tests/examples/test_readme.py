"""The Python blocks of README and the pages behind it run, on the demo's checkpoints."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from drift_fast.cli.main import main

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "injecting.md")
CHECKPOINTS = Path(drift_fast.__file__).parent / "demo" / "checkpoints"
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
]


def batches() -> list[list[dict[str, torch.Tensor]]]:
    """Return two steps of two micro-batches of tokens that no image stands for."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 12, (2, 2, 2, 8), generator=generator)
    return [[{"input_ids": part, "labels": part} for part in step] for step in tokens]


def loss(model: torch.nn.Module, part: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model(**part).loss
    return found


def test_every_python_block_of_the_first_pages_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer_class = transformers.Trainer

    def trainer(model: torch.nn.Module, *_: Any) -> Any:
        """Build what the dots of `Trainer(model, ...)` stand for."""
        return trainer_class(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=20,
                per_device_train_batch_size=2,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=[
                dict(zip(part, rows, strict=True))
                for step in batches()
                for part in step
                for rows in zip(*part.values(), strict=True)
            ],
        )

    # Loading the Trainer puts another module in the place of the lazy one.
    monkeypatch.setattr(sys.modules["transformers"], "Trainer", trainer)
    space: dict[str, Any] = {
        "torch": torch,
        "batches": batches(),
        "loss": loss,
        "reasoning": CHECKPOINTS / "expert",
        "multimodal": CHECKPOINTS / "multimodal",
        "text_base": CHECKPOINTS / "base",
    }
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        # Each block begins with a model that nothing is attached to.
        space["model"] = model = transformers.LlavaForConditionalGeneration.from_pretrained(
            CHECKPOINTS / "multimodal", dtype=torch.float32
        )
        space["optimizer"] = torch.optim.SGD(model.parameters(), lr=1e-3)
        space["trainer"] = trainer(model)
        local = re.sub(
            r"^pair = .*$", "pair = reasoning, multimodal", block, count=1, flags=re.MULTILINE
        )
        with warnings.catch_warnings():
            # So few steps move the weights hardly at all, which is what the warning says.
            warnings.simplefilter("ignore", drift_fast.DriftWarning)
            exec(compile(local, str(README), "exec"), space)
    assert space["injection"].targets
    assert "verdict" in capsys.readouterr().out


def test_the_readme_stays_short() -> None:
    assert README.read_text(encoding="utf-8").count("\n") <= 120


def test_getting_started_works_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    page = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
    shutil.copytree(CHECKPOINTS, tmp_path / "pair")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^drift-fast (.*)$", page, re.MULTILINE)
    assert len(commands) == 5
    of_the_run = [command for command in commands if "metrics.csv" in command]
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for command in [command for command in commands if command not in of_the_run]:
        assert main(shlex.split(command)) == 0, command
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    shorter = {
        "max_steps=200": "max_steps=2",
        "Protocol()": "Protocol(answers_per_length=4, readings_per_length=4)",
    }
    for written, used in shorter.items():
        assert written in script
        script = script.replace(written, used)
    with warnings.catch_warnings():
        # Two steps move the weights hardly at all.
        warnings.simplefilter("ignore", drift_fast.DriftWarning)
        exec(compile(script, "train.py", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("λ 0.0")
    assert (tmp_path / "trained" / "model.safetensors").exists()
    # A run of two steps, fewer than it logs after, still says where it has come.
    assert "2,progress," in (tmp_path / "metrics.csv").read_text()
    pytest.importorskip("plotly")
    for command in of_the_run:
        assert main(shlex.split(command)) == 0, command
