"""A shell completes commands, options and choices by the script that `completion` prints."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from drift_fast.cli.main import main
from support import processes

COMPLETES = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
$(complete -p drift-fast | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(autouse=True)
def own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give back what `main` replaces."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["in"], ["inspect"]),
        (["inspect", "--mod"], ["--modules"]),
        (["inspect", "a", "b", "--by", ""], ["module", "layer", "tensor"]),
        (["plan", "a", "b", "--sharding", "z"], ["zero1", "zero2", "zero3"]),
        (["merge", "t"], ["task_arithmetic", "ties"]),
        (["setup", "llama"], ["llamafactory"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["check", "./mod"], ["./model.safetensors"]),
    ],
    ids=" ".join,
)
def test_bash_completes_commands_options_choices_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: list[str], completed: list[str]
) -> None:
    file = tmp_path / "drift-fast.bash"
    file.write_text(script("bash", capsys))
    (tmp_path / "model.safetensors").touch()
    found = processes.run(
        "bash", "--norc", "-c", COMPLETES, "bash", file, "drift-fast", *typed, cwd=tmp_path
    )
    assert set(found.stdout.split()) == set(completed)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_with_every_command(
    capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    text = script(shell, capsys)
    for word in ("inspect", "protect", "max-shard-size", "llamafactory"):
        assert word in text


def test_without_shtab_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install 'drift-fast[completion]'" in capsys.readouterr().err
