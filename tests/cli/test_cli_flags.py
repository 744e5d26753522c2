"""A message written for Python names the flags of the command that prints it."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import pytest

import drift_fast
from drift_fast.cli.flags import as_flags, flags_of
from drift_fast.cli.main import main
from support.synthetic import Pair

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--rows")
PARSER.add_argument("--max-shard-size")
PARSER.add_argument("--strict", action=argparse.BooleanOptionalAction)
PARSER.add_argument("--overwrite", action=argparse.BooleanOptionalAction)


@pytest.fixture(autouse=True)
def own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give back what `main` replaces."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ('or pass rows="index" if', "or pass --rows index if"),
        ("with strict=False, it", "with --no-strict, it"),
        ("pass strict=False.", "pass --no-strict."),
        ("pass rows=None for", "pass --rows none for"),
        ("pass overwrite=True (--overwrite) to", "pass --overwrite to"),
        ("needs max_shard_size=…", "needs --max-shard-size …"),
        ("attach with residency='host'", "attach with residency='host'"),
        ('call f(…, rows="index") and', 'call f(…, rows="index") and'),
        ("/data/rows=1/a", "/data/rows=1/a"),
        ("so it is\nrows=1: 3 tensors", "so it is\nrows=1: 3 tensors"),
        ("θ=10,000 and rows = 3", "θ=10,000 and rows = 3"),
    ],
)
def test_options_become_flags(written: str, shown: str) -> None:
    assert as_flags(written, flags_of(PARSER)) == shown


def test_without_a_command_nothing_changes() -> None:
    assert as_flags('pass rows="index"', flags_of(None)) == 'pass rows="index"'


def test_a_flag_of_another_command_is_said_to_be_its() -> None:
    flags = flags_of(PARSER, " of drift-fast delta") | {"rows": flags_of(PARSER)["rows"]}
    said = as_flags('pass strict=False or rows="index"', flags)
    assert said == "pass --no-strict of drift-fast delta or --rows index"


@pytest.mark.parametrize("command", ["check", "align", "setup trl"])
def test_what_delta_would_refuse_is_told_in_its_flags(
    pair: Pair, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([*command.split(), str(pair.multimodal), str(pair.reasoning)]) == 1
    said = capsys.readouterr().out
    assert "pass --no-strict of drift-fast delta" in said
    assert "strict=" not in said


def test_a_result_spells_the_flags_of_its_command(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(pair.reasoning), str(pair.multimodal), "--steps", "9", "--rms", "1e-9"]
    assert main([*words, "--precision", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "stop with --progress-cap …" in said
    assert "from_pretrained(…, dtype=torch.float32)" in said


def test_advice_for_one_process_alone_is_a_flag_that_delta_takes(
    pair: Pair, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DRIFT_FAST_RANK_TIMEOUT", "0.1")
    words = ["delta", str(pair.reasoning), str(pair.multimodal), "--out", str(out)]
    assert main([*words, "--ranks", "0/2"]) == 1
    said = capsys.readouterr().err
    advice = said.partition("is to write, pass ")[2].split()
    assert advice == ["--ranks", "none"]
    assert main([*words, *advice]) == 0


def test_a_size_without_a_unit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "a", "b", "--gpu-memory", "24"])
    assert "write a unit, such as 24GB" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    # Neither model exists, which would be found first otherwise.
    assert main(["delta", "no-a", "no-b", "--out", "out", "--plot", "p.png"]) == 1
    assert "pip install 'drift-fast[plot]'" in capsys.readouterr().err


def test_every_verb_ends_with_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = Path(drift_fast.__file__).parent / "demo" / "checkpoints"
    both = [str(checkpoints / "expert"), str(checkpoints / "multimodal")]
    planned = {"steps": 3, "learning_rate": 2e-5, "layers": "1", "gpu_memory": "80GB"}
    Path("training.json").write_text(json.dumps({"plan": planned}))
    delta = f"next: drift-fast delta {' '.join(both)} --out delta"
    attach = 'next: drift_fast.attach(trainer, "delta"), before trainer.train()'
    for arguments, last in (
        (["align", *both], f"next: drift-fast check {' '.join(both)}"),
        (["check", *both], delta),
        (["check", *both, "--layers", "0-2"], f"{delta.removesuffix('--out delta')}--layers 0-2"),
        (["inspect", *both], delta),
        (["inspect", *both, "--modules", "mlp"], delta.replace("--out", "--modules mlp --out")),
        (["delta", *both, "--out", "delta"], attach),
        (["plan", *both, "--steps", "3"], f"next: drift-fast setup trainer {' '.join(both)}"),
        (
            ["plan", *both, "--steps", "3", "--delta", "delta", "--learning-rate", "1e-5"],
            f"next: drift-fast setup trainer {' '.join(both)} "
            "--delta delta --learning-rate 1e-05 --out run",
        ),
        (
            ["plan", *both, "--config", "training.json"],
            f"next: drift-fast setup trainer {' '.join(both)} "
            "--layers 1 --learning-rate 2e-05 --gpu-memory 80GB --out run",
        ),
        (["setup", "trl", *both, "--out", "run"], "next: python train.py"),
        (
            ["merge", "linear", *both, "-o", "merged", "--weight", "0.5", "--modules", "attn"],
            "next: transformers.AutoModelForImageTextToText.from_pretrained",
        ),
        (["report", "page.html", "delta"], "next: open file://"),
    ):
        assert main(arguments) == 0, arguments
        assert capsys.readouterr().out.splitlines()[-1].startswith(last), arguments


def test_towers_and_projectors_are_left_alone_and_not_missed(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["align", str(pair.reasoning), str(pair.multimodal)]) == 0
    said = capsys.readouterr().out
    assert "towers and projectors left alone: 24 tensors" in said
    assert "without a match" not in said
    assert main(["align", str(pair.reasoning), str(pair.multimodal), "--all"]) == 0
    assert "without a match in the multimodal checkpoint: 24" in capsys.readouterr().out
